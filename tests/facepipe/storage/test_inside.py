"""Names and links: what may lead out of a folder is refused, whatever its shape, and nothing is written through a link."""

import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facepipe import storage
from facepipe.errors import FacepipeError, StorageError
from facepipe.storage import conditional
from facepipe.storage.atomic import open_for_writing, write_beside
from facepipe.storage.inside import find_link, is_inside, iterate_links, require_inside
from facepipe.storage.lease import hold_lease

# Pieces from which names that lead elsewhere are made, and letters of harmless ones.
DOTS = ["..", ".", "%2e", "%2E%2e", "%252e%252e", "..%2f", "%2f"]
PIECES = st.sampled_from([*DOTS, "", "/", "\\", "file:", "s3:", "C:", "\x00", "\n", "a", "part"])
ODD_NAMES = st.lists(PIECES, min_size=1, max_size=6).flatmap(
    lambda pieces: st.sampled_from(["/".join(pieces), "".join(pieces), "\\".join(pieces)])
)
PLAIN_PARTS = st.text("abcXYZ019._-+=~ é中😀", min_size=1, max_size=12).filter(lambda part: part not in (".", ".."))


def decode_fully(name: str) -> set[str]:
    """All names that a reader may make of a name: decoded once, twice and so on, with either slash."""
    names = {name}
    while True:
        more = {urllib.parse.unquote(n) for n in names} | {n.replace("\\", "/") for n in names}
        if more <= names:
            return names
        names |= more


@given(ODD_NAMES | st.text(max_size=20))
def test_a_name_that_is_inside_leads_nowhere_else_however_it_is_read(name: str) -> None:
    if not is_inside(name):
        with pytest.raises(StorageError, match="may lead out of its folder"):
            require_inside(name, "the log")
        return
    for reading in decode_fully(name):
        assert not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", reading), "a scheme or a drive"
        path = os.path.normpath(os.path.join("/gallery/faces", reading))
        assert path == f"/gallery/faces/{reading}", "another folder, or a second name for a file"


@given(st.lists(PLAIN_PARTS, min_size=1, max_size=4))
def test_plain_names_are_inside(parts: list[str]) -> None:
    assert is_inside("/".join(parts))


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a/.", "a\\..\\b", "C:\\x", "C:x"),
        *(
            "file:///x",
            "FILE:/x",
            "s3://b/k",
            "%2e%2e/x",
            "..%2Fx",
            "%252e%252e/x",
            "a%00b",
            "a\x00b",
            "a\nb",
            "\udcff",
        ),
    ],
)
def test_names_of_these_shapes_are_refused(name: str) -> None:
    assert not is_inside(name)


def test_links_are_found_at_any_depth_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "link").symlink_to("/nowhere")
    folder = tmp_path / "folder"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_text("x")
    assert list(iterate_links(str(folder))) == []
    assert find_link(str(folder), "a/b/file") is None
    (folder / "a" / "to_folder").symlink_to(outside)
    (folder / "to_nothing").symlink_to("/nowhere")
    (folder / "a" / "b" / "to_file").symlink_to(folder / "a" / "b" / "file")
    assert sorted(iterate_links(str(folder))) == ["a/b/to_file", "a/to_folder", "to_nothing"]
    assert find_link(str(folder), "a/to_folder/deep/link") == str(folder / "a" / "to_folder")
    assert list(iterate_links(str(tmp_path / "none"))) == []


def write_lock(path: str) -> None:
    os.close(open_for_writing(path))


def write_lease(path: str) -> None:
    """`path` is the file of the lease, its guard, or the file that the lease is written to first."""
    with hold_lease(os.path.dirname(path)):
        pass


def save_beside(path: str) -> None:
    with write_beside(path.removesuffix(".new")) as unfinished, open(unfinished, "wb") as file:
        np.save(file, np.arange(3))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.json", lambda path: storage.write(path, b"ours")),
        ("x.json.new", lambda path: storage.replace(path.removesuffix(".new"), b"ours")),
        ("x.json.new", save_beside),
        ("x.lock", write_lock),
        ("x.guard", lambda path: conditional.write_if(path.removesuffix(".guard"), b"ours", None)),
        (".lock.guard", write_lease),
        (".lock.new", write_lease),
    ],
)
@pytest.mark.parametrize("is_there", [True, False])
def test_nothing_is_written_through_a_link(
    name: str, write: Callable[[str], object], is_there: bool, tmp_path: Path
) -> None:
    """A gallery of somebody else may hold a link in the place of any file that facepipe writes."""
    mine = tmp_path / "thesis.tex"
    if is_there:
        mine.write_text("months of work")
    link = tmp_path / "gallery" / name
    link.parent.mkdir()
    link.symlink_to(mine)
    with pytest.raises(FacepipeError, match="is a link"):
        write(str(link))
    assert link.is_symlink()
    assert mine.exists() == is_there
    if is_there:
        assert mine.read_text() == "months of work"


def test_what_is_replaced_as_a_whole_leaves_the_target_of_a_link_alone(tmp_path: Path) -> None:
    mine = tmp_path / "thesis.tex"
    mine.write_text("months of work")
    link = tmp_path / "report.json"
    link.symlink_to(mine)
    storage.replace(str(link), b"ours")
    assert (link.read_bytes(), mine.read_text()) == (b"ours", "months of work")
    assert not link.is_symlink()
