"""Zip archives: stored and deflated members, streamed ones, names that lead elsewhere, bombs and damage."""

import contextlib
import io
import os
import random
import zipfile
from pathlib import Path

import pytest

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.sources.containers.unpack import unpack_member
from facepipe.sources.containers.zip_archive import ZipReader
from facepipe.sources.identity import make_identity_rule
from facepipe.sources.item import WorkItem
from facepipe.sources.selection import PassedOver
from facepipe.storage import TooLargeError

PHOTOS = {f"{person}/{n}.jpg": b"\xff\xd8" + person.encode() * 50 + bytes([n]) for person in "ab" for n in range(3)}


def write_zip(path: Path, method: int, members: dict[str, bytes] = PHOTOS, *, streamed: bool = False) -> None:
    class Unseekable(io.BytesIO):
        """zipfile writes sizes behind the data of what it cannot seek in."""

        def seekable(self) -> bool:
            return False

        def seek(self, *position: int) -> int:
            raise io.UnsupportedOperation

    buffer = Unseekable() if streamed else io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    path.write_bytes(buffer.getvalue())


def list_file(path: Path, passed_over: PassedOver | None = None) -> list[WorkItem]:
    return list(ZipReader(make_identity_rule("folder"), passed_over=passed_over).list_items(str(path)))


def read_item(item: WorkItem, max_bytes: int = 1 << 20) -> bytes:
    return unpack_member(os.fsdecode(item.path), storage.read(item.path, item.offset, item.length), max_bytes)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("streamed", [False, True], ids=["", "streamed"])
@pytest.mark.parametrize("prefix", [b"", b"#!/bin/sh\nexit 0\n"], ids=["", "behind a program"])
def test_members_are_read_by_their_place(tmp_path: Path, method: int, streamed: bool, prefix: bytes) -> None:
    path = tmp_path / "faces.zip"
    write_zip(path, method, streamed=streamed)
    path.write_bytes(prefix + path.read_bytes())
    items = list_file(path)
    assert [item.uri for item in items] == [f"{path}#{name}" for name in PHOTOS]
    assert [read_item(item) for item in items] == list(PHOTOS.values())
    assert [item.identity for item in items] == [name[0] for name in PHOTOS]


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "faces.zip"
    others = {"readme.txt": b"", "inner.zip": b"", "__MACOSX/a/._1.jpg": b"", "a/.hidden.jpg": b"", "empty/": b""}
    write_zip(path, zipfile.ZIP_STORED, PHOTOS | others)
    passed_over = PassedOver()
    assert len(list_file(path, passed_over)) == len(PHOTOS)
    assert passed_over.total == 4


def test_names_are_only_names(tmp_path: Path) -> None:
    path = tmp_path / "faces.zip"
    names = ["../../etc/a.jpg", "/abs/b.jpg", "c\\d.jpg", "é/ü.jpg", "a/1.jpg"]
    with zipfile.ZipFile(path, "w") as archive:
        for name in [*names, "a/1.jpg"]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("warnings.warn", lambda *message, **options: None)  # the name is there twice
                archive.writestr(name, name.encode())
    items = list_file(path)
    assert len({item.uri for item in items}) == 6
    assert all(item.path == os.fsencode(path) for item in items)
    assert [read_item(item).decode() for item in items] == [*names, "a/1.jpg"]


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "faces.zip"
    write_zip(path, zipfile.ZIP_DEFLATED, {"bomb.jpg": bytes(64 << 20)})
    assert path.stat().st_size < 1 << 17
    (item,) = list_file(path)
    with pytest.raises(TooLargeError):
        read_item(item)


def test_members_that_share_their_bytes_are_told(tmp_path: Path) -> None:
    """A bomb of overlapping members: each names the same place."""
    path = tmp_path / "faces.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.jpg", b"\xff\xd8" * 1000)
        first = archive.infolist()[0]
        for n in range(2, 5):
            copy = zipfile.ZipInfo(f"a/{n}.jpg")
            for field in ("header_offset", "compress_size", "file_size", "CRC", "compress_type"):
                setattr(copy, field, getattr(first, field))
            archive.filelist.append(copy)
        archive._didModify = True  # type: ignore[attr-defined]
    items = list_file(path)
    assert len(items) == 4
    assert sum(item.listing_error is not None for item in items) == 3


def test_passwords_and_other_methods_are_rows_that_say_so(tmp_path: Path) -> None:
    path = tmp_path / "faces.zip"
    write_zip(path, zipfile.ZIP_BZIP2)
    assert all("method 12" in str(item.listing_error) for item in list_file(path))
    write_zip(path, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    central = data.find(b"PK\x01\x02")
    data[central + 8] |= 1
    path.write_bytes(data)
    assert "password" in str(list_file(path)[0].listing_error)


def test_damage_ends_in_rows_and_never_in_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "faces.zip"
    rng = random.Random(1)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        write_zip(path, method)
        whole = path.read_bytes()
        for turn in range(200):
            damaged = bytearray(whole[: rng.randrange(len(whole))] if turn % 4 == 0 else whole)
            for _ in range(rng.randint(1, 3)):
                if damaged:
                    damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged)
            for item in list_file(path):
                if item.listing_error is None:
                    with contextlib.suppress(StorageError):
                        read_item(item)
    path.write_bytes(b"")
    assert "zip cannot be read" in str(list_file(path)[0].listing_error)
