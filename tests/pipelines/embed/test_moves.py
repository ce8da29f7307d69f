"""Images that move: they keep their rows under the new uri, none is embedded twice, and none is lost."""

import io
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw
from helpers import rows, trials
from hypothesis import strategies as st

from facepipe.config import build
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.hashing import compute_image_id
from facepipe.moves import moved_images
from facepipe.schema import UNKNOWN_URI
from pipelines.embed import EmbedConfig, EmbedSummary, run

Settings = dict[str, Any]
# Columns in which a gallery with a history differs from one made from scratch.
HISTORY = ("face_id", "former_uris", "ingested_at", "fingerprint")


@cache
def encode(n: int) -> bytes:
    """A picture with n % 3 faces; another one for every n."""
    return cv2.imencode(".png", draw(n))[1].tobytes()


def put(path: Path, n: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(n))
    return path


def embed(source: str | Path, gallery: Path, fakes: Settings, *, at_most: float = 0.5, **keys: Any) -> EmbedSummary:
    settings = {
        "source": {"uri": str(source), "identity": "folder", **keys},
        "run": {"runner": "inline", "block_smallest": 2, "block_largest": 4},
        "missing": {"policy": "mark", "at_most": at_most},
    }
    return run(build(EmbedConfig, fakes, settings), str(gallery))


def live(gallery: Path) -> list[Settings]:
    """Rows of images that are not missing, without what a history leaves."""
    found = [row for row in rows(gallery, ()) if row["missing_since"] is None]
    return [{name: value for name, value in row.items() if name not in HISTORY} for row in found]


def ids_by_image(gallery: Path) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = {}
    for row in rows(gallery, ()):
        if row["face_id"] is not None:
            ids.setdefault(row["image_id"], []).append(row["face_id"])
    return ids


def check_as_from_scratch(source: str | Path, gallery: Path, fakes: Settings, **keys: Any) -> None:
    """Assert that the images that are not missing are those of a new gallery, and that the gallery is sound."""
    fresh = gallery.parent / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    embed(source, fresh, fakes, **keys)
    assert live(gallery) == live(fresh)
    assert verify_gallery(Gallery(str(gallery))).problems == []


def count_read(summary: EmbedSummary) -> int:
    """Images that were embedded."""
    return sum(summary.statuses[status] for status in ("ok", "no_face"))


# ---- a source that is mounted elsewhere


def write_rows(path: Path, numbers: list[int], names: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {"bytes": [encode(n) for n in numbers]}
    if names:
        columns["path"] = [f"{n}.png" for n in numbers]
    with open(path, "wb") as file:  # Arrow opens no path that is not UTF-8
        pq.write_table(pa.table(columns), file, row_group_size=2)


def write_tar(path: Path, numbers: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for n in numbers:
            info = tarfile.TarInfo(f"p{n % 2}/{n}.png")
            info.size = len(encode(n))
            tar.addfile(info, io.BytesIO(encode(n)))


def make_folder(root: Path) -> str:
    for n in range(8):
        put(root / f"p{n % 2}" / f"{n}.png", n)
    return ""


def make_tars(root: Path) -> str:
    write_tar(root / "a.tar", [0, 1, 2])
    write_tar(root / "deep" / "b.tar", [3, 4, 5])
    return ""


def make_parquet(root: Path) -> str:
    write_rows(root / "a.parquet", list(range(6)))
    return "a.parquet"


def make_parquets(root: Path) -> str:
    write_rows(root / "a.parquet", [0, 1, 2])
    write_rows(root / "b.parquet", [3, 4, 5], names=False)
    return ""


def make_list(root: Path) -> str:
    make_folder(root)
    (root / "list.csv").write_text("path,label\n" + "".join(f"p{n % 2}/{n}.png,{n % 3}\n" for n in range(8)))
    return "list.csv"


def make_glob(root: Path) -> str:
    make_folder(root)
    return "p*/*.png"


MAKERS = {
    "folder": make_folder,
    "tars": make_tars,
    "parquet": make_parquet,
    "parquets": make_parquets,
    "list": make_list,
    "glob": make_glob,
}
PLACES = {
    "another parent": ("old/photos", "new/photos"),
    "another name": ("disk1", "disk2"),
    "deeper": ("photos", "archive/2024/photos"),
    "strange names": ("a b/photos", "ü#.tar#x/ph%20tos"),
    "no UTF-8": ("a\udcff/photos", "b\udcfe/photos"),
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_source_that_is_mounted_elsewhere(kind: str, places: str, fakes: Settings, tmp_path: Path) -> None:
    old, new = (tmp_path / place for place in PLACES[places])
    tail = MAKERS[kind](old)
    first = embed(old / tail, tmp_path / "g", fakes)
    before = ids_by_image(tmp_path / "g")
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(old, new)
    if places != "deeper":
        old.mkdir(parents=True, exist_ok=True)  # the empty place of a mount stays
    summary = embed(new / tail, tmp_path / "g", fakes)
    assert (summary.images, summary.skipped, summary.relocated) == (0, first.images, first.images)
    assert (summary.missing, summary.missing_ignored) == (0, "")
    assert any(str(old) in note for note in summary.notes)
    assert ids_by_image(tmp_path / "g") == before
    check_as_from_scratch(new / tail, tmp_path / "g", fakes)
    again = embed(new / tail, tmp_path / "g", fakes)
    assert (again.images, again.relocated, again.version) == (0, 0, summary.version)


def test_a_source_is_recognised_although_much_of_it_is_new(fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "old" / "photos")
    embed(tmp_path / "old" / "photos", tmp_path / "g", fakes)
    shutil.move(tmp_path / "old", tmp_path / "new")
    for n in range(30):
        put(tmp_path / "new" / "photos" / "a" / f"{n}.png", 100 + n)
    (tmp_path / "new" / "photos" / "p0" / "2.png").unlink()
    summary = embed(tmp_path / "new" / "photos", tmp_path / "g", fakes)
    assert (count_read(summary), summary.relocated, summary.missing) == (30, 8, 1)
    check_as_from_scratch(tmp_path / "new" / "photos", tmp_path / "g", fakes)


def test_a_copied_source_whose_times_are_new_is_read_and_not_embedded(fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "old")
    embed(tmp_path / "old", tmp_path / "g", fakes)
    shutil.copytree(tmp_path / "old", tmp_path / "new", copy_function=shutil.copyfile)
    for path in (tmp_path / "new").rglob("*.png"):
        os.utime(path, (1, 1))
    shutil.rmtree(tmp_path / "old")
    summary = embed(tmp_path / "new", tmp_path / "g", fakes)
    assert (dict(summary.statuses), summary.relocated) == ({"touched": 8}, 8)
    check_as_from_scratch(tmp_path / "new", tmp_path / "g", fakes)


def test_two_copies_are_two_sources(fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "photos")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for place in ("a", "b", "a", "b"):
        summary = embed(tmp_path / place / "photos", tmp_path / "g", fakes)
        assert (summary.relocated, summary.missing) == (0, 0)
    found = Counter((row["source"], row["uri"].split("/photos/")[0]) for row in live(tmp_path / "g"))
    assert len(found) == 2, "each under a name of its own"
    assert {source for source, _ in found} == {"photos", "b/photos"}


def test_other_images_under_the_same_names_are_another_source(fakes: Settings, tmp_path: Path) -> None:
    """001.jpg is in every data set: the first one's images stay, although its folder is gone."""
    for n in range(8):
        put(tmp_path / "a" / "photos" / "p" / f"{n}.png", n)
        put(tmp_path / "b" / "photos" / "p" / f"{n}.png", 50 + n)
    embed(tmp_path / "a" / "photos", tmp_path / "g", fakes)
    first = live(tmp_path / "g")
    shutil.rmtree(tmp_path / "a")
    for _ in range(2):
        summary = embed(tmp_path / "b" / "photos", tmp_path / "g", fakes, at_most=1.0)
        assert (summary.relocated, summary.missing) == (0, 0)
    assert [row for row in live(tmp_path / "g") if "/a/" in row["uri"]] == first
    assert {row["source"] for row in live(tmp_path / "g")} == {"photos", "b/photos"}


def test_a_source_that_is_mounted_elsewhere_in_another_order(fakes: Settings, tmp_path: Path) -> None:
    """Neither its place nor the paths below it say what it is: the content does."""
    make_folder(tmp_path / "old")
    embed(tmp_path / "old", tmp_path / "g", fakes)
    before = ids_by_image(tmp_path / "g")
    for n in range(8):
        put(tmp_path / "new" / "all" / f"img{7 - n}.png", n)
    shutil.rmtree(tmp_path / "old")
    summary = embed(tmp_path / "new", tmp_path / "g", fakes)
    assert (count_read(summary), summary.moved, summary.missing) == (0, 8, 0)
    assert ids_by_image(tmp_path / "g") == before
    check_as_from_scratch(tmp_path / "new", tmp_path / "g", fakes)


def test_moved_images_keep_their_labels_if_the_source_gives_none(fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "photos")
    embed(tmp_path / "photos", tmp_path / "g", fakes, identity="auto")
    before = {row["image_id"]: row["identity"] for row in live(tmp_path / "g")}
    for path in (tmp_path / "photos").glob("*/*.png"):
        path.rename(tmp_path / "photos" / path.name)
    summary = embed(tmp_path / "photos", tmp_path / "g", fakes, identity="auto")
    assert summary.moved == 8
    assert {row["image_id"]: row["identity"] for row in live(tmp_path / "g")} == before
    assert set(before.values()) == {"p0", "p1"}
    embed(tmp_path / "photos", tmp_path / "g", fakes, identity="none")
    assert {row["identity"] for row in live(tmp_path / "g")} == {None}


def test_a_link_to_a_source_is_the_source(fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "disk" / "photos")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    embed(tmp_path / "link" / "photos", tmp_path / "g", fakes)
    for place in ("disk/photos", "disk/photos/p1", "link/photos/p0", "disk"):
        summary = embed(tmp_path / place, tmp_path / "g", fakes)
        assert (summary.images, summary.missing) == (0, 0), place
    assert all("/link/" in row["uri"] for row in rows(tmp_path / "g"))
    other = embed(tmp_path / "disk" / "photos", tmp_path / "g", fakes, name="the same under another name")
    assert other.images == 8, "whoever names it wants it beside the other"


def test_retired_images_do_not_come_back_with_their_source(fakes: Settings, tmp_path: Path) -> None:
    """What was erased by its age is known by its uri alone, and has another one at the new place."""
    from facepipe.erasure.limits import ErasureLimit
    from facepipe.erasure.selection import Selection
    from pipelines import erase

    make_folder(tmp_path / "old")
    embed(tmp_path / "old", tmp_path / "g", fakes)
    erased = erase.run(Selection(uri="*/p0/*"), str(tmp_path / "g"), limit=ErasureLimit(1.0))
    shutil.move(tmp_path / "old", tmp_path / "new")
    summary = embed(tmp_path / "new", tmp_path / "g", fakes)
    assert (erased.images, summary.erased, summary.images, summary.relocated) == (4, 4, 0, 4)
    assert not any("/p0/" in row["uri"] for row in rows(tmp_path / "g"))


# ---- galleries of older versions


def forget_sources(gallery: Path) -> None:
    """Make a gallery as older versions left it: without a register of its sources."""
    Gallery(str(gallery)).set_property("facepipe.sources", "[]")


@pytest.mark.parametrize("places", PLACES)
def test_an_older_gallery_knows_its_source_elsewhere(places: str, fakes: Settings, tmp_path: Path) -> None:
    old, new = (tmp_path / place for place in PLACES[places])
    make_folder(old)
    embed(old, tmp_path / "g", fakes)
    forget_sources(tmp_path / "g")
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(old, new)
    summary = embed(new, tmp_path / "g", fakes)
    assert (summary.images, summary.relocated, summary.missing) == (0, 8, 0)
    check_as_from_scratch(new, tmp_path / "g", fakes)


def test_an_older_gallery_knows_its_source_by_a_link(fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "disk" / "photos")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    embed(tmp_path / "disk" / "photos", tmp_path / "g", fakes)
    forget_sources(tmp_path / "g")
    assert embed(tmp_path / "link" / "photos", tmp_path / "g", fakes).images == 0
    assert all("/disk/" in row["uri"] for row in rows(tmp_path / "g"))


def test_images_that_stood_in_uris_get_names(fakes: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions made the uris of Hugging Face's rows from the image. No image is embedded again for the name."""
    from facepipe.sources import parquet

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": encode(n), "path": f"p{n}.png"} for n in range(6)], kind)
    pq.write_table(pa.table({"image": images, "label": [0, 1] * 3}), tmp_path / "hf.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "holds_image", lambda text: False)
        patch.setattr(parquet, "shorten_name", lambda name: name)
        patch.setattr(parquet, "find_name_column", lambda schema, column: "image")
        embed(tmp_path / "hf.parquet", tmp_path / "g", fakes)
    forget_sources(tmp_path / "g")
    before = ids_by_image(tmp_path / "g")
    assert all("{'bytes': b" in row["uri"] for row in rows(tmp_path / "g"))
    summary = embed(tmp_path / "hf.parquet", tmp_path / "g", fakes)
    assert (count_read(summary), summary.moved, summary.missing) == (0, 6, 0)
    assert ids_by_image(tmp_path / "g") == before
    assert {tuple(row["former_uris"]) for row in rows(tmp_path / "g")} == {(UNKNOWN_URI,)}
    check_as_from_scratch(tmp_path / "hf.parquet", tmp_path / "g", fakes)


# ---- images that move within a source


def test_a_renamed_folder(fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "photos")
    embed(tmp_path / "photos", tmp_path / "g", fakes)
    before = ids_by_image(tmp_path / "g")
    (tmp_path / "photos" / "p0").rename(tmp_path / "photos" / "ann")
    summary = embed(tmp_path / "photos", tmp_path / "g", fakes)
    assert (dict(summary.statuses), summary.moved, summary.missing) == ({"moved": 4}, 4, 0)
    assert ids_by_image(tmp_path / "g") == before
    assert {row["identity"] for row in live(tmp_path / "g")} == {"ann", "p1"}
    found = [row for row in rows(tmp_path / "g") if "/ann/" in row["uri"]]
    assert all(row["former_uris"] == [row["uri"].replace("/ann/", "/p0/")] for row in found)
    check_as_from_scratch(tmp_path / "photos", tmp_path / "g", fakes)
    assert embed(tmp_path / "photos", tmp_path / "g", fakes).images == 0


def test_an_image_that_comes_back_under_another_name_after_nights(fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "photos")
    embed(tmp_path / "photos", tmp_path / "g", fakes)
    before = ids_by_image(tmp_path / "g")
    path = tmp_path / "photos" / "p1" / "1.png"
    data = path.read_bytes()
    path.unlink()
    assert embed(tmp_path / "photos", tmp_path / "g", fakes).missing == 1
    (tmp_path / "photos" / "p1" / "again.png").write_bytes(data)
    assert embed(tmp_path / "photos", tmp_path / "g", fakes).moved == 1
    assert ids_by_image(tmp_path / "g") == before
    check_as_from_scratch(tmp_path / "photos", tmp_path / "g", fakes)


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize(
    "after", [[1, 2, 3, 4, 5], [0, 1, 3, 4, 5], [9, 0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 2, 1], [7, 8], [0, 9, 2]]
)
def test_rows_of_a_parquet_file_that_come_and_go(
    names: bool, after: list[int], fakes: Settings, tmp_path: Path
) -> None:
    """A row is named by its number. Taking one out renames all others, and changes none of them."""
    path = tmp_path / "a.parquet"
    write_rows(path, [0, 1, 2, 3, 4, 5], names)
    embed(path, tmp_path / "g", fakes)
    before = ids_by_image(tmp_path / "g")
    write_rows(path, after, names)
    os.utime(path, (1, 1))
    summary = embed(path, tmp_path / "g", fakes, at_most=1.0)
    check_as_from_scratch(path, tmp_path / "g", fakes, at_most=1.0)
    assert count_read(summary) == len([n for n in after if n > 5]), "only new images are embedded"
    kept = ids_by_image(tmp_path / "g")
    for n in set(after) - {7, 8, 9}:
        image = compute_image_id(encode(n))
        assert set(before.get(image, [])) <= set(kept.get(image, [])), n


def test_names_that_are_swapped_or_go_round(fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "photos")
    embed(tmp_path / "photos", tmp_path / "g", fakes)
    before = ids_by_image(tmp_path / "g")
    for n in range(8):
        path = put(tmp_path / "photos" / f"p{n % 2}" / f"{n}.png", (n + 2) % 8)
        os.utime(path, (n + 1, n + 1))
    summary = embed(tmp_path / "photos", tmp_path / "g", fakes)
    assert (count_read(summary), summary.moved) == (0, 8)
    assert ids_by_image(tmp_path / "g") == before
    check_as_from_scratch(tmp_path / "photos", tmp_path / "g", fakes)


def test_a_photo_that_gives_its_name_to_another_one(fakes: Settings, tmp_path: Path) -> None:
    """The old one is kept under a new name, and a new one gets its name."""
    make_folder(tmp_path / "photos")
    embed(tmp_path / "photos", tmp_path / "g", fakes)
    before = ids_by_image(tmp_path / "g")
    put(tmp_path / "photos" / "p1" / "1-old.png", 1)
    put(tmp_path / "photos" / "p1" / "1.png", 40)
    summary = embed(tmp_path / "photos", tmp_path / "g", fakes)
    assert (count_read(summary), summary.moved) == (1, 1)
    assert ids_by_image(tmp_path / "g").items() >= before.items()
    check_as_from_scratch(tmp_path / "photos", tmp_path / "g", fakes)


def test_copies_get_rows_of_their_own(fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "photos")
    embed(tmp_path / "photos", tmp_path / "g", fakes)
    before = ids_by_image(tmp_path / "g")
    image = compute_image_id(encode(1))
    (tmp_path / "photos" / "p1" / "1.png").rename(tmp_path / "photos" / "p1" / "first.png")
    for name in ("second", "third"):
        put(tmp_path / "photos" / "p1" / f"{name}.png", 1)
    summary = embed(tmp_path / "photos", tmp_path / "g", fakes)
    assert (count_read(summary), summary.moved, summary.statuses["copied"]) == (0, 1, 2)
    assert (summary.rows, summary.faces) == (2, 2)
    after = ids_by_image(tmp_path / "g")
    assert len(set(after[image])) == 3
    assert before[image][0] in after[image]
    check_as_from_scratch(tmp_path / "photos", tmp_path / "g", fakes)


def test_a_copy_under_a_former_name_gets_other_face_ids(fakes: Settings, tmp_path: Path) -> None:
    """A face id is made from the first uri and the content: a copy that is put there has the same two."""
    make_folder(tmp_path / "photos")
    embed(tmp_path / "photos", tmp_path / "g", fakes)
    first = tmp_path / "photos" / "p1" / "1.png"
    for number in range(2):
        first.rename(first.with_name(f"moved{number}.png"))
        embed(tmp_path / "photos", tmp_path / "g", fakes)
        put(first, 1)
        summary = embed(tmp_path / "photos", tmp_path / "g", fakes)
        assert (count_read(summary), summary.statuses["copied"]) == (0, 1)
        check_as_from_scratch(tmp_path / "photos", tmp_path / "g", fakes)
    # In another source, too: the first place of a source that was mounted elsewhere gets a copy of it.
    shutil.move(tmp_path / "photos", tmp_path / "new")
    embed(tmp_path / "new", tmp_path / "g", fakes)
    shutil.copytree(tmp_path / "new", tmp_path / "photos")
    embed(tmp_path / "photos", tmp_path / "g", fakes)
    assert verify_gallery(Gallery(str(tmp_path / "g"))).problems == []
    assert len({row["uri"] for row in rows(tmp_path / "g")}) == 2 * 10


def test_moved_images_keep_what_failed_them(fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "photos")
    (tmp_path / "photos" / "p0" / "broken.png").write_bytes(encode(1)[:60])
    embed(tmp_path / "photos", tmp_path / "g", fakes)
    (tmp_path / "photos" / "p0").rename(tmp_path / "photos" / "p2")
    assert embed(tmp_path / "photos", tmp_path / "g", fakes).moved == 5
    check_as_from_scratch(tmp_path / "photos", tmp_path / "g", fakes)


def test_what_is_not_worth_the_wait_is_embedded_again(
    fakes: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many images are replaced that their older rows cannot wait: images that were moved from there are embedded."""
    monkeypatch.setattr(moved_images, "_MAX_WAITING", 1)
    path = tmp_path / "a.parquet"
    write_rows(path, [0, 1, 2, 3, 4, 5], names=False)
    embed(path, tmp_path / "g", fakes)
    write_rows(path, [11, 12, 13, 14, 15, 16, 0, 1, 2, 3, 4, 5], names=False)
    os.utime(path, (1, 1))
    summary = embed(path, tmp_path / "g", fakes)
    assert summary.images == 12
    check_as_from_scratch(path, tmp_path / "g", fakes)


def test_a_move_seen_through_an_incomplete_listing_takes_nothing_away(
    fakes: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "photos")
    embed(tmp_path / "photos", tmp_path / "g", fakes)
    before = ids_by_image(tmp_path / "g")
    put(tmp_path / "photos" / "copy" / "0.png", 1)
    hidden = tmp_path / "photos" / "p1"
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if path == os.fsencode(hidden):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    summary = embed(tmp_path / "photos", tmp_path / "g", fakes)
    assert (summary.moved, summary.missing) == (0, 0)
    monkeypatch.undo()
    embed(tmp_path / "photos", tmp_path / "g", fakes)
    assert ids_by_image(tmp_path / "g").items() >= {k: v for k, v in before.items() if len(v) == 2}.items()
    check_as_from_scratch(tmp_path / "photos", tmp_path / "g", fakes)


# ---- object stores


def upload(bucket: Any, root: Path, prefix: str) -> None:
    for path in sorted(root.rglob("*.png")):
        bucket.upload_file(str(path), "faces", f"{prefix}/{path.relative_to(root)}")


def delete(bucket: Any, prefix: str) -> None:
    for entry in bucket.list_objects_v2(Bucket="faces", Prefix=f"{prefix}/").get("Contents", ()):
        bucket.delete_object(Bucket="faces", Key=entry["Key"])


@pytest.mark.parametrize(("start", "end"), [("disk", "store"), ("store", "disk")])
def test_a_source_that_moves(start: str, end: str, bucket: Any, fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "photos")
    place = {"disk": str(tmp_path / "photos"), "store": f"s3://faces/{start}{end}/old/photos"}[start]
    if start == "store":
        upload(bucket, tmp_path / "photos", f"{start}{end}/old/photos")
    first = embed(place, tmp_path / "g", fakes)
    before = ids_by_image(tmp_path / "g")
    new = {"disk": str(tmp_path / "new" / "photos"), "store": f"s3://faces/{start}{end}/new/photos"}[end]
    if end == "disk":
        shutil.copytree(tmp_path / "photos", tmp_path / "new" / "photos")
    else:
        upload(bucket, tmp_path / "photos", f"{start}{end}/new/photos")
    shutil.rmtree(tmp_path / "photos")
    delete(bucket, f"{start}{end}/old/photos")
    summary = embed(new, tmp_path / "g", fakes)
    assert summary.relocated == first.images
    assert "ok" not in summary.statuses
    assert ids_by_image(tmp_path / "g") == before
    check_as_from_scratch(new, tmp_path / "g", fakes)


def test_a_prefix_and_a_folder_of_one_name(bucket: Any, fakes: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "photos")
    for n in range(20, 24):
        put(tmp_path / "others" / f"p{n % 2}" / f"{n}.png", n)
    upload(bucket, tmp_path / "others", "twin/photos")
    for _ in range(2):
        for place in ("s3://faces/twin/photos", str(tmp_path / "photos")):
            summary = embed(place, tmp_path / "g", fakes, at_most=1.0)
            assert summary.missing == 0
    rows = Gallery(str(tmp_path / "g")).to_arrow(["uri", "source"]).to_pylist()
    assert len({row["source"] for row in rows}) == 2


# ---- whatever happens between nights


@dataclass
class Corpus:
    """A folder tree, a tar and a Parquet file whose content changes at random."""

    root: Path
    files: dict[str, int] = field(default_factory=dict)
    members: list[int] = field(default_factory=list)
    number: int = 0

    def write(self) -> None:
        """Write all of it, with times that only change with the content."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        for name, n in self.files.items():
            os.utime(put(self.root / name, n), (n + 1, n + 1))
        if self.members:
            write_rows(self.root.parent / "rows.parquet", self.members, names=False)


ACTIONS: dict[str, Callable[[Corpus, Any], None]] = {}


def action(function: Callable[[Corpus, Any], None]) -> Callable[[Corpus, Any], None]:
    ACTIONS[function.__name__] = function
    return function


@action
def add(corpus: Corpus, draw_from: Any) -> None:
    corpus.number += 1
    corpus.files[f"p{corpus.number % 3}/{corpus.number}.png"] = corpus.number


@action
def remove(corpus: Corpus, draw_from: Any) -> None:
    if len(corpus.files) > 1:
        del corpus.files[draw_from(st.sampled_from(sorted(corpus.files)))]


@action
def rename(corpus: Corpus, draw_from: Any) -> None:
    name = draw_from(st.sampled_from(sorted(corpus.files)))
    corpus.number += 1
    corpus.files[f"{draw_from(st.sampled_from(['p0', 'p1', 'new/deep']))}/r{corpus.number}.png"] = corpus.files.pop(
        name
    )


@action
def swap(corpus: Corpus, draw_from: Any) -> None:
    one, two = (draw_from(st.sampled_from(sorted(corpus.files))) for _ in range(2))
    corpus.files[one], corpus.files[two] = corpus.files[two], corpus.files[one]


@action
def copy(corpus: Corpus, draw_from: Any) -> None:
    corpus.number += 1
    corpus.files[f"p2/c{corpus.number}.png"] = corpus.files[draw_from(st.sampled_from(sorted(corpus.files)))]


@action
def overwrite(corpus: Corpus, draw_from: Any) -> None:
    corpus.number += 1
    corpus.files[draw_from(st.sampled_from(sorted(corpus.files)))] = corpus.number


@action
def relabel(corpus: Corpus, draw_from: Any) -> None:
    """Give a person's folder another name."""
    old = draw_from(st.sampled_from(sorted({name.rpartition("/")[0] for name in corpus.files})))
    corpus.number += 1
    corpus.files = {name.replace(f"{old}/", f"q{corpus.number}/", 1): n for name, n in corpus.files.items()}


@action
def mount_elsewhere(corpus: Corpus, draw_from: Any) -> None:
    shutil.rmtree(corpus.root, ignore_errors=True)
    corpus.number += 1
    corpus.root = corpus.root.parent / f"disk{corpus.number}"


@hypothesis.settings(max_examples=len(trials(15)), suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.data())
def test_any_order_of_changes_gives_the_gallery_from_scratch(
    fakes: Settings, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    place = tmp_path_factory.mktemp("nights")
    corpus = Corpus(place / "photos", {f"p{n % 2}/{n}.png": n for n in range(5)}, number=5)
    corpus.write()
    embed(corpus.root, place / "g", fakes, at_most=1.0)
    for _ in range(3):
        known = ids_by_image(place / "g")
        for name in data.draw(st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=4)):
            ACTIONS[name](corpus, data.draw)
        corpus.write()
        summary = embed(corpus.root, place / "g", fakes, at_most=1.0)
        assert summary.missing_ignored == ""
        check_as_from_scratch(corpus.root, place / "g", fakes, at_most=1.0)
        # What was there before and is there now has its ids, and was not embedded again.
        now = ids_by_image(place / "g")
        for image in {compute_image_id(encode(n)) for n in corpus.files.values()} & known.keys():
            assert set(known[image]) & set(now[image])
        assert count_read(summary) <= len(set(corpus.files.values()))
