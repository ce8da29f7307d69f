"""How well the decisions on a gallery's labels find the wrong ones, against a file of right ones."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe import storage
from facepipe.errors import EvaluationError
from facepipe.evaluation.clusters import Rates
from facepipe.evaluation.truth import LEFT_OUT, check_made_from, encode, file_labels, read_table
from facepipe.gallery import Gallery
from facepipe.types import Bool, Float64, Int64

DECISIONS = ("keep", "outlier", "relabel", "duplicate", "low_quality", "review")
_FLAGS = ("outlier", "relabel")
_SUSPECT = 0.5
_COLUMNS = {
    "face_id": pa.int64(),
    "identity": pa.string(),
    "decision": pa.string(),
    "suggested": pa.string(),
    "noise": pa.float32(),
}


@dataclass(frozen=True)
class Decisions:
    """n decisions on labels: codes of the identities given, true and suggested (-1: none), places in DECISIONS, noise.

    noise: float64 (n,), the probability that the given label is wrong.
    """

    given: Int64
    true: Int64
    suggested: Int64
    decision: Int64
    noise: Float64


@dataclass(frozen=True)
class CleanResult:
    """Figures of the faces that have a label, a decision and a truth; a label is wrong where it is not the true one.

    flagged: decided outlier or relabel, or review with a noise above 0.5
    detection: of the wrong labels, by being flagged; average_precision: by noise, None where no label is wrong
    repaired: share of the wrong labels that are relabelled rightly, None where no label is wrong
    relabels_right: share of the relabels whose suggestion is right, None without relabels
    errors: flagged right labels and unflagged wrong ones; expected_errors: as many as the noise itself predicts
    counts: faces by decision, and by whether the label given was right or wrong

    Not counted are, left_out: decided faces that are not the largest of a photo that the truth names by uri;
    without_truth and without_label: other decided faces that lack it; without_decision: faces of the truth.
    """

    faces: int
    wrong: int
    flagged: int
    detection: Rates
    average_precision: float | None
    repaired: float | None
    relabels_right: float | None
    errors: int
    expected_errors: float
    counts: dict[str, dict[str, int]]
    left_out: int = 0
    without_truth: int = 0
    without_label: int = 0
    without_decision: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate_clean(gallery: Gallery, truth: str, table: str | None = None) -> CleanResult:
    """Judge a table of decisions (default: that of `facepipe clean`) by a truth file.

    truth: CSV or Parquet with the right `identity`, empty where the face belongs to nobody in the set, and `face_id` or
    `uri`; by uri only the largest face of a photo counts. Raises EvaluationError where there is nothing to compare.
    """
    path = table or storage.join(gallery.path, "reports", "clean", "decisions.parquet")
    rows = read_table(path, _COLUMNS, "table of decisions", f"`facepipe clean {gallery.path}` makes one")
    ids = rows["face_id"].to_numpy()
    check_made_from(gallery, ids, path, "table of decisions")
    labels = file_labels(gallery, truth)
    names = dict(labels.names)
    nobody = names.setdefault("", len(names))
    true, given, suggested = labels.of(ids), encode(rows["identity"], names), encode(rows["suggested"], names)
    known = (true >= 0) & (given >= 0) & (given != nobody)
    if not known.any():
        raise EvaluationError(
            f"the table of decisions {path!r} and the truth file {truth!r} have no labelled face in common"
        )
    suggested[suggested == nobody] = -1
    noise = np.nan_to_num(rows["noise"].fill_null(0).to_numpy().astype(np.float64))
    columns = (given, true, suggested, _places(rows["decision"], path), noise)
    return replace(
        judge(Decisions(*(column[known] for column in columns))),
        left_out=int((true == LEFT_OUT).sum()),
        without_truth=int((true == -1).sum()),
        without_label=int(((true >= 0) & ~known).sum()),
        without_decision=int((labels.codes >= 0).sum() - (true >= 0).sum()),
    )


def judge(found: Decisions) -> CleanResult:
    """All figures of n decisions."""
    wrong, relabel = found.given != found.true, found.decision == DECISIONS.index("relabel")
    flagged = np.isin(found.decision, [DECISIONS.index(name) for name in _FLAGS])
    flagged |= (found.decision == DECISIONS.index("review")) & (found.noise > _SUSPECT)
    right_relabel = relabel & (found.suggested == found.true)
    return CleanResult(
        faces=len(wrong),
        wrong=int(wrong.sum()),
        flagged=int(flagged.sum()),
        detection=Rates.of(int((wrong & flagged).sum()), int(flagged.sum()), int(wrong.sum())),
        average_precision=average_precision(wrong, found.noise),
        repaired=_share(wrong & right_relabel, wrong),
        relabels_right=_share(right_relabel, relabel),
        errors=int((wrong != flagged).sum()),
        expected_errors=float(np.where(flagged, 1 - found.noise, found.noise).sum()),
        counts=_counts(found.decision, wrong),
    )


def average_precision(wrong: Bool, noise: Float64) -> float | None:
    """Mean precision over the steps of recall, from the largest noise down; faces of equal noise are one step."""
    if not wrong.any():
        return None
    order = np.argsort(-noise, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(noise[order])), len(order) - 1)
    hits = np.cumsum(wrong[order])[ends]
    return float((np.diff(hits, prepend=0) * hits / (ends + 1)).sum() / hits[-1])


def _share(part: Bool, whole: Bool) -> float | None:
    return float(part.sum() / whole.sum()) if whole.any() else None


def _counts(decision: Int64, wrong: Bool) -> dict[str, dict[str, int]]:
    cells = np.bincount(2 * decision + wrong, minlength=2 * len(DECISIONS)).reshape(-1, 2).tolist()
    return {name: {"right": right, "wrong": false} for name, (right, false) in zip(DECISIONS, cells, strict=True)}


def _places(column: pa.ChunkedArray, path: str) -> Int64:
    names = {name: n for n, name in enumerate(DECISIONS)}
    places = encode(column, names)
    unknown = [repr(name) for name in names if name not in DECISIONS] + ["null"] * int((places < 0).any())
    if unknown:
        raise EvaluationError(
            f"the table of decisions {path!r} holds the decisions {', '.join(unknown[:3])}; "
            f"known ones are {', '.join(DECISIONS)}"
        )
    return places
