"""A gallery from somebody else leads nowhere outside itself: log, manifest, and links in any place of it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from bench.galleries import CONTRACT, Faces, append
from bench.galleries import rows as drawn
from helpers import run_facepipe
from hypothesis import given
from hypothesis import strategies as st

from facepipe.errors import FacepipeError, GalleryError, IndexingError
from facepipe.gallery import Gallery
from facepipe.index import manifest as manifests
from facepipe.index.search import Index
from pipelines import index

PRIVATE_FACES = 5


def make_gallery(path: Path, first: int, count: int) -> Gallery:
    gallery = Gallery.create(str(path), CONTRACT)
    append(gallery, [drawn(np.arange(count), Faces().draw(np.arange(count), first), first)], "20261101T000000-000000")
    return Gallery(gallery.path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the gallery `private`, and `shared`, which came from somebody else. Both have an index."""
    folder = tmp_path_factory.mktemp("made")
    for name, first, count in (("private", 0, PRIVATE_FACES), ("shared", 100, 3)):
        index.run(index.IndexConfig(), make_gallery(folder / name, first, count).path)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "in")
    return tmp_path / "in"


def add_to_log(gallery: Path, action: dict[str, Any]) -> None:
    log = gallery / "faces" / "_delta_log"
    (log / f"{len(list(log.glob('*.json'))):020d}.json").write_text(json.dumps({"add": action}) + "\n")


def read_add_action(gallery: Path) -> dict[str, Any]:
    for log in sorted((gallery / "faces" / "_delta_log").glob("*.json")):
        for line in log.read_text().splitlines():
            if "add" in json.loads(line):
                action: dict[str, Any] = json.loads(line)["add"]
                return action
    raise AssertionError("the gallery has no file")


def encode_some(text: str, which: list[bool], *, upper: bool) -> str:
    """Percent-encode some characters of a path."""
    form = "%{:02X}" if upper else "%{:02x}"
    return "".join(
        form.format(ord(c)) if chosen and c in "./p" else c
        for c, chosen in zip(text, which + [False] * len(text), strict=False)
    )


SHAPES: dict[str, Callable[[Path, str], str]] = {
    "dots": lambda place, name: f"../../private/faces/{name}",
    "detour": lambda place, name: f"a/b/../../../../private/faces/{name}",
    "absolute": lambda place, name: f"{place}/private/faces/{name}",
    "two slashes": lambda place, name: f"/{place}/private/faces/{name}",
    "url": lambda place, name: f"file://{place}/private/faces/{name}",
    "short url": lambda place, name: f"file:{place}/private/faces/{name}",
    "other store": lambda place, name: f"s3://bucket/{name}",
}


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    which=st.lists(st.booleans(), max_size=40),
    upper=st.booleans(),
    twice=st.booleans(),
)
def test_a_path_in_the_log_that_leads_out_is_refused(
    made: Path, tmp_path_factory: pytest.TempPathFactory, shape: str, which: list[bool], upper: bool, twice: bool
) -> None:
    action = read_add_action(made / "private")
    path = encode_some(SHAPES[shape](made, action["path"]), which, upper=upper)
    if twice:
        path = path.replace("%", "%25")
    table = tmp_path_factory.mktemp("g") / "shared"
    shutil.copytree(made / "shared" / "faces" / "_delta_log", table / "faces" / "_delta_log")
    add_to_log(table, {**action, "path": path})
    for read in (Gallery.files, Gallery.counts, Gallery.vectors, Gallery.dataset):
        with pytest.raises(GalleryError, match="leads out of itself"):
            read(Gallery(str(table)))  # type: ignore[operator]
    shutil.rmtree(table)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_no_command_reads_what_the_log_names_elsewhere(place: Path, shape: str) -> None:
    """Before, `info`, `index` and `export` ended with 0 and the rows of the private gallery were in the export."""
    action = read_add_action(place / "private")
    add_to_log(place / "shared", {**action, "path": SHAPES[shape](place, action["path"])})
    version = manifests.load(str(place / "shared")).table_version
    for words in (
        ("info", place / "shared"),
        ("verify", place / "shared"),
        ("index", place / "shared"),
        ("compact", place / "shared", "--all"),
        ("erase", place / "shared", "--identity", "person1"),
        ("export", place / "shared", place / "out"),
    ):
        code, _, err = run_facepipe(*words)
        assert (code, "leads out of itself" in err) == (1, True), (words, err)
    assert not (place / "out").exists()
    assert manifests.load(str(place / "shared")).table_version == version
    assert Gallery(str(place / "private")).counts()["faces"] == PRIVATE_FACES


def link_part(place: Path) -> None:
    """A name that is harmless, and a link behind it."""
    action = read_add_action(place / "private")
    (place / "shared" / "faces" / "part-mine.parquet").symlink_to(place / "private" / "faces" / action["path"])
    add_to_log(place / "shared", {**action, "path": "part-mine.parquet"})


def link_folder_of_parts(place: Path) -> None:
    action = read_add_action(place / "private")
    (place / "shared" / "faces" / "more").symlink_to(place / "private" / "faces")
    add_to_log(place / "shared", {**action, "path": f"more/{action['path']}"})


def link_log(place: Path) -> None:
    shutil.rmtree(place / "shared" / "faces" / "_delta_log")
    (place / "shared" / "faces" / "_delta_log").symlink_to(place / "private" / "faces" / "_delta_log")


def link_log_entry(place: Path) -> None:
    log = place / "shared" / "faces" / "_delta_log" / "00000000000000000001.json"
    log.unlink()
    log.symlink_to(place / "private" / "faces" / "_delta_log" / log.name)


def link_table(place: Path) -> None:
    shutil.rmtree(place / "shared" / "faces")
    (place / "private" / ".lock").touch()
    (place / "shared" / "faces").symlink_to(place / "private" / "faces")


def link_index(place: Path) -> None:
    shutil.rmtree(place / "shared" / "index")
    (place / "shared" / "index").symlink_to(place / "private" / "index")


def link_erased(place: Path) -> None:
    (place / "private" / "erased").mkdir()
    (place / "shared" / "erased").symlink_to(place / "private" / "erased")


@pytest.mark.parametrize(
    "plant",
    [link_part, link_folder_of_parts, link_log, link_log_entry, link_table, link_index, link_erased],
)
def test_a_link_out_of_the_gallery_is_refused(place: Path, plant: Callable[[Path], None]) -> None:
    before = sorted(str(path) for path in (place / "private").rglob("*"))
    plant(place)
    before_of_private = {p: p.read_bytes() for p in (place / "private").rglob("*") if p.is_file()}
    for words in (
        ("info", place / "shared"),
        ("index", place / "shared", "--retrain"),
        ("erase", place / "shared", "--identity", "person1"),
        ("export", place / "shared", place / "out"),
    ):
        code, _, err = run_facepipe(*words)
        assert (code, "is a link" in err) == (1, True), (words, err)
    assert not (place / "out").exists()
    assert set(before) <= {str(path) for path in (place / "private").rglob("*")}
    assert {p: p.read_bytes() for p in before_of_private} == before_of_private


def test_a_folder_on_another_disk_is_no_other_gallery(place: Path) -> None:
    """docs/scale.md asks for a fast disk: each folder of a gallery may lie elsewhere, also all of them in one place."""
    fast = place / "fast"
    fast.mkdir()
    for name in ("faces", "index"):
        (place / "shared" / name).rename(fast / name)
        (place / "shared" / name).symlink_to(fast / name)
    gallery = Gallery(str(place / "shared"))
    append(gallery, [drawn(np.arange(2), Faces().draw(np.arange(2), 200), 200)], "20261102T000000-000000")
    assert run_facepipe("index", place / "shared")[0] == 0
    assert Gallery(str(place / "shared")).counts()["faces"] == 5
    assert manifests.load(str(place / "shared")).live == 5


# ------------------------------------------------------------------ the manifest


def edit_manifest(gallery: Path, where: tuple[str | int, ...], name: str) -> None:
    """Put a name in a place of the manifest: the last part of `where` is a key to rename or a value to replace."""
    path = gallery / "index" / "manifest.json"
    whole = json.loads(path.read_text())
    inner = whole
    for part in where[:-1]:
        inner = inner[part]
    if where[-2] == "files":
        inner[name] = inner.pop(where[-1])
    else:
        inner[where[-1]] = name
    path.write_text(json.dumps(whole))


PLACES_OF_NAMES = (
    ("template", "name"),
    ("shards", 0, "name"),
    ("shards", 0, "files", "vectors.npy"),
    ("shards", 0, "tombstones"),
)


@pytest.mark.parametrize("where", PLACES_OF_NAMES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *("../../private/index/x", "x/../../private/x", "/private/x", "..", ".", "", "a/b", "a/../b", "%2e%2e/x"),
        *("s3://b/x", "file:///x", "x\\..\\y"),
    ],
)
def test_a_name_in_the_manifest_that_leads_out_is_refused(
    made: Path, tmp_path: Path, where: tuple[str | int, ...], name: str
) -> None:
    """Before, only the first two parts of a name were looked at."""
    shutil.copytree(made / "shared" / "index", tmp_path / "g" / "index")
    edit_manifest(tmp_path / "g", where, name)
    with pytest.raises(IndexingError, match="damaged or of another version"):
        manifests.load(str(tmp_path / "g"))


@pytest.mark.parametrize("name", ["manifest.json", "shard", "vectors.npy", "template"])
def test_a_link_in_the_index_is_refused(place: Path, name: str) -> None:
    """Files of another index of the same size and checksum would be taken for its own."""
    folder = place / "shared" / "index"
    entry = manifests.load(str(place / "shared")).shards[0]
    template = manifests.load(str(place / "shared")).template.name
    link = folder / {"shard": entry.name, "vectors.npy": f"{entry.name}/{name}", "template": template}.get(name, name)
    link.rename(place / "moved")
    link.symlink_to(place / "moved")
    append(
        Gallery(str(place / "shared")),
        [drawn(np.arange(2), Faces().draw(np.arange(2), 200), 200)],
        "20261102T000000-000000",
    )

    def use() -> None:
        Index(str(place / "shared")).search(Faces().draw(np.arange(2), 200), k=2)
        index.run(index.IndexConfig(), str(place / "shared"))

    with pytest.raises(FacepipeError, match="is a link"):
        use()
    assert os.path.lexists(link)
    assert (place / "moved").exists()


def test_rows_of_the_shared_gallery_are_still_read(made: Path) -> None:
    """The tests above would pass if every gallery were refused."""
    gallery = Gallery(str(made / "shared"))
    assert isinstance(gallery.to_arrow(), pa.Table)
    assert gallery.counts()["faces"] == 3
    assert Index(gallery.path).search(gallery.vectors()[1], k=1).ids.ravel().tolist() == gallery.vectors()[0].tolist()
