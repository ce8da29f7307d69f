"""Candidates of an approximate search, cut so that the set does not depend on how the gallery is split into shards."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from facepipe.index.grid import grid
from facepipe.nearest.faiss_engine import faiss
from facepipe.types import Bool, Float32, Int64

_TIE = 1e-6  # two computations of one distance may differ by this where codes are not integers
NOBODY = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Candidates:
    """ids (n, w) int64, each row sorted, NOBODY behind the last; complete (n,): no more were to be had."""

    ids: Int64
    complete: Bool


class Scanner:
    """The indexes of all shards as one: lists are chosen once, and every shard scans the same ones."""

    def __init__(self, indexes: list[Any], dead: list[Int64]):
        self._indexes = indexes
        self._buried = [faiss.IDSelectorBatch(ids) if ids.size else None for ids in dead]  # kept: faiss holds pointers
        self._selectors = [None if batch is None else faiss.IDSelectorNot(batch) for batch in self._buried]
        self._inverted = [faiss.try_extract_index_ivf(index) for index in indexes]
        first = indexes[0]
        self._chain = first if isinstance(first, faiss.IndexPreTransform) else None
        self.lists = 0 if self._inverted[0] is None else int(self._inverted[0].nlist)
        self._tie = 0.0 if "FastScan" in type(self._inverted[0]).__name__ else _TIE

    def __call__(self, queries: Float32, count: int, nprobe: int) -> Candidates:
        """The best `count` candidates, those tied with the last one left out unless there are no more.

        Each shard returns its best `count`; what is strictly better than the count-th of them all is in every shard's
        answer in full, while of those tied with it a shard may have returned any.
        """
        distances, ids = self._scan(np.ascontiguousarray(queries), count, nprobe)
        found = ids >= 0
        complete = found.sum(axis=1) < count
        if ids.shape[1] > count:
            last = np.partition(np.where(found, distances, np.inf), count - 1, axis=1)[:, count - 1]
        else:
            last = distances[:, -1]
        keep = found & ((distances < (last - self._tie)[:, None]) | complete[:, None])
        ids = np.sort(np.where(keep, ids, NOBODY), axis=1)
        return Candidates(np.ascontiguousarray(ids[:, : max(1, int(keep.sum(axis=1).max(initial=0)))]), complete)

    def _scan(self, queries: Float32, count: int, nprobe: int) -> tuple[Float32, Int64]:
        shape = (len(queries), count)
        found = [(np.empty(shape, np.float32), np.empty(shape, np.int64)) for _ in self._indexes]
        if self.lists:
            self._scan_lists(queries, min(nprobe, self.lists), found)
        else:
            self._scan_all(queries, found)
        if len(found) == 1:
            return found[0]
        return np.concatenate([d for d, _ in found], axis=1), np.concatenate([i for _, i in found], axis=1)

    def _scan_lists(self, queries: Float32, nprobe: int, found: list[tuple[Any, Any]]) -> None:
        points = grid(self._transformed(queries))
        distances, lists = self._inverted[0].quantizer.search(points, nprobe)
        for ivf, selector, (into, ids) in zip(self._inverted, self._selectors, found, strict=True):
            parameters = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
            pointers = [faiss.swig_ptr(array) for array in (lists, distances, into, ids)]
            ivf.search_preassigned_c(len(points), faiss.swig_ptr(points), ids.shape[1], *pointers, False, parameters)

    def _scan_all(self, queries: Float32, found: list[tuple[Any, Any]]) -> None:
        for index, selector, (into, ids) in zip(self._indexes, self._selectors, found, strict=True):
            index.search(queries, ids.shape[1], D=into, I=ids, params=faiss.SearchParameters(sel=selector))

    def _transformed(self, queries: Float32) -> Float32:
        if self._chain is None:
            return queries
        for n in range(self._chain.chain.size()):
            queries = faiss.downcast_VectorTransform(self._chain.chain.at(n)).apply(queries)
        return queries

    def list_lengths(self) -> Int64:
        """Vectors in each list over all shards, the dead included; (1,) for an exact index."""
        if not self.lists:
            return np.array([sum(index.ntotal for index in self._indexes)], np.int64)
        lengths = [[ivf.invlists.list_size(n) for n in range(self.lists)] for ivf in self._inverted]
        return np.array(lengths, np.int64).sum(axis=0)


def imbalance(lengths: Int64) -> float:
    """Mean length of the list that a random vector is in, over the mean length: 1 when all lists are equally long."""
    total = int(lengths.sum())
    return float((lengths.astype(np.float64) ** 2).sum() * len(lengths) / total**2) if total else 1.0
