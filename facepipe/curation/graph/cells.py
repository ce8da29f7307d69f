"""Overlapping cells: every face lies in its nearest few, so that near faces share one, also across borders."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from facepipe.curation.graph.cost import estimate_all_pairs, estimate_cells
from facepipe.index.grid import round_to_grid
from facepipe.index.two_level import train_centroids
from facepipe.nearest.faiss_engine import faiss, train_on_gpus
from facepipe.storage.mapped import create_array
from facepipe.types import Bool, Float32, Int32, Int64

MAX_EXACT_FACES = 30_000  # faces that are compared all with all
MAX_CELLS_PER_FACE = 24
_FACES_PER_CELL = 244  # costs least for a given recall (docs/performance.md)
_SAMPLED_PER_CELL = 64  # faces that k-means looks at
# Rounds of k-means, and rows that are assigned at a time.
_ROUNDS = 8
# Cells from which k-means has two levels on CPUs: then its cost grows with the power 1.5 of the faces, and not with 2.
# A face must be in about one more cell for it: 0.9879 of the edges of 100,000 faces share one of 6 cells with plain
# k-means, and 0.9882 one of 7 with two levels. From here on that costs less.
_MIN_TWO_LEVEL = 16_384
# Faces that k-means looks at, at most, as 2 GiB of vectors; there are eight per cell in any case.
_MAX_SAMPLED = 1 << 22
_MIN_SAMPLED_PER_CELL = 8
_BLOCK_ROWS = 16384
ASSIGNED_ROWS = 65536  # of a task of assignment

# Files of a layout.
_ASSIGNED = "assigned.npy"
_MEMBERS = "members.npy"
_BEGINS = "begins.npy"


@dataclass(frozen=True)
class Cells:
    """Cells of the space of vectors.

    Attributes:
        centres: Centres (c, dim).
        each: Number of its nearest cells that a face lies in.
    """

    centres: Float32
    each: int

    def __len__(self) -> int:
        return len(self.centres)

    def assign(self, vectors: Float32, each: int | None = None) -> Int32:
        """Assign vectors (n, dim) to their nearest cells; returns cell numbers (n, each), nearest first."""
        index = faiss.IndexFlatL2(self.centres.shape[1])
        index.add(self.centres)
        assigned = np.empty((len(vectors), min(each or self.each, len(self.centres))), np.int32)
        for at in range(0, len(vectors), _BLOCK_ROWS):
            # Round to the grid, so that cells do not depend on the block.
            block = round_to_grid(_normalise(vectors[at : at + _BLOCK_ROWS]))
            assigned[at : at + _BLOCK_ROWS] = index.search(block, assigned.shape[1])[1]
        return assigned

    def assign_to_file(self, vectors: Float32, path: str, assign_blocks: "AssignBlocks | None" = None) -> None:
        """Assign vectors (n, 128) to their nearest cells, as `assign` does, into a .npy file.

        Args:
            vectors: the vectors.
            path: of the file.
            assign_blocks: assigns them block by block, in any order and anywhere; by default in this process.
        """
        if not len(vectors):
            np.save(path, self.assign(vectors))
            return
        assigned = create_array(path, np.int32, (len(vectors), min(self.each, len(self.centres))))
        for begin, block in (assign_blocks or assign_blocks_here)(self, vectors):
            assigned[begin : begin + len(block)] = block
        assigned.flush()


AssignBlocks = Callable[[Cells, Float32], Iterable[tuple[int, Int32]]]
"""Assigns vectors (n, 128) to cells; yields where each block begins, and its cell numbers."""


def assign_blocks_here(cells: Cells, vectors: Float32) -> Iterator[tuple[int, Int32]]:
    """Assign vectors to cells in this process."""
    for begin in range(0, len(vectors), ASSIGNED_ROWS):
        yield begin, cells.assign(vectors[begin : begin + ASSIGNED_ROWS])


def assign_block(vectors: Float32, cells: Cells) -> Int32:
    """Assign a block of vectors (m, 128) to cells, as a task on another machine does."""
    return cells.assign(vectors)


def should_compare_all(count: int, cores: int, gpu: bool) -> bool:
    """Say whether to compare n faces all with all.

    That is the case if they are few, or if a GPU does it sooner than the cores compare cells.
    """
    if count <= MAX_EXACT_FACES:
        return True
    return gpu and estimate_all_pairs(count, cores, gpu) < estimate_cells(count, cores, _FACES_PER_CELL)


def create_single_cell(dimension: int) -> Cells:
    """Create one cell that holds everything."""
    return Cells(np.zeros((1, dimension), np.float32), 1)


def train_cells(vectors: Float32, seed: int, log: Callable[[str], None] = lambda line: None) -> Cells:
    """Train cells for n vectors; if they are few, one cell that holds all.

    k-means runs on GPUs if faiss-gpu finds any. On CPUs it has two levels if there are many cells.

    Args:
        vectors: (n, dim).
        seed: of the sample that k-means looks at.
        log: is called with the reason if there are GPUs and they cannot be used.
    """
    count, dimension = vectors.shape
    if count <= MAX_EXACT_FACES:
        return create_single_cell(dimension)
    # A power of two, which makes cells of the intended size to twice as large.
    number = 2 ** int(np.log2(count / _FACES_PER_CELL))
    rng = np.random.default_rng(seed)
    sampled = min(_SAMPLED_PER_CELL * number, max(_MAX_SAMPLED, _MIN_SAMPLED_PER_CELL * number))
    chosen = np.sort(rng.choice(count, min(count, sampled), replace=False))
    sample = np.empty((len(chosen), dimension), np.float32)
    for at in range(0, len(chosen), _BLOCK_ROWS):
        sample[at : at + _BLOCK_ROWS] = _normalise(vectors[chosen[at : at + _BLOCK_ROWS]])
    kmeans = faiss.Kmeans(dimension, number, niter=_ROUNDS, seed=1, max_points_per_centroid=_SAMPLED_PER_CELL)
    cpu_index = kmeans.index

    def train(index: Any) -> Float32:
        if index is None and number >= _MIN_TWO_LEVEL:
            return train_centroids(sample, number, seed=1, final_iterations=0)
        kmeans.index = cpu_index if index is None else index
        kmeans.train(sample)
        return np.asarray(kmeans.centroids, np.float32)

    # Half of the most cells per face, until a sample tells how many are needed.
    return Cells(round_to_grid(train_on_gpus(train, dimension, log)), MAX_CELLS_PER_FACE // 2)


def choose_cells_per_face(cells: Cells, vectors: Float32, u: Int64, v: Int64, recall: float) -> Cells:
    """Choose the smallest number of cells per face with which enough of the true edges (u (m,), v (m,)) share one."""
    if not len(u):
        return cells
    # Try more and more cells per face on the pairs of true edges.
    left = cells.assign(vectors[u], MAX_CELLS_PER_FACE)
    right = cells.assign(vectors[v], MAX_CELLS_PER_FACE)
    for each in range(2, MAX_CELLS_PER_FACE + 1):
        if mask_shared(left, right, each).mean() >= recall:
            break
    return Cells(cells.centres, each)


def mask_shared(left: Int32, right: Int32, each: int) -> Bool:
    """Mask the pairs (m,) of faces with cells (m, c) and (m, c) that share one of their nearest `each`."""
    return np.asarray((left[:, :each, None] == right[:, None, :each]).any(axis=(1, 2)))


def sort_by_cell(assigned: Int32, cells: int, path: str) -> tuple[Int64, Int64]:
    """Sort faces by cell, into a file.

    Args:
        assigned: cell numbers (n, each).
        cells: number of cells.
        path: of the file.

    Returns:
        The faces sorted by cell (n * each,), mapped from the file, and where each cell begins (cells + 1,).
    """
    # Count the faces of each cell first, to know where it begins.
    counts = np.zeros(cells + 1, np.int64)
    for at in range(0, len(assigned), _BLOCK_ROWS):
        counts[1:] += np.bincount(assigned[at : at + _BLOCK_ROWS].ravel(), minlength=cells)
    begins = np.cumsum(counts)
    shape = (max(1, int(begins[-1])),)
    faces = create_array(path, np.int64, shape)
    # A counting sort, block by block: `free` is the next free position of each cell.
    free = begins[:-1].copy()
    for at in range(0, len(assigned), _BLOCK_ROWS):
        block = assigned[at : at + _BLOCK_ROWS].ravel()
        order = np.argsort(block, kind="stable")
        sorted_cells = block[order]
        first = np.searchsorted(sorted_cells, sorted_cells)
        faces[free[sorted_cells] + np.arange(len(sorted_cells)) - first] = at + order // assigned.shape[1]
        free += np.bincount(block, minlength=cells)
    faces.flush()
    return np.load(path, mmap_mode="r"), begins


@dataclass(frozen=True)
class CellLayout:
    """The faces of each cell, mapped from files of a folder.

    Attributes:
        assigned: Cell numbers (n, each) of each face.
        faces: Faces sorted by cell.
        begins: Where each cell begins in `faces`.
    """

    assigned: Int32
    faces: Int64
    begins: Int64

    @classmethod
    def build(
        cls, vectors: Float32, cells: Cells, folder: str, assign_blocks: AssignBlocks | None = None
    ) -> "CellLayout":
        """Assign all faces to cells and sort them by cell, into files; `assign_blocks` as in `Cells.assign_to_file`."""
        path = os.path.join(folder, _ASSIGNED)
        cells.assign_to_file(vectors, path, assign_blocks)
        assigned = np.load(path, mmap_mode="r" if len(vectors) else None)
        faces, begins = sort_by_cell(assigned, len(cells.centres), os.path.join(folder, _MEMBERS))
        np.save(os.path.join(folder, _BEGINS), begins)
        return cls(assigned, faces, begins)

    @classmethod
    def open(cls, folder: str) -> "CellLayout":
        """Open what `build` wrote."""
        assigned = np.load(os.path.join(folder, _ASSIGNED), mmap_mode="r")
        members = np.load(os.path.join(folder, _MEMBERS), mmap_mode="r")
        return cls(assigned, members, np.load(os.path.join(folder, _BEGINS)))

    def split_work(self, pairs_per_task: float) -> Iterator[tuple[int, int]]:
        """Yield ranges of cells (first, last + 1) with about `pairs_per_task` pairs each."""
        # Pairs up to the end of each cell, which holds half the square of its faces.
        pairs = np.cumsum(np.diff(self.begins).astype(np.float64) ** 2 / 2)
        first = 0
        while first < len(pairs):
            before = pairs[first - 1] if first else 0.0
            last = max(first + 1, int(np.searchsorted(pairs, before + pairs_per_task, side="right")))
            yield first, min(last, len(pairs))
            first = last

    def get_faces(self, cell: int) -> Int64:
        """Return the faces of a cell."""
        return np.asarray(self.faces[self.begins[cell] : self.begins[cell + 1]])

    def mask_first_shared(self, cell: int, faces: Int64, u: Int64, v: Int64) -> Bool:
        """Mask the pairs that share no cell of a smaller number, so that each pair counts once.

        Args:
            cell: number of a cell.
            faces: faces of it.
            u: one position in `faces` per pair, (m,).
            v: the other position, (m,).
        """
        if self.assigned.shape[1] == 1:
            return np.ones(len(u), bool)
        # A pair belongs to the smallest cell that both of its faces lie in.
        assigned = np.asarray(self.assigned[faces])
        left = assigned[u]
        right = assigned[v]
        is_shared = (left[:, :, None] == right[:, None, :]).any(axis=2)
        lowest = np.where(is_shared, left, np.iinfo(np.int32).max).min(axis=1)
        return np.asarray(lowest == cell)


def _normalise(vectors: Float32) -> Float32:
    block = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(block, axis=1, keepdims=True)
    return np.ascontiguousarray(block / np.maximum(norms, 1e-12))
