"""Scores of clusterings against their definitions over all pairs, their properties, and tables and truths on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from helpers import measure_peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.errors import EvaluationError
from facepipe.evaluation.clusters import evaluate_clusters, score_clusters
from facepipe.gallery import Gallery

LABELS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30).map(
    lambda pairs: np.array(pairs, np.int64).reshape(-1, 2).T
)


def f(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def pairwise(truth: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """scikit-learn's pair_confusion_matrix, from the matrix of all pairs."""
    off = ~np.eye(len(truth), dtype=bool)
    same, together = (truth[:, None] == truth) & off, (found[:, None] == found) & off
    both = (same & together).sum()
    return both / together.sum() if together.any() else 1.0, both / same.sum() if same.any() else 1.0


def bcubed(truth: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    if not len(truth):
        return 1.0, 1.0
    same, together = truth[:, None] == truth, found[:, None] == found
    both = (same & together).sum(1)
    return float((both / together.sum(1)).mean()), float((both / same.sum(1)).mean())


def nmi(truth: np.ndarray, found: np.ndarray) -> float:
    """scikit-learn's normalized_mutual_info_score with average_method="arithmetic", from the dense table."""
    table = np.array([[((truth == a) & (found == b)).mean() for b in np.unique(found)] for a in np.unique(truth)])

    def entropy(p: np.ndarray) -> float:
        return float(-sum(x * np.log(x) for x in p.ravel() if x))

    if not table.size or entropy(table.sum(1)) + entropy(table.sum(0)) == 0:
        return 1.0
    a, b = entropy(table.sum(1)), entropy(table.sum(0))
    return (a + b - entropy(table)) / ((a + b) / 2)


@settings(max_examples=200, deadline=None)
@given(LABELS)
def test_scores_are_what_counting_says(labels: np.ndarray) -> None:
    truth, found = labels
    scores = score_clusters(truth, found)
    for rates, expected in ((scores.pairwise, pairwise(truth, found)), (scores.bcubed, bcubed(truth, found))):
        assert (rates.precision, rates.recall, rates.f) == pytest.approx((*expected, f(*expected)))
    assert scores.nmi == pytest.approx(nmi(truth, found), abs=1e-9)
    sizes = np.unique(found, return_counts=True)[1]
    assert (scores.faces, scores.identities, scores.clusters) == (len(truth), len(np.unique(truth)), len(sizes))
    assert (scores.singletons, scores.largest) == ((sizes == 1).sum(), sizes.max(initial=0))


@settings(max_examples=100, deadline=None)
@given(LABELS, st.permutations(range(6)), st.integers(0, 2**32 - 1))
def test_names_and_order_do_not_matter(labels: np.ndarray, names: list[int], seed: int) -> None:
    truth, found = labels
    order = np.random.default_rng(seed).permutation(len(truth))
    other = score_clusters(truth[order], np.array([*names], np.int64)[found][order] * 10**15 - 7)
    scores = score_clusters(truth, found)
    assert other.bcubed.f == pytest.approx(scores.bcubed.f)
    assert other.nmi == pytest.approx(scores.nmi, abs=1e-9)
    assert (other.pairwise, other.clusters, other.largest) == (scores.pairwise, scores.clusters, scores.largest)


@settings(max_examples=100, deadline=None)
@given(LABELS)
def test_the_two_sides_mirror_each_other(labels: np.ndarray) -> None:
    scores, mirrored = score_clusters(*labels), score_clusters(*labels[::-1])
    assert scores.nmi == pytest.approx(mirrored.nmi, abs=1e-9)
    for a, b in ((scores.pairwise, mirrored.pairwise), (scores.bcubed, mirrored.bcubed)):
        assert (a.precision, a.recall) == pytest.approx((b.recall, b.precision))
    perfect = score_clusters(labels[0], labels[0])
    assert (perfect.pairwise.f, perfect.bcubed.f, perfect.nmi) == pytest.approx((1, 1, 1))


@settings(max_examples=100, deadline=None)
@given(LABELS, st.integers(0, 5), st.integers(0, 5))
def test_merging_never_costs_recall_and_splitting_never_precision(labels: np.ndarray, a: int, b: int) -> None:
    truth, found = labels
    scores, merged = score_clusters(truth, found), score_clusters(truth, np.where(found == a, b, found))
    pure = score_clusters(truth, found * 6 + truth)
    for name in ("pairwise", "bcubed"):
        assert getattr(merged, name).recall >= getattr(scores, name).recall - 1e-12
        assert getattr(pure, name).precision == pytest.approx(1)
        assert getattr(pure, name).recall == pytest.approx(getattr(scores, name).recall)
    assert score_clusters(truth, np.zeros_like(truth)).pairwise.recall == 1
    assert score_clusters(truth, np.arange(len(truth))).bcubed.precision == pytest.approx(1)


def test_nothing_to_compare() -> None:
    none = np.empty(0, np.int64)
    scores = score_clusters(none, none)
    assert (scores.faces, scores.clusters, scores.largest) == (0, 0, 0)
    assert (scores.pairwise.f, scores.bcubed.f, scores.nmi) == (1, 1, 1)
    alone = score_clusters(np.arange(5), np.arange(5)[::-1])
    assert (alone.pairwise.precision, alone.pairwise.recall, alone.nmi) == (1, 1, pytest.approx(1))
    split = score_clusters(np.zeros(4, np.int64), np.arange(4))
    assert (split.pairwise.precision, split.pairwise.recall, split.pairwise.f, split.nmi) == (1, 0, 0, 0)


def test_a_million_faces() -> None:
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 100_000, (2, 1_000_000))
    labels = np.where(rng.random(len(truth)) < 0.9, truth, found)
    scores, peak = measure_peak_bytes(lambda: score_clusters(truth, labels))
    assert peak < 10 * truth.nbytes, "a few arrays of a number per face, and no table of all pairs of clusters"
    assert scores.bcubed.f == pytest.approx(0.85, abs=0.05)
    whole = score_clusters(np.zeros(10**6, np.int64), np.zeros(10**6, np.int64))
    assert (whole.pairwise.f, whole.bcubed.f, whole.largest) == (1, 1, 10**6)


# --- a gallery -------------------------------------------------------------------------------------------------------

IDENTITIES = [*"aaabbbcc", None, "x", "x"]


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    """Eight labelled faces, one without a label, and a photo of two faces: face 10, the second, is the larger."""
    found = Gallery.create(str(tmp_path / "g"), CONTRACT)
    count = len(IDENTITIES)
    table = rows(np.zeros(count, int), Faces().draw(np.zeros(count, int), 1), 0)
    uris = [f"/p/{n}.jpg" for n in [*range(10), 9]]
    boxes = [[0, 0, 10, 10], None, *[[0, 0, 10, 10]] * 7, [0, 0, 5, 9], [3, 3, 9, 12]]
    columns: dict[str, Any] = {
        "face_id": range(count),
        "uri": uris,
        "identity": IDENTITIES,
        "face_index": [*[0] * 10, 1],
        "box": boxes,
    }
    for name, values in columns.items():
        kind = table.schema.field(name).type
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(list(values), kind))
    append(found, [table.slice(0, 4), table.slice(4, 6), table.slice(10)], "first")
    return Gallery(found.path)


def clusters(gallery: Gallery, ids: list[int | None], labels: list[int | None], path: Path | None = None) -> Path:
    path = path or Path(gallery.path, "reports", "cluster", "faces.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"face_id": pa.array(ids, pa.int64()), "cluster": pa.array(labels, pa.int64())}
    pq.write_table(pa.table({**columns, "uri": pa.array([f"/p/{n}.jpg" for n in ids])}), path)
    return path


def test_the_labels_of_the_gallery(gallery: Gallery) -> None:
    clusters(gallery, [*range(7), 8, 9, 10, None], [0, 0, 0, 1, 1, 1, 1, 2, 1, 3, 0])
    result = evaluate_clusters(gallery)
    scores = result.scores
    assert (scores.faces, scores.identities, scores.clusters, scores.singletons) == (8, 4, 3, 1)
    assert (result.left_out, result.without_cluster, result.without_label) == (1, 1, 1)
    assert (scores.pairwise.precision, scores.pairwise.recall) == (6 / 9, 1)
    found = result.to_dict()
    assert found["bcubed"]["recall"] == 1
    assert found["faces"] == 8
    assert found["left_out"] == 1


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_truth_by_uri(kind: str, gallery: Gallery, tmp_path: Path) -> None:
    clusters(gallery, list(range(11)), [0] * 4 + [1] * 5 + [2, 2])
    truth = pa.table({"uri": ["/p/0.jpg", "/p/4.jpg", "/p/9.jpg", "/p/8.jpg", "/no"], "identity": [*"abc", "", "d"]})
    path = tmp_path / f"truth.{kind}"
    pa.csv.write_csv(truth, path) if kind == "csv" else pq.write_table(truth, path)
    result = evaluate_clusters(gallery, truth=str(path))
    assert (result.scores.faces, result.scores.identities, result.scores.clusters) == (3, 3, 3)
    assert (result.left_out, result.without_cluster, result.without_label) == (1, 0, 7)


def test_a_truth_by_face(gallery: Gallery, tmp_path: Path) -> None:
    table = clusters(gallery, list(range(11)), [0] * 9 + [1, 2], tmp_path / "own.parquet")
    (tmp_path / "t.csv").write_text("face_id,identity\n9,NA\n10,007\n0,7\n0,7\n")
    result = evaluate_clusters(gallery, str(table), str(tmp_path / "t.csv"))
    assert (result.scores.faces, result.scores.identities, result.scores.pairwise.f) == (3, 3, 1)
    assert (result.left_out, result.without_label) == (0, 8)


TRUTHS = [
    ("", "cannot read the truth file"),
    ("identity\na\n", "needs the columns identity and face_id or uri; its columns are identity"),
    ("face_id,name\n1,a\n", "needs the columns"),
    ("face_id,identity\nfirst,a\n", "cannot read the truth file"),
    ("face_id,identity\n1,a\n1,b\n", "gives 1 two identities"),
    ("uri,identity\n/p/1.jpg,a\n/p/1.jpg,b\n", "gives '/p/1.jpg' two identities"),
    ("face_id,identity\n,a\n", "rows without a face_id"),
    ("face_id,identity\n1,\n", "no face has an identity in the truth file"),
    ("face_id,identity\n77,a\n", "no face in common"),
    ("uri,identity\n/other.jpg,a\n", "no face has an identity"),
    ("PAR1", "cannot read the truth file"),
]


@pytest.mark.parametrize(("text", "message"), TRUTHS)
def test_truths_that_cannot_be_used(text: str, message: str, gallery: Gallery, tmp_path: Path) -> None:
    clusters(gallery, [1, 2], [0, 0])
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        evaluate_clusters(gallery, truth=str(tmp_path / "t.csv"))


def test_tables_that_cannot_be_used(gallery: Gallery, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no cluster table: .*faces.parquet.*`facepipe cluster .*/g` makes one"):
        evaluate_clusters(gallery)
    clusters(gallery, [77, 78], [0, 0])
    with pytest.raises(EvaluationError, match="was made from other faces: none of its 2 face_ids"):
        evaluate_clusters(gallery)
    clusters(gallery, [1, 1, 2], [0, 1, 0])
    with pytest.raises(EvaluationError, match="keep one row per face"):
        evaluate_clusters(gallery)
    path = clusters(gallery, [8], [0])
    with pytest.raises(EvaluationError, match="no face in common"):
        evaluate_clusters(gallery)
    clusters(gallery, [], [])
    with pytest.raises(EvaluationError, match="holds no face"):
        evaluate_clusters(gallery)
    pq.write_table(pa.table({"face_id": [1], "label": [2]}), path)
    with pytest.raises(EvaluationError, match="has no column cluster; its columns are face_id, label"):
        evaluate_clusters(gallery)
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(EvaluationError, match="cannot read the cluster table"):
        evaluate_clusters(gallery)
    with pytest.raises(EvaluationError, match="no truth file"):
        evaluate_clusters(gallery, str(clusters(gallery, [1], [0])), str(tmp_path / "none.csv"))


def test_a_gallery_without_labels(tmp_path: Path) -> None:
    found = Gallery.create(str(tmp_path / "g"), CONTRACT)
    table = rows(np.zeros(3, int), Faces().draw(np.zeros(3, int), 1), 0)
    at = table.schema.get_field_index("identity")
    append(found, [table.set_column(at, "identity", pa.nulls(3, pa.string()))], "first")
    ids = table["face_id"].to_pylist()
    clusters(found, ids, [0, 0, 1])
    with pytest.raises(EvaluationError, match=r"no face has an identity in .*labels are needed"):
        evaluate_clusters(Gallery(found.path))
