"""Searches as they are asked for: recall for a k and a radius, what is measured of it, and indexes that were not measured."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from hard_faces import DlibLike, add_large_person, draw_geometric, make_hard_gallery
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.config import build
from facepipe.evaluation.index import measure_asked
from facepipe.gallery import Gallery
from facepipe.index import manifest as manifests
from facepipe.index.exact import scan_within
from facepipe.index.manifest import (
    FileDigest,
    Manifest,
    RecallPoint,
    TargetCurve,
    TargetPoint,
    Template,
)
from facepipe.index.samples import compute_radius_recall, compute_recall, draw_faces, draw_radius_sample, draw_sample
from facepipe.index.search import Index, SearchSetting
from pipelines.index import IndexConfig
from pipelines.index import run as build_index

COUNT = 6000
LARGE = 900
KS = (1, 10, 100, 1000)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Six thousand faces, of which a person has a seventh."""
    space = DlibLike(4)
    person = add_large_person(draw_geometric(COUNT - LARGE, 5, 4), LARGE)
    faces = space.draw(space.draw_centres(int(person.max()) + 1), person)
    found = make_hard_gallery(tmp_path_factory.mktemp("targets") / "g", faces)
    build_index(build(IndexConfig, {"index": {"factory": "IVF128,PQ64x4fs", "shard_vectors": 3500}}), found.path)
    return found


@pytest.fixture(scope="module")
def index(gallery: Gallery) -> Index:
    return Index(gallery.path)


def make_manifest(*targets: TargetCurve, lists: int = 64) -> Manifest:
    template = Template("template", FileDigest(0, ""), "IVF64,PQ64x4fs", lists, 0, 0, 1.0, 0)
    curve = (RecallPoint(4, 100, 0.96, 0.9), RecallPoint(8, 100, 0.98, 0.96), RecallPoint(16, 100, 0.99, 0.98))
    return Manifest(0, {}, template, (), 0.97, 16, 100, curve, targets=targets)


# --- what a search states ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", KS)
def test_a_search_for_k_reaches_what_it_states(index: Index, k: int) -> None:
    stated = index.get_recall(k=k)
    assert stated is not None
    assert stated >= 0.97
    sample = draw_sample(index, 7, 300, k)
    hits = index.search(sample.queries, k + 1, index.choose_setting(k=k)).exclude_own(sample.own, k)
    shares = compute_recall(hits.ids, sample.truth)
    # The stated recall is a lower bound, from another sample.
    assert shares.mean() + 2 * shares.std() / len(shares) ** 0.5 > stated - 0.005


@pytest.mark.parametrize("radius", [0.15, 0.25, 0.32, 0.36, 0.4, 0.43])
def test_a_search_by_radius_reaches_what_it_states(index: Index, radius: float) -> None:
    sample = draw_radius_sample(index, draw_faces(index, 7, 200), radius, 7)
    shares = compute_radius_recall(index, sample, radius, index.choose_setting(radius=radius))
    stated = index.get_recall(radius=radius)
    assert stated is None or stated >= 0.985
    assert shares.mean() + 2 * shares.std() / len(shares) ** 0.5 > (stated or 0.97) - 0.005


def test_more_is_looked_at_for_more_neighbours_and_larger_radii(index: Index) -> None:
    lists = [index.choose_setting(k=k).nprobe for k in KS]
    assert lists[0] <= lists[1] < lists[2] <= lists[3]
    by_radius = [index.choose_setting(radius=radius).nprobe for radius in (0.2, 0.35, 0.43)]
    assert by_radius == sorted(by_radius)
    assert index.choose_setting(k=5000).nprobe == index.choose_setting(radius=1.9).nprobe == index.lists


def test_a_person_with_many_faces_is_found(index: Index, gallery: Gallery) -> None:
    """Nearly all faces within a radius of somebody whose faces are a seventh of all."""
    table = gallery.to_arrow(["face_id", "identity"])
    large = table.filter(pc.field("identity") == "person0")["face_id"].to_numpy()[:40]
    queries = index.get_vectors(large)
    for radius in (0.25, 0.35, 0.42):
        truth = scan_within(index, queries, radius)
        found = index.search_within(queries, radius)
        shares = [np.isin(ids, near).mean() for (ids, _), (near, _) in zip(truth, found, strict=True)]
        assert np.mean(shares) > 0.97


def test_measured_recalls_are_what_evaluate_says(index: Index) -> None:
    asked = measure_asked(index, 3, ks=[1, 100], radii=[0.3, 0.4])
    assert [(one.k, one.radius) for one in asked] == [(1, None), (100, None), (None, 0.3), (None, 0.4)]
    for one in asked:
        assert one.recall is not None
        assert one.stated is not None
        assert one.recall + 2 * one.standard_error > one.stated - 0.005
        assert one.qps > 0


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0.2, 0.4, 0.7])
def test_a_scan_by_radius_finds_all_and_nothing_else(index: Index, gallery: Gallery, radius: float) -> None:
    ids, vectors = gallery.vectors()
    queries = index.get_vectors(ids[::400])
    distances = np.linalg.norm(queries[:, None].astype(np.float64) - vectors, axis=2)
    answers = scan_within(index, queries, radius)
    for row, (near, found) in enumerate(answers):
        is_near = np.abs(distances[row] - radius) > 1e-6
        assert set(near) & set(ids[is_near]) == set(ids[is_near & (distances[row] < radius)])
        assert (np.diff(found) >= 0).all()
    few = scan_within(index, queries, radius, max_faces=3)
    assert [one[0].tolist() for one in few] == [one[0][:3].tolist() for one in answers]


def test_ranks_of_lists_say_what_is_visited(index: Index, gallery: Gallery) -> None:
    """With every candidate compared, a face is found if its list is among those visited."""
    ids = gallery.vectors()[0]
    queries = index.get_vectors(ids[::300])
    for nprobe in (1, 7, 40):
        hits = index.search_within(queries, 1.9, COUNT, SearchSetting(nprobe, COUNT + 1))
        ranks = index.rank_lists(queries, np.tile(ids, (len(queries), 1)))
        for rank, (found, _) in zip(ranks, hits, strict=True):
            # Two lists at one distance may be visited in either order.
            assert len(np.setxor1d(ids[rank < nprobe], found)) <= 0.01 * COUNT


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_the_next_larger_target_counts() -> None:
    hundred = TargetCurve(100, None, (TargetPoint(10, 200, 0.95), TargetPoint(20, 200, 0.98)))
    near = TargetCurve(None, 0.3, (TargetPoint(6, 100, 0.97), TargetPoint(9, 100, 0.992), TargetPoint(64, 400, 0.997)))
    # More than 0.989 is not reached, and nearly as much by a part of the lists.
    lossy = TargetCurve(None, 0.35, (TargetPoint(10, 100, 0.985), TargetPoint(64, 400, 0.989)))
    far = TargetCurve(None, 0.4, (TargetPoint(12, 100, 0.98),))
    manifest = make_manifest(hundred, far, lossy, near)
    assert manifest.choose_target(k=50).recall == 0.98
    assert manifest.choose_target(k=50, recall=0.9).nprobe == 10
    assert manifest.choose_target(k=101).nprobe == 64
    assert manifest.choose_target(k=101).recall is None
    # Within a radius nearly all are meant, if nothing else is requested.
    assert manifest.choose_target(radius=0.25).nprobe == 9
    assert manifest.choose_target(radius=0.25, recall=0.9).nprobe == 6
    assert manifest.choose_target(radius=0.36) == manifest.choose_target(radius=0.4)
    assert manifest.choose_target(radius=0.31).nprobe == 10
    assert manifest.choose_target(radius=0.31, recall=0.99).nprobe == 64
    assert manifest.choose_target(radius=0.5).nprobe == 64
    # The nearest face alone takes fewer lists than ten.
    assert manifest.choose_target(k=1).nprobe == 8
    assert manifest.choose_target(k=2).nprobe == 16


@given(st.integers(1, 10**6), st.floats(0.01, 2), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_an_index_of_an_older_version_visits_more_for_more(k: int, radius: float, recall: float) -> None:
    manifest = make_manifest()
    chosen = manifest.choose_target(k=k, recall=recall)
    assert 1 <= chosen.nprobe <= 64
    assert chosen.nprobe >= manifest.choose_target(k=max(1, k // 2), recall=recall).nprobe
    assert (chosen.recall is None) == (k > 10)
    assert manifest.choose_target(radius=radius).recall is None
    assert make_manifest(lists=0).choose_target(k=k, radius=radius).recall == 1.0


def test_an_index_of_an_older_version_is_searched_and_measured_later(gallery: Gallery, tmp_path: Path) -> None:
    shutil.copytree(gallery.path, tmp_path / "g")
    path = manifests.get_path(str(tmp_path / "g"))
    values = json.loads(Path(path).read_text())
    assert values.pop("targets")
    Path(path).write_text(json.dumps(values))
    old = Index(str(tmp_path / "g"))
    ids = gallery.vectors()[0][:10]
    queries = old.get_vectors(ids)
    assert old.search(queries, 100).ids.shape == (10, 100)
    assert all(len(near) for near, _ in old.search_within(queries, 0.4))
    assert old.get_recall(k=100) is None
    config = build(IndexConfig, {"index": {"factory": "IVF128,PQ64x4fs"}})
    assert build_index(config, old.gallery).action == "unchanged"
    new = Index(old.gallery)
    assert new.get_recall(k=100) is not None
    # The second time there is nothing to do.
    assert build_index(config, old.gallery).action == "unchanged"
    assert manifests.load(old.gallery).created == new.manifest.created


def test_older_versions_read_the_new_manifest(gallery: Gallery) -> None:
    """They know no targets. Everything else is as it was."""
    values = json.loads(Path(manifests.get_path(gallery.path)).read_text())
    manifest = manifests.load(gallery.path)
    assert values["format"] == 1
    assert replace(manifest, targets=()).choose_setting() == manifest.choose_setting()
