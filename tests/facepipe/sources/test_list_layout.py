"""Lists in the layouts that corpora are handed around in: which field is the image, and which the person."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.errors import SourceError
from facepipe.sources import SourceConfig, open_source
from facepipe.sources.labels import LABEL_COLUMNS, find_label_column
from facepipe.sources.list_layout import HEADER_URIS, detect_layout


def list_items(path: Path, **config: Any) -> tuple[list[tuple[str, str | None]], str]:
    """List a source, and return the (name, label) of its items, and its notes."""
    source = open_source(SourceConfig(str(path), **config))
    return [(item.uri.rpartition("/")[2], item.identity) for item in source], " ".join(source.notes)


@pytest.mark.parametrize("column", [*LABEL_COLUMNS, "Label", "IDENTITY"])
@pytest.mark.parametrize("image", ["path", "file_name", "Filename", "photo"])
def test_columns_are_known_by_their_names(column: str, image: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"split,{column},{image}\n" + "".join(f"train,p{n},{n}.jpg\n" for n in range(3)))
    found, note = list_items(tmp_path / "list.csv")
    assert found == [(f"{n}.jpg", f"p{n}") for n in range(3)]
    assert note == ""


@settings(max_examples=60)
@given(
    st.permutations(["image", "label", "split", "width"]),
    st.sampled_from(HEADER_URIS),
    st.sampled_from(LABEL_COLUMNS),
    st.sampled_from([",", "\t", ";"]),
)
def test_columns_may_stand_in_any_order(order: list[str], image: str, label: str, delimiter: str) -> None:
    names = {"image": image, "label": label, "split": "split", "width": "width"}
    values = {"image": "a b/1.jpg", "label": "Ann", "split": "train", "width": "640"}
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    writer.writerow([names[role] for role in order])
    writer.writerow([values[role] for role in order])
    layout = detect_layout(out.getvalue().splitlines(), "list")
    assert (layout.image, layout.label, layout.skip) == (order.index("image"), order.index("label"), 1)


@pytest.mark.parametrize("header", ["path,who,split", "filename,name,age", "photo,nickname,year"])
def test_unknown_columns_give_no_label(header: str, tmp_path: Path) -> None:
    """The images' folder is not taken for the person instead."""
    (tmp_path / "list.csv").write_text(f"{header}\nAnn/1.jpg,bob,train\nEve/2.jpg,ann,test\n")
    found, note = list_items(tmp_path / "list.csv")
    assert found == [("1.jpg", None), ("2.jpg", None)]
    assert note.startswith(f"no image of {tmp_path / 'list.csv'} got a label")
    assert "--label-column NAME" in note
    column = header.split(",")[1]
    assert list_items(tmp_path / "list.csv", label_column=column.upper())[0] == [("1.jpg", "bob"), ("2.jpg", "ann")]
    assert list_items(tmp_path / "list.csv", label_column=3)[0] == [("1.jpg", "train"), ("2.jpg", "test")]
    assert list_items(tmp_path / "list.csv", identity="folder")[0] == [("1.jpg", "Ann"), ("2.jpg", "Eve")]
    with pytest.raises(SourceError, match="has no column 'person': its columns are"):
        list_items(tmp_path / "list.csv", label_column="person")
    with pytest.raises(SourceError, match="--label-column"):
        list_items(tmp_path / "list.csv", identity="label")


def test_an_empty_label_is_not_the_folders_name(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,identity\nAnn/1.jpg,\nBob/2.jpg,nan\nBob/3.jpg,Bob\n")
    assert list_items(tmp_path / "list.csv")[0] == [("1.jpg", None), ("2.jpg", None), ("3.jpg", "Bob")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1\ta/0.png\t0\n1\ta/1.png\t0\n1\tb/2.png\t1\n", ["0", "0", "1"]),  # insightface
        ("1\ta/0.png\t0\t1.5\t2\t3\t4\n0\ta/1.png\t0\t1\t2\t3\t4\n1\tb/2.png\t1\t1\t2\t3\t4\n", ["0", "0", "1"]),
        ("0\t0.000000\ta/0.png\n1\t0.000000\ta/1.png\n2\t1.000000\tb/2.png\n", ["0", "0", "1"]),  # MXNet
        ("7\t12.0\ta/0.png\n", ["12"]),
        ("7\t12.0\t3.0\ta/0.png\n8\t13.0\t4.0\ta/1.png\n", [None, None]),  # several labels
        ("a/0.png,Ann,train\na/1.png,Bob,test\n", [None, None]),
        ("Ann\ta/0.png\nBob\ta/1.png\n", ["Ann", "Bob"]),
        ("a/0.png;Ann\na/1.png;Bob\n", ["Ann", "Bob"]),
        ("a/0.png Aaron Eckhart\nb c/1.png Bob\n", ["Aaron Eckhart", "Bob"]),
        ("a/0.png 1 -1 1 -1\na/1.png -1 -1 1 1\n", [None, None]),  # CelebA's attributes
        ("2\nBald Male\na/0.png  1 -1\na/1.png -1 -1\n", [None, None]),
        ("2\nimage_id x_1 y_1\na/0.png 95 71\na/1.png 72 94\n", [None, None]),  # CelebA's boxes
        ("m.01/5-FaceId-0 0\nm.02/7-FaceId-0 1.0\n", ["0", "1"]),
    ],
)
def test_lists_without_a_header(text: str, expected: list[str | None], tmp_path: Path) -> None:
    (tmp_path / "list.lst").write_text(text)
    found, note = list_items(tmp_path / "list.lst")
    assert [label for _, label in found] == expected
    assert bool(note) == (expected[0] is None), "a line says why there is no label"


@pytest.mark.parametrize("separator", [",", " ", ";"])
def test_a_label_before_the_path_is_known_by_the_files(separator: str, tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    for n in range(3):
        (tmp_path / "img" / f"{n}.jpg").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("".join(f"p{n}{separator}img/{n}.jpg\n" for n in range(3)))
    assert list_items(tmp_path / "list.txt")[0] == [(f"{n}.jpg", f"p{n}") for n in range(3)]
    (tmp_path / f"p0{separator}img").mkdir()
    (tmp_path / f"p0{separator}img" / "0.jpg").write_bytes(b"x")
    first = next(iter(open_source(SourceConfig(str(tmp_path / "list.txt")))))
    assert first.uri == f"{tmp_path}/p0{separator}img/0.jpg", "a path of that name is there"


@pytest.mark.parametrize(
    ("line", "others"), [("1 img/{n}.jpg {n}", "0 img/0.jpg 7"), ("{n} {n}.000000 img/{n}.jpg", "9 7.0 img/0.jpg")]
)
def test_lst_files_with_spaces_are_known_by_the_files(line: str, others: str, tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    for n in range(3):
        (tmp_path / "img" / f"{n}.jpg").write_bytes(b"x")
    lines = [line.format(n=n) for n in range(3)]
    (tmp_path / "list.lst").write_text("\n".join([*lines, others]))
    assert list_items(tmp_path / "list.lst")[0] == [(f"{n}.jpg", f"{n}") for n in range(3)] + [("0.jpg", "7")]


def test_a_first_line_that_is_an_image_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a/1.unknown,Ann\na/2.jpg,Bob\na/3.jpg,Bob\n")
    assert [name for name, _ in list_items(tmp_path / "list.csv")[0]] == ["1.unknown", "2.jpg", "3.jpg"]


@given(st.lists(st.text(max_size=20), max_size=8))
def test_any_lines_have_a_layout(lines: list[str]) -> None:
    if any(line.strip() for line in lines):
        layout = detect_layout(lines, "list")
        assert layout.label is None or layout.label != layout.image
    else:
        with pytest.raises(SourceError, match="is empty"):
            detect_layout(lines, "list")


def test_columns_are_found_in_any_case() -> None:
    assert find_label_column(["Name", "Label"]) == "Label"
    assert find_label_column(["target", "identity"]) == "identity"
    assert find_label_column(["name", "path"]) is None
