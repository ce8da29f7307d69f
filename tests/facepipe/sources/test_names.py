"""Names of images: short, stable, the same in every working directory, and never what an image holds."""

import base64
import json
from pathlib import Path
from typing import Any

import cv2
import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw
from hypothesis import strategies as st

from facepipe.schema import OK, READ_ERROR, WORK_ITEM
from facepipe.sources import SourceConfig, WorkItem, open_source
from facepipe.sources.item import make_file_uri
from facepipe.sources.parquet import find_bytes_column, find_name_column, holds_image, shorten_name
from facepipe.stages import Read

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MOST = 200  # characters that a name here may have; the smallest picture has more


def encode(n: int) -> bytes:
    return cv2.imencode(".png", draw(n))[1].tobytes()


def list_items(path: Path, **keys: Any) -> list[WorkItem]:
    return list(open_source(SourceConfig(str(path), **keys)))


def read_statuses(items: list[WorkItem]) -> list[str]:
    columns = [*zip(*items, strict=True), [None] * len(items)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, WORK_ITEM, strict=True)]
    return list(Read()(pa.table(arrays, WORK_ITEM))["status"].to_pylist())


def write_parquet(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, path)
    return path


def hf_images(count: int, path: str | None = "a/p{}.png") -> pa.Array:
    rows = [{"bytes": encode(n), "path": None if path is None else path.format(n)} for n in range(count)]
    return pa.array(rows, HF_IMAGE)


BYTES_KINDS = {
    "binary": pa.binary(),
    "large": pa.large_binary(),
    "view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
}


@pytest.mark.parametrize("column", ["image", "bytes", "jpg", "content"])
@pytest.mark.parametrize("kind", BYTES_KINDS)
def test_a_column_of_bytes_names_nothing(column: str, kind: str, tmp_path: Path) -> None:
    images = pa.array([encode(n) for n in range(3)], pa.binary())
    column_array = images.dictionary_encode() if kind == "dictionary" else images.cast(BYTES_KINDS[kind])
    path = write_parquet(tmp_path / "a.parquet", {column: column_array})
    items = list_items(path)
    assert [item.uri for item in items] == [f"{path}#{n}" for n in range(3)]
    assert read_statuses(items) == [OK] * 3


def test_hugging_face_rows_are_named_by_the_path_beside_the_bytes(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"image": hf_images(3), "label": [0, 1, 0]})
    items = list_items(path)
    assert [item.uri for item in items] == [f"{path}#{n}/a/p{n}.png" for n in range(3)]
    assert [item.identity for item in items] == ["0", "1", "0"]
    assert read_statuses(items) == [OK] * 3


def test_rows_of_a_struct_without_a_path_are_named_by_their_number(tmp_path: Path) -> None:
    images = pa.array([{"bytes": encode(0), "path": None}, None, {"bytes": None, "path": "x.png"}], HF_IMAGE)
    path = write_parquet(tmp_path / "a.parquet", {"image": images})
    items = list_items(path)
    assert [item.uri for item in items] == [f"{path}#0", f"{path}#1", f"{path}#2/x.png"]
    assert read_statuses(items) == [OK, READ_ERROR, READ_ERROR]


@pytest.mark.parametrize("is_declared", [True, False])
def test_an_image_column_of_any_name_is_found(is_declared: bool, tmp_path: Path) -> None:
    """By Hugging Face's own schema, or because nothing else is a struct of bytes and path."""
    features = {"portrait": {"_type": "Image"}, "mask": {"_type": "Value"}, "n": {"_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if is_declared else None
    columns: dict[str, Any] = {"portrait": hf_images(2), "n": [1, 2]}
    if is_declared:
        columns["mask"] = hf_images(2)
    path = write_parquet(tmp_path / "a.parquet", columns, metadata)
    items = list_items(path)
    assert [item.uri for item in items] == [f"{path}#{n}/a/p{n}.png" for n in range(2)]
    assert read_statuses(items) == [OK] * 2


def test_columns_are_found_by_name_and_type() -> None:
    def find(*fields: tuple[str, pa.DataType], metadata: dict[str, str] | None = None) -> tuple[str | None, str | None]:
        schema = pa.schema(list(fields), metadata)
        bytes_column = find_bytes_column(schema)
        return bytes_column, find_name_column(schema, bytes_column)

    assert find(("image", pa.string())) == (None, "image")
    assert find(("image", pa.dictionary(pa.int32(), pa.string()))) == (None, "image")
    assert find(("image", HF_IMAGE), ("url", pa.string())) == ("image", "url")
    assert find(("image", HF_IMAGE), ("mask", HF_IMAGE)) == ("image", "image.path")
    assert find(("a", HF_IMAGE), ("b", HF_IMAGE)) == (None, None), "either could be the image"
    assert find(("image", pa.list_(pa.uint8())), ("path", pa.string())) == (None, "path")
    assert find(("thumb", pa.binary()), ("path", pa.string())) == (None, "path"), "not every bytes column is the image"
    for damaged in ("{", "[]", '{"info": {"features": {"a": 5}}}'):
        assert find(("a", HF_IMAGE), metadata={"huggingface": damaged}) == ("a", "a.path")


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_an_image_as_text_becomes_a_row_that_says_so(prefix: str, tmp_path: Path) -> None:
    texts = [prefix + base64.b64encode(data).decode() for data in (encode(0), b"\xff\xd8\xff\xe0" + bytes(90))]
    for column in ("image", "path"):
        path = write_parquet(tmp_path / "a.parquet", {column: texts})
        (tmp_path / "list.csv").write_text(f"{column},label\n" + "".join(f"{text},ann\n" for text in texts))
        for items in (list_items(path), list_items(tmp_path / "list.csv")):
            assert all(len(item.uri) - len(str(tmp_path)) < 32 for item in items)
            assert all("store images as binary" in (item.listing_error or "") for item in items)
            assert len({item.uri for item in items}) == 2


def test_names_beside_bytes_are_cut_when_they_are_long(tmp_path: Path) -> None:
    names = ["a" * 3000, "a" * 2999 + "b", "x.png", "", base64.b64encode(encode(1)).decode()]
    path = write_parquet(tmp_path / "a.parquet", {"bytes": [encode(n) for n in range(5)], "path": names})
    parts = [item.uri.partition("#")[2] for item in list_items(path)]
    assert parts[2:] == ["2/x.png", "3/", "4"]
    assert all(len(part) < MOST for part in parts)
    assert parts[0].split("/")[1] != parts[1].split("/")[1], "what is cut off still tells two names apart"


@hypothesis.given(st.text(max_size=80), st.integers(min_value=1, max_value=4000))
def test_shortened_names_stay_different_and_short(text: str, times: int) -> None:
    name = text * times
    short = shorten_name(name)
    assert len(short) <= 1024
    assert short == name or len(name) > 1024
    assert shorten_name(f"{name}!") != short


@pytest.mark.parametrize(
    "name",
    [
        "/9j/photo.jpg",
        "R0lGODs",
        "/9j/4AAQSkZJRg/person one/0001.jpg",
        "UklGRfolder/" * 20 + "a.webp",
        "data/x.png",
        "a" * 4096,
    ],
)
def test_paths_are_not_taken_for_images(name: str) -> None:
    assert not holds_image(name)


@pytest.mark.parametrize(
    "url", ["https://example.org/a/1.jpg", "HTTP://Example.org/b.png", "ftp://h/c.jpg", "hf://d/e.jpg"]
)
def test_urls_keep_their_names_in_every_working_directory(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.csv").write_text(f"url,identity\n{url},ann\n")
    write_parquet(tmp_path / "a.parquet", {"url": [url]})
    for folder in (tmp_path, Path("/")):
        monkeypatch.chdir(folder)
        for name in ("list.csv", "a.parquet"):
            (item,) = list_items(tmp_path / name)
            assert (item.uri, bool(item.listing_error)) == (url, True)


def test_a_relative_source_is_the_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the folder in which the command is typed, and however the path is written."""
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(encode(1))
    write_parquet(photos / "rows.parquet", {"bytes": [encode(2)], "path": ["x.png"]})
    (tmp_path / "list.csv").write_text("path,label\na.png,ann\n")
    monkeypatch.chdir(tmp_path)
    assert [i.uri for i in list_items(Path("photos/../photos/"))] == [f"{photos}/a.png"]
    assert [i.uri for i in list_items(Path("photos/rows.parquet"))] == [f"{photos}/rows.parquet#0/x.png"]
    assert [i.uri for i in list_items(Path("list.csv"), root="photos")] == [f"{photos}/a.png"]
    assert make_file_uri("photos/a.png") == f"{photos}/a.png"
