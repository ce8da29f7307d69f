"""Erasures that hide at once and purge later: no reader returns the rows, and by the stated time none is on the disk."""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from erasures import name_of, never_found, reported, sound, table_rows, traces_of, tree, up_to_date
from histories import open_as_stock
from typer.testing import CliRunner

from facepipe.config import build
from facepipe.erasure import purges, receipt
from facepipe.erasure.proof import prove_erasure
from facepipe.erasure.selection import Selection
from facepipe.errors import ConfigError, GalleryError
from facepipe.gallery import Gallery, hidden
from facepipe.gallery.commits import rewrite as rewrites
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord
from facepipe.gallery.commits.rewrite import write_new_rows
from facepipe.gallery.maintenance.compact import CompactConfig
from facepipe.storage.lease import hold_lease
from jobs.cli import app
from pipelines import compact, erase
from pipelines.nightly.config import NightlyConfig
from pipelines.nightly.guard import RETENTION, NightGuard, PlannedErasure
from pipelines.nightly.pipeline import NightSummary, _Night

PERSON = Selection(identities=(name_of(9),))
OTHER = Selection(identities=(name_of(10),))


class StoppedError(Exception):
    """Stands for a process that is killed."""


@pytest.fixture(autouse=True)
def always_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare files however small they are."""
    monkeypatch.setattr(rewrites, "_SPARED_FROM_BYTES", 0)
    monkeypatch.setattr(rewrites, "_SPARED_SHARE", 0.9)
    monkeypatch.setattr(rewrites, "_MOST_DELETED", 0.9)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "g"
    reported(path, with_reports=False)
    shutil.rmtree(path / "runs", ignore_errors=True)
    return path


@pytest.fixture
def gallery(made: Path, tmp_path: Path) -> Gallery:
    shutil.copytree(made, tmp_path / "g")
    return Gallery(str(tmp_path / "g"))


@pytest.fixture
def set_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[timedelta], None]]:
    """Move the clock by which purges are due."""

    def move(by: timedelta) -> None:
        class Moved(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.now(tz) + by

        monkeypatch.setattr(purges, "datetime", Moved)

    return move


def prove(gallery: Gallery, path: str) -> str:
    return prove_erasure(Gallery(gallery.path), receipt.load_receipt(path)).state


def list_files(gallery: Gallery) -> set[str]:
    return set(Gallery(gallery.path).list_paths())


def test_rows_are_hidden_at_once_and_gone_after_the_purge(tmp_path: Path) -> None:
    gallery = reported(tmp_path / "g")
    traces, stay = traces_of(gallery, PERSON)
    files = list_files(gallery)
    opened = Gallery(gallery.path)
    (path,) = erase.run(PERSON, gallery.path, purge_days=7).receipts
    # Hidden: no file of the table was written anew, and nobody returns the rows.
    assert list_files(gallery) == files
    assert table_rows(gallery) == stay
    never_found(gallery, traces)
    up_to_date(gallery)
    stock = open_as_stock(Gallery(gallery.path))
    assert stock.version() == Gallery(gallery.path).version
    written = receipt.load_receipt(path)
    assert datetime.fromisoformat(written.purge_due) - datetime.fromisoformat(written.at) == timedelta(days=7)
    assert set(written.files_before) <= files
    assert prove(gallery, path) == "hidden"
    # A gallery that was opened before does not know that the rows are deleted.
    with pytest.raises(GalleryError, match="open the gallery again"):
        opened.to_arrow()
    # Only the table's files and its log hold anything, and no list of names is left.
    left = traces.anywhere({name: data for name, data in tree(gallery.path).items() if not name.startswith("runs/")})
    assert {name.split("/")[0] for name in left} == {"faces"}
    # Purged: as after an erasure at once.
    assert erase.purge(gallery.path).purged == len(written.files_before)
    assert prove(gallery, path) == "gone"
    assert purges.list_purges(gallery.path) == []
    sound(gallery, traces, stay, [path])


def test_hidden_and_purged_is_what_an_erasure_at_once_leaves(gallery: Gallery, tmp_path: Path) -> None:
    shutil.copytree(gallery.path, tmp_path / "other")
    other = Gallery(str(tmp_path / "other"))
    (at_once,) = erase.run(PERSON, other.path).receipts
    (later,) = erase.run(PERSON, gallery.path, purge_days=3).receipts
    erase.purge(gallery.path)
    assert table_rows(gallery) == table_rows(other)
    first = receipt.load_receipt(at_once)
    second = receipt.load_receipt(later)
    for name in ("images", "faces", "rows", "files_before", "vectors", "index_before", "reports"):
        assert getattr(first, name) == getattr(second, name), name
    assert not first.purge_due


def test_a_file_is_written_once_for_several_erasures(gallery: Gallery) -> None:
    rows = table_rows(gallery)
    paths = [erase.run(selection, gallery.path, purge_days=7).receipts[0] for selection in (PERSON, OTHER)]
    concerned = {name for path in paths for name in receipt.load_receipt(path).files_before}
    assert len(concerned) < sum(len(receipt.load_receipt(path).files_before) for path in paths)
    assert erase.purge(gallery.path).purged == len(concerned)
    assert [prove(gallery, path) for path in paths] == ["gone", "gone"]
    assert table_rows(gallery) == [row for row in rows if row["identity"] not in {name_of(9), name_of(10)}]


def test_a_compaction_purges_what_is_due_before_the_next_night(
    gallery: Gallery, set_time: Callable[[timedelta], None]
) -> None:
    (path,) = erase.run(PERSON, gallery.path, purge_days=7).receipts
    config = CompactConfig(fewest=1000)
    compact.run(config, gallery.path)
    assert prove(gallery, path) == "hidden"
    set_time(timedelta(days=5, hours=23))
    compact.run(config, gallery.path)
    assert prove(gallery, path) == "hidden"
    # Another erasure, which is due later, is done with it if it concerns the same files.
    (later,) = erase.run(OTHER, gallery.path, purge_days=20).receipts
    set_time(timedelta(days=6, hours=1))
    compact.run(config, gallery.path)
    set_time(timedelta(0))
    assert prove(gallery, path) == "gone"
    files = set(receipt.load_receipt(later).files_before)
    is_shared = files <= set(receipt.load_receipt(path).files_before)
    assert prove(gallery, later) == ("gone" if is_shared else "hidden")


def test_what_is_overdue_is_said_until_it_is_purged(gallery: Gallery, set_time: Callable[[timedelta], None]) -> None:
    (path,) = erase.run(PERSON, gallery.path, purge_days=7).receipts
    for words in (["verify", gallery.path], ["verify", "--quick", gallery.path]):
        assert CliRunner().invoke(app, words).exit_code == 0
    set_time(timedelta(days=7, seconds=2))
    assert prove(gallery, path) == "left"
    for words in (["verify", gallery.path], ["verify", "--quick", gallery.path], ["doctor", gallery.path]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 1, words
        assert receipt.load_receipt(path).id in result.stdout
    # Another erasure removes what is overdue, even one of nobody.
    erase.resume(gallery.path)
    assert prove(gallery, path) == "gone"
    assert CliRunner().invoke(app, ["verify", "--quick", gallery.path]).exit_code == 0


STEPS = (
    "facepipe.erasure.steps.record_purge",
    "facepipe.erasure.steps.save_receipt",
    "facepipe.gallery.hidden.remove_request",
)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("is_after", [False, True])
def test_killed_before_the_purge_it_is_not_forgotten(
    step: str, is_after: bool, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces, stay = traces_of(gallery, PERSON)
    with monkeypatch.context() as patch:
        stop_at(patch, step, is_after=is_after)
        with pytest.raises(StoppedError):
            erase.run(PERSON, gallery.path, purge_days=7)
    assert table_rows(gallery) == stay
    (path,) = erase.resume(gallery.path).receipts
    assert prove(gallery, path) == "hidden"
    erase.purge(gallery.path)
    sound(gallery, traces, stay, [path])


PURGE_STEPS = (
    "facepipe.erasure.purges.purge_files",
    "facepipe.erasure.purges.follow_rewrite",
    "facepipe.erasure.purges.claim_unreferenced",
    "facepipe.erasure.purges.delete_files",
    "facepipe.erasure.purges.delete_history",
    "facepipe.erasure.purges._forget_purge",
)


@pytest.mark.parametrize("step", PURGE_STEPS)
@pytest.mark.parametrize("is_after", [False, True])
def test_killed_in_the_purge_it_is_repeated(
    step: str, is_after: bool, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces, stay = traces_of(gallery, PERSON)
    (path,) = erase.run(PERSON, gallery.path, purge_days=7).receipts
    with monkeypatch.context() as patch:
        stop_at(patch, step, is_after=is_after)
        with pytest.raises(StoppedError):
            erase.purge(gallery.path)
    assert table_rows(gallery) == stay
    # It is gone, or said not to be.
    assert prove(gallery, path) in {"hidden", "gone"}
    erase.purge(gallery.path)
    sound(gallery, traces, stay, [path])


def stop_at(patch: pytest.MonkeyPatch, step: str, *, is_after: bool) -> None:
    """Have a function fail as if the process were killed, before or after it has done its work."""
    module, _, name = step.rpartition(".")
    holder = importlib.import_module(module)
    real = getattr(holder, name)

    def stop(*values: Any, **named: Any) -> Any:
        if is_after:
            real(*values, **named)
        raise StoppedError

    patch.setattr(holder, name, stop)


@pytest.mark.parametrize("folder", ["index"])
def test_a_purge_waits_for_runs_that_read_old_files(
    folder: str, gallery: Gallery, set_time: Callable[[timedelta], None]
) -> None:
    (path,) = erase.run(PERSON, gallery.path, purge_days=7).receipts
    set_time(timedelta(days=8))
    with hold_lease(str(Path(gallery.path, folder)), folder):
        compact.run(CompactConfig(fewest=1000), gallery.path)
        assert erase.resume(gallery.path).purged == 0
        assert purges.describe_overdue(gallery.path)
    assert erase.resume(gallery.path).purged > 0
    assert prove(gallery, path) == "gone"


def test_rows_that_were_replaced_before_are_purged_as_well(gallery: Gallery) -> None:
    """Rows of the person that a relabelling has left on the disk under her name."""
    uris = [row["uri"] for row in table_rows(gallery) if row["identity"] == name_of(9)]
    Committer(Gallery(gallery.path), "run")([PartRecord(0, relabelled=dict.fromkeys(uris, "renamed"))], {})
    selection = Selection(identities=("renamed",))
    traces, stay = traces_of(Gallery(gallery.path), selection)
    (path,) = erase.run(selection, gallery.path, purge_days=7).receipts
    assert prove(gallery, path) == "hidden"
    erase.purge(gallery.path)
    sound(gallery, traces, stay, [path], quick=False)


def test_small_tables_are_written_anew_at_once(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrites, "_SPARED_FROM_BYTES", 1 << 30)
    traces, stay = traces_of(gallery, PERSON)
    (path,) = erase.run(PERSON, gallery.path, purge_days=7).receipts
    assert receipt.load_receipt(path).purge_due == ""
    assert purges.list_purges(gallery.path) == []
    sound(gallery, traces, stay, [path])


def test_an_erasure_hides_nothing_unless_it_is_asked_to(gallery: Gallery) -> None:
    traces, stay = traces_of(gallery, PERSON)
    (path,) = erase.run(PERSON, gallery.path).receipts
    assert not Gallery(gallery.path).deleted_rows
    sound(gallery, traces, stay, [path])


def test_images_that_return_are_not_hidden(gallery: Gallery) -> None:
    """Missing images may come back while their old rows are still on the disk."""
    rows = Gallery(gallery.path).to_arrow(where=f"identity = '{name_of(9)}'")
    erase.run(PERSON, gallery.path, may_return=True, purge_days=7)
    table = Gallery(gallery.path)
    Committer(table, "again").commit_actions(lambda: [write_new_rows(table, rows, "again")], {})
    assert len(Gallery(gallery.path).to_arrow(where=f"identity = '{name_of(9)}'")) == len(rows)
    assert hidden.list_requests(gallery.path) == ()
    erase.purge(gallery.path)
    assert len(Gallery(gallery.path).to_arrow(where=f"identity = '{name_of(9)}'")) == len(rows)


def test_the_command(gallery: Gallery) -> None:
    result = CliRunner().invoke(app, ["erase", gallery.path, "--identity", name_of(9), "--purge-days", "7", "--json"])
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    (path,) = summary["receipts"]
    assert list(summary["purges"]) == [receipt.load_receipt(path).id]
    result = CliRunner().invoke(app, ["verify", gallery.path, "--erased", path, "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["state"] == "hidden"
    assert json.loads(result.stdout)["purge_due"] == receipt.load_receipt(path).purge_due
    info = CliRunner().invoke(app, ["info", gallery.path])
    assert receipt.load_receipt(path).id in info.stdout
    assert CliRunner().invoke(app, ["erase", gallery.path, "--purge"]).exit_code == 0
    result = CliRunner().invoke(app, ["verify", gallery.path, "--erased", path, "--json"])
    assert (result.exit_code, json.loads(result.stdout)["state"]) == (0, "gone")


def test_a_night_hides_as_long_as_its_config_says_and_fails_if_a_purge_is_overdue(
    gallery: Gallery, set_time: Callable[[timedelta], None]
) -> None:
    config = build(NightlyConfig, {"gallery": gallery.path, "night": {"purge_days": 5}})
    night = _Night(config, NightSummary(gallery.path), NightGuard(gallery.path), lambda line: None)
    night._erase_planned(PlannedErasure(RETENTION, "corpus", PERSON, 1.0, "night.retention_at_most"))
    (purge,) = purges.list_purges(gallery.path)
    written = receipt.load_receipt(receipt.get_receipt_path(gallery.path, purge.id))
    assert purge.due == datetime.fromisoformat(written.at) + timedelta(days=5)
    night.check_purges()
    assert night.summary.failures == []
    set_time(timedelta(days=6))
    night.check_purges()
    assert purge.id in night.summary.failures[0]
    # The next night removes them before anything else.
    erase.resume(gallery.path)
    assert purges.describe_overdue(gallery.path) == []


@pytest.mark.parametrize("days", [-1.0, 28.5, float("nan")])
def test_other_times_are_refused(days: float, gallery: Gallery) -> None:
    before = tree(gallery.path)
    with pytest.raises(ConfigError, match="--purge-days"):
        erase.run(PERSON, gallery.path, purge_days=days)
    assert tree(gallery.path) == before


@pytest.mark.parametrize("data", [b"", b"{}", b'{"due": "2026-01-01", "files": []}', b'{"due": 1, "files": [2]}'])
def test_a_damaged_record_is_said(data: bytes, gallery: Gallery) -> None:
    (path,) = erase.run(PERSON, gallery.path, purge_days=7).receipts
    record = Path(path).with_suffix(".purge")
    record.write_bytes(data)
    for words in (["verify", "--quick", gallery.path], ["erase", gallery.path, "--purge"], ["compact", gallery.path]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 1, words
        assert record.name in result.stderr
    # Without its record the proof does not take the rows for hidden in time.
    record.unlink()
    assert prove(gallery, path) == "left"
    compact.run(CompactConfig(), gallery.path, everything=True)
