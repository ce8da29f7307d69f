"""Labels that changed at the source arrive in the gallery, and no image is read or embedded for them."""

import io
import random
import tarfile
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw
from helpers import embed, rows, run_facepipe

from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index.search import Index
from facepipe.schema import WORK_ITEM
from facepipe.sources import blocks
from facepipe.sources.blocks import RELABELLED, Block, BlockSize, cut_blocks, decode_block, encode_block
from facepipe.sources.item import WorkItem
from facepipe.sources.screening import SKIP, Screening, hash_labels
from facepipe.types import UInt64
from pipelines import index
from pipelines.index import IndexConfig
from pipelines.runtime.image_rows import to_blocks, to_item_rows

Settings = dict[str, Any]
Labels = list[str | None]

IMAGES = 5
PEOPLE = ["ann", "bob", "José", "\U00020bb7", "7", None]


@cache
def encode(n: int) -> bytes:
    return bytes(cv2.imencode(".png", draw(3 * n + 1))[1].tobytes())


def write_folder(root: Path, labels: Labels) -> Path:
    """Write files, and a list of them with labels."""
    (root / "img").mkdir(parents=True, exist_ok=True)
    for n in range(len(labels)):
        path = root / "img" / f"{n}.png"
        if not path.exists():
            path.write_bytes(encode(n))
    lines = [f"img/{n}.png,{label or ''}\n" for n, label in enumerate(labels)]
    (root / "list.csv").write_text("path,identity\n" + "".join(lines))
    return root / "list.csv"


def write_table(root: Path, labels: Labels) -> Path:
    root.mkdir(exist_ok=True)
    images = [encode(n) for n in range(len(labels))]
    pq.write_table(pa.table({"bytes": images, "identity": pa.array(labels, pa.string())}), root / "rows.parquet")
    return root / "rows.parquet"


def write_tar(root: Path, labels: Labels) -> Path:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / "shard.tar", "w") as tar:
        for n, label in enumerate(labels):
            for ending, data in (("png", encode(n)), ("cls", (label or "").encode())):
                info = tarfile.TarInfo(f"{n}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return root / "shard.tar"


def read_labels(gallery: Path) -> list[tuple[str, str | None]]:
    return [(row["uri"].rpartition("/")[2], row["identity"]) for row in rows(gallery)]


@pytest.mark.parametrize("write", [write_folder, write_table, write_tar])
def test_any_relabelling_between_nights(write: Callable[[Path, Labels], Path], fakes: Settings, tmp_path: Path) -> None:
    """After some nights the gallery is the one that is built from scratch, but for the times."""
    chance = random.Random(17)
    labels: Labels = ["ann", *chance.choices(PEOPLE, k=IMAGES - 1)]
    source = write(tmp_path / "source", labels)
    embed(source, tmp_path / "g", fakes)
    for _ in range(3):
        changed = set(chance.sample(range(IMAGES), chance.randint(1, IMAGES)))
        labels = [chance.choice(PEOPLE) if n in changed else label for n, label in enumerate(labels)]
        write(tmp_path / "source", labels)
        summary = embed(source, tmp_path / "g", fakes)
        assert set(summary.statuses) <= {"touched"}, "no image is embedded again"
        assert summary.images == (0 if write is write_folder else IMAGES)
        assert [label for _, label in read_labels(tmp_path / "g")] == labels
    embed(source, tmp_path / "scratch", fakes)
    assert rows(tmp_path / "g") == rows(tmp_path / "scratch")
    again = embed(source, tmp_path / "g", fakes)
    assert (again.images, again.relabelled) == (0, 0), "the gallery is at rest"
    assert verify_gallery(Gallery(str(tmp_path / "g"))).problems == []


def test_folders_that_get_another_meaning(fakes: Settings, tmp_path: Path) -> None:
    for n in range(4):
        folder = tmp_path / "set" / f"person{n % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"a{n % 2}_{n}.png").write_bytes(encode(n))
    found = []
    for rule in ("none", "folder", "filename", "none", "auto"):
        summary = embed(tmp_path / "set", tmp_path / "g", fakes, {"source": {"identity": rule}})
        assert (summary.images, summary.relabelled) == ((4, 0) if not found else (0, 4))
        found.append(sorted({row["identity"] or "" for row in rows(tmp_path / "g")}))
    assert found == [[""], ["person0", "person1"], ["a0", "a1"], [""], ["person0", "person1"]]


def test_a_folder_of_one_person_that_gets_company(fakes: Settings, tmp_path: Path) -> None:
    for n, person in enumerate(("ann", "bob")):
        (tmp_path / "set" / person).mkdir(parents=True)
        (tmp_path / "set" / person / "1.png").write_bytes(encode(n))
        embed(tmp_path / "set", tmp_path / "g", fakes)
        expected = [None] if n == 0 else ["ann", "bob"]
        assert [row["identity"] for row in rows(tmp_path / "g")] == expected


def test_auto_that_finds_no_label_takes_none_away(fakes: Settings, tmp_path: Path) -> None:
    """Whoever forgets the option of the first night does not lose the labels of all images."""
    for n in range(2):
        folder = tmp_path / "set" / "a" / f"person{n}"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(encode(n))
    embed(tmp_path / "set", tmp_path / "g", fakes, {"source": {"identity": "folder"}})
    before = rows(tmp_path / "g")
    summary = embed(tmp_path / "set", tmp_path / "g", fakes)
    assert rows(tmp_path / "g") == before
    assert any("2 images have labels in the gallery, but none at the source" in note for note in summary.notes)
    assert any("--identity none" in note for note in summary.notes)
    assert embed(tmp_path / "set", tmp_path / "g", fakes, {"source": {"identity": "none"}}).relabelled == 2
    assert {row["identity"] for row in rows(tmp_path / "g")} == {None}


def test_another_source_fills_labels_in_but_does_not_change_them(fakes: Settings, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", ["ann", "bob", None])
    embed(source.parent / "img", tmp_path / "g", fakes)
    assert {row["identity"] for row in rows(tmp_path / "g")} == {None}
    assert embed(source, tmp_path / "g", fakes).relabelled == 2, "a list with labels comes after its folder"
    assert [row["identity"] for row in rows(tmp_path / "g")] == ["ann", "bob", None]
    other = tmp_path / "source" / "other.csv"
    other.write_text("path,identity\nimg/0.png,eve\nimg/1.png,bob\nimg/2.png,kim\n")
    summary = embed(other, tmp_path / "g", fakes)
    assert [row["identity"] for row in rows(tmp_path / "g")] == ["ann", "bob", "kim"]
    assert summary.relabelled == 1
    assert any("1 images have a label from another source" in note for note in summary.notes)
    assert embed(source.parent / "img", tmp_path / "g", fakes).relabelled == 0, "and the folder takes none away"


def test_a_new_picture_brings_its_label(fakes: Settings, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", ["ann", "bob"])
    embed(source, tmp_path / "g", fakes)
    (tmp_path / "source" / "img" / "0.png").write_bytes(encode(9))
    (tmp_path / "source" / "img" / "1.png").rename(tmp_path / "away.png")
    source.write_text("path,identity\nimg/0.png,eve\nimg/1.png,kim\n")
    summary = embed(source, tmp_path / "g", fakes)
    assert [row["identity"] for row in rows(tmp_path / "g")] == ["eve", "bob"], "what cannot be read may be another one"
    assert summary.statuses == {"ok": 1, "unchanged": 1}
    (tmp_path / "away.png").rename(tmp_path / "source" / "img" / "1.png")
    embed(source, tmp_path / "g", fakes)
    assert [row["identity"] for row in rows(tmp_path / "g")] == ["eve", "kim"]


def test_an_image_that_never_was_read_gets_its_new_label(fakes: Settings, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,identity\ngone.png,ann\n")
    embed(tmp_path / "list.csv", tmp_path / "g", fakes)
    (tmp_path / "list.csv").write_text("path,identity\ngone.png,bob\n")
    embed(tmp_path / "list.csv", tmp_path / "g", fakes)
    assert [(row["status"], row["identity"]) for row in rows(tmp_path / "g")] == [("read_error", "bob")]


def test_the_index_learns_new_labels(fakes: Settings, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", ["ann", "ann", "bob"])
    embed(source, tmp_path / "g", fakes)
    index.run(IndexConfig(), str(tmp_path / "g"))
    write_folder(tmp_path / "source", ["ann", "eve", "bob"])
    embed(source, tmp_path / "g", fakes)
    index.run(IndexConfig(), str(tmp_path / "g"))
    faces = Gallery(str(tmp_path / "g")).to_arrow(["face_id", "identity"], "face_id is not null")
    labels = Index(str(tmp_path / "g")).get_labels(faces["face_id"].to_numpy())["identity"].to_pylist()
    assert labels == faces["identity"].to_pylist()
    assert set(labels) == {"ann", "eve", "bob"}


def test_numbers_of_two_lists_are_two_name_spaces(fakes: Settings, tmp_path: Path) -> None:
    models = ("--detector", "fake-detector", "--embedder", "fake-embedder", "--runner", "inline", "--quiet")
    first = write_folder(tmp_path / "set0", ["0", "1"])
    second = write_folder(tmp_path / "set1", ["0", "2"])
    gallery = tmp_path / "g"
    assert "number" not in run_facepipe("embed", first, gallery, *models, "--set", "source.name=a")[2]
    code, _, err = run_facepipe("embed", second, gallery, *models, "--set", "source.name=b")
    assert (code, "--label-prefix b-" in err) == (0, True)
    assert (
        "number"
        not in run_facepipe("embed", second, gallery, *models, "--set", "source.name=b", "--label-prefix", "")[2]
    )
    code, out, err = run_facepipe("embed", second, gallery, *models, "--set", "source.name=b", "--label-prefix", "b-")
    assert (code, err) == (0, "")
    assert "relabelled by the source" in out
    assert [label for _, label in read_labels(gallery)] == ["0", "1", "b-0", "b-2"]


# ---------------------------------------------------------------- blocks


class Relabelled:
    """A source of which the gallery knows every image under another label."""

    name = "source"
    ignored = 0
    gives_labels = True
    label_numbers = None
    notes = ("a note",)

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Any:
        return (WorkItem(f"{n}.jpg", b"", fingerprint="x", identity=f"p{n}") for n in range(self.count))

    def screen(self, uris: UInt64, fingerprints: UInt64) -> Screening:
        """Know all images."""
        count = len(uris)
        return Screening(
            verdicts=np.full(count, SKIP, np.int8),
            contents=np.zeros(count, np.uint64),
            labels=hash_labels(["old"] * count),
            is_own=np.ones(count, bool),
        )


def test_new_labels_travel_in_blocks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_MAX_RELABELLED", 1000)
    source = Relabelled(10_500)
    cut = list(cut_blocks(source, source, BlockSize()))
    tables = [block.relabelled for block in cut if block.relabelled is not None]
    assert max(table.num_rows for table in tables) <= 1000
    joined = pa.concat_tables(tables)
    assert joined["uri"].to_pylist() == [f"{n}.jpg" for n in range(10_500)]
    assert joined["identity"].to_pylist() == [f"p{n}" for n in range(10_500)]
    assert sum(block.skipped for block in cut) == 10_500
    assert [block.notes for block in cut if block.notes] == [("a note",)]


def test_blocks_travel_with_labels_and_notes() -> None:
    source = Relabelled(3)
    (block,) = cut_blocks(source, source, BlockSize())
    copy = decode_block(encode_block(block))
    rows = to_item_rows(block)
    from_rows, reports = to_blocks(rows)
    assert (rows.num_rows, reports) == (1, [0]), "a report without an image is a row of its own"
    for found in (copy, from_rows):
        assert found.relabelled.equals(block.relabelled)
        assert found.notes == block.notes == ("a note",)
        assert (found.last, found.handed_out, found.digest) == (True, 0, 0)


def test_blocks_travel_between_processes_with_all_that_they_hold() -> None:
    """Rows too: chips of a gallery are cut from faces that are known, which are rows beside the items."""
    columns = [pa.array(["a", "b"]), *[pa.nulls(2, column.type) for column in WORK_ITEM][1:]]
    items = pa.table(columns, schema=WORK_ITEM)
    rows = items.append_column("given_image", pa.array(["a", "b"]))
    labels = pa.table([pa.array(["a"]), pa.array(["ann"])], schema=RELABELLED)
    block = Block(3, items, rows, 1, 2, 3, 4, True, 5, 6, labels, ("a note",))
    assert all(getattr(block, part.name) not in (None, 0, ()) for part in fields(Block)), "every field is set"
    copy = decode_block(encode_block(block))
    for part in fields(Block):
        before, after = getattr(block, part.name), getattr(copy, part.name)
        assert after.equals(before) if isinstance(before, pa.Table) else after == before
    from_rows, _ = to_blocks(to_item_rows(block))
    assert from_rows.rows is not None
    assert from_rows.rows.equals(block.rows)
