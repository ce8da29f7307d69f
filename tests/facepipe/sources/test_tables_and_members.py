"""Labels in tables and tars: partitions, names of classes, columns of any type, and WebDataset's keys."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.errors import SourceError
from facepipe.sources import SourceConfig, open_source
from facepipe.sources.hugging_face import list_image_columns, read_class_names
from facepipe.sources.identity import read_partitions
from facepipe.sources.labels import format_label
from facepipe.sources.tar import split_key


def list_labels(uri: Path | str, **config: Any) -> list[str | None]:
    return [item.identity for item in open_source(SourceConfig(str(uri), **config))]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# ---------------------------------------------------------------- partitions


def test_partitions_are_columns(tmp_path: Path) -> None:
    table = pa.table(
        {"bytes": [b"a", b"b", b"c", b"d"], "identity": ["ann", "b/o b=2", None, "José"], "year": [1, 1, 2, 2]}
    )
    for names in (["identity"], ["year", "identity"]):
        root = tmp_path / "-".join(names)
        schema = pa.schema([(name, table.schema.field(name).type) for name in names])
        partitioning = ds.partitioning(schema, flavor="hive")
        ds.write_dataset(table, root, format="parquet", partitioning=partitioning)
        for kind in ("auto", "parquet"):
            assert sorted(map(str, list_labels(root, kind=kind))) == ["José", "None", "ann", "b/o b=2"]
        file = next(root.rglob("*.parquet"))
        assert list_labels(file) == [read_partitions(str(file))["identity"]], "one file of it alone"
    assert list_labels(tmp_path / "year-identity", label_column="year") == ["1", "1", "2", "2"]


def test_a_column_in_the_file_counts_before_a_partition(tmp_path: Path) -> None:
    (tmp_path / "label=folder").mkdir()
    pq.write_table(pa.table({"bytes": [b"a"], "label": ["file"]}), tmp_path / "label=folder" / "p.parquet")
    assert list_labels(tmp_path) == ["file"]


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), min_size=1, max_size=20))
def test_any_label_is_a_partition(label: str) -> None:
    path = f"year=2024/identity={quote(label, safe='')}/part-0.parquet"
    assert read_partitions(path) == {"year": "2024", "identity": label}


def test_partitions_of_images(tmp_path: Path) -> None:
    for folder in (
        "split=train/identity=ann",
        "split=test/identity=bob%20b",
        "split=test/identity=__HIVE_DEFAULT_PARTITION__",
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.jpg").write_bytes(b"x")
    assert sorted(map(str, list_labels(tmp_path))) == ["None", "ann", "bob b"]
    (tmp_path / "x").mkdir()
    for date in ("date=2024-05-01", "date=2024-05-02"):
        (tmp_path / "x" / date).mkdir()
        (tmp_path / "x" / date / "1.jpg").write_bytes(b"x")
    assert list_labels(tmp_path / "x") == [None, None]


# ---------------------------------------------------------------- columns


def write_hugging_face(path: Path, feature: Any, labels: pa.Array, column: str = "label") -> Path:
    table = pa.table({"bytes": [b"x"] * len(labels), column: labels})
    metadata = {"huggingface": json.dumps({"info": {"features": {column: feature}}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


CLASSES = {"names": ["ann", "Jose\u0301"], "_type": "ClassLabel"}


@pytest.mark.parametrize("column", ["label", "target"])
def test_names_of_classes(column: str, tmp_path: Path) -> None:
    path = write_hugging_face(tmp_path / "p.parquet", CLASSES, pa.array([0, 1, -1, None, 7]), column)
    assert list_labels(path) == ["ann", "José", None, None, "7"]
    for feature in ([CLASSES], {"feature": CLASSES, "_type": "Sequence"}):
        lists = pa.array([[1], [0, 1], [], None])
        path = write_hugging_face(tmp_path / "q.parquet", feature, lists, column)
        assert list_labels(path) == ["José", None, None, None], "several labels are no label"


@pytest.mark.parametrize(
    "metadata", [b"", b"{", b"[]", b'{"info": null}', b'{"info": {"features": {"label": 1}}}', b"[" * 100_000]
)
def test_schemas_that_name_no_classes(metadata: bytes, tmp_path: Path) -> None:
    schema = pa.schema([("label", pa.int64())], {b"huggingface": metadata})
    assert read_class_names(schema, "label") is None
    assert list_image_columns(schema) == []
    for names in (None, "ann", {"0": "ann"}):
        feature = json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}})
        assert read_class_names(pa.schema([], {"huggingface": feature}), "label") is None


def test_columns_of_every_type(tmp_path: Path) -> None:
    columns = [
        pa.array([1, 2, None]),
        pa.array([1.0, 2.0, float("nan")]),
        pa.array([1.0, 2.0, None], pa.float32()),
        pa.array(["1", "2.0", ""]),
        pa.array(["1", "2", None], pa.large_string()),
        pa.array([b"1", b"2", b""]),
        pa.array(["1", "2", None]).dictionary_encode(),
        pa.array([1, 2, None], pa.decimal128(5, 2)),
        pa.array([[1], [2], []], pa.list_(pa.int16())),
    ]
    for n, column in enumerate(columns):
        pq.write_table(pa.table({"bytes": [b"x"] * 3, "Identity": column}), tmp_path / f"{n}.parquet")
        assert list_labels(tmp_path / f"{n}.parquet") == ["1", "2", None], column.type


def test_an_empty_column_says_so(tmp_path: Path) -> None:
    for labels in (pa.nulls(2), pa.array([{"id": 1}, {"id": 2}]), pa.array([[1, 2], []])):
        pq.write_table(pa.table({"bytes": [b"x"] * 2, "label": labels}), tmp_path / "p.parquet")
        source = open_source(SourceConfig(str(tmp_path / "p.parquet")))
        assert [item.identity for item in source] == [None, None]
        assert source.notes == ("no image got a label: the column of labels is empty, or holds no single label",)


def test_a_table_without_a_label_says_so(tmp_path: Path) -> None:
    pq.write_table(pa.table({"bytes": [b"x"], "path": ["Ann/1.jpg"], "who": ["bob"]}), tmp_path / "p.parquet")
    source = open_source(SourceConfig(str(tmp_path / "p.parquet")))
    assert [item.identity for item in source] == [None], "the image's folder is not taken for the person instead"
    assert "none of its columns bytes, path, who is known to hold labels" in source.notes[0]
    assert list_labels(tmp_path / "p.parquet", label_column="who") == ["bob"]
    assert list_labels(tmp_path / "p.parquet", identity="folder") == ["Ann"]
    with pytest.raises(SourceError, match="has no column 'x'"):
        list_labels(tmp_path / "p.parquet", label_column="x")
    with pytest.raises(SourceError, match="--label-column NAME"):
        list_labels(tmp_path / "p.parquet", identity="label")


# ---------------------------------------------------------------- members of tars


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("000.jpg", "000"),
        ("000.seg.png", "000"),
        ("./a.b/000.left.jpg", "./a.b/000"),
        ("a.b/c", "a.b/c"),
        ("a/.hidden.jpg", "a/"),
        ("x..jpg", "x"),
    ],
)
def test_keys(name: str, key: str) -> None:
    assert split_key(name) == key


def test_the_key_ends_at_the_first_dot(tmp_path: Path) -> None:
    members = {
        "a.b/0.left.jpg": b"x",
        "a.b/0.right.jpg": b"y",
        "a.b/0.cls": b"7",
        "a.b/1.jpg": b"z",
        "a.b/1.meta.json": b'{"identity": "ann"}',
        "a.c/1.jpg": b"w",
    }
    assert list_labels(write_tar(tmp_path / "s.tar", members)) == ["7", "7", "ann", None]


@pytest.mark.parametrize("order", [("jpg", "cls", "json"), ("json", "cls", "jpg"), ("cls", "json", "jpg")])
def test_the_order_of_members_does_not_matter(order: tuple[str, ...], tmp_path: Path) -> None:
    data = {"jpg": b"x", "cls": b"3.0\n", "json": b'{"label": 4}'}
    path = write_tar(tmp_path / "s.tar", {f"{n}.{ending}": data[ending] for n in range(2) for ending in order})
    assert list_labels(path) == ["3", "3"]


@pytest.mark.parametrize(
    ("ending", "data", "label"),
    [
        ("cls", b"\xef\xbb\xbfann\r\n", "ann"),
        ("cls", b"Jos\xe9", "Jos\\xe9"),
        ("cls", b"nan", None),
        ("cls", b"", None),
        ("json", b'{"identity": null, "label": 7.0}', "7"),
        ("json", b'{"identity": NaN, "class": "ann"}', "ann"),
        ("json", b'{"identity": ["ann"]}', "ann"),
        ("json", b'{"identity": {"id": 3}}', None),
        ("json", b'{"person": "\\ud842\\udfb7"}', "\U00020bb7"),
        ("json", b'{"person": "\\ud842"}', "\\ud842"),
        ("json", b'{"person": ' + b"[" * 900 + b"7" + b"]" * 900 + b"}", "7"),
        ("json", b"[1]", None),
        ("json", b"{", None),
    ],
)
def test_labels_of_members(ending: str, data: bytes, label: str | None, tmp_path: Path) -> None:
    assert list_labels(write_tar(tmp_path / "s.tar", {"0.jpg": b"x", f"0.{ending}": data})) == [label]
    assert format_label(label) == label


def test_an_empty_label_is_not_the_folders_name(tmp_path: Path) -> None:
    members = {
        "Ann/0.jpg": b"x",
        "Ann/0.cls": b"",
        "Bob/1.jpg": b"y",
        "Bob/1.json": b'{"label": null}',
        "Eve/2.jpg": b"z",
        "Kim/2.jpg": b"z",
    }
    assert list_labels(write_tar(tmp_path / "s.tar", members)) == [None, None, "Eve", "Kim"]


def test_the_field_of_the_label_may_be_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"0.jpg": b"x", "0.json": b'{"label": 1, "who": "ann"}'})
    assert list_labels(path, label_column="who") == ["ann"]
    assert list_labels(path, label_prefix="set1-") == ["set1-1"]
