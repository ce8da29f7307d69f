"""Build the cluster report: suspected merges and splits first, then the largest clusters."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from facepipe.curation.clusters.review import SuspectedMerges, SuspectedSplits
from facepipe.curation.graph import Graph
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.describe import build_pair_histogram, describe_recall, describe_threshold
from facepipe.gallery import Gallery
from facepipe.reports.faces import FaceDetails, list_distances, read_face_details
from facepipe.reports.histogram import count_values, log_edges
from facepipe.reports.model import (
    Face,
    Figure,
    Group,
    Histogram,
    Mark,
    Report,
    ReviewTarget,
    Step,
)
from facepipe.reports.questions import build_pair_choices, list_review_steps
from facepipe.reports.top import BestMembers
from facepipe.types import Float32, Int64

# Faces that are shown of a cluster, and of each part of a suspect.
_FACES_PER_CLUSTER = 6
_FACES_PER_PART = 3
_MAX_SUSPECTS = 3000  # of each kind
_MAX_CLUSTERS = 1500
_UNKNOWN_FACE = FaceDetails("", None, None)


@dataclass(frozen=True)
class ClusterReview:
    """Everything that is known about k clusters of n nodes.

    Attributes:
        labels: Cluster of each node, (n,).
        clusters: The clusters.
        numbers: Public number of each cluster, (k,).
        fits: Mean similarity of each node to the rest of its cluster, (n,).
        medoids: Node that fits each cluster best, (k,).
        merges: Pairs of clusters that may be one person.
        splits: Clusters that may be two persons.
        algorithm: Name of the algorithm.
    """

    labels: Int64
    clusters: Clusters
    numbers: Int64
    fits: Float32
    medoids: Int64
    merges: SuspectedMerges
    splits: SuspectedSplits
    algorithm: str


def build_cluster_report(graph: Graph, gallery: Gallery, review: ClusterReview) -> Report:
    """Build the report of a clustering."""
    groups = _ClusterGroups(graph, gallery, review)
    info = graph.info
    sizes = review.clusters.size
    figures = (
        Figure("faces", f"{info.faces:,}"),
        Figure("clusters", f"{len(sizes):,}", f"{int((sizes == 1).sum()):,} of a single face"),
        Figure("largest cluster", f"{int(sizes.max(initial=0)):,}", "faces"),
        Figure("possibly one person", f"{len(review.merges):,}", "pairs of clusters"),
        Figure("possibly two persons", f"{len(review.splits):,}", "clusters"),
    )
    details = (
        Figure("threshold", f"{info.distance:.3f}", describe_threshold(info)),
        Figure("edge recall", f"{info.recall:.4f}", describe_recall(info)),
    )
    notes = (
        "A merge is suspected if two clusters share a pair of near faces but are not near on average. A split is "
        "suspected if a cluster falls apart at a stricter threshold. merges.parquet and splits.parquet hold all of "
        "them. Their probabilities assume that as many are right as on known faces; the page shows what your decisions "
        "say.",
        "Distances are Euclidean, between unit vectors, for faces of mean density. A crowd of similar faces, such as "
        "blurred ones, needs a smaller distance.",
    )
    return Report(
        title="Identity clusters",
        subtitle=f"{gallery.path}, table version {info.versions[0]}, by {review.algorithm}",
        findings=_describe_findings(info.faces, review),
        steps=list_review_steps(
            gallery.path,
            "cluster",
            Step("Cluster again, with your decisions:", f"facepipe cluster {shlex.quote(gallery.path)} --keep-ids"),
        ),
        figures=figures,
        details=details,
        review=ReviewTarget(gallery.path, "cluster", info.versions[0]),
        histograms=(
            build_pair_histogram(graph),
            _build_size_histogram(sizes),
            _build_fit_histogram(graph, review.fits),
        ),
        groups=groups,
        notes=notes,
        groups_total=groups.total,
    )


def _describe_findings(faces: int, review: ClusterReview) -> tuple[str, ...]:
    """Say what was found, and what it means."""
    count = len(review.clusters)
    alone = int((review.clusters.size == 1).sum())
    findings = [
        f"{faces:,} faces are {count:,} persons by their distances; {alone:,} of them have a single face.",
    ]
    merges = len(review.merges)
    splits = len(review.splits)
    if merges or splits:
        findings.append(
            f"{merges:,} pairs of clusters may be one person, and {splits:,} clusters may hold two. Those whose answer "
            "gains most come first."
        )
    else:
        findings.append("No cluster looks like two persons, and no two clusters look like one.")
    return tuple(findings)


def _build_size_histogram(sizes: Int64) -> Histogram:
    edges = log_edges(1, max(2, float(sizes.max(initial=1)) + 1), 5)
    return Histogram("Sizes of clusters", "faces", (count_values("clusters", sizes, edges),), log=True, log_x=True)


def _build_fit_histogram(graph: Graph, fits: Float32) -> Histogram:
    # A face that is alone has no fit.
    low = np.fmin.reduce(fits, initial=0)
    high = np.fmax.reduce(fits, initial=0.1)
    edges = np.linspace(float(low), float(high) + 1e-3, 60)
    rows = (count_values("faces", fits, edges),)
    marks = (Mark(graph.info.threshold.similarity, "threshold"),)
    return Histogram("How well faces fit their cluster", "mean similarity to the rest", rows, marks)


class _ClusterGroups:
    """Groups of faces to look at. Their pictures are read from the gallery when the groups are iterated."""

    def __init__(self, graph: Graph, gallery: Gallery, review: ClusterReview):
        self._graph = graph
        self._gallery = gallery
        self._review = review
        largest = np.lexsort((review.numbers, -review.clusters.size))[:_MAX_CLUSTERS]
        self._largest = largest[review.clusters.size[largest] > 1]
        # The nodes that fit best, of the clusters that are shown and of the parts of suspects.
        merges = review.merges
        shown = np.concatenate([merges.left[:_MAX_SUSPECTS], merges.right[:_MAX_SUSPECTS], self._largest])
        self._best = BestMembers(
            len(review.labels), shown, _FACES_PER_CLUSTER, lambda part: review.labels[part], self._rank
        )
        split = review.splits.cluster[:_MAX_SUSPECTS]
        self._parts = BestMembers(
            len(review.labels),
            np.concatenate([2 * split, 2 * split + 1]),
            _FACES_PER_PART,
            self._number_parts,
            self._rank,
        )
        self._cohesion = review.clusters.compute_cohesion()
        self.total = len(review.merges) + len(review.splits) + int((review.clusters.size > 1).sum())

    def __iter__(self) -> Iterator[Group]:
        merges = range(min(_MAX_SUSPECTS, len(self._review.merges)))
        splits = range(min(_MAX_SUSPECTS, len(self._review.splits)))
        largest = self._largest.tolist()
        # Read all faces in one pass over the gallery.
        nodes = [np.empty(0, np.int64)]
        for n in merges:
            nodes += self._select_merge(n)
        for n in splits:
            nodes += self._select_split(n)
        nodes += [self._select_best(cluster) for cluster in largest]
        faces = read_face_details(self._gallery, self._graph.nodes.ids[np.unique(np.concatenate(nodes))])
        # Suspects of both kinds come in one order, by their suspicion.
        suspects = [self._build_merge_group(n, faces) for n in merges]
        suspects += [self._build_split_group(n, faces) for n in splits]
        yield from sorted(suspects, key=lambda group: -group.suspicion)
        yield from (self._build_cluster_group(cluster, faces) for cluster in largest)

    def _rank(self, nodes: Int64) -> tuple[Float32]:
        """Order nodes by how well they fit, the best first."""
        return (-np.nan_to_num(self._review.fits[nodes]),)

    def _number_parts(self, nodes: slice) -> Int64:
        """Assign numbers to the two parts of each cluster; nodes of neither part get -1."""
        part = self._review.splits.part[nodes]
        return np.where((part == 0) | (part == 1), 2 * self._review.labels[nodes] + part, -1)

    def _select_best(self, cluster: int) -> Int64:
        return self._best.list_members(cluster)

    def _select_merge(self, n: int) -> list[Int64]:
        """Select the best nodes of both clusters of a suspected merge."""
        pair = (int(self._review.merges.left[n]), int(self._review.merges.right[n]))
        return [self._best.list_members(cluster)[:_FACES_PER_PART] for cluster in pair]

    def _select_split(self, n: int) -> list[Int64]:
        """Select the best nodes of both parts of a suspected split."""
        cluster = int(self._review.splits.cluster[n])
        return [self._parts.list_members(2 * cluster + number) for number in (0, 1)]

    def _build_merge_group(self, n: int, faces: dict[int, FaceDetails]) -> Group:
        review = self._review
        left = int(review.merges.left[n])
        right = int(review.merges.right[n])
        left_number = int(review.numbers[left])
        right_number = int(review.numbers[right])
        left_size = int(review.clusters.size[left])
        right_size = int(review.clusters.size[right])
        distance = self._graph.info.to_distance(float(review.merges.similarity[n]))
        probability = float(review.merges.probability[n])
        left_nodes, right_nodes = self._select_merge(n)
        rows = [self._build_face(node, f"cluster {left_number}", faces) for node in left_nodes]
        rows += [self._build_face(node, f"cluster {right_number}", faces) for node in right_nodes]
        return Group(
            f"clusters {left_number} and {right_number}: one person?",
            "merge",
            (
                ("probability", f"{probability:.2f}"),
                ("mean distance", f"{distance:.3f}"),
                ("faces", f"{left_size} + {right_size}"),
            ),
            tuple(rows),
            suspicion=probability,
            more=left_size + right_size - len(rows),
            choices=build_pair_choices(rows[0], rows[len(left_nodes)], suggests_one=True),
            probability=probability,
            gain=float(min(left_size, right_size)),
            distances=self._list_distances(left_nodes, right_nodes),
        )

    def _build_split_group(self, n: int, faces: dict[int, FaceDetails]) -> Group:
        review = self._review
        cluster = int(review.splits.cluster[n])
        size = int(review.clusters.size[cluster])
        distance = self._graph.info.to_distance(float(review.splits.similarity[n]))
        probability = float(review.splits.probability[n])
        first_nodes, second_nodes = self._select_split(n)
        rows = [self._build_face(node, "first", faces) for node in first_nodes]
        rows += [self._build_face(node, "second", faces) for node in second_nodes]
        return Group(
            f"cluster {int(review.numbers[cluster])}: two persons?",
            "split",
            (
                ("probability", f"{probability:.2f}"),
                ("distance between the parts", f"{distance:.3f}"),
                ("faces", f"{size}, {int(review.splits.leaving[n])} apart"),
            ),
            tuple(rows),
            suspicion=probability,
            more=size - len(rows),
            choices=build_pair_choices(rows[0], rows[len(first_nodes)], suggests_one=False),
            probability=probability,
            distances=self._list_distances(first_nodes, second_nodes),
        )

    def _build_cluster_group(self, cluster: int, faces: dict[int, FaceDetails]) -> Group:
        review = self._review
        nodes = self._select_best(cluster)
        size = int(review.clusters.size[cluster])
        cohesion = float(self._cohesion[cluster])
        medoid = review.medoids[cluster]
        rows = [self._build_face(node, "medoid" if node == medoid else "", faces) for node in nodes]
        return Group(
            f"cluster {int(review.numbers[cluster])}",
            "cluster",
            (("faces", str(size)), ("mean distance inside", f"{np.sqrt(max(0.0, 2 - 2 * cohesion)):.3f}")),
            tuple(rows),
            more=size - len(rows),
            distances=self._list_distances(nodes),
        )

    def _list_distances(self, *parts: Int64) -> tuple[float, ...]:
        return list_distances(np.asarray(self._graph.nodes.vectors[np.concatenate(parts)]))

    def _build_face(self, node: int, badge: str, faces: dict[int, FaceDetails]) -> Face:
        face_id = int(self._graph.nodes.ids[node])
        face = faces.get(face_id, _UNKNOWN_FACE)
        figures = [("label", face.identity)] if face.identity else []
        if not np.isnan(self._review.fits[node]):
            figures.append(("fit", f"{self._review.fits[node]:+.3f}"))
        return Face(face.uri, tuple(figures), face.thumb, badge, face_id, face.identity or "", face.place)
