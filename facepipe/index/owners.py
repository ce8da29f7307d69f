"""The shards of an index on owners: each has some of them open, and answers for these alone.

A search is broadcast. It takes the rounds that a search in one process takes, and each round takes three steps:

1. The owners choose the lists that queries visit, each for some of the queries.
2. Every owner scans these lists in its shards. What it finds stays with it; it returns only distances of codes.
3. From the distances of all owners follows where the candidates end. Every owner computes the exact distances of its
   candidates, and returns its nearest. These are merged by distance, ties by face id.

So owners re-score as many candidates as one process does, and the answers are the same to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from facepipe.errors import ConfigError
from facepipe.index import manifest as manifests
from facepipe.index.candidates import Cut, ListChoice, ScanResult, find_cut
from facepipe.index.exact import FoundPairs, find_exact, find_within_exactly, merge_hits
from facepipe.index.manifest import Manifest, ShardEntry
from facepipe.index.open_shards import OpenShards
from facepipe.index.rounds import (
    Answer,
    NearestRound,
    RadiusRound,
    SearchSetting,
    ShardsSize,
    find_nearest,
    find_within,
)
from facepipe.nearest.distances import Hits
from facepipe.types import Float32, Int32, Int64

# Bytes of a step, over all owners, that are on their way at a time.
STEP_BYTES = 32 << 20
# Bytes of what owners return of a scan of all vectors, at a time: each part of the queries reads all vectors again.
_SCAN_BYTES = 256 << 20
# What travels: a number of a vector, the number of a list and its distance, a distance of a code, a pair of a query and
# a face with their distance.
_NUMBER_BYTES = 4
_CHOICE_BYTES = 8
_CODE_BYTES = 4
_PAIR_BYTES = 20


@dataclass(frozen=True)
class OwnedShard:
    """A shard that an owner has open.

    Attributes:
        entry: Of the manifest.
        age: Its position in the manifest: of an id in two shards, the later one counts.
    """

    entry: ShardEntry
    age: int


@dataclass(frozen=True)
class OwnerShare:
    """What an owner opens.

    Attributes:
        gallery: Path or URL of the gallery.
        shards: Shards, oldest first.
        threads: To search with.
    """

    gallery: str
    shards: tuple[OwnedShard, ...]
    threads: int


@dataclass(frozen=True)
class OwnerState:
    """What the shards of an owner hold.

    Attributes:
        live: Vectors that a search can return.
        lists: Inverted lists; 0 for an exact index.
        tie: Distances of codes that differ by no more than this are equal.
    """

    live: int
    lists: int
    tie: float


class FoundLabels(NamedTuple):
    """Labels of the faces that an owner holds.

    Attributes:
        age: Position of the newest shard that holds each face, (n,); -1 if the owner has none that does.
        labels: A row per face that it holds, in their order.
    """

    age: Int32
    labels: pa.Table


class ScanStep(NamedTuple):
    """What an owner returns of a scan.

    Attributes:
        distances: Distances of codes (n, count), infinite if there is no face, in any order.
        kept: The same with the ids of the faces, for the next step.
    """

    distances: Float32
    kept: ScanResult


class WithinStep(NamedTuple):
    """What an owner finds within a radius.

    Attributes:
        pairs: Pairs of queries and faces, by query, nearest first.
        inside: Number of candidates (n,) inside, also of those that are not among the pairs.
    """

    pairs: FoundPairs
    inside: Int64


class ShardOwner:
    """Has some shards open and answers for them."""

    def __init__(self, share: OwnerShare):
        """Open the shards. Files in an object store are fetched to this machine, once and all of them."""
        store = manifests.open_index_store(share.gallery)
        self._open = OpenShards(store, [shard.entry for shard in share.shards], share.threads, merge=True)
        ages = {shard.entry.name: shard.age for shard in share.shards}
        self._ages = np.array([ages[shard.entry.name] for shard in self._open.shards], np.int32)
        # An erasure may delete the files of a shard that others have replaced, so none is left for later.
        for shard in self._open.shards:
            shard.open_files()

    def describe(self) -> OwnerState:
        """Describe what the shards hold now."""
        scanner = self._open.scanner
        return OwnerState(self._open.live, self._open.lists, scanner.tie if scanner else 0.0)

    def hide(self, ids: Int64) -> OwnerState:
        """Return some faces no more."""
        self._open.hide(ids)
        return self.describe()

    def find_unreturned(self, before: Manifest, now: Manifest) -> Int64:
        """Find the ids that these shards return of a manifest, and the index of a newer one does not."""
        return self._open.find_unreturned(before, now)

    def choose_lists(self, queries: Float32, nprobe: int) -> ListChoice:
        """Choose the lists that queries (n, dim) visit."""
        choice = self._open.choose_lists(queries, nprobe)
        return ListChoice(choice.distances, choice.lists.astype(np.int32))

    def scan_lists(self, queries: Float32, count: int, *choices: ListChoice) -> ScanStep:
        """Scan the chosen lists; the choices are those of the queries, one below the other."""
        choice = ListChoice(*(np.concatenate(arrays) for arrays in zip(*choices, strict=True)))
        kept = self._open.scan_lists(queries, count, choice)
        return ScanStep(kept.distances, kept)

    def take_nearest(self, queries: Float32, kept: ScanResult, cut: Cut, k: int) -> Hits:
        """Take the k nearest of the candidates that a scan found; their distances are squared."""

        def take(part: slice) -> NearestRound:
            candidates = self._select(kept, cut, part)
            return self._open.take_nearest(queries[part], candidates, k)

        rounds = self._open.map_chunks(len(queries), kept.ids.shape[1], take)
        hits = Hits.create_empty(len(queries), k)
        at = 0
        for one in rounds:
            rows = slice(at, at + len(one.ids))
            hits.ids[rows, : one.ids.shape[1]] = one.ids
            hits.distances[rows, : one.ids.shape[1]] = one.squared
            at = rows.stop
        return hits

    def take_within(self, queries: Float32, kept: ScanResult, cut: Cut, radius: float, max_faces: int) -> WithinStep:
        """Take the candidates within a radius that a scan found, the nearest `max_faces` of each query."""

        def take(part: slice) -> RadiusRound:
            return self._open.take_within(queries[part], self._select(kept, cut, part), radius, max_faces)

        rounds = self._open.map_chunks(len(queries), kept.ids.shape[1], take)
        answers = [answer for one in rounds for answer in one.answers]
        return WithinStep(_to_pairs(answers), np.concatenate([one.inside for one in rounds]))

    def _select(self, kept: ScanResult, cut: Cut, part: slice) -> Any:
        assert self._open.scanner is not None  # there was a scan
        chosen = ScanResult(kept.distances[part], kept.ids[part])
        return self._open.scanner.select_candidates(chosen, Cut(cut.last[part], cut.complete[part]))

    def scan_nearest(self, queries: Float32, k: int) -> Hits:
        """Find the k nearest by comparing with all vectors; their distances are squared."""
        return find_exact(queries, self._open.shards, k)

    def scan_within(self, queries: Float32, radius: float, max_faces: int) -> FoundPairs:
        """Find the faces within a radius by comparing with all vectors, the nearest `max_faces` of each query."""
        return find_within_exactly(queries, self._open.shards, radius, max_faces)

    def find_labels(self, ids: Int64) -> FoundLabels:
        """Find the labels of those face ids (n,) that these shards hold."""
        ages = self._find_ages(ids)
        return FoundLabels(ages, self._open.read_labels(ids[ages >= 0]))

    def find_vectors(self, ids: Int64, dim: int) -> tuple[Int32, Float32]:
        """Find the vectors (n, dim) of those face ids (n,) that these shards hold, and the ages of their shards."""
        return self._find_ages(ids), self._open.read_vectors(ids, dim)

    def _find_ages(self, ids: Int64) -> Int32:
        ages = np.full(len(ids), -1, np.int32)
        for age, (positions, _) in zip(self._ages, self._open.locate(ids), strict=True):
            ages[positions] = age
        return ages


class OwnerCalls(Protocol):
    """Calls methods of all owners, each in a process of its own, or all in this one.

    What a call returns may be a reference to what it will return. `fetch` gets what that is.
    """

    @property
    def owners(self) -> int:
        """Number of owners."""

    def put(self, value: Any) -> Any:
        """Make a reference to a value, for arguments that go to several owners."""

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of `ShardOwner` with the arguments of each owner, in their order.

        Fewer arguments than owners call the first owners only.
        """

    def call_scan(self, arguments: Sequence[tuple[Any, ...]]) -> list[ScanStep]:
        """Call `scan_lists` of each owner. The parts of what it returns are references of their own."""

    def fetch(self, references: Sequence[Any]) -> list[Any]:
        """Return what references stand for."""


@dataclass(frozen=True)
class _OwnersScan:
    """What a scan on all owners finds.

    Attributes:
        queries: Stands for the queries, which the owners have by now.
        steps: What each owner returns.
        cut: Where the candidates of each query end.
        candidates: Number of candidates of each query, (n,).
    """

    queries: Any
    steps: list[ScanStep]
    cut: Cut
    candidates: Int64


class OwnedShards:
    """All shards of an index on owners, as `facepipe.index.shard_set.ShardSet` describes."""

    def __init__(self, calls: OwnerCalls, step_bytes: int = STEP_BYTES):
        """Ask the owners what they hold.

        Args:
            calls: reaches the owners.
            step_bytes: bytes of a step, over all owners, that are on their way at a time.
        """
        self._calls = calls
        self._step_bytes = step_bytes
        self._take_states(calls.fetch(calls.call("describe", [()] * calls.owners)))

    def _take_states(self, states: list[OwnerState]) -> None:
        self._live = sum(state.live for state in states)
        self._lists = max((state.lists for state in states), default=0)
        self._tie = max((state.tie for state in states), default=0.0)

    @property
    def live(self) -> int:
        """Vectors that a search can return."""
        return self._live

    @property
    def lists(self) -> int:
        """Inverted lists; 0 for an exact index."""
        return self._lists

    def hide(self, ids: Int64) -> None:
        """Return some faces no more."""
        if len(ids) and self._calls.owners:
            self._take_states(self._broadcast("hide", ids))

    def find_unreturned(self, before: Manifest, now: Manifest) -> Int64:
        """Find the ids that the owners return of a manifest, and the index of a newer one does not."""
        parts = self._broadcast("find_unreturned", before, now)
        return np.unique(np.concatenate([np.empty(0, np.int64), *parts]))

    def find_nearest(self, queries: Float32, k: int, setting: SearchSetting) -> Hits:
        """Find the k nearest faces of unit vectors (n, dim) among those of the nearest lists."""

        def run_round(queries: Float32, count: int, nprobe: int) -> NearestRound:
            parts = self._cut_queries(queries, nprobe, count * _CODE_BYTES + k * _PAIR_BYTES)
            return NearestRound.concatenate([self._run_nearest(part, count, nprobe, k) for part in parts])

        if not self._calls.owners:
            return Hits.create_empty(len(queries), k)
        return find_nearest(queries, k, setting, self._size, run_round)

    def find_within(self, queries: Float32, radius: float, max_faces: int, setting: SearchSetting) -> list[Answer]:
        """Find the faces of the nearest lists within a Euclidean distance of unit vectors (n, dim), nearest first."""

        def run_round(queries: Float32, count: int, nprobe: int) -> RadiusRound:
            parts = self._cut_queries(queries, nprobe, count * (_CODE_BYTES + _PAIR_BYTES))
            return RadiusRound.concatenate([self._run_within(part, count, nprobe, radius, max_faces) for part in parts])

        if not self._calls.owners:
            return [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        return find_within(queries, max_faces, setting, self._size, run_round)

    def scan_nearest(self, queries: Float32, k: int, device: str = "cpu") -> Hits:
        """Find the k nearest faces by comparing queries (n, dim) with all vectors, on the owners' CPUs."""
        if device != "cpu":
            raise ConfigError(f"run.device={device} needs run.placement=copies: owners compare on CPUs")
        size = max(1, _SCAN_BYTES // (k * _PAIR_BYTES * max(1, self._calls.owners)))
        ids = [np.empty((0, k), np.int64)]
        distances = [np.empty((0, k), np.float32)]
        for at in range(0, len(queries), size):
            part = queries[at : at + size]
            hits = Hits.create_empty(len(part), k)
            for found in self._broadcast("scan_nearest", part, k):
                hits = merge_hits(hits, found, k)
            ids.append(hits.ids)
            distances.append(np.sqrt(hits.distances))
        return Hits(np.concatenate(ids), np.concatenate(distances))

    def scan_within(self, queries: Float32, radius: float, max_faces: int) -> list[Answer]:
        """Find all faces within a distance by comparing queries (n, dim) with all vectors, nearest first."""
        parts = self._broadcast("scan_within", queries, radius, max_faces)
        pairs = FoundPairs.concatenate([FoundPairs.create_empty(), *parts]).keep_nearest(max_faces)
        return pairs.to_answers(len(queries))

    def read_labels(self, ids: Int64) -> pa.Table:
        """Read uri and identity of face ids (n,), in their order; null for those that no owner holds."""
        results: list[FoundLabels] = self._broadcast("find_labels", ids)
        newest = _find_newest([result.age for result in results], len(ids))
        # Stack the labels of all owners below a null row, then take them in the order of ids.
        tables = [pa.table({"uri": pa.nulls(1, pa.string()), "identity": pa.nulls(1, pa.string())})]
        table_rows = np.zeros(len(ids), np.int64)  # row 0 is the null row
        count = 1
        for number, result in enumerate(results):
            rows = count + np.cumsum(result.age >= 0) - 1
            table_rows[newest == number] = rows[newest == number]
            tables.append(result.labels)
            count += result.labels.num_rows
        return pa.concat_tables(tables).take(pa.array(table_rows))

    def read_vectors(self, ids: Int64, dim: int) -> Float32:
        """Read the vectors (n, dim) of face ids (n,); zeros for those that no owner holds."""
        vectors = np.zeros((len(ids), dim), np.float32)
        results = self._broadcast("find_vectors", ids, dim)
        newest = _find_newest([ages for ages, _ in results], len(ids))
        for number, (_, found) in enumerate(results):
            vectors[newest == number] = found[newest == number]
        return vectors

    @property
    def _size(self) -> ShardsSize:
        return ShardsSize(self._live, self._lists)

    def _broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every owner with the same arguments, and return what they return."""
        references = tuple(self._calls.put(argument) for argument in arguments)
        return self._calls.fetch(self._calls.call(method, [references] * self._calls.owners))

    def _cut_queries(self, queries: Float32, nprobe: int, returned: int) -> list[Float32]:
        """Cut queries so that what a step sends and returns stays within its bytes.

        Args:
            queries: (n, dim).
            nprobe: lists visited per query.
            returned: bytes that each owner returns per query.
        """
        visited = min(nprobe, self._lists)
        per_owner = queries.shape[1] * _NUMBER_BYTES + visited * _CHOICE_BYTES + returned
        size = max(1, self._step_bytes // (per_owner * self._calls.owners))
        return [queries[at : at + size] for at in range(0, len(queries), size)]

    def _scan(self, queries: Float32, count: int, nprobe: int) -> _OwnersScan:
        """Scan on all owners."""
        # Each owner chooses the lists of some queries. They go from owner to owner, not through this process.
        pieces = [piece for piece in np.array_split(queries, self._calls.owners) if len(piece)]
        choices = self._calls.call("choose_lists", [(piece, nprobe) for piece in pieces])
        sent = self._calls.put(queries)
        steps = self._calls.call_scan([(sent, count, *choices)] * self._calls.owners)
        distances = np.concatenate(self._calls.fetch([step.distances for step in steps]), axis=1)
        cut = find_cut(distances, count)
        candidates = (distances < (cut.last - np.float32(self._tie))[:, None]).sum(axis=1)
        return _OwnersScan(sent, steps, cut, candidates)

    def _run_nearest(self, queries: Float32, count: int, nprobe: int, k: int) -> NearestRound:
        scan = self._scan(queries, count, nprobe)
        cut = self._calls.put(scan.cut)
        taken = self._calls.call("take_nearest", [(scan.queries, step.kept, cut, k) for step in scan.steps])
        hits = Hits.create_empty(len(queries), k)
        for part in self._calls.fetch(taken):
            hits = merge_hits(hits, part, k)
        return NearestRound(hits.ids, hits.distances, scan.candidates, scan.cut.complete)

    def _run_within(self, queries: Float32, count: int, nprobe: int, radius: float, max_faces: int) -> RadiusRound:
        scan = self._scan(queries, count, nprobe)
        cut = self._calls.put(scan.cut)
        arguments = [(scan.queries, step.kept, cut, radius, max_faces) for step in scan.steps]
        taken: list[WithinStep] = self._calls.fetch(self._calls.call("take_within", arguments))
        pairs = FoundPairs.concatenate([part.pairs for part in taken]).keep_nearest(max_faces)
        inside = np.sum([part.inside for part in taken], axis=0)
        return RadiusRound(pairs.to_answers(len(queries)), inside, scan.candidates, scan.cut.complete)


def _to_pairs(answers: list[Answer]) -> FoundPairs:
    """Put answers one below the other."""
    return FoundPairs(
        np.repeat(np.arange(len(answers)), [len(ids) for ids, _ in answers]),
        np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in answers)]),
        np.concatenate([np.empty(0, np.float32), *(distances for _, distances in answers)]),
    )


def _find_newest(ages: list[Int32], count: int) -> Int64:
    """Find the owner (n,) with the newest shard that holds each face; -1 if none does."""
    if not ages:
        return np.full(count, -1, np.int64)
    stacked = np.stack(ages)
    newest = np.argmax(stacked, axis=0)
    return np.where(stacked.max(axis=0) >= 0, newest, -1)
