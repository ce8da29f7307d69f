"""Cluster the faces of a gallery by person, and write tables and a report."""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from facepipe.curation.clusters.assignments import AssignmentTable
from facepipe.curation.clusters.constraints import find_same_photo_pairs, read_labels
from facepipe.curation.clusters.continuity import EarlierClusters, keep_numbers, part_newcomers
from facepipe.curation.clusters.decided import DecidedNodes
from facepipe.curation.clusters.identities import cluster_faces, unite_known
from facepipe.curation.clusters.persons import (
    PERSONS,
    EarlierPersons,
    SeenTimes,
    SharedFaces,
    build_person_table,
    carry_names,
    match_persons,
)
from facepipe.curation.clusters.placement import PlacementRule, StrangerLimit
from facepipe.curation.clusters.ranking import rank_merges, rank_splits
from facepipe.curation.clusters.report import ClusterReview, build_cluster_report
from facepipe.curation.clusters.review import (
    compute_fits,
    find_medoids,
    find_suspected_merges,
    find_suspected_splits,
)
from facepipe.curation.clusters.sums import ClusterSums, make_empty_clusters
from facepipe.curation.clusters.tables import (
    CLUSTERS,
    FACE_SCHEMA,
    FACES,
    LEFT_OUT,
    LEFT_OUT_SCHEMA,
    MERGES,
    SPLITS,
    build_face_rows,
    number_by_size,
    read_highest_number,
)
from facepipe.curation.graph import Graph
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.describe import find_stricter_threshold
from facepipe.curation.graph.edges import select_ends
from facepipe.curation.graph.fitness import find_unfit_nodes, read_min_quality
from facepipe.decisions.gallery import DecidedGallery
from facepipe.decisions.named import NAMED, build_named_rows
from facepipe.decisions.persons import DecidedFaces
from facepipe.errors import ConfigError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import ReadMark
from facepipe.reports.html import write_report
from facepipe.reports.parquet import write_rows, write_table
from facepipe.types import Bool, Int64
from pipelines.graph import GraphConfig, GraphRunConfig, OnProgress, open_graph, uses_ray
from pipelines.runtime.run_record import PhaseTimer, record_calls
from pipelines.runtime.steps import open_step_runner
from pipelines.runtime.workspace import locate_reports, open_report_folder

NAME = "cluster"
_MAX_SUSPECTS = 100_000  # of each kind


@dataclass(frozen=True)
class ClusterRules:
    """Rules for which faces may be one person.

    Attributes:
        algorithm: `linkage`, which is average linkage and the only choice.
        one_photo: Faces of one photo are different persons.
        identities: Faces with one label are one person.
        anew_growth: Growth of the gallery since its last clustering from which `--assign` clusters anew: 0.2 are 20 new
            faces per 100. The numbers of clusters stay.
        anew_faces: Largest gallery, in faces, that `--assign` clusters anew by itself. In a larger one it says when
            to do so.
    """

    algorithm: str = "linkage"
    one_photo: bool = True
    identities: bool = False
    anew_growth: Annotated[float, Field(gt=0)] = 0.2
    anew_faces: Annotated[int, Field(ge=0)] = 1_000_000

    def __post_init__(self) -> None:
        if self.algorithm != "linkage":
            raise ConfigError(
                f"cluster.algorithm={self.algorithm} is not available: write cluster.algorithm=linkage or leave it out "
                "(whispers, communities and components scored lower and were removed)"
            )


@dataclass(frozen=True)
class ClusterConfig:
    """Configuration of `cluster`.

    Attributes:
        cluster: Which faces may be one person.
        graph: Which faces are joined.
        run: How the graph is made.
    """

    cluster: ClusterRules = field(default_factory=ClusterRules)
    graph: GraphConfig = field(default_factory=GraphConfig)
    run: GraphRunConfig = field(default_factory=GraphRunConfig)


@dataclass
class ClusterSummary:
    """Figures of a clustering.

    Attributes:
        faces: Number of faces.
        left_out: Faces that people ignore, or that are no faces.
        clusters: Number of clusters.
        singletons: Clusters of one face.
        largest: Faces of the largest cluster.
        named: Persons with a name.
        merges: Pairs of clusters that may be one person.
        splits: Clusters that may be two persons.
        distance: Threshold, as a distance of faces of mean density.
        estimated: Whether the threshold was estimated from the data.
        edges: Edges of the graph.
        recall: Share of the graph's edges that were found, measured on a sample.
        algorithm: Name of the algorithm.
        out: Folder of the report.
        seconds: Seconds per phase.
    """

    faces: int = 0
    left_out: int = 0
    clusters: int = 0
    singletons: int = 0
    largest: int = 0
    named: int = 0
    merges: int = 0
    splits: int = 0
    distance: float = 0.0
    estimated: bool = True
    edges: int = 0
    recall: float = 1.0
    algorithm: str = ""
    out: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@record_calls("cluster")
def run(
    config: ClusterConfig,
    gallery: str,
    progress: OnProgress = lambda line: None,
    *,
    keep_ids: bool = False,
    part_new: bool = False,
) -> ClusterSummary:
    """Cluster all faces of a gallery, and write the report into GALLERY/reports/cluster/.

    Args:
        config: the configuration.
        gallery: path of the gallery.
        progress: called with each line of progress.
        keep_ids: whether a cluster keeps the number of the earlier one that it shares most faces with. By default
            clusters are numbered by falling size.
        part_new: whether faces that had no cluster join those that had one only if that is as sure as `--assign`
            must be.

    Raises:
        GalleryError: if there is no face, or if there are too few to estimate a threshold for a model that has none.
    """
    # Decisions that contradict each other are refused before anything is built.
    table = DecidedGallery(gallery)
    decided = table.decided
    summary = ClusterSummary(algorithm=config.cluster.algorithm)
    phases = PhaseTimer(summary.seconds)
    with open_report_folder(table, NAME) as report:
        try:
            earlier = _read_earlier(os.path.join(locate_reports(table), NAME))
        except StorageError as error:
            if keep_ids or part_new:
                raise
            progress(f"{error}: persons get new ids")
            earlier = None
        graph_folder = os.path.join(locate_reports(table), "graph")
        graph = open_graph([table], config.graph, config.run, graph_folder, progress, report.lease)
        phases.end("graph")
        progress(f"{graph.info.edges} edges: merging")
        # Constraints are optional: pairs of nodes that must differ, and the label (n,) of nodes that must agree.
        different = find_same_photo_pairs(table, graph.nodes) if config.cluster.one_photo else None
        same = read_labels(table, graph.nodes)[0] if config.cluster.identities else None
        # Decisions hold exactly, and overrule both.
        decisions = DecidedNodes.locate(decided, graph.nodes.ids)
        left_out = decided.is_ignored(graph.nodes.ids)
        known = unite_known(graph, same, decisions, left_out)
        with open_step_runner(on_ray=uses_ray(config.run), cpus=config.run.cpus) as runner:
            unfit = find_unfit_nodes(table, graph.nodes)
            labels, clusters = cluster_faces(
                graph, different, same, unfit, decided=decisions, left_out=left_out, run_tasks=runner.run_linkage
            )
        limit = StrangerLimit.measure(graph.nodes.vectors, graph.density, labels, clusters)
        if earlier is not None and part_new:
            is_new = earlier.find(graph.nodes.ids) < 0
            lead = limit.find_threshold(len(clusters))
            labels, clusters = part_newcomers(graph, labels, clusters, is_new, lead, known=known)
        phases.end("merge")
        review = _review_clusters(graph, labels, clusters, config.cluster.algorithm, known, left_out, unfit, decisions)
        if earlier is not None and keep_ids:
            review = _keep_numbers(review, graph, earlier)
        persons = _identify_persons(table, graph, review, earlier, decided, decisions)
        phases.end("review")
        progress(f"{len(clusters)} clusters: writing")
        _write_tables(table, graph, review, report.path)
        write_table(os.path.join(report.path, PERSONS), persons)
        numbers = review.numbers[review.labels]
        write_table(os.path.join(report.path, NAMED), build_named_rows(graph.nodes.ids, numbers, persons))
        write_table(os.path.join(report.path, LEFT_OUT), pa.table([decided.ignored], schema=LEFT_OUT_SCHEMA))
        next_number = max(int(review.numbers.max()) + 1, earlier.next_number if earlier and keep_ids else 0)
        next_person = EarlierPersons(persons, earlier.persons.next_person if earlier else 0).find_next()
        _write_rule(
            table,
            graph,
            review,
            config,
            limit,
            unfit,
            report.path,
            next_number=next_number,
            decisions=decided.version,
            next_person=next_person,
        )
        write_report(build_cluster_report(graph, table, review), os.path.join(report.path, "report.html"))
        phases.end("write")
    info = graph.info
    sizes = clusters.size[review.numbers >= 0]
    summary.faces = int(sizes.sum())
    summary.left_out = info.faces - summary.faces
    summary.clusters = len(sizes)
    summary.singletons = int((sizes == 1).sum())
    summary.largest = int(sizes.max(initial=0))
    summary.named = persons.num_rows - persons["name"].null_count
    summary.merges = len(review.merges)
    summary.splits = len(review.splits)
    summary.distance = info.distance
    summary.estimated = info.threshold.estimated
    summary.edges = info.edges
    summary.recall = info.recall
    summary.out = os.path.join(locate_reports(table), NAME)
    return summary


def _review_clusters(
    graph: Graph,
    labels: Int64,
    clusters: Clusters,
    algorithm: str,
    known: Int64,
    left_out: Bool,
    unfit: Bool,
    decisions: DecidedNodes,
) -> ClusterReview:
    """Find what a person should look at first. What people have decided is not suggested again."""
    # Keep the edges that are similar enough after correction for density.
    u, v = graph.read_similar_pairs(graph.info.threshold.similarity)
    if left_out.any():
        u, v = select_ends(u, v, lambda left, right: ~(left_out[left] | left_out[right]))
    is_left_out = np.zeros(len(clusters), bool)
    is_left_out[labels[left_out]] = True
    fits = compute_fits(graph, labels, clusters)
    splits = find_suspected_splits(
        graph,
        labels,
        clusters,
        u,
        v,
        strict_threshold=find_stricter_threshold(graph),
        max_suspects=_MAX_SUSPECTS,
        start=known,
    )
    apart = decisions.links.contract(labels, len(clusters))
    merges = find_suspected_merges(clusters, labels, u, v, _MAX_SUSPECTS, apart)
    return ClusterReview(
        labels=labels,
        clusters=clusters,
        numbers=number_by_size(clusters, is_left_out),
        fits=fits,
        medoids=find_medoids(labels, fits, len(clusters)),
        merges=rank_merges(graph, labels, clusters, merges, unfit),
        splits=rank_splits(splits),
        algorithm=algorithm,
    )


def _read_earlier(report: str) -> EarlierClusters | None:
    """Read which cluster each face has; None if there are no clusters yet."""
    path = os.path.join(report, FACES)
    if not os.path.exists(path):
        return None
    ids, clusters = AssignmentTable(path).read_all()
    next_number = 0
    next_person = 0
    with suppress(StorageError):
        rule = PlacementRule.load(report)
        next_number = rule.next_number
        next_person = rule.next_person
    empty = read_highest_number(os.path.join(report, CLUSTERS)) + 1
    next_number = max(next_number, empty, int(clusters.max(initial=-1)) + 1)
    persons = EarlierPersons.load(report, next_person) or EarlierPersons()
    return EarlierClusters(ids, clusters, next_number, persons)


def _keep_numbers(review: ClusterReview, graph: Graph, earlier: EarlierClusters) -> ClusterReview:
    numbers = keep_numbers(
        review.labels,
        len(review.clusters),
        np.where(review.numbers[review.labels] >= 0, earlier.find(graph.nodes.ids), -1),
        _list_in_order(review),
        earlier.next_number,
    )
    return replace(review, numbers=np.where(review.numbers >= 0, numbers, -1))


def _list_in_order(review: ClusterReview) -> Int64:
    """List the clusters by their numbers, without those that are left out."""
    order = np.argsort(review.numbers)
    return order[review.numbers[order] >= 0]


def _identify_persons(
    gallery: Gallery,
    graph: Graph,
    review: ClusterReview,
    earlier: EarlierClusters | None,
    decided: DecidedFaces,
    decisions: DecidedNodes,
) -> pa.Table:
    """Find which persons the clusters are, and build the rows of persons.parquet."""
    count = len(review.clusters)
    order = _list_in_order(review)
    persons = earlier.persons if earlier is not None else EarlierPersons()
    earlier_person = np.full(len(graph.nodes), -1, np.int64)
    if earlier is not None:
        earlier_person = persons.find(earlier.find(graph.nodes.ids))
    ones = np.ones(len(graph.nodes), np.int64)
    shared = SharedFaces.count_up(review.labels, earlier_person, ones, decisions.is_decided)
    name = decisions.links.contract(review.labels, count).person.astype(np.int64)
    number = match_persons(shared, name, decided.names, persons, order)
    cluster_of_group = np.full(decided.group_count, -1, np.int64)
    cluster_of_group[decisions.group[decisions.is_decided]] = review.labels[decisions.is_decided]
    name = carry_names(number, name, persons, decided, cluster_of_group)
    seen = SeenTimes.read(gallery, graph.nodes.ids, review.labels, count)
    return build_person_table(
        number[order],
        clusters=review.numbers[order],
        sizes=review.clusters.size[order],
        medoids=graph.nodes.ids[review.medoids[order]],
        name=name[order],
        seen=SeenTimes(seen.first[order], seen.last[order]),
        earlier=persons,
        decided=decided,
    )


def _write_tables(gallery: Gallery, graph: Graph, review: ClusterReview, folder: str) -> None:
    """Write the tables of the report, and what `cluster --assign` needs."""
    numbers = review.numbers
    labels = review.labels
    clusters = review.clusters
    # One row per face.
    is_medoid = np.zeros(len(labels), bool)
    is_medoid[review.medoids] = True
    rows = build_face_rows(
        gallery,
        graph.nodes,
        cluster=numbers[labels],
        size=clusters.size[labels],
        fits=review.fits,
        is_medoid=is_medoid,
    )
    write_rows(os.path.join(folder, FACES), FACE_SCHEMA, rows)
    # One row per cluster, and one per suspicion.
    order = _list_in_order(review)
    cluster_table = pa.table(
        {
            "cluster": numbers[order],
            "size": clusters.size[order],
            "medoid": graph.nodes.ids[review.medoids[order]],
            "cohesion": clusters.compute_cohesion()[order],
        }
    )
    merges = review.merges
    merge_table = pa.table(
        {
            "left": numbers[merges.left],
            "right": numbers[merges.right],
            "similarity": merges.similarity,
            "probability": merges.probability,
        }
    )
    splits = review.splits
    split_table = pa.table(
        {
            "cluster": numbers[splits.cluster],
            "leaving": splits.leaving,
            "similarity": splits.similarity,
            "probability": splits.probability,
        }
    )
    write_table(os.path.join(folder, CLUSTERS), cluster_table)
    write_table(os.path.join(folder, MERGES), merge_table)
    write_table(os.path.join(folder, SPLITS), split_table)


def count_faces(gallery: Gallery) -> int:
    """Count the faces of a gallery by the log of its table."""
    return gallery.count_totals().faces


def _write_rule(
    gallery: Gallery,
    graph: Graph,
    review: ClusterReview,
    config: ClusterConfig,
    limit: StrangerLimit,
    unfit: Bool,
    folder: str,
    *,
    next_number: int,
    decisions: int,
    next_person: int,
) -> None:
    """Write the rule and the sums by which new faces are placed. Row n of the sums is cluster n."""
    numbers = review.numbers
    labels = review.labels
    has_fit = np.zeros(len(review.clusters), bool)
    has_fit[labels[~unfit]] = True
    settings = json.dumps({"cluster": asdict(config.cluster), "graph": asdict(config.graph)})
    PlacementRule(
        graph.cohort,
        graph.info.threshold.similarity,
        limit=limit,
        min_quality=read_min_quality(gallery),
        waiting=np.sort(numbers[~has_fit & (numbers >= 0)]),
        faces=count_faces(gallery),
        distance=graph.info.distance,
        settings=settings,
        next_number=next_number,
        decisions=decisions,
        next_person=next_person,
    ).save(folder)
    sums = make_empty_clusters(next_number, gallery.dim)
    order = _list_in_order(review)
    sums.sums[numbers[order]] = review.clusters.sums[order]
    sums.crowd[numbers[order]] = review.clusters.crowd[order]
    sums.size[numbers[order]] = review.clusters.size[order]
    ClusterSums(sums, ReadMark.from_gallery(gallery)).save(folder)
