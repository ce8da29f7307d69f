"""Search in a gallery's index: approximate candidates from every shard, re-scored exactly, the dead left out."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.errors import ConfigError, IndexingError
from facepipe.index import manifest as manifests
from facepipe.index.candidates import NOBODY, Scanner
from facepipe.index.manifest import INDEX, Manifest
from facepipe.index.shard import Shard, joined_index
from facepipe.nearest.distances import Hits, compute_pair_distances, find_smallest
from facepipe.nearest.faiss_engine import faiss
from facepipe.schema import EMBEDDING_DIM
from facepipe.types import Float32, Int64

_CHUNK = 1024  # queries a thread takes at a time: enough to share the reading of a list, small enough for the cache
_MOST_CELLS = 1 << 24  # candidates held at a time by a thread
_GROWTH = 4
_MERGED_BYTES = 2 << 30
_FEWEST = 64
_LONE = 16  # fewer queries than this are spread over threads by faiss itself


@dataclass(frozen=True)
class Setting:
    """How hard to search: lists visited a query, and candidates re-scored exactly."""

    nprobe: int
    rescore: int


class Index:
    """The published index of a gallery, opened read-only.

        index = facepipe.Index("G")
        hits = index.search(vectors, k=10)              # vectors: (n, 128) float32 of unit norm
        hits.ids, hits.distances                        # (n, 10); distances are Euclidean
        near = index.within(vectors, radius=0.4)        # all faces within a distance

    Distances are exact; which faces are found is approximate above some 50,000 faces, with the recall that was asked
    for when the index was built, or is given here. `merge` joins the shards in memory where
    they have at most 2 GiB, which pays for many queries.
    """

    def __init__(
        self,
        gallery: str,
        recall: float | None = None,
        threads: int | None = None,
        merge: bool = False,
        manifest: Manifest | None = None,
    ):
        self.gallery = gallery
        self.threads = threads or len(os.sched_getaffinity(0))
        self.manifest = manifest or manifests.load(gallery)
        try:
            self.shards = self._shards()
        except IndexingError:
            if manifest or manifests.load(gallery) == self.manifest:
                raise
            self.manifest = manifests.load(gallery)  # it was replaced between the two reads
            self.shards = self._shards()
        self.setting = Setting(*self.manifest.setting(recall))
        self.live = self.manifest.live
        self._scanner = self._open(merge and self._mergeable()) if self.shards else None

    def _shards(self) -> list[Shard]:
        # Newest first: of an id that was tombstoned and added again, the newer label counts.
        return [Shard(manifests.open_index_store(self.gallery), entry) for entry in reversed(self.manifest.shards)]

    def _mergeable(self) -> bool:
        size = sum(shard.entry.files[INDEX].bytes for shard in self.shards)
        return len(self.shards) > 1 and size <= _MERGED_BYTES

    def _open(self, merge: bool) -> Scanner:
        if not merge:
            return Scanner([shard.open_index() for shard in self.shards], [shard.dead for shard in self.shards])
        return Scanner([joined_index(self.shards)], [np.empty(0, np.int64)])

    @property
    def lists(self) -> int:
        """Inverted lists; 0 for an exact index."""
        return self._scanner.lists if self._scanner else 0

    def list_lengths(self) -> Int64:
        """Vectors in each inverted list."""
        return self._scanner.list_lengths() if self._scanner else np.zeros(1, np.int64)

    def search(self, queries: Float32, k: int = 10, setting: Setting | None = None) -> Hits:
        """The k nearest faces of each query (n, 128); fewer only where the gallery holds fewer."""
        queries = _checked(queries)
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        chosen = setting or self.setting
        k = min(k, max(1, self.live))
        parts = list(self._map(queries, lambda part: self._nearest(part, k, chosen), max(chosen.rescore, k)))
        if not parts:
            return Hits(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
        return Hits(np.concatenate([p.ids for p in parts]), np.concatenate([p.distances for p in parts]))

    def within(
        self, queries: Float32, radius: float, most: int = 100_000, setting: Setting | None = None
    ) -> list[tuple[Int64, Float32]]:
        """(ids, distances) of all faces within a Euclidean distance of each query, nearest first, at most `most`."""
        queries = _checked(queries)
        chosen = setting or self.setting
        found = self._map(queries, lambda part: self._inside(part, radius, most, chosen), chosen.rescore)
        return [answer for part in found for answer in part]

    def labels(self, ids: Int64) -> pa.Table:
        """uri and identity of face ids (n,), in their order; null for -1."""
        place = np.full(len(ids), -1, np.int64)
        tables, at = [pa.table({"uri": pa.nulls(1, pa.string()), "identity": pa.nulls(1, pa.string())})], 1
        for shard, (where, rows) in zip(self.shards, self._located(ids), strict=True):
            place[where] = at + np.arange(len(where))
            tables.append(shard.labels(rows))
            at += len(where)
        return pa.concat_tables(tables).take(pa.array(np.maximum(place, 0)))

    def vectors(self, ids: Int64) -> Float32:
        """The vectors (n, 128) of face ids (n,); zeros for ids that the index does not hold."""
        out = np.zeros((len(ids), EMBEDDING_DIM), np.float32)
        for shard, (where, rows) in zip(self.shards, self._located(ids), strict=True):
            out[where] = shard.vectors[rows]
        return out

    def _map(self, queries: Float32, call: Any, width: int) -> Iterator[Any]:
        if self._scanner is None or not len(queries):
            return iter(()) if not len(queries) else iter([call(queries)])
        if len(queries) < _LONE:
            faiss.omp_set_num_threads(self.threads)
            return iter([call(queries)])
        size = max(1, min(_CHUNK, -(-len(queries) // self.threads), _MOST_CELLS // (width * len(self.shards))))
        with ThreadPoolExecutor(self.threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
            return iter(list(pool.map(call, (queries[at : at + size] for at in range(0, len(queries), size)))))

    def _nearest(self, queries: Float32, k: int, setting: Setting) -> Hits:
        """Queries whose candidates do not suffice are asked again, with more lists and more candidates."""
        ids, distances = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.inf, np.float32)
        open_, nprobe, count = np.arange(len(queries)), setting.nprobe, max(setting.rescore, min(2 * k, self.live))
        while open_.size and self._scanner is not None:
            # Those tied with the last are left out: a few more are asked for, so that the rest are as many as meant.
            found = self._scanner(queries[open_], min(count + max(2, count // 50), self.live + 1), nprobe)
            exact = self._exact(queries[open_], found.ids)
            order = find_smallest(exact, k)  # candidates are sorted by id: ties come by id
            width = order.shape[1]
            ids[open_, :width] = np.take_along_axis(found.ids, order, axis=1)
            distances[open_, :width] = np.take_along_axis(exact, order, axis=1)
            enough = (found.ids != NOBODY).sum(axis=1) >= k
            nothing_left = found.complete & (nprobe >= self._scanner.lists)
            open_ = open_[~(enough | nothing_left)]
            count, nprobe = _GROWTH * count, _GROWTH * nprobe
        missing = ~np.isfinite(distances)
        ids[missing] = -1
        return Hits(ids, np.sqrt(distances))

    def _inside(self, queries: Float32, radius: float, most: int, setting: Setting) -> list[tuple[Int64, Float32]]:
        """Until the candidates reach well beyond the radius, they are made more."""
        answers: list[tuple[Int64, Float32]] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        open_, count = np.arange(len(queries)), max(setting.rescore, _FEWEST)
        while open_.size and self._scanner is not None:
            found = self._scanner(queries[open_], min(count, self.live + 1), setting.nprobe)
            exact = np.sqrt(self._exact(queries[open_], found.ids))
            inside = exact <= radius
            beyond = inside.sum(axis=1) * _GROWTH <= (found.ids != NOBODY).sum(axis=1)
            for n, query in enumerate(open_):
                order = np.argsort(exact[n, inside[n]], kind="stable")[:most]
                answers[query] = (found.ids[n, inside[n]][order], exact[n, inside[n]][order])
            open_ = open_[~(beyond | found.complete | (inside.sum(axis=1) >= most))]
            count *= _GROWTH
        return answers

    def _exact(self, queries: Float32, ids: Int64) -> Float32:
        """Squared distances (n, w) of queries to candidates (n, w); infinite where there is none."""
        out = np.full(ids.shape, np.inf, np.float32)
        asked, places = np.nonzero(ids != NOBODY)
        flat = ids[asked, places]
        for shard, (where, rows) in zip(self.shards, self._located(flat), strict=True):
            out[asked[where], places[where]] = compute_pair_distances(queries, asked[where], shard.vectors, rows)
        return out

    def _located(self, ids: Int64) -> Iterator[tuple[Int64, Int64]]:
        """For each shard: positions in `ids` of those it holds and no newer shard does, and their rows."""
        left = np.arange(len(ids))
        for shard in self.shards:
            found, rows = shard.locate(ids[left])
            yield left[found], rows[found]
            left = left[~found]


def _checked(queries: Float32) -> Float32:
    if queries.ndim != 2 or queries.shape[1] != EMBEDDING_DIM:
        raise ConfigError(f"queries are (n, {EMBEDDING_DIM}) vectors, got an array of shape {queries.shape}")
    queries = np.ascontiguousarray(queries, np.float32)
    norms = np.linalg.norm(queries, axis=1)
    if not np.all(np.abs(norms - 1) < 1e-2):  # also where they are NaN
        raise ConfigError("queries must be finite vectors of unit norm: divide each by its norm")
    return queries
