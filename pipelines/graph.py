"""graph: a gallery's faces in, the edges between near ones out; resumable task by task, on this machine or on Ray."""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from facepipe.curation.graph import build
from facepipe.curation.graph.build import EdgeRule, EdgeTask, join_cells, join_packed_cells, pack_cells
from facepipe.curation.graph.calibration import CalibrationOptions
from facepipe.curation.graph.cells import (
    ASSIGNED_ROWS,
    Cells,
    assign_block,
    assign_blocks_here,
    should_compare_all,
)
from facepipe.curation.graph.cohort import Cohort, compute_block_density
from facepipe.curation.graph.cost import estimate_all_pairs
from facepipe.curation.graph.describe import cap_density
from facepipe.curation.graph.edges import Edges, write_part
from facepipe.curation.graph.graph import Graph, GraphInfo, GraphSource, read_info, write_info
from facepipe.curation.graph.nodes import Nodes
from facepipe.curation.graph.threshold import DEFAULT_IMPOSTORS, Threshold
from facepipe.curation.graph.truth import draw_sample, measure_recall
from facepipe.curation.report_folders import (
    GRAPH,
    PARTIAL,
    delete_report,
    prepare_folder,
    replace_report,
    require_ours,
    take_over_folders,
)
from facepipe.errors import GalleryError, StorageError
from facepipe.gallery import Gallery
from facepipe.models.runtime.device import resolve_device
from facepipe.models.zoo.registry import find_match_threshold
from facepipe.storage import describe_error, sync_disks
from facepipe.storage.atomic import swap_folders
from facepipe.storage.lease import Lease
from facepipe.types import Float32, Int32
from pipelines.embed.config import Count
from pipelines.runtime.runners import ray

Share = Annotated[float, Field(gt=0, le=1)]
Distance = Annotated[float, Field(gt=0, lt=2)]
_MIN_SHARED_COMPARISONS = 1e10  # of faces with cells: half a minute of two cores
OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class GraphConfig:
    """Which faces are joined.

    Attributes:
        threshold: Distance from which two faces of mean density count as two persons; by default estimated from the
            data.
        impostors: Share of the faces within the threshold of a face that may be strangers, on average over faces, if
            the threshold is estimated from the data.
        reach: Distance below which all pairs are edges, whatever the density; dedup looks at them.
        most: Maximum neighbours per face in a crowded cell.
        recall: Share of the edges to find, of those that comparing every pair would find.
        seed: Random seed of all samples.
    """

    threshold: Distance | None = None
    impostors: Share = DEFAULT_IMPOSTORS
    reach: Distance = 0.25
    most: Count = 32
    recall: Share = 0.985
    seed: int = 0


@dataclass(frozen=True)
class GraphRunConfig:
    """How the work is run. It does not change the result, with one exception.

    A GPU compares every face with every other, also if without one only faces that share a cell would be compared. Then
    no edge is missing.

    Attributes:
        runner: inline (this process, all its CPUs), ray (one task per group of cells; the nodes need no folder in
            common), or auto: ray if RAY_ADDRESS names a cluster.
        cpus: CPUs per Ray task.
        device: Device that compares all faces with all: auto (a GPU if there is one and it pays), cpu, cuda or cuda:N.
    """

    runner: Literal["auto", "inline", "ray"] = "auto"
    cpus: Count = 2
    device: str = "auto"


def uses_ray(run: GraphRunConfig) -> bool:
    """Say whether the tasks of a graph run on Ray."""
    return run.runner == "ray" or (run.runner == "auto" and "RAY_ADDRESS" in os.environ)


def open_graph(
    galleries: Sequence[Gallery],
    config: GraphConfig,
    run: GraphRunConfig,
    folder: str,
    on_progress: OnProgress = lambda line: None,
    lease: Lease | None = None,
) -> Graph:
    """Open the graph in a folder. It is built, or built again if the tables or the settings have changed.

    An interrupted build resumes after its last finished task.

    Args:
        galleries: one, or two that are compared.
        config: which faces are joined.
        run: how the work is run.
        folder: of the graph.
        on_progress: is called with a line per step.
        lease: of the reports, if others may make a graph in the same folder.

    Raises:
        GalleryError: there is no face.
        GalleryBusyError: another run has taken the lease over.
    """
    source = _get_source(galleries, config)
    # No run that was paused may publish its graph from here on.
    partial = f"{folder.rstrip('/')}.{lease.id if lease else secrets.token_hex(8)}{PARTIAL}"
    _take_over(folder, partial)
    # Use the graph in the folder if it is of these tables and settings.
    if _has_graph_of(folder, source):
        with suppress(StorageError):
            graph = Graph(folder)
            on_progress(f"the graph of {graph.info.faces} faces is up to date")
            return graph
        on_progress("the graph is damaged: rebuilding it")
    require_ours(folder, GRAPH)
    if not _has_graph_of(partial, source):  # it may be complete, but for its name
        _prepare_folder(partial, source)
        _GraphBuilder(galleries, config, run, source, partial, on_progress).run()
    # The new graph takes the place of the one before it. Files of somebody else stay in the folder.
    if lease is not None:
        lease.renew()
    try:
        sync_disks(partial)
        swap_folders(partial, folder)
        replace_report(partial, folder, GRAPH)
    except OSError as error:
        raise StorageError(f"cannot write {folder!r}: {describe_error(error)}") from error
    return Graph(folder)


def _take_over(folder: str, partial: str) -> None:
    try:
        take_over_folders(folder.rstrip("/"), partial, GRAPH)
    except OSError as error:
        raise StorageError(f"cannot write {folder!r}: {describe_error(error)}") from error


def _get_source(galleries: Sequence[Gallery], config: GraphConfig) -> GraphSource:
    return GraphSource(
        galleries=tuple(gallery.id for gallery in galleries),
        versions=tuple(gallery.version for gallery in galleries),
        settings=json.dumps(asdict(config), sort_keys=True),
    )


def _has_graph_of(folder: str, source: GraphSource) -> bool:
    """Say whether a folder holds a finished graph of these tables and settings."""
    try:
        return read_info(folder).source == source
    except StorageError:
        return False


def _prepare_folder(partial: str, source: GraphSource) -> None:
    """Create the folder to work in, and delete what it holds for another graph."""
    # The state says which graph the finished tasks belong to. Tasks of another graph are deleted.
    path = os.path.join(partial, "state.json")
    state = json.dumps([source.galleries, source.versions, source.settings, build.describe_split()])
    try:
        require_ours(partial, GRAPH)
        if os.path.isdir(partial) and _read_text(path) != state:
            delete_report(partial, GRAPH)
        prepare_folder(partial, GRAPH)
        with open(path, "w") as file:
            file.write(state)
    except OSError as error:
        raise StorageError(f"cannot write {partial!r}: {describe_error(error)}") from error


def _read_text(path: str) -> str | None:
    """Read a small file; None if it does not exist."""
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return file.read()


class _GraphBuilder:
    """One build: calls the steps of facepipe.curation.graph.build, and runs the tasks here or on Ray."""

    def __init__(
        self,
        galleries: Sequence[Gallery],
        config: GraphConfig,
        run: GraphRunConfig,
        source: GraphSource,
        folder: str,
        on_progress: OnProgress,
    ):
        self._galleries = galleries
        self._config = config
        self._run = run
        self._source = source
        self._folder = folder
        self._on_progress = on_progress
        self._began = time.monotonic()
        self._on_ray = uses_ray(run)

    def run(self) -> None:
        """Build the graph."""
        try:
            self._build()
        finally:
            if self._on_ray:
                ray.stop()

    def _build(self) -> None:
        config = self._config
        # 1. Collect the faces: one node per face.
        nodes = build.prepare_nodes(self._galleries, self._folder, self._on_progress)
        if not len(nodes):
            raise GalleryError(f"no face in {self._galleries[0].path!r}: there is nothing to compare")
        # 2. Estimate the density around each face (n,), and the threshold.
        options = self._get_calibration_options()
        density, threshold = build.prepare_calibration(
            nodes, self._galleries, options, self._folder, self._on_progress, self._compute_density
        )
        capped = cap_density(density, threshold.similarity, config.reach)
        rule = EdgeRule(threshold.similarity, config.most)
        # 3. Choose the cells within which faces are compared; a single cell compares all with all.
        cells = build.prepare_cells(
            nodes,
            capped,
            rule,
            compare_all=lambda: should_compare_all(len(nodes), self._count_cores(), self._device != "cpu"),
            recall=config.recall,
            seed=config.seed,
            folder=self._folder,
            log=self._on_progress,
            assign_blocks=self._assign_on_ray if self._on_ray else None,
        )
        # 4. Compare, and measure what share of the edges was found.
        self._join(build.plan_edge_tasks(capped, rule, self._folder, self._choose_device(len(nodes), len(cells) == 1)))
        write_info(self._folder, self._measure(nodes, density, capped, cells, threshold))
        build.delete_temporary(self._folder)

    def _get_calibration_options(self) -> CalibrationOptions:
        embedder = self._galleries[0].contract.embedder
        return CalibrationOptions(
            threshold=self._config.threshold,
            impostors=self._config.impostors,
            model_threshold=find_match_threshold(embedder),
            embedder=embedder,
            seed=self._config.seed,
        )

    def _count_cores(self) -> int:
        return ray.start().cpus if self._on_ray else len(os.sched_getaffinity(0))

    @cached_property
    def _device(self) -> str:
        """The requested device, or the one that `auto` finds."""
        return ray.choose_device(self._run.device, ray.start()) if self._on_ray else resolve_device(self._run.device)

    def _choose_device(self, faces: int, exact: bool) -> str:
        """Choose the device that compares pairs. Cells are compared on CPUs, many at a time."""
        if not exact or self._device == "cpu":
            return "cpu"
        # A GPU that `auto` found is used only if it is estimated to be faster than the CPUs.
        cores = self._count_cores()
        pays = estimate_all_pairs(faces, cores, gpu=True) < estimate_all_pairs(faces, cores, gpu=False)
        return self._device if pays or self._run.device != "auto" else "cpu"

    def _join(self, tasks: list[EdgeTask]) -> None:
        """Run the tasks that have no part yet, and write the edges of copies behind theirs."""
        # Tasks leave a file each, so that a resumed build runs only those without one.
        pending = [task for task in tasks if not os.path.exists(task.path)]
        results: Iterable[tuple[EdgeTask, int]] = ((task, join_cells(task)) for task in pending)
        if self._on_ray and pending:
            ray.start()
            results = self._join_on_ray(pending)
        finished = len(tasks) - len(pending)
        for _, count in results:
            finished += 1
            self._on_progress(f"edges: task {finished} of {len(tasks)}, {count} found")
        build.write_copies(self._folder, len(tasks))

    def _compute_density(self, cohort: Cohort, vectors: Float32) -> Float32:
        """Compute densities (n,), on Ray if that is long."""
        if not self._on_ray or len(vectors) * len(cohort.vectors) < _MIN_SHARED_COMPARISONS:
            return cohort.compute_density(vectors)
        density = np.empty(len(vectors), np.float32)
        for begin, block in self._map_blocks(compute_block_density, vectors, cohort):
            density[begin : begin + len(block)] = block
        return density

    def _map_blocks(self, function: Callable[..., Any], vectors: Float32, shared: Any) -> Iterable[tuple[int, Any]]:
        """Run a function on blocks of vectors on Ray; yields where each block begins, and the result."""
        ray.start()

        def read_block(begin: int) -> Float32:
            return np.array(vectors[begin : begin + ASSIGNED_ROWS])

        begins = range(0, len(vectors), ASSIGNED_ROWS)
        return ray.run_tasks(function, begins, self._run.cpus, prepare=read_block, shared=shared)

    def _assign_on_ray(self, cells: Cells, vectors: Float32) -> Iterable[tuple[int, Int32]]:
        """Assign vectors to cells, on Ray if that is long: the comparisons grow with the square of the faces."""
        if len(vectors) * len(cells) < _MIN_SHARED_COMPARISONS:
            return assign_blocks_here(cells, vectors)
        return self._map_blocks(assign_block, vectors, cells)

    def _join_on_ray(self, tasks: list[EdgeTask]) -> Iterator[tuple[EdgeTask, int]]:
        """Run tasks on Ray; yields each with its number of edges."""
        uses_gpu = tasks[0].device != "cpu"
        if uses_gpu and not ray.find_blind_nodes(self._folder):
            # A GPU compares all faces in one task: too much to travel, if the nodes see the folder.
            yield from ray.run_tasks(join_cells, tasks, self._run.cpus, gpus=1)
            return
        # Cells travel with their vectors, and edges come back. So the nodes need no folder in common.
        results = ray.run_tasks(join_packed_cells, tasks, self._run.cpus, gpus=int(uses_gpu), prepare=pack_cells)
        for task, pairs in results:
            write_part(pairs, task.path)
            yield task, len(pairs)

    def _measure(
        self, nodes: Nodes, density: Float32, capped: Float32, cells: Cells, threshold: Threshold
    ) -> GraphInfo:
        """Measure the recall of the edges on another sample than the one that the cells were chosen by."""
        # Find all edges of a few faces by comparing them with every face, and count how many the graph has.
        rule = EdgeRule(threshold.similarity, self._config.most)
        sample = draw_sample(len(nodes), self._config.seed + 1)
        u, v = build.find_sample_edges(nodes, capped, sample, rule, self._folder)
        edges = Edges(self._folder)
        recall = measure_recall(sample, u, v, edges, len(nodes))
        return GraphInfo(
            galleries=self._source.galleries,
            versions=self._source.versions,
            settings=self._source.settings,
            faces=len(nodes),
            edges=len(edges),
            cells=len(cells),
            each=cells.each,
            most=self._config.most,
            exact=len(cells) == 1,
            threshold=threshold,
            mean_density=float(density.mean()),
            recall=recall,
            sampled=len(u),
            seconds=round(time.monotonic() - self._began, 3),
        )
