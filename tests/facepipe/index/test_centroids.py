"""Centroids: none is the likeness of few faces, in the template and in any shard, before and after an erasure."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.galleries import CONTRACT, Faces, append, rows

from facepipe.config import build
from facepipe.erasure.limits import ErasureLimit
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.selection import Selection
from facepipe.gallery import Gallery
from facepipe.index import centroids, template
from facepipe.index import manifest as manifests
from facepipe.index.plan import make_plan
from facepipe.index.search import Index
from facepipe.index.shard import Shard, move_shard
from facepipe.index.template import open_template
from facepipe.index.verify import verify_index
from facepipe.nearest.faiss_engine import faiss
from facepipe.storage.lease import hold_lease
from pipelines import erase, index
from pipelines.index import IndexConfig

FACTORIES = ["IVF64,PQ64x4fs", "IVF64,Flat", "PCAR96,IVF64,PQ48x4fs", "IVF64_HNSW32,PQ64x4fs"]
# Two persons with a thousand photos each, one with a hundred, and sixty with one: the tail makes lists of one face.
PERSONS = np.concatenate([np.repeat(np.arange(2), 1000), np.repeat(2, 100), 100 + np.arange(60)])


def draw_faces() -> np.ndarray:
    return Faces().draw(PERSONS, 0)


def read_lists(trained: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return centroids that are in use, and all."""
    every = centroids.read_centroids(trained)
    return every[~centroids.find_given_up(every)], every


@pytest.mark.parametrize("factory", FACTORIES)
def test_each_centroid_is_a_mean_over_many(factory: str) -> None:
    vectors = draw_faces()
    trained = template.train_template(vectors, make_plan(len(vectors), 1 << 40, 0, factory))
    used, every = read_lists(trained)
    assert len(every) == 64
    assert 8 < len(used) <= 64
    lists, distances = centroids.assign_lists(trained, vectors)
    assert distances.max() < 2, "no face is in a list that was given up"
    assert not centroids.find_given_up(every)[lists].any()
    # Moving the centroids to their means moves a few faces to other lists.
    counts = np.bincount(lists, minlength=64)[~centroids.find_given_up(every)]
    assert counts.min() >= centroids.MIN_FACES / 2
    assert (counts < centroids.MIN_FACES).mean() < 0.2
    # No centroid is nearly one face.
    near = faiss.IndexFlatL2(every.shape[1])
    near.add(centroids.transform(trained, vectors))
    assert np.sqrt(near.search(used, 1)[0].min()) > 0.1


@pytest.mark.parametrize("count", [64, 65, 130, 700])
def test_few_faces_in_many_lists(count: int) -> None:
    """A factory that was asked for has more lists than the faces can fill."""
    vectors = Faces().draw(np.arange(count), 0)
    trained = template.train_template(vectors, make_plan(count, 1 << 40, 0, "IVF64,Flat"))
    used, _ = read_lists(trained)
    assert 1 <= len(used) <= count // centroids.MIN_FACES
    lists, _ = centroids.assign_lists(trained, vectors)
    assert len(np.unique(lists)) <= len(used)
    trained.add_with_ids(vectors, np.arange(count))
    trained.nprobe = 64
    assert np.array_equal(trained.search(vectors, 1)[1][:, 0], np.arange(count))


def test_without_a_tail_the_lists_stay() -> None:
    """The lists of an ordinary gallery do not get fewer by more than a few."""
    vectors = np.concatenate([faces for _, faces in Faces().blocks(8000)])
    trained = template.train_template(vectors, make_plan(len(vectors), 1 << 40, 0, "IVF64,Flat"))
    assert len(read_lists(trained)[0]) >= 60


@pytest.fixture(scope="module", params=FACTORIES[:1] + FACTORIES[2:])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery with an index of several shards."""
    path = tmp_path_factory.mktemp("centroids") / "g"
    gallery = Gallery.create(str(path), CONTRACT)
    vectors = draw_faces()
    order = np.random.default_rng(0).permutation(len(PERSONS))
    parts = np.array_split(order, 4)
    tables = [rows(PERSONS[part], vectors[part], 1000 * n) for n, part in enumerate(parts)]
    append(gallery, tables, "20261101T000000-000000")
    settings = {"index": {"factory": request.param, "shard_vectors": 700}}
    index.run(build(IndexConfig, settings), str(path))
    return path


def get_vectors(gallery: Path, label: str) -> np.ndarray:
    table = Gallery(str(gallery)).to_arrow(["identity", "embedding"])
    labels = np.array(table["identity"].to_pylist())
    return np.array(table["embedding"].to_pylist(), np.float32)[labels == label]


def read_everywhere(gallery: Path) -> list[np.ndarray]:
    """Centroids of the template and of every shard."""
    manifest = manifests.load(str(gallery))
    store = manifests.open_index_store(str(gallery))
    opened = [open_template(store, manifest.template)]
    opened += [Shard(store, entry).open_index() for entry in manifest.shards]
    return [read_lists(one)[1] for one in opened]


def plant(gallery: Path, vectors: np.ndarray, number: int = 0) -> None:
    """Make the nearest centroid of some vectors their mean, as an older facepipe did."""
    manifest = manifests.load(str(gallery))
    store = manifests.open_index_store(str(gallery))
    trained = open_template(store, manifest.template)
    every = read_lists(trained)[1]
    own = centroids.transform(trained, vectors)
    every[int(np.bincount(centroids.assign_lists(trained, vectors)[0]).argmax())] = own.mean(axis=0)
    centroids.replace_centroids(trained, every)
    new = template.replace_template(store, manifest.template, trained)
    moved = [move_shard(store, entry, open_template(store, new)) for entry in manifest.shards]
    tag = manifests.load_tagged(str(gallery))[1]
    with hold_lease(str(gallery / "index"), "index", lambda line: None) as lease:
        draft = replace(manifest, template=new, shards=tuple(filter(None, moved)))
        manifests.publish(str(gallery), draft, tag, lease)


def distance_to_centroids(gallery: Path, vector: np.ndarray) -> float:
    manifest = manifests.load(str(gallery))
    trained = open_template(manifests.open_index_store(str(gallery)), manifest.template)
    own = centroids.transform(trained, vector[None])
    return min(float(np.linalg.norm(every - own, axis=1).min()) for every in read_everywhere(gallery))


@pytest.mark.parametrize("planted", [False, True])
def test_an_erased_face_is_in_no_centroid(planted: bool, made: Path, tmp_path: Path) -> None:
    gallery = tmp_path / "g"
    shutil.copytree(made, gallery)
    vector = get_vectors(gallery, "person130")[0]
    if planted:
        plant(gallery, vector[None])
        assert distance_to_centroids(gallery, vector) < 0.01
    before = {shard.name for shard in manifests.load(str(gallery)).shards}
    summary = erase.run(Selection(identities=("person130",)), str(gallery))
    assert distance_to_centroids(gallery, vector) > 0.1
    assert check_erased(Gallery(str(gallery)), load_receipt(summary.receipts[0])) == []
    assert verify_index(Gallery(str(gallery))) == []
    every = read_everywhere(gallery)
    assert all(np.array_equal(one, every[0]) for one in every)
    after = {shard.name for shard in manifests.load(str(gallery)).shards}
    if planted:
        assert not before & after
    # Everybody else is found, and the index has nothing to do.
    assert find_oneself(gallery) > 0.97
    assert index.run(IndexConfig(), str(gallery)).action == "unchanged"


def find_oneself(gallery: Path) -> float:
    opened = Index(str(gallery))
    table = Gallery(str(gallery)).to_arrow(["face_id", "embedding"])
    vectors = np.array(table["embedding"].to_pylist(), np.float32)[::7]
    found = opened.search(vectors, 1)
    return float((found.ids[:, 0] == np.array(table["face_id"].to_pylist())[::7]).mean())


def test_a_person_with_lists_of_her_own_is_in_no_centroid(made: Path, tmp_path: Path) -> None:
    """The mean of a hundred of her photos is her likeness as well."""
    gallery = tmp_path / "g"
    shutil.copytree(made, gallery)
    vectors = get_vectors(gallery, "person2")
    plant(gallery, vectors)
    mean = vectors.mean(axis=0)
    assert distance_to_centroids(gallery, mean) < 0.01
    erase.run(Selection(identities=("person2",)), str(gallery))
    assert distance_to_centroids(gallery, mean) > 0.05
    assert find_oneself(gallery) > 0.97


def test_the_proof_says_which_centroids_rest_on_nobody(made: Path, tmp_path: Path) -> None:
    """Such as those that an older facepipe left, which did not look at them."""
    gallery = tmp_path / "g"
    shutil.copytree(made, gallery)
    vector = get_vectors(gallery, "person130")[0]
    summary = erase.run(Selection(identities=("person130",)), str(gallery))
    receipt = load_receipt(summary.receipts[0])
    plant(gallery, vector[None])
    assert "--retrain" in "\n".join(check_erased(Gallery(str(gallery)), receipt))
    index.run(build(IndexConfig, {"index": {"factory": "IVF64,Flat"}}), str(gallery), retrain=True)
    assert check_erased(Gallery(str(gallery)), receipt) == []


def test_when_hardly_anybody_stays(made: Path, tmp_path: Path) -> None:
    gallery = tmp_path / "g"
    shutil.copytree(made, gallery)
    names = tuple(f"person{n}" for n in set(PERSONS.tolist()) - {140, 141, 142})
    summary = erase.run(Selection(identities=names), str(gallery), limit=ErasureLimit(1.0))
    assert summary.faces == len(PERSONS) - 3
    assert verify_index(Gallery(str(gallery))) == []
    assert find_oneself(gallery) == 1.0
    erase.run(Selection(source=None, uri="*"), str(gallery), limit=ErasureLimit(1.0))
    assert manifests.load(str(gallery)).live == 0
