"""The index: answers that do not depend on the split, the batch or the order; erasing; damage; hostile vectors."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.config import build
from facepipe.errors import ConfigError, IndexingError
from facepipe.gallery import Gallery
from facepipe.index import manifest, samples
from facepipe.index.compact import plan_full_merge, plan_merges
from facepipe.index.exact import read_live_blocks, scan_index, search_exactly
from facepipe.index.grid import round_to_grid
from facepipe.index.manifest import FileDigest, ShardEntry
from facepipe.index.plan import make_plan, parse_size
from facepipe.index.search import Index, SearchSetting
from facepipe.models.runtime.device import count_gpus
from facepipe.nearest.distances import Hits, find_smallest
from facepipe.schema import FACES
from pipelines.index import IndexConfig, run

CUDA = pytest.mark.skipif(not count_gpus(), reason="no CUDA device")
FACTORY = "IVF64,PQ64x4fs"
COUNT = 6000
NARROW = SearchSetting(6, 100)  # far from exhaustive: which lists are visited and which codes win decides the answers
ALL = SearchSetting(64, COUNT + 1)


def fill(path: Path, tables: list[pa.Table]) -> Gallery:
    gallery = Gallery.create(str(path), CONTRACT)
    append(gallery, tables, "first")
    return Gallery(str(path))


def tables(count: int = COUNT, size: int = 125, **kwargs: Any) -> list[pa.Table]:
    faces = Faces(**kwargs)
    table = pa.concat_tables(rows(i, v, n) for n, i, v in _numbered(faces, count))
    return [table.slice(at, size) for at in range(0, count, size)]


def _numbered(faces: Faces, count: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    done, out = 0, []
    for identities, vectors in faces.blocks(count):
        out.append((done, identities, vectors))
        done += len(vectors)
    return out


def make(
    gallery: Gallery | Path, *, retrain: bool = False, compact: bool = False, repair: bool = False, **index: Any
) -> Any:
    path = gallery.path if isinstance(gallery, Gallery) else str(gallery)
    config = build(IndexConfig, {"index": {"factory": FACTORY, **index}})
    return run(config, path, retrain=retrain, compact_all=compact, repair=repair)


def queries(n: int = 300, stream: int = 10**9) -> np.ndarray:
    return Faces().draw(np.arange(n), stream)


def same(a: Hits, b: Hits) -> None:
    assert np.array_equal(a.ids, b.ids)
    assert np.array_equal(a.distances, b.distances)


def brute(
    gallery: Gallery, asked: np.ndarray, k: int = 10, without: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    ids, vectors = gallery.vectors()
    if without is not None:
        keep = ~np.isin(ids, without)
        ids, vectors = ids[keep], vectors[keep]
    distances = np.sqrt(((asked[:, None].astype(np.float64) - vectors[None]) ** 2).sum(-1))
    order = np.lexsort((np.broadcast_to(ids, distances.shape), distances))[:, :k]
    return ids[order], np.take_along_axis(distances, order, axis=1)


@pytest.fixture(scope="module")
def data() -> list[pa.Table]:
    return tables()


@pytest.fixture(scope="module")
def filled(data: list[pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """A gallery without an index, for tests to copy: its 48 commits take longer than most of them."""
    return fill(tmp_path_factory.mktemp("filled") / "g", data)


def copy(gallery: Gallery, path: Path) -> Gallery:
    shutil.copytree(gallery.path, path)
    return Gallery(str(path))


@pytest.fixture(scope="module")
def gallery(filled: Gallery, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    found = copy(filled, tmp_path_factory.mktemp("index") / "g")
    make(found)
    return found


def erase(gallery: Gallery, dead: np.ndarray) -> None:
    """Rewrite the table's files without these ids, as one commit."""
    import time

    from deltalake import DeltaTable
    from deltalake.transaction import AddAction, RemoveAction

    from facepipe.gallery.commits.parts import compute_statistics, encode_parquet
    from facepipe.hashing import compute_image_id

    table, actions = DeltaTable(gallery.faces_folder), []
    for n, file in enumerate(Gallery(gallery.path).files()):
        held = pa.parquet.read_table(f"{gallery.faces_folder}/{file['path']}").cast(FACES)
        kept = held.filter(pa.array(~np.isin(held["face_id"].to_numpy(), dead)))
        if kept.num_rows == held.num_rows:
            continue
        actions.append(RemoveAction(file["path"], True, int(time.time() * 1000)))
        if kept.num_rows:
            bytes_ = encode_parquet(kept)
            name = f"part-erased-{n:06d}-{compute_image_id(bytes_)}.parquet"
            Path(gallery.faces_folder, name).write_bytes(bytes_)
            actions.append(AddAction(name, len(bytes_), {}, int(time.time() * 1000), True, compute_statistics(kept)))
    table.create_write_transaction(actions, "append", table.schema())


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_grid_makes_distances_exact(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, n, 128), np.float32)
    x, y = (round_to_grid(v / np.linalg.norm(v, axis=1, keepdims=True)) for v in (x, y))
    exact = x.astype(np.float64) @ y.T.astype(np.float64)
    assert np.array_equal(x @ y.T, exact)
    assert np.array_equal(np.stack([x[::-1] @ row for row in y], 1)[::-1], exact)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_smallest_is_a_stable_sort(w: int, k: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 8, (5, w)).astype(np.float32)
    values[0, 0] = np.inf
    assert np.array_equal(find_smallest(values, k), np.argsort(values, axis=1, kind="stable")[:, :k])


def test_answers_do_not_depend_on_batch_or_threads(gallery: Gallery) -> None:
    index, asked = Index(gallery.path), queries()
    whole = index.search(asked, 10, NARROW)
    for size in (1, 7, 40, 299):
        parts = [index.search(asked[at : at + size], 10, NARROW) for at in range(0, len(asked), size)]
        same(whole, Hits(np.concatenate([p.ids for p in parts]), np.concatenate([p.distances for p in parts])))
    same(whole, Index(gallery.path, threads=1).search(asked, 10, NARROW))


def test_answers_do_not_depend_on_the_split(filled: Gallery, tmp_path: Path) -> None:
    """1, 4 and 16 shards; before and after compaction; after a tenth was erased; merged in memory."""
    asked, answers, erased = queries(), [], []
    for shards in (1, 4, 16):
        found = copy(filled, tmp_path / str(shards))
        assert make(found, shard_vectors=COUNT // shards).shards == shards
        index = Index(found.path)
        answers.append(index.search(asked, 10, NARROW))
        same(answers[-1], Index(found.path, merge=True).search(asked, 10, NARROW))
        ids = np.sort(found.vectors()[0])
        dead = ids[np.random.default_rng(1).permutation(len(ids))[: COUNT // 10]]
        erase(found, dead)
        done = make(found, shard_vectors=COUNT // shards, max_dead=1.0)
        assert (done.added, done.removed, done.dead, done.vectors) == (0, COUNT // 10, COUNT // 10, COUNT - COUNT // 10)
        after = Index(found.path).search(asked, 10, NARROW)
        assert not np.isin(after.ids, dead).any()
        assert (after.ids >= 0).all(), "k stays k"
        same(after, Index(found.path, merge=True).search(asked, 10, NARROW))
        erased.append(after)
        compacted = make(found, compact=True)
        assert (compacted.shards, compacted.dead) == (1, 0)
        same(after, Index(found.path).search(asked, 10, NARROW))
    for answer, later in zip(answers[1:], erased[1:], strict=True):
        same(answers[0], answer)
        same(erased[0], later)


@pytest.mark.parametrize("factory", ["Flat", FACTORY, "IVF64,SQ8", "PCAR96,IVF64,PQ48x4fs", "IVF64_HNSW32,PQ64x4fs"])
def test_everything_visited_is_exact(factory: str, filled: Gallery, tmp_path: Path) -> None:
    found = copy(filled, tmp_path / "g")
    make(found, factory=factory, shard_vectors=2000)
    hits = Index(found.path).search(queries(50), 10, ALL)
    ids, distances = brute(found, queries(50))
    assert (hits.ids == ids).mean() > 0.999, "equal but for near ties"
    assert np.abs(hits.distances - distances).max() < 1e-5


def test_shards_open_with_stock_faiss(gallery: Gallery) -> None:
    import faiss

    entry = manifest.load(gallery.path).shards[0]
    index = faiss.read_index(f"{gallery.path}/index/{entry.name}/index.faiss")
    index.nprobe = 64
    ids = index.search(queries(20), 10)[1]
    assert index.ntotal == COUNT
    assert np.isin(ids, gallery.vectors()[0]).all()
    vectors = np.load(f"{gallery.path}/index/{entry.name}/vectors.npy", mmap_mode="r")
    assert vectors.shape == (COUNT, 128)


def test_more_copies_than_candidates(tmp_path: Path) -> None:
    """A picture that a corpus holds 700 times: the answer is the copies with the smallest ids, however it is split."""
    identities, vectors = next(iter(Faces().blocks(2000)))
    vectors[100:800] = vectors[100]
    table, answers = rows(identities, vectors, 0), []
    for shards in (1, 5):
        found = fill(tmp_path / str(shards), [table.slice(at, 100) for at in range(0, 2000, 100)])
        make(found, shard_vectors=2000 // shards)
        answers.append(Index(found.path).search(vectors[90:110], 10, NARROW))
    same(*answers)
    copies = np.sort(table["face_id"].to_numpy()[100:800])
    assert np.array_equal(answers[0].ids[15], copies[:10])
    assert not answers[0].distances[15].any()


def test_radius_is_complete(gallery: Gallery) -> None:
    asked = queries(40)
    ids, distances = brute(gallery, asked, COUNT)
    for radius in (0.25, 0.4):
        found = Index(gallery.path).search_within(asked, radius, setting=SearchSetting(64, 100))
        for n, (near, far) in enumerate(found):
            inside = distances[n] <= radius
            assert set(near) == set(ids[n][inside])
            assert (np.diff(far) >= 0).all()
    assert len(Index(gallery.path).search_within(asked, 2.0, max_faces=5, setting=SearchSetting(64, 100))[0][0]) == 5


def test_labels_and_vectors(gallery: Gallery) -> None:
    table = gallery.to_arrow(["face_id", "uri", "identity", "embedding"])
    ids = table["face_id"].to_numpy()[::-7]
    index = Index(gallery.path)
    found = index.get_labels(np.append(ids, -1))
    assert found["uri"].to_pylist() == [*table["uri"].to_pylist()[::-7], None]
    assert found["identity"].to_pylist()[:-1] == table["identity"].to_pylist()[::-7]
    assert np.array_equal(index.get_vectors(ids), gallery.vectors()[1][::-7])


def test_recall_that_was_asked_for(gallery: Gallery) -> None:
    found = manifest.load(gallery.path)
    index = Index(gallery.path)
    sample = samples.draw_sample(index, seed=5)
    for asked in (0.9, 0.97):
        setting = SearchSetting(*found.choose_setting(asked))
        at_10 = samples.compute_recall(
            index.search(sample.queries, 11, setting).exclude_own(sample.own, 10).ids, sample.truth
        )
        assert at_10.mean() >= asked - 0.01
    assert found.nprobe == found.choose_setting(found.recall)[0]


@pytest.mark.parametrize("device", ["cpu:0", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])])
def test_a_scan_on_a_device_equals_the_exact_one(device: str, gallery: Gallery) -> None:
    """`cpu:0` is torch's CPU: what runs on a GPU, on tensors here."""
    asked, index = queries(64), Index(gallery.path)
    expected = search_exactly(asked, read_live_blocks(index), 10)
    same(Hits(expected.ids, expected.distances), search_exactly(asked, read_live_blocks(index, 700), 10))
    same(expected, search_exactly(asked, read_live_blocks(index, 1000), 10, device))
    same(expected, scan_index(index, asked, 10, device))


# --- plans -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 300_000_000), st.sampled_from(["600MiB", "4GiB", "64GiB"]))
@settings(max_examples=60, deadline=None)
def test_plans_keep_to_their_budget(vectors: int, memory: str) -> None:
    budget = parse_size(memory)
    plan = make_plan(vectors, budget, 200 << 20)
    assert plan.memory <= budget
    assert plan.lists <= max(1, vectors)
    assert (plan.lists == 0) == (vectors < 50_000)


def test_a_budget_that_is_too_small_names_the_smallest() -> None:
    with pytest.raises(ConfigError, match="smallest budget that works is") as error:
        make_plan(10_000_000, 100 << 20, 90 << 20)
    smallest_ = parse_size(str(error.value).rsplit(" is ", 1)[1])
    assert make_plan(10_000_000, int(smallest_ * 1.01), 90 << 20).memory <= smallest_ * 1.01


@pytest.mark.parametrize("text", ["", "4", "4GiB", "1.5 gb", "512M"])
def test_sizes(text: str) -> None:
    if not text:
        with pytest.raises(ConfigError, match="write 512MiB"):
            parse_size("plenty")
    else:
        assert parse_size(text) > 0


@pytest.mark.parametrize("factory", ["HNSW32", "IVF", "nonsense", "PQ64"])
def test_factories_that_cannot_be_used(factory: str, gallery: Gallery) -> None:
    with pytest.raises(ConfigError, match="factory"):
        make(gallery, factory=factory, retrain=True)


def entry(name: str, vectors: int, dead: int = 0) -> ShardEntry:
    return ShardEntry(name, vectors, {"f": FileDigest(1, "")}, dead)


def test_shards_are_merged_in_tiers() -> None:
    shards: list[ShardEntry] = [entry("base", 100_000)]
    copied = 0
    for night in range(200):
        shards.append(entry(f"n{night}", 1000))
        for group in plan_merges(shards, 10**9, 0.2):
            at, total = shards.index(group[0]), sum(e.live for e in group)
            copied += total
            shards = [e for e in shards if e not in group]
            shards.insert(at, entry(f"m{night}", total))
        assert len(shards) <= 10
    assert sum(e.live for e in shards) == 300_000
    assert copied < 10 * 200_000 + 400_000
    assert plan_merges([entry("a", 1000, dead=300), entry("b", 10)], 10**6, 0.2) == [[entry("a", 1000, dead=300)]]
    assert plan_full_merge([entry("a", 6), entry("b", 6, 1), entry("c", 2)], 11) == [[entry("a", 6), entry("b", 6, 1)]]


# --- odd galleries and queries ------------------------------------------------------------------------------------------


def test_no_faces_and_one_face(tmp_path: Path) -> None:
    empty = Gallery.create(str(tmp_path / "empty"), CONTRACT)
    assert make(empty, factory=None).vectors == 0
    hits = Index(empty.path).search(queries(3), 10)
    assert (hits.ids == -1).all()
    one = fill(tmp_path / "one", tables(1, 1))
    assert make(one, factory=None).factory == "IDMap2,Flat"
    hits = Index(one.path).search(queries(3), 10)
    assert hits.ids.shape == (3, 1)
    assert (hits.ids == one.vectors()[0]).all()


def test_fewer_vectors_than_lists(tmp_path: Path) -> None:
    few = fill(tmp_path / "few", tables(40, 10))
    with pytest.raises(ConfigError, match="64 lists and needs as many vectors"):
        make(few)


def test_more_neighbours_than_faces(gallery: Gallery) -> None:
    hits = Index(gallery.path).search(queries(2), COUNT + 50, SearchSetting(2, 100))
    assert hits.ids.shape == (2, COUNT)
    assert all(len(set(row)) == COUNT for row in hits.ids.tolist())


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 128)), np.full((2, 128), np.nan), np.zeros((2, 64)), np.ones((2, 128)), np.zeros(128)]
)
def test_queries_that_are_no_unit_vectors(bad: np.ndarray, gallery: Gallery) -> None:
    with pytest.raises(ConfigError, match="queries"):
        Index(gallery.path).search(bad.astype(np.float32))


def test_vectors_that_cannot_be_searched_are_left_out_and_counted(tmp_path: Path) -> None:
    identities, vectors = next(iter(Faces().blocks(200)))
    vectors[3], vectors[5], vectors[7, 0] = np.nan, 0, np.inf
    found = fill(tmp_path / "g", [rows(identities, vectors, 0)])
    done = make(found, factory=None)
    assert (done.unusable, done.vectors) == (3, 197)


def test_no_index(tmp_path: Path, data: list[pa.Table]) -> None:
    found = fill(tmp_path / "g", data[:1])
    with pytest.raises(IndexingError, match="facepipe index"):
        Index(found.path)
    Path(found.path, "index").mkdir()
    Path(found.path, "index", "manifest.json").write_text("{")
    with pytest.raises(IndexingError, match="--retrain"):
        Index(found.path)
