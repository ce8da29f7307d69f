"""Overlapping cells: every face lies in its nearest few, so that near faces share one, also across borders."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from facepipe.curation.graph import cost
from facepipe.index.grid import round_to_grid
from facepipe.nearest.faiss_engine import faiss, train_on_gpus
from facepipe.types import Bool, Float32, Int32, Int64

SMALL = 30_000  # faces that are compared all with all
_CELL = 244  # faces for each cell: found to cost least for a given recall (docs/performance.md)
_SAMPLED = 64  # faces of a cell that k-means looks at
_ROUNDS = 8
_BLOCK = 65536
MOST_CELLS_EACH = 24


@dataclass(frozen=True)
class Cells:
    """Centres (c, 128), and how many of its nearest cells a face lies in."""

    centres: Float32
    each: int

    def assign(self, vectors: Float32, each: int | None = None) -> Int32:
        """(n, each) numbers of the nearest cells, nearest first."""
        index = faiss.IndexFlatL2(self.centres.shape[1])
        index.add(self.centres)
        found = np.empty((len(vectors), min(each or self.each, len(self.centres))), np.int32)
        for at in range(0, len(vectors), _BLOCK):
            block = round_to_grid(_unit(vectors[at : at + _BLOCK]))
            found[at : at + _BLOCK] = index.search(block, found.shape[1])[1]
        return found


def all_are_compared(count: int, cores: int, gpu: bool) -> bool:
    """Whether n faces are compared all with all: where they are few, or where a GPU does that sooner than the cores
    compare cells."""
    return count <= SMALL or (gpu and cost.all_pairs(count, cores, gpu) < cost.cells(count, cores, _CELL))


def one(dimension: int) -> Cells:
    """One cell, with everything in it."""
    return Cells(np.zeros((1, dimension), np.float32), 1)


def train(vectors: Float32, seed: int, say: Callable[[str], None] = lambda line: None) -> Cells:
    """Cells for n vectors; one, with all in it, where they are few.

    Runs k-means on GPUs where faiss-gpu finds any; `say` hears why not, where it does and they cannot be used.
    """
    count, dimension = vectors.shape
    if count <= SMALL:
        return one(dimension)
    number = 2 ** int(np.log2(count / _CELL))
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(count, min(count, _SAMPLED * number), replace=False))
    means = faiss.Kmeans(dimension, number, niter=_ROUNDS, seed=1, max_points_per_centroid=_SAMPLED)
    sample, on_cpu = _unit(vectors[chosen]), means.index

    def centroids(index: Any) -> Float32:
        means.index = on_cpu if index is None else index
        means.train(sample)
        return np.asarray(means.centroids, np.float32)

    return Cells(round_to_grid(train_on_gpus(centroids, dimension, say)), MOST_CELLS_EACH // 2)


def shared(left: Int32, right: Int32, each: int) -> Bool:
    """(m,) whether faces with cells (m, c) and (m, c) meet in one of their nearest `each`."""
    return np.asarray((left[:, :each, None] == right[:, None, :each]).any(axis=(1, 2)))


def members(assigned: Int32, cells: int, path: str) -> tuple[Int64, Int64]:
    """(faces sorted by cell (n * each,) mapped from a file, where each cell begins (cells + 1,))."""
    counts = np.zeros(cells + 1, np.int64)
    for at in range(0, len(assigned), _BLOCK):
        counts[1:] += np.bincount(assigned[at : at + _BLOCK].ravel(), minlength=cells)
    begins = np.cumsum(counts)
    shape = (max(1, int(begins[-1])),)
    faces = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=shape)
    free = begins[:-1].copy()
    for at in range(0, len(assigned), _BLOCK):
        block = assigned[at : at + _BLOCK].ravel()
        order = np.argsort(block, kind="stable")
        ranked = block[order]
        first = np.searchsorted(ranked, ranked)
        faces[free[ranked] + np.arange(len(ranked)) - first] = at + order // assigned.shape[1]
        free += np.bincount(block, minlength=cells)
    faces.flush()
    return np.load(path, mmap_mode="r"), begins


@dataclass(frozen=True)
class Layout:
    """Who lies where: assigned (n, each) int32, and the faces of each cell; all mapped from files of a folder."""

    assigned: Int32
    faces: Int64
    begins: Int64

    @classmethod
    def make(cls, vectors: Float32, cells: Cells, folder: str) -> "Layout":
        """Assign all faces and sort them by cell."""
        path = os.path.join(folder, "assigned.npy")
        np.save(path, cells.assign(vectors))
        assigned = np.load(path, mmap_mode="r" if len(vectors) else None)
        faces, begins = members(assigned, len(cells.centres), os.path.join(folder, "members.npy"))
        np.save(os.path.join(folder, "begins.npy"), begins)
        return cls(assigned, faces, begins)

    @classmethod
    def open(cls, folder: str) -> "Layout":
        """What `make` left."""
        loaded = [np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r") for name in ("assigned", "members")]
        return cls(loaded[0], loaded[1], np.load(os.path.join(folder, "begins.npy")))

    def work(self, tasks_of: float) -> Iterator[tuple[int, int]]:
        """Ranges of cells of about `tasks_of` pairs each."""
        cost = np.cumsum(np.diff(self.begins).astype(np.float64) ** 2 / 2)
        first = 0
        while first < len(cost):
            done = cost[first - 1] if first else 0.0
            last = max(first + 1, int(np.searchsorted(cost, done + tasks_of, side="right")))
            yield first, min(last, len(cost))
            first = last

    def inside(self, cell: int) -> Int64:
        """The faces of a cell."""
        return np.asarray(self.faces[self.begins[cell] : self.begins[cell + 1]])

    def first_met(self, cell: int, inside: Int64, u: Int64, v: Int64) -> Bool:
        """(m,) whether pairs (u, v) of faces inside a cell meet in no cell of a smaller number."""
        if self.assigned.shape[1] == 1:
            return np.ones(len(u), bool)
        assigned = np.asarray(self.assigned[inside])
        left, right = assigned[u], assigned[v]
        meet = (left[:, :, None] == right[:, None, :]).any(axis=2)
        lowest = np.where(meet, left, np.iinfo(np.int32).max).min(axis=1)
        return np.asarray(lowest == cell)


def _unit(vectors: Float32) -> Float32:
    block = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(block, axis=1, keepdims=True)
    return np.ascontiguousarray(block / np.maximum(norms, 1e-12))
