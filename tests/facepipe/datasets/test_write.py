"""Datasets: what is written is what was there, byte by byte, in any format and from any source; nothing is half written."""

import csv
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from archives import write_records

from facepipe.datasets.shards import _SHARD_IMAGES
from facepipe.datasets.write import DatasetFormat, write_dataset
from facepipe.errors import SourceError, StorageError
from facepipe.gallery import Contract, Gallery, suppressed
from facepipe.hashing import compute_image_id
from facepipe.schema import WORK_ITEM
from facepipe.sources import SourceConfig, open_source
from facepipe.sources.containers.record_io import pack_header, pack_record, unpack_record
from facepipe.stages.read import Read

FORMATS: tuple[DatasetFormat, ...] = ("rec", "webdataset", "huggingface")
PERSONS = ("carl", "ann", "bob", "Zoë")
MAGIC = bytes.fromhex("0a23d7ce")


def draw(person: int, n: int) -> bytes:
    """An image that holds the magic number of records here and there."""
    noise = np.random.default_rng([person, n]).bytes(300 + 13 * n + person)
    return b"\xff\xd8" + noise[:90] + MAGIC * n + noise[90:] + b"\xff\xd9"


def write_list(folder: Path, names: tuple[str, ...] = PERSONS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["path,identity"]
    for n in range(5):  # persons in turn, so that they have to be sorted
        for person, name in enumerate(names):
            (folder / f"{person}_{n}.jpg").write_bytes(draw(person, n))
            lines.append(f"{person}_{n}.jpg,{name}")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder / "train.csv"


def read_back(out: Path, name: str = "") -> list[tuple[str, str]]:
    """(image id, label) of a dataset, with the names of labels.csv, in its order."""
    with (out / "labels.csv").open(newline="") as file:
        names = {row["number"]: row["identity"] for row in csv.DictReader(file)}
    items = list(open_source(SourceConfig(str(out / name))))
    assert not any(item.listing_error for item in items)
    rows = [{**item._asdict(), "identity": None, "previous": None} for item in items]
    found = Read()(type_table(rows))
    labels = [names.get(str(item.identity), str(item.identity)) for item in items]
    return list(zip(found["image_id"].to_pylist(), labels, strict=True))


def type_table(rows: list[dict[str, object]]) -> "pa.Table":
    return pa.Table.from_pylist(rows, WORK_ITEM)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_is_what_was_there(tmp_path: Path, kind: DatasetFormat) -> None:
    path = write_list(tmp_path / "photos")
    summary = write_dataset(open_source(SourceConfig(str(path))), str(tmp_path / "out"), kind)
    assert (summary.images, summary.persons, summary.left_out) == (20, 4, {})
    expected = [(compute_image_id(draw(person, n)), name) for person, name in enumerate(PERSONS) for n in range(5)]
    found = read_back(tmp_path / "out")
    assert sorted(found) == sorted(expected)
    labels = [label for _, label in found]
    assert labels == sorted(labels), "images of a person lie side by side"
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_dataset_of_a_dataset_is_the_same(tmp_path: Path, kind: DatasetFormat) -> None:
    """Through every other format and back."""
    path = write_list(tmp_path / "photos", ("7", "12", "104", "9"))
    write_dataset(open_source(SourceConfig(str(path))), str(tmp_path / "first"), kind)
    first = read_back(tmp_path / "first")
    source = str(tmp_path / "first")
    for n, other in enumerate((*(kind_ for kind_ in FORMATS if kind_ != kind), kind)):
        write_dataset(open_source(SourceConfig(source)), str(tmp_path / f"next{n}"), other)
        source = str(tmp_path / f"next{n}")
    assert [image for image, _ in read_back(Path(source))] == [image for image, _ in first]
    if kind == "rec":
        for name in ("train.rec", "train.idx", "property"):
            assert (tmp_path / "first" / name).read_bytes() == (Path(source) / name).read_bytes()


def test_records_are_those_of_insightface(tmp_path: Path) -> None:
    """The whole file, against a writer of the tests' own."""
    path = write_list(tmp_path / "photos", ("0", "1", "2", "3"))
    write_dataset(open_source(SourceConfig(str(path))), str(tmp_path / "out"), "rec")
    write_records(tmp_path / "train.rec", [(draw(person, n), person) for person in range(4) for n in range(5)])
    assert (tmp_path / "out" / "train.rec").read_bytes() == (tmp_path / "train.rec").read_bytes()
    assert (tmp_path / "out" / "train.idx").read_text() == (tmp_path / "train.idx").read_text()
    assert (tmp_path / "out" / "property").read_text() == "4,0,0\n"  # noise has no size
    lines = (tmp_path / "out" / "train.lst").read_text().splitlines()
    assert lines[5] == f"6\t1\t{tmp_path}/photos/1_0.jpg"


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    path = write_list(tmp_path / "photos", ("10", "9", "100", "2"))
    write_dataset(open_source(SourceConfig(str(path))), str(tmp_path / "out"), "rec")
    assert (tmp_path / "out" / "labels.csv").read_text().split() == ["number,identity", "0,2", "1,9", "2,10", "3,100"]


def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path) -> None:
    path = write_list(tmp_path / "photos")
    for n in range(5):
        (tmp_path / "photos" / f"1_{n}.jpg").unlink()  # all of a person: no number is left without images
    with path.open("a") as file:
        file.write("0_0.jpg,\n../outside.jpg,ann\n")
    summary = write_dataset(open_source(SourceConfig(str(path))), str(tmp_path / "out"), "rec")
    assert (summary.images, summary.persons) == (15, 3)
    assert sum(summary.left_out.values()) == 7
    assert any("0_0.jpg" in uri for uris in summary.examples.values() for uri in uris)
    assert {label for _, label in read_back(tmp_path / "out")} == {"carl", "bob", "Zoë"}


@pytest.mark.parametrize("kind", FORMATS)
def test_erased_images_are_in_no_dataset(tmp_path: Path, kind: DatasetFormat) -> None:
    path = write_list(tmp_path / "photos")
    gallery = str(tmp_path / "gallery")
    Gallery.create(gallery, Contract.from_models("fake-detector", "fake-embedder", flip=False))
    uris = [f"{tmp_path}/photos/2_{n}.jpg" for n in range(5)]
    suppressed.suppress_images(gallery, "request", uris, [compute_image_id(draw(0, 3))])
    summary = write_dataset(open_source(SourceConfig(str(path))), str(tmp_path / "out"), kind, gallery)
    assert summary.left_out == {"erased": 6}
    assert not any(summary.examples.values()), "an erased image is not named"
    found = {image for image, _ in read_back(tmp_path / "out")}
    assert compute_image_id(draw(0, 3)) not in found
    assert not found & {compute_image_id(draw(2, n)) for n in range(5)}
    assert len(found) == 14


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    path = write_list(tmp_path / "photos")
    source = open_source(SourceConfig(str(path)))
    (tmp_path / "out").mkdir()
    write_dataset(source, str(tmp_path / "out"), "rec")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in os.listdir(tmp_path / "out")}
    with pytest.raises(StorageError, match="exists"):
        write_dataset(source, str(tmp_path / "out"), "rec")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in os.listdir(tmp_path / "out")} == before
    with pytest.raises(StorageError, match="object store"):
        write_dataset(source, "s3://bucket/out", "rec")


def test_nothing_is_left_of_a_dataset_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_list(tmp_path / "photos")
    (tmp_path / "none.txt").write_text("photos/0_0.jpg\n")
    with pytest.raises(SourceError, match="no label"):
        write_dataset(
            open_source(SourceConfig(str(tmp_path / "none.txt"), identity="none")), str(tmp_path / "out"), "rec"
        )

    def fail(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("facepipe.datasets.records.pack_record", fail)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(open_source(SourceConfig(str(path))), str(tmp_path / "out"), "rec")
    assert sorted(os.listdir(tmp_path)) == ["none.txt", "photos"]


def test_shards_have_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _SHARD_IMAGES > 1000
    monkeypatch.setattr("facepipe.datasets.shards._SHARD_IMAGES", 7)
    path = write_list(tmp_path / "photos")
    for kind, pattern in (("webdataset", "*.tar"), ("huggingface", "data/*.parquet")):
        out = tmp_path / kind
        write_dataset(open_source(SourceConfig(str(path))), str(out), kind)  # type: ignore[arg-type]
        assert len(list(out.glob(pattern))) == 3
        assert len(read_back(out)) == 20


def test_a_large_image_in_a_record(tmp_path: Path) -> None:
    data = MAGIC * 50_000 + b"tail"
    assert unpack_record(pack_record(pack_header(3, [2.0]) + data)) == data
