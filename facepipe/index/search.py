"""Search in a gallery's index: approximate candidates from every shard, re-scored exactly, without deleted faces."""

import os
import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.decisions.named import NamedPersons
from facepipe.decisions.persons import DecidedFaces, read_decided_faces
from facepipe.deprecation import warn_renamed
from facepipe.errors import ConfigError, IndexingError
from facepipe.gallery.hidden import HiddenImages, HiddenWatch, list_complete
from facepipe.index import manifest as manifests
from facepipe.index.manifest import CURVE_K, Manifest
from facepipe.index.open_shards import OpenShards
from facepipe.index.rounds import Answer, SearchSetting
from facepipe.index.shard import Shard
from facepipe.index.shard_set import ShardSet
from facepipe.nearest.distances import Hits
from facepipe.types import Float32, Int64

if TYPE_CHECKING:
    import pandas as pd

_MAX_REOPENINGS = 5

__all__ = ["Answer", "Index", "SearchSetting"]


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
        shard_set: Its shards, wherever they are open.
        setting: How hard to search for ten neighbours by default.
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
        open_elsewhere: Callable[[Manifest], ShardSet] | None = None,
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
            open_elsewhere: opens the shards of a manifest in other processes; by default they are opened in this one.

        Raises:
            IndexingError: there is no index, or a file of it is damaged.
            IndexReplacedError: the files of a pinned index are deleted.
        """
        self.gallery = gallery
        self.threads = threads or len(os.sched_getaffinity(0))
        self.manifest = manifest or manifests.load(gallery)
        self._merge = merge
        self._open_elsewhere = open_elsewhere
        try:
            self.shard_set: ShardSet = self._open_shards(self.manifest)
        except IndexingError:
            if manifest or manifests.load(gallery) == self.manifest:
                raise
            self.manifest = manifests.load(gallery)  # it was replaced between the two reads
            self.shard_set = self._open_shards(self.manifest)
        self._recall = recall
        self.setting = SearchSetting(*self.manifest.choose_setting(recall))
        # What was erased since the index was written, or is being erased.
        self._watch = HiddenWatch(gallery)
        self._hidden: HiddenImages | None = None
        self._decided = DecidedFaces() if with_ignored else read_decided_faces(gallery)
        self._named = NamedPersons() if with_ignored else NamedPersons.load(gallery)
        self._excluded = self._decided.ignored
        self._guard = threading.Lock()
        self._compared = self.manifest
        self.follow_erasures()
        if known_erasures is not None:
            self._follow_erasures_since(known_erasures)
        elif manifest is not None:
            self._watch.freeze()  # one that is not published cannot be compared with the published one

    def __repr__(self) -> str:
        return f"Index({self.gallery!r}, {self.live} faces in {len(self.manifest.shards)} shards)"

    def _open_shards(self, manifest: Manifest) -> ShardSet:
        if self._open_elsewhere is not None:
            return self._open_elsewhere(manifest)
        store = manifests.open_index_store(self.gallery)
        return OpenShards(store, manifest.shards, self.threads, merge=self._merge)

    def _require_open(self) -> OpenShards:
        if not isinstance(self.shard_set, OpenShards):
            raise ConfigError(f"the shards of the index of {self.gallery!r} are open in other processes: open it here")
        return self.shard_set

    @property
    def live(self) -> int:
        """Vectors that a search can return."""
        return self.shard_set.live

    @property
    def shards(self) -> list[Shard]:
        """The shards that are open in this process, newest first."""
        return self._require_open().shards

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
            try:
                if current.created != self.manifest.created or self._open_elsewhere is not None:
                    # Another index took its place. This one goes on, so that a long search has one index to its end.
                    removed = self.shard_set.find_unreturned(self.manifest, current)
                    self._compared = current
                    return removed
                shards = self._open_shards(current)
            except IndexingError:
                continue  # it was replaced between the two reads
            self.manifest = current
            self._compared = current
            self.shard_set = shards
        return np.empty(0, np.int64)

    def _exclude(self, ids: Int64) -> None:
        """Return some faces no more."""
        self._excluded = ids
        self.shard_set.hide(ids)

    @property
    def dim(self) -> int:
        """Numbers per vector."""
        return self.manifest.dim

    @property
    def lists(self) -> int:
        """Inverted lists; 0 for an exact index."""
        return self.shard_set.lists

    def count_per_list(self) -> Int64:
        """Count the vectors in each inverted list."""
        scanner = self._require_open().scanner
        return scanner.count_per_list() if scanner else np.zeros(1, np.int64)

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
        scanner = self._require_open().scanner
        if scanner is None:
            return np.zeros(ids.shape, np.int64)
        unique, inverse = np.unique(ids, return_inverse=True)
        lists = scanner.assign_lists(self.get_vectors(unique))[inverse.reshape(ids.shape)]
        return np.where(ids >= 0, scanner.rank_lists(queries, lists), self.lists)

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
        return self.shard_set.find_nearest(queries, min(k, max(1, self.live)), chosen)

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
        return self.shard_set.find_within(queries, radius, max_faces, chosen)

    def get_labels(self, ids: Int64) -> pa.Table:
        """Return uri and identity of face ids (n,), in their order; null for -1 and for faces that are erased.

        The identity is the name that people have confirmed, else the source's label, else the name of the person in
        whose cluster the face is.
        """
        self.follow_erasures()
        labels = self.shard_set.read_labels(ids)
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
        vectors = self.shard_set.read_vectors(ids, self.dim)
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

    def _check_queries(self, queries: Float32) -> Float32:
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ConfigError(f"queries are (n, {self.dim}) vectors, got an array of shape {queries.shape}")
        queries = np.ascontiguousarray(queries, np.float32)
        norms = np.linalg.norm(queries, axis=1)
        if not np.all(np.abs(norms - 1) < 1e-2):  # also if they are NaN
            raise ConfigError("queries must be finite vectors of unit norm: divide each by its norm")
        return queries
