"""cluster: a gallery's faces in, clusters of persons out: graph, merge, tables, report."""

import os
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from facepipe.curation.clusters import review, tables
from facepipe.curation.clusters.constraints import find_same_photo_pairs, read_labels
from facepipe.curation.clusters.identities import cluster_faces
from facepipe.curation.clusters.report import Found, cluster_report
from facepipe.curation.clusters.sums import Standing
from facepipe.curation.graph import Graph
from facepipe.curation.graph.cohort import Cohort
from facepipe.curation.graph.describe import stricter_threshold
from facepipe.curation.graph.linkage import Clusters
from facepipe.errors import ConfigError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import Mark
from facepipe.reports.html import write_report
from facepipe.reports.parquet import write_rows, write_table
from facepipe.types import Int64
from pipelines.graph import GraphConfig, GraphRunConfig, Progress, open_graph
from pipelines.runtime.phases import Phases
from pipelines.runtime.run_record import records
from pipelines.runtime.workspace import report_folder, reports_of

NAME = "cluster"
_SUSPECTS = 100_000
_STATE = "state.npz"


@dataclass(frozen=True)
class ClusterRules:
    """Rules for which faces may be one person.

    Attributes:
        algorithm: `linkage`, which is average linkage and the only choice.
        one_photo: Faces of one photo are different persons.
        identities: Faces with one label are one person.
    """

    algorithm: str = "linkage"
    one_photo: bool = True
    identities: bool = False

    def __post_init__(self) -> None:
        if self.algorithm != "linkage":
            raise ConfigError(
                f"cluster.algorithm={self.algorithm} is not available: write cluster.algorithm=linkage or leave it out "
                "(whispers, communities and components scored lower and were removed)"
            )


@dataclass(frozen=True)
class ClusterConfig:
    """Everything `cluster` can be told."""

    cluster: ClusterRules = field(default_factory=ClusterRules)
    graph: GraphConfig = field(default_factory=GraphConfig)
    run: GraphRunConfig = field(default_factory=GraphRunConfig)


@dataclass
class ClusterSummary:
    """What a clustering found. distance: the threshold for faces of mean density; recall: of the graph's edges."""

    faces: int = 0
    clusters: int = 0
    singletons: int = 0
    largest: int = 0
    merges: int = 0
    splits: int = 0
    distance: float = 0.0
    estimated: bool = True
    edges: int = 0
    recall: float = 1.0
    algorithm: str = ""
    out: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@records("cluster")
def run(config: ClusterConfig, gallery: str, progress: Progress = lambda line: None) -> ClusterSummary:
    """Cluster all faces of a gallery into GALLERY/reports/cluster/.

    Raises GalleryError where there is no face, or too few to find a threshold for a model that does not say one.
    """
    table = Gallery(gallery)
    summary = ClusterSummary(algorithm=config.cluster.algorithm)
    phases = Phases(summary.seconds)
    with report_folder(table, NAME) as folder:
        graph = open_graph([table], config.graph, config.run, os.path.join(reports_of(table), "graph"), progress)
        phases.end("graph")
        progress(f"{graph.info.edges} edges: merging")
        apart = find_same_photo_pairs(table, graph.nodes) if config.cluster.one_photo else None
        together = read_labels(table, graph.nodes)[0] if config.cluster.identities else None
        labels, clusters = cluster_faces(graph, apart, together)
        phases.end("merge")
        found = _reviewed(graph, labels, clusters, config.cluster.algorithm)
        phases.end("review")
        progress(f"{len(clusters)} clusters: writing")
        _write(table, graph, found, folder)
        write_report(cluster_report(graph, table, found), os.path.join(folder, "report.html"))
        phases.end("write")
    info = graph.info
    summary.faces, summary.clusters, summary.edges = info.faces, len(clusters), info.edges
    summary.singletons, summary.largest = int((clusters.size == 1).sum()), int(clusters.size.max())
    summary.merges, summary.splits = len(found.merges), len(found.splits)
    summary.distance, summary.estimated, summary.recall = info.distance, info.threshold.estimated, info.recall
    summary.out = os.path.join(reports_of(table), NAME)
    return summary


def _reviewed(graph: Graph, labels: Int64, clusters: Clusters, algorithm: str) -> Found:
    pairs = graph.edges.within(2.0)
    pairs = pairs.take(graph.compute_similarity(pairs) >= graph.info.threshold.similarity)
    fits = review.fit(graph, labels, clusters)
    splits, parts = review.splits(graph, labels, clusters, pairs, stricter_threshold(graph), _SUSPECTS)
    return Found(
        *(labels, clusters, tables.by_size(labels, clusters), fits, review.medoids(labels, fits, len(clusters))),
        *(review.merges(clusters, labels, pairs, _SUSPECTS), splits, parts, algorithm),
    )


def _write(gallery: Gallery, graph: Graph, found: Found, folder: str) -> None:
    ids, size, labels = found.ids, found.clusters.size, found.labels
    medoid = np.zeros(len(labels), bool)
    medoid[found.medoids] = True
    rows = tables.face_rows(gallery, graph.nodes, ids[labels], size[labels], found.fits, medoid)
    write_rows(os.path.join(folder, tables.FACES), tables.FACE_ROWS, rows)
    order = np.argsort(ids)
    face_ids = graph.nodes.ids
    made = pa.table(
        {
            "cluster": ids[order],
            "size": size[order],
            "medoid": face_ids[found.medoids[order]],
            "cohesion": found.clusters.cohesion()[order],
        }
    )
    merges, splits = found.merges, found.splits
    together = pa.table({"left": ids[merges.left], "right": ids[merges.right], "similarity": merges.similarity})
    apart = pa.table({"cluster": ids[splits.left], "leaving": splits.right, "similarity": splits.similarity})
    for name, table in ((tables.CLUSTERS, made), (tables.MERGES, together), (tables.SPLITS, apart)):
        write_table(os.path.join(folder, name), table)
    np.savez(os.path.join(folder, _STATE), cohort=graph.cohort.vectors, threshold=graph.info.threshold.similarity)
    held = found.clusters
    Standing(Clusters(held.sums[order], held.crowd[order], held.size[order]), Mark.of(gallery)).save(folder)


def read_state(folder: str) -> tuple[Cohort, float]:
    """The cohort and the similarity threshold that a clustering used: what new faces are placed by."""
    try:
        with np.load(os.path.join(folder, _STATE)) as state:
            return Cohort(state["cohort"]), float(state["threshold"])
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"the clusters in {folder!r} cannot be added to: {error}") from error
