"""Where a gallery may lie: below any legal name everything works, and what cannot be made leaves nothing behind."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT
from helpers import embed

from facepipe.config import build
from facepipe.erasure.selection import Selection
from facepipe.errors import FacepipeError
from facepipe.gallery import Gallery
from facepipe.gallery.export import export_parquet
from facepipe.gallery.maintenance.compact import CompactConfig
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index.verify import verify_index
from facepipe.storage.lease import hold_lease
from pipelines import compact, erase, index, search
from pipelines.index import IndexConfig
from pipelines.search import SearchConfig

# Names of folders that some library reads as something else.
NAMES = [
    *("My%20Photos", "100%", "%00", "%2e%2e", "..%2f", "a%2Fb", "a\\b", "line\nbreak\t\x01\x7f", "a#b?c=d&e;f"),
    *(
        "*[a]?{b}",
        " blank ",
        "C:",
        "~",
        "-x",
        "$(id) `x` 'q' \"d\"",
        "\u202ertl",
        "\U00020bb7 \U0001f600",
        "Jose\u0301",
    ),
]


def list_tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACEPIPE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", [*NAMES, "\udcff\udce9"])
def test_a_gallery_lies_below_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "g"
    assert Gallery.create(str(path), CONTRACT).version == 0
    assert Gallery.exists(str(path))
    assert Gallery(path).contract == CONTRACT
    # Nothing was made at another place, such as below `My Photos`.
    assert sorted(os.listdir(tmp_path)) in ([name], sorted([name, "cache"]))


@pytest.mark.parametrize("names", [NAMES, [os.fsdecode(b"\xff\xe9 %20")]])
def test_everything_works_below_all_names(
    names: list[str], drawings: Path, fakes: dict[str, Any], tmp_path: Path
) -> None:
    place = tmp_path.joinpath(*names)
    (place / "images").mkdir(parents=True)
    for folder in drawings.iterdir():
        (place / "images" / folder.name).symlink_to(folder)
    gallery = str(place / "g")
    assert embed(place / "images", gallery, fakes).images == 60
    assert embed(place / "images", gallery, fakes).skipped == 60
    index.run(IndexConfig(), gallery)
    config = build(SearchConfig, {"run": {"runner": "inline"}, "search": {"k": 3}})
    search.run(config, gallery, gallery, str(place / "out.parquet"))
    faces = len(Gallery(gallery).vectors()[0])
    with open(place / "out.parquet", "rb") as file:
        answers = pq.read_table(file)
    assert answers["query_id"].value_counts().to_pylist()[0]["counts"] == 3
    assert export_parquet(Gallery(gallery), str(place / "export"), ["face_id"], "status = 'ok'") == faces
    assert erase.run(Selection(identities=("person1",)), gallery).images == 20
    assert compact.run(CompactConfig(), gallery, everything=True).joined > 0
    assert not verify_gallery(Gallery(gallery)).problems
    assert not verify_index(Gallery(gallery))
    assert sorted(os.listdir(tmp_path)) == sorted([names[0], "cache"])


def test_a_gallery_behind_a_link_to_an_odd_name(tmp_path: Path) -> None:
    (tmp_path / "My%20Photos").mkdir()
    (tmp_path / "g").symlink_to(tmp_path / "My%20Photos")
    Gallery.create(str(tmp_path / "g"), CONTRACT)
    assert Gallery(tmp_path / "My%20Photos").version == 0


def test_an_alias_leads_to_the_folder_of_its_name(tmp_path: Path) -> None:
    """Somebody moves one gallery away and makes another in its place."""
    path = tmp_path / "My%20Photos" / "g"
    first = Gallery.create(str(path), CONTRACT).id
    path.rename(tmp_path / "moved")
    second = Gallery.create(str(path), CONTRACT).id
    assert (Gallery(tmp_path / "moved").id, Gallery(path).id) == (first, second)
    # A link in the cache that leads elsewhere is made anew.
    (alias,) = (tmp_path / "cache" / "aliases").iterdir()
    (alias / "_delta_log").unlink()
    (alias / "_delta_log").symlink_to(tmp_path / "moved" / "faces" / "_delta_log")
    assert Gallery(path).id == second


def test_what_cannot_be_made_leaves_nothing(
    drawings: Path, fakes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    # No place for an alias: both the cache and the temporary files lie below an odd name.
    monkeypatch.setenv("FACEPIPE_CACHE", str(tmp_path / "50%20" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "50%20"))
    before = list_tree(tmp_path)
    for path in (tmp_path / "My%20Photos" / "deep" / "g", tmp_path / "file" / "g"):
        with pytest.raises(FacepipeError):
            embed(drawings, path, fakes)
        with pytest.raises(FacepipeError):
            Gallery.create(str(path), CONTRACT)
        assert list_tree(tmp_path) == before


def test_a_failed_first_commit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is made, but cannot be opened."""
    (tmp_path / "given").mkdir()

    def fail(self: Gallery, *_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Gallery, "__init__", fail)
    for path in (tmp_path / "new" / "g", tmp_path / "given"):
        with pytest.raises(KeyboardInterrupt), hold_lease(str(path)):
            Gallery.create(str(path), CONTRACT)
    assert list_tree(tmp_path) == ["given"]


def test_only_an_empty_folder_is_left_without_a_lease(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note").touch()

    def fail(name: str, note: str = "") -> None:
        with hold_lease(str(tmp_path / name)):
            if note:
                (tmp_path / name / note).touch()
            raise ValueError(name)

    for name, note in (("used", ""), ("new", "note"), ("empty/deep", "")):
        with pytest.raises(ValueError, match=name):
            fail(name, note)
    assert {path for path in list_tree(tmp_path) if "lock" not in path} == {"new", "new/note", "used", "used/note"}
    assert (tmp_path / "used" / ".lock").exists()
