"""Readers of an index or a gallery that is replaced meanwhile: they end with what they opened, or are told to open it again."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.galleries import CONTRACT, append, rows
from helpers import run_facepipe

from facepipe.config import build
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.selection import Selection
from facepipe.errors import IndexDamagedError, IndexReplacedError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.compact import CompactConfig
from facepipe.index import manifest
from facepipe.index.search import Index
from facepipe.index.verify import verify_index
from facepipe.storage.lease import hold_lease
from pipelines import compact, erase
from pipelines.index import IndexConfig
from pipelines.index import run as run_index

COUNT = 60


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "g"
    vectors = np.random.default_rng(0).normal(size=(COUNT, 128)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = rows(np.repeat(np.arange(COUNT // 2), 2), vectors, 0)
    append(Gallery.create(str(path), CONTRACT), [table.slice(0, COUNT // 2), table.slice(COUNT // 2)], "base")
    make(path)
    return path


@pytest.fixture
def gallery(base: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(base, tmp_path / "g"))


def make(gallery: str | Path, keep_hours: float = 12.0, **options: Any) -> Any:
    settings = {"index": {"factory": "Flat", "shard_vectors": COUNT // 2, "keep_hours": keep_hours}}
    return run_index(build(IndexConfig, settings), str(gallery), **options)


def list_shards(gallery: str) -> set[str]:
    return {path.name for path in Path(gallery, "index").glob("shard-*")}


def get_person(gallery: str, row: int) -> tuple[str, int]:
    table = Gallery(gallery).to_arrow(["identity", "face_id"])
    return table["identity"][row].as_py(), table["face_id"][row].as_py()


def test_a_search_that_began_before_an_update_ends_with_its_index(gallery: str) -> None:
    ids, vectors = Gallery(gallery).vectors()
    opened = Index(gallery)
    before = list_shards(gallery)
    make(gallery, retrain=True)
    assert list_shards(gallery) > before
    assert opened.search(vectors, 1).ids[:, 0].tolist() == ids.tolist()
    assert len(opened.get_labels(ids)) == COUNT
    assert verify_index(Gallery(gallery)) == []
    assert make(gallery).action == "unchanged"
    assert list_shards(gallery) > before, "their time has not passed"
    # The time passes.
    current, tag = manifest.load_tagged(gallery)
    expired = tuple(replace(shard, until=1.0) for shard in current.replaced)
    with hold_lease(f"{gallery}/index", "index") as lease:
        manifest.publish(gallery, replace(current, replaced=expired), tag, lease, known=current)
    make(gallery)
    assert list_shards(gallery) == {shard.name for shard in current.shards}
    assert manifest.load(gallery).replaced == ()


def test_a_search_whose_files_are_gone_is_told_to_open_the_index_again(gallery: str) -> None:
    ids, _ = Gallery(gallery).vectors()
    opened = Index(gallery)
    make(gallery, keep_hours=0, retrain=True)
    with pytest.raises(IndexReplacedError, match="was replaced while it was read: open it again"):
        opened.get_labels(ids)
    assert len(Index(gallery).get_labels(ids)) == COUNT
    # A file that is missing although the index is the same one is damage.
    opened = Index(gallery)
    for path in Path(gallery, "index").glob("shard-*/labels.arrow"):
        path.unlink()
    with pytest.raises(IndexDamagedError, match="--repair"):
        opened.get_labels(ids)


def test_what_holds_erased_faces_is_not_kept(gallery: str) -> None:
    make(gallery, retrain=True)
    name, face = get_person(gallery, 0)
    opened = Index(gallery)
    summary = erase.run(Selection(identities=(name,)), gallery)
    (path,) = summary.receipts
    assert check_erased(Gallery(gallery), load_receipt(path)) == []
    kept = manifest.load(gallery).replaced
    assert len(kept) == 1, "one of the two former shards held nothing of the person"
    assert list_shards(gallery) == {shard.name for shard in manifest.load(gallery).shards} | {kept[0].entry.name}
    # An open index follows an erasure.
    ids, _ = Gallery(gallery).vectors()
    assert opened.get_labels(np.array([face]))["identity"].to_pylist() == [None]
    assert opened.get_labels(ids)["identity"].null_count == 0


@pytest.mark.parametrize("file", ["index.faiss", "ids.npy", "labels.arrow"])
def test_a_damaged_shard_stops_neither_erasures_nor_updates(file: str, gallery: str) -> None:
    name, _ = get_person(gallery, 0)
    for path in Path(gallery, "index").glob(f"shard-*/{file}"):
        os.truncate(path, 100)
        break
    code, _, err = run_facepipe("erase", gallery, "--identity", name)
    assert code == 0, err
    assert "damaged, and no longer part of the index: shard-" in err
    (path,) = Path(gallery, "erased").glob("*.json")
    assert check_erased(Gallery(gallery), load_receipt(str(path))) == []
    assert "adds their faces again" in verify_index(Gallery(gallery))[0]
    assert make(gallery).action == "updated"
    assert verify_index(Gallery(gallery)) == []
    assert manifest.load(gallery).live == COUNT - 2
    # An update that finds a damaged shard rebuilds it.
    for path in Path(gallery, "index").glob(f"shard-*/{file}"):
        os.truncate(path, 100)
    append(Gallery(gallery), [rows(np.array([99]), np.eye(1, 128, dtype=np.float32), 10**6)], "more")
    make(gallery)
    assert verify_index(Gallery(gallery)) == []
    assert manifest.load(gallery).live == COUNT - 1


@pytest.mark.parametrize("content", ["", "{", '{"format": 1, "shards": 5}'])
def test_a_damaged_manifest_stops_neither_erasures_nor_updates(content: str, gallery: str) -> None:
    Path(gallery, "index", "manifest.json").write_text(content)
    name, _ = get_person(gallery, 0)
    (path,) = erase.run(Selection(identities=(name,)), gallery).receipts
    assert check_erased(Gallery(gallery), load_receipt(path)) == []
    assert not manifest.exists(gallery)
    assert list_shards(gallery) == set()
    assert make(gallery).action == "built"
    assert verify_index(Gallery(gallery)) == []


def test_the_manifest_of_a_later_facepipe_is_not_withdrawn(gallery: str) -> None:
    path = Path(gallery, "index", "manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2, "shards": "as they will be"}))
    before = list_shards(gallery)
    code, _, err = run_facepipe("erase", gallery, "--identity", get_person(gallery, 0)[0])
    assert (code, "newer facepipe" in err) == (1, True)
    assert list_shards(gallery) == before


def test_a_reader_of_a_version_that_is_gone_is_told_to_open_the_gallery_again(gallery: str) -> None:
    read = Gallery(gallery)
    batches = read.batches(["uri"], rows=1)
    compact.run(CompactConfig(keep_hours=0), gallery, everything=True)
    with pytest.raises(StorageError, match="open the gallery again"):
        list(batches)
    assert Gallery(gallery).to_arrow(["uri"]).num_rows == COUNT
    # What is missing although the newest version needs it is damage.
    read = Gallery(gallery)
    os.unlink(Path(read.faces_folder, read.files()[0]["path"]))
    with pytest.raises(StorageError, match="names what is damaged"):
        list(read.batches(["uri"]))
