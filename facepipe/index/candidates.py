"""Candidates of an approximate search, cut so that the set does not depend on how the gallery is split into shards."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from facepipe.index.grid import round_to_grid
from facepipe.index.rounds import NO_ID
from facepipe.nearest.faiss_engine import faiss
from facepipe.types import Bool, Float32, Int64

_TIE = 1e-6  # two computations of one distance may differ by this if codes are not integers


@dataclass(frozen=True)
class SearchCandidates:
    """Candidates per query.

    Attributes:
        ids: Face ids (n, w), each row sorted, `NO_ID` behind the last one.
        complete: Whether (n,) the visited lists hold no more.
    """

    ids: Int64
    complete: Bool


class ListChoice(NamedTuple):
    """The lists that queries visit: distances (n, nprobe) of their centroids, and their numbers (n, nprobe)."""

    distances: Float32
    lists: Int64


class ScanResult(NamedTuple):
    """What shards return: distances (n, w) and ids (n, w), -1 behind the last one of a shard."""

    distances: Float32
    ids: Int64

    def keep_best(self, count: int) -> "ScanResult":
        """Keep the `count` best per query, in any order; distances are infinite if there is no face."""
        distances = np.where(self.ids >= 0, self.distances, np.float32(np.inf))
        if distances.shape[1] <= count:
            return ScanResult(distances, self.ids)
        columns = np.argpartition(distances, count - 1, axis=1)[:, :count]
        return ScanResult(np.take_along_axis(distances, columns, axis=1), np.take_along_axis(self.ids, columns, axis=1))


class Cut(NamedTuple):
    """Where the candidates of queries end.

    Attributes:
        last: Distance (n,) of the count-th best of all shards: candidates are strictly better. Infinite if all are
            candidates.
        complete: Whether (n,) the visited lists hold no more.
    """

    last: Float32
    complete: Bool


def find_cut(distances: Float32, count: int) -> Cut:
    """Find where the best `count` candidates per query end.

    Args:
        distances: what shards return, (n, w), infinite if there is no face; w is at least `count`.
        count: candidates per query.
    """
    # Fewer than `count` results: the lists hold no more, so that none has to be left out.
    complete = np.isfinite(distances).sum(axis=1) < count
    if distances.shape[1] > count:
        last = np.partition(distances, count - 1, axis=1)[:, count - 1]
    else:
        last = distances.max(axis=1)
    return Cut(np.where(complete, np.float32(np.inf), last), complete)


class Scanner:
    """The indexes of all shards as one: lists are chosen once, and every shard scans the same ones.

    Attributes:
        lists: Inverted lists; 0 for an exact index.
        tie: Distances that differ by no more than this are equal.
    """

    def __init__(self, indexes: list[Any], tombstones: list[Int64]):
        """Combine indexes.

        Args:
            indexes: of faiss, one per shard, all from one template.
            tombstones: per shard the ids that no search may return.
        """
        self._indexes = indexes
        # The batches stay referenced, because faiss holds bare pointers to them.
        self._excluded = [faiss.IDSelectorBatch(ids) if ids.size else None for ids in tombstones]
        self._selectors = [None if batch is None else faiss.IDSelectorNot(batch) for batch in self._excluded]
        self._inverted = [faiss.try_extract_index_ivf(index) for index in indexes]
        first = indexes[0]
        self._chain = first if isinstance(first, faiss.IndexPreTransform) else None
        self.lists = 0 if self._inverted[0] is None else int(self._inverted[0].nlist)
        # Some codes are compared in integers, so that equal distances are exactly equal.
        self.tie = 0.0 if "FastScan" in type(self._inverted[0]).__name__ else _TIE

    def find_candidates(self, queries: Float32, count: int, nprobe: int) -> SearchCandidates:
        """Find the best `count` candidates per query.

        Those tied with the last one are left out unless there are no more. Each shard returns its best `count`. What is
        strictly better than the count-th of them all is in the result of every shard in full. Of those tied with it a
        shard may have returned any.

        Args:
            queries: (n, dim).
            count: candidates per query.
            nprobe: lists visited per query.
        """
        result = self.scan(np.ascontiguousarray(queries), count, self.choose_lists(queries, nprobe))
        distances = np.where(result.ids >= 0, result.distances, np.float32(np.inf))
        return self.select_candidates(ScanResult(distances, result.ids), find_cut(distances, count))

    def select_candidates(self, result: ScanResult, cut: Cut) -> SearchCandidates:
        """Select what is better than where the candidates end; distances are infinite if there is no face."""
        # What is not finite is below no cut, also if that is infinite.
        selected = result.distances < (cut.last - np.float32(self.tie))[:, None]
        ids = np.sort(np.where(selected, result.ids, NO_ID), axis=1)
        width = max(1, int(selected.sum(axis=1).max(initial=0)))
        return SearchCandidates(np.ascontiguousarray(ids[:, :width]), cut.complete)

    def choose_lists(self, queries: Float32, nprobe: int) -> ListChoice:
        """Choose the `nprobe` lists that each query visits; none of an exact index."""
        if not self.lists:
            return ListChoice(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        # Round to the grid, so that the lists of a query do not depend on the batch.
        points = round_to_grid(self._transform(np.ascontiguousarray(queries)))
        return ListChoice(*self._inverted[0].quantizer.search(points, min(nprobe, self.lists)))

    def scan(self, queries: Float32, count: int, choice: ListChoice) -> ScanResult:
        """Scan every shard, and put the best `count` of each side by side.

        Args:
            queries: (n, dim).
            count: candidates per query and shard.
            choice: lists to visit.
        """
        shape = (len(queries), count)
        results = [ScanResult(np.empty(shape, np.float32), np.empty(shape, np.int64)) for _ in self._indexes]
        if self.lists:
            self._scan_lists(queries, choice, results)
        else:
            self._scan_all(queries, results)
        if len(results) == 1:
            return results[0]
        distances = np.concatenate([result.distances for result in results], axis=1)
        return ScanResult(distances, np.concatenate([result.ids for result in results], axis=1))

    def rank_lists(self, queries: Float32, lists: Int64) -> Int64:
        """Find after how many others a query visits a list.

        Args:
            queries: (n, dim).
            lists: numbers of lists, (n, w).

        Returns:
            Ranks (n, w) from 0.
        """
        ivf = self._inverted[0]
        centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)
        ranks = np.empty(lists.shape, np.int64)
        for row, point in enumerate(round_to_grid(self._transform(np.ascontiguousarray(queries)))):
            squared = ((centroids - point) ** 2).sum(axis=1)
            ranks[row] = np.searchsorted(np.sort(squared), squared[lists[row]])
        return ranks

    def assign_lists(self, vectors: Float32) -> Int64:
        """Find the lists (n,) that vectors (n, dim) belong to."""
        points = round_to_grid(self._transform(np.ascontiguousarray(vectors)))
        return np.asarray(self._inverted[0].quantizer.search(points, 1)[1][:, 0], np.int64)

    def count_per_list(self) -> Int64:
        """Count the vectors per list over all shards, deleted ones included; (1,) for an exact index."""
        if not self.lists:
            return np.array([sum(index.ntotal for index in self._indexes)], np.int64)
        lengths = [[ivf.invlists.list_size(n) for n in range(self.lists)] for ivf in self._inverted]
        return np.array(lengths, np.int64).sum(axis=0)

    def _scan_lists(self, queries: Float32, choice: ListChoice, results: list[ScanResult]) -> None:
        """Scan the chosen lists in every shard; fills the results."""
        points = round_to_grid(self._transform(queries))
        # The copies must live until faiss has returned: it gets bare pointers.
        distances = np.ascontiguousarray(choice.distances, np.float32)
        lists = np.ascontiguousarray(choice.lists, np.int64)
        nprobe = lists.shape[1]
        for ivf, selector, result in zip(self._inverted, self._selectors, results, strict=True):
            parameters = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
            ivf.search_preassigned_c(
                len(points),
                faiss.swig_ptr(points),
                result.ids.shape[1],
                faiss.swig_ptr(lists),
                faiss.swig_ptr(distances),
                faiss.swig_ptr(result.distances),
                faiss.swig_ptr(result.ids),
                False,
                parameters,
            )

    def _scan_all(self, queries: Float32, results: list[ScanResult]) -> None:
        for index, selector, result in zip(self._indexes, self._selectors, results, strict=True):
            parameters = faiss.SearchParameters(sel=selector)
            index.search(queries, result.ids.shape[1], D=result.distances, I=result.ids, params=parameters)

    def _transform(self, queries: Float32) -> Float32:
        if self._chain is None:
            return queries
        for n in range(self._chain.chain.size()):
            queries = faiss.downcast_VectorTransform(self._chain.chain.at(n)).apply(queries)
        return queries


def compute_imbalance(lengths: Int64) -> float:
    """Compute the mean length of the list that a random vector is in, over the mean length: 1 if all are equal."""
    total = int(lengths.sum())
    return float((lengths.astype(np.float64) ** 2).sum() * len(lengths) / total**2) if total else 1.0
