"""Packed tars: read in order, here and there, from a store, cut off, damaged, and made to fill a machine."""

import gzip
import io
import os
import random
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.schema import OK, READ_ERROR, REPLACED, TOO_LARGE, WORK_ITEM
from facepipe.sources import SourceConfig, WorkItem, open_source
from facepipe.sources.containers import gzip_stream
from facepipe.sources.containers.gzip_stream import MemberReader, UnpackedStream
from facepipe.stages.read import Read

RANDOM = np.random.default_rng(7)
PHOTOS = {f"{person}/{n}.jpg": b"\xff\xd8" + RANDOM.bytes(6_000 + 97 * n) for person in "abc" for n in range(20)}


def pack_tar(photos: dict[str, bytes] = PHOTOS) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in photos.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


TAR = pack_tar()
PACKED = gzip.compress(TAR, 1, mtime=0)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzip_stream, "_CHUNK", 1 << 14)
    monkeypatch.setattr(gzip_stream, "_PACKED_CHUNK", 1 << 13)


class Row(NamedTuple):
    data: bytes | None
    status: str
    error: str | None


def read_items(items: list[WorkItem], read: Read | None = None) -> list[Row]:
    rows = [{**item._asdict(), "previous": None} for item in items]
    read = read or Read()
    table = read(pa.Table.from_pylist(rows, WORK_ITEM))
    columns = (table[name].to_pylist() for name in ("bytes", "status", "error"))
    return [Row(*values) for values in zip(*columns, strict=True)]


def list_file(path: Path | str) -> list[WorkItem]:
    return list(open_source(SourceConfig(str(path))))


@pytest.mark.parametrize("name", ["faces.tar.gz", "faces.tgz", "FACES.TAR.GZ"])
@pytest.mark.parametrize("kind", ["one member", "several members", "zeros behind"])
def test_members_are_those_of_the_tar(tmp_path: Path, name: str, kind: str) -> None:
    content = PACKED
    if kind == "several members":  # as pigz and bgzip write them
        content = b"".join(gzip.compress(TAR[at : at + 50_001]) for at in range(0, len(TAR), 50_001))
    elif kind == "zeros behind":
        content += bytes(70_000)
    path = tmp_path / name
    path.write_bytes(content)
    items = list_file(path)
    assert [item.uri for item in items] == [f"{path}#{name}" for name in PHOTOS]
    assert [str(item.identity) for item in items] == [name[0] for name in PHOTOS]
    assert [row.data for row in read_items(items)] == list(PHOTOS.values())
    # Rows keep their names and places, so that a retry reads the same.
    assert list_file(path) == items


def test_members_in_order_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "faces.tar.gz"
    path.write_bytes(PACKED)
    items = list_file(path)
    opened: list[UnpackedStream] = []
    make = gzip_stream.open_packed_tar

    def open_counted(name: str | bytes) -> Any:
        stream, fingerprint = make(name)
        opened.append(stream)  # type: ignore[arg-type]
        return stream, fingerprint

    monkeypatch.setattr(gzip_stream, "open_packed_tar", open_counted)
    read = Read()
    for begin in range(0, len(items), 7):
        batch = items[begin : begin + 7][::-1]  # within a batch the order is the reader's own
        assert [row.data for row in read_items(batch, read)] == [PHOTOS[item.uri.partition("#")[2]] for item in batch]
    assert len(opened) == 1
    assert opened[0].restarts == 0


def test_members_here_and_there_are_read_from_an_unpacked_copy(tmp_path: Path) -> None:
    paths = [tmp_path / "a.tar.gz", tmp_path / "b.tar.gz"]
    for path in paths:
        path.write_bytes(PACKED)
    items = [item for path in paths for item in list_file(path)]
    random.Random(3).shuffle(items)
    reader = MemberReader()
    for item in items:
        assert item.offset is not None
        assert item.length is not None
        data = reader.read(item.path, item.offset, item.length)
        assert data == PHOTOS[item.uri.partition("#")[2]]
    assert len(reader._copies) == 2
    assert sum(reader._restarts.values()) <= 6


def test_without_room_for_a_copy_members_are_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzip_stream, "_FREE_BYTES", 1 << 62)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(PACKED)
    reader = MemberReader()
    for item in list_file(path)[::-15]:
        data = reader.read(item.path, item.offset or 0, item.length or 0)
        assert data == PHOTOS[item.uri.partition("#")[2]]
    assert not reader._copies


def test_limits_and_replaced_files_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(PACKED)
    items = list_file(path)
    rows = read_items(items, Read(max_bytes=7_000))
    assert {row.status for row in rows} == {OK, TOO_LARGE}
    path.write_bytes(PACKED + b"\0")
    assert {row.status for row in read_items(items)} == {REPLACED}
    path.unlink()
    rows = read_items(items)
    assert {row.status for row in rows} == {READ_ERROR}
    assert "no such file" in str(rows[0].error).lower()


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_what_a_truncated_file_still_holds_is_read(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(PACKED[: int(share * len(PACKED))])
    items = list_file(path)
    broken = items[-1]
    assert broken.listing_error is not None
    assert "truncated" in broken.listing_error
    assert broken.uri == str(path)
    rows = read_items(items[:-1])
    # The last member that was listed may be the one that is cut.
    assert all(row.data == PHOTOS[item.uri.partition("#")[2]] for item, row in zip(items[:-2], rows, strict=False))
    assert len(items) - 1 >= int(share * len(PHOTOS)) - 1


def test_foreign_files_are_rows(tmp_path: Path) -> None:
    contents = {
        "empty": (b"", "not packed with gzip"),
        "plain": (TAR, "not packed with gzip"),
        "text": (gzip.compress(b"no tar" * 1000), "tar"),
        "behind": (PACKED + b"something else", "damaged"),
        "checksum": (PACKED[:-8] + bytes(8), "damaged"),
    }
    for name, (content, reason) in contents.items():
        path = tmp_path / f"{name}.tar.gz"
        path.write_bytes(content)
        items = list_file(path)
        assert reason in str(items[-1].listing_error), name
        assert items[-1].uri == str(path)


def test_flipped_bytes_never_raise(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    content = gzip.compress(pack_tar({name: data[:500] for name, data in PHOTOS.items()}))
    generator = random.Random(11)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 3])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        items = list_file(path)
        rows = read_items([item for item in items if item.listing_error is None])
        assert all(row.status in (OK, READ_ERROR, TOO_LARGE) for row in rows)


def test_bombs_are_refused_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzip_stream, "_BOMB_BYTES", 1 << 20)
    member = tarfile.TarInfo("a/1.jpg")
    member.size = 1 << 40
    header = member.tobuf()
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    content = packer.compress(header) + b"".join(packer.compress(bytes(1 << 18)) for _ in range(20)) + packer.flush()
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(content)
    items = list_file(path)
    assert "100 times its size" in str(items[-1].listing_error)
    # A member that claims a size which is allowed is not unpacked either.
    with pytest.raises(StorageError, match="100 times"):
        MemberReader().read(os.fsencode(path), 512, 200 << 20)


def test_a_packed_tar_in_a_store_is_one_stream(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put_object(Bucket="faces", Key="set/train-0000.tar.gz", Body=PACKED)
    requests: list[tuple[int | None, int | None]] = []
    ask = storage.files._read_remote

    def ask_counted(path: Any, offset: Any, length: Any, *rest: Any) -> bytes:
        requests.append((offset, length))
        return ask(path, offset, length, *rest)

    monkeypatch.setattr(storage.files, "_read_remote", ask_counted)
    items = list_file("s3://faces/set")
    assert [item.uri for item in items] == [f"s3://faces/set/train-0000.tar.gz#{name}" for name in PHOTOS]
    listed = len(requests)
    assert listed <= 2  # the first bytes, and the rest
    assert [row.data for row in read_items(items)] == list(PHOTOS.values())
    assert len(requests) <= 2 * listed
