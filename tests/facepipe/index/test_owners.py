"""Search on owners: the answers of one process, to the bit, however the shards are divided."""

import pickle
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.config import build
from facepipe.errors import ConfigError
from facepipe.gallery import Gallery
from facepipe.index import manifest as manifests
from facepipe.index.answers import SearchOptions, answer_queries
from facepipe.index.exact import scan_index, scan_within
from facepipe.index.manifest import FileDigest, Manifest, ShardEntry, Template
from facepipe.index.owners import OwnedShard, OwnedShards, OwnerShare, ScanStep, ShardOwner
from facepipe.index.placement import NodeRoom, PlacedSearch, choose_placement, count_bytes, divide_shards
from facepipe.index.queries import QueryBlock, open_queries, read_block
from facepipe.index.search import Index, SearchSetting
from facepipe.nearest.distances import Hits
from facepipe.types import Float32
from pipelines.index import IndexConfig, run

COUNT = 900
FACTORIES = ["Flat", "IVF32,PQ64x4fs", "IVF32,SQ8"]
NARROW = SearchSetting(3, 40)  # far from exhaustive: which lists are visited and which codes win decides the answers


class NearbyCalls:
    """Owners in this process. Arguments and results are encoded, as if they were sent."""

    def __init__(self, gallery: str, manifest: Manifest, owners: int):
        shards = [OwnedShard(entry, age) for age, entry in enumerate(manifest.shards)]
        shares = [tuple(shards[n::owners]) for n in range(owners)]
        self._owners = [ShardOwner(OwnerShare(gallery, share, 2)) for share in shares if share]
        self.sent = 0

    @property
    def owners(self) -> int:
        return len(self._owners)

    def put(self, value: Any) -> Any:
        return self._send(value)

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        owners = self._owners[: len(arguments)]
        return [getattr(owner, method)(*self._send(one)) for owner, one in zip(owners, arguments, strict=True)]

    def call_scan(self, arguments: Sequence[tuple[Any, ...]]) -> list[ScanStep]:
        return self.call("scan_lists", arguments)

    def fetch(self, references: Sequence[Any]) -> list[Any]:
        return [self._send(reference) for reference in references]

    def _send(self, value: Any) -> Any:
        data = pickle.dumps(value)
        self.sent = max(self.sent, len(data))
        return pickle.loads(data)


def open_owned(gallery: str, owners: int, step_bytes: int = 1 << 20, **options: Any) -> Index:
    def open_elsewhere(manifest: Manifest) -> OwnedShards:
        return OwnedShards(NearbyCalls(gallery, manifest, owners), step_bytes)

    return Index(gallery, open_elsewhere=open_elsewhere, **options)


def draw(n: int, stream: int = 10**9) -> Float32:
    return Faces().draw(np.arange(n), stream)


def same(a: Hits, b: Hits) -> None:
    assert np.array_equal(a.ids, b.ids)
    assert np.array_equal(a.distances, b.distances)


def same_answers(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b)
    for (ids, distances), (other_ids, other_distances) in zip(a, b, strict=True):
        assert np.array_equal(ids, other_ids)
        assert np.array_equal(distances, other_distances)


@pytest.fixture(scope="module")
def galleries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One gallery per factory: seven shards and the tombstones of faces that are deleted."""
    root = tmp_path_factory.mktemp("owners")
    identities, vectors = next(iter(Faces().blocks(COUNT)))
    # Every tenth face has a copy, so that distances tie.
    vectors[5::10] = vectors[4::10]
    table = rows(identities, vectors, 0)
    append(Gallery.create(str(root / "g"), CONTRACT), [table.slice(at, 65) for at in range(0, COUNT, 65)], "first")
    paths = {}
    for factory in FACTORIES:
        path = root / factory
        shutil.copytree(root / "g", path)
        run(build(IndexConfig, {"index": {"factory": factory, "shard_vectors": 130}}), str(path))
        tombstone(str(path), table["face_id"].to_numpy()[7::11])
        paths[factory] = str(path)
    return paths


def tombstone(gallery: str, ids: np.ndarray) -> None:
    """Tombstone faces in the index alone."""
    from facepipe.index.shard import Shard, write_tombstones
    from facepipe.storage import conditional

    store = manifests.open_index_store(gallery)
    manifest, tag = manifests.load_tagged(gallery)
    entries = tuple(
        write_tombstones(store, entry, ids[Shard(store, entry).find_rows(ids)[0]]) for entry in manifest.shards
    )
    conditional.write_if(manifests.get_path(gallery), manifests.encode(replace(manifest, shards=entries)), tag)


@pytest.mark.parametrize("factory", FACTORIES)
@given(
    owners=st.sampled_from([1, 2, 4, 7]),
    count=st.integers(0, 40),
    k=st.sampled_from([1, 3, 10, 100, 2 * COUNT]),
    radius=st.floats(0.05, 1.2),
    most=st.sampled_from([1, 7, 1000]),
    hidden=st.integers(0, 100),
    step_bytes=st.sampled_from([1, 50_000, 1 << 20]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=8, deadline=None)
def test_answers_are_those_of_one_process(
    factory: str,
    galleries: dict[str, str],
    owners: int,
    count: int,
    k: int,
    radius: float,
    most: int,
    hidden: int,
    step_bytes: int,
    seed: int,
) -> None:
    gallery = galleries[factory]
    here, there = Index(gallery, threads=2, merge=bool(seed % 2)), open_owned(gallery, owners, step_bytes)
    ids, vectors = Gallery(gallery).vectors()
    # Some queries are faces of the gallery, with copies at distance 0.
    own = vectors[np.random.default_rng(seed).integers(0, len(vectors), count // 2)]
    queries = np.concatenate([own, draw(count - len(own), 10**6 + seed)])
    excluded = np.sort(np.random.default_rng(seed).choice(ids, hidden, replace=False))
    for index in (here, there):
        index._exclude(excluded)
    assert (here.live, here.lists) == (there.live, there.lists)
    for setting in (NARROW, None):
        same(here.search(queries, k, setting), there.search(queries, k, setting))
        same_answers(
            here.search_within(queries, radius, most, setting), there.search_within(queries, radius, most, setting)
        )
    same(scan_index(here, queries, k), scan_index(there, queries, k))
    same_answers(scan_within(here, queries, radius, most), scan_within(there, queries, radius, most))
    some = np.concatenate([ids[::40], [-1, 12345], excluded[:5]])
    assert here.get_labels(some).equals(there.get_labels(some))
    assert np.array_equal(here.get_vectors(some), there.get_vectors(some))


@pytest.mark.parametrize("options", [{}, {"k": 3, "threshold": 0.4}, {"radius": 0.4, "most": 5}, {"decide": "vote"}])
@pytest.mark.parametrize("is_exact", [False, True])
def test_tables_of_answers_are_the_same(options: dict[str, Any], is_exact: bool, galleries: dict[str, str]) -> None:
    gallery = galleries["IVF32,PQ64x4fs"]
    source = open_queries(gallery, Gallery(gallery).contract)
    assert source is not None
    block: QueryBlock = next(iter(source.cut_blocks(300)))
    find = SearchOptions(leave_self_out=True, **{"threshold": 0.3, **options})
    device = "cpu" if is_exact else None
    tables = [
        answer_queries(index, read_block(block, 128), find, device)
        for index in (Index(gallery), *(open_owned(gallery, owners) for owners in (1, 3)))
    ]
    for table, counts in tables[1:]:
        assert table.equals(tables[0][0])
        assert counts == tables[0][1]


def test_what_travels_at_a_time_is_bounded(galleries: dict[str, str]) -> None:
    gallery = galleries["IVF32,PQ64x4fs"]
    made: list[NearbyCalls] = []

    def open_elsewhere(manifest: Manifest) -> OwnedShards:
        made.append(NearbyCalls(gallery, manifest, 4))
        return OwnedShards(made[-1], 200_000)

    index = Index(gallery, open_elsewhere=open_elsewhere)
    made[-1].sent = 0
    index.search(draw(2000), 10)
    assert made[-1].sent < 200_000


def test_an_empty_index(tmp_path: Path) -> None:
    gallery = str(tmp_path / "g")
    Gallery.create(gallery, CONTRACT)
    run(IndexConfig(), gallery)
    here, there = Index(gallery), open_owned(gallery, 3)
    same(here.search(draw(4)), there.search(draw(4)))
    same(scan_index(here, draw(4), 3), scan_index(there, draw(4), 3))
    same_answers(here.search_within(draw(4), 0.5), there.search_within(draw(4), 0.5))
    same_answers(scan_within(here, draw(4), 0.5), scan_within(there, draw(4), 0.5))
    assert here.get_labels(np.array([1, -1])).equals(there.get_labels(np.array([1, -1])))
    assert there.live == 0


def test_what_needs_the_shards_here_says_so(galleries: dict[str, str]) -> None:
    index = open_owned(galleries["Flat"], 2)
    with pytest.raises(ConfigError, match="open it here"):
        index.count_per_list()
    with pytest.raises(ConfigError, match=r"run\.placement=copies"):
        scan_index(index, draw(2), 3, "cuda")


def test_an_id_in_two_shards_has_one_label(galleries: dict[str, str]) -> None:
    gallery = galleries["Flat"]
    first = manifests.load(gallery).shards[0]
    calls = NearbyCalls(gallery, replace(manifests.load(gallery), shards=(first, first)), 2)
    ids = Gallery(gallery).vectors()[0]
    held = ids[calls._owners[0].find_labels(ids).age == 0]
    assert len(held) == calls._owners[1].find_labels(ids).labels.num_rows > 100
    assert OwnedShards(calls).read_labels(held).equals(Index(gallery).get_labels(held))
    assert np.array_equal(OwnedShards(calls).read_vectors(held, 128), Index(gallery).get_vectors(held))


def entry(name: str, size: int) -> ShardEntry:
    return ShardEntry(name, size, {"index.faiss": FileDigest(size, ""), "vectors.npy": FileDigest(12 * size, "")})


@given(st.lists(st.integers(1, 1000), max_size=30), st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_every_shard_has_one_owner(sizes: list[int], memories: list[int]) -> None:
    shards = [OwnedShard(entry(f"shard-{n}", size), n) for n, size in enumerate(sizes)]
    rooms = [NodeRoom(str(n), memory << 30, 2) for n, memory in enumerate(memories)]
    shares = divide_shards(shards, rooms)
    assert sorted((one for share in shares for one in share), key=lambda one: one.age) == shards
    assert all([one.age for one in share] == sorted(one.age for one in share) for share in shares)
    # Rooms are about equally full: what one holds beyond its part is less than its part of a shard per room.
    largest = max((count_bytes(one.entry) for one in shards), default=0)
    total = sum(count_bytes(one.entry) for one in shards)
    for share, room in zip(shares, rooms, strict=True):
        part = room.memory / sum(other.memory for other in rooms)
        assert sum(count_bytes(one.entry) for one in share) <= part * (total + len(rooms) * largest) + 1
    assert divide_shards(reversed(shards), rooms) == shares


def test_the_planner_goes_by_bytes_memory_and_queries() -> None:
    template = Template("t", FileDigest(1, ""), "IVF1024,PQ64x4fs", 1024, 1, 1, 1.0, 0)
    shards = tuple(entry(f"shard-{n}", 1 << 28) for n in range(8))  # 26 GiB in all
    manifest = Manifest(0, {}, template, shards, 0.97, nprobe=64)
    search = PlacedSearch(queries=1000, nprobe=64, rescore=200, worker_cpus=2, is_remote=False)

    def choose(gib: int, nodes: int = 4, manifest: Manifest = manifest, **changes: Any) -> str:
        rooms = [NodeRoom(str(n), gib << 30, 16) for n in range(nodes)]
        chosen = choose_placement(manifest, rooms, replace(search, **changes))
        assert chosen.reason
        return chosen.placement

    assert choose(16) == choose(48) == "owners"
    assert choose(256) == "copies"
    assert choose(16, nodes=1) == choose(1, manifest=replace(manifest, shards=shards[:1])) == "copies"
    # In an object store every node would fetch all of it, which pays for many queries only.
    assert choose(256, is_remote=True) == "owners"
    assert choose(256, is_remote=True, queries=1_000_000_000) == "copies"


def test_an_owner_fetches_its_share_once(bucket: Any, galleries: dict[str, str], tmp_path: Path) -> None:
    """From an object store: the files of its own shards and no others, all of them, before it answers."""
    remote = "s3://faces/g"
    local = galleries["IVF32,PQ64x4fs"]
    for path in Path(local).rglob("*"):
        if path.is_file():
            bucket.upload_file(str(path), "faces", f"g/{path.relative_to(local)}")
    manifest = manifests.load(remote)
    mine = OwnedShard(manifest.shards[2], 2)
    owner = ShardOwner(OwnerShare(remote, (mine,), 1))
    cached = {str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*.*") if path.is_file()}
    shards = {name.split("/")[-2] for name in cached if "/shard-" in name}
    assert shards == {mine.entry.name}
    assert len([name for name in cached if "/shard-" in name]) == len(mine.entry.files)
    # What it has open can be read if others delete it.
    for entry in bucket.list_objects_v2(Bucket="faces", Prefix="g/index/shard-")["Contents"]:
        bucket.delete_object(Bucket="faces", Key=entry["Key"])
    ids = Gallery(local).vectors()[0]
    assert owner.find_labels(ids).labels.num_rows == manifest.shards[2].vectors
