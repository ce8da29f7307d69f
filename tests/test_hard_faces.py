"""The generator of hard faces: its spread is LFW's, sizes and noise are what was asked, and the same seed draws the same."""

from pathlib import Path

import numpy as np
import pytest
from bench.galleries import STATS
from hard_faces import (
    EASY,
    ArcFaceLike,
    DlibLike,
    DrawnFaces,
    add_bystanders,
    add_copied_outsider,
    add_large_person,
    add_outsiders,
    draw_geometric,
    draw_zipf,
    join_two_persons,
    make_hard_gallery,
    swap_labels,
)

from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.linkage import merge_by_average_linkage
from facepipe.evaluation.clusters import score_clusters
from facepipe.nearest.join import find_candidate_pairs

# Half of LFW-dev's identities, with 1 to 14 images.
_SIZES = [1] * 625 + [2] * 194 + [3] * 80 + [4] * 45 + [5] * 30 + [8] * 30 + [12] * 10
# Quantiles of LFW-dev's distances, measured on 2026-11-30: shares of pairs, and distances.
_GENUINE = {0.10: 0.232, 0.50: 0.296, 0.90: 0.366, 0.99: 0.422}
_STRANGERS = {1e-4: 0.337, 1e-3: 0.377, 1e-2: 0.422, 0.1: 0.485, 0.5: 0.564}


def draw_like_lfw(seed: int) -> DrawnFaces:
    person = np.repeat(np.arange(len(_SIZES)), _SIZES)
    space = DlibLike(seed)
    return space.draw(space.draw_centres(len(_SIZES)), person)


def compute_distances(faces: DrawnFaces) -> tuple[np.ndarray, np.ndarray]:
    """Distances of pairs of one person, and of two."""
    u, v = np.triu_indices(len(faces), 1)
    distance = np.sqrt(np.maximum(0, 2 - 2 * (faces.vectors @ faces.vectors.T)[u, v]))
    is_same = faces.person[u] == faces.person[v]
    return distance[is_same], distance[~is_same]


def test_distances_spread_as_those_of_lfw() -> None:
    genuine, strangers = compute_distances(draw_like_lfw(5))
    for share, distance in _GENUINE.items():
        assert np.quantile(genuine, share) == pytest.approx(distance, abs=0.02)
    for share, distance in _STRANGERS.items():
        assert np.quantile(strangers, share) == pytest.approx(distance, abs=0.02)


def test_persons_are_as_hard_to_tell_apart_as_in_lfw() -> None:
    """LFW-dev gives a pairwise F of 0.90 with the best threshold, and the faces of one quality give 0.98."""
    scores = []
    for hardness in (None, EASY):
        person = np.repeat(np.arange(len(_SIZES)), _SIZES)
        space = DlibLike(5, hardness)
        vectors = space.draw(space.draw_centres(len(_SIZES)), person).vectors
        density = np.zeros(len(vectors), np.float32)
        f = []
        for distance in (0.32, 0.34, 0.36):
            similarity = 1 - distance**2 / 2
            u, v = find_candidate_pairs(vectors, density, similarity, 32)
            found, _ = merge_by_average_linkage(Clusters.from_faces(vectors, density), u, v, similarity)
            f.append(score_clusters(person, found).pairwise.f)
        scores.append(max(f))
    assert 0.84 < scores[0] < 0.94
    assert scores[1] > scores[0] + 0.04


def test_the_same_seed_draws_the_same_faces() -> None:
    one = draw_like_lfw(1)
    assert np.array_equal(one.vectors, draw_like_lfw(1).vectors)
    assert not np.array_equal(one.vectors, draw_like_lfw(2).vectors)
    assert np.allclose(np.linalg.norm(one.vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("dimension", [128, 512])
def test_strangers_are_nearly_orthogonal_in_the_space_of_a_margin(dimension: int) -> None:
    space = ArcFaceLike(1, dimension=dimension, hardness=EASY)
    faces = space.draw(space.draw_centres(300), np.arange(1200) // 4)
    assert faces.vectors.shape == (1200, dimension)
    genuine, strangers = compute_distances(faces)
    assert 1 - genuine.mean() ** 2 / 2 == pytest.approx(0.65, abs=0.06)
    assert abs(1 - (strangers**2).mean() / 2) < 0.02


def test_sizes_are_what_was_asked() -> None:
    assert np.bincount(draw_geometric(20_000, 10, 1)).mean() == pytest.approx(10, rel=0.1)
    zipf = np.sort(np.bincount(draw_zipf(20_000, 3000, 1)))[::-1]
    assert zipf[0] == pytest.approx(2 * zipf[1], rel=0.15)
    large = add_large_person(draw_geometric(100, 3, 1), 50)
    assert (large == 0).sum() == 50
    assert len(large) == 150


def test_noise_in_labels_is_what_was_asked() -> None:
    space = DlibLike(1)
    faces = space.draw(space.draw_centres(100), np.arange(1000) % 100)
    swapped = swap_labels(faces, 0.2, 1)
    assert swapped.is_wrong.mean() == pytest.approx(0.2, abs=0.04)
    only_some = swap_labels(faces, 0.5, 1, chosen=faces.person < 10)
    assert not only_some.is_wrong[faces.person >= 10].any()
    outsiders = space.draw(space.draw_centres(50), np.arange(50))
    open_set = add_outsiders(faces, outsiders, 1)
    assert (open_set.person == -1).sum() == 50
    assert open_set.is_wrong.sum() == 50
    copied = add_copied_outsider(faces, outsiders, [3, 4], copies=5)
    copies = copied.vectors[(copied.person == -1) & (copied.label == 3)]
    assert len(copies) == 5
    assert 0.05 < np.linalg.norm(copies[0] - copies[1]) < 0.13
    assert (join_two_persons(faces, 1, 2).label == 1).sum() == 20


def test_a_bystander_shares_the_photo_and_lies_beside(tmp_path: Path) -> None:
    space = DlibLike(1)
    faces = space.draw(space.draw_centres(20), np.arange(60) % 20)
    strangers = space.draw(space.draw_centres(10), np.arange(10))
    both = add_bystanders(faces, strangers, np.arange(10))
    table = make_hard_gallery(tmp_path / "G", both).to_arrow(columns=["uri", "face_px", "face_index", "identity"])
    assert table.num_rows == 70
    rows = table.to_pylist()
    of_first = sorted((row for row in rows if row["uri"].endswith("000000000.jpg")), key=lambda row: row["face_index"])
    assert [row["face_index"] for row in of_first] == [0, 1]
    assert of_first[1]["identity"] == of_first[0]["identity"]


def test_real_faces_spread_as_the_generator_says(shared: Path) -> None:
    """The statistics that faces are drawn from are those of the shared file."""
    ours = np.load(STATS)
    theirs = np.load(shared / "data" / "embedding-stats.npz")
    assert all(np.array_equal(ours[name], theirs[name]) for name in ("mean", "between", "within"))
