"""Where a source is: what can be one of its images, and by which path a gallery knows it."""

import os
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from facepipe.sources import SourceConfig, locate_source, open_source
from facepipe.sources.item import make_file_uri
from facepipe.sources.paths import PathChange, split_uri
from facepipe.sources.place import find_spelling, is_below

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)


def contains(config: SourceConfig, *uris: str, strict: bool = False) -> list[bool]:
    return locate_source(config).contains(pa.array(list(uris), pa.string()), strict=strict).tolist()


def make_tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


@pytest.mark.parametrize("kind", ["folder", "glob", "file", "parquet"])
def test_a_source_contains_what_it_lists_and_nothing_beside_it(kind: str, tmp_path: Path) -> None:
    make_tree(
        tmp_path, "a/photos/x.png", "a/photos/deep/y#1.png", "a/photos.png", "a/photosets/z.png", "b/photos/x.png"
    )
    pq.write_table(pa.table({"bytes": [b"x"], "path": ["p.png"]}), tmp_path / "a" / "rows.parquet")
    uri = {"folder": "a/photos", "glob": "a/photos/**/*.png", "file": "a/photos/x.png", "parquet": "a/rows.parquet"}
    config = SourceConfig(str(tmp_path / uri[kind]))
    listed = [item.uri for item in open_source(config)]
    assert listed
    assert all(contains(config, *listed))
    beside = ["a/photos.png", "a/photosets/z.png", "b/photos/x.png", "a/rows.parquet2#0", "a/photo"]
    assert not any(contains(config, *(f"{tmp_path}/{name}" for name in beside)))


def test_a_glob_contains_what_it_takes(tmp_path: Path) -> None:
    make_tree(tmp_path, "shards/a.tar", "shards/b.tar", "shards/x.png")
    one = SourceConfig(str(tmp_path / "shards" / "a.tar"))
    some = SourceConfig(str(tmp_path / "shards" / "*.tar"))
    uris = [f"{tmp_path}/shards/{name}" for name in ("a.tar#1.png", "b.tar#1.png", "x.png", "a.tar")]
    assert contains(one, *uris) == [True, False, False, True]
    assert contains(some, *uris) == [True, True, False, True]
    assert locate_source(one).root == locate_source(some).root == str(tmp_path / "shards")
    assert locate_source(one).glob != locate_source(some).glob


def test_the_images_of_a_list_may_lie_anywhere(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\na/x.png,ann\n")
    config = SourceConfig(str(tmp_path / "list.csv"))
    uris = [f"{tmp_path}/a/x.png", "/elsewhere/x.png", "adopted:list/x"]
    assert contains(config, *uris) == [True, True, False]
    assert contains(config, *uris, strict=True) == [True, False, False]
    rooted = SourceConfig(config.uri, root=str(tmp_path / "a"))
    assert contains(rooted, *uris, f"{tmp_path}/b/x.png", strict=True) == [True, False, False, False]
    pq.write_table(pa.table({"uri": ["a/x.png"]}), tmp_path / "rows.parquet")
    assert locate_source(SourceConfig(str(tmp_path / "rows.parquet"))).is_open


@pytest.mark.parametrize("kind", ["auto", "folder", "list", "parquet", "glob"])
def test_a_source_that_is_gone_has_its_place_still(kind: Any, tmp_path: Path) -> None:
    names = {"auto": "photos", "folder": "photos", "list": "a.csv", "parquet": "a.parquet", "glob": "photos/*.png"}
    path = tmp_path / names[kind]
    place = locate_source(SourceConfig(str(path), kind=kind))
    if kind == "glob":
        (tmp_path / "photos").mkdir()
    elif kind in ("auto", "folder"):
        make_tree(path, "x.png")
    elif kind == "list":
        path.write_text("path\nx.png\n")
    else:
        pq.write_table(pa.table({"bytes": [b"x"]}), path)
    assert locate_source(SourceConfig(str(path), kind=kind)) == place
    if kind != "glob":
        assert open_source(SourceConfig(str(path), kind=kind)).name == place.name


def test_prefixes_of_a_store() -> None:
    config = SourceConfig("s3://bucket/photos/")
    assert contains(config, "s3://bucket/photos/x.png", "s3://bucket/photos2/x.png", "s3://other/photos/x.png") == [
        True,
        False,
        False,
    ]
    assert locate_source(config).root == locate_source(SourceConfig("s3://bucket/photos")).root


@hypothesis.given(st.lists(NAMES, min_size=1, max_size=3), st.lists(NAMES, min_size=1, max_size=3), NAMES)
def test_names_of_every_kind_are_below_their_folder(folder: list[str], rest: list[str], other: str) -> None:
    root = os.path.abspath("/" + "/".join(folder))
    path = os.path.join(root, *rest)
    hypothesis.assume(os.path.abspath(path) == path)
    hypothesis.assume(rest[0] != other)
    uri = make_file_uri(os.fsencode(path))
    beside = make_file_uri(os.fsencode(f"{root}{other}"))
    assert is_below(pa.array([uri, beside]), root).tolist() == [True, beside == make_file_uri(os.fsencode(root))]


# ---- other paths to the same place


def test_links_lead_to_what_is_known(tmp_path: Path) -> None:
    make_tree(tmp_path / "disk", "photos/2024/x.png")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    real, linked = f"{tmp_path}/disk/photos", f"{tmp_path}/link/photos"
    assert find_spelling(linked, [real]) == real
    assert find_spelling(real, [linked]) == linked
    assert find_spelling(f"{linked}/2024", [real]) == f"{real}/2024", "a part of what is known"
    assert find_spelling(linked, [f"{real}/2024"]) == real, "what is known is a part"
    assert find_spelling(real, [real, f"{tmp_path}/gone", "s3://bucket/photos"]) is None
    assert find_spelling(f"{tmp_path}/link/other", [real]) is None


def test_snapshots_with_hard_links_are_places_of_their_own(tmp_path: Path) -> None:
    make_tree(tmp_path / "one", "x.png")
    (tmp_path / "two").mkdir()
    os.link(tmp_path / "one" / "x.png", tmp_path / "two" / "x.png")
    assert find_spelling(f"{tmp_path}/two", [f"{tmp_path}/one"]) is None
    (tmp_path / "a.csv").write_text("path\n")
    os.link(tmp_path / "a.csv", tmp_path / "b.csv")
    assert find_spelling(f"{tmp_path}/b.csv", [f"{tmp_path}/a.csv"]) is None


# ---- uris and paths


@hypothesis.given(st.lists(NAMES, min_size=1, max_size=3), st.lists(NAMES, min_size=1, max_size=3), NAMES, NAMES)
def test_a_changed_uri_is_the_uri_at_the_new_path(old: list[str], rest: list[str], new: str, member: str) -> None:
    """It is the one that a listing of the new place gives, whatever characters the names have."""
    change = PathChange(os.path.abspath("/" + "/".join(old)), os.path.abspath(f"/{new}/x"))
    tail = "/".join(rest)
    hypothesis.assume(os.path.abspath(f"{change.old}/{tail}") == f"{change.old}/{tail}")
    for ending in (".png", ".tar", ".parquet"):
        uri = make_file_uri(os.fsencode(f"{change.old}/{tail}{ending}"))
        expected = make_file_uri(os.fsencode(f"{change.new}/{tail}{ending}"))
        assert change.change_uri(uri) == expected
        if ending != ".png":
            assert change.change_uri(f"{uri}#{member}") == f"{expected}#{member}"
            assert split_uri(f"{expected}#{member}") == (f"{change.new}/{tail}{ending}", f"#{member}")
    assert change.change_uri(f"{change.old}x") is None
    uris = pa.chunked_array([[uri, "/else/where.png"], [uri]])
    assert change.change_uris(uris).to_pylist() == [expected, None, expected]


def test_paths_that_are_not_utf8_change_too() -> None:
    uri = make_file_uri(b"/old/\xff/a.png")
    assert PathChange("/old", "/new").change_uri(uri) == make_file_uri(b"/new/\xff/a.png")
    assert PathChange("/old", "s3://bucket/new").change_uri("/old/a.png") == "s3://bucket/new/a.png"
    assert PathChange("s3://bucket/old", "/new").change_uri("s3://bucket/old/a.tar#x") == "/new/a.tar#x"
    root = os.fsdecode(b"/old/\xff")
    assert np.array_equal(is_below(pa.array([uri, "/old/b"]), root), [True, False])
