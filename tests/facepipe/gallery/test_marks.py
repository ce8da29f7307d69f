"""Changes that leave files as they are: marks, and deleted rows. Every reader sees the same rows."""

import os
import random
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from helpers import trials
from histories import START, History, read_as_stock, read_values

from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.commits import rewrite as rewrites
from facepipe.gallery.maintenance.compact import fold_marks
from facepipe.gallery.maintenance.vacuum import claim_unreferenced, delete_files, find_unreferenced
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.gallery.marks import FOLDER, NO_MARKS, SCHEMA, Marks, make_marks
from facepipe.schema import FACES
from facepipe.storage.lease import hold_lease


@pytest.fixture(autouse=True)
def always_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep changes apart however small the table is."""
    monkeypatch.setattr(rewrites, "_SPARED_FROM_BYTES", 0)
    monkeypatch.setattr(rewrites, "_SPARED_SHARE", 1.0)
    monkeypatch.setattr(rewrites, "_MOST_DELETED", 0.5)


def list_marks(gallery: Gallery) -> list[str]:
    folder = Path(gallery.faces_folder, FOLDER)
    return sorted(os.listdir(folder)) if folder.exists() else []


def make_history(path: Path, images: int = 8) -> History:
    history = History(path, seed=1)
    history.add([f"/a/{n}.jpg" for n in range(images)])
    history.add([f"/b/{n}.jpg" for n in range(images)])
    return history


@pytest.mark.parametrize("seed", trials(8))
def test_random_histories_read_the_same_whatever_is_kept_apart(tmp_path: Path, seed: int) -> None:
    history = History(tmp_path / "g", seed)
    history.add([f"/a/{n}.jpg" for n in range(6)])
    history.add([f"/b/{n}.jpg" for n in range(6)])
    for _ in range(10):
        history.happen()
        if len(history.expected) < 4:
            history.add([f"/d/{history.step}-{n}.jpg" for n in range(6)])
        history.check()
    fold_marks(Gallery(history.gallery.path), history.commit, everything=True)
    history.check()
    gallery = Gallery(history.gallery.path)
    assert len(gallery.marks) == 0
    assert gallery.marks_file is None


def test_marks_change_no_file_and_each_version_has_its_own(tmp_path: Path) -> None:
    history = make_history(tmp_path / "g")
    files = {file["path"] for file in Gallery(history.gallery.path).files()}
    before = {uri: dict(values) for uri, values in history.expected.items()}
    version = Gallery(history.gallery.path).version
    history.miss(["/a/1.jpg", "/b/2.jpg"])
    history.touch(["/b/2.jpg", "/b/3.jpg"])
    history.check()
    gallery = Gallery(history.gallery.path)
    assert {file["path"] for file in gallery.files()} == files
    assert gallery.has_files_of(version)
    assert len(gallery.marks) == 3
    assert read_values(Gallery(gallery.path, version).to_arrow()) == before
    assert verify_gallery(gallery).problems == []


def test_an_image_that_was_embedded_again_is_newer_than_its_mark() -> None:
    time = pa.array([START, START + timedelta(days=1)], FACES.field("ingested_at").type)
    marks = Marks(
        pa.table(
            {"uri": ["a"], "ingested_at": time[:1], "fingerprint": ["mark"], "missing_since": time[1:]}, schema=SCHEMA
        )
    )
    rows = pa.table({"uri": ["a", "a", "b"], "ingested_at": [*time, time[0]], "fingerprint": ["x", "y", "z"]})
    assert marks.apply(rows)["fingerprint"].to_pylist() == ["mark", "y", "z"]
    # A time that is not known is equal to one that is not known.
    unknown = Marks(marks.images.set_column(1, SCHEMA.field(1), pa.nulls(1, SCHEMA.field(1).type)))
    rows = rows.set_column(1, SCHEMA.field(1), pa.nulls(3, SCHEMA.field(1).type))
    assert unknown.apply(rows)["fingerprint"].to_pylist() == ["mark", "mark", "z"]


def test_marks_are_found_by_bisection_in_any_order_of_rows() -> None:
    rng = random.Random(3)
    uris = [f"/{rng.choice(['é', 'z', 'Z', '😀', 'a'])}/{n}" for n in range(200)]
    images = pa.table({"uri": uris}, schema=pa.schema([SCHEMA.field("uri")]))
    for name in SCHEMA.names[1:]:
        images = images.append_column(SCHEMA.field(name), pa.nulls(200, SCHEMA.field(name).type))
    marks = NO_MARKS.add(make_marks(images))
    for _ in range(20):
        low, high = sorted(rng.sample(uris, 2), key=lambda uri: uri.encode())
        expected = sorted(uri for uri in uris if low.encode() <= uri.encode() <= high.encode())
        assert sorted(marks.select_range(low, high)["uri"].to_pylist()) == expected
    assert len(marks.drop(pa.array(uris[:50]))) == 150
    assert marks.drop(pa.array(["/none"])) is marks


def test_few_bytes_are_rewritten_at_once_and_dense_changes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = make_history(tmp_path / "g")
    monkeypatch.setattr(rewrites, "_SPARED_SHARE", 0.3)
    history.touch([f"/a/{n}.jpg" for n in range(8)])
    assert not len(Gallery(history.gallery.path).marks)
    history.touch(["/a/1.jpg", "/b/1.jpg"])
    assert len(Gallery(history.gallery.path).marks) == 2
    # Where a limit is reached, rows are written anew, and hold what their marks said.
    monkeypatch.setattr(rewrites, "MOST_MARKS", 3)
    history.touch(["/a/2.jpg", "/b/2.jpg"])
    gallery = Gallery(history.gallery.path)
    assert not len(gallery.marks)
    assert read_values(read_as_stock(gallery)) == history.expected


def test_marks_of_a_commit_that_never_came_are_deleted(tmp_path: Path) -> None:
    """A run that is killed before its commit leaves a file that no version names."""
    history = make_history(tmp_path / "g")
    history.touch(["/a/1.jpg"])
    current = list_marks(history.gallery)
    history.commit._change_marks(
        [rewrites.MarkImages(make_marks(Gallery(history.gallery.path).to_arrow(where="uri = '/b/1.jpg'")))], {}
    )
    assert len(list_marks(history.gallery)) == 2
    history.check()
    with hold_lease(history.gallery.path) as lease:
        delete_files(claim_unreferenced(history.gallery.path, lease), lease)
    assert list_marks(history.gallery) == current
    history.check()


def test_old_marks_are_kept_for_readers_and_deleted_later(tmp_path: Path) -> None:
    history = make_history(tmp_path / "g")
    history.touch(["/a/1.jpg"])
    first = list_marks(history.gallery)
    history.touch(["/a/2.jpg"])
    gallery = Gallery(history.gallery.path)
    for name in first:
        # Written long ago, and outdated just now.
        os.utime(Path(gallery.faces_folder, FOLDER, name), (0, 0))
    assert find_unreferenced(gallery, older_than=3600) == []
    assert [os.path.basename(entry.url) for entry in find_unreferenced(gallery)] == first


def test_damaged_or_linked_marks_stop_readers_and_are_named(tmp_path: Path) -> None:
    history = make_history(tmp_path / "g")
    history.touch(["/a/1.jpg"])
    file = Path(history.gallery.faces_folder, FOLDER, list_marks(history.gallery)[0])
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StorageError, match="damaged"):
        Gallery(history.gallery.path).to_arrow()
    assert "damaged" in "\n".join(verify_gallery(Gallery(history.gallery.path)).problems)
    # What does not need them can be read.
    assert Gallery(history.gallery.path).to_arrow(["uri"]).num_rows == 32
    other = tmp_path / "other"
    other.write_bytes(data)
    file.unlink()
    file.symlink_to(other)
    with pytest.raises(StorageError, match="link"):
        Gallery(history.gallery.path).to_arrow()
