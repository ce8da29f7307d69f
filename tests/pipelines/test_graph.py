"""The graph: exact or by cells, reused or taken up again, killed at random moments, of odd galleries, on Ray."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows

import pipelines.graph
from facepipe.curation.graph import Graph, build
from facepipe.curation.graph.build import EdgeTask
from facepipe.curation.graph.graph import read_info
from facepipe.errors import GalleryError, StorageError
from facepipe.gallery import Gallery
from facepipe.nearest.similarity import Pairs
from pipelines.graph import GraphConfig, GraphRunConfig, open_graph

COUNT = 4000
INLINE = GraphRunConfig("inline")
TRIALS = 3


def fill(path: Path, identities: np.ndarray, vectors: np.ndarray) -> Gallery:
    append(Gallery.create(str(path), CONTRACT), [rows(identities, vectors, 0)] if len(vectors) else [], "first")
    return Gallery(str(path))


def draw_faces(count: int, seed: int = 0, mean: float = 2) -> tuple[np.ndarray, np.ndarray]:
    """Draw (identities (n,), faces (n, 128)) of persons with `mean` faces on average."""
    rng = np.random.default_rng([seed, 3])
    identities = rng.permutation(np.repeat(np.arange(count), rng.geometric(1 / mean, count))[:count])
    return identities, Faces(seed=seed).draw(identities, count)


def build_graph(gallery: Gallery | list[Gallery], folder: Path, run: GraphRunConfig = INLINE, **config: Any) -> Graph:
    galleries = gallery if isinstance(gallery, list) else [gallery]
    return open_graph(galleries, GraphConfig(**config), run, str(folder))


def read_edges(graph: Graph) -> Pairs:
    """Read all edges, sorted; checks that each comes once, u < v."""
    found = graph.edges.read_within(2.0)
    found = found.take(np.lexsort((found.v, found.u)))
    assert len(found) == graph.info.edges == len(graph.edges)
    assert (found.u < found.v).all()
    assert len(np.unique(to_keys(found))) == len(found)
    return found


def to_keys(pairs: Pairs) -> np.ndarray:
    return pairs.u * 10**9 + pairs.v


def assert_same_graph(a: Graph, b: Graph) -> None:
    left, right = read_edges(a), read_edges(b)
    assert np.array_equal(to_keys(left), to_keys(right))
    assert np.array_equal(left.distance, right.distance)
    # Another process may multiply matrices in another order. Then a similarity at the border of two bins changes bins.
    for name in ("similarity", "genuine", "impostors"):
        assert getattr(a.info.threshold, name) == pytest.approx(getattr(b.info.threshold, name), rel=1e-3, nan_ok=True)
    assert np.allclose(a.density, b.density, rtol=0, atol=1e-6)
    assert a.info.recall == b.info.recall
    assert np.array_equal(a.representatives, b.representatives)
    assert np.abs(a.histogram - b.histogram).sum() <= 1e-4 * b.histogram.sum()
    assert np.array_equal(a.nodes.vectors, b.nodes.vectors)


def list_leftovers(folder: Path) -> set[str]:
    """List what is beside a finished graph, and temporary files inside it."""
    beside = {path.name for path in folder.parent.iterdir()} - {folder.name}
    inside = {path.name for path in folder.iterdir()}
    return beside | {
        name for name in inside if name.endswith(".new") or name in {"wide.npy", "cells.npy", "members.npy"}
    }


def count_tasks(monkeypatch: pytest.MonkeyPatch, fails_at: int = 10**9) -> list[int]:
    """Collect the numbers of the tasks that run from here on; after `fails_at` of them an interrupt is raised."""
    done: list[int] = []
    join = pipelines.graph.join_cells

    def counted(task: Any) -> int:
        if len(done) >= fails_at:
            raise KeyboardInterrupt
        done.append(task.number)
        return join(task)

    monkeypatch.setattr(pipelines.graph, "join_cells", counted)
    return done


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return fill(tmp_path_factory.mktemp("graph") / "g", *draw_faces(COUNT, mean=5))


@pytest.fixture(scope="module")
def exact(gallery: Gallery, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return build_graph(gallery, tmp_path_factory.mktemp("exact") / "graph")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells and many tasks, also for few faces."""
    monkeypatch.setattr("facepipe.curation.graph.cells.MAX_EXACT_FACES", 500)
    monkeypatch.setattr("facepipe.curation.graph.build._PAIRS_PER_TASK", 5e5)


@pytest.fixture(scope="module")
def celled(gallery: Gallery, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("facepipe.curation.graph.cells.MAX_EXACT_FACES", 500)
        patch.setattr("facepipe.curation.graph.build._PAIRS_PER_TASK", 5e5)
        return build_graph(gallery, tmp_path_factory.mktemp("celled") / "graph")


# --- what is found -------------------------------------------------------------------------------------------------------


def test_few_faces_are_compared_all_with_all(gallery: Gallery, exact: Graph) -> None:
    info, found = exact.info, read_edges(exact)
    assert (info.faces, info.exact, info.cells, info.each) == (COUNT, True, 1, 1)
    assert info.recall == 1.0
    assert info.sampled > 1000
    assert info.threshold.estimated
    vectors, density = exact.nodes.vectors.astype(np.float64), exact.density
    cosine = vectors @ vectors.T
    similar = cosine - (density[:, None].astype(np.float64) + density) / 2
    distance = np.sqrt(np.maximum(0, 2 - 2 * cosine))
    for slack, contains in ((1e-5, True), (-1e-5, False)):
        near = (similar >= info.threshold.similarity + slack) | (distance <= 0.25 - slack)
        u, v = np.nonzero(np.triu(near, 1))
        wanted = to_keys(Pairs(u, v, np.zeros(len(u), np.float32)))
        assert np.isin(*((wanted, to_keys(found)) if contains else (to_keys(found), wanted))).all()
    assert np.allclose(found.distance, distance[found.u, found.v], atol=1e-5)
    assert np.allclose(exact.compute_similarity(found), similar[found.u, found.v], atol=1e-5)
    assert info.distance == pytest.approx(np.sqrt(2 - 2 * (info.threshold.similarity + density.mean())), abs=1e-5)
    assert np.array_equal(exact.nodes.find(gallery.vectors()[0]) >= 0, np.ones(COUNT, bool))
    assert np.allclose(exact.cohort.compute_density(exact.nodes.vectors), density, atol=1e-6)


def test_cells_find_nearly_all_and_nothing_else(exact: Graph, celled: Graph) -> None:
    found, wanted = read_edges(celled), read_edges(exact)
    info = celled.info
    assert (info.exact, info.cells) == (False, 16)
    assert 2 <= info.each <= 16
    assert info.threshold == exact.info.threshold
    assert len(celled.edges.list_paths()) > 4
    assert info.recall >= 0.95
    real = len(found) / len(wanted)
    assert real == pytest.approx(info.recall, abs=0.02)
    at = np.searchsorted(to_keys(wanted), to_keys(found))
    assert np.array_equal(to_keys(wanted)[at], to_keys(found))
    assert np.array_equal(wanted.distance[at], found.distance)


def test_more_recall_costs_more_cells(gallery: Gallery, celled: Graph, small: None, tmp_path: Path) -> None:
    less = build_graph(gallery, tmp_path / "graph", recall=0.5)
    assert less.info.each < celled.info.each
    assert less.info.recall < celled.info.recall
    assert np.isin(to_keys(read_edges(less)), to_keys(read_edges(celled))).all()


def test_copies_of_faces_are_joined_to_the_first(tmp_path: Path) -> None:
    identities, vectors = draw_faces(600)
    copied = fill(tmp_path / "g", np.tile(identities, 2), np.tile(vectors, (2, 1)))
    graph = build_graph(copied, tmp_path / "graph")
    found, first = read_edges(graph), graph.representatives
    zero = found.take(found.distance == 0)
    assert len(zero) == 600
    assert (first[zero.v] == zero.u).all()
    rest = found.take(found.distance > 0)
    assert (first[rest.u] == rest.u).all()
    assert (first[rest.v] == rest.v).all()
    assert graph.info.recall == 1.0


def test_the_threshold_of_the_user_holds(gallery: Gallery, tmp_path: Path) -> None:
    graph = build_graph(gallery, tmp_path / "graph", threshold=0.4)
    assert not graph.info.threshold.estimated
    assert graph.info.distance == pytest.approx(0.4, abs=1e-5)
    assert graph.info.recall == 1.0
    assert read_info(graph.folder).threshold.similarity == graph.info.threshold.similarity
    wider = build_graph(gallery, tmp_path / "wider", threshold=0.4, reach=0.4)
    found = read_edges(wider)
    assert np.isin(to_keys(read_edges(graph)), to_keys(found)).all()
    vectors = wider.nodes.vectors[:300].astype(np.float64)
    u, v = np.nonzero(np.triu(2 - 2 * vectors @ vectors.T <= 0.3999**2, 1))
    assert len(u) > 10
    assert np.isin(to_keys(Pairs(u, v, np.zeros(len(u), np.float32))), to_keys(found)).all()


def test_two_galleries_are_one_graph(tmp_path: Path) -> None:
    identities, vectors = draw_faces(1500)
    table = rows(identities, vectors, 0)
    sides = []
    for n, part in enumerate((table.slice(0, 900), table.slice(700))):
        append(Gallery.create(str(tmp_path / f"g{n}"), CONTRACT), [part], "first")
        sides.append(Gallery(str(tmp_path / f"g{n}")))
    graph, whole = (
        build_graph(sides, tmp_path / "graph"),
        build_graph(fill(tmp_path / "w", identities, vectors), tmp_path / "whole"),
    )
    assert graph.info.galleries == tuple(side.id for side in sides)
    assert len(graph.nodes) == 1700
    ids = table["face_id"].to_numpy()
    twice = [graph.nodes.find(ids[700:900], side) for side in (0, 1)]
    assert (graph.representatives[twice[0]] == graph.representatives[twice[1]]).all()
    found = read_edges(graph)
    across = found.take((graph.nodes.sides[found.u] != graph.nodes.sides[found.v]) & (found.distance > 0))
    same_person = identities[np.argsort(ids)][np.searchsorted(np.sort(ids), graph.nodes.ids)]
    assert len(across) > 100
    assert (same_person[across.u] == same_person[across.v]).mean() > 0.5
    assert whole.info.faces == 1500
    swapped = build_graph(sides[::-1], tmp_path / "graph")  # another graph: the sides are swapped
    assert swapped.info.galleries == tuple(side.id for side in sides[::-1])


# --- odd galleries -------------------------------------------------------------------------------------------------------


def test_no_face_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match="no face"):
        build_graph(fill(tmp_path / "g", *(part[:0] for part in draw_faces(1))), tmp_path / "graph")


@pytest.mark.parametrize("count", [1, 2, 299])
def test_too_few_faces_for_an_unknown_model_ask_for_a_threshold(count: int, tmp_path: Path) -> None:
    few = fill(tmp_path / "g", *draw_faces(count))
    with pytest.raises(GalleryError, match="--threshold") as error:
        build_graph(few, tmp_path / "graph")
    assert "'synthetic'" in str(error.value)
    assert not (tmp_path / "graph").exists()
    graph = build_graph(few, tmp_path / "graph", threshold=0.4)
    vectors = graph.nodes.vectors.astype(np.float64)
    wanted = np.triu(2 - 2 * vectors @ vectors.T <= 0.16, 1).sum()
    assert len(read_edges(graph)) == wanted
    assert (graph.info.recall, graph.info.faces, graph.info.mean_density) == (1.0, count, 0.0)
    assert graph.info.distance == pytest.approx(0.4, abs=1e-6)


@pytest.mark.parametrize("cells", [False, True])
def test_one_face_again_and_again(cells: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    count = 1500 if cells else COUNT
    if cells:
        request.getfixturevalue("small")
    copies = fill(tmp_path / "g", np.zeros(count, np.int64), np.repeat(draw_faces(1)[1], count, axis=0))
    with pytest.raises(GalleryError, match="--threshold"):
        build_graph(copies, tmp_path / "graph")
    found = read_edges(build_graph(copies, tmp_path / "graph", threshold=0.5))
    assert np.array_equal(found.u, np.zeros(count - 1))
    assert np.array_equal(found.v, np.arange(1, count))
    assert (found.distance == 0).all()


def test_a_known_model_lends_its_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.graph.find_match_threshold", lambda name: 0.55)
    few = build_graph(fill(tmp_path / "g", *draw_faces(200)), tmp_path / "graph")
    assert few.info.distance == pytest.approx(0.55, abs=1e-6)
    assert not few.info.threshold.estimated
    many = fill(tmp_path / "many", *draw_faces(1000))
    assert build_graph(many, tmp_path / "found").info.threshold.estimated
    monkeypatch.setattr(
        "pipelines.graph.find_match_threshold", lambda name: 1.9
    )  # the data say something else entirely
    lines: list[str] = []
    graph = open_graph([many], GraphConfig(), INLINE, str(tmp_path / "card"), lines.append)
    assert graph.info.distance == pytest.approx(1.9, abs=1e-6)
    assert any("the model's default" in line for line in lines)


# --- made once -----------------------------------------------------------------------------------------------------------


def test_nothing_is_done_twice(gallery: Gallery, celled: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    done = count_tasks(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in Path(celled.folder).iterdir()}
    again = build_graph(gallery, Path(celled.folder), GraphRunConfig("auto", 1))
    assert done == []
    assert {path: path.stat().st_mtime_ns for path in Path(celled.folder).iterdir()} == before
    assert_same_graph(again, celled)
    assert list_leftovers(Path(celled.folder)) == set()


@pytest.mark.parametrize(
    "change", [{"threshold": 0.6}, {"impostors": 0.1}, {"reach": 0.3}, {"most": 8}, {"recall": 0.9}, {"seed": 1}]
)
def test_another_setting_makes_another_graph(change: dict[str, Any], tmp_path: Path) -> None:
    few = fill(tmp_path / "g", *draw_faces(400))
    first, second = build_graph(few, tmp_path / "graph"), build_graph(few, tmp_path / "graph", **change)
    assert first.info.settings != second.info.settings
    assert json.loads(second.info.settings)[next(iter(change))] == next(iter(change.values()))
    assert list_leftovers(tmp_path / "graph") == {"g"}
    assert_same_graph(second, build_graph(few, tmp_path / "fresh", **change))


def test_new_faces_make_another_graph(tmp_path: Path) -> None:
    few = fill(tmp_path / "g", *draw_faces(400))
    assert build_graph(few, tmp_path / "graph").info.faces == 400
    later = rows(*draw_faces(100, seed=5), 10**6)
    append(few, [later], "second")
    fresh = Gallery(few.path)
    graph = build_graph(fresh, tmp_path / "graph")
    assert (graph.info.faces, graph.info.versions) == (500, (fresh.version,))
    assert_same_graph(graph, build_graph(fresh, tmp_path / "fresh"))


@pytest.mark.parametrize("damage", ["{", "", "[]", None])
def test_a_damaged_graph_is_made_anew(damage: str | None, tmp_path: Path) -> None:
    few = fill(tmp_path / "g", *draw_faces(400))
    first = read_edges(build_graph(few, tmp_path / "graph"))
    if damage is None:
        (tmp_path / "graph" / "graph.json").unlink()
    else:
        (tmp_path / "graph" / "graph.json").write_text(damage)
    assert np.array_equal(to_keys(read_edges(build_graph(few, tmp_path / "graph"))), to_keys(first))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        build_graph(fill(tmp_path / "g", *draw_faces(50)), tmp_path / "file" / "graph", threshold=0.5)


# --- taken up again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_graph_is_taken_up_at_its_last_task(
    after: int, gallery: Gallery, celled: Graph, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tasks = tmp_path / "graph", len(celled.edges.list_paths()) - 1  # and one part of copies
    with monkeypatch.context() as patch:
        done = count_tasks(patch, fails_at=after)
        with pytest.raises(KeyboardInterrupt):
            build_graph(gallery, folder)
        assert len(done) == after
    assert not folder.exists()
    with monkeypatch.context() as patch:
        again = count_tasks(patch)
        graph = build_graph(gallery, folder)
    assert sorted(done + again) == list(range(tasks))
    assert_same_graph(graph, celled)
    assert list_leftovers(folder) == set()


def test_what_was_begun_for_another_graph_is_of_no_use(
    gallery: Gallery, celled: Graph, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        count_tasks(patch, fails_at=2)
        with pytest.raises(KeyboardInterrupt):
            build_graph(gallery, tmp_path / "graph", seed=3)
    assert_same_graph(build_graph(gallery, tmp_path / "graph"), celled)


STEPS = {
    "collect": "facepipe.curation.graph.build.collect_nodes",
    "histogram": "facepipe.curation.graph.calibration.count_similarities",
    "true edges": "facepipe.curation.graph.build.find_true_edges",
    "layout": "facepipe.curation.graph.cells.sort_by_cell",
    "copies": "facepipe.curation.graph.build.write_part",
    "recall": "pipelines.graph.measure_recall",
    "info": "pipelines.graph.write_info",
    "tidy": "os.unlink",
    "rename": "os.rename",
}
TWICE = [(name, 1) for name in ("true edges", "copies", "tidy")]


@pytest.mark.parametrize(("step", "calls"), [*((name, 0) for name in STEPS), *TWICE])
def test_an_error_in_any_step_can_be_got_over(
    step: str, calls: int, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, whole = fill(tmp_path / "g", *draw_faces(1200)), STEPS[step]
    module, name = whole.rsplit(".", 1)
    real: Callable[..., Any] = getattr(sys.modules[module], name)
    seen = 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        if step not in {"tidy", "rename"} or str(args[0]).startswith(str(tmp_path / "graph")):
            seen += 1
            if seen == calls + 1:
                raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(whole, fails)
        with pytest.raises(KeyboardInterrupt):
            build_graph(few, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()
    assert_same_graph(build_graph(few, tmp_path / "graph"), build_graph(few, tmp_path / "fresh"))


CHILD = """
import sys
import facepipe.curation.graph.build, facepipe.curation.graph.cells, pipelines.graph
from facepipe.gallery import Gallery
facepipe.curation.graph.cells.MAX_EXACT_FACES, facepipe.curation.graph.build._PAIRS_PER_TASK = 500, 5e5
print("begins", flush=True)
config, run = pipelines.graph.GraphConfig(), pipelines.graph.GraphRunConfig("inline")
pipelines.graph.open_graph([Gallery(sys.argv[1])], config, run, sys.argv[2], lambda line: print(line, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
def test_kill(trial: int, gallery: Gallery, celled: Graph, small: None, tmp_path: Path) -> None:
    """Killed at a random moment, it is finished by the next run, and is what it would have been."""
    folder = tmp_path / "graph"
    words = [sys.executable, "-c", CHILD, gallery.path, str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begins\n"
        time.sleep(random.Random(trial).uniform(0, 1.2))
        child.send_signal(signal.SIGKILL)
    assert not folder.exists() or read_info(str(folder)).faces == COUNT
    assert_same_graph(build_graph(gallery, folder), celled)
    assert list_leftovers(folder) == set()


def test_packed_cells_need_no_folder(gallery: Gallery, celled: Graph, small: None, tmp_path: Path) -> None:
    """What travels to another machine finds the edges, to the bit, that are found in the graph's folder."""
    packs = []

    def pack(task: EdgeTask) -> int:
        packs.append(pickle.dumps(build.pack_cells(task)))
        return build.join_cells(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.graph, "join_cells", pack)
        graph = build_graph(gallery, tmp_path / "graph")
    parts = [pq.read_table(path) for path in graph.edges.list_paths()]
    assert len(packs) > 2
    shutil.rmtree(tmp_path / "graph")
    for data, part in zip(packs, parts, strict=False):
        found = build.join_packed_cells(pickle.loads(data))
        for name, values in (("u", found.u), ("v", found.v), ("distance", found.distance)):
            assert np.array_equal(part[name].to_numpy(), values), name


@pytest.mark.slow
def test_a_gallery_in_a_store_on_ray(
    celled: Graph, small: None, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nodes have no folder in common: the cells travel, and the edges are those of a local gallery."""
    remote = Gallery.create("s3://faces/g", CONTRACT)
    identities, vectors = draw_faces(COUNT, mean=5)
    append(remote, [rows(identities, vectors, 0)], "run")
    monkeypatch.setattr(pipelines.graph, "_MIN_SHARED_COMPARISONS", 0)  # the assignment to cells is shared too
    monkeypatch.setattr(pipelines.graph, "ASSIGNED_ROWS", 1000)
    graph = build_graph(Gallery("s3://faces/g"), tmp_path / "graph", GraphRunConfig("ray", 1))
    assert np.array_equal(to_keys(read_edges(graph)), to_keys(read_edges(celled)))


@pytest.mark.slow
def test_on_ray(gallery: Gallery, celled: Graph, small: None, tmp_path: Path) -> None:
    """The same edges, and tasks that fail tell why."""
    graph = build_graph(gallery, tmp_path / "graph", GraphRunConfig("ray", 1))
    assert_same_graph(graph, celled)
    assert "RAY_ADDRESS" not in os.environ


def test_a_gallery_of_strangers_has_few_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there twice: no share of impostors can be reached, and the model's own threshold would join thousands."""
    monkeypatch.setattr("pipelines.graph.find_match_threshold", lambda name: 0.416)
    graph = build_graph(fill(tmp_path / "g", np.arange(6000), Faces().draw(np.arange(6000), 0)), tmp_path / "graph")
    assert graph.info.threshold.estimated
    assert len(graph.edges) < 0.2 * 6000


def test_a_graph_with_truncated_vectors_is_made_anew(tmp_path: Path) -> None:
    few = fill(tmp_path / "g", *draw_faces(400))
    first = read_edges(build_graph(few, tmp_path / "graph"))
    os.truncate(tmp_path / "graph" / "vectors.npy", 100)
    assert np.array_equal(to_keys(read_edges(build_graph(few, tmp_path / "graph"))), to_keys(first))
