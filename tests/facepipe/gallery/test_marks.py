"""Marks: what changed of an image since its rows were written is kept apart, and every reader sees it."""

import os
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from bench.galleries import CONTRACT
from deltalake import DeltaTable
from helpers import trials

from facepipe.arrow import to_float_lists
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.commits import rewrite as rewrites
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord
from facepipe.gallery.commits.rewrite import Rewrite, plan_rewrite_of_uris, rewrite_files, write_new_rows
from facepipe.gallery.maintenance.compact import CompactConfig, compact_files, fold_marks, plan_compaction
from facepipe.gallery.maintenance.vacuum import claim_unreferenced, delete_files, find_unreferenced
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.gallery.marks import FOLDER, MARKED, NO_MARKS, SCHEMA, Marks, make_marks
from facepipe.hashing import compute_face_id
from facepipe.schema import FACES, OK, conform
from facepipe.storage.lease import hold_lease

START = datetime(2026, 1, 1, tzinfo=UTC)
Values = dict[str, dict[str, Any]]  # per uri: fingerprint, missing_since, ingested_at


@pytest.fixture(autouse=True)
def always_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep changes apart however small the table is."""
    monkeypatch.setattr(rewrites, "_MARKS_FROM_BYTES", 0)
    monkeypatch.setattr(rewrites, "_MARKED_SHARE", 1.0)


class History:
    """A gallery to which random things happen, and what it should hold."""

    def __init__(self, path: Path, seed: int):
        self.gallery = Gallery.create(str(path), CONTRACT)
        self.commit = Committer(self.gallery, "run")
        self.expected: Values = {}
        self.rng = random.Random(seed)
        self.step = 0

    def add(self, uris: list[str], replaced: list[str] | None = None) -> None:
        """Commit a part with two faces per image."""
        self.step += 1
        count = 2 * len(uris)
        vectors = np.random.default_rng(self.step).standard_normal((count, 128)).astype(np.float32)
        time = START + timedelta(days=self.step)
        faces = [(uri, n) for uri in uris for n in range(2)]
        columns = {
            "face_id": [compute_face_id(uri, str(self.step), n) for uri, n in faces],
            "image_id": [str(self.step)] * count,
            "uri": [uri for uri, _ in faces],
            "status": [OK] * count,
            "face_index": [n for _, n in faces],
            "fingerprint": [f"new-{self.step}"] * count,
            "ingested_at": pa.array([time] * count, FACES.field("ingested_at").type),
            "embedding": to_float_lists(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)),
        }
        rows = conform(pa.table(columns))
        action = write_new_rows(self.gallery, rows, f"run-{self.step:06d}")
        record = PartRecord(self.step, path=action.path, size=action.size, stats=action.stats, replaced=replaced or [])
        self.commit([record], {})
        for uri in uris:
            self.expected[uri] = {"fingerprint": f"new-{self.step}", "missing_since": None, "ingested_at": time}

    def touch(self, uris: list[str]) -> None:
        self.step += 1
        marks: dict[str, str | None] = dict.fromkeys(uris, f"touched-{self.step}")
        self.commit([PartRecord(self.step, touched=marks)], {})
        for uri in uris:
            self.expected[uri] |= {"fingerprint": f"touched-{self.step}", "missing_since": None}

    def miss(self, uris: list[str]) -> None:
        """Mark images as missing, as `mark_missing` does."""
        self.step += 1
        time = START + timedelta(days=self.step)

        def set_time(rows: pa.Table, mask: Any) -> pa.Table:
            n = rows.schema.get_field_index("missing_since")
            values = pc.if_else(mask, pa.scalar(time, rows.schema.field(n).type), rows[n])
            return rows.set_column(n, FACES.field("missing_since"), values)

        plan = Rewrite(
            columns=("uri", "missing_since"),
            matches=lambda rows: pc.and_(pc.is_null(rows["missing_since"]), pc.is_in(rows["uri"], pa.array(uris))),
            change=set_time,
            data_change=False,
            change_marked=lambda rows: set_time(rows, pa.scalar(True)),
        )
        self.commit.commit_actions(lambda: list(rewrite_files(Gallery(self.gallery.path), plan)), {})
        for uri in uris:
            if self.expected[uri]["missing_since"] is None:
                self.expected[uri]["missing_since"] = time

    def erase(self, uris: list[str]) -> None:
        plan = plan_rewrite_of_uris(uris, lambda rows, mask: rows.filter(pc.invert(mask)))
        self.commit.commit_actions(lambda: list(rewrite_files(Gallery(self.gallery.path), plan)), {})
        for uri in uris:
            del self.expected[uri]

    def join(self) -> None:
        gallery = Gallery(self.gallery.path)
        groups = plan_compaction(gallery, CompactConfig(target_bytes=200_000), everything=True)
        compact_files(gallery, groups[:2], self.commit)

    def choose(self) -> list[str]:
        """Choose some uris that the table has."""
        return self.rng.sample(sorted(self.expected), min(len(self.expected), self.rng.randint(1, 5)))

    def happen(self) -> None:
        """Let something happen."""
        kind = self.rng.choice(["add", "replace", "touch", "touch", "miss", "miss", "erase", "join", "fold"])
        if kind == "add":
            self.add([f"/{self.rng.choice('abc')}/{self.step:03d}-{n}.jpg" for n in range(4)])
        elif kind == "replace":
            chosen = self.choose()
            self.add(chosen, replaced=chosen)
        elif kind in ("touch", "miss", "erase"):
            getattr(self, kind)(self.choose())
        elif kind == "join":
            self.join()
        else:
            fold_marks(Gallery(self.gallery.path), self.commit, everything=True)

    def check(self) -> None:
        """Check that every way of reading gives what is expected."""
        gallery = Gallery(self.gallery.path)
        assert read_values(gallery.to_arrow()) == self.expected
        missing = sorted(uri for uri, values in self.expected.items() if values["missing_since"] is not None)
        filtered = gallery.to_arrow(["uri"], "missing_since is not null")
        assert sorted(set(filtered["uri"].to_pylist())) == missing
        assert filtered.num_rows == 2 * len(missing)
        present = gallery.to_arrow(["uri", "face_index"], "missing_since is null and face_index = 1")
        assert sorted(present["uri"].to_pylist()) == sorted(self.expected.keys() - set(missing))
        marked = pa.array(self.choose())
        chosen = pa.concat_tables(gallery.read_chosen_rows("uri", marked, ["uri", "ingested_at", *MARKED, "thumb"]))
        assert read_values(chosen) == {uri: self.expected[uri] for uri in marked.to_pylist()}
        # Readers of others see the same rows; the two columns alone may be behind.
        stock = DeltaTable(gallery.faces_folder).to_pyarrow_table()
        same = [name for name in FACES.names if name not in MARKED]
        order = [("uri", "ascending"), ("face_index", "ascending")]
        assert (
            stock.select(same)
            .sort_by(order)
            .equals(gallery.to_arrow(same).sort_by(order).cast(stock.select(same).schema))
        )
        if not len(gallery.marks):
            assert read_values(stock) == self.expected


def read_values(rows: pa.Table) -> Values:
    """Read per uri what marks can change, and when it was embedded; all rows of an image agree."""
    values: Values = {}
    for row in rows.select(["uri", "ingested_at", *MARKED]).to_pylist():
        own = {name: row[name] for name in (*MARKED, "ingested_at")}
        assert values.setdefault(row["uri"], own) == own
    return values


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
    monkeypatch.setattr(rewrites, "_MARKED_SHARE", 0.3)
    history.touch([f"/a/{n}.jpg" for n in range(8)])
    assert not len(Gallery(history.gallery.path).marks)
    history.touch(["/a/1.jpg", "/b/1.jpg"])
    assert len(Gallery(history.gallery.path).marks) == 2
    # Where a limit is reached, rows are written anew, and hold what their marks said.
    monkeypatch.setattr(rewrites, "MOST_MARKS", 3)
    history.touch(["/a/2.jpg", "/b/2.jpg"])
    gallery = Gallery(history.gallery.path)
    assert not len(gallery.marks)
    assert read_values(DeltaTable(gallery.faces_folder).to_pyarrow_table()) == history.expected


def test_marks_of_a_commit_that_never_came_are_deleted(tmp_path: Path) -> None:
    """A run that is killed before its commit leaves a file that no version names."""
    history = make_history(tmp_path / "g")
    history.touch(["/a/1.jpg"])
    current = list_marks(history.gallery)
    history.commit._change_marks(
        [rewrites.MarkImages(make_marks(Gallery(history.gallery.path).to_arrow(where="uri = '/b/1.jpg'")))]
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
