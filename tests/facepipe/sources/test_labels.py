"""One person is one text, whatever brought the label: any type, any file, any normal form."""

import csv
import io
import json
import tarfile
import unicodedata
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.sources import SourceConfig, open_source
from facepipe.sources.labels import (
    find_unnormalised,
    format_label,
    format_labels,
    list_label_forms,
    normalise_labels,
)

NUMBERS = st.integers(-(2**53), 2**53)


def list_labels(uri: Path, **config: Any) -> list[str | None]:
    return [item.identity for item in open_source(SourceConfig(str(uri), **config))]


@given(NUMBERS)
def test_a_whole_number_is_one_text(number: int) -> None:
    texts = [str(number), f"{number}.0", f"{number:.6f}", f" {number}\n", f"{number}.", f"{float(number):.18e}"]
    values: list[Any] = [number, float(number), Decimal(number), Decimal(f"{number}.00"), np.int64(number), [number]]
    values += [pa.scalar(number), pa.scalar(float(number)), np.float64(number), *texts, *map(str.encode, texts)]
    values += [json.loads(json.dumps(number)), json.loads(json.dumps(float(number)))]
    assert {format_label(value) for value in values} == {str(number)}


@given(st.lists(st.integers(-(2**24), 2**24) | st.none(), min_size=1))
def test_columns_of_every_type_of_number_are_alike(numbers: list[int | None]) -> None:
    expected = [None if number is None else str(number) for number in numbers]
    for kind in (pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.decimal128(12, 2)):
        assert format_labels(pa.array(numbers, kind)) == expected
        assert format_labels(pa.array(numbers, kind).dictionary_encode()) == expected
    texts = [None if number is None else f"{number}.0" for number in numbers]
    assert format_labels(pa.chunked_array([texts])) == expected
    with_nan = [np.nan if number is None else number for number in numbers]
    assert format_labels(pa.array(with_nan, pa.float64(), from_pandas=False)) == expected


@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")))
def test_a_text_is_written_once_and_for_all(text: str) -> None:
    label = format_label(text)
    assert label is None or label.encode("utf-8")
    assert format_label(label) == label
    forms = {unicodedata.normalize(form, text) for form in ("NFC", "NFD")}
    assert {format_label(form) for form in forms} == {label}
    assert {format_label(f" {form}\t") for form in forms} == {label}


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("Jose\u0301", "Jos\u00e9"),
        ("\U00020bb7\u91ce \U0001f600", "\U00020bb7\u91ce \U0001f600"),
        ("Jos\udce9", "Jos\\xe9"),  # a folder of a Latin-1 disk
        (b"Jos\xe8", "Jos\\xe8"),
        (b"ann\0\0", "ann"),  # a string of fixed length
        ("\ufeffann", "ann"),
        ("007", "007"),
        ("0000045", "0000045"),
        ("1e5", "1e5"),  # hex
        ("12e+3", "12e+3"),
        ("1.2345678E7", "12345678"),  # as Java and Spark write a float
        ("1.0E-3", "0.001"),
        ("1.5", "1.5"),
        ("-0.000000", "0"),
        (1e18, "1000000000000000000"),
        (np.float32(0.1), "0.1"),
        (True, "True"),
        (date(2024, 5, 1), "2024-05-01"),
        ("Nan", "Nan"),
        ("Null", "Null"),
        ("null", "null"),
        ("NA", "NA"),
        ("n.1.0", "n.1.0"),
    ],
)
def test_texts(value: object, label: str) -> None:
    assert format_label(value) == label


@pytest.mark.parametrize(
    "value",
    [None, np.nan, np.float32("nan"), pa.scalar(None, pa.string()), np.datetime64("NaT"), [], ["a", "b"], {"id": 1}],
)
def test_values_that_are_no_label(value: object) -> None:
    assert format_label(value) is None


@pytest.mark.parametrize(
    "value",
    ["nan", "NaN", "<NA>", "None", "", " \n", b""],
)
def test_texts_that_are_no_label(value: object) -> None:
    assert format_label(value) is None


@settings(max_examples=30)
@given(label=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1) | NUMBERS.map(str) | st.just("1.0"))
def test_every_source_writes_a_label_alike(label: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("labels")
    expected = format_label(label)
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, label)
        with open(folder / "list.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["path", "identity"], ["1.jpg", text]])
        pq.write_table(pa.table({"bytes": [b"x"], "identity": [text]}), folder / "rows.parquet")
        with tarfile.open(folder / "shard.tar", "w") as tar:
            members = {"1.jpg": b"x", "1.cls": text.encode(), "2.jpg": b"x"}
            members["2.json"] = json.dumps({"identity": text}).encode()
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        assert list_labels(folder / "list.csv") == [expected]
        assert list_labels(folder / "rows.parquet") == [expected]
        assert list_labels(folder / "shard.tar") == [expected] * 2


def test_folders_write_a_label_alike(tmp_path: Path) -> None:
    for name in ("Jos\u00e9", "Jose\u0301", "7", "7.0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"x")
    assert sorted(map(str, list_labels(tmp_path))) == ["7", "7", "Jos\u00e9", "Jos\u00e9"]


@given(st.text(st.characters(exclude_categories=())))
def test_a_typed_label_finds_what_any_version_stored(text: str) -> None:
    forms = list_label_forms(text)
    assert all(form.encode("utf-8") or form == "" for form in forms)
    assert forms[0] == (format_label(text) or unicodedata.normalize("NFC", forms[-1]))
    if text.isprintable():
        assert {text, unicodedata.normalize("NFD", forms[0])} <= set(forms)


@given(st.lists(st.none() | st.text()))
def test_a_column_is_brought_into_normal_form(labels: list[str | None]) -> None:
    expected = [None if label is None else unicodedata.normalize("NFC", label) for label in labels]
    array = pa.array(labels, pa.string())
    for column in (array, pa.chunked_array([array, array.slice(1)])):
        normal = normalise_labels(column)
        assert normal.to_pylist()[: len(labels)] == expected
        assert normal.type == pa.string()
        assert not find_unnormalised(normal)
