"""What makes listing fast says the same as what it stands for: hashes, names, uris, labels and items."""

import os
import posixpath
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from facepipe.hashing import hash64, hash64_column, hash64_each, hash_each_in_process
from facepipe.sources import SourceConfig, WorkItem, open_source
from facepipe.sources.expand import Expander
from facepipe.sources.extensions import get_extension, is_hidden
from facepipe.sources.folder import FolderSource
from facepipe.sources.identity import IdentityRule, make_identity_rule, take_filename_prefix
from facepipe.sources.item import make_file_uri
from facepipe.sources.labels import format_label

NAMES = st.text("./aB_#jpé\udcff \x00", max_size=12)


@given(st.lists(st.text(max_size=40) | st.just("x" * 2000) | st.just("\udcff")))
def test_hashes_of_many_texts(texts: list[str]) -> None:
    expected = [hash64(text) for text in texts]
    assert hash64_each(texts).tolist() == expected
    assert hash64_each([text.encode("utf-8", "surrogatepass") for text in texts]).tolist() == expected
    assert hash64_each(iter(texts)).dtype == np.uint64


def test_hashes_of_a_column() -> None:
    texts = ["a", None, "é", "", "x" * 1024]
    expected = [hash64(text or "") for text in texts]
    assert hash64_column(pa.array(texts)).tolist() == expected
    assert hash64_column(pa.array(texts)[1:4]).tolist() == expected[1:4]
    assert hash64_column(pa.chunked_array([texts[:2], texts[2:]])).tolist() == expected
    assert len(hash64_column(pa.array([], pa.string()))) == 0


def test_marks_tell_texts_apart() -> None:
    texts = [f"{n}-{n * 7}" for n in range(1000)]
    marks = hash_each_in_process(["", *texts, ""])
    assert marks[0] == marks[-1] == 0
    assert len(set(marks.tolist())) == 1001
    assert (hash_each_in_process([text + "" for text in texts]) == marks[1:-1]).all()


@given(NAMES)
@example("..jpg")
@example("jpg")
def test_extensions_and_hidden_names(name: str) -> None:
    assert get_extension(name) == os.path.splitext(name)[1][1:].lower()
    assert is_hidden(name) == os.path.basename(name).startswith(".")


@given(NAMES)
def test_identities_are_those_of_the_normal_path(path: str) -> None:
    normal = posixpath.normpath(path) if path else path
    folder = posixpath.basename(posixpath.dirname(normal)) or None
    is_nested = 2 <= normal.count("/") <= 6 and posixpath.dirname(posixpath.dirname(normal)).strip("/")
    expected = {
        "folder": folder,
        "auto": folder if normal.count("/") == 1 or is_nested else None,
        "filename": take_filename_prefix(normal),
    }
    for name, label in expected.items():
        assert format_label(make_identity_rule(name)(path, None)) == format_label(label)  # type: ignore[arg-type]


@given(NAMES)
def test_uris_are_those_of_the_absolute_path(name: str) -> None:
    path = os.fsencode("/" + name.replace("\x00", ""))
    assert make_file_uri(path) == make_file_uri(os.path.abspath(path)) == make_file_uri(os.fsdecode(path))


@settings(max_examples=300)
@given(NAMES, st.sampled_from(["", "a", "a.tar", "a#b", "a.tar#b", "é", "\udcff", "a/b"]))
@example("x.jpg", "a")
@example("jpg", "a")
@example("..jpg", "a")
def test_items_of_a_folder_are_those_of_its_files(name: str, folder: str) -> None:
    name = name.replace("/", "").replace("\x00", "") + ".jp" + "g" * (len(name) % 2)
    path = os.fsencode(f"/root/{folder}/{name}".replace("//", "/"))
    relative = f"{folder}/{name}" if folder else name
    kinds: tuple[IdentityRule, ...] = ("auto", "folder", "filename", "label", "none")
    for kind in kinds:
        short = Expander(kind).make_folder_expander(os.path.dirname(path), folder)(name, path, "mark")
        assert short is None or [short] == list(Expander(kind).expand_file(path, relative, "mark"))


@pytest.mark.parametrize("content", [True, False])
def test_parquet_beyond_the_first_batch(content: bool, tmp_path: Path) -> None:
    n, path = 20_000, str(tmp_path / "p.parquet")
    columns = {"uri": [f"{k}.jpg" for k in range(n)], "identity": [f"p{k // 2}" for k in range(n)]}
    pq.write_table(pa.table(columns | ({"image": [b"x"] * n} if content else {})), path)
    found = list(open_source(SourceConfig(path)))
    assert len({item.uri for item in found}) == n
    assert found[-1].uri == (f"{path}#{n - 1}/{n - 1}.jpg" if content else str(tmp_path / f"{n - 1}.jpg"))
    assert [item.identity for item in found] == columns["identity"]


def test_most_items_are_made_the_short_way(tmp_path: Path) -> None:
    made = Expander("auto").make_folder_expander(os.fsencode(tmp_path / "Ann"), "Ann")("1.jpg", b"/p", "mark")
    assert made == WorkItem(str(tmp_path / "Ann" / "1.jpg"), b"/p", fingerprint="mark", identity="Ann")


@pytest.mark.parametrize("name", ["1.JPG", "é.jpg", "a#b.jpg", "a.tar#b.jpg", "a.b.png"])
def test_odd_names_are_listed_all_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / "Ann").mkdir()
    (tmp_path / "Ann" / name).write_bytes(b"x")
    (item,) = list(open_source(SourceConfig(str(tmp_path), identity="folder")))
    assert item.identity == "Ann"
    assert item.uri == make_file_uri(str(tmp_path / "Ann" / name))
    assert item.path == os.fsencode(tmp_path / "Ann" / name)


def test_whether_there_is_an_image_takes_no_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that may be parts of a dataset hold all images back until they are judged."""
    for n in range(20):
        (tmp_path / f"{n:03d}").mkdir()
        (tmp_path / f"{n:03d}" / "1.jpg").write_bytes(b"x")
    listed: list[str] = []
    list_file = FolderSource._list_file

    def note(source: FolderSource, entry: Any, name: str, relative: str, expand_image: Any) -> Any:
        listed.append(relative)
        return list_file(source, entry, name, relative, expand_image)

    monkeypatch.setattr(FolderSource, "_list_file", note)
    source = open_source(SourceConfig(str(tmp_path)))
    assert source.has_items()
    assert listed == ["000/1.jpg"]
    assert len(list(source)) == 20
    (tmp_path / "empty").mkdir()
    assert not open_source(SourceConfig(str(tmp_path / "empty"))).has_items()
