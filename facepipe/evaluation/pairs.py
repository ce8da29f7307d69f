"""Measure verification on pairs of images that a gallery holds: LFW's View 2 protocol, and the same for any pairs."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.errors import EvaluationError, MissingPackageError
from facepipe.evaluation.groups import GroupFigures, compare_groups, find_group
from facepipe.evaluation.pairs_file import Pair, read_pairs
from facepipe.evaluation.roc import (
    RocCurve,
    compute_auc,
    compute_equal_error_rate,
    compute_roc,
    cross_validate,
    find_best_threshold,
    find_tar_at_far,
)
from facepipe.extras import describe_missing
from facepipe.gallery import Gallery
from facepipe.storage.outputs import save_figure
from facepipe.types import Bool, Float32, Float64, Int64

FARS = (1e-1, 1e-2, 1e-3, 1e-4)
MAX_DISTANCE = 2.0  # of two unit vectors: an image without a face matches nothing
# Weight of the squared distance from the centre against the area, both in square pixels.
_CENTRE_WEIGHT = 2.0


@dataclass(frozen=True)
class PairsResult:
    """Figures of an evaluation on pairs. Distances are Euclidean, between unit vectors.

    Attributes:
        pairs: Number of pairs.
        folds: Number of folds.
        without_face: Pairs with an image in which no face was found. They count as different.
        accuracy: Mean over folds, each at the threshold chosen on the others.
        standard_error: Standard error of that mean.
        threshold: Distance of the highest accuracy over all pairs.
        auc: Area under the ROC curve.
        eer: Equal error rate.
        tar: True accept rate by FAR. None if there are fewer than 1 / FAR impostor pairs, too few for that FAR.
        thresholds: Distance by FAR.
        groups: Figures per group of people, at these thresholds; empty if they are not asked for.
        across: Pairs of two groups, or of none.
    """

    pairs: int
    folds: int
    without_face: int
    accuracy: float
    standard_error: float
    threshold: float
    auc: float
    eer: float
    tar: dict[str, float | None]
    thresholds: dict[str, float | None]
    groups: list[GroupFigures] = field(default_factory=list)
    across: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON."""
        return asdict(self)


def evaluate_pairs(
    gallery: Gallery, path: str | os.PathLike[str], picture: str | None = None, group_level: int | None = None
) -> PairsResult:
    """Evaluate a pairs file on a gallery.

    Args:
        gallery: a gallery with the images of the pairs.
        path: the pairs file.
        picture: file to draw the ROC curve to (.png or .svg).
        group_level: which folder above an image is its group, as in `find_group`; None for no groups.

    Raises:
        EvaluationError: if an image is missing, or if the pairs are all of one kind.
    """
    return evaluate_list(gallery, read_pairs(path), repr(os.fspath(path)), picture, group_level)


def evaluate_list(
    gallery: Gallery, pairs: list[Pair], origin: str, picture: str | None = None, group_level: int | None = None
) -> PairsResult:
    """Evaluate pairs on a gallery.

    Args:
        gallery: a gallery with the images of the pairs.
        pairs: the pairs.
        origin: where they come from, for messages.
        picture: file to draw the ROC curve to (.png or .svg).
        group_level: which folder above an image is its group, as in `find_group`; None for no groups.

    Raises:
        EvaluationError: if an image is missing, or if the pairs are all of one kind.
    """
    names = {name for pair in pairs for name in (pair.left, pair.right)}
    rows = read_subject_rows(gallery, names, ["embedding", "uri"])
    vectors = {name: _to_vector(row["embedding"]) for name, row in rows.items()}
    missing = sorted(names - vectors.keys())
    if missing:
        raise EvaluationError(
            f"{len(missing)} images of {origin} are not in the gallery, such as {', '.join(missing[:3])}; "
            "embed the folder they are in first"
        )
    # Score the pairs. An image without a face is as far as possible from any other.
    distances = np.array([_compute_distance(vectors[pair.left], vectors[pair.right]) for pair in pairs])
    same = np.array([pair.same for pair in pairs])
    if same.all() or not same.any():
        raise EvaluationError("the pairs are all of one kind: both same and different ones are needed")
    result = score_pairs(distances, same, np.array([pair.fold for pair in pairs]))
    if picture:
        draw_roc(compute_roc(distances, same), result, picture)
    if group_level is None:
        return result
    groups = {name: find_group(row["uri"], group_level) for name, row in rows.items()}
    left = [groups[pair.left] for pair in pairs]
    right = [groups[pair.right] for pair in pairs]
    figures = compare_groups(left, right, distances, same, result.thresholds)
    across = len(pairs) - sum(group.genuine + group.impostors for group in figures)
    return replace(result, groups=figures, across=across)


def score_pairs(distances: Float64, same: Bool, folds: Int64) -> PairsResult:
    """Compute all figures of pairs.

    Args:
        distances: distance of each pair, (n,).
        same: whether each pair shows one person, (n,).
        folds: fold of each pair, (n,).
    """
    curve = compute_roc(distances, same)
    cross = cross_validate(distances, same, folds)
    impostors = (~same).sum()
    tars: dict[str, float | None] = {}
    thresholds: dict[str, float | None] = {}
    for far in FARS:
        name = f"{far:g}"
        tars[name] = None
        thresholds[name] = None
        # Fewer impostors than 1 / FAR cannot show a single false accept.
        if impostors * far >= 1:
            tar, threshold = find_tar_at_far(curve, far)
            tars[name] = tar
            thresholds[name] = threshold if np.isfinite(threshold) else None
    return PairsResult(
        pairs=len(distances),
        folds=len(cross.accuracies),
        without_face=int((distances >= MAX_DISTANCE).sum()),
        accuracy=cross.mean,
        standard_error=cross.standard_error,
        threshold=find_best_threshold(distances, same),
        auc=compute_auc(curve),
        eer=compute_equal_error_rate(curve),
        tar=tars,
        thresholds=thresholds,
    )


def read_subject_vectors(gallery: Gallery, names: set[str]) -> dict[str, Float32 | None]:
    """Read the embedding of each named image's subject; None if it has no face.

    The subject is the face with the largest area less twice its squared distance from the image's centre. This is the
    rule by which LFW is aligned (D. Sandberg's facenet, align_dataset_mtcnn).

    Args:
        gallery: the gallery.
        names: ends of paths, without extension.
    """
    rows = read_subject_rows(gallery, names, ["embedding"])
    return {name: _to_vector(row["embedding"]) for name, row in rows.items()}


def _to_vector(values: list[float] | None) -> Float32 | None:
    return None if values is None else np.array(values, np.float32)


def read_subject_rows(gallery: Gallery, names: set[str], columns: list[str]) -> dict[str, dict[str, Any]]:
    """Read columns of each named image's subject, or of the row that says that the image has no face."""
    # The numbers of path parts that names have: as many last parts of a uri are looked up.
    depths = sorted({name.count("/") + 1 for name in names})
    best: dict[str, dict[str, Any]] = {}
    best_score: dict[str, float] = {}
    for batch in gallery.batches(sorted({"uri", "box", "width", "height", *columns})):
        for name, row in _iterate_named_rows(batch, names, depths):
            score = score_prominence(row)
            if name not in best or score > best_score[name]:
                best[name] = {column: row[column] for column in columns}
                best_score[name] = score
    return best


def _iterate_named_rows(
    batch: pa.RecordBatch, names: set[str], depths: list[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over the rows whose path ends in one of the names of so many parts, and the name."""
    for n, uri in enumerate(batch["uri"].to_pylist()):
        # A `#` separates an archive from its member, which is named as if it lay in a folder.
        parts = os.path.splitext(uri.replace("#", "/"))[0].split("/")
        for depth in depths:
            name = "/".join(parts[-depth:])
            if name in names:
                yield name, {column: batch[column][n].as_py() for column in batch.schema.names}


def score_prominence(row: dict[str, Any]) -> float:
    """Score how likely a face is the subject of its image; minus infinity without a face."""
    if row["box"] is None:
        return -np.inf
    x1, y1, x2, y2 = row["box"]
    off_centre = ((x1 + x2) / 2 - row["width"] / 2) ** 2 + ((y1 + y2) / 2 - row["height"] / 2) ** 2
    return float((x2 - x1) * (y2 - y1) - _CENTRE_WEIGHT * off_centre)


def _compute_distance(left: Float32 | None, right: Float32 | None) -> float:
    if left is None or right is None:
        return MAX_DISTANCE
    return float(np.linalg.norm(left.astype(np.float64) - right))


def draw_roc(curve: RocCurve, result: PairsResult, path: str) -> None:
    """Draw the ROC curve on a logarithmic FAR axis to a file.

    Raises:
        MissingPackageError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(describe_missing("matplotlib", "a picture")) from error
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    # A logarithmic axis has no zero.
    axes.plot(np.maximum(curve.far, 1e-5), curve.tar, drawstyle="steps-post")
    axes.set_xscale("log")
    # The first point accepts nothing, and would extend the axis to zero.
    axes.set(xlim=(1e-4, 1), ylim=(min(0.9, max(0.0, float(np.min(curve.tar[1:])))), 1.0))
    axes.set(xlabel="false accept rate", ylabel="true accept rate")
    axes.set_title(
        f"accuracy {result.accuracy:.4f} ± {result.standard_error:.4f}, AUC {result.auc:.4f}, EER {result.eer:.4f}",
        fontsize=9,
    )
    axes.grid(alpha=0.3, which="both")
    save_figure(figure, path)
