"""The steps that build a graph in a folder. Each leaves files, and a step whose files exist is not repeated."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np

from facepipe.curation.graph.calibration import (
    CalibrationOptions,
    ComputeDensity,
    calibrate,
    compute_density_here,
)
from facepipe.curation.graph.cells import (
    AssignBlocks,
    CellLayout,
    Cells,
    choose_cells_per_face,
    create_single_cell,
    train_cells,
)
from facepipe.curation.graph.edges import get_part_path, write_part
from facepipe.curation.graph.fitness import find_unfit_nodes
from facepipe.curation.graph.graph import COHORT, DENSITY, HISTOGRAM, IMPOSTORS, REPRESENTATIVES
from facepipe.curation.graph.nodes import Nodes, collect_nodes, find_representatives, open_nodes
from facepipe.curation.graph.threshold import Threshold
from facepipe.curation.graph.truth import draw_sample, find_true_edges
from facepipe.gallery import Gallery
from facepipe.nearest.join import find_candidate_pairs
from facepipe.nearest.similarity import Pairs, refine_pairs
from facepipe.storage import replace_file, sync_disks
from facepipe.types import Float32, Int64

_THRESHOLD = "threshold.json"
_CELLS = "cells.npy"
_CAPPED_DENSITY = "wide.npy"
# Files that a finished graph does not need. The first says that the others exist, so that it is deleted first.
_TEMPORARY = (_CELLS, "assigned.npy", "members.npy", "begins.npy", _CAPPED_DENSITY)
# Some seconds of a core, and some 40 MB of vectors where these travel. An unfinished graph says how it was split.
_PAIRS_PER_TASK = 2e8
_SAMPLE_BUDGET = 5e8  # comparisons to choose the cells by

Log = Callable[[str], None]


@dataclass(frozen=True)
class EdgeRule:
    """Which pairs are edges.

    Attributes:
        threshold: Similarity of an edge at least.
        max_neighbours: Neighbours per face in a crowded cell.
    """

    threshold: float
    max_neighbours: int


@dataclass(frozen=True)
class EdgeTask:
    """Some cells whose pairs are compared.

    Attributes:
        folder: Folder of the graph.
        number: Of the task, and of the part that it writes.
        first: First cell.
        last: Cell behind the last one.
        rule: Which pairs are edges.
        device: Device that compares.
    """

    folder: str
    number: int
    first: int
    last: int
    rule: EdgeRule
    device: str

    @property
    def path(self) -> str:
        """Path of the part that the task writes."""
        return get_part_path(self.folder, self.number)


def prepare_nodes(galleries: Sequence[Gallery], folder: str, log: Log) -> Nodes:
    """Collect the faces of the galleries, and find copies."""
    path = os.path.join(folder, REPRESENTATIVES)
    if not os.path.exists(path):
        log("reading the faces")
        nodes = collect_nodes(galleries, folder)
        representatives = find_representatives(nodes.vectors)
        sync_disks(folder)
        _save(path, representatives)
    return open_nodes(folder)


def prepare_calibration(
    nodes: Nodes,
    galleries: Sequence[Gallery],
    options: CalibrationOptions,
    folder: str,
    log: Log,
    compute_density: ComputeDensity = compute_density_here,
) -> tuple[Float32, Threshold]:
    """Compute densities (n,) and threshold from the fit faces of the galleries, or read them."""
    path = os.path.join(folder, _THRESHOLD)
    if os.path.exists(path):
        with open(path) as file:
            return np.load(os.path.join(folder, DENSITY)), Threshold(**json.load(file))
    log(f"{len(nodes)} faces: estimating the threshold")
    unfit = np.zeros(len(nodes), bool)
    for side, gallery in enumerate(galleries):
        unfit |= find_unfit_nodes(gallery, nodes, side=side)
    calibration = calibrate(nodes.vectors, options, unfit, compute_density)
    if not (calibration.threshold.estimated or options.threshold):
        log("no clear threshold in the data: using the model's default")
    _save(os.path.join(folder, DENSITY), calibration.density)
    _save(os.path.join(folder, COHORT), calibration.cohort.vectors)
    _save(os.path.join(folder, HISTOGRAM), calibration.counts)
    _save(os.path.join(folder, IMPOSTORS), calibration.impostors)
    # The threshold says that the other files exist, so that it comes last.
    with replace_file(path, sync=True) as unfinished, open(unfinished, "w") as file:
        json.dump(asdict(calibration.threshold), file)
    return calibration.density, calibration.threshold


def prepare_cells(
    nodes: Nodes,
    density: Float32,
    rule: EdgeRule,
    *,
    compare_all: Callable[[], bool],
    recall: float,
    seed: int,
    folder: str,
    log: Log,
    assign_blocks: AssignBlocks | None = None,
) -> Cells:
    """Choose the cells, and the fewest of them per face that reach the recall on a sample; or read them.

    Args:
        nodes: faces.
        density: capped densities (n,).
        rule: which pairs are edges.
        compare_all: says whether all faces are compared with all; is called only if cells are to be chosen.
        recall: share of the true edges to find.
        seed: of the samples.
        folder: of the graph.
        log: is called with a line per step.
        assign_blocks: assigns the faces to the cells; by default in this process.
    """
    path = os.path.join(folder, _CELLS)
    if not os.path.exists(path):
        cells = create_single_cell(nodes.vectors.shape[1])
        if not compare_all():
            cells = train_cells(nodes.vectors, seed, log)
        # Choose the number of cells per face by the true edges of a sample.
        if len(cells) > 1:
            sample = draw_sample(len(nodes), seed, budget=_SAMPLE_BUDGET)
            u, v = find_sample_edges(nodes, density, sample, rule, folder)
            cells = choose_cells_per_face(cells, nodes.vectors, u, v, recall)
            log(f"{len(cells)} cells, each face in {cells.each}")
        CellLayout.build(nodes.vectors, cells, folder, assign_blocks)
        # The file of centres comes last, because it says that the layout is complete.
        sync_disks(folder)
        _save(path, cells.centres)
    return Cells(np.load(path), CellLayout.open(folder).assigned.shape[1])


def find_sample_edges(
    nodes: Nodes, density: Float32, sample: Int64, rule: EdgeRule, folder: str
) -> tuple[Int64, Int64]:
    """Find the true edges (u (m,), v (m,)) of sampled faces.

    Edges of copies are left out: a copy is joined to its representative and to no other face.
    """
    u, v = find_true_edges(nodes.vectors, density, sample, rule.threshold, rule.max_neighbours)
    representatives = np.load(os.path.join(folder, REPRESENTATIVES))
    is_first = (representatives[u] == u) & (representatives[v] == v)
    return u[is_first], v[is_first]


def describe_split() -> str:
    """Say how the cells are split into tasks: the parts of another split do not fit together with those of this one."""
    return f"{_PAIRS_PER_TASK:g} pairs per task"


def plan_edge_tasks(density: Float32, rule: EdgeRule, folder: str, device: str) -> list[EdgeTask]:
    """Split the cells into tasks, and save the capped densities (n,) for them."""
    _save(os.path.join(folder, _CAPPED_DENSITY), density)
    ranges = CellLayout.open(folder).split_work(_PAIRS_PER_TASK)
    return [EdgeTask(folder, number, first, last, rule, device) for number, (first, last) in enumerate(ranges)]


def join_cells(task: EdgeTask) -> int:
    """Find the edges of a task's cells, write them as one part, and return their number."""
    nodes = open_nodes(task.folder)
    layout = CellLayout.open(task.folder)
    density = np.load(os.path.join(task.folder, _CAPPED_DENSITY), mmap_mode="r")
    representatives = np.load(os.path.join(task.folder, REPRESENTATIVES), mmap_mode="r")
    parts = []
    for cell in range(task.first, task.last):
        faces = _leave_copies_out(layout.get_faces(cell), representatives)
        # If these are all faces, the vectors stay mapped instead of being copied.
        vectors = nodes.vectors if len(faces) == len(nodes) else nodes.vectors[faces]
        parts.append(_join_cell(layout, cell, faces, vectors, density[faces], task))
    pairs = Pairs.concatenate(parts)
    write_part(pairs, task.path)
    return len(pairs)


@dataclass(frozen=True)
class CellPack:
    """Some cells with all that their comparison needs, for a machine that does not see the folder of the graph.

    Attributes:
        task: The cells.
        faces: Positions (f,) of the faces in any of them, rising.
        vectors: Their vectors, (f, 128).
        density: Their capped densities, (f,).
        layout: The faces of each cell of the task, as positions among these.
    """

    task: EdgeTask
    faces: Int64
    vectors: Float32
    density: Float32
    layout: CellLayout


def pack_cells(task: EdgeTask) -> CellPack:
    """Read everything from the graph's folder that a task needs."""
    nodes = open_nodes(task.folder)
    layout = CellLayout.open(task.folder)
    density = np.load(os.path.join(task.folder, _CAPPED_DENSITY), mmap_mode="r")
    representatives = np.load(os.path.join(task.folder, REPRESENTATIVES), mmap_mode="r")
    members = [_leave_copies_out(layout.get_faces(cell), representatives) for cell in range(task.first, task.last)]
    inside = np.concatenate(members)
    faces = np.unique(inside)
    begins = np.cumsum([0, *(len(part) for part in members)])
    local = CellLayout(np.asarray(layout.assigned[faces]), np.searchsorted(faces, inside), begins)
    return CellPack(task, faces, np.asarray(nodes.vectors[faces]), np.asarray(density[faces]), local)


def join_packed_cells(pack: CellPack) -> Pairs:
    """Find the edges of packed cells: those that `join_cells` finds for the task."""
    parts = []
    for cell in range(pack.task.first, pack.task.last):
        inside = pack.layout.get_faces(cell - pack.task.first)
        vectors = pack.vectors[inside]
        parts.append(_join_cell(pack.layout, cell, inside, vectors, pack.density[inside], pack.task))
    pairs = Pairs.concatenate(parts)
    return Pairs(pack.faces[pairs.u], pack.faces[pairs.v], pairs.distance)


def _leave_copies_out(faces: Int64, representatives: Int64) -> Int64:
    """Leave out copies: `write_copies` joins them to their representatives."""
    return np.asarray(faces[representatives[faces] == faces])


def _join_cell(
    layout: CellLayout, cell: int, faces: Int64, vectors: Float32, density: Float32, task: EdgeTask
) -> Pairs:
    """Find the edges between the faces of a cell, without those that a cell of a smaller number finds."""
    rule = task.rule
    u, v = find_candidate_pairs(vectors, density, rule.threshold, rule.max_neighbours, task.device)
    # Drop the pairs of earlier cells before distances are computed one by one.
    is_first = layout.mask_first_shared(cell, faces, u, v)
    pairs = refine_pairs(vectors, density, u[is_first], v[is_first], rule.threshold)
    return Pairs(faces[pairs.u], faces[pairs.v], pairs.distance)


def write_copies(folder: str, number: int) -> None:
    """Write a part with the edges between copies and their representatives."""
    representatives = np.load(os.path.join(folder, REPRESENTATIVES))
    copies = np.flatnonzero(representatives != np.arange(len(representatives)))
    pairs = Pairs(representatives[copies], copies, np.zeros(len(copies), np.float32))
    write_part(pairs, get_part_path(folder, number))


def delete_temporary(folder: str) -> None:
    """Delete the files that a finished graph does not need."""
    for name in _TEMPORARY:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))


def _save(path: str, array: object) -> None:
    """Save an array under its final name once it is complete and on the disk."""
    with replace_file(path, sync=True) as unfinished, open(unfinished, "wb") as file:
        np.save(file, np.asarray(array))
