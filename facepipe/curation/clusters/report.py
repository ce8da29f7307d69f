"""The cluster report: suspected merges and splits first, then the largest clusters."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from facepipe.curation.clusters.review import Suspects
from facepipe.curation.graph import Graph
from facepipe.curation.graph.describe import pair_histogram, recall_note, threshold_note
from facepipe.curation.graph.linkage import Clusters
from facepipe.gallery import Gallery
from facepipe.reports.faces import Shown, shown
from facepipe.reports.histogram import log_edges, series
from facepipe.reports.model import Face, Figure, Group, Histogram, Mark, Report
from facepipe.types import Float32, Int64

_FACES = 6  # of a cluster
_SUSPECTS = 3000
_LARGEST = 1500


@dataclass(frozen=True)
class Found:
    """Everything a clustering has found; arrays (n,) are by node, (k,) by cluster."""

    labels: Int64
    clusters: Clusters
    ids: Int64  # (k,) the cluster's public number
    fits: Float32
    medoids: Int64  # (k,) nodes
    merges: Suspects
    splits: Suspects
    parts: Int64
    algorithm: str


def cluster_report(graph: Graph, gallery: Gallery, found: Found) -> Report:
    """The report of a clustering."""
    groups = _Groups(graph, gallery, found)
    info, sizes = graph.info, found.clusters.size
    figures = (
        Figure("faces", f"{info.faces:,}"),
        Figure("clusters", f"{len(sizes):,}", f"{int((sizes == 1).sum()):,} of a single face"),
        Figure("largest cluster", f"{int(sizes.max(initial=0)):,}", "faces"),
        Figure("threshold", f"{info.distance:.3f}", threshold_note(info)),
        Figure("suspected merges", f"{len(found.merges):,}"),
        Figure("suspected splits", f"{len(found.splits):,}"),
        Figure("edge recall", f"{info.recall:.4f}", recall_note(info)),
    )
    notes = (
        "A suspected merge is two clusters that share a pair of near faces but are not near on average; a suspected "
        "split is a cluster that falls apart at a stricter threshold. Everything is in the Parquet files beside this "
        "page.",
        "Distances are Euclidean between unit vectors, as they would be for faces of average surroundings: a crowd of "
        "similar faces, such as blurred ones, needs a smaller distance.",
    )
    return Report(
        title="Identity clusters",
        subtitle=f"{gallery.path}, table version {info.versions[0]}, by {found.algorithm}",
        figures=figures,
        histograms=(pair_histogram(graph), _sizes(sizes), _fits(graph, found)),
        groups=groups,
        notes=notes,
        groups_total=groups.total,
    )


def _sizes(sizes: Int64) -> Histogram:
    edges = log_edges(1, max(2, float(sizes.max(initial=1)) + 1), 5)
    return Histogram("Sizes of clusters", "faces", (series("clusters", sizes, edges),), log=True, log_x=True)


def _fits(graph: Graph, found: Found) -> Histogram:
    known = found.fits[~np.isnan(found.fits)]
    edges = np.linspace(float(known.min(initial=0)), float(known.max(initial=0.1)) + 1e-3, 60)
    mark = Mark(graph.info.threshold.similarity, "threshold")
    return Histogram(
        "How well faces fit their cluster", "mean similarity to the rest", (series("faces", known, edges),), (mark,)
    )


class _Groups:
    """Groups of faces, read from the gallery when they are asked for."""

    def __init__(self, graph: Graph, gallery: Gallery, found: Found):
        self._graph, self._gallery, self._found = graph, gallery, found
        self._order = np.lexsort((-np.nan_to_num(found.fits), found.labels))
        self._begins = np.searchsorted(found.labels[self._order], np.arange(len(found.clusters) + 1))
        largest = np.argsort(found.ids, kind="stable")[:_LARGEST]
        self._largest = largest[found.clusters.size[largest] > 1]
        self._cohesion = found.clusters.cohesion()
        self.total = len(found.merges) + len(found.splits) + int((found.clusters.size > 1).sum())

    def __iter__(self) -> Iterator[Group]:
        merges, splits = (list(range(min(_SUSPECTS, len(s)))) for s in (self._found.merges, self._found.splits))
        wanted = [self._nodes_of_merge(n) for n in merges] + [self._nodes_of_split(n) for n in splits]
        wanted += [self._best(int(c)) for c in self._largest]
        nodes = np.unique(np.concatenate([np.empty(0, np.int64), *(np.concatenate(w) for w in wanted)]))
        faces = shown(self._gallery, self._graph.nodes.ids[nodes])
        suspects = [self._merge(n, faces) for n in merges] + [self._split(n, faces) for n in splits]
        yield from sorted(suspects, key=lambda group: -group.suspicion)
        yield from (self._cluster(int(c), faces) for c in self._largest)

    def _members(self, cluster: int) -> Int64:
        return self._order[self._begins[cluster] : self._begins[cluster + 1]]

    def _best(self, cluster: int) -> list[Int64]:
        return [self._members(cluster)[:_FACES]]

    def _nodes_of_merge(self, n: int) -> list[Int64]:
        pair = (self._found.merges.left[n], self._found.merges.right[n])
        return [self._members(int(cluster))[: _FACES // 2] for cluster in pair]

    def _nodes_of_split(self, n: int) -> list[Int64]:
        members = self._members(int(self._found.splits.left[n]))
        return [members[self._found.parts[members] == part][: _FACES // 2] for part in (0, 1)]

    def _merge(self, n: int, faces: dict[int, Shown]) -> Group:
        left, right = int(self._found.merges.left[n]), int(self._found.merges.right[n])
        ids = [int(self._found.ids[c]) for c in (left, right)]
        sizes = [int(self._found.clusters.size[c]) for c in (left, right)]
        distance = self._graph.info.distance_at(float(self._found.merges.similarity[n]))
        shown_ = [(f"cluster {i}", nodes) for i, nodes in zip(ids, self._nodes_of_merge(n), strict=True)]
        return Group(
            f"clusters {ids[0]} and {ids[1]}: one person?",
            "merge",
            (("mean distance", f"{distance:.3f}"), ("faces", f"{sizes[0]} + {sizes[1]}")),
            tuple(self._face(node, badge, faces) for badge, nodes in shown_ for node in nodes),
            suspicion=2 - distance,
            more=sum(sizes) - sum(len(nodes) for _, nodes in shown_),
        )

    def _split(self, n: int, faces: dict[int, Shown]) -> Group:
        cluster = int(self._found.splits.left[n])
        distance = self._graph.info.distance_at(float(self._found.splits.similarity[n]))
        size = int(self._found.clusters.size[cluster])
        shown_ = list(zip(("first", "second"), self._nodes_of_split(n), strict=True))
        return Group(
            f"cluster {int(self._found.ids[cluster])}: two persons?",
            "split",
            (
                ("distance between the parts", f"{distance:.3f}"),
                ("faces", f"{size}, {int(self._found.splits.right[n])} apart"),
            ),
            tuple(self._face(node, badge, faces) for badge, nodes in shown_ for node in nodes),
            suspicion=1 + distance,
            more=size - sum(len(nodes) for _, nodes in shown_),
        )

    def _cluster(self, cluster: int, faces: dict[int, Shown]) -> Group:
        (nodes,), size = self._best(cluster), int(self._found.clusters.size[cluster])
        cohesion = float(self._cohesion[cluster])
        return Group(
            f"cluster {int(self._found.ids[cluster])}",
            "cluster",
            (("faces", str(size)), ("mean distance inside", f"{np.sqrt(max(0.0, 2 - 2 * cohesion)):.3f}")),
            tuple(self._face(node, "medoid" if node == self._found.medoids[cluster] else "", faces) for node in nodes),
            more=size - len(nodes),
        )

    def _face(self, node: int, badge: str, faces: dict[int, Shown]) -> Face:
        face = faces.get(int(self._graph.nodes.ids[node]), Shown("", None, None))
        figures = [("label", face.identity)] if face.identity else []
        if not np.isnan(self._found.fits[node]):
            figures.append(("fit", f"{self._found.fits[node]:+.3f}"))
        return Face(face.uri, tuple(figures), face.thumb, badge)
