"""Nearest faces and joins on a device: what comparing all pairs finds, to the bit, whatever the format and the cut.

On tensors of the CPU in half precision, which is what would run on a GPU; `pytest -m gpu` runs it there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.galleries import CONTRACT, Faces, append, rows
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines.graph
from facepipe.curation.graph import cells
from facepipe.errors import ConfigError
from facepipe.gallery import Gallery
from facepipe.index import cost, template
from facepipe.index.plan import make_plan
from facepipe.models.runtime.device import count_gpus
from facepipe.nearest import faiss_engine as engine
from facepipe.nearest import join as pairs
from facepipe.nearest import top_k
from facepipe.nearest.distances import Hits, VectorBlock, compute_pair_distances
from facepipe.nearest.faiss_engine import faiss
from facepipe.nearest.half_precision import (
    Tile,
    append_ones,
    append_term,
    compute_max_error,
    relax_limit,
    round_to_half,
)
from facepipe.nearest.join import find_candidate_pairs
from facepipe.nearest.join_gpu import JoinRule, find_pairs_on_device
from facepipe.nearest.knn_gpu import Tiling, find_neighbours
from facepipe.nearest.similarity import refine_pairs
from facepipe.nearest.top_k import insert_hits
from facepipe.nearest.upload import upload_blocks
from pipelines.graph import GraphConfig, GraphRunConfig, open_graph
from pipelines.runtime.plan import Resources
from pipelines.runtime.runners import ray

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not count_gpus(), reason="no CUDA device")])
KINDS = [torch.float32, torch.float16, torch.bfloat16]
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = ["random", "clustered", "copies", "constant", "not quite unit"]


def normalise(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def draw_vectors(count: int, shape: str, seed: int) -> np.ndarray:
    """Draw vectors (n, 128) as a gallery may hold them."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, 128))
    if shape == "clustered":  # persons in a narrow cone, as dlib's vectors lie
        vectors = 0.3 * vectors + 3 * rng.standard_normal((count // 5 + 1, 128))[rng.integers(0, count // 5 + 1, count)]
        vectors += 12 * np.eye(128)[0]
    elif shape == "copies":
        vectors = vectors[rng.integers(0, count // 20 + 1, count)]
    elif shape == "constant":
        vectors = np.repeat(vectors[:1], count, axis=0)
    scale = rng.uniform(0.9, 1.1, (count, 1)) if shape == "not quite unit" else 1
    return np.ascontiguousarray(normalise(vectors) * scale if count else vectors, np.float32)


def search_by_brute_force(
    queries: np.ndarray, vectors: np.ndarray, ids: np.ndarray, k: int, added: np.ndarray | None = None
) -> Hits:
    """Compute every distance in single precision; nearest first, ties by id."""
    shape = (len(queries), len(vectors))
    asked, found = (part.ravel() for part in np.indices(shape))
    distances = compute_pair_distances(queries, asked, vectors, found).reshape(shape)
    distances = distances if added is None else distances + added
    order = np.lexsort((np.broadcast_to(ids, shape), distances), axis=1)[:, :k]
    best = Hits(np.full((shape[0], k), -1, np.int64), np.full((shape[0], k), np.inf, np.float32))
    best.ids[:, : order.shape[1]] = ids[order]
    best.distances[:, : order.shape[1]] = np.take_along_axis(distances, order, axis=1)
    return best


def cut_blocks(
    vectors: np.ndarray, ids: np.ndarray, size: int, added: np.ndarray | None = None
) -> Iterator[VectorBlock]:
    for at in range(0, len(ids), size):
        part = slice(at, at + size)
        yield VectorBlock(ids[part], vectors[part], None if added is None else added[part])


def assert_equal_hits(a: Hits, b: Hits) -> None:
    assert np.array_equal(a.ids, b.ids)
    assert np.array_equal(a.distances, b.distances)


# --- the bound -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, shape=st.sampled_from(SHAPES), scale=st.sampled_from([1e-6, 1.0, 50.0]), termed=st.booleans())
@settings(max_examples=20, deadline=None)
def test_rounding_stays_within_the_bound(kind: torch.dtype, seed: int, shape: str, scale: float, termed: bool) -> None:
    left, right = (torch.from_numpy(draw_vectors(60, shape, seed + n) * np.float32(scale)) for n in (0, 1))
    term = torch.from_numpy(np.random.default_rng(seed).uniform(-0.5, 0.5, 60).astype(np.float32))
    exact = left.double() @ right.double().T + (term.double() if termed else 0)
    rows = round_to_half(append_ones(left) if termed else left, kind)
    columns = round_to_half(append_term(right, term if termed else None, kind), kind)
    product, error = rows.values @ columns.values.T, compute_max_error(rows, columns)
    assert (product.float() >= relax_limit(exact.T, error, kind).T).all()
    assert ((product.double() - exact) <= error[:, None] + exact.abs() * 2 * torch.finfo(kind).eps + 1e-4).all()
    tile = Tile(rows, columns, 7)
    for k in (1, 5, 9):
        assert (tile.compute_min_kth(k) <= exact.sort(dim=1, descending=True).values[:, k - 1]).all()
    assert torch.isinf(tile.compute_min_kth(10)).all()  # nine groups


def test_the_bound_is_of_use() -> None:
    """As tight as the documentation says: a loose one would pass on every pair."""
    vectors = torch.from_numpy(draw_vectors(500, "random", 1))
    for kind, most in ((torch.float16, 9.5e-4), (torch.bfloat16, 6.5e-3), (torch.float32, 4e-5)):
        half = round_to_half(vectors, kind)
        limit = torch.full((500,), 0.5, dtype=torch.float64)
        assert (limit - relax_limit(limit, compute_max_error(half, half), kind)).max() < most


@pytest.mark.parametrize("group", [1, 7, 64, 500])
def test_a_tile_passes_on_what_reaches_the_limit(group: int) -> None:
    left, right = (round_to_half(torch.from_numpy(draw_vectors(200, "random", n)), torch.bfloat16) for n in (1, 2))
    exact = left.values.double() @ right.values.double().T
    limit = torch.linspace(-0.5, 0.3, 200, dtype=torch.float64)
    found = torch.zeros((200, 200), dtype=torch.bool)
    for i, j in Tile(left, right, group).find_reaching(limit):
        assert not found[i, j].any()
        assert (i.diff() >= 0).all()
        found[i, j] = True
    assert found[exact >= limit[:, None]].all()
    assert not found[exact < limit[:, None] - 0.02].any()


# --- k nearest -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=SEEDS,
    shapes=st.tuples(st.sampled_from(SHAPES), st.sampled_from(SHAPES)),
    counts=st.tuples(st.integers(0, 40), st.integers(0, 300)),
    k=st.integers(1, 30),
    sizes=st.tuples(st.integers(1, 50), st.integers(1, 300), st.integers(1, 70)),
    weighted=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_nearest_are_those_of_comparing_all_pairs(
    kind: torch.dtype,
    seed: int,
    shapes: tuple[str, str],
    counts: tuple[int, int],
    k: int,
    sizes: tuple[int, int, int],
    weighted: bool,
) -> None:
    rng = np.random.default_rng(seed)
    queries, vectors = (
        draw_vectors(n, shape, seed + m) for m, (n, shape) in enumerate(zip(counts, shapes, strict=True))
    )
    both = min(counts) // 2
    queries[:both] = vectors[:both]  # some are there themselves
    ids = rng.permutation(2**40 + np.arange(counts[1]))
    added = rng.uniform(0, 1, counts[1]).astype(np.float32) if weighted else None
    tile, block, group = sizes
    found = find_neighbours(
        queries, cut_blocks(vectors, ids, block, added), k, "cpu", Tiling(kind, tile, group, threads=2)
    )
    assert_equal_hits(found, search_by_brute_force(queries, vectors, ids, k, added))


def test_they_are_those_of_faiss() -> None:
    queries, vectors = Faces().draw(np.arange(300) % 90, 10**9), Faces().draw(np.arange(6000) % 900, 0)
    distances, places = faiss.knn(queries, vectors, 10)
    found = find_neighbours(queries, cut_blocks(vectors, np.arange(6000), 1000), 10, "cpu", Tiling(torch.float16, 128))
    assert (found.ids == places).mean() > 0.999  # its products round: near ties turn
    assert np.allclose(found.distances, distances, atol=1e-5)
    order = np.random.default_rng(0).permutation(6000)
    assert_equal_hits(
        found, find_neighbours(queries, cut_blocks(vectors[order], order, 777), 10, "cpu", Tiling(torch.bfloat16, 50))
    )


def test_few_pairs_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first block only what may be among the nearest: the host must keep up with a GPU."""
    passed_on: list[int] = []

    def count_and_insert(best: Hits, asked: np.ndarray, *rest: np.ndarray) -> None:
        passed_on.append(len(asked))
        insert_hits(best, asked, *rest)

    monkeypatch.setattr(top_k, "insert_hits", count_and_insert)
    queries, vectors = draw_vectors(200, "random", 1), draw_vectors(20_000, "random", 2)
    find_neighbours(queries, cut_blocks(vectors, np.arange(20_000), 2000), 10, "cpu", Tiling(torch.float16))
    assert sum(passed_on) < 200 * 10 * (1 + np.log(10)) * 1.5


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_device_without_much_memory_halves_its_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it runs out after part of a tile was passed on: nothing is lost, and nothing counts twice."""
    queries, vectors = draw_vectors(100, "copies", 1), draw_vectors(900, "copies", 1)
    expected = find_neighbours(queries, cut_blocks(vectors, np.arange(900), 300), 12, device)
    sizes, find_reaching = [], Tile.find_reaching

    def limited(tile: Tile, limit: torch.Tensor) -> Iterator[Any]:
        sizes.append(len(limit))
        yield from find_reaching(tile, limit)
        if len(limit) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Tile, "find_reaching", limited)
    assert_equal_hits(expected, find_neighbours(queries, cut_blocks(vectors, np.arange(900), 300), 12, device))
    assert sizes[0] == 100
    assert max(sizes[-5:]) <= 20
    rule = JoinRule(0.5, 900, 64)
    small = find_pairs_on_device(vectors, np.zeros(900, np.float32), rule, device)
    monkeypatch.undo()
    whole = find_pairs_on_device(vectors, np.zeros(900, np.float32), rule, device)
    assert np.array_equal(*(np.sort(u * 900 + v) for u, v in (small, whole)))


def test_one_query_that_does_not_fit_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Tile, "__init__", full)
    with pytest.raises(torch.OutOfMemoryError):
        find_neighbours(
            draw_vectors(9, "random", 1), cut_blocks(draw_vectors(9, "random", 1), np.arange(9), 9), 1, "cpu"
        )


def test_a_block_that_cannot_be_read_raises() -> None:
    def broken() -> Iterator[Any]:
        yield from cut_blocks(draw_vectors(9, "random", 1), np.arange(9), 9)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        find_neighbours(draw_vectors(9, "random", 1), broken(), 1, "cpu")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 3)), max_size=60), st.integers(1, 5))
@settings(deadline=None)
def test_what_is_kept_does_not_depend_on_the_order(pairs_: list[tuple[int, int, int]], k: int) -> None:
    first = {(row, face): distance for row, face, distance in reversed(pairs_)}  # a face has one distance
    best = Hits(np.full((4, k), -1, np.int64), np.full((4, k), np.inf, np.float32))
    for at in range(0, len(pairs_), 7):
        part = sorted(pairs_[at : at + 7])
        asked, ids = (np.array([pair[n] for pair in part], np.int64) for n in (0, 1))
        insert_hits(best, asked, ids, np.array([first[pair[:2]] for pair in part], np.float32))
    for row in range(4):
        wanted = sorted((distance, face) for (r, face), distance in first.items() if r == row)[:k]
        there = best.ids[row] >= 0
        assert list(zip(best.distances[row, there], best.ids[row, there], strict=True)) == wanted
        assert np.isinf(best.distances[row, ~there]).all()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_blocks_arrive_in_order(device: str) -> None:
    blocks = [(n, np.full((size, 4), n, np.float32)) for n, size in enumerate([3, 0, 7, 1, 9, 2])]
    for _, vectors in blocks:
        vectors.setflags(write=False)  # as mapped files are
    arrived = [(label, here.copy(), there.cpu().numpy()) for label, here, there in upload_blocks(blocks, device)]
    assert [label for label, _, _ in arrived] == [0, 2, 3, 4, 5]
    for label, here, there in arrived:
        assert np.array_equal(here, blocks[label][1])
        assert np.array_equal(there, blocks[label][1])


# --- joins ---------------------------------------------------------------------------------------------------------------


def join_sorted(
    vectors: np.ndarray, densities: np.ndarray, threshold: float, most: int, tiling: Tiling | None, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Join by the device's code, or by the CPU's without `tiling`; returns sorted keys of the pairs, and distances."""
    if tiling is None:
        u, v = find_candidate_pairs(vectors, densities, threshold, most)
    else:
        u, v = find_pairs_on_device(
            vectors, densities, JoinRule(threshold - pairs._SLACK, most, pairs._ROWS), device, tiling
        )
    assert (u < v).all()
    found = refine_pairs(vectors, densities, u, v, threshold)
    keys = found.u * max(1, len(vectors)) + found.v
    assert len(np.unique(keys)) == len(keys)
    order = np.argsort(keys)
    return keys[order], found.distance[order]


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=SEEDS,
    shape=st.sampled_from(SHAPES[:4]),
    count=st.integers(0, 250),
    share=st.floats(0.3, 0.999),
    most=st.sampled_from([1, 4, 30, 1000]),
    sizes=st.tuples(st.integers(16, 70), st.integers(1, 70), st.integers(40, 130), st.integers(90, 300)),
)
@settings(max_examples=12, deadline=None)
def test_joined_pairs_are_those_of_the_cpu(
    kind: torch.dtype, seed: int, shape: str, count: int, share: float, most: int, sizes: tuple[int, int, int, int]
) -> None:
    vectors = draw_vectors(count, shape, seed)
    if most < 1000:  # of copies in a crowd any may stay
        vectors = np.unique(vectors, axis=0) if count else vectors
    densities = np.random.default_rng(seed).uniform(-0.1, 0.5, len(vectors)).astype(np.float32)
    similar = vectors @ vectors.T - (densities[:, None] + densities) / 2
    threshold = float(np.quantile(similar[np.triu_indices(len(vectors), 1)], share)) if len(vectors) > 1 else 0.5
    tile, group, block, held = sizes
    tiling = Tiling(kind, tile, group, block, held, threads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_ROWS", 48)
        expected = join_sorted(vectors, densities, threshold, most, None)
        found = join_sorted(vectors, densities, threshold, most, tiling)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_crowd_among_strangers(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows behind the first crowd look at it as well, wherever it begins in what is held."""
    monkeypatch.setattr(pairs, "_ROWS", 64)
    alone, crowd = (
        draw_vectors(400, "clustered", 1),
        normalise(draw_vectors(1, "random", 2) + 0.01 * draw_vectors(300, "random", 3)),
    )
    vectors = np.concatenate([alone[:250], crowd, alone[250:]])
    densities = np.random.default_rng(0).uniform(0, 0.1, 700).astype(np.float32)
    expected = join_sorted(vectors, densities, 0.6, 8, None)
    for tiling in (
        Tiling(torch.float16, 64, 8, 128, 128),
        Tiling(torch.bfloat16, 200),
        Tiling(torch.float32, 33, 5, 77, 320),
    ):
        found = join_sorted(vectors, densities, 0.6, 8, tiling, device)
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1], expected[1])


# --- where it is used ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    path = str(tmp_path_factory.mktemp("nearest") / "g")
    rng = np.random.default_rng(3)
    people = rng.permutation(np.repeat(np.arange(1500), rng.geometric(0.2, 1500))[:1500])
    append(Gallery.create(path, CONTRACT), [rows(people, Faces().draw(people, 1500), 0)], "first")
    return Gallery(path)


@pytest.mark.parametrize("device", ["cpu:0", CUDA])
def test_a_graph_on_a_device_is_that_of_the_cpu(
    device: str, gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact where cells would do without: `cpu:0` is torch's CPU."""
    inline = GraphRunConfig("inline", device="cpu")
    plain = open_graph([gallery], GraphConfig(), inline, str(tmp_path / "plain"))
    monkeypatch.setattr(cells, "MAX_EXACT_FACES", 500)
    assert not open_graph([gallery], GraphConfig(), inline, str(tmp_path / "cells")).info.exact
    monkeypatch.setattr(pipelines.graph, "resolve_device", lambda name: device)
    monkeypatch.setattr(pipelines.graph, "should_compare_all", lambda count, cores, gpu: gpu)
    lines: list[str] = []
    run = GraphRunConfig("inline", device="cuda")
    exact = open_graph([gallery], GraphConfig(), run, str(tmp_path / "exact"), lines.append)
    assert exact.info.exact
    assert exact.info.recall == 1.0
    assert "edges: task 1 of 1" in " ".join(lines)
    found, expected = exact.edges.read_within(2.0), plain.edges.read_within(2.0)
    order, other = np.lexsort((found.v, found.u)), np.lexsort((expected.v, expected.u))
    for name in ("u", "v", "distance"):
        assert np.array_equal(getattr(found, name)[order], getattr(expected, name)[other])


def test_a_gpu_pays_from_some_size_on() -> None:
    """Not for a handful of faces or queries, for which it would have to be started."""
    assert not cells.should_compare_all(100_000, 2, gpu=False)
    assert cells.should_compare_all(10_000_000, 16, gpu=True)
    assert cost.is_device_cheaper(10_000_000, cost.ScanWork(20_000, 10**6, 10, 16, gpu=True))
    assert not cost.is_device_cheaper(10_000_000, cost.ScanWork(20_000, 10**6, 10, 16, gpu=False))
    assert not cost.is_device_cheaper(10_000, cost.ScanWork(100, 100, 10, 2, gpu=True))
    seconds = [pipelines.graph.estimate_all_pairs(n, 16, gpu=True) for n in (10**4, 10**6, 10**7, 10**8)]
    assert seconds == sorted(seconds)


def test_ray_tasks_ask_for_a_gpu_where_there_is_one() -> None:
    with_gpu, without = Resources(8, 2), Resources(8, 0)
    assert [ray.choose_device("auto", found) for found in (with_gpu, without)] == ["cuda", "cpu"]
    assert [ray.choose_device("cpu", found) for found in (with_gpu, without)] == ["cpu", "cpu"]
    assert ray.choose_device("cuda:1", with_gpu) == "cuda"  # a task sees one GPU, and that is the first
    with pytest.raises(ConfigError, match="Ray has no GPU"):
        ray.choose_device("cuda", without)


# --- k-means on GPUs -----------------------------------------------------------------------------------------------------


class Gpus:
    """faiss as it is where there are GPUs, with an index of the CPU in their place."""

    def __init__(self, fails: bool = False):
        self.fails, self.made = fails, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(faiss, name)

    def get_num_gpus(self) -> int:
        return 2

    def index_cpu_to_all_gpus(self, index: Any) -> Any:
        self.made += 1
        if self.fails:
            raise RuntimeError("CUDA driver version is insufficient\nat gpu/utils/DeviceUtils.cu:96")
        return index


@pytest.mark.parametrize("fails", [False, True])
def test_k_means_goes_to_gpus_and_comes_back(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = draw_vectors(3000, "clustered", 1)
    plan = make_plan(3000, 1 << 40, 0, "IVF16,Flat")
    monkeypatch.setattr(cells, "MAX_EXACT_FACES", 500)
    first = template.train_template(sample, plan)
    centroids = faiss.extract_index_ivf(first).quantizer.reconstruct_n(0, 16)
    centres = cells.train_cells(sample, 0).centres
    there, said = Gpus(fails), list[str]()
    monkeypatch.setattr(engine, "faiss", there)
    again = template.train_template(sample, plan, said.append)
    ivf = faiss.extract_index_ivf(again)
    assert ivf.clustering_index is None
    assert np.array_equal(ivf.quantizer.reconstruct_n(0, 16), centroids)
    assert np.array_equal(cells.train_cells(sample, 0, said.append).centres, centres)
    assert there.made == 2
    expected = (
        "faiss sees 2 GPUs and cannot train on them (CUDA driver version is insufficient): k-means runs on the CPU"
    )
    assert said == [expected] * (2 if fails else 0)
