"""Scores of decisions on labels: by counting, by scikit-learn's definition of average precision, and from files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.errors import EvaluationError
from facepipe.evaluation.cleaning import (
    DECISIONS,
    LabelDecisions,
    compute_average_precision,
    evaluate_clean,
    score_decisions,
)
from facepipe.gallery import Gallery

FACE = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(-1, 3), st.integers(0, 7), st.integers(0, 8))
FACES = st.lists(FACE, min_size=1, max_size=40)


def decisions(faces: list[tuple[int, int, int, int, int]]) -> LabelDecisions:
    given_, true, suggested, decision, noise = np.array(faces, np.int64).T
    return LabelDecisions(given_, true, suggested, decision, noise / 8, np.full(len(noise), np.nan))


def share(part: list[Any], whole: list[Any]) -> float | None:
    return len(part) / len(whole) if whole else None


@settings(max_examples=200, deadline=None)
@given(FACES)
def test_figures_are_what_counting_says(faces: list[tuple[int, int, int, int, int]]) -> None:
    result = score_decisions(decisions(faces))
    flags = ("outlier", "relabel", "bystander")
    flagged = [f for f in faces if DECISIONS[f[3]] in flags or (f[3] == 5 and f[4] / 8 > 0.5)]
    wrong = [f for f in faces if f[0] != f[1]]
    found = [f for f in flagged if f[0] != f[1]]
    relabels = [f for f in faces if DECISIONS[f[3]] == "relabel"]
    assert (result.faces, result.wrong, result.flagged) == (len(faces), len(wrong), len(flagged))
    assert result.detection.precision == (1 if not flagged else len(found) / len(flagged))
    assert result.detection.recall == (1 if not wrong else len(found) / len(wrong))
    assert result.relabels_right == share([f for f in relabels if f[1] == f[2]], relabels)
    assert result.repaired == share([f for f in relabels if f[1] == f[2] and f[0] != f[1]], wrong)
    kept = [f for f in wrong if DECISIONS[f[3]] in ("keep", "duplicate", "low_quality")]
    lost = [f for f in faces if DECISIONS[f[3]] == "outlier" and f[0] == f[1]]
    assert result.errors == len(kept) + len(lost) + len([f for f in relabels if f[1] != f[2]])
    counted = [f for f in faces if DECISIONS[f[3]] != "bystander"]
    assert sum(entry.labels for entry in result.reliability) == len(counted)
    for entry in result.reliability:
        inside = [f for f in counted if entry.low <= f[4] / 8 < entry.high or f[4] / 8 == entry.high == 1]
        assert entry.labels == len(inside) > 0
        assert entry.wrong == len([f for f in inside if f[0] != f[1]])
        assert entry.expected == pytest.approx(sum(f[4] / 8 for f in inside))
    counts = {name: {"right": 0, "wrong": 0} for name in DECISIONS}
    for face in faces:
        counts[DECISIONS[face[3]]]["right" if face[0] == face[1] else "wrong"] += 1
    assert result.counts == counts
    assert 0 <= result.expected_errors <= len(faces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=30))
def test_average_precision_is_the_sum_over_thresholds(pairs: list[tuple[bool, int]]) -> None:
    wrong, noise = np.array([w for w, _ in pairs]), np.array([n / 6 for _, n in pairs])
    found = compute_average_precision(wrong, noise)
    if not wrong.any():
        assert found is None
        return
    total = recall = 0.0
    for threshold in np.unique(noise)[::-1]:
        above = noise >= threshold
        step = wrong[above].sum() / wrong.sum()
        total, recall = total + (step - recall) * wrong[above].mean(), step
    assert found == pytest.approx(total)
    assert compute_average_precision(wrong, wrong.astype(float)) == 1


def test_a_calibrated_noise_predicts_the_errors() -> None:
    rng = np.random.default_rng(0)
    noise = rng.random(100_000)
    wrong = rng.random(len(noise)) < noise
    zeros = np.zeros(len(noise), np.int64)
    result = score_decisions(
        LabelDecisions(zeros, wrong.astype(np.int64), zeros - 1, np.where(noise > 0.7, 1, 0), noise, noise)
    )
    assert result.expected_errors == pytest.approx(result.errors, rel=0.02)


# --- a gallery -------------------------------------------------------------------------------------------------------


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    """Seven faces; 5 and 6 stand in one photo, and 6 is the larger."""
    found = Gallery.create(str(tmp_path / "g"), CONTRACT)
    table = rows(np.zeros(7, int), Faces().draw(np.zeros(7, int), 1), 0)
    columns: dict[str, Any] = {
        "face_id": range(7),
        "uri": [f"{n}.jpg" for n in [*range(6), 5]],
        "box": [[0, 0, 9, 9]] * 6 + [[0, 0, 99, 99]],
    }
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array(list(values), table.schema.field(name).type))
    append(found, [table], "first")
    return Gallery(found.path)


def write(gallery: Gallery, **changed: list[Any]) -> Path:
    path = Path(gallery.path, "reports", "clean", "decisions.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {
        "face_id": list(range(7)),
        "uri": [f"{n}.jpg" for n in [*range(6), 5]],
        "identity": ["a", "a", "b", "b", "b", "c", "c"],
        "decision": ["keep", "relabel", "outlier", "review", "relabel", "duplicate", "low_quality"],
        "suggested": [None, "b", None, None, "", None, None],
        "noise": [0.1, 0.9, 0.8, 0.6, 0.7, None, float("nan")],
        **changed,
    }
    types = {"face_id": pa.int64(), "noise": pa.float32()}
    arrays = {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path)
    return path


def truth(tmp_path: Path, text: str) -> str:
    (tmp_path / "truth.csv").write_text(text)
    return str(tmp_path / "truth.csv")


def test_a_truth_by_face(gallery: Gallery, tmp_path: Path) -> None:
    write(gallery)
    result = evaluate_clean(gallery, truth(tmp_path, "face_id,identity\n0,a\n1,b\n2,\n3,b\n4,\n5,c\n6,d\n99,a\n"))
    assert (result.faces, result.wrong, result.flagged) == (7, 4, 4)
    assert (result.detection.precision, result.detection.recall) == (3 / 4, 3 / 4)
    assert (result.repaired, result.relabels_right) == (1 / 4, 1 / 2), "nobody is no suggestion"
    assert result.errors == 2
    assert result.expected_errors == pytest.approx(0.1 + 0.1 + 0.2 + 0.3), "what is reviewed is not decided"
    assert result.counts["relabel"] == {"right": 0, "wrong": 2}
    assert result.counts["low_quality"] == {"right": 0, "wrong": 1}
    assert (result.left_out, result.without_truth, result.without_label, result.without_decision) == (0, 0, 0, 1)
    assert result.to_dict()["detection"]["f"] == 3 / 4


def test_a_truth_by_photo(gallery: Gallery, tmp_path: Path) -> None:
    write(gallery, identity=["a", None, "", "b", "b", "c", "c"])
    result = evaluate_clean(gallery, truth(tmp_path, "uri,identity\n0.jpg,a\n1.jpg,b\n2.jpg,x\n5.jpg,d\n"))
    assert (result.faces, result.wrong, result.flagged) == (2, 1, 0)
    assert (result.left_out, result.without_truth, result.without_label, result.without_decision) == (1, 2, 2, 0)
    assert result.relabels_right is None
    right = evaluate_clean(gallery, truth(tmp_path, "uri,identity\n0.jpg,a\n"))
    assert (right.average_precision, right.repaired, right.detection.f) == (None, None, 1)


def test_what_cannot_be_used(gallery: Gallery, tmp_path: Path) -> None:
    path = truth(tmp_path, "face_id,identity\n0,a\n")
    with pytest.raises(EvaluationError, match=r"no table of decisions: .*`facepipe clean .*/g` makes one"):
        evaluate_clean(gallery, path)
    write(gallery, decision=["keep"] * 6 + ["burn"])
    with pytest.raises(EvaluationError, match="holds the decisions 'burn'; known ones are keep, outlier"):
        evaluate_clean(gallery, path)
    write(gallery, decision=["keep"] * 6 + [None])
    with pytest.raises(EvaluationError, match="holds the decisions null"):
        evaluate_clean(gallery, path)
    write(gallery, face_id=list(range(70, 77)))
    with pytest.raises(EvaluationError, match="was made from other faces"):
        evaluate_clean(gallery, path)
    table = write(gallery)
    with pytest.raises(EvaluationError, match="no labelled face in common"):
        evaluate_clean(gallery, truth(tmp_path, "face_id,identity\n99,a\n"), str(table))
    pq.write_table(pq.read_table(table).drop_columns(["noise", "uri"]), table)
    with pytest.raises(EvaluationError, match="is not a table of decisions: it has no column noise"):
        evaluate_clean(gallery, path)
