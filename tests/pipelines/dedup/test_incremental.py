"""dedup --new: each night says of the new images what a comparison of everything says of them, and costs less."""

import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from bench.galleries import Faces, append, rows
from conftest import draw
from helpers import embed

from facepipe.config import build
from facepipe.curation.graph import Graph
from facepipe.errors import IndexingError
from facepipe.gallery import Contract, Gallery
from pipelines.dedup import DedupConfig
from pipelines.dedup import incremental as pipeline
from pipelines.dedup import run as dedup
from pipelines.dedup.incremental import NewSummary, run
from pipelines.index import IndexConfig
from pipelines.index import run as index

DLIB = Contract.from_models("retinaface-mnet025", "dlib-resnet", True)
NAMES = ("img5.jpg", "img11.jpg", "img21.jpg", "img25.jpg", "img51.jpg")  # small files with a face each
PAIR = ("uri_a", "uri_b", "kind", "hash_bits", "mirrored", "face_id_a", "face_id_b")
Row = dict[str, Any]


def report(gallery: str, name: str) -> dict[str, list[Row]]:
    folder = Path(gallery, "reports", name)
    return {n: pq.read_table(folder / f"{n}.parquet").to_pylist() for n in ("pairs", "groups", "decisions")}


def same_pairs(mine: list[Row], theirs: list[Row]) -> None:
    """Equal but for the last digits of distances, which are computed from either end."""
    assert [[row[n] for n in PAIR] for row in mine] == [[row[n] for n in PAIR] for row in theirs]
    np.testing.assert_allclose([row["distance"] for row in mine], [row["distance"] for row in theirs], atol=1e-5)


def night(gallery: str, new: set[str], *layers: dict[str, Any]) -> tuple[NewSummary, dict[str, list[Row]]]:
    """One run, compared with what a whole dedup says of these images."""
    index(IndexConfig(), gallery)
    config = build(DedupConfig, *layers)
    summary = run(config, gallery)
    dedup(config, gallery)
    near = Graph(os.path.join(gallery, "reports", "graph")).edges.read_within(config.dedup.radius)
    assert np.bincount(np.concatenate([near.u, near.v]), minlength=1).max() < 32, "no crowd: nights list all its pairs"
    mine, whole = report(gallery, "dedup-new"), report(gallery, "dedup")
    same_pairs(mine["pairs"], [row for row in whole["pairs"] if {row["uri_a"], row["uri_b"]} & new])
    inside = {row["group"] for row in whole["decisions"] if row["uri"] in new and row["group"] is not None}
    number = {group: n for n, group in enumerate(sorted(inside))} | {None: None}
    wanted = [row for row in whole["decisions"] if row["uri"] in new or row["group"] in inside]
    assert mine["decisions"] == [{**row, "group": number[row["group"]]} for row in wanted]
    assert mine["groups"] == [{**r, "group": number[r["group"]]} for r in whole["groups"] if r["group"] in inside]
    assert (summary.new, summary.groups) == (len(new), len(inside))
    folder = Path(gallery, "reports", "dedup-new")
    for name in ("keep", "drop"):
        listed = (folder / f"{name}.txt").read_text().splitlines()
        assert listed == [row["uri"] for row in wanted if row["decision"] == name]
        assert getattr(summary, name) == len(listed)
    assert (folder / "report.html").stat().st_size > 1000
    return summary, mine


def some(rng: np.random.Generator, first: int, count: int, held: pa.Table | None) -> pa.Table:
    """New images, among them copies of each other and of what is held: by bytes, by picture, changed, or cut anew.

    `source` says which are originals; only these are copied, or some faces would have more neighbours than a graph's.
    """
    truth = rng.integers(0, 40, count)
    vectors, hashes = Faces().draw(truth, first), rng.integers(-(2**62), 2**62, count)
    ids = np.array([f"{first + n:032x}" for n in range(count)], object)
    source = np.full(count, "original", object)
    held = held.filter(pc.equal(held["source"], "original")) if held is not None else None
    for n in range(1, count):
        old = held is not None and rng.random() < 0.6
        k = int(
            rng.integers(held.num_rows)
            if held is not None and old
            else rng.choice(np.flatnonzero(source[:n] == "original"))
        )
        vector = np.array(held["embedding"][k].as_py(), np.float32) if held is not None and old else vectors[k]
        bits = held["image_hash"][k].as_py() if held is not None and old else hashes[k]
        name = held["image_id"][k].as_py() if held is not None and old else ids[k]
        what = rng.integers(8)
        source[n] = "copy" if what < 5 else "original"
        if what < 2:
            vectors[n], hashes[n] = vector, bits
            ids[n] = name if what == 0 else ids[n]
        elif what < 5:
            moved = vector + rng.normal(0, (0.006, 0.012, 0.017)[what - 2], 128).astype(np.float32)
            vectors[n] = moved / np.linalg.norm(moved)
            flips = rng.choice(62, int(rng.integers(0, 20)), replace=False)
            hashes[n] = int(bits) ^ int(sum(1 << int(b) for b in flips)) if what < 4 else hashes[n]
    table = rows(truth, vectors, first)
    sizes = rng.integers(50, 60, count)
    return with_columns(
        table, image_id=ids, image_hash=hashes, width=sizes, height=sizes, identity=[None] * count, source=source
    )


def with_columns(table: pa.Table, **columns: Any) -> pa.Table:
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    return table


@pytest.mark.parametrize("drop", ["exact", "near", "same_shot"])
@pytest.mark.parametrize("seed", range(3))
def test_each_night_is_what_a_whole_dedup_says_of_the_new_images(tmp_path: Path, seed: int, drop: str) -> None:
    """Exactly, as the index of a small gallery is exact. And the union of all nights' pairs lacks none of the pairs of
    the whole; what it has besides are pairs that stronger ones of the same two pictures took the place of."""
    rng, gallery = np.random.default_rng(seed), Gallery.create(str(tmp_path / "g"), DLIB)
    layer = {"dedup": {"drop": drop}}
    union: set[tuple[Any, ...]] = set()
    kinds: set[str] = set()
    for n in range(4):
        held = Gallery(gallery.path).to_arrow() if n else None
        new = some(rng, 1000 * n, 60, held)
        append(gallery, [new], f"night{n}")
        # The mark of the whole dedup is not looked at: what a night says must not depend on it.
        _, found = night(gallery.path, set(new["uri"].to_pylist()), layer)
        union |= {(row["uri_a"], row["uri_b"], row["kind"]) for row in found["pairs"]}
        kinds |= {row["kind"] for row in found["pairs"]}
    assert kinds == {"exact", "near", "same_shot"}
    whole = {(row["uri_a"], row["uri_b"], row["kind"]) for row in report(gallery.path, "dedup")["pairs"]}
    turned = {(b, a, kind) for a, b, kind in whole}
    assert {min(pair, (pair[1], pair[0], pair[2])) for pair in whole} <= {
        min(pair, (pair[1], pair[0], pair[2])) for pair in union
    }
    assert len(union - whole - turned) < 0.3 * len(union)


def test_nothing_new_leaves_the_report(tmp_path: Path) -> None:
    gallery = Gallery.create(str(tmp_path / "g"), DLIB)
    append(gallery, [some(np.random.default_rng(0), 0, 30, None)], "one")
    index(IndexConfig(), gallery.path)
    assert run(DedupConfig(), gallery.path).new == 30
    folder = Path(gallery.path, "reports", "dedup-new")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(Path(gallery.path, "index"))  # what is not needed is not asked for
    summary = run(DedupConfig(), gallery.path)
    assert (summary.new, summary.drop, summary.groups) == (0, 0, 0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert set(os.listdir(Path(gallery.path, "reports"))) <= {"dedup-new", ".lock", ".lock.guard"}


def test_an_index_that_lacks_the_new_faces_is_refused(tmp_path: Path) -> None:
    rng, gallery = np.random.default_rng(0), Gallery.create(str(tmp_path / "g"), DLIB)
    append(gallery, [some(rng, 0, 30, None)], "one")
    with pytest.raises(IndexingError, match="no index"):
        run(DedupConfig(), gallery.path)
    index(IndexConfig(), gallery.path)
    run(DedupConfig(), gallery.path)
    before = report(gallery.path, "dedup-new")
    append(gallery, [some(rng, 1000, 7, None)], "two")
    with pytest.raises(IndexingError, match=r"lacks 7 of 7 new faces: `facepipe index .*` adds them"):
        run(DedupConfig(), gallery.path)
    assert report(gallery.path, "dedup-new") == before
    index(IndexConfig(), gallery.path)
    assert run(DedupConfig(), gallery.path).new == 7


def test_a_crowd_of_copies_is_dropped_for_the_one_that_stays(tmp_path: Path) -> None:
    """A picture that is there more often than a face has neighbours: the larger new one stays for all of them, though
    none is tied to all others."""
    rng, gallery = np.random.default_rng(0), Gallery.create(str(tmp_path / "g"), DLIB)
    face = Faces().draw(np.array([7]), 0)

    def crowd(first: int, count: int, width: int) -> pa.Table:
        vectors = face + rng.normal(0, 0.002, (count, 128)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        sizes = np.full(count, width)
        return with_columns(
            rows(np.full(count, 7), vectors, first), image_hash=np.full(count, 11), width=sizes, height=sizes
        )

    append(gallery, [crowd(0, 400, 50), some(rng, 1000, 40, None)], "one")
    index(IndexConfig(), gallery.path)
    run(DedupConfig(), gallery.path)
    append(gallery, [crowd(2000, 3, 60)], "two")
    index(IndexConfig(), gallery.path)
    summary = run(DedupConfig(), gallery.path)
    assert (summary.new, summary.groups, summary.drop) == (3, 1, 402)
    (group,) = report(gallery.path, "dedup-new")["groups"]
    assert group["kept_uri"] == "/synthetic/000002/000002000.jpg"
    dedup(DedupConfig(), gallery.path)
    whole = {row["group"]: row for row in report(gallery.path, "dedup")["groups"] if row["images"] == 403}
    assert [row["kept_uri"] for row in whole.values()] == [group["kept_uri"]]


def test_real_photos_night_by_night(photos: Path, tmp_path: Path) -> None:
    """Copies, shrunk, compressed and mirrored ones of photos that came the night before."""
    folder, g = tmp_path / "in", str(tmp_path / "g")
    folder.mkdir()
    for name in NAMES:
        shutil.copyfile(photos / name, folder / name)
    embed(folder, g, runner="inline")
    first = {str(folder / name) for name in NAMES}
    summary, _ = night(g, first)
    assert (summary.drop, summary.compared) == (0, 0)
    shutil.copyfile(photos / NAMES[0], folder / "z-exact.jpg")
    images = [cv2.imread(str(photos / name)) for name in NAMES]
    small = cv2.resize(images[1], None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(folder / "z-small.jpg"), small, [cv2.IMWRITE_JPEG_QUALITY, 92])
    cv2.imwrite(str(folder / "z-q30.jpg"), images[2], [cv2.IMWRITE_JPEG_QUALITY, 30])
    cv2.imwrite(str(folder / "z-mirror.png"), images[3][:, ::-1, :])
    embed(folder, g, runner="inline")
    now = {str(path) for path in folder.iterdir()} - first
    summary, found = night(g, now)
    assert (summary.new, summary.groups, summary.drop) == (4, 4, 4)
    assert {Path(row["kept_uri"]).name for row in found["groups"]} >= set(NAMES[1:3])
    assert summary.compared == 4


def test_images_without_a_face_are_copies_by_their_bytes(fakes: dict[str, Any], tmp_path: Path) -> None:
    folder, g = tmp_path / "in", str(tmp_path / "g")
    folder.mkdir()
    for name, n in (("a.png", 0), ("c.png", 3), ("d.png", 1)):
        cv2.imwrite(str(folder / name), draw(n))
    embed(folder, g, fakes)
    index(IndexConfig(), g)
    run(DedupConfig(), g)
    cv2.imwrite(str(folder / "b.png"), draw(0))
    embed(folder, g, fakes)
    summary = run(DedupConfig(), g)
    assert (summary.new, summary.drop) == (1, 1)
    assert Path(g, "reports", "dedup-new", "drop.txt").read_text().splitlines() == [str(folder / "b.png")]


def test_images_without_a_face_are_copies_by_their_hashes(fakes: dict[str, Any], tmp_path: Path) -> None:
    """A landscape, the next night its turned copy, and a picture of nothing else."""
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(3).normal(size=(9, 11, 3)).astype(np.float32)
    scene = np.clip(128 + 50 * cv2.resize(noise, (160, 120), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "in" / "first.png"), scene)
    cv2.imwrite(str(tmp_path / "in" / "face.png"), draw(1))
    embed(tmp_path / "in", tmp_path / "g", fakes)
    gallery = str(tmp_path / "g")
    index(IndexConfig(), gallery)
    run(build(DedupConfig), gallery)
    cv2.imwrite(
        str(tmp_path / "in" / "turned.png"), np.rot90(cv2.resize(scene, (80, 60), interpolation=cv2.INTER_AREA))
    )
    cv2.imwrite(str(tmp_path / "in" / "other.png"), scene[::-1, :, ::-1] ^ 200)
    embed(tmp_path / "in", tmp_path / "g", fakes)
    index(IndexConfig(), gallery)
    summary = run(build(DedupConfig), gallery)
    (pair,) = report(gallery, "dedup-new")["pairs"]
    assert {Path(pair["uri_a"]).name, Path(pair["uri_b"]).name} == {"first.png", "turned.png"}
    assert (pair["kind"], pair["distance"]) == ("near", None)
    assert pair["turned"] in (90, 270)
    assert (summary.new, summary.drop) == (2, 1)


def test_pictures_in_the_page_come_from_few_files(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, g = tmp_path / "in", str(tmp_path / "g")
    folder.mkdir()
    shutil.copyfile(photos / NAMES[0], folder / NAMES[0])
    embed(folder, g, runner="inline")
    index(IndexConfig(), g)
    run(DedupConfig(), g)
    shutil.copyfile(photos / NAMES[0], folder / "z.jpg")
    embed(folder, g, runner="inline")
    index(IndexConfig(), g)
    page = Path(g, "reports", "dedup-new", "report.html")
    sizes = []
    for most in (0, 2 << 30):
        Path(page.parent, "mark.json").unlink()
        monkeypatch.setattr(pipeline, "_MAX_THUMB_BYTES", most)
        run(DedupConfig(), g)
        sizes.append(page.stat().st_size)
    assert sizes[1] > sizes[0] + 2000


def test_a_mark_of_a_whole_dedup_counts(tmp_path: Path) -> None:
    rng, gallery = np.random.default_rng(0), Gallery.create(str(tmp_path / "g"), DLIB)
    append(gallery, [some(rng, 0, 30, None)], "one")
    index(IndexConfig(), gallery.path)
    folder = Path(gallery.path, "reports", "dedup")
    folder.mkdir(parents=True)
    pipeline.ReadMark.from_gallery(Gallery(gallery.path)).save(str(folder / "mark.json"))
    assert run(DedupConfig(), gallery.path).new == 0
    append(gallery, [some(rng, 1000, 5, Gallery(gallery.path).to_arrow())], "two")
    index(IndexConfig(), gallery.path)
    assert run(DedupConfig(), gallery.path).new == 5


def test_no_vector_is_left_in_the_report(tmp_path: Path) -> None:
    gallery = Gallery.create(str(tmp_path / "g"), DLIB)
    append(gallery, [some(np.random.default_rng(0), 0, 30, None)], "one")
    index(IndexConfig(), gallery.path)
    run(DedupConfig(), gallery.path)
    vectors = [vector[:8].tobytes() for vector in Gallery(gallery.path).vectors()[1]]
    for path in Path(gallery.path, "reports", "dedup-new").iterdir():
        data = path.read_bytes()
        assert not any(vector in data for vector in vectors), path
        if path.suffix == ".parquet":
            assert not any(pa.types.is_list(kind) or pa.types.is_binary(kind) for kind in pq.read_schema(path).types)
    assert pc.count(pq.read_table(Path(gallery.path, "reports/dedup-new/decisions.parquet"))["uri"]).as_py() == 30
