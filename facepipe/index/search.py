"""Search in a gallery's index: approximate candidates from every shard, re-scored exactly, without deleted faces."""

import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.decisions.named import NamedPersons
from facepipe.decisions.persons import DecidedFaces, read_decided_faces
from facepipe.deprecation import warn_renamed
from facepipe.errors import ConfigError, IndexingError
from facepipe.gallery.hidden import HiddenImages, HiddenWatch, list_complete
from facepipe.index import manifest as manifests
from facepipe.index.candidates import NO_ID, Scanner
from facepipe.index.manifest import CURVE_K, INDEX, Manifest
from facepipe.index.shard import Shard, merge_indexes
from facepipe.index.update import find_unreturned
from facepipe.nearest.distances import Hits, compute_pair_distances, find_smallest
from facepipe.nearest.faiss_engine import faiss
from facepipe.types import Float32, Int64

if TYPE_CHECKING:
    import pandas as pd

_QUERIES_PER_CHUNK = 1024  # per thread: enough to share the reading of a list, small enough for the cache
_MAX_CANDIDATES_IN_MEMORY = 1 << 24  # per thread
_GROWTH = 4  # of lists and candidates, for queries that need more
# Shards are merged in memory only if their index files have at most this size.
_MAX_MERGED_BYTES = 2 << 30
_MIN_RADIUS_CANDIDATES = 64
_MAX_REOPENINGS = 5
_MIN_QUERIES_FOR_THREADS = 16  # fewer are spread over threads by faiss itself

Answer = tuple[Int64, Float32]
Result = TypeVar("Result")


@dataclass(frozen=True)
class SearchSetting:
    """How hard to search.

    Attributes:
        nprobe: Lists visited per query.
        rescore: Candidates re-scored exactly per query.
    """

    nprobe: int
    rescore: int


class Index:
    """The published index of a gallery, opened read-only.

        index = facepipe.Index("G")
        hits = index.search(vectors, k=10)                 # vectors: (n, dim) float32 of unit norm
        hits.ids, hits.distances                           # (n, 10); distances are Euclidean
        index.to_pandas(hits)                              # a row per hit, with uri and identity
        answers = index.search_within(vectors, radius=0.4) # all faces within a distance

    Faces of images whose erasure is recorded are not returned from that moment on, also by an index that is open. Faces
    that people ignore are not returned, and names that people gave are the identities. For these an index that is open
    goes by the decisions of the moment at which it was opened.

    Distances are exact. Which faces are found is approximate above about 50,000 faces, with the recall that the index
    was built for, or the requested one. `get_recall` says what was measured for a k or a radius.

    Attributes:
        gallery: Path or URL.
        manifest: What the index consists of.
        shards: Newest first.
        setting: How hard to search for ten neighbours by default.
        live: Vectors that a search can return.
    """

    def __init__(
        self,
        gallery: str,
        recall: float | None = None,
        threads: int | None = None,
        merge: bool = False,
        manifest: Manifest | None = None,
        *,
        known_erasures: Collection[str] | None = None,
        with_ignored: bool = False,
    ):
        """Open an index.

        Args:
            gallery: path or URL.
            recall: recall@10 to search with; by default the one that the index was built for.
            threads: by default one per CPU.
            merge: join the shards in memory if they have at most 2 GiB, which pays for many queries.
            manifest: by default the published one.
            known_erasures: erasures that were complete when the manifest was read (`list_complete`). With them, another
                manifest may have taken its place since; what was erased meanwhile is not returned.
            with_ignored: return all faces with the labels of their source, whatever people have decided. Only what
                maintains or measures the index needs them.

        Raises:
            IndexingError: there is no index, or a file of it is damaged.
            IndexReplacedError: the files of a pinned index are deleted.
        """
        self.gallery = gallery
        self.threads = threads or len(os.sched_getaffinity(0))
        self.manifest = manifest or manifests.load(gallery)
        try:
            self.shards = self._open_shards()
        except IndexingError:
            if manifest or manifests.load(gallery) == self.manifest:
                raise
            self.manifest = manifests.load(gallery)  # it was replaced between the two reads
            self.shards = self._open_shards()
        self._recall = recall
        self.setting = SearchSetting(*self.manifest.choose_setting(recall))
        self.live = self.manifest.live
        self._is_merged = merge and self._is_mergeable()
        self._indexes = self._open_indexes() if self.shards else []
        # What was erased since the index was written, or is being erased.
        self._watch = HiddenWatch(gallery)
        self._hidden: HiddenImages | None = None
        self._decided = DecidedFaces() if with_ignored else read_decided_faces(gallery)
        self._named = NamedPersons() if with_ignored else NamedPersons.load(gallery)
        self._excluded = self._decided.ignored
        self._guard = threading.Lock()
        self._compared = self.manifest
        self._scanner = self._create_scanner()
        self.follow_erasures()
        if known_erasures is not None:
            self._follow_erasures_since(known_erasures)
        elif manifest is not None:
            self._watch.freeze()  # one that is not published cannot be compared with the published one

    def __repr__(self) -> str:
        return f"Index({self.gallery!r}, {self.live} faces in {len(self.shards)} shards)"

    def _open_shards(self) -> list[Shard]:
        # Newest first: of an id that was tombstoned and added again, the newer label counts.
        store = manifests.open_index_store(self.gallery)
        return [Shard(store, entry) for entry in reversed(self.manifest.shards)]

    def _is_mergeable(self) -> bool:
        size = sum(shard.entry.files[INDEX].bytes for shard in self.shards)
        return len(self.shards) > 1 and size <= _MAX_MERGED_BYTES

    def _open_indexes(self) -> list[Any]:
        if self._is_merged:
            return [merge_indexes(self.shards)]
        return [shard.open_index() for shard in self.shards]

    def _create_scanner(self) -> Scanner | None:
        if not self._indexes:
            return None
        # A merged index holds no vector with a tombstone, and others are excluded like those.
        return Scanner(
            self._indexes, [self._excluded] if self._is_merged else [shard.tombstones for shard in self.shards]
        )

    def freeze(self) -> None:
        """Return the same faces from now on, even if an erasure is recorded meanwhile."""
        self.follow_erasures()
        self._watch.freeze()

    def follow_erasures(self) -> None:
        """Stop returning what is being erased, and what was erased since the index was opened.

        Every search begins with it. It costs a look at a small file if nothing has happened.

        Raises:
            StorageError: what is being erased cannot be read.
            IndexingError: the index that replaced this one cannot be read.
        """
        with self._guard:
            hidden = self._watch.read()
            if hidden is self._hidden:
                return
            ids = [hidden.faces]
            # An erasure that was complete before this look shows in what the current index returns.
            if self._hidden is not None:
                ids.append(self._follow_index())
            self._exclude(np.unique(np.concatenate([self._excluded, *ids])))
            self._hidden = hidden

    def _follow_erasures_since(self, known_erasures: Collection[str]) -> None:
        """Stop returning what other erasures than these have deleted."""
        with self._guard:
            if not list_complete(self.gallery) <= set(known_erasures):
                self._exclude(np.union1d(self._excluded, self._follow_index()))

    def _follow_index(self) -> Int64:
        """Open the current index if only erasures have changed it; else return what it no longer returns."""
        for _ in range(_MAX_REOPENINGS):
            current = manifests.load(self.gallery)
            if current == self._compared:
                break
            store = manifests.open_index_store(self.gallery)
            try:
                if current.created != self.manifest.created:
                    # Another index took its place. This one goes on, so that a long search has one index to its end.
                    removed = find_unreturned(store, self.shards, current)
                    self._compared = current
                    return removed
                shards = [Shard(store, entry) for entry in reversed(current.shards)]
            except IndexingError:
                continue  # it was replaced between the two reads
            self.manifest = current
            self._compared = current
            self.shards = shards
            self._indexes = self._open_indexes() if shards else []
            self.live = current.live
            self._scanner = self._create_scanner()
        return np.empty(0, np.int64)

    def _exclude(self, ids: Int64) -> None:
        """Return some faces no more."""
        self._excluded = ids
        if not len(ids) or not self.shards:
            return
        self.live -= sum(shard.hide(ids) for shard in self.shards)
        self._scanner = self._create_scanner()

    @property
    def dim(self) -> int:
        """Numbers per vector."""
        return self.manifest.dim

    @property
    def lists(self) -> int:
        """Inverted lists; 0 for an exact index."""
        return self._scanner.lists if self._scanner else 0

    def count_per_list(self) -> Int64:
        """Count the vectors in each inverted list."""
        return self._scanner.count_per_list() if self._scanner else np.zeros(1, np.int64)

    def choose_setting(self, *, k: int = CURVE_K, radius: float | None = None) -> SearchSetting:
        """Choose the cheapest setting that reaches the index's recall for k neighbours, or within a radius."""
        chosen = self.manifest.choose_target(k=k, radius=radius, recall=self._recall)
        return SearchSetting(chosen.nprobe, chosen.rescore)

    def get_recall(self, *, k: int = CURVE_K, radius: float | None = None) -> float | None:
        """Return the recall that was measured for k neighbours or a radius, a lower bound; None if it was not."""
        return self.manifest.choose_target(k=k, radius=radius, recall=self._recall).recall

    def rank_lists(self, queries: Float32, ids: Int64) -> Int64:
        """Find after how many other lists a query visits those of faces.

        Args:
            queries: unit vectors (n, dim).
            ids: face ids (n, w); -1 for none.

        Returns:
            Ranks (n, w) from 0; the number of lists for -1.
        """
        if self._scanner is None:
            return np.zeros(ids.shape, np.int64)
        unique, inverse = np.unique(ids, return_inverse=True)
        lists = self._scanner.assign_lists(self.get_vectors(unique))[inverse.reshape(ids.shape)]
        return np.where(ids >= 0, self._scanner.rank_lists(queries, lists), self.lists)

    def search(self, queries: Float32, k: int = 10, setting: SearchSetting | None = None) -> Hits:
        """Find the k nearest faces of each query; fewer only if the gallery holds fewer.

        Args:
            queries: unit vectors (n, dim).
            k: faces per query.
            setting: how hard to search; by default what reaches the index's recall for k neighbours.

        Returns:
            Hits (n, k) with Euclidean distances.

        Raises:
            ConfigError: k is below 1, or the queries are not unit vectors.
        """
        queries = self._check_queries(queries)
        self.follow_erasures()
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        chosen = setting or self.choose_setting(k=k)
        k = min(k, max(1, self.live))
        parts = self._map_chunks(queries, lambda chunk: self._find_nearest(chunk, k, chosen), max(chosen.rescore, k))
        if not parts:
            return Hits.create_empty(0, k)
        return Hits(np.concatenate([part.ids for part in parts]), np.concatenate([part.distances for part in parts]))

    def search_within(
        self, queries: Float32, radius: float, max_faces: int = 100_000, setting: SearchSetting | None = None
    ) -> list[Answer]:
        """Find the faces within a Euclidean distance of each query.

        Of an index with lists the answers are approximate: they hold the share of them that `get_recall` says.
        `facepipe.index.exact.scan_within` finds all of them.

        Args:
            queries: unit vectors (n, dim).
            radius: distance.
            max_faces: maximum faces per query.
            setting: how hard to search; by default what reaches the index's recall within the radius.

        Returns:
            Per query (ids, distances), nearest first.
        """
        queries = self._check_queries(queries)
        self.follow_erasures()
        chosen = setting or self.choose_setting(radius=radius)
        parts = self._map_chunks(
            queries, lambda chunk: self._find_within(chunk, radius, max_faces, chosen), chosen.rescore
        )
        return [answer for part in parts for answer in part]

    def get_labels(self, ids: Int64) -> pa.Table:
        """Return uri and identity of face ids (n,), in their order; null for -1 and for faces that are erased.

        The identity is the name that people have confirmed, else the source's label, else the name of the person in
        whose cluster the face is.
        """
        self.follow_erasures()
        # Stack the labels of all shards below a null row, then take them in the order of ids.
        tables = [pa.table({"uri": pa.nulls(1, pa.string()), "identity": pa.nulls(1, pa.string())})]
        table_rows = np.zeros(len(ids), np.int64)  # row 0 is the null row
        count = 1
        for shard, (positions, rows) in zip(self.shards, self._locate(ids), strict=True):
            table_rows[positions] = count + np.arange(len(positions))
            tables.append(shard.read_labels(rows))
            count += len(positions)
        labels = pa.concat_tables(tables).take(pa.array(table_rows))
        named = pc.coalesce(self._decided.name_faces(ids, labels["identity"]), self._named.find_names(ids))
        labels = labels.set_column(labels.schema.get_field_index("identity"), "identity", named)
        # The index may be behind the table, and then holds faces of earlier contents of an image under other ids.
        is_hidden = pa.array(np.isin(ids, self._excluded))
        if self._hidden:
            is_hidden = pc.or_(is_hidden, pc.is_in(labels["uri"].combine_chunks(), self._hidden.uris))
        if not pc.any(is_hidden).as_py():
            return labels
        columns = [pc.if_else(is_hidden, None, column.combine_chunks()) for column in labels.columns]
        return pa.table(columns, names=labels.column_names)

    def get_persons(self, ids: Int64) -> pa.Array:
        """Return the ids of the named persons whose faces these are, (n,); null for faces of nobody who has a name."""
        self.follow_erasures()
        persons = self._named.find_persons(ids)
        return pc.if_else(pa.array(np.isin(ids, self._excluded)), pa.scalar(None, pa.int64()), persons)

    def to_pandas(self, hits: Hits) -> "pd.DataFrame":
        """Return a row per hit: query (number), rank (from 1), face_id, distance, uri and identity.

        Queries with fewer hits have fewer rows.
        """
        queries, ranks = np.nonzero(hits.ids >= 0)
        ids = hits.ids[queries, ranks]
        labels = self.get_labels(ids).to_pandas()
        columns = {"query": queries, "rank": ranks + 1, "face_id": ids, "distance": hits.distances[queries, ranks]}
        return labels.assign(**columns)[[*columns, *labels.columns]]

    def get_vectors(self, ids: Int64) -> Float32:
        """Return the vectors (n, dim) of face ids (n,); zeros for ids that the index does not hold, or has erased."""
        self.follow_erasures()
        vectors = np.zeros((len(ids), self.dim), np.float32)
        for shard, (positions, rows) in zip(self.shards, self._locate(ids), strict=True):
            vectors[positions] = shard.vectors[rows]
        vectors[np.isin(ids, self._excluded)] = 0
        return vectors

    def within(
        self, queries: Float32, radius: float, most: int = 100_000, setting: SearchSetting | None = None
    ) -> list[Answer]:
        """Call `search_within`. This name is deprecated."""
        warn_renamed("Index.within", "Index.search_within")
        return self.search_within(queries, radius, most, setting)

    def labels(self, ids: Int64) -> pa.Table:
        """Call `get_labels`. This name is deprecated."""
        warn_renamed("Index.labels", "Index.get_labels")
        return self.get_labels(ids)

    def vectors(self, ids: Int64) -> Float32:
        """Call `get_vectors`. This name is deprecated."""
        warn_renamed("Index.vectors", "Index.get_vectors")
        return self.get_vectors(ids)

    def list_lengths(self) -> Int64:
        """Call `count_per_list`. This name is deprecated."""
        warn_renamed("Index.list_lengths", "Index.count_per_list")
        return self.count_per_list()

    def _map_chunks(self, queries: Float32, search: Callable[[Float32], Result], width: int) -> list[Result]:
        """Search chunks of the queries in threads; `width` is the number of candidates per query and shard."""
        if not len(queries):
            return []
        if self._scanner is None:
            return [search(queries)]
        if len(queries) < _MIN_QUERIES_FOR_THREADS:
            faiss.omp_set_num_threads(self.threads)
            return [search(queries)]
        # Chunks are small enough that every thread has one, and that their candidates fit the memory.
        size = min(
            _QUERIES_PER_CHUNK,
            -(-len(queries) // self.threads),
            _MAX_CANDIDATES_IN_MEMORY // (width * len(self.shards)),
        )
        size = max(1, size)
        # Each thread searches with a single thread of its own: more would compete for the cores.
        chunks = (queries[at : at + size] for at in range(0, len(queries), size))
        with ThreadPoolExecutor(self.threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(search, chunks))

    def _find_nearest(self, queries: Float32, k: int, setting: SearchSetting) -> Hits:
        """Find the k nearest. Queries with too few candidates are repeated with more lists and more candidates."""
        hits = Hits.create_empty(len(queries), k)
        pending = np.arange(len(queries))
        nprobe = setting.nprobe
        count = max(setting.rescore, min(2 * k, self.live))
        while pending.size and self._scanner is not None:
            # Those tied with the last are left out: a few more are requested, so that the rest are as many as meant.
            requested = min(count + max(2, count // 50), self.live + 1)
            candidates = self._scanner.find_candidates(queries[pending], requested, nprobe)
            # Compute the exact distances (p, w) and keep the k nearest.
            squared = self._compute_distances(queries[pending], candidates.ids)
            order = find_smallest(squared, k)  # candidates are sorted by id: ties come by id
            width = order.shape[1]
            hits.ids[pending, :width] = np.take_along_axis(candidates.ids, order, axis=1)
            hits.distances[pending, :width] = np.take_along_axis(squared, order, axis=1)
            # Search again for queries with fewer than k candidates, unless all lists were visited and hold no more.
            has_enough = (candidates.ids != NO_ID).sum(axis=1) >= k
            is_exhausted = candidates.complete & (nprobe >= self._scanner.lists)
            pending = pending[~(has_enough | is_exhausted)]
            count *= _GROWTH
            nprobe *= _GROWTH
        hits.ids[~np.isfinite(hits.distances)] = -1
        return Hits(hits.ids, np.sqrt(hits.distances))

    def _find_within(self, queries: Float32, radius: float, max_faces: int, setting: SearchSetting) -> list[Answer]:
        """Find the faces within a radius, with more and more candidates until they reach well beyond it."""
        answers: list[Answer] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        pending = np.arange(len(queries))
        count = max(setting.rescore, _MIN_RADIUS_CANDIDATES)
        while pending.size and self._scanner is not None:
            requested = min(count, self.live + 1)
            # Few queries at a time if each has many candidates.
            size = max(1, _MAX_CANDIDATES_IN_MEMORY // (requested * len(self.shards)))
            unfinished = [np.empty(0, np.int64)]
            for at in range(0, len(pending), size):
                part = pending[at : at + size]
                candidates = self._scanner.find_candidates(queries[part], requested, setting.nprobe)
                distances = np.sqrt(self._compute_distances(queries[part], candidates.ids))
                inside = distances <= radius
                # Each round has more candidates, so that its answers replace the earlier ones.
                for n, query in enumerate(part):
                    order = np.argsort(distances[n, inside[n]], kind="stable")[:max_faces]
                    answers[query] = (candidates.ids[n, inside[n]][order], distances[n, inside[n]][order])
                # Stop once candidates are several times the faces inside: those not seen then lie outside.
                reaches_beyond = inside.sum(axis=1) * _GROWTH <= (candidates.ids != NO_ID).sum(axis=1)
                has_enough = inside.sum(axis=1) >= max_faces
                unfinished.append(part[~(reaches_beyond | candidates.complete | has_enough)])
            pending = np.concatenate(unfinished)
            count *= _GROWTH
        return answers

    def _compute_distances(self, queries: Float32, ids: Int64) -> Float32:
        """Compute squared distances (n, w) of queries to candidates (n, w); infinite for `NO_ID`."""
        distances = np.full(ids.shape, np.inf, np.float32)
        # Compute only the pairs (m,) that exist, shard by shard, and put them back into (n, w).
        query_rows, columns = np.nonzero(ids != NO_ID)
        flat_ids = ids[query_rows, columns]
        for shard, (positions, rows) in zip(self.shards, self._locate(flat_ids), strict=True):
            distances[query_rows[positions], columns[positions]] = compute_pair_distances(
                queries, query_rows[positions], shard.vectors, rows
            )
        return distances

    def _check_queries(self, queries: Float32) -> Float32:
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ConfigError(f"queries are (n, {self.dim}) vectors, got an array of shape {queries.shape}")
        queries = np.ascontiguousarray(queries, np.float32)
        norms = np.linalg.norm(queries, axis=1)
        if not np.all(np.abs(norms - 1) < 1e-2):  # also if they are NaN
            raise ConfigError("queries must be finite vectors of unit norm: divide each by its norm")
        return queries

    def _locate(self, ids: Int64) -> Iterator[tuple[Int64, Int64]]:
        """Yield for each shard the positions in `ids` of those that it holds and no newer one does, and their rows."""
        pending = np.arange(len(ids))
        for shard in self.shards:
            in_shard, rows = shard.find_rows(ids[pending])
            yield pending[in_shard], rows[in_shard]
            pending = pending[~in_shard]
