"""Erasure's parts: what a selection means, what a report loses, what is kept of the erased and what that tells."""

import csv
import fnmatch
import hashlib
import io
import json
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import compute as pc

from facepipe import storage
from facepipe.arrow import pack_arrays
from facepipe.curation.report_folders import MARKER, prepare_folder
from facepipe.erasure import pending
from facepipe.erasure.erased_data import ErasedData, find_role
from facepipe.erasure.foreign import iterate_chunks
from facepipe.erasure.pending import PendingErasure
from facepipe.erasure.receipt import Receipt
from facepipe.erasure.reports import scrub_report, scrub_reports
from facepipe.erasure.selection import Selection, compute_marks, select_images, translate_glob
from facepipe.errors import ConfigError, GalleryBusyError, GalleryError, StorageError
from facepipe.gallery import Gallery, erasure_key, hidden, suppressed
from facepipe.hashing import hash64_each
from facepipe.reports.html import write_report
from facepipe.reports.model import Face, Figure, Group, Report, ReviewTarget, Table
from facepipe.reports.questions import build_label_choices, build_pair_choices
from facepipe.schema import FACES, OK
from facepipe.stages.suppress import Suppress

NOW = datetime(2026, 11, 20, tzinfo=UTC)
URIS = [
    *("/a/1.jpg", "/a/2.jpg", "/a/[x].jpg", "/a/x.jpg", "/a/b+c (1).jpg", "/a/bbc (1).jpg", "file:///a/%FF.jpg"),
    *("/b/new\nline.jpg", "/b/1.jpg", "s3://k/é/1.jpg"),
]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Ten images of a face each, one of them with two, and a copy of the first without a label."""
    faces = Faces().draw(np.arange(12), 0)
    found = rows(np.arange(12), faces, 0).to_pylist()
    for n, uri in enumerate(URIS):
        found[n] |= {"uri": uri, "source": "a" if uri.startswith(("/a", "file:///a")) else "b", "identity": f"p{n}"}
        found[n]["ingested_at"] = NOW - timedelta(days=n)
    found[10] |= {"uri": URIS[8], "face_index": 1, "identity": "p8", "source": "b", "ingested_at": NOW - timedelta(8)}
    found[10]["image_id"] = found[8]["image_id"]
    found[11] |= {"uri": "/copy.jpg", "image_id": found[0]["image_id"], "identity": None, "source": "c"}
    found[3]["missing_since"] = NOW
    made = Gallery.create(str(tmp_path_factory.mktemp("g") / "g"), CONTRACT)
    append(made, [pa.Table.from_pylist(found[:6], FACES), pa.Table.from_pylist(found[6:], FACES)], "first")
    return Gallery(made.path)


def chosen(gallery: Gallery, **conditions: Any) -> list[str]:
    found = select_images(gallery, Selection(**conditions), NOW)
    assert found.images == len(set(found.uris.to_pylist()))
    held = gallery.to_arrow(["uri", "face_id", "identity"]).to_pylist()
    mine = [row for row in held if row["uri"] in set(found.uris.to_pylist())]
    assert sorted(found.faces.to_pylist()) == sorted(row["face_id"] for row in mine)
    assert found.rows == len(mine)
    assert found.names.to_pylist() == sorted({row["identity"] for row in mine if row["identity"]})
    return sorted(found.uris.to_pylist())


def test_by_uri_and_by_content(gallery: Gallery) -> None:
    first = gallery.to_arrow(["image_id"], "uri = '/a/1.jpg'")["image_id"][0].as_py()
    assert chosen(gallery, images=("/a/1.jpg",)) == ["/a/1.jpg", "/copy.jpg"]
    assert chosen(gallery, images=(first,)) == ["/a/1.jpg", "/copy.jpg"]
    assert chosen(gallery, images=(first, "/a/2.jpg", "/a/2.jpg")) == ["/a/1.jpg", "/a/2.jpg", "/copy.jpg"]
    assert chosen(gallery, images=("/no/such", "0" * 31 + "f", "")) == []


def test_by_person_source_age_and_absence(gallery: Gallery) -> None:
    assert chosen(gallery, identities=("p0",)) == ["/a/1.jpg", "/copy.jpg"]
    assert chosen(gallery, identities=("p1", "p8", "nobody")) == ["/a/2.jpg", "/b/1.jpg"]
    assert chosen(gallery, identities=("p",)) == chosen(gallery, source="") == []
    assert chosen(gallery, source="b") == sorted(URIS[7:])
    assert chosen(gallery, older_than_days=7.5) == sorted(URIS[8:])
    assert chosen(gallery, older_than_days=0) == sorted(URIS[1:])
    assert chosen(gallery, missing=True) == [URIS[3]]
    assert chosen(gallery, source="a", older_than_days=2.5, uri="*.jpg") == sorted(URIS[3:7])
    assert chosen(gallery, identities=("p1",), source="b") == []


def test_by_ids(gallery: Gallery) -> None:
    (face,) = gallery.to_arrow(["face_id"], "uri = '/b/1.jpg' and face_index = 1")["face_id"].to_pylist()
    first = gallery.to_arrow(["image_id"], "uri = '/a/1.jpg'")["image_id"][0].as_py()
    assert chosen(gallery, ids=(str(face),)) == ["/b/1.jpg"], "with the other face in it"
    assert chosen(gallery, ids=(str(face), first)) == ["/a/1.jpg", "/b/1.jpg", "/copy.jpg"]
    assert chosen(gallery, ids=("1", str(1 << 63), "9" * 40, "f" * 32)) == []
    for wrong in ("abc", "-1", "1.5", "g" * 32):
        with pytest.raises(ConfigError, match="neither a face id nor an image id"):
            chosen(gallery, ids=(wrong,))


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "*",
            "/a/*",
            "/?/1.jpg",
            "*1*",
            "*a*.*",
            "/a/[[]x].jpg",
            "/a/[x].jpg",
            "/a/[!x]*",
            "/a/b+c (1).jpg",
            "/a/b+*",
        ),
        *(
            "/b/new\nline.jpg",
            "*\n*",
            "*é*",
            "file:///a/%FF*",
            "/a/[0-9].jpg",
            "/a/[3-1].jpg",
            "/a/[!3-1].jpg",
            "[",
            "[]",
        ),
        *(
            "*.jp",
            "a/1.jpg",
            "/A/1.jpg",
            "/a/[a-cx].jpg",
            "*[]]*",
            "*[+]*",
            "*[!-a]?jpg",
            "*[^a]*",
            "(?i)*",
            "*|*",
            "/a/\\*",
        ),
        *("*\\d*", "$", "*[a-]*", "*[\\]*", "[!]", "*a*1*j*g", "**/1.jpg"),
    ],
)
def test_patterns_are_those_of_the_shell(gallery: Gallery, pattern: str) -> None:
    held = {*URIS, "/copy.jpg"}
    wanted = sorted(uri for uri in held if fnmatch.fnmatchcase(uri, pattern))
    assert chosen(gallery, uri=pattern) == wanted
    hostile = [*URIS, "[", "[]", "]", "^a", "\\", "/a/\\x", "-", "(?i)", "a|b", "", "$"]
    found = pc.match_substring_regex(pa.array(hostile), f"(?s)^{translate_glob(pattern)}$").to_pylist()
    assert found == [fnmatch.fnmatchcase(text, pattern) for text in hostile]


def test_what_says_nothing_is_refused(gallery: Gallery) -> None:
    for nothing in ({}, {"images": ()}, {"missing": False}):
        with pytest.raises(ConfigError, match="say what to erase"):
            chosen(gallery, **nothing)
    for age in (-1, float("nan"), float("inf"), 1e12):
        with pytest.raises(ConfigError, match="invalid age"):
            chosen(gallery, older_than_days=age)
    assert Selection(older_than_days=0.0, images=("x",)).list_conditions() == ["images", "older_than_days"]


def test_a_table_that_cannot_be_read_is_said(gallery: Gallery, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(gallery.path, tmp_path / "g")
    for file in (tmp_path / "g" / "faces").glob("*.parquet"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(StorageError, match="cannot read the table"):
        select_images(Gallery(str(tmp_path / "g")), Selection(source="a"))


# ------------------------------------------------------------------ what is kept


def test_pending_and_receipt(gallery: Gallery, tmp_path: Path) -> None:
    path = str(tmp_path)
    chosen_by = Selection(identities=("p8",), older_than_days=0.5)
    what = select_images(gallery, Selection(identities=("p8",)))
    first = PendingErasure(Receipt("20261101T000000-aaaaaa", "id", "2026", ["identities"], "0"), what, chosen_by, NOW)
    second = PendingErasure(Receipt("20261101T000001-bbbbbb", "id", "2026", ["identities"], "0"), what)
    for made in (second, first):
        pending.write_pending(path, made)
    assert hidden.list_requests(path) == (second.id, first.id)
    one, two = pending.read_unfinished(path)
    assert (one.receipt, two.receipt) == (first.receipt, second.receipt)
    assert (one.selection, one.requested, two.selection) == (chosen_by, NOW, None)
    for name in ("uris", "contents", "faces", "names", "marks"):
        assert getattr(one.selected, name).equals(getattr(what, name))
    # Each part writes its own fields of the receipt, so that two runs can work on one erasure.
    first.receipt.files_before["x"] = "y"
    first.receipt.vectors = 3
    pending.save_progress(path, first.receipt, pending.ROWS, is_done=True)
    one, _ = pending.read_unfinished(path)
    assert (one.receipt.files_before, one.receipt.vectors, one.done) == ({"x": "y"}, 0, {pending.ROWS})
    pending.save_progress(path, first.receipt, pending.INDEX)
    assert pending.update_progress(path, one)
    assert (one.receipt, one.done) == (first.receipt, {pending.ROWS})
    Path(tmp_path, "erased", f"{first.id}.{pending.ROWS}.state").write_bytes(b"{")
    assert pending.read_unfinished(path)[0].done == set(), "the steps are repeated"
    Path(tmp_path, "erased", "20261101T000002-cccccc.pending.new").write_bytes(b"torn")
    for made in (first, second):
        pending.delete_pending(path, made.receipt)
        assert not pending.update_progress(path, made)
    assert sorted(os.listdir(tmp_path / "erased")) == [".guard", "hidden.list", "hidden.list.guard"]
    assert hidden.list_requests(path) == ()


def test_progress_of_an_erasure_that_is_complete_is_not_left_behind(gallery: Gallery, tmp_path: Path) -> None:
    """A run that found nothing to do says so after another one has completed the erasure."""
    path = str(tmp_path)
    what = select_images(gallery, Selection(identities=("p8",)))
    first = PendingErasure(Receipt("20261101T000000-aaaaaa", "id", "2026", ["identities"], "0"), what)
    pending.write_pending(path, first)
    pending.delete_pending(path, first.receipt)
    pending.save_progress(path, first.receipt, pending.REPORTS, is_done=True)
    assert not list(Path(tmp_path, "erased").glob("*.state"))
    # What was left in an object store, which has no guard, goes with the next erasure.
    Path(tmp_path, "erased", f"{first.id}.reports.state").write_bytes(b"{}")
    second = PendingErasure(Receipt("20261101T000001-bbbbbb", "id", "2026", ["identities"], "0"), what)
    third = PendingErasure(Receipt("20261101T000002-cccccc", "id", "2026", ["identities"], "0"), what)
    for made in (second, third):
        pending.write_pending(path, made)
        pending.save_progress(path, made.receipt, pending.ROWS)
    pending.delete_pending(path, second.receipt)
    assert [file.name for file in Path(tmp_path, "erased").glob("*.state")] == [f"{third.id}.rows.state"]


def test_an_erasure_that_an_older_facepipe_began(gallery: Gallery, tmp_path: Path) -> None:
    """It has no conditions and one file of progress, and readers were not told."""
    what = select_images(gallery, Selection(identities=("p8",)))
    begun = Receipt("20261101T000000-aaaaaa", "id", "2026", ["identities"], "0", hashes={"uris": ["0" * 16]})
    parts = [
        pa.table({"kind": pa.repeat(name, len(values)), "value": values.cast(pa.string())})
        for name, values in ((name, getattr(what, name)) for name in ("uris", "contents", "faces", "names", "marks"))
    ]
    head = {"receipt": begun.to_dict(), "version": what.version, "rows": what.rows}
    folder = tmp_path / "erased"
    folder.mkdir()
    table = pa.concat_tables(parts).replace_schema_metadata({"erasure": json.dumps(head)})
    pq.write_table(table, folder / f"{begun.id}.pending")
    progress = {**begun.to_dict(), "hashes": {}, "files_before": {"x": "y"}, "vectors": 3}
    (folder / f"{begun.id}.state").write_text(json.dumps(progress))
    (erasure,) = pending.read_unfinished(str(tmp_path))
    assert (erasure.receipt.files_before, erasure.receipt.vectors, erasure.done) == ({"x": "y"}, 3, set())
    assert erasure.selected.uris.equals(what.uris)
    assert erasure.selection is None
    pending.restore_list(str(tmp_path))
    assert hidden.HiddenWatch(str(tmp_path)).read().uris.equals(what.uris)
    pending.delete_pending(str(tmp_path), erasure.receipt)
    assert not list(folder.glob("*.state"))


def test_the_list_of_hidden_images(tmp_path: Path, gallery: Gallery) -> None:
    path = str(tmp_path)
    watch = hidden.HiddenWatch(path)
    nothing = watch.read()
    assert not nothing
    assert watch.read() is nothing
    what = select_images(gallery, Selection(identities=("p8",)))
    erasure = PendingErasure(Receipt("a", "id", "2026", [], "0"), what)
    pending.write_pending(path, erasure)
    seen = watch.read()
    assert seen.uris.equals(what.uris)
    assert seen.faces.tolist() == sorted(what.faces.to_pylist())
    assert watch.read() is seen
    pending.write_indexed(path, erasure, np.array([7, 5]))
    assert watch.read().faces.tolist() == sorted([*what.faces.to_pylist(), 5, 7])
    # What is no longer there hides nothing; what cannot be read stops readers.
    Path(tmp_path, "erased", "a.pending").unlink()
    hidden.add_request(path, "a")
    assert not watch.read()
    for damage in (b"", b"[]", b'{"requests": [1]}', b'{"requests": ["../x"]}'):
        Path(tmp_path, "erased", "hidden.list").write_bytes(damage)
        with pytest.raises(GalleryError, match="damaged"):
            watch.read()
    Path(tmp_path, "erased", "hidden.list").unlink()
    assert not watch.read()


def test_a_damaged_pending_file_stops_and_is_said(tmp_path: Path) -> None:
    suppressed.write_erased_file(str(tmp_path), "x.pending", b"PAR1")
    with pytest.raises(GalleryError, match="damaged"):
        pending.read_unfinished(str(tmp_path))


def find(path: str, texts: str) -> list[bool]:
    return suppressed.read_uris(path).contains(hash64_each(texts)).tolist()


SECRET = "0123456789abcdef" * 2


def test_suppressed(tmp_path: Path) -> None:
    path = str(tmp_path)
    assert not suppressed.read_uris(path).size
    assert find(path, "abcd") == [False] * 4
    suppressed.suppress_images(path, "one", ["b", "a", "a"], [])
    suppressed.suppress_images(path, "two", ["c"], ["0" * 32])
    assert find(path, "abcd") == [True, True, True, False]
    assert suppressed.read_uris(path).size == 3
    assert suppressed.read_contents(path).contains(hash64_each(["0" * 32, "a"])).tolist() == [True, False]
    suppressed.release_images(path, "one")
    assert find(path, "abcd") == [False, False, True, False]


def test_lists_say_nothing_without_their_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the same uri had the same hash in every gallery, and guesses could be tested with a list alone."""
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    uris = [f"/lfw/George_W_Bush/{n:04d}.jpg" for n in range(30)]
    for path in (one, two):
        suppressed.suppress_images(path, "x", uris, uris)
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
    suppressed.suppress_images(three, "x", uris, uris)
    files = [Path(path, "erased", name).read_bytes() for path in (one, two, three) for name in ("x.uris", "x.contents")]
    words = [{data[at : at + 8] for at in range(32, len(data), 8)} for data in files]
    guesses = {int(value).to_bytes(8, "little") for value in hash64_each(uris)}
    assert all(len(found) == len(uris) for found in words)
    assert all(not found & guesses for found in words)
    assert not words[0] & words[2], "not linkable"
    assert not words[0] & words[4]
    # With the salt, which lies in the gallery, guesses of the second can be tested. With the key outside they cannot.
    salt = Path(three, "erased", "salt").read_bytes()
    assert not words[4] & {hashlib.blake2b(guess, digest_size=8, key=salt).digest() for guess in guesses}


def test_lists_of_older_versions_are_read_and_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = str(tmp_path), tmp_path / "erased"
    folder.mkdir()
    (folder / "old.uris").write_bytes(np.sort(hash64_each("ab")).astype("<u8").tobytes())
    (folder / "old.contents").write_bytes(b"")
    assert find(path, "abcde") == [True, True, False, False, False]
    suppressed.suppress_images(path, "new", ["c"], [])
    assert find(path, "abcde") == [True, True, True, False, False]
    # A crash between two lists leaves both forms, and the rest is done the next time.
    real = storage.replace

    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "replace", fail)
        with pytest.raises(StorageError):
            suppressed.migrate_lists(path)
    assert storage.replace is real
    assert suppressed.migrate_lists(path) == 2
    assert suppressed.migrate_lists(path) == 0
    assert not len(suppressed.read_uris(path).plain)
    assert find(path, "abcde") == [True, True, True, False, False]
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
    suppressed.suppress_images(path, "newer", ["d"], [])
    assert find(path, "abcde") == [True, True, True, True, False]
    assert suppressed.migrate_lists(path) == 4
    assert (len(suppressed.read_uris(path).keyed), len(suppressed.read_uris(path).salted)) == (4, 0)
    assert find(path, "abcde") == [True, True, True, True, False]
    # A run without the key adds a list that can be tested, until the next erase that has the key.
    monkeypatch.delenv("FACEPIPE_ERASURE_KEY")
    suppressed.suppress_images(path, "newest", ["e"], [])
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
    assert suppressed.migrate_lists(path) == 2
    assert suppressed.migrate_lists(path) == 0
    assert find(path, "abcdef") == [True, True, True, True, True, False]


def test_lists_that_cannot_be_read_let_nobody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = str(tmp_path), tmp_path / "erased"
    suppressed.suppress_images(path, "salted", ["a"], [])
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
    suppressed.suppress_images(path, "keyed", ["b"], [])
    assert find(path, "ab") == [True, True]
    for secret, match in (("", "needs the key"), ("another key of some length", "another key")):
        monkeypatch.setenv("FACEPIPE_ERASURE_KEY", secret)
        with pytest.raises(ConfigError, match=match):
            suppressed.read_uris(path)
    # A worker on another machine is given the secret, and needs no key.
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
    secret_of_lists = suppressed.read_secret()
    monkeypatch.delenv("FACEPIPE_ERASURE_KEY")
    assert suppressed.read_uris(path, secret_of_lists).contains(hash64_each("ab")).all()
    assert SECRET not in repr(Suppress(path, secret_of_lists))
    (folder / "keyed.uris").unlink()
    (folder / "keyed.contents").unlink()
    salt = (folder / "salt").read_bytes()
    (folder / "salt").write_bytes(salt[::-1])
    with pytest.raises(GalleryError, match="another salt"):
        suppressed.read_uris(path)
    (folder / "salt").write_bytes(salt[:5])
    with pytest.raises(GalleryError, match="damaged"):
        suppressed.read_uris(path)
    (folder / "salt").write_bytes(salt)
    (folder / "salted.uris").write_bytes((folder / "salted.uris").read_bytes()[:-3])
    with pytest.raises(GalleryError, match="damaged"):
        suppressed.read_uris(path)


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert erasure_key.read_key() is None
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", "short")
    with pytest.raises(ConfigError, match="5 bytes"):
        erasure_key.read_key()
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
    key = erasure_key.read_key()
    assert key is not None
    assert SECRET not in repr(key)
    file = tmp_path / "key"
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY_FILE", str(file))
    with pytest.raises(ConfigError, match="both set"):
        erasure_key.read_key()
    monkeypatch.delenv("FACEPIPE_ERASURE_KEY")
    with pytest.raises(ConfigError, match="cannot read"):
        erasure_key.read_key()
    file.write_text("")
    with pytest.raises(ConfigError, match="0 bytes"):
        erasure_key.read_key()
    file.write_text(f"{SECRET}\n")
    assert erasure_key.read_key() == key
    assert erasure_key.require_key(key.fingerprint, "it") == key
    with pytest.raises(ConfigError, match="another key"):
        erasure_key.require_key("0" * 16, "it")


def test_suppress_hides_bytes_and_nothing_else(tmp_path: Path) -> None:
    suppressed.suppress_images(str(tmp_path), "one", [], ["a", "c"])
    table = pa.table(
        {
            "bytes": pack_arrays([b"1", b"2", None, None]),
            "image_id": pa.array(["a", "b", "c", None]),
            "status": pa.array([OK, OK, "too_large", "read_error"]),
            "other": pa.array([1, 2, 3, 4]),
        }
    )
    stage = Suppress(str(tmp_path))
    stage.setup()
    found = stage(table)
    assert found["status"].to_pylist() == ["erased", OK, "too_large", "read_error"]
    assert found["bytes"].to_pylist() == [None, b"2", None, None]
    assert found["other"].to_pylist() == [1, 2, 3, 4]
    assert stage(table.slice(1, 1)).equals(table.slice(1, 1))
    sliced = stage(pa.concat_tables([table.slice(1, 1), table.slice(0, 1)]))
    assert (sliced["status"].to_pylist(), sliced["bytes"].to_pylist()) == ([OK, "erased"], [b"2", None])
    assert stage(table.slice(0, 0)).num_rows == 0


# ------------------------------------------------------------------ reports

JANE, MINE, OTHER = 'J, "x"\n<b>', "/a/jane 1\n.jpg", "/a/bob.jpg"
VECTORS = Faces().draw(np.arange(4), 0)


def gone(names: set[str] = frozenset({JANE}), uris: set[str] = frozenset({MINE})) -> ErasedData:  # type: ignore[assignment]
    return ErasedData(
        frozenset(uris), frozenset(names), frozenset({"f" * 32}), np.array([5, 9]), np.sort(compute_marks(VECTORS[:1]))
    )


def make_report_folder(folder: Path, report: str) -> Path:
    """Make an empty folder of a report, with its marker."""
    path = folder / report
    path.mkdir(exist_ok=True)
    prepare_folder(str(path), report)
    return path


def scrub(folder: Path, erased: ErasedData | None = None) -> set[str]:
    """Scrub a report's folder that holds files of facepipe alone; return what was changed or deleted."""
    foreign: list[str] = []
    changed = set(scrub_report(str(folder), erased or gone(), foreign.append))
    assert foreign == []
    return changed


def test_a_run_that_was_overtaken_brings_nothing_back(tmp_path: Path) -> None:
    """A run may be paused right before its copy takes the report's place, and another one erases more meanwhile."""
    folder = make_report_folder(tmp_path, "dedup")
    (folder / "keep.txt").write_text(f"{OTHER}\n/a/ann.jpg\n/a/tom.jpg\n")
    (folder / "notes.txt").write_text("mine")

    def erase_more() -> None:
        _, changed = scrub_reports(str(tmp_path), gone(uris={OTHER, "/a/ann.jpg"}), print)  # the copy, and the list
        assert changed == "dedup/keep.txt"

    with pytest.raises(StorageError, match="cannot clean"):
        list(scrub_reports(str(tmp_path), gone(uris={OTHER}), print, erase_more))
    assert {name: (folder / name).read_text() for name in ("keep.txt", "notes.txt")} == {
        "keep.txt": "/a/tom.jpg\n",
        "notes.txt": "mine",
    }
    assert os.listdir(tmp_path) == ["dedup"]


def test_a_report_is_cleaned_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = make_report_folder(tmp_path, "dedup")
    lists = [folder / "keep.txt", folder / "drop.txt"]
    for path in lists:
        path.write_text(f"{OTHER}\n/a/tom.jpg\n")
    (folder / "keep.txt.new").write_text(OTHER)

    def lose() -> None:
        raise GalleryBusyError("was lost")

    with pytest.raises(GalleryBusyError):
        list(scrub_reports(str(tmp_path), gone(uris={OTHER}), print, lose))
    assert [path.read_text() for path in lists] == [f"{OTHER}\n/a/tom.jpg\n"] * 2
    assert scrub(folder, gone(uris={OTHER})) == {"drop.txt", "keep.txt"}
    assert [path.read_text() for path in lists] == ["/a/tom.jpg\n"] * 2
    assert sorted(os.listdir(folder)) == ["drop.txt", MARKER, "keep.txt"]


def test_roles() -> None:
    roles = {
        name: find_role(name) for name in ("uri_a", "path", "identity_0", "left", "face_id_b", "medoid", "decision")
    }
    assert list(roles.values()) == ["uris", "uris", "names", "names", "ids", "ids", None]
    assert find_role("anything else") == "any"


def table_in(folder: Path, name: str, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


def test_tables(tmp_path: Path) -> None:
    columns = {
        "face_id": [1, 5, 3, 4],
        "uri": [OTHER, "/x", MINE, OTHER],
        "identity": ["bob", "bob", "bob", JANE],
        "decision": [JANE, "keep", "keep", "keep"],
        "nearest_identity": [JANE, None, "bob", "bob"],
    }
    folder = make_report_folder(tmp_path, "clean")
    path = table_in(folder, "decisions.parquet", **columns)
    same = table_in(folder, "identities.parquet", face_id=[1, 2], size=[5, 9], note=["a", "b"])
    other = table_in(folder, "merges.parquet", note=["a", JANE], image_id=[None, "f" * 32])
    before = same.read_bytes()
    assert scrub(folder) == {"decisions.parquet", "merges.parquet"}
    (row,) = pq.read_table(path).to_pylist()
    assert row == {"face_id": 1, "uri": OTHER, "identity": "bob", "decision": JANE, "nearest_identity": None}
    assert pq.read_table(other).to_pylist() == [{"note": "a", "image_id": None}]
    assert same.read_bytes() == before
    assert scrub(folder) == set()


def test_a_person_stays_without_its_best_face(tmp_path: Path) -> None:
    """The table of persons loses the face and names of erased persons; the ids of others stay."""
    folder = make_report_folder(tmp_path, "cluster")
    columns = {
        "person": [3, 4, 5],
        "cluster": [0, 1, None],
        "size": [7, 2, 0],
        "medoid": [5, 1, None],
        "name": ["bob", JANE, "ann"],
    }
    path = folder / "persons.parquet"
    pq.write_table(pa.table(columns), path)
    assert scrub(folder) == {"persons.parquet"}
    assert pq.read_table(path).to_pylist() == [
        {"person": 3, "cluster": 0, "size": 7, "medoid": None, "name": "bob"},
        {"person": 5, "cluster": None, "size": 0, "medoid": None, "name": "ann"},
    ]


def test_lists(tmp_path: Path) -> None:
    clean = make_report_folder(tmp_path, "clean")
    dedup = make_report_folder(tmp_path, "dedup")
    with open(clean / "clean.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("path", "identity", "label", "face_id"), (OTHER, "b", 5, 1), (MINE, JANE, 0, 5), ("x\ny", "n", 9, 2)]
        )
    with open(clean / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("label", "identity"), (0, JANE), (1, "identity"), (2, "b"), (3, "'=1+1")])
    lines = {
        dedup / "keep.txt": ["/r/a/1.jpg", OTHER],
        clean / "clean.txt": ["/r/q.jpg 3", "/r/a/1.jpg 4"],
        clean / "msceleb.txt": ["q.jpg 3", "a/1.jpg 4"],
    }
    for path, texts in lines.items():
        path.write_text("\n".join(texts) + "\n")
    erased = gone({JANE, "identity", "5", "=1+1"}, {MINE, "/r/a/1.jpg"})
    assert scrub(clean, erased) == {"clean.csv", "labels.csv", "clean.txt", "msceleb.txt"}
    assert scrub(dedup, erased) == {"keep.txt"}
    with open(clean / "clean.csv", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["path", OTHER, "x\ny"]
    assert (clean / "labels.csv").read_bytes() == b"label,identity\r\n2,b\r\n"
    assert [path.read_text() for path in lines] == [f"{OTHER}\n", "/r/q.jpg 3\n", "q.jpg 3\n"]
    assert not list(tmp_path.rglob("*.new"))


def page(folder: Path, title: str, groups: list[Group], **more: Any) -> Path:
    path = folder / "report.html"
    write_report(Report(title, groups=groups, groups_total=len(groups), **more), path)
    return path


def shown(path: Path) -> list[dict[str, Any]]:
    found = re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    groups: list[dict[str, Any]] = json.loads(found[1])
    assert f'"total":{len(groups)}' in path.read_text()
    return groups


def faces(*uris: str) -> tuple[Face, ...]:
    return tuple(Face(uri, (("label", "bob"),), b"") for uri in uris)


def test_pages(tmp_path: Path) -> None:
    figures = (("noise", "0.9"), (JANE, "1.2"))
    made = [
        Group(f"{JANE}: two persons?", "split", (), faces(OTHER)),
        Group(f"bob and {JANE}: one person?", "merge", (), faces(OTHER)),
        Group("bob: fits another identity", "relabel", figures, faces(OTHER, MINE)),
        Group("only her", "x", (), faces(MINE)),
        Group("bob: \u00e9 </script>", "x", (("a", "b"),), faces(OTHER)),
    ]
    folder = make_report_folder(tmp_path, "clean")
    path = page(folder, "Noisy identities", made)
    assert scrub(folder) == {"report.html"}
    first, second = shown(path)
    assert (first["title"], first["figures"], [f["uri"] for f in first["faces"]]) == (
        made[2].title,
        [["noise", "0.9"]],
        [OTHER],
    )
    assert second["title"] == made[4].title
    assert scrub(folder) == set()


def test_questions_on_pages(tmp_path: Path) -> None:
    """Names and ids also stand in the answers to the questions of a page."""
    erased_id = int(gone().faces[0])
    known = Face(OTHER, (("label", "bob"),), b"", "", 1, "bob")
    hers = Face(OTHER, (), b"", "", erased_id, "")
    made = [
        Group("bob: is this x?", "relabel", (), (known,), choices=build_label_choices(1, "bob", JANE, suggests_other=True)),
        Group(f"bob: is this {JANE}?", "relabel", (), (known,)),
        Group("bob and eve: one person?", "merge", (), (known, hers), distances=(0.5,),
              choices=build_pair_choices(known, hers, suggests_one=True)),
        Group("bob: is this eve?", "relabel", (), (known,), choices=build_label_choices(1, "bob", "eve", suggests_other=True)),
    ]  # fmt: skip
    folder = make_report_folder(tmp_path, "clean")
    path = page(folder, "Noisy identities", made, review=ReviewTarget("g", "clean", 1))
    assert scrub(folder) == {"report.html"}
    assert JANE not in path.read_text()
    assert json.dumps(JANE)[1:-1] not in path.read_text()
    assert f'"{erased_id}"' not in path.read_text()
    first, second, third = shown(path)
    assert (first["choices"], second["choices"], len(second["faces"])) == ([], [], 1)
    assert "distances" not in second
    assert [choice["key"] for choice in third["choices"]] == ["a", "r", "o"]
    assert scrub(folder) == set()


def test_names_on_the_page_of_two_galleries(tmp_path: Path) -> None:
    table = Table("Persons in both (the first 2 of 2)", ("here", "there"), ((JANE, "a"), ("b", "c")))
    groups = [
        Group(f"bob here, {JANE} there", "person in both", (), faces(OTHER)),
        Group("group 1", "x", (), faces(OTHER)),
    ]
    folder = make_report_folder(tmp_path, "overlap")
    path = page(folder, "What two galleries share", groups, tables=(table,))
    assert scrub(folder) == {"report.html"}
    assert [group["title"] for group in shown(path)] == ["group 1"]
    assert "J, &#34;x" not in path.read_text()


def test_tables_on_pages(tmp_path: Path) -> None:
    table = Table(
        "Shared identities (the first 3 of 3)", ("here", "there"), ((JANE, "a"), ("b", "c"), ("\u202ed", "12"))
    )
    counts = Table("Decisions", ("decision", "faces"), (("keep", "12"),))
    folder = make_report_folder(tmp_path, "overlap")
    path = page(folder, "What two galleries share", [], tables=(table, counts))
    assert scrub(folder, gone({JANE, "12", "keep"})) == {"report.html"}
    text = path.read_text()
    assert ("<td>b</td>" in text, "J, &#34;x" in text, "d</td>" in text, "<td>keep</td>" in text) == (
        True,
        False,
        False,
        True,
    )
    page(folder, "x", [], figures=(Figure("a", "b", MINE),))
    assert scrub(folder) == {"report.html"}
    assert not path.exists(), "it says so in a place that is not known"


def test_vectors_and_other_files(tmp_path: Path) -> None:
    folder = make_report_folder(tmp_path, "cluster")
    np.savez(folder / "state.npz", cohort=VECTORS, threshold=0.5)
    (folder / "yes.json").write_text(json.dumps({"a": [{"b": JANE}]}))
    (folder / "no.json").write_text(json.dumps({"a": "Jan", "n": 5}))
    (folder / "state.npz.new").write_bytes(b"x")
    for name in ("graph", "cluster.partial", "clean.old"):
        path = tmp_path / name
        path.mkdir()
        prepare_folder(str(path), name.partition(".")[0])
        (path / "notes.txt").write_text("x")
    (tmp_path / "notes.md").write_text(f"about {MINE}")
    (tmp_path / "other.md").write_text("about nobody")
    (tmp_path / ".lock").write_text(MINE)
    foreign: list[str] = []
    found = set(scrub_reports(str(tmp_path), gone(), foreign.append))
    # Files of others stay, and those that name the erased are told.
    assert found == {"cluster/state.npz", "graph/", "cluster.partial/", "clean.old/"}
    assert set(foreign) == {"cluster/yes.json", "notes.md"}
    assert set(os.listdir(folder)) == {MARKER, "state.npz", "yes.json", "no.json"}
    assert [os.listdir(tmp_path / name) for name in ("graph", "cluster.partial", "clean.old")] == [["notes.txt"]] * 3
    with np.load(folder / "state.npz") as held:
        np.testing.assert_array_equal(held["cohort"], VECTORS[1:])
        assert held["threshold"] == 0.5


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"PAR1PAR1PAR1", b'{"title":', b"\xff\xfe\x00"])
def test_damaged_files_of_ours_go_and_nothing_is_raised(tmp_path: Path, data: bytes) -> None:
    folder = make_report_folder(tmp_path, "cluster")
    for name in ("faces.parquet", "sums.npz", "state.npz", "report.html", "mine.parquet", "mine.bin"):
        (folder / name).write_bytes(data)
    assert {"faces.parquet", "sums.npz", "state.npz"} <= scrub(folder)
    assert {"mine.parquet", "mine.bin"} <= set(os.listdir(folder))
    assert not list(folder.glob("*.new"))


def test_a_full_disk_deletes_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_report_folder(tmp_path, "clean")
    path = table_in(folder, "decisions.parquet", uri=[MINE, OTHER])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="no space left"):
        scrub(folder)
    assert path.exists()


def test_nothing_of_many_is_slow(tmp_path: Path) -> None:
    uris = [f"/some/where/{n}.jpg" for n in range(20_000)]
    clusters = make_report_folder(tmp_path, "cluster")
    table_in(clusters, "faces.parquet", uri=uris * 5, face_id=np.arange(100_000))
    copies = make_report_folder(tmp_path, "dedup")
    (copies / "keep.txt").write_text("\n".join(uris) + "\n")
    erased = gone(uris=set(uris[::2]))
    assert scrub(clusters, erased) == {"faces.parquet"}
    assert scrub(copies, erased) == {"keep.txt"}
    assert pq.read_metadata(clusters / "faces.parquet").num_rows == 50_000 - 2


# ------------------------------------------------------------------ files of somebody else

WORDS = re.compile(rb"[^\s\"'<>,;\x00]+")


@given(
    before=st.binary(max_size=200),
    after=st.binary(max_size=200),
    size=st.integers(1, 64),
    text=st.sampled_from([b"/a/one.jpg", b"/a/jane 1\n.jpg", "/a/é😀.jpg".encode()]),
)
def test_a_text_is_found_wherever_a_file_is_cut(before: bytes, after: bytes, size: int, text: bytes) -> None:
    """Chunks of any size: a text of one or several words is whole in one of them, and no half word is taken for one."""
    data = before + b" " + text + b" " + after
    chunks = list(iterate_chunks(io.BytesIO(data), size, len(text)))
    assert any(text in chunk for chunk in chunks)
    words = set(WORDS.findall(data))
    for chunk in chunks:
        assert words.issuperset(WORDS.findall(chunk))


def test_half_a_word_is_not_a_word() -> None:
    """The beginning of a long name is not that of a shorter one."""
    data = b"x /data/p1.jpg.bak /data/p1.jpg"
    for size in range(1, len(data) + 1):
        words = [word for chunk in iterate_chunks(io.BytesIO(data), size, 0) for word in chunk.split()]
        assert set(words) == {b"x", b"/data/p1.jpg.bak", b"/data/p1.jpg"}


def test_progress_of_a_complete_erasure_leaves_nothing(tmp_path: Path) -> None:
    """A run that completes it was faster, or a crash came between the deletion of the names and of the rest."""
    path = str(tmp_path)
    receipt = Receipt("20261101T000000-aaaaaa", "id", "2026", ["ids"], "0")
    pending.save_progress(path, receipt, pending.REPORTS)
    assert list((tmp_path / "erased").glob("*.state")) == []
    for name in ("20261101T000000-bbbbbb.reports.state", "20261101T000000-bbbbbb.state", "notes.state"):
        (tmp_path / "erased" / name).write_text("{}")
    (tmp_path / "erased" / "20261101T000000-cccccc.pending").write_bytes(b"")
    (tmp_path / "erased" / "20261101T000000-cccccc.rows.state").write_bytes(b"{}")
    pending.delete_pending(path, receipt)
    left = {file.name for file in (tmp_path / "erased").glob("*.state")}
    assert left == {"notes.state", "20261101T000000-cccccc.rows.state"}
