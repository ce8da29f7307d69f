"""cluster: persons of real photos, what the tables promise, what is never joined, interruptions, hostile names."""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from hard_faces import ArcFaceLike, draw_geometric, make_table
from helpers import embed

import facepipe.curation.graph
from facepipe.config import build
from facepipe.curation.clusters import tables
from facepipe.errors import ConfigError, EvaluationError, GalleryBusyError, GalleryError
from facepipe.evaluation.clusters import evaluate_clusters
from facepipe.gallery import Gallery
from facepipe.schema import FACES
from facepipe.storage.lease import hold_lease
from pipelines.cluster import ClusterConfig, run
from pipelines.cluster.pipeline import ClusterSummary
from pipelines.runtime.runners import ray

COUNT = 2000


def make(gallery: Gallery, threshold: float | None = None, **rules: Any) -> ClusterSummary:
    graph = {"threshold": threshold} if threshold else {}
    settings: dict[str, Any] = {"cluster": rules, "graph": graph, "run": {"runner": "inline"}}
    return run(build(ClusterConfig, settings), gallery.path)


def drawn(count: int = COUNT, seed: int = 0) -> pa.Table:
    """Rows of persons with two faces on average."""
    rng = np.random.default_rng([seed, 3])
    identities = rng.permutation(np.repeat(np.arange(count), rng.geometric(0.5, count))[:count])
    return rows(identities, Faces(seed=seed).draw(identities, count), 0)


def fill(path: Path, *parts: pa.Table) -> Gallery:
    append(Gallery.create(str(path), CONTRACT), parts, "first")
    return Gallery(str(path))


def changed(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, FACES.field(name), pa.array(values, FACES.field(name).type))


def faces_of(gallery: Gallery) -> dict[str, np.ndarray]:
    """Columns of faces.parquet, by face id."""
    table = tables.read_cluster_table(gallery.path, tables.FACES)
    assert table.schema == tables.FACE_SCHEMA
    table = table.sort_by("face_id")
    return {name: table[name].to_numpy() for name in table.column_names}


def partition(gallery: Gallery) -> set[frozenset[int]]:
    found = faces_of(gallery)
    return {frozenset(found["face_id"][found["cluster"] == n].tolist()) for n in np.unique(found["cluster"])}


def sound(gallery: Gallery, summary: ClusterSummary) -> None:
    """What the tables promise, from the gallery's vectors and the graph's densities."""
    found = faces_of(gallery)
    made = tables.read_cluster_table(gallery.path, tables.CLUSTERS).to_pydict()
    held = gallery.to_arrow(["face_id", "uri", "identity"]).filter(pa.compute.field("face_id").is_valid())
    held = held.sort_by("face_id")
    for name in ("face_id", "uri", "identity"):
        assert found[name].tolist() == held[name].to_pylist()
    assert len(np.unique(found["face_id"])) == len(found["face_id"]) == summary.faces
    count = Counter(found["cluster"].tolist())
    assert made["cluster"] == list(range(summary.clusters)) == sorted(count)
    assert made["size"] == [count[n] for n in made["cluster"]] == sorted(made["size"], reverse=True)
    assert found["size"].tolist() == [count[n] for n in found["cluster"].tolist()]
    assert (summary.largest, summary.singletons) == (max(count.values()), sum(n == 1 for n in count.values()))
    medoids = dict(zip(found["cluster"][found["medoid"]], found["face_id"][found["medoid"]], strict=True))
    assert found["medoid"].sum() == summary.clusters
    assert made["medoid"] == [medoids[n] for n in made["cluster"]]
    graph = facepipe.curation.graph.Graph(str(Path(gallery.path, "reports", "graph")))
    assert np.array_equal(graph.nodes.ids, found["face_id"])
    vectors, density = graph.nodes.vectors.astype(np.float64), graph.density.astype(np.float64)
    assert np.array_equal(np.isnan(found["fit"].astype(float)), found["size"] == 1)
    for n in list(count)[:40]:
        at = np.flatnonzero(found["cluster"] == n)
        cosine, off = vectors[at] @ vectors[at].T, ~np.eye(len(at), dtype=bool)
        assert made["cohesion"][n] == pytest.approx(cosine[off].mean() if len(at) > 1 else 1, abs=1e-4)
        if len(at) > 1:
            fits = (cosine - (density[at][:, None] + density[at]) / 2 * off)[off].reshape(len(at), -1).mean(axis=1)
            assert np.allclose(found["fit"][at].astype(float), fits, atol=1e-4)
            assert fits[found["medoid"][at]][0] >= fits.max() - 1e-5
    suspects = {
        name: tables.read_cluster_table(gallery.path, name).to_pydict() for name in (tables.MERGES, tables.SPLITS)
    }
    assert (len(suspects[tables.MERGES]["left"]), len(suspects[tables.SPLITS]["cluster"])) == (
        summary.merges,
        summary.splits,
    )
    for left, right in zip(suspects[tables.MERGES]["left"], suspects[tables.MERGES]["right"], strict=True):
        assert left != right
        assert max(left, right) < summary.clusters
    for table in suspects.values():
        assert table["probability"] == sorted(table["probability"], reverse=True)
        assert all(0 <= probability <= 1 for probability in table["probability"])
    for n, leaving in zip(suspects[tables.SPLITS]["cluster"], suspects[tables.SPLITS]["leaving"], strict=True):
        assert 1 <= leaving <= count[n] / 2
    report = Path(gallery.path, "reports", "cluster", "report.html")
    assert summary.out == str(report.parent)
    assert "Identity clusters" in report.read_text()
    names = {path.name for path in report.parent.iterdir()}
    assert names >= {tables.FACES, tables.CLUSTERS, tables.MERGES, tables.SPLITS, "report.html"}
    assert not any(name.endswith(".new") for name in names)
    assert {path.name for path in report.parent.parent.iterdir()} == {"cluster", "graph", ".lock", ".lock.guard"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of 2,000 faces with its graph."""
    gallery = fill(tmp_path_factory.mktemp("cluster") / "g", *(drawn().slice(at, 500) for at in range(0, COUNT, 500)))
    make(gallery)
    return Path(gallery.path)


@pytest.fixture
def gallery(base: Path, tmp_path: Path) -> Gallery:
    shutil.copytree(base, tmp_path / "g")
    return Gallery(str(tmp_path / "g"))


# --- persons -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lfw(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """500 photos: five of each of 30 persons, and 350 of persons who are there once."""
    root, images = tmp_path_factory.mktemp("lfw"), shared / "data" / "lfw-dev" / "images"
    persons = sorted(path for path in images.iterdir() if path.is_dir())
    held = [(person, sorted(person.iterdir())) for person in persons]
    many = [(person, photos[:5]) for person, photos in held if len(photos) >= 5][:30]
    once = [(person, photos) for person, photos in held if len(photos) == 1][:350]
    for person, photos in many + once:
        (root / "images" / person.name).mkdir(parents=True)
        for photo in photos:
            (root / "images" / person.name / photo.name).symlink_to(photo)
    embed(root / "images", root / "g", runner="inline")
    return Gallery(str(root / "g"))


def test_persons_of_lfw_are_told_apart(lfw: Gallery) -> None:
    summary = make(lfw)
    sound(lfw, summary)
    assert 500 <= summary.faces <= 600
    assert summary.estimated
    assert summary.recall == 1.0
    scores = evaluate_clusters(lfw).scores
    assert scores.bcubed.f > 0.9
    assert Path(summary.out, "report.html").stat().st_size > 200_000, "faces are shown"


def test_tables_and_scores_of_drawn_faces(gallery: Gallery) -> None:
    summary = make(gallery)
    sound(gallery, summary)
    assert summary.algorithm == "linkage"
    assert "by linkage" in Path(summary.out, "report.html").read_text()
    scores = evaluate_clusters(gallery).scores
    assert scores.faces == COUNT
    assert scores.bcubed.f > 0.97
    assert scores.pairwise.precision > 0.95
    assert scores.bcubed.recall > 0.9


@pytest.mark.parametrize("algorithm", ["whispers", "communities", "components", "guessing"])
def test_removed_algorithms_are_refused(algorithm: str, gallery: Gallery) -> None:
    with pytest.raises(ConfigError, match=f"cluster.algorithm={algorithm} is not available: .*=linkage"):
        make(gallery, algorithm=algorithm)


def test_the_order_of_the_table_does_not_matter(gallery: Gallery, tmp_path: Path) -> None:
    shuffled = drawn().take(pa.array(np.random.default_rng(3).permutation(COUNT)))
    other = fill(tmp_path / "other", shuffled.slice(0, 777), shuffled.slice(777))
    summaries = [make(one) for one in (gallery, other)]
    left, right = faces_of(gallery), faces_of(other)
    for name in ("face_id", "cluster", "size", "medoid"):
        assert np.array_equal(left[name], right[name])
    assert np.array_equal(left["fit"].astype(float), right["fit"].astype(float), equal_nan=True)
    for name in (tables.CLUSTERS, tables.MERGES, tables.SPLITS):
        assert tables.read_cluster_table(gallery.path, name).equals(tables.read_cluster_table(other.path, name))
    assert summaries[0].merges == summaries[1].merges


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_faces(count: int, tmp_path: Path) -> None:
    few = fill(tmp_path / "g", drawn(count))
    with pytest.raises(GalleryError, match="--threshold"):
        make(few)
    assert not Path(few.path, "reports", "cluster").exists()
    sound(few, make(few, 0.4))
    assert make(few, 1.99).clusters == 1
    assert make(few, 0.001).clusters == count


def test_no_face_is_nothing_to_cluster(tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match="no face"):
        make(fill(tmp_path / "g"))


def test_one_face_again_and_again_is_one_person(tmp_path: Path) -> None:
    table = drawn(600)
    copies = pa.concat_tables([table, *[table.slice(7, 1)] * 300])
    copies = changed(copies, "face_id", list(range(900)))
    copies = changed(copies, "uri", [f"{n}.jpg" for n in range(900)])
    gallery = fill(tmp_path / "g", copies)
    sound(gallery, make(gallery))
    found = faces_of(gallery)
    assert (found["cluster"][600:] == found["cluster"][7]).all()
    assert found["size"][7] >= 301
    person = np.array(copies["identity"].to_pylist())
    assert set(person[found["cluster"] == found["cluster"][7]]) == {person[7]}


# --- what is said of faces -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "is_copy"), [(0.005, True), (0.024, False)])
def test_faces_of_one_photo_are_two_persons_unless_they_are_copies(tmp_path: Path, noise: float, is_copy: bool) -> None:
    """600 faces and others that differ a little, in the first one's photo; then without that rule."""
    table = drawn(600)
    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    near = vectors + np.random.default_rng(0).normal(0, noise, vectors.shape)
    near = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
    distance = np.linalg.norm(near - vectors, axis=1)
    assert distance.max() < 0.1 if is_copy else distance.min() > 0.2
    twins = changed(table, "embedding", near.tolist())
    twins = changed(twins, "face_id", [n ^ 1 for n in table["face_id"].to_pylist()])
    twins = changed(twins, "face_index", [1] * 600)
    gallery = fill(tmp_path / "g", table, twins)
    sound(gallery, make(gallery))
    found = faces_of(gallery)
    pairs = Counter(zip(found["uri"], found["cluster"], strict=True))
    # A mirror, a collage or a photo of a photo shows one person twice.
    assert len(pairs) < 620 if is_copy else len(pairs) == 1200
    sound(gallery, make(gallery, one_photo=False))
    found = faces_of(gallery)
    assert len(set(zip(found["uri"], found["cluster"], strict=True))) < 700


def test_cut_faces_join_persons_and_found_none(tmp_path: Path) -> None:
    """No cluster is of cut faces alone; one whole face of a person gathers the cut ones."""
    table = changed(drawn(600), "face_id", list(range(600)))
    person = np.array(table["identity"].to_pylist())
    is_cut = np.isin(person, sorted(set(person))[::2])
    gallery = fill(tmp_path / "g", changed(table, "visible", np.where(is_cut, 0.7, 1.0).tolist()))
    make(gallery)
    found = faces_of(gallery)
    has_whole = set(found["cluster"][~is_cut])
    assert all(size == 1 or cluster in has_whole for cluster, size in zip(found["cluster"], found["size"], strict=True))
    # One whole face of each person.
    visible = np.full(600, 0.7)
    visible[np.unique(person, return_index=True)[1]] = 1.0
    gallery = fill(tmp_path / "h", changed(table, "visible", visible.tolist()))
    make(gallery)
    assert (faces_of(gallery)["size"] > 1).mean() > 0.5


def test_blurred_faces_form_no_large_cluster(tmp_path: Path) -> None:
    """Blurred faces gather in one direction. In the second gallery nothing says that they are blurred."""
    space = ArcFaceLike(5)
    person = draw_geometric(1500, 8, 5)
    is_blurred = np.random.default_rng(5).random(1500) < 0.08
    drawn_faces = space.blur(space.draw(space.draw_centres(int(person.max()) + 1), person), is_blurred)
    blurred_ids = make_table(drawn_faces)["face_id"].to_numpy()[is_blurred]
    largest = []
    for name, columns in (("told", ()), ("untold", ("det_score", "face_px", "sharpness"))):
        table = make_table(drawn_faces)
        for column in columns:
            table = changed(table, column, [None] * len(table))
        gallery = fill(tmp_path / name, table)
        sound(gallery, make(gallery))
        found = faces_of(gallery)
        clusters = found["cluster"][np.isin(found["face_id"], blurred_ids)]
        largest.append(Counter(clusters.tolist()).most_common(1)[0][1])
    assert largest[0] < 0.1 * is_blurred.sum() < 0.5 * is_blurred.sum() < largest[1]


def test_unfit_faces_of_one_photo_join_different_persons(tmp_path: Path) -> None:
    """Each whole face has two cut ones beside it, in one photo with each other."""
    table = changed(drawn(300), "face_id", list(range(0, 900, 3)))
    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    parts = [table]
    for number in (1, 2):
        near = vectors + np.random.default_rng(number).normal(0, 0.02, vectors.shape)
        near /= np.linalg.norm(near, axis=1, keepdims=True)
        part = changed(table, "embedding", near.astype(np.float32).tolist())
        part = changed(part, "face_id", list(range(number, 900, 3)))
        part = changed(part, "uri", [f"{uri}-group" for uri in table["uri"].to_pylist()])
        part = changed(part, "visible", [0.5] * 300)
        parts.append(changed(part, "face_index", [number - 1] * 300))
    gallery = fill(tmp_path / "g", *parts)
    sound(gallery, make(gallery, threshold=0.45))
    found = faces_of(gallery)
    pairs = Counter(zip(found["uri"], found["cluster"], strict=True))
    assert max(pairs.values()) == 1
    # One of each two joined a person all the same.
    assert (found["size"][1::3] + found["size"][2::3] > 2).all()


def test_faces_with_one_label_are_one_person(tmp_path: Path) -> None:
    """Each label names two persons here: only the labels bring them together."""
    table = drawn(900)
    names = [f"couple{int(name.removeprefix('person')) // 2}" for name in table["identity"].to_pylist()]
    gallery = fill(tmp_path / "g", changed(table, "identity", names))
    together = []
    for identities in (False, True):
        sound(gallery, make(gallery, identities=identities))
        found = faces_of(gallery)
        couples = [set(found["cluster"][found["identity"] == name]) for name in set(names)]
        together.append(np.mean([len(clusters) == 1 for clusters in couples]))
    assert together[0] < 0.3
    assert together[1] == 1


def test_faces_without_a_label_are_not_one_person(tmp_path: Path) -> None:
    table = drawn(800)
    labels = table["identity"].to_pylist()
    some = changed(table, "identity", [label if n % 3 == 0 else None for n, label in enumerate(labels)])
    gallery = fill(tmp_path / "g", some)
    sound(gallery, make(gallery, identities=True))
    found = faces_of(gallery)
    for label in set(labels[::3]):
        assert len(set(found["cluster"][found["identity"] == label])) == 1
    truth = dict(zip(table["face_id"].to_pylist(), labels, strict=True))
    persons = [len({truth[face] for face in part}) for part in partition(gallery)]
    assert np.mean(np.array(persons) == 1) > 0.9
    assert max(persons) < 6


# --- runs ----------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_leaves_the_old_report(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Path(gallery.path, "reports", "cluster")
    before = {path.name: path.read_bytes() for path in report.iterdir()}

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.cluster.pipeline.write_report", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(gallery, identities=True)
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.graph.join_cells", stopped)  # the graph is there
        summary = make(gallery, identities=True)
    sound(gallery, summary)
    assert tables.read_cluster_table(gallery.path, tables.FACES).num_rows == COUNT
    assert (report / tables.FACES).read_bytes() != before[tables.FACES]


def test_the_same_run_writes_the_same_tables(gallery: Gallery) -> None:
    def read_report() -> dict[str, bytes]:
        """Read all files, without the minute in which they were made."""
        files = Path(gallery.path, "reports", "cluster").iterdir()
        return {path.name: re.sub(rb"\d{4}-\d\d-\d\d[ T]\d\d:\d\d", b"", path.read_bytes()) for path in files}

    make(gallery)
    before = read_report()
    make(gallery)
    assert read_report() == before


def test_new_faces_are_clustered_too(gallery: Gallery) -> None:
    table = rows(np.arange(10**6, 10**6 + 100), Faces(seed=8).draw(np.arange(100), 10**8), 10**6)
    append(gallery, [table], "second")
    fresh = Gallery(gallery.path)
    summary = make(fresh)
    assert summary.faces == COUNT + 100
    sound(fresh, summary)


def test_one_run_at_a_time_makes_reports(gallery: Gallery) -> None:
    with hold_lease(str(Path(gallery.path, "reports")), "reports"), pytest.raises(GalleryBusyError, match="reports"):
        make(gallery)


def test_what_is_missing_or_wrong_is_named(gallery: Gallery) -> None:
    shutil.rmtree(Path(gallery.path, "reports"))
    with pytest.raises(EvaluationError, match="facepipe cluster"):
        tables.read_cluster_table(gallery.path, tables.FACES)


HOSTILE = [
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "\"'><svg onload=window.pwned=1>",
    "{{ 7 * 7 }}{% raw %}",
    "<!--<script>",
    "\u202egpj.exe\0",
    "",
]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """They come back from the tables unchanged, and reach the page only where nothing reads them as markup."""
    table = drawn(600)
    identities = [HOSTILE[int(label.removeprefix("person")) % 7] for label in table["identity"].to_pylist()]
    table = changed(table, "identity", identities)
    table = changed(table, "uri", [f"{HOSTILE[n % 7]}/{n}.jpg" for n in range(600)])
    gallery = fill(tmp_path / "g</title><script>window.pwned=1</script>", table)
    sound(gallery, make(gallery))
    page = Path(gallery.path, "reports", "cluster", "report.html").read_text()
    assert "pwned" in page, "the names are shown"
    assert "\\u003cimg src=x onerror" in page
    for raw in ("<script>window", "<img src=x", "<svg onload", "<!--<script", "\u202e", "</title><script"):
        assert raw not in page
    assert page.lower().count("</script") == page.lower().count("<script")
    held = pq.read_table(Path(gallery.path, "reports", "cluster", tables.FACES))
    assert set(held["identity"].to_pylist()) == set(identities)


@pytest.mark.slow
def test_tasks_on_ray_give_the_same_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of many small tasks, on two workers: the same cluster for every face, and the same sums to the bit."""
    gallery = fill(tmp_path / "gallery", drawn(600))
    make(gallery)
    expected = faces_of(gallery)
    sums = (Path(gallery.path) / "reports/cluster/sums.npz").read_bytes()
    monkeypatch.setattr("facepipe.curation.graph.linkage._MAX_NODES_PER_TASK", 40)
    run_counts: list[int] = []
    run_tasks = ray.run_tasks

    def count_tasks(function: Any, items: Any, cpus: float, **options: Any) -> Any:
        for item, result in run_tasks(function, items, cpus, **options):
            run_counts.append(len(item.nodes))
            yield item, result

    monkeypatch.setattr(ray, "run_tasks", count_tasks)
    run(build(ClusterConfig, {"run": {"runner": "ray", "cpus": 1}}), gallery.path)
    assert len(run_counts) > 10
    found = faces_of(gallery)
    assert all(np.array_equal(found[name], expected[name], equal_nan=name == "fit") for name in expected)
    assert (Path(gallery.path) / "reports/cluster/sums.npz").read_bytes() == sums
