"""graph: a gallery's faces in, the edges between near ones out; restartable task by task, on this machine or on Ray."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from facepipe.curation.graph import cells, cost, edges, graph, truth
from facepipe.curation.graph.calibration import Asked, calibrate
from facepipe.curation.graph.cells import Cells, Layout
from facepipe.curation.graph.describe import cap_density
from facepipe.curation.graph.graph import Graph, GraphInfo
from facepipe.curation.graph.nodes import Nodes, collect, open_nodes, representatives
from facepipe.curation.graph.threshold import Threshold
from facepipe.errors import ConfigError, GalleryError, StorageError
from facepipe.gallery import Gallery
from facepipe.models.runtime.device import resolve_device
from facepipe.models.zoo.registry import find_match_threshold
from facepipe.nearest.join import find_candidate_pairs
from facepipe.nearest.similarity import Pairs, refine_pairs
from facepipe.storage import describe_error, is_remote, replace_file
from pipelines.embed.config import Count
from pipelines.runtime.runners import ray

Share = Annotated[float, Field(gt=0, le=1)]
Distance = Annotated[float, Field(gt=0, lt=2)]
_TASK = 4e9  # comparisons of one task: some seconds of two cores
_THRESHOLD = "threshold.json"
_TEMPORARY = ("cells", "assigned", "members", "begins", "wide")  # the first says that the others are there
_DECIDES = ("threshold", "impostors", "reach", "most", "recall", "seed")


@dataclass(frozen=True)
class GraphConfig:
    """Which faces are joined.

    threshold: distance from which two faces of mean density count as two persons; by default found from the data
    impostors: share of the pairs above the threshold that may be of two persons, where it is found from the data
    reach: all pairs nearer than this distance are edges as well, whatever the density: dedup looks at them
    most: neighbours of a face at most, in a cell
    recall: share of the edges to be found, of those that comparing every pair would find
    seed: of all samples
    """

    threshold: Distance | None = None
    impostors: Share = 0.2
    reach: Distance = 0.25
    most: Count = 32
    recall: Share = 0.985
    seed: int = 0


@dataclass(frozen=True)
class GraphRunConfig:
    """How the work is run. None of it changes what comes out, but that a GPU compares every face with every other also
    where cells would have to do without one: then no edge is missing.

    runner: inline (this process, all its CPUs), ray (a task some cells), or auto: ray where RAY_ADDRESS names a cluster
    cpus: of a Ray task
    device: where all faces are compared with all: auto (a GPU, where one is there and pays), cpu, cuda or cuda:N
    """

    runner: Literal["auto", "inline", "ray"] = "auto"
    cpus: Count = 2
    device: str = "auto"


Progress = Callable[[str], None]


def open_graph(
    galleries: Sequence[Gallery],
    config: GraphConfig,
    run: GraphRunConfig,
    folder: str,
    progress: Progress = lambda line: None,
) -> Graph:
    """The graph in a folder, made or made anew where the tables or the settings are others than those it is of.

    One that was interrupted is taken up at its last finished task. Raises GalleryError where there is no face.
    """
    if run.runner == "ray" and any(is_remote(gallery.path) for gallery in galleries):
        raise ConfigError("the graph of a gallery in an object store is made on one machine: leave run.runner=ray out")
    settings = json.dumps({name: value for name, value in asdict(config).items() if name in _DECIDES}, sort_keys=True)
    wanted = _identity(galleries, settings)
    if _is_of(folder, wanted):
        with suppress(StorageError):
            found = Graph(folder)
            progress(f"the graph of {found.info.faces} faces is up to date")
            return found
        progress("the graph is damaged: making it anew")
    partial = folder.rstrip("/") + ".partial"
    if not _is_of(partial, wanted):  # it may be complete, but for its name
        _begin(partial, wanted)
        _Builder(galleries, config, run, partial, progress, wanted).build()
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return Graph(folder)


def _identity(galleries: Sequence[Gallery], settings: str) -> tuple[tuple[str, ...], tuple[int, ...], str]:
    return tuple(gallery.id for gallery in galleries), tuple(gallery.version for gallery in galleries), settings


def _is_of(folder: str, wanted: tuple[Any, ...]) -> bool:
    """Whether a finished graph of these tables and settings lies there."""
    try:
        found = graph.read_info(folder)
    except StorageError:
        return False
    return (found.galleries, found.versions, found.settings) == wanted


def _begin(partial: str, wanted: tuple[Any, ...]) -> None:
    """The folder to work in; what lies there for another graph is of no use."""
    path, state = os.path.join(partial, "state.json"), json.dumps(wanted)
    try:
        if os.path.isdir(partial) and _text(path) != state:
            shutil.rmtree(partial)
        os.makedirs(partial, exist_ok=True)
        with open(path, "w") as file:
            file.write(state)
    except OSError as error:
        raise StorageError(f"cannot write {partial!r}: {describe_error(error)}") from error


def _text(path: str) -> str | None:
    """What a small file says; None where there is none."""
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return file.read()


class _Builder:
    """One graph: each step leaves files, and a step whose files are there is not done again."""

    def __init__(
        self,
        galleries: Sequence[Gallery],
        config: GraphConfig,
        run: GraphRunConfig,
        folder: str,
        progress: Progress,
        wanted: tuple[Any, ...],
    ):
        self.galleries, self.config, self.run, self.folder = galleries, config, run, folder
        self.progress, self.wanted, self.began = progress, wanted, time.monotonic()
        shared = not any(is_remote(gallery.path) for gallery in galleries)
        self.on_ray = run.runner == "ray" or (run.runner == "auto" and shared and "RAY_ADDRESS" in os.environ)

    def build(self) -> None:
        try:
            self._build()
        finally:
            if self.on_ray:
                ray.stop()

    def _build(self) -> None:
        nodes = self._nodes()
        if not len(nodes):
            raise GalleryError(f"no face in {self.galleries[0].path!r}: there is nothing to compare")
        density, threshold = self._calibrated(nodes)
        wide = cap_density(density, threshold.similarity, self.config.reach)
        chosen = self._cells(nodes, wide, threshold)
        exact = len(chosen.centres) == 1
        self._edges(nodes, wide, chosen, threshold)
        sample = truth.draw(len(nodes), self.config.seed + 1)
        true = self._true(nodes, wide, sample, threshold)
        held = edges.Edges(self.folder)
        recall = truth.recall(sample, true, held, len(nodes))
        galleries, versions, settings = self.wanted
        info = GraphInfo(
            *(galleries, versions, settings, len(nodes), len(held), len(chosen.centres), chosen.each),
            *(self.config.most, exact, threshold, float(density.mean()), recall, len(true[0])),
            seconds=round(time.monotonic() - self.began, 3),
        )
        graph.write_info(self.folder, info)
        for name in _TEMPORARY:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self.folder, f"{name}.npy"))

    def _nodes(self) -> Nodes:
        done = os.path.join(self.folder, graph.REPRESENTATIVES)
        if not os.path.exists(done):
            self.progress("reading the faces")
            nodes = collect(self.galleries, self.folder)
            _save(done, representatives(nodes.vectors))
        return open_nodes(self.folder)

    def _calibrated(self, nodes: Nodes) -> tuple[np.ndarray[Any, np.dtype[np.float32]], Threshold]:
        path = os.path.join(self.folder, _THRESHOLD)
        if os.path.exists(path):
            with open(path) as file:
                return np.load(os.path.join(self.folder, graph.DENSITY)), Threshold(**json.load(file))
        self.progress(f"{len(nodes)} faces: finding the threshold")
        embedder, config = self.galleries[0].contract.embedder, self.config
        asked = Asked(config.threshold, config.impostors, find_match_threshold(embedder), embedder, config.seed)
        found = calibrate(nodes.vectors, asked)
        if not (found.threshold.estimated or config.threshold):
            self.progress("the faces do not show where one person ends: taking the model's own threshold")
        named = ((graph.DENSITY, found.density), (graph.COHORT, found.cohort.vectors), (graph.HISTOGRAM, found.counts))
        for name, array in named:
            _save(os.path.join(self.folder, name), array)
        with replace_file(path) as unfinished, open(unfinished, "w") as file:
            json.dump(asdict(found.threshold), file)
        return found.density, found.threshold

    def _cells(self, nodes: Nodes, density: Any, threshold: Threshold) -> Cells:
        """Cells, and the fewest of them each that reach the recall on a sample."""
        path = os.path.join(self.folder, "cells.npy")
        if not os.path.exists(path):
            if cells.all_are_compared(len(nodes), *self._means()):
                made = cells.one(nodes.vectors.shape[1])
            else:
                made = cells.train(nodes.vectors, self.config.seed, self.progress)
            if len(made.centres) > 1:
                made = self._enough(made, nodes, density, threshold)
                self.progress(f"{len(made.centres)} cells, each face in {made.each}")
            found = Layout.make(nodes.vectors, made, self.folder)
            del found
            _save(path, made.centres)
        return Cells(np.load(path), Layout.open(self.folder).assigned.shape[1])

    def _means(self) -> tuple[int, bool]:
        """(cores, whether there is a GPU that may be used)."""
        cores = ray.start().cpus if self.on_ray else len(os.sched_getaffinity(0))
        return cores, self._device != "cpu"

    @cached_property
    def _device(self) -> str:
        return ray.device(self.run.device, ray.start()) if self.on_ray else resolve_device(self.run.device)

    def _joined_on(self, faces: int, exact: bool) -> str:
        """The device that compares pairs: cells are compared on CPUs, many at a time."""
        cores, gpu = self._means()
        pays = gpu and cost.all_pairs(faces, cores, True) < cost.all_pairs(faces, cores, False)
        return self._device if exact and (pays or self.run.device != "auto") else "cpu"

    def _enough(self, made: Cells, nodes: Nodes, density: Any, threshold: Threshold) -> Cells:
        sample = truth.draw(len(nodes), self.config.seed, budget=5e8)
        u, v = self._true(nodes, density, sample, threshold)
        if not len(u):
            return made
        left, right = (made.assign(nodes.vectors[x], cells.MOST_CELLS_EACH) for x in (u, v))
        for each in range(2, cells.MOST_CELLS_EACH + 1):
            if cells.shared(left, right, each).mean() >= self.config.recall:
                break
        return Cells(made.centres, each)

    def _true(self, nodes: Nodes, density: Any, sample: Any, threshold: Threshold) -> tuple[Any, Any]:
        """True edges of a sample, those of copies left out: a copy is joined to the first of its kind and no other."""
        u, v = truth.true_edges(nodes.vectors, density, sample, threshold.similarity, self.config.most)
        copies = np.load(os.path.join(self.folder, graph.REPRESENTATIVES))
        first = (copies[u] == u) & (copies[v] == v)
        return u[first], v[first]

    def _edges(self, nodes: Nodes, density: Any, chosen: Cells, threshold: Threshold) -> None:
        _save(os.path.join(self.folder, "wide.npy"), density)
        layout = Layout.open(self.folder)
        ranges = list(enumerate(layout.work(_TASK)))
        device = self._joined_on(len(nodes), exact=len(chosen.centres) == 1)
        rule = (threshold.similarity, self.config.most, device)
        tasks = [_Task(self.folder, n, first, last, *rule) for n, (first, last) in ranges]
        left = [task for task in tasks if not os.path.exists(edges.part(self.folder, task.number))]
        done: Iterable[tuple[_Task, int]] = ((task, _join(task)) for task in left)
        if self.on_ray and left:
            ray.start()
            done = ray.tasks(_join, left, self.run.cpus, gpus=int(device != "cpu"))
        for n, (_, found) in enumerate(done, 1):
            self.progress(f"edges: task {len(tasks) - len(left) + n} of {len(tasks)}, {found} found")
        copies = np.load(os.path.join(self.folder, graph.REPRESENTATIVES))
        moved = np.flatnonzero(copies != np.arange(len(copies)))
        same = Pairs(copies[moved], moved, np.zeros(len(moved), np.float32))
        edges.write(same, edges.part(self.folder, len(tasks)))


@dataclass(frozen=True)
class _Task:
    folder: str
    number: int
    first: int
    last: int
    threshold: float
    most: int
    device: str


def _join(task: _Task) -> int:
    """The edges of some cells, as one part; how many."""
    nodes, layout = open_nodes(task.folder), Layout.open(task.folder)
    density = np.load(os.path.join(task.folder, "wide.npy"), mmap_mode="r")
    copies = np.load(os.path.join(task.folder, graph.REPRESENTATIVES), mmap_mode="r")
    found = []
    for cell in range(task.first, task.last):
        inside = layout.inside(cell)
        inside = inside[copies[inside] == inside]
        all_ = len(inside) == len(nodes)  # then they stay where they are mapped from
        vectors = nodes.vectors if all_ else nodes.vectors[inside]
        found.append(_cell(layout, cell, inside, vectors, density[inside], task))
    pairs = edges.joined(found)
    edges.write(pairs, edges.part(task.folder, task.number))
    return len(pairs)


def _cell(layout: Layout, cell: int, inside: Any, vectors: Any, density: Any, task: _Task) -> Pairs:
    u, v = find_candidate_pairs(vectors, density, task.threshold, task.most, task.device)
    new = layout.first_met(cell, inside, u, v)
    pairs = refine_pairs(vectors, density, u[new], v[new], task.threshold)
    return Pairs(inside[pairs.u], inside[pairs.v], pairs.distance)


def _save(path: str, array: Any) -> None:
    """An array under its final name once it is complete."""
    with replace_file(path) as unfinished, open(unfinished, "wb") as file:
        np.save(file, np.asarray(array))
