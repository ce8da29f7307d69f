"""What came in since a mark: over any sequence of embeds, rewrites and compactions every row is new exactly once."""

import os
import secrets
import time
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from bench.galleries import CONTRACT
from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.gallery import changes as module
from facepipe.gallery.changes import ReadMark, find_changes
from facepipe.gallery.commits.parts import compute_statistics, encode_parquet
from facepipe.hashing import compute_image_id
from facepipe.schema import conform

Key = tuple[str, Any]
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


class Table:
    """A gallery that is written by hand, commit by commit, on a clock of its own."""

    def __init__(self, path: Path, stamped: bool = True):
        self.path, self.stamped, self.clock, self.count = str(path), stamped, 0, 0
        Gallery.create(self.path, CONTRACT)

    @property
    def gallery(self) -> Gallery:
        return Gallery(self.path)

    def rows(self, uris: list[str], late: float = 0) -> pa.Table:
        self.clock += 1
        stamp = BEGIN + timedelta(minutes=self.clock - late) if self.stamped else None
        self.count += len(uris)
        ids = np.arange(self.count - len(uris), self.count)
        face = [int(n) if n % 5 else None for n in ids + 1]  # every fifth image has no face
        return conform(
            pa.table(
                {
                    "face_id": pa.array(face, pa.int64()),
                    "uri": uris,
                    "face_index": pa.array([None if n is None else 0 for n in face], pa.int16()),
                    "status": ["no_face" if n is None else "ok" for n in face],
                    "ingested_at": pa.array([stamp] * len(uris), pa.timestamp("us", "UTC")),
                }
            )
        )

    def commit(self, came: dict[str, pa.Table], gone: list[str]) -> None:
        now = int(time.time() * 1000)
        actions: list[Any] = [RemoveAction(path, True, now) for path in gone]
        for name, rows in came.items():
            data = encode_parquet(rows)
            name = name.format(compute_image_id(data))
            Path(self.path, "faces", name).write_bytes(data)
            actions.append(AddAction(name, len(data), {}, now, True, compute_statistics(rows)))
        if actions:
            table = DeltaTable(self.gallery.faces_folder)
            table.create_write_transaction(actions, "append", table.schema())

    def embed(self, uris: list[str], late: float = 0) -> None:
        """New rows; those that the table has of the same images go in the same commit, as facepipe does it."""
        came, gone = self._without(set(uris))
        self.commit({f"part-run{self.clock}-000000-{{}}.parquet": self.rows(uris, late), **came}, gone)

    def erase(self, uris: set[str]) -> None:
        self.commit(*self._without(uris))

    def _without(self, uris: set[str]) -> tuple[dict[str, pa.Table], list[str]]:
        came, gone = {}, []
        for path in self.files():
            rows = self.read(path)
            left = rows.filter(pa.array([uri not in uris for uri in rows["uri"].to_pylist()], pa.bool_()))
            if left.num_rows < rows.num_rows:
                gone.append(path)
                if left.num_rows:
                    came[f"part-rewrite-{left.num_rows:06d}-{{}}.parquet"] = left
        return came, gone

    def compact(self, name: str = "") -> None:
        if parts := [self.read(path) for path in self.files()]:
            name = name or f"part-compact-{len(parts):06d}-{secrets.token_hex(16)}.parquet"
            self.commit({name: pa.concat_tables(parts)}, self.files())

    def read(self, path: str) -> pa.Table:
        return module.PartialGallery(self.gallery, [path]).to_arrow()

    def files(self) -> list[str]:
        return sorted(file["path"] for file in self.gallery.files())

    def vacuum(self) -> None:
        """The files that are in the table no more."""
        for path in set(os.listdir(self.gallery.faces_folder)) - set(self.files()) - {"_delta_log"}:
            os.unlink(os.path.join(self.gallery.faces_folder, path))

    def forget(self) -> None:
        """Versions before the newest can no longer be opened, as after an erasure that cleans the log."""
        table = DeltaTable(self.gallery.faces_folder)
        table.create_checkpoint()
        for path in Path(self.gallery.faces_folder, "_delta_log").glob("*.json"):
            if int(path.stem) < table.version():
                path.unlink()

    def held(self) -> Counter[Key]:
        return keys(self.gallery.to_arrow(["uri", "ingested_at"]))


def keys(table: pa.Table | pa.RecordBatch) -> Counter[Key]:
    return Counter((row["uri"], row["ingested_at"]) for row in table.select(["uri", "ingested_at"]).to_pylist())


def fresh(table: Table, mark: ReadMark | None) -> Counter[Key]:
    found: Counter[Key] = Counter()
    for batch in find_changes(table.gallery, mark).read_new_rows(["uri", "ingested_at"]):
        found += keys(batch)
    return found


def step(table: Table, what: int, n: int, rng: np.random.Generator) -> None:
    held = sorted(uri for uri, _ in table.held())
    some = [str(uri) for uri in rng.permutation(held)[: 1 + n]]
    if what == 0:
        table.embed([f"/{table.clock}/{k}" for k in range(1 + n)])
    elif what == 1:
        table.embed([*some, f"/{table.clock}/new"])  # files that changed
    elif what == 2:
        table.embed([f"/{table.clock}/late{k}" for k in range(1 + n)], late=3.5)
    elif what == 3:
        table.erase(set(some))
    elif what == 4:
        table.compact()
    else:
        table.compact(f"part-00000-{uuid.uuid4()}-c000.zstd.parquet")  # what other software names them


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    nights=st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=4), min_size=1, max_size=4),
    stamped=st.booleans(),
)
def test_every_row_is_new_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, nights: list[list[tuple[int, int]]], stamped: bool
) -> None:
    """`ingested_at` may be missing, or earlier than what was committed before."""
    table, rng = Table(tmp_path_factory.mktemp("t") / "g", stamped), np.random.default_rng(0)
    mark, seen = None, Counter[Key]()
    for night in nights:
        before = table.held()
        faces = set(table.gallery.to_arrow(["face_id"])["face_id"].drop_null().to_pylist())
        for what, n in night:
            step(table, what, n, rng)
        if stamped:
            assert fresh(table, mark) == table.held() - (before if mark else Counter())
        else:  # an image's newer rows look like its older ones: they are told apart by their files only
            assert set(fresh(table, mark)) <= set(table.held())
        if mark:
            gone = find_changes(table.gallery, mark).find_deleted_ids()
            assert gone is not None
            now = set(table.gallery.to_arrow(["face_id"])["face_id"].drop_null().to_pylist())
            assert gone.tolist() == sorted(faces - now)
        seen += fresh(table, mark)
        mark = ReadMark.from_gallery(table.gallery)
    if stamped:
        assert all(seen[key] == 1 for key in table.held())
        assert max(seen.values(), default=1) == 1


@pytest.mark.parametrize("loss", ["files", "log"])
def test_without_the_files_or_the_log_of_then_time_decides(tmp_path: Path, loss: str) -> None:
    table = Table(tmp_path / "g")
    table.embed(["/a", "/b"])
    table.embed(["/c", "/d"])
    mark = ReadMark.from_gallery(table.gallery)
    table.embed(["/b", "/e"])
    table.erase({"/c"})
    new = fresh(table, mark)
    assert sorted(uri for uri, _ in new) == ["/b", "/e"]
    table.compact()
    assert fresh(table, mark) == new
    assert find_changes(table.gallery, mark).find_deleted_ids() is not None
    table.vacuum()
    if loss == "log":
        table.forget()
        assert find_changes(table.gallery, mark).removed_files is None
    assert fresh(table, mark) == new
    assert find_changes(table.gallery, mark).find_deleted_ids() is None


def test_an_append_reads_no_old_file(tmp_path: Path) -> None:
    table = Table(tmp_path / "g")
    table.embed(["/a", "/b"])
    old = table.files()
    mark = ReadMark.from_gallery(table.gallery)
    table.embed(["/c"])
    for path in old:
        os.unlink(os.path.join(table.gallery.faces_folder, path))
    assert [uri for uri, _ in fresh(table, mark)] == ["/c"]
    gone = find_changes(table.gallery, mark).find_deleted_ids()
    assert gone is not None
    assert not len(gone)


def test_a_compaction_of_old_rows_is_not_read(tmp_path: Path) -> None:
    table = Table(tmp_path / "g")
    table.embed(["/a", "/b"])
    table.clock += 3 * 24 * 60
    table.embed(["/c"])
    mark = ReadMark.from_gallery(table.gallery)
    table.commit({"part-compact-000000-{}.parquet": table.read(table.files()[0])}, [table.files()[0]])
    (path,) = (file for file in table.files() if "compact" in file)
    os.unlink(os.path.join(table.gallery.faces_folder, path))
    assert not fresh(table, mark)


def test_marks_are_kept_in_files(tmp_path: Path) -> None:
    table = Table(tmp_path / "g")
    path = str(tmp_path / "mark.json")
    assert ReadMark.load(path) is None
    assert ReadMark.from_gallery(table.gallery).newest is None
    table.embed(["/a"])
    mark = ReadMark.from_gallery(table.gallery)
    mark.save(path)
    assert ReadMark.load(path) == mark
    assert find_changes(table.gallery, mark).is_empty
    assert mark.newest == (BEGIN + timedelta(minutes=1)).isoformat()
    for damaged in (b"", b"[]", b'{"gallery": 1}', b'{"gallery": "x", "version": 1, "newest": "yesterday"}'):
        Path(path).write_bytes(damaged)
        assert ReadMark.load(path) is None


def test_of_another_gallery_time_decides(tmp_path: Path) -> None:
    table, other = Table(tmp_path / "g"), Table(tmp_path / "h")
    table.embed(["/a"])
    other.clock = 1
    other.embed(["/b"])
    assert [uri for uri, _ in fresh(other, ReadMark.from_gallery(table.gallery))] == ["/b"]
    assert not fresh(table, ReadMark.from_gallery(other.gallery))
    assert [uri for uri, _ in fresh(table, None)] == ["/a"]


def test_a_file_of_now_that_is_missing_is_an_error(tmp_path: Path) -> None:
    table = Table(tmp_path / "g")
    table.embed(["/a"])
    os.unlink(os.path.join(table.gallery.faces_folder, table.files()[0]))
    with pytest.raises((StorageError, OSError)):
        fresh(table, None)
