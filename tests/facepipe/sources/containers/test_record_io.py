"""RecordIO: images with and without an index, records cut at the magic number, damaged and foreign files."""

import contextlib
import os
import random
from pathlib import Path

import pytest
from archives import MAGIC, pack_header, pack_record, write_records
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.sources.containers.record_io import RecordReader, unpack_record
from facepipe.sources.containers.unpack import unpack_member
from facepipe.sources.identity import make_identity_rule
from facepipe.sources.item import WorkItem

IMAGES = [(b"\xff\xd8" + bytes([n]) * (n * 7 + 3), n // 3) for n in range(36)]
# The magic number at a multiple of four of the record, twice in a row, and elsewhere, where it is no cut.
CUT = b"\xff\xd8" + bytes(2) + MAGIC + MAGIC + b"ab" + MAGIC + b"end"


def list_file(path: Path) -> list[WorkItem]:
    return list(RecordReader(make_identity_rule("auto")).list_items(str(path)))


def read_item(item: WorkItem) -> bytes:
    return unpack_member(os.fsdecode(item.path), storage.read(item.path, item.offset, item.length), 1 << 20)


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_each_image_is_listed_with_its_person(tmp_path: Path, index: bool) -> None:
    path = tmp_path / "train.rec"
    write_records(path, IMAGES, index=index)
    items = list_file(path)
    assert [item.uri for item in items] == [f"{path}#{number}" for number in range(1, 37)]
    assert [item.identity for item in items] == [str(person) for _, person in IMAGES]
    assert [read_item(item) for item in items] == [image for image, _ in IMAGES]
    assert not any(item.listing_error for item in items)
    assert len({item.fingerprint for item in items}) == 36


@given(st.lists(st.one_of(st.just(MAGIC), st.binary(max_size=9)), max_size=12).map(b"".join), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_a_record_that_is_cut_comes_back_whole(content: bytes, shift: int) -> None:
    data = bytes(shift) + content
    record = pack_record(pack_header(1, 2.0) + data)
    assert unpack_record(record) == data
    assert unpack_record(record + b"\x00\x00\x00") == data, "what follows the last part is not the record's"


def test_an_image_with_the_magic_number_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.rec"
    write_records(path, [(b"\xff\xd8first", 1), (CUT, 1), (b"\xff\xd8last", 2)])
    for with_index in (True, False):
        if not with_index:
            path.with_suffix(".idx").unlink()
        assert [read_item(item) for item in list_file(path)] == [b"\xff\xd8first", CUT, b"\xff\xd8last"]


def test_several_labels_of_an_image(tmp_path: Path) -> None:
    """The first one is the person, as insightface's reader takes it."""
    path = tmp_path / "train.rec"
    path.write_bytes(pack_record(pack_header(1, (7.0, 0.5)) + b"\xff\xd8image"))
    (item,) = list_file(path)
    assert item.identity == "7"
    assert read_item(item) == b"\xff\xd8image"


def test_labels_beyond_sixteen_bits_stay_whole_numbers(tmp_path: Path) -> None:
    path = tmp_path / "train.rec"
    write_records(path, [(b"\xff\xd8", 360_231), (b"\xff\xd9", 2_059_905)])
    assert [item.identity for item in list_file(path)] == ["360231", "2059905"]


def test_the_index_of_another_file_is_told(tmp_path: Path) -> None:
    write_records(tmp_path / "train.rec", IMAGES)
    write_records(tmp_path / "other.rec", [(image + b"more", person) for image, person in IMAGES])
    (tmp_path / "other.idx").replace(tmp_path / "train.idx")
    items = list_file(tmp_path / "train.rec")
    assert any("train.idx is the index of another file" in str(item.listing_error) for item in items)


@pytest.mark.parametrize("text", ["", "1\n", "a\tb\n", "1\t2\t3\n", "\x00\x01\x02"])
def test_an_index_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.rec"
    write_records(path, IMAGES)
    path.with_suffix(".idx").write_text(text)
    assert list_file(path)[-1].listing_error


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_a_file_that_is_cut_off_gives_what_is_there_and_says_so(tmp_path: Path, index: bool) -> None:
    path = tmp_path / "train.rec"
    write_records(path, IMAGES, index=index)
    data = path.read_bytes()
    inside = data.find(IMAGES[20][0]) + 10
    for size in (0, 1, 7, 8, 36, inside, len(data) - 40, len(data) - 5):
        path.write_bytes(data[:size])
        items = list_file(path)
        images = [read_item(item) for item in items if item.listing_error is None]
        assert images == [image for image, _ in IMAGES[: len(images)]]
        if 0 < size <= inside:
            assert any(item.listing_error for item in items)


@pytest.mark.parametrize("rest", ["", "\t"])
def test_an_index_that_is_cut_off_in_a_line_is_told(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "train.rec"
    write_records(path, IMAGES)
    lines = path.with_suffix(".idx").read_text().splitlines()
    key = lines[-1].split("\t")[0]
    path.with_suffix(".idx").write_text("\n".join(lines[:-1]) + f"\n{key}{rest}")
    items = list_file(path)
    broken = [item.listing_error for item in items if item.listing_error is not None]
    assert broken, "nothing is passed over in silence"
    assert "train.idx" in str(broken[0])


def test_damage_ends_in_rows_and_never_in_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "train.rec"
    write_records(path, [*IMAGES, (CUT, 12)])
    records = path.read_bytes()
    index = path.with_suffix(".idx").read_bytes()
    rng = random.Random(1)
    for turn in range(300):
        damaged = bytearray(records if turn % 2 else index)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged if turn % 2 else records)
        path.with_suffix(".idx").write_bytes(index if turn % 2 else damaged)
        for item in list_file(path):
            if item.listing_error is None:
                with contextlib.suppress(StorageError):
                    read_item(item)
