"""The graph of faces: its parts against brute force, whatever the order of the table, the blocks and the crowd."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from hard_faces import EASY, ArcFaceLike, DlibLike, add_large_person, draw_geometric
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.curation.graph import Graph, cells, edges, truth
from facepipe.curation.graph.calibration import CalibrationOptions, calibrate
from facepipe.curation.graph.cells import CellLayout, Cells
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.cohort import Cohort
from facepipe.curation.graph.dendrogram import find_gap
from facepipe.curation.graph.linkage import merge_by_average_linkage
from facepipe.curation.graph.nodes import Nodes, collect_nodes, find_representatives, open_nodes
from facepipe.curation.graph.threshold import (
    BIN_EDGES,
    ImpostorCurve,
    count_similarities,
    count_stranger_pairs,
    estimate_curve,
)
from facepipe.errors import StorageError, ThresholdError
from facepipe.evaluation.clusters import score_clusters
from facepipe.gallery import Gallery
from facepipe.nearest.join import find_candidate_pairs
from facepipe.nearest.similarity import Pairs, compute_similarity, refine_pairs

SEEDS = st.integers(0, 2**32 - 1)


def draw_faces(count: int, mean: float = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(identities (n,), faces (n, 128)) of a synthetic gallery of whole identities."""
    rng = np.random.default_rng([seed, 3])
    identities = rng.permutation(np.repeat(np.arange(count), rng.geometric(1 / mean, count))[:count])
    return identities, Faces(seed=seed).draw(identities, count)


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def sphere(count: int, seed: int, spread: float = 1.0) -> np.ndarray:
    """Random directions around one that is fixed; the smaller the spread, the nearer."""
    noise = np.random.default_rng(seed).standard_normal((count, 128))
    return unit(spread * noise + np.eye(128)[0] * 8)


def compare_all(vectors: np.ndarray, densities: np.ndarray) -> np.ndarray:
    """Similarities (n, n) in double precision; of a face with itself -inf."""
    wide, crowd = vectors.astype(np.float64), densities.astype(np.float64)
    found = wide @ wide.T - (crowd[:, None] + crowd) / 2
    np.fill_diagonal(found, -np.inf)
    return found


def pairs_of(u: np.ndarray, v: np.ndarray) -> set[tuple[int, int]]:
    found = list(zip(u.tolist(), v.tolist(), strict=True))
    assert len(set(found)) == len(found), "a pair was found twice"
    assert all(a < b for a, b in found)
    return set(found)


def fill(path: Path, tables: list[pa.Table]) -> Gallery:
    append(Gallery.create(str(path), CONTRACT), tables, "first")
    return Gallery(str(path))


def collected(galleries: list[Gallery], folder: Path) -> Nodes:
    folder.mkdir()
    return collect_nodes(galleries, str(folder))


# --- nodes ---------------------------------------------------------------------------------------------------------------


def test_nothing_depends_on_the_order_of_rows_and_files(tmp_path: Path) -> None:
    table = rows(*draw_faces(700), 0)
    shuffled = table.take(pa.array(np.random.default_rng(1).permutation(700)))
    one = fill(tmp_path / "a", [table.slice(at, 100) for at in range(0, 700, 100)])
    two = fill(tmp_path / "b", [shuffled.slice(0, 333), shuffled.slice(333, 1), shuffled.slice(334)])
    nodes = [collected([gallery], tmp_path / f"nodes{n}") for n, gallery in enumerate((one, two))]
    assert np.array_equal(nodes[0].ids, np.sort(table["face_id"].to_numpy()))
    order = np.argsort(table["face_id"].to_numpy())
    expected = np.array(table["embedding"].to_pylist(), np.float32)[order]
    densities = []
    for found in nodes:
        assert np.array_equal(found.ids, nodes[0].ids)
        assert np.array_equal(found.vectors, expected)
        densities.append(Cohort.draw(found.vectors, 0).compute_density(found.vectors))
    assert np.array_equal(densities[0], densities[1])
    joined = [find_candidate_pairs(found.vectors, densities[0], 0.03, 32) for found in nodes]
    assert len(joined[0][0]) > 300
    assert np.array_equal(joined[0], joined[1])


def test_two_galleries_in_one_graph(tmp_path: Path) -> None:
    table = rows(*draw_faces(300), 0)
    sides = [fill(tmp_path / "a", [table.slice(0, 200)]), fill(tmp_path / "b", [table.slice(100)])]
    nodes = collected(sides, tmp_path / "nodes")
    assert len(nodes) == 400
    assert (np.diff(nodes.ids) >= 0).all()
    for side, gallery in enumerate(sides):
        ids, vectors = gallery.vectors()
        at = nodes.find(ids, side)
        assert (nodes.sides[at] == side).all()
        assert np.array_equal(nodes.vectors[at], vectors)
    own = np.setdiff1d(sides[1].vectors()[0], sides[0].vectors()[0])
    assert (nodes.find(own, 0) == -1).all()
    copies = find_representatives(nodes.vectors)
    assert (copies != np.arange(400)).sum() == 100


@given(st.sets(st.tuples(st.integers(-5, 5), st.integers(0, 1)), max_size=22), st.lists(st.integers(-7, 7)))
@settings(deadline=None)
def test_faces_are_found_by_id_and_side(held: set[tuple[int, int]], asked: list[int]) -> None:
    known = {key: position for position, key in enumerate(sorted(held))}
    ids, sides = np.array(sorted(held), np.int64).reshape(-1, 2).T
    nodes = Nodes(ids, sides.astype(np.int8), np.zeros((len(ids), 128), np.float32))
    for side in (0, 1):
        found = nodes.find(np.array(asked, np.int64), side)
        assert found.tolist() == [known.get((face, side), -1) for face in asked]


def test_a_gallery_of_no_faces_has_no_nodes(tmp_path: Path) -> None:
    nodes = collected([Gallery.create(str(tmp_path / "g"), CONTRACT)], tmp_path / "nodes")
    assert len(nodes) == 0
    assert nodes.vectors.shape == (0, 128)
    assert nodes.find(np.array([1, 2])).tolist() == [-1, -1]


def test_lost_nodes_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "g", [rows(*draw_faces(20), 0)])
    collected([Gallery(str(tmp_path / "g"))], tmp_path / "nodes")
    (tmp_path / "nodes" / "vectors.npy").write_bytes(b"")
    with pytest.raises(StorageError, match="nodes"):
        open_nodes(str(tmp_path / "nodes"))


@given(SEEDS, st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_representatives_are_the_first_copies_and_nothing_else(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = sphere(count // 3 + 1, seed)[rng.integers(0, count // 3 + 1, count)]
    near = rng.random(count) < 0.3
    vectors[near, 127] = np.nextafter(vectors[near, 127], np.float32(2))  # another bit, another vector
    first: dict[bytes, int] = {}
    expected = [first.setdefault(row.tobytes(), n) for n, row in enumerate(vectors)]
    assert find_representatives(vectors).tolist() == expected


def test_equal_hashes_do_not_make_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """All hashes collide: only the bits decide."""

    class Zeros:
        def integers(self, *_: object, **__: object) -> np.ndarray:
            return np.full(128, 2**63, np.uint64)  # with the | 1 only the sum of the bits counts

    vectors = sphere(40, 1)
    turned = vectors[:, ::-1]  # the same numbers in another order: the same sum
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Zeros())
    found = find_representatives(np.concatenate([vectors, turned, vectors]))
    assert (found[:80] == np.arange(80)).all()
    assert np.array_equal(found[80:], np.arange(40))


# --- pairs ---------------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(0, 60), st.booleans(), st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_pairs_are_those_of_brute_force(seed: int, count: int, crowded: bool, share: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = sphere(count, seed)
    densities = rng.uniform(0, 0.5, count).astype(np.float32) if crowded else np.zeros(count, np.float32)
    wanted = compare_all(vectors, densities)
    off = wanted[np.triu_indices(count, 1)]
    threshold = float(np.quantile(off, share)) if off.size else 0.5
    u, v = find_candidate_pairs(vectors, densities, threshold, max(1, count))
    found = refine_pairs(vectors, densities, u, v, threshold)
    sure, possible = (np.argwhere(np.triu(wanted >= threshold + slack, 1)) for slack in (2e-6, -2e-6))
    assert pairs_of(*sure.T) <= pairs_of(found.u, found.v) <= pairs_of(*possible.T)
    exact = np.sqrt(((vectors[found.u].astype(np.float64) - vectors[found.v]) ** 2).sum(axis=1))
    assert np.allclose(found.distance, exact, atol=1e-5)
    assert found.distance.dtype == np.float32
    values = compute_similarity(found.distance, densities[found.u], densities[found.v])
    assert np.allclose(values, wanted[found.u, found.v], atol=1e-5)
    assert (values >= threshold - 1e-6).all()


def test_copies_lie_at_distance_zero() -> None:
    vectors = np.repeat(sphere(1, 0), 5, axis=0)
    found = refine_pairs(
        vectors, np.zeros(5, np.float32), *find_candidate_pairs(vectors, np.zeros(5, np.float32), 0.99, 32), 0.99
    )
    assert len(found) == 10
    assert (found.distance == 0).all()


def check_neighbours_of_all(vectors: np.ndarray, densities: np.ndarray, threshold: float, most: int) -> None:
    """Every face keeps its `most` nearest of those above the threshold, the nearest above all."""
    wanted = compare_all(vectors, densities)
    found = pairs_of(*find_candidate_pairs(vectors, densities, threshold, most))
    near = np.argsort(-wanted, axis=1)[:, :most]
    last = np.sort(wanted, axis=1)[:, -min(most, len(vectors))]
    for face in range(len(vectors)):
        for other in near[face][wanted[face, near[face]] >= threshold + 1e-5].tolist():
            if wanted[face, other] > last[face] + 1e-6 or other == near[face, 0]:
                assert (min(face, other), max(face, other)) in found, (face, other)
    assert all(wanted[u, v] >= threshold - 2e-5 for u, v in found)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [1, 5, 32])
def test_in_a_crowd_every_face_keeps_its_nearest(seed: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facepipe.nearest.join._ROWS", 64)
    rng = np.random.default_rng(seed)
    vectors, densities = sphere(300, seed, 0.3), rng.uniform(0, 0.05, 300).astype(np.float32)
    check_neighbours_of_all(vectors, densities, 0.1, most)
    u, _ = find_candidate_pairs(vectors, densities, 0.1, most)
    assert 300 / 2 <= len(u) <= 300 * most


@pytest.mark.parametrize("order", ["crowd last", "crowd first", "mixed"])
def test_a_face_at_the_edge_of_a_crowd_keeps_its_nearest(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not among the nearest of any face of the crowd, but they are its nearest."""
    monkeypatch.setattr("facepipe.nearest.join._ROWS", 64)
    alone, crowd = sphere(70, 1, 3.0), sphere(128, 2, 0.05)
    alone[3] = sphere(1, 3, 0.6)[0]
    vectors = np.concatenate([crowd, alone] if order == "crowd first" else [alone, crowd])
    if order == "mixed":
        vectors = vectors[np.random.default_rng(0).permutation(len(vectors))]
    check_neighbours_of_all(vectors, np.zeros(len(vectors), np.float32), 0.6, 8)


@pytest.mark.parametrize("rows_", [1, 7, 100, 384, 5000])
def test_pairs_do_not_depend_on_the_size_of_blocks(rows_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, vectors = draw_faces(800)
    density = Cohort.draw(vectors, 0).compute_density(vectors)
    whole = refine_pairs(vectors, density, *find_candidate_pairs(vectors, density, 0.02, 100), 0.02)
    monkeypatch.setattr("facepipe.nearest.join._ROWS", rows_)
    cut = refine_pairs(vectors, density, *find_candidate_pairs(vectors, density, 0.02, 100), 0.02)
    assert len(whole) > 1000
    order, again = (np.lexsort((found.v, found.u)) for found in (whole, cut))
    for name in ("u", "v", "distance"):
        assert np.array_equal(getattr(whole, name)[order], getattr(cut, name)[again])


def test_densities_do_not_depend_on_what_else_is_asked() -> None:
    _, vectors = draw_faces(1000)
    cohort = Cohort.draw(vectors, 0)
    whole = cohort.compute_density(vectors)
    parts = np.concatenate([cohort.compute_density(vectors[at : at + 77]) for at in range(0, 1000, 77)])
    assert np.abs(whole - parts).max() < 1e-6
    product = np.sort(vectors @ cohort.vectors.T, axis=1)[:, ::-1]
    assert np.allclose(whole, product[:, 20:100].mean(axis=1), atol=1e-5)
    assert (Cohort.create_empty(vectors.shape[1]).compute_density(vectors) == 0).all()
    for few in (1, 2, 30):
        small = Cohort.draw(vectors[:few], 0)
        assert np.isfinite(small.compute_density(vectors[:few])).all()


# --- cells ---------------------------------------------------------------------------------------------------------------


@given(
    seed=SEEDS,
    count=st.integers(0, 40),
    number=st.integers(1, 6),
    each=st.integers(1, 4),
    block=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_pair_that_shares_a_cell_is_met_once(
    seed: int, count: int, number: int, each: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = str(tmp_path_factory.mktemp("cells"))
    vectors = sphere(count, seed, 3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "_BLOCK_ROWS", block)
        layout = CellLayout.build(vectors, Cells(sphere(number, seed + 1, 3.0), each), folder)
    each = min(each, number)
    assert layout.assigned.shape == (count, each)
    for cell in range(number):
        assert layout.get_faces(cell).tolist() == np.flatnonzero((layout.assigned == cell).any(axis=1)).tolist()
    met: list[tuple[int, int]] = []
    for cell in range(number):
        inside = layout.get_faces(cell)
        u, v = np.triu_indices(len(inside), 1)
        new = layout.mask_first_shared(cell, inside, u, v)
        met += zip(inside[u[new]].tolist(), inside[v[new]].tolist(), strict=True)
    left, right = np.triu_indices(count, 1)
    meet = cells.mask_shared(layout.assigned[left], layout.assigned[right], each)
    sets = [set(row) for row in layout.assigned.tolist()]
    assert meet.tolist() == [bool(sets[a] & sets[b]) for a, b in zip(left, right, strict=True)]
    assert sorted(met) == sorted(zip(left[meet].tolist(), right[meet].tolist(), strict=True))
    again = CellLayout.open(folder)
    assert all(np.array_equal(getattr(again, name), getattr(layout, name)) for name in ("assigned", "faces", "begins"))


def test_faces_lie_in_their_nearest_cells() -> None:
    vectors, centres = sphere(500, 1, 3.0), sphere(20, 2, 3.0)
    found = Cells(centres, 3).assign(vectors)
    distances = ((vectors[:, None] - centres) ** 2).sum(axis=2)
    assert (found == np.argsort(distances, axis=1)[:, :3]).mean() > 0.99  # assigned on a grid: near ties may turn
    assert np.array_equal(found[100:200], Cells(centres, 3).assign(vectors[100:200]))
    assert np.array_equal(found, Cells(centres, 3).assign(vectors, 7)[:, :3])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.floats(0.1, 2000))
@settings(deadline=None)
def test_work_covers_all_cells_once(sizes: list[int], tasks_of: float) -> None:
    begins = np.concatenate([[0], np.cumsum(sizes)])
    layout = CellLayout(np.empty((0, 1), np.int32), np.empty(0, np.int64), begins)
    ranges = list(layout.split_work(tasks_of))
    assert [cell for first, last in ranges for cell in range(first, last)] == list(range(len(sizes)))
    cost = [sum(size**2 / 2 for size in sizes[first:last]) for first, last in ranges]
    assert all(
        last - first == 1 or spent <= tasks_of * 1.001 for (first, last), spent in zip(ranges, cost, strict=True)
    )


@pytest.mark.parametrize("min_two_level", [4, 1 << 30])
def test_cells_follow_the_data_and_the_seed(min_two_level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, vectors = draw_faces(3000)
    assert len(cells.train_cells(vectors, 0).centres) == 1
    monkeypatch.setattr(cells, "MAX_EXACT_FACES", 500)
    monkeypatch.setattr(cells, "_MIN_TWO_LEVEL", min_two_level)
    made = cells.train_cells(vectors, 0)
    assert len(made.centres) == 8
    assert np.array_equal(made.centres, cells.train_cells(vectors, 0).centres)
    sizes = np.bincount(made.assign(vectors, 1).ravel(), minlength=8)
    assert sizes.min() > 30


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 700), st.randoms(use_true_random=False))
def test_blocks_of_an_assignment_may_come_in_any_order(rows: int, random: Any) -> None:
    """As from tasks on several machines."""
    vectors = draw_faces(600)[1]
    made = Cells(np.ascontiguousarray(vectors[::60]), 3)

    def assign_blocks(cells_: Cells, all_vectors: np.ndarray) -> list[tuple[int, np.ndarray]]:
        begins = list(range(0, len(all_vectors), rows))
        random.shuffle(begins)
        return [(begin, cells.assign_block(all_vectors[begin : begin + rows], cells_)) for begin in begins]

    with tempfile.TemporaryDirectory() as folder:
        made.assign_to_file(vectors, f"{folder}/a.npy", assign_blocks)
        made.assign_to_file(vectors, f"{folder}/b.npy")
        assert np.array_equal(np.load(f"{folder}/a.npy"), made.assign(vectors))
        assert np.array_equal(np.load(f"{folder}/b.npy"), made.assign(vectors))


# --- threshold -----------------------------------------------------------------------------------------------------------


def estimate(identities: np.ndarray, vectors: np.ndarray, impostors: float) -> tuple[np.ndarray, ImpostorCurve | None]:
    """Densities and curve against strangers of a cohort in which every person counts five times at most."""
    rank = np.zeros(len(identities), np.int64)
    order = np.argsort(identities, kind="stable")
    rank[order] = np.arange(len(order)) - np.searchsorted(identities[order], identities[order])
    kept = np.flatnonzero(rank < 5)
    cohort = Cohort(np.ascontiguousarray(vectors[kept]))
    density = cohort.compute_density(vectors)
    pairs = count_stranger_pairs(cohort.vectors, density[kept], identities[kept])
    neighbours = count_similarities(vectors, density, truth.draw_sample(len(vectors), 0))
    return density, estimate_curve(neighbours, pairs, len(vectors))


@pytest.mark.parametrize(
    ("count", "mean", "impostors"), [(1000, 2, 0.2), (1500, 1.3, 0.2), (3000, 5, 0.2), (3000, 2, 0.05)]
)
@pytest.mark.parametrize("seed", [3, 4])
def test_the_curve_says_how_many_neighbours_are_strangers(count: int, mean: float, impostors: float, seed: int) -> None:
    identities, vectors = draw_faces(count, mean, seed)
    density, curve = estimate(identities, vectors, impostors)
    assert curve is not None
    at = int(np.flatnonzero(curve.share > impostors)[-1]) + 1
    above = compare_all(vectors, density) >= BIN_EDGES[at]
    same = identities[:, None] == identities
    neighbours = above.sum(axis=1)
    has_any = neighbours > 0
    real = ((above & ~same).sum(axis=1)[has_any] / neighbours[has_any]).mean()
    assert impostors / 2.5 <= real <= impostors * 2.5
    np.fill_diagonal(same, False)
    assert (above & same).sum() / same.sum() > 0.85
    assert same.sum() / count**2 * 0.6 < curve.genuine[at] < same.sum() / count**2 * 1.6


def test_fewer_impostors_mean_a_higher_threshold() -> None:
    _, curve = estimate(*draw_faces(2000, mean=2), impostors=0.2)
    assert curve is not None
    found = [curve.find_threshold(share) for share in (0.5, 0.2, 0.05, 0.01)]
    values = [one.similarity for one in found if one is not None]
    assert len(values) == 4
    assert values == sorted(values)
    assert values[0] < values[-1]


def test_the_histogram_counts_every_pair_of_two_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    _, vectors = draw_faces(700)
    density = Cohort.draw(vectors, 0).compute_density(vectors)
    sample = np.arange(0, 700, 2)
    counts = count_similarities(vectors, density, sample)
    assert counts.shape == (350, 3000)
    assert (counts.sum(axis=1) == 699).all()
    monkeypatch.setattr("facepipe.curation.graph.threshold._BLOCK_COLUMNS", 99)
    cut = count_similarities(vectors, density, sample)
    assert np.abs(counts - cut).sum() <= 0.001 * counts.sum()  # products round differently at the bins' edges
    values = compare_all(vectors, density)[sample]
    above = (values >= 0.1).sum(axis=1)  # bins of 0.0005 from -0.5
    assert np.abs(counts[:, 1200:].sum(axis=1) - above).sum() <= 2


def test_pairs_of_strangers_are_those_of_two_persons(monkeypatch: pytest.MonkeyPatch) -> None:
    identities, vectors = draw_faces(500)
    density = np.zeros(500, np.float32)
    monkeypatch.setattr("facepipe.curation.graph.threshold._BLOCK_ROWS", 77)
    counts = count_stranger_pairs(vectors, density, identities)
    assert counts.sum() == (identities[:, None] != identities).sum()
    everyone = count_stranger_pairs(vectors, density, np.arange(500))
    assert (everyone >= counts).all()
    assert count_stranger_pairs(vectors, density, np.zeros(500, np.int64)).sum() == 0


@pytest.mark.parametrize("large", [0, 1500])
def test_a_large_person_does_not_move_the_threshold_of_the_others(large: int) -> None:
    """One person of up to half of the faces, of a model that states no threshold."""
    others = draw_geometric(1500, 4, 1)
    space = DlibLike(1, EASY)
    faces = space.draw(space.draw_centres(int(others.max()) + 2), add_large_person(others, large))
    found = calibrate(faces.vectors, CalibrationOptions(None, 0.25, None, "unknown", 0))
    assert found.threshold.estimated
    distance = np.sqrt(2 - 2 * (found.threshold.similarity + found.density.mean()))
    assert 0.38 < distance < 0.48
    is_other = faces.person > 0
    similarity = compare_all(faces.vectors[is_other], found.density[is_other])
    same = faces.person[is_other][:, None] == faces.person[is_other]
    np.fill_diagonal(same, False)
    above = similarity >= found.threshold.similarity
    assert (above & same).sum() / same.sum() > 0.9
    assert (above & ~same).sum() / above.sum() < 0.3


@pytest.mark.parametrize("distance", [0.25, 0.36, 0.5])
def test_a_threshold_that_is_set_does_not_move_the_densities(distance: float) -> None:
    """They are those of the persons that the data show: the distance says only from where faces count as one person."""
    space = DlibLike(5)
    person = draw_geometric(1500, 2, 5)
    vectors = space.draw(space.draw_centres(int(person.max()) + 1), person).vectors
    found = calibrate(vectors, CalibrationOptions(None, 0.25, 0.416, "dlib-resnet", 0))
    assert found.threshold.estimated
    given_ = calibrate(vectors, CalibrationOptions(distance, 0.25, 0.416, "dlib-resnet", 0))
    assert np.array_equal(given_.density, found.density)
    assert not given_.threshold.estimated
    assert np.sqrt(2 - 2 * (given_.threshold.similarity + given_.density.mean())) == pytest.approx(distance, abs=1e-5)


def test_a_crowd_of_poor_faces_anchors_no_threshold() -> None:
    """The cohort and the threshold are those of the fit faces, whatever the others are."""
    person = draw_geometric(1500, 4, 6)
    space = ArcFaceLike(6)
    faces = space.draw(space.draw_centres(int(person.max()) + 1), person)
    is_poor = np.random.default_rng(6).random(1500) < 0.2
    crowd = space.blur(faces, is_poor).vectors
    options = CalibrationOptions(None, 0.25, None, "unknown", 0)
    told = calibrate(crowd, options, is_poor)
    alone = calibrate(faces.vectors[~is_poor], options)
    assert not set(map(bytes, told.cohort.vectors)) & set(map(bytes, crowd[is_poor]))
    assert told.threshold.similarity == pytest.approx(alone.threshold.similarity, abs=0.02)


@pytest.mark.parametrize(("persons", "count"), [(1, 1000), (2, 1000), (30, 1000), (100, 1000), (1000, 1000)])
def test_few_or_unrepeated_persons_show_no_threshold(persons: int, count: int) -> None:
    """Of a model that states none: better an error than a wrong threshold."""
    space = DlibLike(2)
    vectors = space.draw(space.draw_centres(persons), np.arange(count) % persons).vectors
    options = CalibrationOptions(None, 0.25, None, "unknown", 0)
    try:
        found = calibrate(vectors, options)
    except ThresholdError:
        return
    # What is found all the same has to be right.
    u, v = find_candidate_pairs(vectors, found.density, found.threshold.similarity, 32)
    single = Clusters.from_faces(vectors, found.density)
    labels, _ = merge_by_average_linkage(single, u, v, found.threshold.similarity)
    assert score_clusters(np.arange(count) % persons, labels).bcubed.f > 0.9


@pytest.mark.parametrize("persons", [2, 30, 100])
def test_a_wide_gap_between_few_persons_is_found(persons: int) -> None:
    """Directions of an angular margin: no model states a threshold, and none is needed."""
    space = ArcFaceLike(3, hardness=EASY)
    person = np.arange(1500) % persons
    vectors = space.draw(space.draw_centres(persons), person).vectors
    found = calibrate(vectors, CalibrationOptions(None, 0.25, None, "unknown", 0))
    assert (len(found.cohort.vectors) == 0) == (persons < 60)
    u, v = find_candidate_pairs(vectors, found.density, found.threshold.similarity, 32)
    single = Clusters.from_faces(vectors, found.density)
    labels, _ = merge_by_average_linkage(single, u, v, found.threshold.similarity)
    assert score_clusters(person, labels).bcubed.f > 0.99


def test_what_shows_no_curve_gives_none() -> None:
    nothing = np.zeros(3000, np.int64)
    assert estimate_curve(np.zeros((5, 3000), np.int32), nothing, 10) is None
    for vectors in (sphere(2, 1), np.repeat(sphere(1, 1), 400, axis=0), sphere(20, 1)):
        density = np.zeros(len(vectors), np.float32)
        neighbours = count_similarities(vectors, density, np.arange(len(vectors)))
        assert neighbours.sum() == len(vectors) * (len(vectors) - 1)
        pairs = count_stranger_pairs(vectors, density, np.arange(len(vectors)))
        assert estimate_curve(neighbours, pairs, len(vectors)) is None
        assert find_gap(vectors) is None


@given(SEEDS, st.integers(1, 400), st.floats(0.001, 3), st.floats(0.001, 1))
@settings(max_examples=20, deadline=None)
def test_a_threshold_can_be_asked_of_any_faces(seed: int, count: int, spread: float, impostors: float) -> None:
    """One person, copies, no person twice: no crash, and what is found is a number."""
    vectors = sphere(count, seed, spread)
    vectors[: count // 3] = vectors[0]
    for model_threshold in (None, 0.4):
        try:
            found = calibrate(vectors, CalibrationOptions(None, impostors, model_threshold, "unknown", 0)).threshold
        except ThresholdError:
            assert model_threshold is None
            continue
        assert -0.5 <= found.similarity <= 1
        if found.estimated:
            assert 0 <= found.impostors <= 1


# --- truth and edges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.02, 0.3, 2.0])
def test_brute_force_has_all_true_edges(threshold: float) -> None:
    _, vectors = draw_faces(900)
    density = Cohort.draw(vectors, 0).compute_density(vectors)
    wanted = compare_all(vectors, density)
    u, v = np.nonzero(np.triu(wanted >= threshold - 1e-6))
    edges_ = Pairs(u, v, np.zeros(len(u), np.float32))
    sample = truth.draw_sample(900, 1, budget=900 * 300)
    assert len(sample) == 300
    true = truth.find_true_edges(vectors, density, sample, threshold, 900)
    assert len(true[0]) == pytest.approx((wanted[sample] >= threshold).sum(), abs=3)
    assert truth.measure_recall(sample, *true, [edges_], 900) == 1
    cut = np.array_split(np.random.default_rng(0).permutation(len(u)), 3)
    assert truth.measure_recall(sample, *true, [edges_.take(part) for part in cut], 900) == 1
    if len(true[0]):
        assert truth.measure_recall(sample, *true, [], 900) == 0
        keys = [np.minimum(a, b) * 900 + np.maximum(a, b) for a, b in (true, (edges_.u, edges_.v))]
        half = edges_.take(cut[0])
        expected = np.isin(keys[0], half.u * 900 + half.v).mean()
        assert truth.measure_recall(sample, *true, [half], 900) == pytest.approx(expected)


def test_true_edges_are_the_nearest_of_a_face(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facepipe.curation.graph.truth._BLOCK_COLUMNS", 64)
    vectors = sphere(300, 1)
    wanted = compare_all(vectors, np.zeros(300, np.float32))
    u, v = truth.find_true_edges(vectors, np.zeros(300, np.float32), np.arange(0, 300, 3), 0.0, 4)
    for face in range(0, 300, 3):
        assert set(v[u == face].tolist()) == set(np.argsort(-wanted[face])[:4].tolist())


@given(seed=SEEDS, sizes=st.lists(st.integers(0, 30), max_size=5))
@settings(max_examples=25, deadline=None)
def test_edges_come_back_as_they_were_written(
    seed: int, sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, rng = str(tmp_path_factory.mktemp("edges")), np.random.default_rng(seed)
    parts = []
    for n, size in enumerate(sizes):
        u = rng.integers(0, 2**32 - 1, size)
        parts.append(Pairs(u, u + 1, rng.uniform(0, 2, size).astype(np.float32)))
        edges.write_part(parts[-1], edges.get_part_path(folder, n))
    Path(edges.get_part_path(folder, 7) + ".abcd").touch()  # of a run that was killed
    held, whole = edges.Edges(folder), Pairs.concatenate(parts)
    assert len(held) == sum(sizes)
    assert len(held.list_paths()) == len(sizes)
    for found in (Pairs.concatenate(list(held)), held.read_within(2.0)):
        for name in ("u", "v", "distance"):
            assert np.array_equal(getattr(found, name), getattr(whole, name))
            assert getattr(found, name).dtype == getattr(whole, name).dtype
    assert np.array_equal(held.read_within(0.7).u, whole.u[whole.distance <= 0.7])


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no graph in"):
        Graph(str(tmp_path))
    with pytest.raises(StorageError, match="cannot write"):
        edges.write_part(Pairs(*np.zeros((2, 1), np.int64), np.zeros(1, np.float32)), str(tmp_path / "no" / "x"))
    Path(edges.get_part_path(str(tmp_path), 3)).write_bytes(b"PAR1 and nothing")
    with pytest.raises(StorageError, match="edges-000003"):
        edges.Edges(str(tmp_path)).read_within(1.0)
    assert os.listdir(tmp_path) == ["edges-000003.parquet"]
