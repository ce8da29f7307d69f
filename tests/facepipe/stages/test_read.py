"""Containers that change between listing and reading: an image never gets another image's label."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw
from helpers import embed, rows

from facepipe.hashing import compute_image_id
from facepipe.schema import OK, REPLACED, WORK_ITEM
from facepipe.sources import SourceConfig, WorkItem, open_source
from facepipe.stages import Read
from facepipe.stages import read as read_module

Write = Callable[[list[int]], bytes]


def encode(n: int) -> bytes:
    return cv2.imencode(".png", draw(n))[1].tobytes()


LABELS = {compute_image_id(encode(n)): f"person{n}" for n in range(6)}


def make_parquet(numbers: list[int]) -> bytes:
    sink = io.BytesIO()
    columns = {"bytes": [encode(n) for n in numbers], "identity": [f"person{n}" for n in numbers]}
    pq.write_table(pa.table(columns), sink, row_group_size=2)
    return sink.getvalue()


def make_tar(numbers: list[int]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for place, n in enumerate(numbers):
            for name, data in ((f"{place}.png", encode(n)), (f"{place}.cls", f"person{n}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


CONTAINERS: dict[str, Write] = {"parquet": make_parquet, "tar": make_tar}
FORWARDS = [0, 1, 2, 3, 4, 5]
BACKWARDS = FORWARDS[::-1]


def to_table(items: list[WorkItem]) -> pa.Table:
    columns = [*zip(*items, strict=True), [None] * len(items)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, WORK_ITEM, strict=True)]
    return pa.table(arrays, WORK_ITEM)


def read(stage: Read, items: list[WorkItem]) -> dict[str, list[Any]]:
    result: dict[str, list[Any]] = stage(to_table(items)).select(["status", "image_id", "identity"]).to_pydict()
    return result


def replace_file(path: Path, data: bytes) -> None:
    """Put another file in the place of one, with a later time."""
    later = path.stat().st_mtime_ns + 1_000_000
    (path.parent / "new").write_bytes(data)
    os.utime(path.parent / "new", ns=(later, later))
    os.replace(path.parent / "new", path)


def write_in_place(path: Path, data: bytes) -> None:
    later = path.stat().st_mtime_ns + 1_000_000
    path.write_bytes(data)
    os.utime(path, ns=(later, later))


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("change", [replace_file, write_in_place])
def test_a_container_that_changed_after_the_listing_gives_no_label(
    kind: str, change: Callable[[Path, bytes], None], tmp_path: Path
) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(CONTAINERS[kind](FORWARDS))
    source = open_source(SourceConfig(str(path)))
    items = list(source)
    stage = Read()
    before = read(stage, items[:2])
    assert before["status"] == [OK, OK]
    change(path, CONTAINERS[kind](BACKWARDS))
    after = read(Read(), items)
    assert after["status"] == [REPLACED] * 6
    assert after["image_id"] == [None] * 6
    # The open file of the first stage is still what was listed, or is not used any more; new items open the new file.
    rest = read(stage, items[2:])
    for status, image, label in zip(*rest.values(), strict=True):
        assert status == REPLACED or LABELS[image] == label
    again = read(stage, list(source))
    assert again["status"] == [OK] * 6
    assert [LABELS[image] for image in again["image_id"]] == again["identity"]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_container_that_is_replaced_while_it_is_listed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The items are of the file that was opened, and so is their fingerprint."""
    path = tmp_path / f"a.{kind}"
    path.write_bytes(CONTAINERS[kind](FORWARDS))
    listing = iter(open_source(SourceConfig(str(path))))
    items = [next(listing)]
    replace_file(path, CONTAINERS[kind](BACKWARDS))
    items += listing
    assert set(read(Read(), items)["status"]) == {REPLACED}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_container_that_is_written_while_it_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(CONTAINERS[kind](FORWARDS))
    items = list(open_source(SourceConfig(str(path))))
    original = read_module.ParquetCursor.read
    read_bytes = io.FileIO.read

    def write_first(self: Any, *arguments: Any) -> Any:
        write_in_place(path, CONTAINERS[kind](BACKWARDS))
        return original(self, *arguments)

    if kind == "parquet":
        monkeypatch.setattr(read_module.ParquetCursor, "read", write_first)
    else:
        from facepipe.storage import files

        class Writing(io.FileIO):
            def read(self, size: int = -1) -> bytes:
                write_in_place(path, CONTAINERS[kind](BACKWARDS))
                return read_bytes(self, size)

        monkeypatch.setattr(files, "open", lambda *arguments, **keys: Writing(arguments[0], "rb"), raising=False)
    result = read(Read(), items)
    assert set(result["status"]) <= {REPLACED, "read_error"}, "whatever the reader made of the mixture"
    assert result["image_id"] == [None] * 6


@pytest.mark.parametrize("kind", CONTAINERS)
def test_an_object_that_was_replaced_after_the_listing(kind: str, bucket: Any, tmp_path: Path) -> None:
    bucket.put_object(Bucket="faces", Key=f"changing/a.{kind}", Body=CONTAINERS[kind](FORWARDS))
    source = open_source(SourceConfig(f"s3://faces/changing/a.{kind}"))
    items = list(source)
    stage = Read()
    assert read(stage, items)["status"] == [OK] * 6
    bucket.put_object(Bucket="faces", Key=f"changing/a.{kind}", Body=CONTAINERS[kind](BACKWARDS))
    for reader in (stage, Read()):
        for status, image, label in zip(*read(reader, items).values(), strict=True):
            assert status == REPLACED or LABELS[image] == label
    assert set(read(Read(), items)["status"]) == {REPLACED}
    again = read(stage, list(source))
    assert [LABELS[image] for image in again["image_id"]] == again["identity"]


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("is_known", [True, False])
def test_a_run_whose_container_is_replaced_mislabels_nobody(
    kind: str, is_known: bool, fakes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(CONTAINERS[kind](FORWARDS[:3]))
    if is_known:
        embed(path, tmp_path / "g", fakes)
    replace_file(path, CONTAINERS[kind](FORWARDS))
    changes = [BACKWARDS]
    original = Read.__call__

    def replace_first(self: Read, table: pa.Table) -> pa.Table:
        if changes:
            replace_file(path, CONTAINERS[kind](changes.pop()))
        return original(self, table)

    monkeypatch.setattr(Read, "__call__", replace_first)
    for _ in range(2):
        embed(path, tmp_path / "g", fakes)
        found = [row for row in rows(tmp_path / "g") if row["face_index"] in (0, None)]
        assert all(LABELS[row["image_id"]] == row["identity"] for row in found)
    assert sorted(row["identity"] for row in found) == sorted(LABELS.values())
