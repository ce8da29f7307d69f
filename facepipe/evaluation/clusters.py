"""How well a clustering agrees with identities: pairwise and BCubed figures and NMI, from sparse contingency counts."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe import storage
from facepipe.errors import EvaluationError
from facepipe.evaluation.truth import LEFT_OUT, check_made_from, file_labels, gallery_labels, read_table
from facepipe.gallery import Gallery
from facepipe.types import Int64

_COLUMNS = {"face_id": pa.int64(), "cluster": pa.int64()}


@dataclass(frozen=True)
class Rates:
    """Precision, recall and their harmonic mean, 0 where both are 0."""

    precision: float
    recall: float
    f: float

    @classmethod
    def of(cls, right: float, found: float, true: float) -> "Rates":
        """From amounts: right of what was found, and of what is true. Of nothing, everything is right: 1."""
        return cls.mean(right / found if found else 1.0, right / true if true else 1.0)

    @classmethod
    def mean(cls, precision: float, recall: float) -> "Rates":
        """With F from the two."""
        both = precision + recall
        return cls(precision, recall, 2 * precision * recall / both if both else 0.0)


@dataclass(frozen=True)
class ClusterScores:
    """Agreement of clusters with identities.

    pairwise: over pairs of faces in one cluster (precision) and of one identity (recall); 1 where there is no such pair
    bcubed: the same share for each face, its own pair with itself included, then the mean over faces (Bagga, Baldwin
        1998; Amigó et al. 2009); 1 without faces
    nmi: mutual information over the arithmetic mean of both entropies; 1 where both are 0
    singletons: clusters of one face; largest: faces of the largest cluster
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

    Not scored are, left_out: clustered faces that are not the largest of a labelled photo; without_label: other
    clustered faces without a label; without_cluster: labelled faces that the table does not put into a cluster.
    """

    scores: ClusterScores
    left_out: int
    without_cluster: int
    without_label: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the scores are not nested."""
        found = asdict(self)
        return {**found.pop("scores"), **found}


def compare(truth: Int64, found: Int64) -> ClusterScores:
    """Scores of clusters (n,) int64 against identities (n,) int64; any integers. Time and memory as of sorting n."""
    a, b = _codes(truth), _codes(found)
    of_identity, of_cluster = np.bincount(a), np.bincount(b)
    keys, cells = np.unique(a * len(of_cluster) + b, return_counts=True)
    rows, columns = of_identity[keys // max(1, len(of_cluster))], of_cluster[keys % max(1, len(of_cluster))]
    return ClusterScores(
        faces=len(a),
        identities=len(of_identity),
        clusters=len(of_cluster),
        singletons=int((of_cluster == 1).sum()),
        largest=int(of_cluster.max(initial=0)),
        pairwise=Rates.of(_pairs(cells), _pairs(of_cluster), _pairs(of_identity)),
        bcubed=Rates.of(1.0, 1.0, 1.0) if not len(a) else _bcubed(cells, rows, columns),
        nmi=_nmi(cells, rows, columns, _entropy(of_identity), _entropy(of_cluster)),
    )


def evaluate_clusters(gallery: Gallery, table: str | None = None, truth: str | None = None) -> ClustersResult:
    """Compare a table of face_id and cluster (default: that of `facepipe cluster`) with the gallery's labels.

    truth: a CSV or Parquet file with `identity` and `face_id` or `uri` instead. Of a photo with several faces only the
    largest counts, unless the truth names faces. Raises EvaluationError where there is nothing to compare.
    """
    path = table or storage.join(gallery.path, "reports", "cluster", "faces.parquet")
    rows = read_table(path, _COLUMNS, "cluster table", f"`facepipe cluster {gallery.path}` makes one")
    rows = rows.filter(rows["cluster"].is_valid())
    ids, clusters = (rows[name].to_numpy() for name in _COLUMNS)
    check_made_from(gallery, ids, path, "cluster table")
    labels = file_labels(gallery, truth) if truth else gallery_labels(gallery)
    where = f"the truth file {truth!r}" if truth else f"{gallery.path!r}"
    nobody = labels.names.get("", -1)
    labelled = int(((labels.codes >= 0) & (labels.codes != nobody)).sum())
    if not labelled:
        raise EvaluationError(f"no face has an identity in {where}: labels are needed to judge clusters")
    codes = labels.of(ids)
    known = (codes >= 0) & (codes != nobody)
    if not known.any():
        raise EvaluationError(f"the cluster table {path!r} and the labels of {where} have no face in common")
    left_out, together = codes == LEFT_OUT, int(known.sum())
    return ClustersResult(
        compare(codes[known], clusters[known]),
        left_out=int(left_out.sum()),
        without_cluster=labelled - together,
        without_label=int((~known & ~left_out).sum()),
    )


def _codes(labels: Int64) -> Int64:
    return np.asarray(np.unique(labels, return_inverse=True)[1], np.int64)


def _pairs(sizes: Int64) -> float:
    return float((sizes * (sizes - 1) // 2).sum())


def _bcubed(cells: Int64, rows: Int64, columns: Int64) -> Rates:
    """From the faces of every non-empty cell of the contingency table, of its identity and of its cluster."""
    n, squares = cells.sum(), cells.astype(np.float64) ** 2
    return Rates.mean(float((squares / columns).sum() / n), float((squares / rows).sum() / n))


def _nmi(cells: Int64, rows: Int64, columns: Int64, *entropies: float) -> float:
    if not sum(entropies):
        return 1.0
    n = cells.sum()
    shared = (cells / n * (np.log(cells) + np.log(n) - np.log(rows) - np.log(columns))).sum()
    return float(np.clip(2 * shared / sum(entropies), 0, 1))


def _entropy(sizes: Int64) -> float:
    """In nats."""
    shares = sizes / max(1, sizes.sum())
    return float(-(shares * np.log(shares)).sum()) + 0.0
