"""A power cut at any moment: the gallery opens, holds all that was committed, and what was erased does not come back."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import embed, rows
from powercut import CUTS, Ext4, SyncedState, mount_ext4

from facepipe.config import build
from facepipe.decisions import add_decisions
from facepipe.decisions.table import verify_table as verify_decisions
from facepipe.erasure import pending
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.selection import Selection
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.maintenance.compact import CompactConfig
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index import manifest
from facepipe.index.verify import find_damage, verify_index
from pipelines import compact, erase, index, search
from pipelines.dedup import DedupConfig
from pipelines.dedup import pipeline as dedup
from pipelines.index import IndexConfig
from pipelines.search import SearchConfig

Sources = tuple[Path, Path]

FAKES = {
    "detect": {"model": "fake-detector"},
    "embed": {"model": "fake-embedder"},
    "run": {"runner": "inline", "block_smallest": 4, "block_largest": 4, "commit_seconds": 0},
}
PERSON = "person1"


@pytest.fixture(scope="module")
def sources(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Two folders of eight images each, of two people."""
    root = tmp_path_factory.mktemp("sources")
    for number, people in enumerate((("person0", PERSON), (PERSON, "person2"))):
        for person in people:
            folder = root / f"source{number}" / person
            folder.mkdir(parents=True)
            for photo in sorted((drawings / person).iterdir())[4 * number : 4 * number + 4]:
                (folder / photo.name).symlink_to(photo)
    return root / "source0", root / "source1"


@pytest.fixture(scope="module")
def made(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of the first folder, with its index, and with a decision on a face."""
    gallery = tmp_path_factory.mktemp("made") / "g"
    embed(sources[0], gallery, FAKES)
    index.run(IndexConfig(), str(gallery))
    face = next(row["face_id"] for row in rows(gallery) if row["face_id"] is not None and PERSON in row["uri"])
    assert add_decisions(str(gallery), [{"decision": "is", "face_id": str(face), "person": PERSON}]).is_applied
    return gallery


def create(gallery: Path, sources: Sources) -> None:
    embed(sources[0], gallery, FAKES)


def embed_more(gallery: Path, sources: Sources) -> None:
    embed(sources[1], gallery, FAKES)


def erase_person(gallery: Path, sources: Sources) -> None:
    erase.run(Selection(identities=(PERSON,)), str(gallery))


def join_files(gallery: Path, sources: Sources) -> None:
    compact.run(CompactConfig(fewest=2, keep_hours=0), str(gallery), everything=True)


def index_again(gallery: Path, sources: Sources) -> None:
    index.run(IndexConfig(), str(gallery), retrain=True)


STEPS: dict[str, Callable[[Path, Sources], None]] = {
    "create": create,
    "embed": embed_more,
    "erase": erase_person,
    "compact": join_files,
    "index": index_again,
}


@dataclass
class Promise:
    """What a gallery must hold after a cut.

    Attributes:
        uris: Images that were committed, and that nobody wants to erase.
        erased: Images of the person who is being erased. They are all there or all gone.
        has_ended: Whether the step has returned.
    """

    uris: set[str] = field(default_factory=set)
    erased: set[str] = field(default_factory=set)
    has_ended: bool = False


def read_uris(gallery: Path) -> set[str]:
    return {row["uri"] for row in rows(gallery)}


def check_cut(gallery: Path, promise: Promise) -> None:
    """Check a gallery that a power cut left."""
    if not Gallery.exists(str(gallery)):
        assert not promise.uris
        assert not promise.has_ended
        return
    table = Gallery(str(gallery))
    assert verify_gallery(table).problems == []
    assert verify_decisions(str(gallery))[1] == []
    uris = read_uris(gallery)
    assert promise.uris <= uris
    is_pending = bool(pending.read_unfinished(str(gallery)))
    if promise.erased:
        # Whoever is gone must not come back, and a receipt is there when nothing is left, and not before.
        assert promise.erased <= uris or not promise.erased & uris
        # While the erasure is recorded as unfinished, the next run suppresses the images before it does anything else.
        is_suppressed = len(suppressed.read_uris(str(gallery))) == len(promise.erased)
        assert promise.erased <= uris or is_suppressed or is_pending
        for path in (gallery / "erased").glob("*.json"):
            assert check_erased(table, load_receipt(str(path))) == [] or is_pending
        if promise.has_ended:
            assert not promise.erased & uris
            assert list((gallery / "erased").glob("*.json"))
    if manifest.exists(str(gallery)):
        # While an erasure goes on, the index hides faces that the table still has.
        store = manifest.open_index_store(str(gallery))
        assert find_damage(store, manifest.load(str(gallery))) == {}
        assert is_pending or verify_index(table) == []


@pytest.mark.parametrize("trial", range(3 if os.environ.get("FACEPIPE_ALL_TRIALS") else 1))
@pytest.mark.parametrize("step", STEPS)
def test_what_was_synced_is_enough_at_every_moment(
    step: str, trial: int, made: Path, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut before every sync and at the end: with what was synced, with all names, or with any mix of both."""
    disk = tmp_path / "disk"
    disk.mkdir()
    gallery = disk / "g"
    promise = Promise()
    if step != "create":
        shutil.copytree(made, gallery)
        promise.uris = read_uris(gallery)
    if step == "erase":
        promise.erased = {uri for uri in promise.uris if PERSON in uri}
        promise.uris -= promise.erased
    commit = Committer.commit_actions
    cuts = trial

    # A commit is promised from the moment at which it has returned.
    def commit_and_promise(self: Committer, *args: Any) -> None:
        commit(self, *args)
        if step in ("create", "embed"):
            promise.uris = read_uris(gallery)

    def cut() -> None:
        nonlocal cuts
        place = tmp_path / f"cut-{cuts}"
        state.cut(place, CUTS[cuts % len(CUTS)], seed=cuts)
        check_cut(place / "g", promise)
        cuts += 1

    state = SyncedState(disk)
    with state.watch(monkeypatch):
        monkeypatch.setattr(Committer, "commit_actions", commit_and_promise)
        state.on_sync = cut
        STEPS[step](gallery, sources)
        promise.has_ended = True
        for _ in CUTS:
            cut()
    assert state.syncs > 5
    # The same command completes what a cut stopped.
    stopped = tmp_path / f"cut-{trial + (trial + 1) * state.syncs // 4}" / "g"
    STEPS[step](stopped, sources)
    assert rows(stopped) == rows(gallery)
    check_cut(stopped, promise)


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Ext4]:
    with mount_ext4(tmp_path / "ext4") as disk:
        if disk is None:
            pytest.skip("nobody may mount a disk here")
        yield disk


@pytest.mark.parametrize("step", STEPS)
def test_a_real_disk_holds_what_a_step_has_done(step: str, made: Path, sources: Sources, ext4: Ext4) -> None:
    """Cut an ext4 when a step returns, and after the journal's next commit, which names files without their content."""
    gallery = ext4.path / "g"
    promise = Promise(has_ended=True)
    if step != "create":
        shutil.copytree(made, gallery)
        promise.uris = read_uris(gallery)
    if step == "erase":
        promise.erased = {uri for uri in promise.uris if PERSON in uri}
        promise.uris -= promise.erased
    ext4.sync()
    STEPS[step](gallery, sources)
    if step in ("create", "embed"):
        promise.uris = read_uris(gallery)
    for commit in (lambda: None, ext4.commit_journal):
        commit()
        with ext4.cut() as after:
            check_cut(after / "g", promise)


def test_a_search_resumes_after_a_cut(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished blocks are whole or not there, and they go when the output is on the disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    config = build(SearchConfig, {"run": {"runner": "inline", "block": 2}})
    state = SyncedState(disk)
    cuts: list[Path] = []

    def cut() -> None:
        for kind in CUTS:
            place = tmp_path / f"cut-{len(cuts)}"
            state.cut(place, kind, seed=len(cuts))
            cuts.append(place)

    with state.watch(monkeypatch):
        state.on_sync = cut
        search.run(config, str(made), str(made), str(disk / "out.parquet"))
        cut()
    expected = pq.read_table(disk / "out.parquet")
    assert expected.num_rows > 4
    resumed = 0
    for place in cuts:
        out = place / "out.parquet"
        if not out.exists():
            resumed += 1
            search.run(config, str(made), str(made), str(out))
        assert pq.read_table(out).equals(expected)
    assert 2 < resumed < len(cuts)


def test_a_report_is_whole_after_a_cut(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new report takes the place of the old one when it is on the disk, and the old one goes after that."""
    disk = tmp_path / "disk"
    shutil.copytree(made, disk / "g")
    config = build(DedupConfig)
    dedup.run(config, str(disk / "g"))
    sizes = {path.name: path.stat().st_size for path in (disk / "g" / "reports" / "dedup").iterdir()}
    state = SyncedState(disk)
    cuts = 0

    def cut() -> None:
        nonlocal cuts
        place = tmp_path / "cut"
        state.cut(place, CUTS[cuts % len(CUTS)], seed=cuts)
        report = place / "g" / "reports" / "dedup"
        folder = report if report.is_dir() else Path(f"{report}.old")
        assert {path.name for path in folder.iterdir()} == set(sizes)
        for path in folder.iterdir():
            assert path.stat().st_size == sizes[path.name]
        shutil.rmtree(place)
        cuts += 1

    with state.watch(monkeypatch):
        state.on_sync = cut
        dedup.run(config, str(disk / "g"))
        cut()
    assert cuts > 3
