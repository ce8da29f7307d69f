"""Measure how well clusters agree with identities: pairwise and BCubed figures, and NMI, from contingency counts."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe import storage
from facepipe.errors import EvaluationError
from facepipe.evaluation.truth import (
    LEFT_OUT,
    check_same_gallery,
    read_face_table,
    read_gallery_labels,
    read_truth_file,
)
from facepipe.gallery import Gallery
from facepipe.types import Int64

_COLUMNS = {"face_id": pa.int64(), "cluster": pa.int64()}


@dataclass(frozen=True)
class Rates:
    """Precision, recall, and their harmonic mean.

    Attributes:
        precision: Precision.
        recall: Recall.
        f: Harmonic mean, 0 if both are 0.
    """

    precision: float
    recall: float
    f: float

    @classmethod
    def from_counts(cls, correct: float, selected: float, relevant: float) -> "Rates":
        """Compute rates from amounts. Of nothing, everything is correct: 1.

        Args:
            correct: amount that is both selected and relevant.
            selected: amount that was selected.
            relevant: amount that should be.
        """
        precision = correct / selected if selected else 1.0
        recall = correct / relevant if relevant else 1.0
        return cls.from_rates(precision, recall)

    @classmethod
    def from_rates(cls, precision: float, recall: float) -> "Rates":
        """Compute the harmonic mean of two rates."""
        total = precision + recall
        return cls(precision, recall, 2 * precision * recall / total if total else 0.0)


@dataclass(frozen=True)
class ClusterScores:
    """Agreement of clusters with identities.

    Attributes:
        faces: Number of faces.
        identities: Number of identities.
        clusters: Number of clusters.
        singletons: Clusters of one face.
        largest: Faces of the largest cluster.
        pairwise: Over pairs of faces in one cluster (precision) and of one identity (recall). 1 if there is no such
            pair.
        bcubed: The same share for each face, its pair with itself included, then the mean over faces (Bagga, Baldwin
            1998; Amigó et al. 2009). 1 without faces.
        nmi: Mutual information over the arithmetic mean of both entropies. 1 if both are 0.
    """

    faces: int
    identities: int
    clusters: int
    singletons: int
    largest: int
    pairwise: Rates
    bcubed: Rates
    nmi: float


@dataclass(frozen=True)
class ClustersResult:
    """Scores of the faces that have both a label and a cluster.

    Attributes:
        scores: The scores.
        left_out: Clustered faces that are not the largest of a labelled photo. They are not scored.
        without_cluster: Labelled faces that the table does not put into a cluster.
        without_label: Other clustered faces without a label.
    """

    scores: ClusterScores
    left_out: int
    without_cluster: int
    without_label: int

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON. The scores are not nested."""
        result = asdict(self)
        return {**result.pop("scores"), **result}


def score_clusters(identities: Int64, clusters: Int64) -> ClusterScores:
    """Score clusters (n,) against identities (n,), any integers. It takes time and memory as sorting n numbers does."""
    identities = _renumber(identities)
    clusters = _renumber(clusters)
    identity_sizes = np.bincount(identities)
    cluster_sizes = np.bincount(clusters)
    # The non-empty cells of the contingency table, and for each the sizes of its identity and its cluster.
    stride = max(1, len(cluster_sizes))
    keys, cells = np.unique(identities * len(cluster_sizes) + clusters, return_counts=True)
    rows = identity_sizes[keys // stride]
    columns = cluster_sizes[keys % stride]
    pairwise = Rates.from_counts(_count_pairs(cells), _count_pairs(cluster_sizes), _count_pairs(identity_sizes))
    return ClusterScores(
        faces=len(identities),
        identities=len(identity_sizes),
        clusters=len(cluster_sizes),
        singletons=int((cluster_sizes == 1).sum()),
        largest=int(cluster_sizes.max(initial=0)),
        pairwise=pairwise,
        bcubed=_compute_bcubed(cells, rows, columns) if len(identities) else Rates.from_counts(1.0, 1.0, 1.0),
        nmi=_compute_nmi(cells, rows, columns, _compute_entropy(identity_sizes) + _compute_entropy(cluster_sizes)),
    )


def evaluate_clusters(gallery: Gallery, table: str | None = None, truth: str | None = None) -> ClustersResult:
    """Compare a table of face_id and cluster with the gallery's labels, or with a truth file.

    Of a photo with several faces only the largest counts, unless the truth names faces.

    Args:
        gallery: the gallery.
        table: path of the table, by default that of `facepipe cluster`.
        truth: path of a CSV or Parquet file with `identity` and `face_id` or `uri`.

    Raises:
        EvaluationError: if there is nothing to compare.
    """
    # Read the clusters, and who the faces are.
    path = table or storage.join(gallery.path, "reports", "cluster", "faces.parquet")
    rows = read_face_table(path, _COLUMNS, "cluster table", f"`facepipe cluster {gallery.path}` makes one")
    rows = rows.filter(rows["cluster"].is_valid())
    ids = rows["face_id"].to_numpy()
    clusters = rows["cluster"].to_numpy()
    check_same_gallery(gallery, ids, path, "cluster table")
    labels = read_truth_file(gallery, truth) if truth else read_gallery_labels(gallery)
    where = f"the truth file {truth!r}" if truth else f"{gallery.path!r}"
    no_identity = labels.names.get("", -1)  # code of faces that belong to no identity
    labelled = int(((labels.codes >= 0) & (labels.codes != no_identity)).sum())
    if not labelled:
        raise EvaluationError(f"no face has an identity in {where}: labels are needed to judge clusters")
    # Score the faces that are in both, and count the others by reason.
    codes = labels.look_up(ids)
    is_known = (codes >= 0) & (codes != no_identity)
    if not is_known.any():
        raise EvaluationError(f"the cluster table {path!r} and the labels of {where} have no face in common")
    is_left_out = codes == LEFT_OUT
    return ClustersResult(
        score_clusters(codes[is_known], clusters[is_known]),
        left_out=int(is_left_out.sum()),
        without_cluster=labelled - int(is_known.sum()),
        without_label=int((~is_known & ~is_left_out).sum()),
    )


def _renumber(labels: Int64) -> Int64:
    return np.asarray(np.unique(labels, return_inverse=True)[1], np.int64)


def _count_pairs(sizes: Int64) -> float:
    return float((sizes * (sizes - 1) // 2).sum())


def _compute_bcubed(cells: Int64, rows: Int64, columns: Int64) -> Rates:
    """Compute BCubed figures from the faces of each non-empty cell, of its identity and of its cluster."""
    count = cells.sum()
    # Each face of a cell agrees with all faces of the cell: their sum is the cell squared.
    squares = cells.astype(np.float64) ** 2
    return Rates.from_rates(float((squares / columns).sum() / count), float((squares / rows).sum() / count))


def _compute_nmi(cells: Int64, rows: Int64, columns: Int64, entropies: float) -> float:
    if not entropies:
        return 1.0
    # Mutual information in nats, summed over the cells.
    count = cells.sum()
    shared = (cells / count * (np.log(cells) + np.log(count) - np.log(rows) - np.log(columns))).sum()
    return float(np.clip(2 * shared / entropies, 0, 1))


def _compute_entropy(sizes: Int64) -> float:
    """Compute the entropy of shares, in nats."""
    shares = sizes / max(1, sizes.sum())
    # Adding zero turns -0.0 into 0.0.
    return float(-(shares * np.log(shares)).sum()) + 0.0
