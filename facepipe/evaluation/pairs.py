"""Verification on pairs of images that a gallery holds: the LFW View 2 protocol, and the same figures for any pairs."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.errors import EvaluationError
from facepipe.evaluation.pairs_file import read_pairs
from facepipe.evaluation.roc import Curve, auc, best_threshold, cross_validate, equal_error_rate, roc, tar_at_far
from facepipe.gallery import Gallery
from facepipe.types import Bool, Float32, Float64, Int64

FARS = (1e-1, 1e-2, 1e-3, 1e-4)
FARTHEST = 2.0  # the largest distance of two unit vectors: an image without a face matches nothing
_CENTRE_WEIGHT = 2.0


@dataclass(frozen=True)
class PairsResult:
    """Figures of a pairs evaluation; distances are Euclidean between unit vectors.

    accuracy is the mean over folds, each at the threshold chosen on the others, with the standard error of that mean.
    tar: by FAR; None where the impostor pairs are too few for that FAR to mean anything (fewer than 1 / FAR).
    without_face: pairs with an image in which no face was found, decided as different.
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

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate_pairs(gallery: Gallery, path: str | os.PathLike[str], picture: str | None = None) -> PairsResult:
    """Evaluate a pairs file on a gallery; `picture` is where to draw the ROC curve (.png or .svg)."""
    pairs = read_pairs(path)
    subjects = find_subjects(gallery, {name for pair in pairs for name in (pair.left, pair.right)})
    absent = sorted({name for pair in pairs for name in (pair.left, pair.right)} - subjects.keys())
    if absent:
        raise EvaluationError(
            f"{len(absent)} images of {os.fspath(path)!r} are not in the gallery, such as {', '.join(absent[:3])}; "
            "embed the folder they are in first"
        )
    distances = np.array([_distance(subjects[pair.left], subjects[pair.right]) for pair in pairs])
    same = np.array([pair.same for pair in pairs])
    if same.all() or not same.any():
        raise EvaluationError("the pairs are all of one kind: both same and different ones are needed")
    result = figures(distances, same, np.array([pair.fold for pair in pairs]))
    if picture:
        draw(roc(distances, same), result, picture)
    return result


def figures(distances: Float64, same: Bool, folds: Int64) -> PairsResult:
    """All figures from distances (n,), labels (n,) and fold numbers (n,)."""
    curve, cross = roc(distances, same), cross_validate(distances, same, folds)
    points = {f"{far:g}": tar_at_far(curve, far) if (~same).sum() * far >= 1 else (None, None) for far in FARS}
    return PairsResult(
        pairs=len(distances),
        folds=len(cross.accuracies),
        without_face=int((distances >= FARTHEST).sum()),
        accuracy=cross.mean,
        standard_error=cross.standard_error,
        threshold=best_threshold(distances, same),
        auc=auc(curve),
        eer=equal_error_rate(curve),
        tar={far: tar for far, (tar, _) in points.items()},
        thresholds={far: t if t is not None and np.isfinite(t) else None for far, (_, t) in points.items()},
    )


def find_subjects(gallery: Gallery, names: set[str]) -> dict[str, Float32 | None]:
    """The embedding of each named image's subject; None where it has no face. Names are path ends without extension.

    The subject is the face with the largest area less twice its squared distance from the image's centre, the rule by
    which LFW is aligned (D. Sandberg's facenet, align_dataset_mtcnn).
    """
    rows = subject_rows(gallery, names, ["embedding"])
    vectors = {name: row["embedding"] for name, row in rows.items()}
    return {name: None if vector is None else np.array(vector, np.float32) for name, vector in vectors.items()}


def subject_rows(gallery: Gallery, names: set[str], columns: list[str]) -> dict[str, dict[str, Any]]:
    """Those columns of each named image's subject, or of the row that says that the image has no face."""
    depths = sorted({name.count("/") + 1 for name in names})
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for batch in gallery.batches(sorted({"uri", "box", "width", "height", *columns})):
        for name, row in _named(batch, names, depths):
            score = _prominence(row)
            if name not in best or score > best[name][0]:
                best[name] = (score, {column: row[column] for column in columns})
    return {name: row for name, (_, row) in best.items()}


def _named(batch: pa.RecordBatch, names: set[str], depths: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    for n, uri in enumerate(batch["uri"].to_pylist()):
        parts = os.path.splitext(uri.replace("#", "/"))[0].split("/")
        for depth in depths:
            name = "/".join(parts[-depth:])
            if name in names:
                yield name, {column: batch[column][n].as_py() for column in batch.schema.names}


def _prominence(row: dict[str, Any]) -> float:
    if row["box"] is None:
        return -np.inf
    x1, y1, x2, y2 = row["box"]
    off = ((x1 + x2) / 2 - row["width"] / 2) ** 2 + ((y1 + y2) / 2 - row["height"] / 2) ** 2
    return float((x2 - x1) * (y2 - y1) - _CENTRE_WEIGHT * off)


def _distance(left: Float32 | None, right: Float32 | None) -> float:
    if left is None or right is None:
        return FARTHEST
    return float(np.linalg.norm(left.astype(np.float64) - right))


def draw(curve: Curve, result: PairsResult, path: str) -> None:
    """The ROC curve on a logarithmic FAR axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError("a picture needs matplotlib: pip install 'facepipe[report]'") from error
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.maximum(curve.far, 1e-5), curve.tar, drawstyle="steps-post")
    axes.set_xscale("log")
    axes.set(xlim=(1e-4, 1), ylim=(min(0.9, max(0.0, float(np.min(curve.tar[1:])))), 1.0))
    axes.set(xlabel="false accept rate", ylabel="true accept rate")
    axes.set_title(
        f"accuracy {result.accuracy:.4f} ± {result.standard_error:.4f}, AUC {result.auc:.4f}, EER {result.eer:.4f}",
        fontsize=9,
    )
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
