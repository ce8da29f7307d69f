"""Index runs: night after night, damaged, out of disk, and killed at random moments."""

import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction
from helpers import trials

from facepipe.config import build
from facepipe.errors import ConfigError, GalleryBusyError, IndexingError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.parts import compute_statistics, encode_parquet
from facepipe.index import manifest
from facepipe.index.search import Index, SearchSetting
from facepipe.index.verify import verify_index
from facepipe.schema import FACES
from facepipe.storage.lease import hold_lease
from pipelines.index import IndexConfig, run

TRIALS = trials(12)
COUNT = 5000
EXACT = SearchSetting(64, 2 * COUNT)
SETTINGS = {"index": {"factory": "IVF64,PQ64x4fs", "shard_vectors": 1000}}


def make(gallery: Gallery, *layers: dict[str, Any], **kwargs: Any) -> Any:
    return run(build(IndexConfig, SETTINGS, *layers), gallery.path, **kwargs)


def faces(count: int, first: int = 0, seed: int = 0) -> pa.Table:
    found = [rows(i, v, first + 50_000 * n) for n, (i, v) in enumerate(Faces(seed=seed).blocks(count))]
    return pa.concat_tables(found)


def cut(table: pa.Table, size: int = 250) -> list[pa.Table]:
    return [table.slice(at, size) for at in range(0, table.num_rows, size)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of 5,000 faces with an index of 5 shards."""
    path = tmp_path_factory.mktemp("base") / "g"
    append(Gallery.create(str(path), CONTRACT), cut(faces(COUNT)), "base")
    assert make(Gallery(str(path))).shards == 5
    return path


@pytest.fixture
def gallery(base: Path, tmp_path: Path) -> Gallery:
    shutil.copytree(base, tmp_path / "g")
    return Gallery(str(tmp_path / "g"))


def replace(gallery: Gallery, change: Any, files: int | None = None, data_change: bool = True) -> None:
    """Rewrite table files through a function of their rows, in one commit."""
    table, actions = DeltaTable(gallery.faces_folder), []
    now = int(time.time() * 1000)
    for n, file in enumerate(sorted(Gallery(gallery.path).files(), key=lambda f: f["path"])[:files]):
        kept = change(pq.read_table(f"{gallery.faces_folder}/{file['path']}").cast(FACES))
        actions.append(RemoveAction(file["path"], data_change, now))
        if kept.num_rows:
            data = encode_parquet(kept)
            name = f"rewritten-{time.time_ns()}-{n}.parquet"
            Path(gallery.faces_folder, name).write_bytes(data)
            actions.append(AddAction(name, len(data), {}, now, data_change, compute_statistics(kept)))
    table.create_write_transaction(actions, "append", table.schema())


def answers(gallery: Gallery, asked: np.ndarray) -> np.ndarray:
    return Index(gallery.path).search(asked, 10, EXACT).ids


def truth(gallery: Gallery, asked: np.ndarray) -> np.ndarray:
    ids, vectors = gallery.vectors()
    distances = ((asked[:, None] - vectors[None]) ** 2).sum(-1)
    return ids[np.argsort(distances, axis=1)[:, :10]]


ASKED = Faces().draw(np.arange(60), 10**9)


def sound(gallery: Gallery) -> None:
    """The index answers for exactly what the table holds."""
    fresh = Gallery(gallery.path)
    assert verify_index(fresh) == []
    assert manifest.load(gallery.path).live == len(fresh.vectors()[0])
    assert (answers(fresh, ASKED) == truth(fresh, ASKED)).mean() > 0.999


# --- nights ------------------------------------------------------------------------------------------------------------


def test_nothing_new_writes_nothing(gallery: Gallery) -> None:
    before = (Path(gallery.path) / "index" / "manifest.json").read_bytes()
    shards = manifest.load(gallery.path).shards
    done = make(gallery)
    assert (done.action, done.added, done.removed) == ("unchanged", 0, 0)
    assert manifest.load(gallery.path).shards == shards
    assert len(before) > 0


def test_new_faces_are_added_and_gone_ones_buried(gallery: Gallery) -> None:
    append(gallery, cut(faces(700, 10**6, seed=5)), "night")
    replace(gallery, lambda table: table.slice(40), files=3)
    done = make(gallery)
    assert (done.action, done.added, done.removed) == ("updated", 700, 120)
    sound(gallery)


def test_many_nights_equal_one_build(gallery: Gallery) -> None:
    for night in range(6):
        append(gallery, cut(faces(150, 10**6 + 1000 * night, seed=10 + night)), f"night{night}")
        replace(gallery, lambda table: table.slice(7), files=2)
        done = make(gallery)
        assert (done.added, done.removed) == (150, 14)
        sound(gallery)
    assert done.shards <= 8
    assert make(gallery, compact_all=True).dead == 0
    sound(gallery)


def test_moved_faces_are_not_indexed_again(gallery: Gallery) -> None:
    """A compaction of the table rewrites every file and changes no row."""
    before = manifest.load(gallery.path)
    DeltaTable(gallery.faces_folder).optimize.compact()
    assert len(Gallery(gallery.path).files()) == 1
    done = make(Gallery(gallery.path))
    after = manifest.load(gallery.path)
    assert (done.added, done.removed, after.shards) == (0, 0, before.shards)
    assert after.table_version > before.table_version
    sound(gallery)
    replace(gallery, lambda table: table.slice(100))
    assert (make(gallery).removed, make(gallery).removed) == (100, 0)
    sound(gallery)


def test_vacuumed_files_are_compared_id_by_id(gallery: Gallery) -> None:
    replace(gallery, lambda table: table.slice(10), files=4)
    DeltaTable(gallery.faces_folder).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    append(gallery, cut(faces(90, 10**6, seed=3)), "night")
    done = make(gallery)
    assert (done.added, done.removed) == (90, 40)
    sound(gallery)


def test_what_comes_back_leaves_the_tombstones(gallery: Gallery) -> None:
    held = gallery.to_arrow()
    replace(gallery, lambda table: table.slice(50), files=1)
    assert make(gallery).dead == 50
    gone = held.filter(pa.array(~np.isin(held["face_id"].to_numpy(), Gallery(gallery.path).vectors()[0])))
    append(gallery, [gone], "back")
    done = make(gallery)
    assert (done.added, done.dead, done.shards) == (0, 0, 5)
    sound(gallery)


def test_one_comes_back_while_another_goes(gallery: Gallery) -> None:
    held = gallery.to_arrow()
    replace(gallery, lambda table: table.slice(1), files=1)
    assert make(gallery).dead == 1
    back = held.filter(pa.array(~np.isin(held["face_id"].to_numpy(), Gallery(gallery.path).vectors()[0])))
    replace(gallery, lambda table: pa.concat_tables([back, table.slice(1)]), files=1)
    done = make(gallery)
    assert (done.added, done.removed, done.dead) == (0, 1, 1)
    sound(gallery)


def test_a_new_label_is_what_a_search_returns(gallery: Gallery) -> None:
    def relabel(table: pa.Table) -> pa.Table:
        n = table.schema.get_field_index("identity")
        return table.set_column(n, FACES.field(n), pa.array(["somebody else"] * table.num_rows))

    ids = gallery.to_arrow(["face_id", "uri"])
    replace(gallery, relabel, files=1)
    done = make(gallery)
    assert (done.added, done.removed) == (250, 250)
    sound(gallery)
    index = Index(gallery.path)
    labels = index.get_labels(ids["face_id"].to_numpy())["identity"].to_pylist()
    assert labels.count("somebody else") == 250
    assert Index(gallery.path, merge=True).search(ASKED, 10, EXACT).ids.tolist() == answers(gallery, ASKED).tolist()


def test_shards_full_of_dead_are_rewritten(gallery: Gallery) -> None:
    replace(gallery, lambda table: table.slice(100), files=8)
    done = make(gallery)
    assert (done.removed, done.dead) == (800, 0)
    assert done.merged == 2
    sound(gallery)


def test_all_faces_go(gallery: Gallery) -> None:
    replace(gallery, lambda table: table.slice(0, 0))
    done = make(gallery)
    assert (done.vectors, done.shards) == (0, 0)
    assert (answers(gallery, ASKED) == -1).all()
    append(gallery, cut(faces(300, 10**6, seed=5)), "again")
    make(gallery)
    sound(gallery)


def test_an_exact_index_that_is_outgrown_is_replanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facepipe.index.plan.MIN_INVERTED_VECTORS", 1000)
    monkeypatch.setattr("facepipe.index.plan._MIN_LISTS_TO_REPLAN", 256)
    path = str(tmp_path / "g")
    append(Gallery.create(path, CONTRACT), cut(faces(500)), "first")
    assert run(IndexConfig(), path).factory == "IDMap2,Flat"
    append(Gallery(path), cut(faces(4000, 10**6, seed=2)), "second")
    done = run(IndexConfig(), path)
    assert done.action == "built"
    assert "outgrown" in done.reason
    assert done.factory.startswith("IVF")
    assert verify_index(Gallery(path)) == []


def test_what_was_asked_for_stays_asked_for(gallery: Gallery) -> None:
    with pytest.raises(ConfigError, match="--retrain"):
        make(gallery, {"index": {"factory": "Flat"}})
    assert make(gallery, {"index": {"recall": 0.9}}).action == "unchanged"
    lower = manifest.load(gallery.path)
    assert lower.recall == 0.9
    append(gallery, cut(faces(300, 10**6, seed=5)), "night")
    run(IndexConfig(), gallery.path)
    after = manifest.load(gallery.path)
    assert (after.recall, after.template.factory) == (0.9, "IVF64,PQ64x4fs")


def test_another_contract_builds_anew(gallery: Gallery) -> None:
    path = Path(gallery.path, "index", "manifest.json")
    path.write_text(path.read_text().replace('"synthetic"', '"another"', 1))
    assert make(gallery).action == "built"
    sound(gallery)


@pytest.mark.slow
def test_on_ray(gallery: Gallery) -> None:
    append(gallery, cut(faces(500, 10**6, seed=5)), "night")
    done = make(gallery, {"index": {"shard_vectors": 1500}, "run": {"runner": "ray", "cpus": 1}}, retrain=True)
    assert (done.vectors, done.shards) == (COUNT + 500, 4)
    sound(gallery)


# --- damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index.faiss", "vectors.npy", "ids.npy", "labels.arrow", ""])
@pytest.mark.parametrize("how", ["deleted", "flipped"])
def test_damage_is_named_and_only_that_shard_is_rebuilt(name: str, how: str, gallery: Gallery) -> None:
    victim = manifest.load(gallery.path).shards[2]
    path = Path(gallery.path, "index", victim.name, name)
    if how == "flipped" and name:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif name:
        path.unlink()
    else:
        shutil.rmtree(path)
    if how == "deleted" or not name:
        with pytest.raises(IndexingError, match=victim.name):
            Index(gallery.path)
    assert any(victim.name in line for line in verify_index(gallery))
    done = make(gallery, repair=True)
    assert (done.action, done.added) == ("repaired", victim.vectors)
    kept = {shard.name for shard in manifest.load(gallery.path).shards}
    assert len(kept) == 5
    assert victim.name not in kept
    sound(gallery)


def test_a_damaged_template_is_trained_again(gallery: Gallery) -> None:
    Path(gallery.path, "index", manifest.load(gallery.path).template.name).unlink()
    assert make(gallery, repair=True).action == "built"
    sound(gallery)


def test_a_second_writer_is_refused(gallery: Gallery) -> None:
    with hold_lease(os.path.join(gallery.path, "index"), "index"), pytest.raises(GalleryBusyError, match="index"):
        make(gallery)


def test_a_small_budget_says_what_would_do(gallery: Gallery) -> None:
    with pytest.raises(ConfigError, match="smallest budget that works"):
        make(gallery, {"index": {"memory": "1MiB"}}, retrain=True)
    sound(gallery)


def test_a_full_disk_leaves_the_old_index(gallery: Gallery) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    before = manifest.load(gallery.path)
    append(gallery, cut(faces(1500, 10**6, seed=5)), "night")
    words = command(gallery, "--set", "index.shard_vectors=2000")
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert manifest.load(gallery.path) == before
    assert not list(Path(gallery.path, "index").glob("*.partial"))
    assert verify_index(Gallery(gallery.path)) == []
    make(gallery)
    sound(gallery)


# --- killed --------------------------------------------------------------------------------------------------------------


def command(gallery: Gallery, *words: str) -> list[str]:
    settings = ["--set", "index.factory=IVF64,PQ64x4fs", "--set", "index.shard_vectors=1000", "--quiet"]
    return [sys.executable, "-m", "jobs.cli", "index", gallery.path, *settings, *words]


@pytest.mark.slow
@pytest.mark.parametrize("trial", TRIALS)
def test_kill(trial: int, gallery: Gallery) -> None:
    """A build, an incremental build and a compaction in turn: the index answers as before or as after, never between."""
    kind = ("build", "incremental", "compaction")[trial % 3]
    words = ["--compact"] if kind == "compaction" else []
    if kind == "build":
        shutil.rmtree(Path(gallery.path, "index"))
    old = None if kind == "build" else answers(gallery, ASKED)
    if kind == "incremental":
        append(gallery, cut(faces(1500, 10**6, seed=5)), "night")
    if kind != "build":
        replace(gallery, lambda table: table.slice(30), files=6)
        if kind == "compaction":
            make(gallery, {"index": {"max_dead": 1.0}})
            old = answers(gallery, ASKED)
    began = time.monotonic()
    process = subprocess.Popen(command(gallery, *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = Path(gallery.path, "index")
    while process.poll() is None and not _started(folder, began):
        time.sleep(0.005)
    time.sleep(random.Random(trial).uniform(0, 0.9 if kind == "build" else 0.25))
    process.kill()
    process.wait()
    fresh = Gallery(gallery.path)
    if manifest.exists(gallery.path):
        assert verify_index(fresh) == []
        now = answers(fresh, ASKED)
        new = truth(fresh, ASKED)
        assert (old is not None and np.array_equal(now, old)) or (now == new).mean() > 0.999
    else:
        assert kind == "build"
    assert subprocess.run(command(gallery, *words), capture_output=True).returncode == 0
    sound(gallery)
    left = {path.name for path in folder.iterdir()} - {"manifest.json", "manifest.json.guard", ".lock", ".lock.guard"}
    found = manifest.load(gallery.path)
    assert left == manifest.list_names_in_use(found)


def _started(folder: Path, began: float) -> bool:
    """The run has taken its lock: what it does from here on is work on the index."""
    lock = folder / ".lock"
    return lock.exists() and lock.stat().st_mtime > time.time() - (time.monotonic() - began) - 0.01
