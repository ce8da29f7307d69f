"""Measure how well the decisions on a gallery's labels find the wrong ones, against a file of right ones."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe import storage
from facepipe.errors import EvaluationError
from facepipe.evaluation.clusters import Rates
from facepipe.evaluation.truth import LEFT_OUT, check_same_gallery, encode_names, read_face_table, read_truth_file
from facepipe.gallery import Gallery
from facepipe.types import Bool, Float64, Int64

DECISIONS = ("keep", "outlier", "relabel", "duplicate", "low_quality", "review", "bystander", "unverified")
# Labels with these decisions are flagged; so is a review with more noise than _SUSPECT_NOISE.
_FLAGS = ("outlier", "relabel", "bystander")
_SUSPECT_NOISE = 0.5
# Decisions that ask a person, or that nothing could be compared for: they are not counted as errors.
_OPEN = ("review", "bystander", "unverified")
# Bounds of the bins of the reliability curve.
NOISE_BINS = (0.0, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 1.0)
_COLUMNS = {
    "face_id": pa.int64(),
    "identity": pa.string(),
    "decision": pa.string(),
    "suggested": pa.string(),
    "noise": pa.float32(),
}
_LATER_COLUMNS = {"suggested_probability": pa.float32()}


@dataclass(frozen=True)
class LabelDecisions:
    """Decisions on n labels, with the truth.

    Attributes:
        given: Code of the identity that the label gives, (n,).
        true: Code of the true identity, (n,).
        suggested: Code of the suggested identity, (n,), -1 for none.
        decision: Index into DECISIONS, (n,).
        noise: Probability that the label is wrong, (n,).
        suggested_probability: Probability that the suggestion is right, (n,). NaN if it is not known.
    """

    given: Int64
    true: Int64
    suggested: Int64
    decision: Int64
    noise: Float64
    suggested_probability: Float64


@dataclass(frozen=True)
class ReliabilityBin:
    """Labels whose probability of being wrong is in one range.

    Attributes:
        low: Lowest probability.
        high: Highest probability, not included but in the last bin.
        labels: Number of labels.
        expected: How many of them are wrong by their probabilities.
        wrong: How many are wrong.
    """

    low: float
    high: float
    labels: int
    expected: float
    wrong: int


@dataclass(frozen=True)
class CleanResult:
    """Figures of the faces that have a label, a decision and a truth. A label is wrong if it is not the true one.

    Attributes:
        faces: Number of these faces.
        wrong: Number of wrong labels.
        flagged: Labels decided outlier, relabel or bystander, or review with a noise above 0.5.
        detection: How well flagging finds the wrong labels.
        average_precision: The same by noise, None if no label is wrong.
        repaired: Share of the wrong labels that are relabelled rightly, None if no label is wrong.
        relabels_right: Share of the relabels whose suggestion is right, None without relabels.
        errors: Wrong decisions: kept wrong labels, outliers with a right label, and wrong suggestions. Labels to
            review, bystanders and unverified labels are not decided.
        expected_errors: Number of errors that the probabilities themselves predict.
        reliability: Labels by their probability of being wrong, without bystanders.
        counts: Faces by decision, and by whether the label was right or wrong.
        left_out: Decided faces that are not the largest of a photo that the truth names by uri. Like the following,
            they are not counted above.
        without_truth: Other decided faces without a truth.
        without_label: Other decided faces without a label.
        without_decision: Faces of the truth without a decision.
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
    reliability: list[ReliabilityBin]
    counts: dict[str, dict[str, int]]
    left_out: int = 0
    without_truth: int = 0
    without_label: int = 0
    without_decision: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON."""
        return asdict(self)


def evaluate_clean(gallery: Gallery, truth: str, table: str | None = None) -> CleanResult:
    """Measure a table of decisions by a truth file.

    Args:
        gallery: the gallery.
        truth: path of a CSV or Parquet file with the right `identity`, empty if the face belongs to nobody in the set,
            and `face_id` or `uri`. By uri only the largest face of a photo counts.
        table: path of the table of decisions, by default that of `facepipe clean`.

    Raises:
        EvaluationError: if there is nothing to compare.
    """
    # Read the decisions, and check that they are on faces of this gallery.
    path = table or storage.join(gallery.path, "reports", "clean", "decisions.parquet")
    remedy = f"`facepipe clean {gallery.path}` makes one"
    rows = read_face_table(path, _COLUMNS, "table of decisions", remedy, _LATER_COLUMNS)
    ids = rows["face_id"].to_numpy()
    check_same_gallery(gallery, ids, path, "table of decisions")
    # Encode all identities with one set of codes; "" stands for no identity.
    labels = read_truth_file(gallery, truth)
    names = dict(labels.names)
    no_identity = names.setdefault("", len(names))
    true = labels.look_up(ids)
    given = encode_names(rows["identity"], names)
    suggested = encode_names(rows["suggested"], names)
    suggested[suggested == no_identity] = -1
    # Score faces with a true and a given identity; a suggestion may be missing.
    is_known = (true >= 0) & (given >= 0) & (given != no_identity)
    if not is_known.any():
        raise EvaluationError(
            f"the table of decisions {path!r} and the truth file {truth!r} have no labelled face in common"
        )
    decision = _encode_decisions(rows["decision"], path)
    noise = np.nan_to_num(rows["noise"].fill_null(0).to_numpy().astype(np.float64))
    certainty = rows["suggested_probability"].to_numpy().astype(np.float64)  # null becomes NaN
    decisions = LabelDecisions(
        given=given[is_known],
        true=true[is_known],
        suggested=suggested[is_known],
        decision=decision[is_known],
        noise=noise[is_known],
        suggested_probability=certainty[is_known],
    )
    # Count the faces that are not scored, by reason.
    return replace(
        score_decisions(decisions),
        left_out=int((true == LEFT_OUT).sum()),
        without_truth=int((true == -1).sum()),
        without_label=int(((true >= 0) & ~is_known).sum()),
        without_decision=int((labels.codes >= 0).sum() - (true >= 0).sum()),
    )


def score_decisions(decisions: LabelDecisions) -> CleanResult:
    """Compute all figures of decisions."""
    noise = decisions.noise
    is_wrong = decisions.given != decisions.true
    is_relabel = decisions.decision == DECISIONS.index("relabel")
    is_right_relabel = is_relabel & (decisions.suggested == decisions.true)
    # Flagged are two decisions, and reviews of labels that are probably wrong.
    is_flagged = np.isin(decisions.decision, [DECISIONS.index(name) for name in _FLAGS])
    is_flagged |= (decisions.decision == DECISIONS.index("review")) & (noise > _SUSPECT_NOISE)
    # A decision is wrong if it keeps a wrong label, drops a right one, or suggests a wrong one.
    is_decided = ~np.isin(decisions.decision, [DECISIONS.index(name) for name in _OPEN])
    is_outlier = decisions.decision == DECISIONS.index("outlier")
    is_error = np.where(is_relabel, ~is_right_relabel, is_wrong != is_outlier)
    # Tables of older versions do not say how sure a suggestion is.
    certainty = np.where(np.isnan(decisions.suggested_probability), noise, decisions.suggested_probability)
    expected = np.where(is_relabel, 1 - certainty, np.where(is_outlier, 1 - noise, noise))
    is_counted = decisions.decision != DECISIONS.index("bystander")
    return CleanResult(
        faces=len(is_wrong),
        wrong=int(is_wrong.sum()),
        flagged=int(is_flagged.sum()),
        detection=Rates.from_counts(int((is_wrong & is_flagged).sum()), int(is_flagged.sum()), int(is_wrong.sum())),
        average_precision=compute_average_precision(is_wrong, noise),
        repaired=_compute_share(is_wrong & is_right_relabel, is_wrong),
        relabels_right=_compute_share(is_right_relabel, is_relabel),
        errors=int((is_error & is_decided).sum()),
        expected_errors=float(expected[is_decided].sum()),
        reliability=_bin_by_noise(noise[is_counted], is_wrong[is_counted]),
        counts=_count_by_decision(decisions.decision, is_wrong),
    )


def _bin_by_noise(noise: Float64, is_wrong: Bool) -> list[ReliabilityBin]:
    """Count labels by their probability of being wrong. Empty bins are left out."""
    bins = np.minimum(np.digitize(noise, NOISE_BINS) - 1, len(NOISE_BINS) - 2)
    result = []
    for number in np.unique(bins).tolist():
        inside = bins == number
        result.append(
            ReliabilityBin(
                low=NOISE_BINS[number],
                high=NOISE_BINS[number + 1],
                labels=int(inside.sum()),
                expected=float(noise[inside].sum()),
                wrong=int(is_wrong[inside].sum()),
            )
        )
    return result


def compute_average_precision(is_wrong: Bool, noise: Float64) -> float | None:
    """Compute the mean precision over the steps of recall, from the largest noise down.

    Faces of equal noise are one step. It is None if no label is wrong.
    """
    if not is_wrong.any():
        return None
    # Sort by falling noise; `lasts` (s,) is the position of the last face of each step.
    order = np.argsort(-noise, kind="stable")
    lasts = np.append(np.flatnonzero(np.diff(noise[order])), len(order) - 1)
    hits = np.cumsum(is_wrong[order])[lasts]
    # The precision of each step, weighted by the wrong labels that the step adds.
    return float((np.diff(hits, prepend=0) * hits / (lasts + 1)).sum() / hits[-1])


def _compute_share(part: Bool, whole: Bool) -> float | None:
    return float(part.sum() / whole.sum()) if whole.any() else None


def _count_by_decision(decision: Int64, is_wrong: Bool) -> dict[str, dict[str, int]]:
    # Two cells per decision: the even one counts right labels, the odd one wrong ones.
    cells = np.bincount(2 * decision + is_wrong, minlength=2 * len(DECISIONS)).reshape(-1, 2).tolist()
    return {name: {"right": right, "wrong": wrong} for name, (right, wrong) in zip(DECISIONS, cells, strict=True)}


def _encode_decisions(column: pa.ChunkedArray, path: str) -> Int64:
    """Encode decisions as indices into DECISIONS (n,)."""
    codes = {name: code for code, name in enumerate(DECISIONS)}
    # Encoding adds unknown decisions to the codes, so that they can be named.
    decision = encode_names(column, codes)
    unknown = [repr(name) for name in codes if name not in DECISIONS]
    if (decision < 0).any():
        unknown.append("null")
    if unknown:
        raise EvaluationError(
            f"the table of decisions {path!r} holds the decisions {', '.join(unknown[:3])}; "
            f"known ones are {', '.join(DECISIONS)}"
        )
    return decision
