"""erase: nothing of the erased is left in any file of the gallery, the others keep everything, no crash stops it."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import append
from browser import PROGRAM, Browser
from conftest import draw
from erasures import (
    DLIB,
    EACH,
    JANE,
    Traces,
    name_of,
    never_found,
    people,
    reported,
    sound,
    table_rows,
    traces_of,
    tree,
    uri_of,
)
from helpers import embed
from typer.testing import CliRunner

from facepipe import storage
from facepipe.config import build
from facepipe.erasure import pending, receipt
from facepipe.erasure import steps as steps_module
from facepipe.erasure.limits import ErasureLimit
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import Receipt
from facepipe.erasure.selection import Selection
from facepipe.errors import GalleryError, StorageError
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord, compute_statistics, encode_parquet
from facepipe.gallery.maintenance import compact as steps
from facepipe.gallery.maintenance.compact import CompactConfig
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.hashing import compute_image_id
from facepipe.index import manifest
from facepipe.index.search import Index
from facepipe.index.shard import write_tombstones
from facepipe.index.verify import verify_index
from facepipe.observe import doctor
from facepipe.schema import FACES, LATER, conform
from facepipe.storage.lease import hold_lease
from facepipe.storage.store import delete_copies
from jobs.cli import app
from pipelines import clean, compact, erase, index
from pipelines.cluster import assign as cluster_assign
from pipelines.cluster import pipeline as cluster
from pipelines.dedup import incremental as dedup_new
from pipelines.dedup import pipeline as dedup


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "g"
    reported(path)
    return path


@pytest.fixture
def gallery(made: Path, tmp_path: Path) -> Gallery:
    shutil.copytree(made, tmp_path / "g")
    return Gallery(str(tmp_path / "g"))


# ------------------------------------------------------------------ nothing is left


def test_the_traces_are_found_where_nothing_was_erased(gallery: Gallery) -> None:
    """The test of the tests below."""
    traces, _ = traces_of(gallery, Selection(identities=(name_of(9),)))
    found = {
        name.split("-")[0] if name.startswith("faces/part") else name for name in traces.anywhere(tree(gallery.path))
    }
    reports = {n for n in found if n.startswith("reports/")}
    assert {"faces/part", "faces/_delta_log/00000000000000000001.json"} <= found | {
        "faces/_delta_log/00000000000000000001.json"
    }
    wanted = ("cluster/faces.parquet", "cluster/clusters.parquet", "cluster/report.html")
    wanted += (
        "clean/decisions.parquet",
        "clean/identities.parquet",
        "clean/clean.csv",
        "clean/labels.csv",
        "clean/clean.txt",
    )
    wanted += ("dedup/decisions.parquet", "dedup/keep.txt", "graph/vectors.npy")
    assert {f"reports/{name}" for name in wanted} <= reports
    assert {n.split("/")[2] for n in found if n.startswith("index/shard")} >= {"vectors.npy", "ids.npy", "labels.arrow"}


@pytest.mark.parametrize(
    "selection",
    [
        Selection(identities=(JANE,)),
        Selection(identities=("keep", "12")),
        Selection(identities=("A and B: one person?", name_of(9))),
        Selection(uri="/data/p00[2-4]/*", source="corpus"),
    ],
    ids=("hostile", "words", "and", "pattern"),
)
def test_nothing_is_left_and_others_are_whole(gallery: Gallery, selection: Selection) -> None:
    traces, stay = traces_of(gallery, selection)
    version, before = gallery.version, manifest.load(gallery.path)
    reports = {n: read(gallery, n) for n in TABLES}
    pages = {n: groups(gallery, n) for n in PAGES}
    summary = erase.run(selection, gallery.path)
    assert manifest.load(gallery.path).table_version == Gallery(gallery.path).version
    sound(gallery, traces, stay, summary.receipts)
    made = receipt.load_receipt(summary.receipts[0])
    assert (made.images, made.faces, made.vectors) == (summary.images, summary.faces, summary.faces)
    assert (made.version_before, made.version_after) == (version, version + 1)
    assert made.files_before
    assert made.files_deleted >= len(made.files_before)
    assert {n.split("/")[0] for n in made.index_before} == {s.name for s in before.shards}
    assert {n.split("/")[0] for n in made.index_after} == {s.name for s in manifest.load(gallery.path).shards}
    assert all(Path(gallery.path, "faces", name).exists() for name in made.files_after)
    assert not traces.in_bytes(Path(summary.receipts[0]).read_bytes())
    others_are_whole(gallery, traces, reports, pages)
    for page in PAGES:
        assert all(face["uri"] for group in groups(gallery, page) for face in group["faces"])


TABLES = (
    *("cluster/faces", "clean/decisions", "clean/identities", "clean/merges", "dedup/decisions", "dedup/pairs"),
    *("dedup/groups", "cluster/merges", "cluster/splits"),
)
PAGES = ("cluster", "clean", "dedup")


def read(gallery: Gallery, name: str) -> list[dict[str, Any]]:
    return pq.read_table(Path(gallery.path, "reports", f"{name}.parquet")).to_pylist()


def groups(gallery: Gallery, name: str) -> list[dict[str, Any]]:
    text = Path(gallery.path, "reports", name, "report.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    summary = re.search(r'id="summary">(.*?)</script>', text)
    assert data
    assert summary
    found: list[dict[str, Any]] = json.loads(data[1])
    assert json.loads(summary[1])["total"] == len(found)
    return found


def others_are_whole(
    gallery: Gallery,
    traces: Traces,
    reports: dict[str, list[dict[str, Any]]],
    pages: dict[str, list[dict[str, Any]]],
) -> None:
    for name, before in reports.items():
        concerned = [
            row for row in before if traces.in_values({k: v for k, v in row.items() if k != "nearest_identity"})
        ]
        wanted = [row for row in before if row not in concerned]
        for row in wanted:
            if traces.in_values(row):
                row["nearest_identity"] = None
        found = read(gallery, name)
        if name == "cluster/faces":  # sizes and medoids are counted anew
            assert [row["face_id"] for row in found] == [row["face_id"] for row in wanted]
        else:
            assert found == wanted, name
    for name, before in pages.items():
        after = {(g["title"], g["faces"][0]["uri"]): g for g in groups(gallery, name)}
        for group in before:
            if not traces.in_values(group) and not traces.in_bytes(json.dumps(group).encode()):
                held = after.get((group["title"], group["faces"][0]["uri"]))
                assert held in (group, None) if name == "dedup" else held == group


def test_what_was_to_go_for_an_erased_copy_is_wanted_again(gallery: Gallery) -> None:
    folder = Path(gallery.path, "reports", "dedup")
    (small,) = [r for r in read(gallery, "dedup/decisions") if r["uri"] == "/elsewhere/small.jpg"]
    assert small["decision"] == "drop"
    assert "/elsewhere/small.jpg" in (folder / "drop.txt").read_text().splitlines()
    erase.run(Selection(images=(small["kept_uri"],)), gallery.path)
    assert "/elsewhere/small.jpg" in {row["uri"] for row in table_rows(gallery)}
    assert "/elsewhere/small.jpg" not in (folder / "drop.txt").read_text()
    assert small["uri"] not in {row["uri"] for row in read(gallery, "dedup/decisions")}


def test_reports_work_afterwards(gallery: Gallery) -> None:
    mark = dedup_new.run(build(dedup.DedupConfig), gallery.path)
    traces, stay = traces_of(gallery, Selection(identities=(JANE,)))
    summary = erase.run(Selection(identities=(JANE,)), gallery.path)
    assert mark.new == 0
    assigned = cluster_assign.run(gallery.path)
    assert (assigned.new, assigned.gone, assigned.full) == (0, 0, False)
    append(Gallery(gallery.path), [people(np.array([9, 9, 40]), 1000)], "20261102T000000-000000")
    index.run(index.IndexConfig(), gallery.path)
    assigned = cluster_assign.run(gallery.path)
    assert (assigned.new, assigned.placed, assigned.clusters) == (3, 2, 1)
    assert dedup_new.run(build(dedup.DedupConfig), gallery.path).new == 3
    dedup.run(build(dedup.DedupConfig), gallery.path)
    clean.run(build(clean.CleanConfig), gallery.path)
    cluster.run(build(cluster.ClusterConfig), gallery.path)
    compact.run(CompactConfig(), gallery.path, everything=True)
    sound(gallery, traces, table_rows(gallery), summary.receipts)
    assert len(table_rows(gallery)) == len(stay) + 3


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")
def test_the_page_opens(gallery: Gallery, tmp_path: Path) -> None:
    erase.run(Selection(identities=(JANE,)), gallery.path)
    browser = Browser(tmp_path / "profile")
    try:
        for name in PAGES:
            browser.open(Path(gallery.path, "reports", name, "report.html"))
            assert browser.messages == []
    finally:
        browser.close()


def test_sums_do_not_tell_where_clusters_cannot_be_brought_up_to_date(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(gallery.path, "reports", "cluster")
    faces = {row["face_id"]: row["cluster"] for row in read(gallery, "cluster/faces")}
    before = {row["face_id"]: np.array(row["embedding"], np.float32) for row in table_rows(gallery)}
    one = next(row for row in table_rows(gallery) if row["identity"] == name_of(9))

    def refuse(*_: Any, **__: Any) -> None:
        raise StorageError("no index, no reports, nothing")

    with monkeypatch.context() as patch:
        patch.setattr(cluster_assign, "run", refuse)
        erase.run(Selection(images=(one["uri"],)), gallery.path)
    cluster_, left = faces[one["face_id"]], [f for f, c in faces.items() if c == faces[one["face_id"]]]
    with np.load(folder / "sums.npz") as held:
        rest = held["sums"][cluster_] - np.sum([before[f] for f in left if f != one["face_id"]], axis=0)
    cosine = float(rest @ before[one["face_id"]]) / float(
        np.linalg.norm(rest) * np.linalg.norm(before[one["face_id"]]) + 1e-9
    )
    assert np.linalg.norm(rest) < 1e-3 or cosine < -0.5, "what is missing is not who is missing"
    assert cluster_assign.run(gallery.path).gone == 0
    with np.load(folder / "sums.npz") as held:
        wanted = np.sum([before[f] for f in left if f != one["face_id"]], axis=0)
        np.testing.assert_allclose(held["sums"][cluster_], wanted, atol=1e-5)


def test_without_index_and_reports(tmp_path: Path) -> None:
    made = Gallery.create(str(tmp_path / "g"), DLIB)
    append(made, [people(np.repeat(np.arange(4), 3))], "20261101T000000-000000")
    leftover = tmp_path / "g" / "index" / "shard-000.partial"
    leftover.mkdir(parents=True)
    gallery = Gallery(made.path)
    traces, stay = traces_of(gallery, Selection(identities=(name_of(2),)))
    (leftover / "vectors.npy").write_bytes(b"".join(traces.vectors))
    Path(gallery.faces_folder, "_delta_log", "00000000000000000009.json#1").write_text(uri_of(2, 6))
    summary = erase.run(Selection(identities=(name_of(2),)), gallery.path)
    sound(gallery, traces, stay, summary.receipts)
    assert not os.path.exists(Path(gallery.path, "reports"))
    everyone = erase.run(Selection(source="corpus"), gallery.path, limit=ErasureLimit(1.0))
    assert (everyone.images, table_rows(gallery)) == (len(stay), [])


def test_an_index_that_is_behind_the_table(gallery: Gallery) -> None:
    """Its vectors of an image that has changed since have ids that the table does not know."""
    was = [row for row in table_rows(gallery) if row["identity"] == name_of(9)]
    first = was[0]
    changed = people(np.array([9]), 500, uri=[first["uri"]], identity=[name_of(9)])
    data = encode_parquet(changed)
    name = f"part-x-000000-{compute_image_id(data)}.parquet"
    storage.write(storage.join(gallery.faces_folder, name), data)
    commit = Committer(gallery, "20261102T000000-000000")
    commit(
        [PartRecord(0, rows=1, path=name, size=len(data), stats=compute_statistics(changed), replaced=[first["uri"]])],
        {},
    )
    now = Gallery(gallery.path)
    traces, stay = traces_of(now, Selection(identities=(name_of(9),)))
    old = Traces(was, {name_of(9)})
    summary = erase.run(Selection(identities=(name_of(9),)), gallery.path)
    assert receipt.load_receipt(summary.receipts[0]).vectors == len(was)
    left = {n: d for n, d in tree(gallery.path).items() if not n.startswith("runs/")}
    assert old.anywhere(left) == {}
    never_found(gallery, old)
    sound(gallery, traces, stay, summary.receipts, quick=False)
    assert manifest.load(gallery.path).table_version < Gallery(gallery.path).version
    index.run(index.IndexConfig(), gallery.path)
    sound(gallery, traces, stay, summary.receipts)


def test_vectors_that_were_dead_already_go_as_well(gallery: Gallery) -> None:
    was = [row for row in table_rows(gallery) if row["identity"] == name_of(9)]
    found, tag = manifest.load_tagged(gallery.path)
    store = manifest.open_index_store(gallery.path)
    (entry,) = found.shards
    tombstoned = write_tombstones(store, entry, np.array([was[0]["face_id"]]))
    with hold_lease(str(Path(gallery.path, "index")), "index") as lease:
        manifest.publish(gallery.path, replace(found, shards=(tombstoned,)), tag, lease)
    others = Selection(identities=(name_of(10),))
    erase.run(others, gallery.path)
    rest = Selection(images=tuple(row["uri"] for row in was[1:]))
    erase.run(rest, gallery.path)
    assert (
        Traces([was[0]], set()).anywhere({n: d for n, d in tree(gallery.path).items() if n.startswith("index/")}) == {}
    )


# ------------------------------------------------------------------ crashes

STEPS = (
    "facepipe.erasure.requests.pending.write_pending",
    "facepipe.gallery.suppressed.suppress_images",
    "facepipe.erasure.steps.rewrite_files",
    "facepipe.erasure.steps.Committer.commit_actions",
    "facepipe.erasure.vectors.write_tombstones",
    "facepipe.erasure.steps.vectors.hide_vectors",
    "facepipe.erasure.vectors.merge_shards",
    "facepipe.erasure.steps.vectors.remove_vectors",
    "pipelines.erase.cluster_assign.run",
    "facepipe.erasure.steps._ErasureSteps._describe_erased",
    "facepipe.erasure.steps._ErasureSteps._clean_reports",
    "facepipe.erasure.steps._ErasureSteps._delete_files",
    "facepipe.erasure.steps.delete_history",
    "facepipe.erasure.steps.save_receipt",
    "facepipe.gallery.hidden.remove_request",
    "facepipe.erasure.steps.pending.delete_pending",
)


class PowerCutError(Exception):
    pass


# After the others comes nothing but the step that follows them.
ENDS = tuple(STEPS[n] for n in (3, 4, 5, 6, 7, 8, 14, 15))


@pytest.mark.parametrize(("step", "after"), [*((s, False) for s in STEPS), *((s, True) for s in ENDS)])
def test_a_crash_around_any_step(
    step: str, after: bool, gallery: Gallery, whole: Receipt, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = Selection(identities=(name_of(9),))
    traces, stay = traces_of(gallery, selection)
    module, _, name = step.rpartition(".")
    holder = _resolve(module)
    real = getattr(holder, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if after:
            real(*args, **kwargs)
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, fails)
        with pytest.raises(PowerCutError):
            erase.run(selection, gallery.path)
    begun = bool(pending.read_unfinished(gallery.path))
    started = (step, after) not in {(STEPS[0], False)}
    ended = (step, after) == (STEPS[-1], True)
    assert begun == (started and not ended)
    if begun:
        never_found(gallery, traces)
        assert table_rows(gallery) == stay, "no reader sees them"
        (receipts,) = erase.resume(gallery.path).receipts
    elif ended:
        receipts = next(str(p) for p in Path(gallery.path, "erased").glob("*.json"))
    else:
        (receipts,) = erase.run(selection, gallery.path).receipts
    assert manifest.load(gallery.path).table_version == Gallery(gallery.path).version
    sound(gallery, traces, stay, [receipts])
    complete(receipt.load_receipt(receipts), whole)
    assert pending.read_unfinished(gallery.path) == []
    assert erase.run(selection, gallery.path).images == 0


def _resolve(module: str) -> Any:
    for end in range(module.count(".") + 1, 0, -1):
        parts = module.split(".")
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(module)


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Receipt:
    """The receipt of an erasure that nothing happened to."""
    path = tmp_path_factory.mktemp("undisturbed") / "g"
    shutil.copytree(made, path)
    return receipt.load_receipt(erase.run(Selection(identities=(name_of(9),)), str(path)).receipts[0])


def complete(made: Receipt, whole: Receipt) -> None:
    names = ("images", "faces", "rows", "version_before", "version_after", "files_before", "vectors", "index_before")
    for name in names:
        assert getattr(made, name) == getattr(whole, name), name
    assert sorted(made.files_after.values()) == sorted(whole.files_after.values())
    assert len(made.index_after) == len(whole.index_after)
    assert {n: len(h) for n, h in made.hashes.items()} == {n: len(h) for n, h in whole.hashes.items()}
    assert made.files_deleted >= len(made.files_before)
    assert set(whole.reports) - set(made.reports) <= {"graph/"} | {f"cluster/{n}" for n in ("clusters.parquet",)}


@pytest.mark.slow
def test_killed_in_any_place_it_is_finished_by_the_next(gallery: Gallery, tmp_path: Path) -> None:
    """SIGKILL at the n-th write, for 10 places spread over the whole erasure."""
    script = tmp_path / "kill.py"
    script.write_text(
        "import os, signal, sys, traceback\n"
        "from facepipe import storage\n"
        "from facepipe.erasure.selection import Selection\n"
        "from pipelines import erase\n"
        "count = 0\n"
        "def counted(real):\n"
        "    def write(*args, **kwargs):\n"
        "        global count\n"
        "        count += 1\n"
        "        if count == at:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return real(*args, **kwargs)\n"
        "    return write\n"
        "for owner, name in ((storage, 'write'), (storage, 'delete'), (os, 'replace'), (os, 'rename'), (os, 'unlink')):\n"
        "    setattr(owner, name, counted(getattr(owner, name)))\n"
        "for path, at in zip(sys.argv[2::2], map(int, sys.argv[3::2])):\n"
        "    if os.fork() == 0:\n"  # the imports take longer than the rest
        "        erase.run(Selection(identities=(sys.argv[1],)), path)\n"
        "        print(count, flush=True)\n"
        "        os._exit(0)\n"
        "    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)\n"
    )

    def start(*where: object) -> list[int]:
        command = [sys.executable, str(script), name_of(9), *map(str, where)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
        return [int(line) for line in found.stdout.splitlines()]

    selection = Selection(identities=(name_of(9),))
    traces, stay = traces_of(gallery, selection)
    shutil.copytree(gallery.path, tmp_path / "undisturbed")
    total, code = start(tmp_path / "undisturbed", -1)
    assert code == 0
    assert total > 30
    hidden = 0
    places = [(tmp_path / f"at{at}", at) for at in np.linspace(4, total, 10).astype(int).tolist()]
    for copy, _ in places:
        shutil.copytree(gallery.path, copy)
    assert start(*(word for place in places for word in place)) == [-signal.SIGKILL] * len(places)
    for copy, _ in places:
        if pending.read_unfinished(str(copy)):
            hidden += 1
            never_found(Gallery(str(copy)), traces)
        summary = erase.run(selection, str(copy))
        receipts = [str(path) for path in (copy / "erased").glob("*.json")]
        assert len(receipts) == 1
        assert not summary.images or summary.receipts == receipts
        sound(Gallery(str(copy)), traces, stay, receipts)
        made = receipt.load_receipt(receipts[0])
        assert (made.vectors, len(made.files_before), len(made.hashes["faces"])) == (EACH, len(made.files_before), EACH)
        assert made.files_before
        assert made.index_before
        shutil.rmtree(copy)
    assert hidden >= 6


def test_faces_that_came_between_crash_and_resumption_are_indexed(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = Selection(identities=(name_of(9),))
    traces, stay = traces_of(gallery, selection)

    def fails(*_: Any, **__: Any) -> None:
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr("facepipe.erasure.steps.vectors.remove_vectors", fails)
        with pytest.raises(PowerCutError):
            erase.run(selection, gallery.path)
    append(Gallery(gallery.path), [people(np.array([11, 12]), 2000)], "20261102T000000-000000")
    (path,) = erase.resume(gallery.path).receipts
    assert index.run(index.IndexConfig(), gallery.path).added == 2
    sound(gallery, traces, table_rows(gallery), [path])
    assert len(table_rows(gallery)) == len(stay) + 2


def test_a_damaged_table_is_said_and_the_erasure_goes_on_after_repair(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = Selection(identities=(name_of(9),))
    traces, stay = traces_of(gallery, selection)
    victim = sorted(Path(gallery.faces_folder).glob("*.parquet"))[0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    code, _, err = call("erase", gallery.path, "--identity", name_of(9), "--quiet")
    assert (code, "cannot read the table" in " ".join(err.split())) == (1, True)
    victim.write_bytes(whole)
    real = steps_module.rewrite_files

    def broken(*args: Any) -> Iterator[Any]:
        victim.write_bytes(whole[: len(whole) // 2])
        yield from real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(steps_module, "rewrite_files", broken)
        code, _, err = call("erase", gallery.path, "--identity", name_of(9), "--quiet")
    assert (code, "cannot read" in " ".join(err.split())) == (1, True)
    assert pending.read_unfinished(gallery.path)
    never_found(gallery, traces)
    code, _, err = call("erase", gallery.path, "--identity", "nobody of many", "--quiet")
    assert code == 1, "a name that matches nothing is told, whatever is interrupted"
    assert pending.read_unfinished(gallery.path), "the table is still damaged"
    victim.write_bytes(whole)
    code, out, _ = call("erase", gallery.path, "--identity", name_of(9), "--quiet", "--json")
    summary = json.loads(out)
    assert (code, summary["images"], len(summary["receipts"])) == (0, 0, 1)
    assert call("erase", gallery.path, "--identity", name_of(9), "--quiet")[0] == 1, "now nobody has that name"
    sound(gallery, traces, stay, summary["receipts"])


@pytest.mark.parametrize("data", [b"", b"PAR1", b"\xff\xfe not text \x00"], ids=("empty", "cut", "noise"))
def test_damaged_reports_do_not_stop_it(gallery: Gallery, data: bytes) -> None:
    selection = Selection(identities=(name_of(9),))
    traces, stay = traces_of(gallery, selection)
    for found in sorted(Path(gallery.path, "reports").rglob("*")):
        if found.is_file() and found.name != ".lock":
            found.write_bytes(data)
    summary = erase.run(selection, gallery.path)
    sound(gallery, traces, stay, summary.receipts)


def test_a_damaged_pending_file_is_said(gallery: Gallery) -> None:
    suppressed.write_erased_file(gallery.path, "20261101T000000-000000.pending", b"PAR1")
    with pytest.raises(GalleryError, match="is damaged"):
        erase.run(Selection(identities=("x",)), gallery.path)


# ------------------------------------------------------------------ others at work


@pytest.mark.parametrize("place", ["", "index", "reports"])
def test_what_another_run_holds_is_done_later(place: str, gallery: Gallery) -> None:
    """Whichever lease another run holds: the images are hidden at once, the rest of the erasure is done."""
    selection = Selection(identities=(name_of(9),))
    traces, stay = traces_of(gallery, selection)
    opened = Index(gallery.path)
    with hold_lease(f"{gallery.path}/{place}".rstrip("/"), "place"):
        summary = erase.run(selection, gallery.path, wait=False)
        assert (summary.images, summary.complete, summary.receipts) == (EACH, False, [])
        assert pending.is_pending(gallery.path, summary.request)
        never_found(gallery, traces)
        assert table_rows(gallery) == stay
        queries = np.array([np.frombuffer(v, "<f4") for v in traces.vectors])
        assert not traces.ids & set(opened.search(queries, k=50).ids.ravel().tolist()), "also where it is open"
        assert erase.run(selection, gallery.path, wait=False).images == 0, "they are being erased"
    resumed = erase.resume(gallery.path)
    assert resumed.complete
    sound(gallery, traces, stay, resumed.receipts)
    assert not traces.ids & set(opened.search(queries, k=50).ids.ravel().tolist())


def test_two_processes_at_once(gallery: Gallery) -> None:
    chosen = [Selection(identities=(name_of(n),)) for n in (9, 10)]
    both = [traces_of(gallery, selection)[0] for selection in chosen]
    command = [sys.executable, "-m", "jobs.cli", "erase", gallery.path, "--quiet", "--identity"]
    running = [
        subprocess.Popen([*command, name_of(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in (9, 10)
    ]
    ends = [(process.communicate(timeout=120), process.returncode) for process in running]
    assert [code for _, code in ends] == [0, 0], ends
    receipts = [str(path) for path in Path(gallery.path, "erased").glob("*.json")]
    stay = [row for row in table_rows(gallery) if row["identity"] not in (name_of(9), name_of(10))]
    for traces in both:
        sound(gallery, traces, stay, receipts)


# ------------------------------------------------------------------ they do not come back


@pytest.fixture
def embedded(drawings: Path, fakes: dict[str, Any], tmp_path: Path) -> tuple[Path, str]:
    """(a folder of 60 drawings with an exact copy of one, its gallery with labels)."""
    shutil.copytree(drawings, tmp_path / "in")
    shutil.copy(tmp_path / "in" / "person1" / "p1_001.png", tmp_path / "in" / "person2" / "copy.png")
    path = str(tmp_path / "g")
    embed(tmp_path / "in", path, fakes, {"source": {"identity": "folder"}})
    index.run(index.IndexConfig(), path)
    return tmp_path / "in", path


def test_the_erased_do_not_come_back(embedded: tuple[Path, str], fakes: dict[str, Any], tmp_path: Path) -> None:
    source, path = embedded
    gallery = Gallery(path)
    labels = {"source": {"identity": "folder"}}
    traces, stay = traces_of(gallery, Selection(identities=("person1",)))
    summary = erase.run(Selection(identities=("person1",)), path)
    assert summary.images == 21, "the copy in another folder too"
    sound(gallery, traces, stay, summary.receipts)
    again = embed(source, path, fakes, labels)
    assert (again.images, again.skipped, again.erased, again.listed) == (0, 40, 21, 61)
    os.rename(source / "person1", source / "renamed")
    again = embed(source, path, fakes, labels)
    assert (again.skipped, again.erased, again.listed) == (40, 1, 61), "the copy is still told by its uri"
    assert dict(again.statuses) == {"erased": 20}
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(source / "renamed", "x")
        tar.add(source / "person0" / "p0_000.png", "y.png")
    by_tar = embed(tmp_path / "t.tar", path, fakes)
    assert (by_tar.statuses["erased"], by_tar.images, by_tar.listed) == (20, 21, 21)
    parquet = tmp_path / "p.parquet"
    data = [p.read_bytes() for p in sorted((source / "renamed").iterdir())[:3]]
    pq.write_table(pa.table({"name": ["a", "b", "c"], "bytes": pa.array(data, pa.binary())}), parquet)
    by_rows = embed(parquet, path, fakes)
    assert dict(by_rows.statuses) == {"erased": 3}
    sound(gallery, traces, table_rows(gallery), summary.receipts, quick=False)
    broken = tmp_path / "more"
    broken.mkdir()
    shutil.copy(source / "renamed" / "p1_001.png", broken / "a.png")
    (broken / "b.png").write_bytes(b"no image")
    cv2.imwrite(str(broken / "c.png"), draw(500))
    for runner in ("inline", "local"):
        mixed = embed(broken, str(tmp_path / "g"), fakes, runner=runner, workers=1)
    assert mixed.statuses["erased"] == 1


def test_those_that_may_return_do(embedded: tuple[Path, str], fakes: dict[str, Any]) -> None:
    source, path = embedded
    before = [{k: v for k, v in row.items() if k != "ingested_at"} for row in table_rows(Gallery(path))]
    summary = erase.run(Selection(identities=("person1",)), path, may_return=True)
    assert not receipt.load_receipt(summary.receipts[0]).suppressed
    assert embed(source, path, fakes, {"source": {"identity": "folder"}}).images == 21
    assert [{k: v for k, v in row.items() if k != "ingested_at"} for row in table_rows(Gallery(path))] == before


def test_copies_stay_where_a_place_or_an_age_was_meant(embedded: tuple[Path, str]) -> None:
    source, path = embedded
    summary = erase.run(Selection(uri=f"{source}/person1/*"), path, limit=ErasureLimit(0.5))
    assert summary.images == 20
    assert str(source / "person2" / "copy.png") in {row["uri"] for row in table_rows(Gallery(path))}
    assert receipt.load_receipt(summary.receipts[0]).hashes["images"] == []


# ------------------------------------------------------------------ the command


def call(*words: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command(gallery: Gallery, tmp_path: Path) -> None:
    before = tree(gallery.path)
    code, out, err = call("erase", gallery.path, "--identity", name_of(9), "--dry-run", "--json")
    assert (code, json.loads(out)["images"], json.loads(out)["receipts"]) == (0, EACH, [])
    code, out, err = call("erase", gallery.path, "--identity", "nobody at all")
    assert (code, "receipt" in out, "no image has the identity 'nobody at all'" in err) == (1, False, True)
    assert call("compact", gallery.path, "--all", "--dry-run")[0] == 0
    unknown = {n: d for n, d in tree(gallery.path).items() if n not in before}
    assert {n.split("/")[0] for n in unknown} <= {"runs", ".lock", ".lock.guard", "index", "reports"}
    assert not [n for n in unknown if not n.startswith("runs") and ".lock" not in n]
    code, out, err = call("erase", gallery.path, "--identity", name_of(9))
    (path,) = re.findall(r"receipt: (\S+)", out)
    assert (code, "no search returns them any more" in err) == (0, True)
    code, out, _ = call("verify", gallery.path, "--erased", path)
    assert (code, "nothing of it is left" in out) == (0, True)
    assert call("info", gallery.path)[0] == 0
    assert call("verify", gallery.path)[0] == 0
    record = json.loads(Path(gallery.path, "runs", "last-erase.json").read_text())["success"]
    assert (record["counters"]["images"], record["counters"]["erased_images"]) == (EACH, EACH)


def test_a_rule_of_which_nothing_is_due_is_no_failure(gallery: Gallery) -> None:
    """It is run every night. A name in it that matches nothing is a mistake all the same."""
    for rule in (["--older-than", "36500"], ["--missing"]):
        code, out, err = call("erase", gallery.path, *rule, "--json")
        assert (code, json.loads(out)["images"], json.loads(out)["receipts"], err) == (0, 0, [], "")
        code, _, err = call("erase", gallery.path, *rule, "--source", "no such source")
        assert (code, "there is no source 'no such source'" in err) == (1, True)


def test_a_dry_run_writes_nothing(gallery: Gallery) -> None:
    before = tree(gallery.path)
    assert erase.run(Selection(identities=(name_of(9),)), gallery.path, dry_run=True).images == EACH
    assert compact.run(CompactConfig(fewest=2), gallery.path, dry_run=True).joined == 3
    assert tree(gallery.path) == before


def test_wrong_words(gallery: Gallery, tmp_path: Path) -> None:
    assert call("erase", gallery.path)[0] == 2
    assert call("erase", gallery.path, "--older-than", "-1")[0] == 2
    assert call("erase", gallery.path, "--older-than", "nan")[0] == 2
    assert call("erase", gallery.path, "--older-than", "1e30")[0] == 2
    assert call("erase", str(tmp_path / "none"), "--identity", "x")[0] == 1
    for data, message in (
        (b"", "holds no id"),
        (b"abc\n", "neither a face id"),
        (b"\xff", "cannot read the ids"),
        (None, "cannot"),
    ):
        (tmp_path / "ids").unlink(missing_ok=True)
        if data is not None:
            (tmp_path / "ids").write_bytes(data)
        code, _, err = call("erase", gallery.path, "--ids", tmp_path / "ids")
        assert (code, message in " ".join(err.split())) == (2, True), err
    code, _, err = call("verify", gallery.path, "--erased", tmp_path / "ids")
    assert code == 2


def test_proof_finds_what_is_left(gallery: Gallery, made: Path) -> None:
    was = [row for row in table_rows(gallery) if row["identity"] == name_of(9)]
    (path,) = erase.run(Selection(identities=(name_of(9),)), gallery.path).receipts
    asked = receipt.load_receipt(path)
    for name in ("reports/clean/clean.csv", "reports/clean/msceleb.txt", "reports/cluster/report.html"):
        shutil.copy(made / name, Path(gallery.path, name))
    for name in ("reports/cluster/faces.parquet", "reports/dedup/keep.txt"):
        shutil.copy(made / name, Path(gallery.path, name))
    shutil.copytree(made / "reports" / "graph", Path(gallery.path, "reports", "graph"))
    file = next(iter(asked.files_before))
    shutil.copy(made / "faces" / file, Path(gallery.faces_folder, file))
    for log in (made / "faces" / "_delta_log").glob("*1.json"):
        shutil.copy(log, Path(gallery.faces_folder, "_delta_log"))
    for shard in (made / "index").glob("shard-*"):
        shutil.copytree(shard, Path(gallery.path, "index", shard.name))
    told = "\n".join(check_erased(Gallery(gallery.path), asked))
    for said in (
        "clean.csv",
        "cluster/report.html",
        "cluster/faces.parquet",
        "keep.txt",
        "graph/ids.npy",
        file,
        "not part of the index",
    ):
        assert said in told, said
    append(Gallery(gallery.path), [pa.Table.from_pylist(was, FACES)], "20261102T000000-000000")
    assert "rows by uri" in "\n".join(check_erased(Gallery(gallery.path), asked))


# ------------------------------------------------------------------ old galleries, object stores, compaction


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gallery:
    """A gallery made before the table had the newer columns."""
    before = pa.schema([field for field in FACES if field.name not in LATER])
    with monkeypatch.context() as patch:
        patch.setattr("facepipe.gallery.table.FACES", before)
        made = Gallery.create(str(tmp_path / "old"), DLIB)
    parts = [conform(people(np.repeat(np.arange(4), 3), 100 * n), before) for n in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr("facepipe.gallery.commits.parts.FACES", before)
        append(made, parts, "20261001T000000-000000")
    return Gallery(made.path)


def test_old_galleries(old: Gallery) -> None:
    index.run(index.IndexConfig(), old.path)
    assert erase.run(Selection(missing=True), old.path).images == 0
    traces, stay = traces_of(old, Selection(identities=(name_of(2),)))
    summary = erase.run(Selection(identities=(name_of(2),)), old.path)
    sound(old, traces, stay, summary.receipts)
    assert compact.run(CompactConfig(), old.path, everything=True).files == 1
    sound(old, traces, stay, summary.receipts)


def test_in_an_object_store(bucket: Any, tmp_path: Path, made: Path, fakes: dict[str, Any]) -> None:
    path = "s3://faces/team/g"
    append(Gallery.create(path, DLIB), [Gallery(str(made)).to_arrow()], "20261101T000000-000000")
    index.run(index.IndexConfig(), path)
    dedup.run(build(dedup.DedupConfig), path)
    cluster.run(build(cluster.ClusterConfig), path)
    clean.run(build(clean.CleanConfig), path)
    storage.write(f"{path}/reports/graph/vectors.npy", b"left by another machine")
    # Uploads of processes that were killed, and one of somebody else.
    names = [f"faces/{Gallery(path).files()[0]['path']}", "index/shard-1/vectors.npy", "reports/dedup/pairs.parquet"]
    for name in (*names, "faces/mine.bin"):
        bucket.create_multipart_upload(Bucket="faces", Key=f"team/g/{name}")
    assert doctor._check_uploads(path).detail.startswith("4, such as s3://faces/team/g/faces/")
    assert len(verify_gallery(Gallery(path)).problems) == 4
    selection = Selection(identities=(JANE,))
    traces, stay = traces_of(Gallery(path), selection)
    assert traces.anywhere(objects(bucket))
    summary = erase.run(selection, path)
    assert table_rows(Gallery(path)) == stay
    left = {n: d for n, d in objects(bucket).items() if "/runs/" not in n}
    assert traces.anywhere(left) == {}
    assert not [n for n in left if "/graph/" in n or n.endswith((".pending", ".state", ".new", ".tags", ".origin"))]
    (problem,) = check_erased(Gallery(path), receipt.load_receipt(summary.receipts[0]))
    assert problem.startswith("s3://faces/team/g/faces/mine.bin: an upload of it never ended")
    (upload,) = bucket.list_multipart_uploads(Bucket="faces")["Uploads"]
    bucket.abort_multipart_upload(Bucket="faces", Key=upload["Key"], UploadId=upload["UploadId"])
    assert check_erased(Gallery(path), receipt.load_receipt(summary.receipts[0])) == []
    assert doctor._check_uploads(path).state == "ok"
    delete_copies(path)
    assert traces.anywhere(tree(tmp_path / "cache")) == {}
    assert verify_gallery(Gallery(path)).problems == []
    assert verify_index(Gallery(path)) == []
    never_found(Gallery(path), traces)
    assert index.run(index.IndexConfig(), path).action == "unchanged"
    assert cluster_assign.run(path).new == 0


def objects(bucket: Any) -> dict[str, bytes]:
    listed = bucket.list_objects_v2(Bucket="faces", Prefix="team/").get("Contents", ())
    return {e["Key"]: bucket.get_object(Bucket="faces", Key=e["Key"])["Body"].read() for e in listed}


def test_local_copies_of_an_object_store_are_gone(bucket: Any, tmp_path: Path, made: Path) -> None:
    path = "s3://faces/team/g"
    append(Gallery.create(path, DLIB), [Gallery(str(made)).to_arrow()], "20261101T000000-000000")
    index.run(index.IndexConfig(), path)
    traces, _ = traces_of(Gallery(path), Selection(identities=(JANE,)))
    assert traces.anywhere(tree(tmp_path / "cache"))
    erase.run(Selection(identities=(JANE,)), path)
    assert traces.anywhere(tree(tmp_path / "cache")) == {}


def test_compaction_changes_nothing_but_files(gallery: Gallery) -> None:
    append(Gallery(gallery.path), [people(np.array([n]), 3000 + n) for n in range(6)], "20261102T000000-000000")
    index.run(index.IndexConfig(), gallery.path)
    before, shards = table_rows(gallery), manifest.load(gallery.path).shards
    now = Gallery(gallery.path)
    summary = compact.run(CompactConfig(fewest=3, target_bytes=1 << 20), gallery.path)
    assert (summary.joined, summary.files) == (9, len(Gallery(gallery.path).files()))
    assert table_rows(gallery) == before
    assert verify_gallery(Gallery(gallery.path)).problems == []
    assert index.run(index.IndexConfig(), gallery.path).action == "unchanged"
    assert manifest.load(gallery.path).shards == shards
    assert verify_index(Gallery(gallery.path)) == []
    assert now.to_arrow().num_rows == len(before), "who reads the version before still can"
    assert compact.run(CompactConfig(fewest=2), gallery.path).joined == 0
    assert compact.run(CompactConfig(keep_hours=0), gallery.path).deleted == 9


def test_files_that_left_are_kept_for_their_readers(gallery: Gallery) -> None:
    """However long ago they were written."""
    for file in Path(gallery.faces_folder).rglob("*"):
        os.utime(file, (1e9, 1e9))
    stray = Path(gallery.faces_folder, f"part-stray-000000-{'0' * 32}.parquet")
    stray.write_bytes(b"of a run that died long ago")
    os.utime(stray, (1e9, 1e9))
    summary = compact.run(CompactConfig(keep_hours=24), gallery.path, everything=True)
    assert (summary.joined, summary.deleted) == (3, 1)
    assert gallery.to_arrow().num_rows == len(table_rows(gallery))
    for file in Path(gallery.faces_folder, "_delta_log").iterdir():
        os.utime(file, (1e9, 1e9))
    assert compact.run(CompactConfig(keep_hours=24), gallery.path).deleted == 3


def test_killed_between_groups(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    before = table_rows(gallery)
    append(Gallery(gallery.path), [people(np.array([n]), 3000 + n) for n in range(3)], "20261102T000000-000000")
    groups = steps.plan_compaction(Gallery(gallery.path), CompactConfig(target_bytes=1 << 30), everything=True)
    (group,) = groups
    real, done = steps._join_group, []

    def one(*args: Any) -> Any:
        if done:
            raise PowerCutError
        done.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "_join_group", one)
        patch.setattr(compact, "plan_compaction", lambda *_: [group[:3], group[3:]])
        with pytest.raises(PowerCutError):
            compact.run(CompactConfig(), gallery.path)
    assert len(table_rows(gallery)) == len(before) + 3
    assert verify_gallery(Gallery(gallery.path)).problems == []
    assert compact.run(CompactConfig(keep_hours=0), gallery.path, everything=True).files == 1
    assert len(table_rows(gallery)) == len(before) + 3
