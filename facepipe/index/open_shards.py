"""The shards of an index, or some of them, open in this process and searched as one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from facepipe.index.candidates import ListChoice, Scanner, ScanResult, SearchCandidates
from facepipe.index.exact import find_exact, find_within_exactly
from facepipe.index.manifest import INDEX, Manifest, ShardEntry
from facepipe.index.rounds import (
    NO_ID,
    Answer,
    NearestRound,
    RadiusRound,
    SearchSetting,
    ShardsSize,
    find_nearest,
    find_within,
)
from facepipe.index.shard import Shard, merge_indexes
from facepipe.index.update import find_unreturned
from facepipe.nearest.distances import Hits, compute_pair_distances, find_smallest
from facepipe.nearest.faiss_engine import faiss
from facepipe.storage.store import Store
from facepipe.types import Float32, Int64

_QUERIES_PER_CHUNK = 1024  # per thread: enough to share the reading of a list, small enough for the cache
_MAX_CANDIDATES_IN_MEMORY = 1 << 24  # per thread
# Shards are merged in memory only if their index files have at most this size.
MAX_MERGED_BYTES = 2 << 30
_MIN_QUERIES_FOR_THREADS = 16  # fewer are spread over threads by faiss itself

Result = TypeVar("Result")


class OpenShards:
    """Shards that are open in this process.

    Attributes:
        shards: Newest first.
        live: Vectors that a search can return.
    """

    def __init__(self, store: Store, entries: Iterable[ShardEntry], threads: int, *, merge: bool = False):
        """Open shards.

        Args:
            store: of the index.
            entries: of the manifest, oldest first.
            threads: to search with.
            merge: join the shards in memory if they have at most 2 GiB.

        Raises:
            IndexingError: a file is missing or damaged.
        """
        # Newest first: of an id that was tombstoned and added again, the newer label counts.
        self.shards = [Shard(store, entry) for entry in reversed(list(entries))]
        self.live = sum(shard.entry.live for shard in self.shards)
        self._store = store
        self._threads = threads
        size = sum(shard.entry.files[INDEX].bytes for shard in self.shards)
        self._is_merged = merge and len(self.shards) > 1 and size <= MAX_MERGED_BYTES
        self._indexes: list[Any] = []
        if self._is_merged:
            self._indexes = [merge_indexes(self.shards)]
        elif self.shards:
            self._indexes = [shard.open_index() for shard in self.shards]
        self._hidden = np.empty(0, np.int64)
        self.scanner = self._create_scanner()

    def _create_scanner(self) -> Scanner | None:
        if not self._indexes:
            return None
        # A merged index holds no vector with a tombstone, and others are excluded like those.
        return Scanner(
            self._indexes, [self._hidden] if self._is_merged else [shard.tombstones for shard in self.shards]
        )

    @property
    def lists(self) -> int:
        """Inverted lists; 0 for an exact index."""
        return self.scanner.lists if self.scanner else 0

    @property
    def size(self) -> ShardsSize:
        """How much there is to search."""
        return ShardsSize(self.live, self.lists)

    def hide(self, ids: Int64) -> None:
        """Return some faces no more; nothing is written."""
        if not len(ids) or not self.shards:
            return
        self._hidden = np.union1d(self._hidden, ids)
        self.live -= sum(shard.hide(ids) for shard in self.shards)
        self.scanner = self._create_scanner()

    def find_unreturned(self, before: Manifest, now: Manifest) -> Int64:
        """Find the ids that these shards return of a manifest, and the index of a newer one does not."""
        return find_unreturned(self._store, self.shards, before, now)

    def find_nearest(self, queries: Float32, k: int, setting: SearchSetting) -> Hits:
        """Find the k nearest faces of unit vectors (n, dim)."""

        def run_round(queries: Float32, count: int, nprobe: int) -> NearestRound:
            return self.take_nearest(queries, self._scan(queries, count, nprobe), k)

        def find(part: slice) -> Hits:
            return find_nearest(queries[part], k, setting, self.size, run_round)

        parts = self.map_chunks(len(queries), max(setting.rescore, k), find) if self.scanner else []
        if not parts:
            return Hits.create_empty(len(queries), k)
        return Hits(np.concatenate([part.ids for part in parts]), np.concatenate([part.distances for part in parts]))

    def find_within(self, queries: Float32, radius: float, max_faces: int, setting: SearchSetting) -> list[Answer]:
        """Find the faces within a Euclidean distance of unit vectors (n, dim), nearest first."""

        def run_round(queries: Float32, count: int, nprobe: int) -> RadiusRound:
            # Few queries at a time if each has many candidates.
            size = max(1, _MAX_CANDIDATES_IN_MEMORY // (count * len(self.shards)))
            rounds = []
            for at in range(0, len(queries), size):
                part = queries[at : at + size]
                rounds.append(self.take_within(part, self._scan(part, count, nprobe), radius, max_faces))
            return RadiusRound.concatenate(rounds)

        def find(part: slice) -> list[Answer]:
            return find_within(queries[part], max_faces, setting, self.size, run_round)

        if self.scanner is None:
            return [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        return [answer for part in self.map_chunks(len(queries), setting.rescore, find) for answer in part]

    def scan_nearest(self, queries: Float32, k: int, device: str = "cpu") -> Hits:
        """Find the k nearest faces by comparing queries (n, dim) with all vectors."""
        hits = find_exact(queries, self.shards, k, device)
        return Hits(hits.ids, np.sqrt(hits.distances))

    def scan_within(self, queries: Float32, radius: float, max_faces: int) -> list[Answer]:
        """Find all faces within a distance by comparing queries (n, dim) with all vectors, nearest first."""
        return find_within_exactly(queries, self.shards, radius, max_faces).to_answers(len(queries))

    def _scan(self, queries: Float32, count: int, nprobe: int) -> SearchCandidates:
        assert self.scanner is not None  # nothing is scanned without shards
        return self.scanner.find_candidates(queries, count, nprobe)

    def choose_lists(self, queries: Float32, nprobe: int) -> ListChoice:
        """Choose the `nprobe` lists that each query visits; none of an exact index."""
        assert self.scanner is not None
        scanner = self.scanner
        parts = self.map_chunks(len(queries), nprobe, lambda part: scanner.choose_lists(queries[part], nprobe))
        return ListChoice(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def scan_lists(self, queries: Float32, count: int, choice: ListChoice) -> ScanResult:
        """Scan the chosen lists of all shards, and return the best `count` faces per query, in any order."""
        assert self.scanner is not None
        scanner = self.scanner

        def scan(part: slice) -> ScanResult:
            chosen = ListChoice(choice.distances[part], choice.lists[part])
            return scanner.scan(np.ascontiguousarray(queries[part]), count, chosen).keep_best(count)

        parts = self.map_chunks(len(queries), count, scan)
        return ScanResult(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def take_nearest(self, queries: Float32, candidates: SearchCandidates, k: int) -> NearestRound:
        """Compute the exact distances of candidates, and take the k nearest."""
        squared = self.compute_distances(queries, candidates.ids)
        order = find_smallest(squared, k)  # candidates are sorted by id: ties come by id
        return NearestRound(
            ids=np.take_along_axis(candidates.ids, order, axis=1),
            squared=np.take_along_axis(squared, order, axis=1),
            candidates=(candidates.ids != NO_ID).sum(axis=1),
            complete=candidates.complete,
        )

    def take_within(self, queries: Float32, candidates: SearchCandidates, radius: float, max_faces: int) -> RadiusRound:
        """Compute the exact distances of candidates, and take those within the radius."""
        distances = np.sqrt(self.compute_distances(queries, candidates.ids))
        inside = distances <= radius
        answers = []
        for row in range(len(queries)):
            order = np.argsort(distances[row, inside[row]], kind="stable")[:max_faces]
            answers.append((candidates.ids[row, inside[row]][order], distances[row, inside[row]][order]))
        return RadiusRound(
            answers=answers,
            inside=inside.sum(axis=1),
            candidates=(candidates.ids != NO_ID).sum(axis=1),
            complete=candidates.complete,
        )

    def compute_distances(self, queries: Float32, ids: Int64) -> Float32:
        """Compute squared distances (n, w) of queries to candidates (n, w); infinite for `NO_ID`."""
        distances = np.full(ids.shape, np.inf, np.float32)
        # Compute only the pairs (m,) that exist, shard by shard, and put them back into (n, w).
        query_rows, columns = np.nonzero(ids != NO_ID)
        flat_ids = ids[query_rows, columns]
        for shard, (positions, rows) in zip(self.shards, self.locate(flat_ids), strict=True):
            distances[query_rows[positions], columns[positions]] = compute_pair_distances(
                queries, query_rows[positions], shard.vectors, rows
            )
        return distances

    def read_labels(self, ids: Int64) -> pa.Table:
        """Read uri and identity of face ids (n,), in their order; null for those that no shard holds."""
        # Stack the labels of all shards below a null row, then take them in the order of ids.
        tables = [pa.table({"uri": pa.nulls(1, pa.string()), "identity": pa.nulls(1, pa.string())})]
        table_rows = np.zeros(len(ids), np.int64)  # row 0 is the null row
        count = 1
        for shard, (positions, rows) in zip(self.shards, self.locate(ids), strict=True):
            table_rows[positions] = count + np.arange(len(positions))
            tables.append(shard.read_labels(rows))
            count += len(positions)
        return pa.concat_tables(tables).take(pa.array(table_rows))

    def read_vectors(self, ids: Int64, dim: int) -> Float32:
        """Read the vectors (n, dim) of face ids (n,); zeros for those that no shard holds."""
        vectors = np.zeros((len(ids), dim), np.float32)
        for shard, (positions, rows) in zip(self.shards, self.locate(ids), strict=True):
            vectors[positions] = shard.vectors[rows]
        return vectors

    def locate(self, ids: Int64) -> Iterator[tuple[Int64, Int64]]:
        """Yield for each shard the positions in `ids` of those that it holds and no newer one does, and their rows."""
        pending = np.arange(len(ids))
        for shard in self.shards:
            in_shard, rows = shard.find_rows(ids[pending])
            yield pending[in_shard], rows[in_shard]
            pending = pending[~in_shard]

    def map_chunks(self, queries: int, width: int, run: Callable[[slice], Result]) -> list[Result]:
        """Run a function on chunks of the queries in threads.

        Args:
            queries: number of queries.
            width: candidates per query and shard.
            run: a function of a range of queries.
        """
        if not queries:
            return []
        if queries < _MIN_QUERIES_FOR_THREADS:
            faiss.omp_set_num_threads(self._threads)
            return [run(slice(0, queries))]
        # Chunks are small enough that every thread has one, and that their candidates fit the memory.
        size = min(
            _QUERIES_PER_CHUNK,
            -(-queries // self._threads),
            _MAX_CANDIDATES_IN_MEMORY // (width * len(self.shards)),
        )
        size = max(1, size)
        # Each thread searches with a single thread of its own: more would compete for the cores.
        chunks = (slice(at, at + size) for at in range(0, queries, size))
        with ThreadPoolExecutor(self._threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, chunks))
