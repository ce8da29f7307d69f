"""Find groups of copies in a gallery and the copy to keep, or what two galleries share."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates import (
    DuplicateRule,
    Duplicates,
    SharedFaces,
    SharedIdentities,
    find_shared_identities,
    judge_shared_identities,
)
from facepipe.curation.duplicates.images import gather_faces
from facepipe.curation.duplicates.keep import DROP, KEEP
from facepipe.curation.duplicates.partitioned import CopySearch, CopySource, find_duplicates_by_partition
from facepipe.curation.duplicates.report import build_duplicates_report
from facepipe.curation.graph import Graph
from facepipe.curation.graph.describe import describe_recall
from facepipe.curation.graph.nodes import Nodes
from facepipe.curation.report_folders import GRAPH, delete_report
from facepipe.curation.space import find_space_limits
from facepipe.decisions.mark import save_decisions_mark
from facepipe.decisions.persons import read_decided_faces
from facepipe.decisions.table import DecisionTable
from facepipe.errors import ConfigError, StorageError, ThresholdError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import ReadMark
from facepipe.nearest.similarity import Pairs
from facepipe.reports.html import write_report
from facepipe.reports.model import Figure
from facepipe.reports.parquet import write_table
from facepipe.storage import describe_error
from facepipe.storage.lease import Lease
from facepipe.storage.partitions import RunTables
from pipelines.graph import GraphConfig, GraphRunConfig, OnProgress, open_graph, uses_ray
from pipelines.runtime.run_record import PhaseTimer, record_calls
from pipelines.runtime.steps import open_step_runner
from pipelines.runtime.workspace import locate_reports, open_report_folder

NAME = "dedup"
OVERLAP = "overlap"
MARK = "mark.json"
_ROWS = 65536
_MAX_DISTANCE = 2.0  # of two unit vectors: all edges


@dataclass(frozen=True)
class DedupConfig:
    """Configuration of `dedup`.

    Attributes:
        dedup: What counts as a duplicate, and which copy is kept.
        graph: Which faces are joined.
        run: How the graph is made.
    """

    dedup: DuplicateRule = field(default_factory=DuplicateRule)
    graph: GraphConfig = field(default_factory=GraphConfig)
    run: GraphRunConfig = field(default_factory=GraphRunConfig)


@dataclass
class DedupSummary:
    """Figures of a search for duplicates.

    Attributes:
        images: Number of images.
        pairs: Pairs of images, by kind.
        groups: Number of groups.
        keep: Images to keep.
        drop: Images to drop.
        unlisted: Images whose path no text list can hold.
        shared: Pairs of identities of the two galleries that are one person.
        look_alikes: Pairs that have near faces or one name, and are not one person, or not surely.
        without_hash: Images without a perceptual hash.
        without_threshold: Whether it is unknown from which distance faces are of one person. The shared identities are
            then those of near copies alone.
        recall: Share of the graph's edges that were found, measured on a sample.
        out: Folder of the report.
        seconds: Seconds per phase.
    """

    images: int = 0
    pairs: dict[str, int] = field(default_factory=dict)
    groups: int = 0
    keep: int = 0
    drop: int = 0
    unlisted: int = 0
    shared: int | None = None
    look_alikes: int | None = None
    without_hash: int = 0
    without_threshold: bool = False
    recall: float = 1.0
    out: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@record_calls("dedup")
def run(
    config: DedupConfig, gallery: str, against: str | None = None, progress: OnProgress = lambda line: None
) -> DedupSummary:
    """Find the copies in a gallery, or what it shares with another one. Nothing is deleted.

    Args:
        config: the configuration.
        gallery: path of the gallery. The report goes to GALLERY/reports/dedup/, or to GALLERY/reports/overlap/.
        against: path of the other gallery.
        progress: called with each line of progress.

    Raises:
        ConfigError: if both paths are of one gallery.
        ContractError: if the two galleries were made with different models.
    """
    galleries = [Gallery(gallery)]
    config = replace(config, dedup=config.dedup.fit_model(find_space_limits(galleries[0])))
    if against:
        galleries.append(_open_other(galleries[0], against))
    name = OVERLAP if against else NAME
    summary = DedupSummary()
    phases = PhaseTimer(summary.seconds)
    with open_report_folder(galleries[0], name) as new_report:
        folder = new_report.path
        # The graph of one gallery is shared with other reports. That of two galleries serves this one only.
        graph_folder = os.path.join(folder if against else locate_reports(galleries[0]), "graph")
        graph: Graph | None = None
        if any(map(_has_face, galleries)):
            graph = _open_wide_graph(config, galleries, graph_folder, summary, progress, new_report.lease)
        phases.end("graph")
        progress("comparing pictures")
        with open_step_runner(on_ray=uses_ray(config.run), cpus=config.run.cpus) as runner:
            duplicates, shared = _compare(config, galleries, graph, runner.run_tables)
        phases.end("compare")
        progress("writing")
        write_tables(folder, duplicates, shared, summary)
        recall = Figure("edge recall", "1", "no picture has a face: hashes were compared")
        if graph is not None:
            recall = Figure("edge recall", f"{graph.info.recall:.4f}", describe_recall(graph.info))
            summary.recall = graph.info.recall
        report = build_duplicates_report(galleries, duplicates, config.dedup, recall, shared)
        write_report(report, os.path.join(folder, "report.html"))
        if against and graph is not None:
            delete_report(graph_folder, GRAPH)  # it holds the vectors of the other gallery
        if not against:
            ReadMark.from_gallery(galleries[0]).save(os.path.join(folder, MARK))  # where `dedup --new` starts
            save_decisions_mark(folder, DecisionTable(galleries[0].path).version)
        phases.end("write")
    summary.without_hash = _count_without_hash(galleries)
    summary.out = os.path.join(locate_reports(galleries[0]), name)
    return summary


def _open_other(gallery: Gallery, against: str) -> Gallery:
    """Open the gallery to compare with, and check that the two can be compared."""
    other = Gallery(against)
    other.freeze()
    if os.path.realpath(gallery.faces_folder) == os.path.realpath(other.faces_folder):
        raise ConfigError("--against names the same gallery: leave it out to look for copies inside it")
    # Vectors of different models cannot be compared.
    gallery.contract.require(other.contract, f"the gallery {other.path!r}")
    return other


def _open_wide_graph(
    config: DedupConfig,
    galleries: list[Gallery],
    folder: str,
    summary: DedupSummary,
    progress: OnProgress,
    lease: Lease,
) -> Graph:
    """Open the graph with all pairs that can be duplicates; no threshold for persons is needed for that."""
    wide = replace(config.graph, reach=max(config.graph.reach, config.dedup.radius))
    try:
        return open_graph(galleries, wide, config.run, folder, progress, lease)
    except ThresholdError:
        summary.without_threshold = True
        return open_graph(galleries, replace(wide, threshold=config.dedup.radius), config.run, folder, progress, lease)


def _has_face(gallery: Gallery) -> bool:
    return any(batch.num_rows for batch in gallery.batches(["face_id"], "face_id is not null"))


def _compare(
    config: DedupConfig, galleries: list[Gallery], graph: Graph | None, run_tables: RunTables
) -> tuple[Duplicates, SharedIdentities | None]:
    """Find the duplicates and, of two galleries, the shared identities.

    Without a face there is no graph: then hashes alone are compared, and no identity is shared.
    """
    no_ids = np.empty(0, np.int64)
    nodes = Nodes(no_ids, np.empty(0, np.int8), np.empty((0, galleries[0].dim), np.float32))
    edges: Iterable[Pairs] = ()
    max_neighbours = config.graph.most
    if graph is not None:
        nodes = graph.nodes
        edges = graph.edges
        max_neighbours = graph.info.most
    search = CopySearch(
        rule=config.dedup,
        decided=[read_decided_faces(gallery) for gallery in galleries],
        side_count=sum(any(batch.num_rows for batch in gallery.batches(["uri"])) for gallery in galleries),
        max_neighbours=max_neighbours,
    )
    source = CopySource.of_galleries(galleries, nodes, edges)
    duplicates = find_duplicates_by_partition(source, search, run_tables)
    if len(galleries) < 2 or graph is None:
        return duplicates, None
    return duplicates, _share_identities(config, galleries, graph)


def _share_identities(config: DedupConfig, galleries: list[Gallery], graph: Graph) -> SharedIdentities:
    """Find the identities that two galleries share."""
    # Nodes are faces of the graph. Their rows in the table are (n,), and each pair lists its smaller row first.
    table, row_of_node = gather_faces(galleries, graph.nodes)
    # Shared identities need all edges, and for each face the row of its representative; -1 if it has none.
    pairs = graph.edges.read_within(_MAX_DISTANCE)
    edges = Pairs(row_of_node[pairs.u], row_of_node[pairs.v], pairs.distance)
    first = np.full(table.num_rows, -1, np.int64)
    first[row_of_node] = row_of_node[graph.representatives]
    shared = find_shared_identities(table, edges, first, threshold=graph.info.distance, max_neighbours=graph.info.most)
    faces = SharedFaces(
        table=table,
        edges=edges,
        first=first,
        row=row_of_node,
        vectors=graph.nodes.vectors,
        density=graph.density,
        max_neighbours=graph.info.most,
        copy_distance=config.dedup.close_near,
    )
    return judge_shared_identities(faces, shared, threshold=graph.info.threshold.similarity)


def _count_without_hash(galleries: list[Gallery]) -> int:
    """Count the images embedded before the gallery had perceptual hashes: of these only exact copies are found."""
    where = "status = 'ok' and face_index = 0 and image_hash is null"
    return sum(batch.num_rows for gallery in galleries for batch in gallery.batches(["image_hash"], where))


def write_tables(folder: str, duplicates: Duplicates, shared: SharedIdentities | None, summary: DedupSummary) -> None:
    """Write the tables and lists of a report, and fill in the figures that follow from them.

    Args:
        folder: folder of the report.
        duplicates: tables of duplicates.
        shared: identities that two galleries share.
        summary: summary to fill in.
    """
    tables = {"pairs": duplicates.pairs, "groups": duplicates.groups, "decisions": duplicates.decisions}
    if shared is not None:
        tables["identities"] = shared.persons
        tables["look_alikes"] = shared.look_alikes
    for name, table in tables.items():
        write_table(os.path.join(folder, f"{name}.parquet"), table)
    # Lists and figures are of the first gallery only, which is side 0.
    summary.keep, unlisted = _write_list(os.path.join(folder, "keep.txt"), duplicates.decisions, KEEP)
    summary.unlisted += unlisted
    summary.drop, unlisted = _write_list(os.path.join(folder, "drop.txt"), duplicates.decisions, DROP)
    summary.unlisted += unlisted
    summary.images = summary.keep + summary.drop
    kinds = duplicates.pairs["kind"].value_counts().to_pylist()
    summary.groups = duplicates.groups.num_rows
    summary.pairs = {row["values"]: row["counts"] for row in kinds}
    if shared is not None:
        summary.shared = shared.persons.num_rows
        summary.look_alikes = shared.look_alikes.num_rows


def _write_list(path: str, decisions: pa.Table, decision: str) -> tuple[int, int]:
    """Write the uris of the first gallery with a decision, one per line.

    Returns:
        How many there are, and how many of them contain line breaks and are left out.
    """
    count = 0
    left_out = 0
    try:
        with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            for uri in _iterate_uris(decisions, decision):
                count += 1
                # A path with a line break would read as two paths.
                if "\n" in uri or "\r" in uri:
                    left_out += 1
                else:
                    file.write(uri + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}") from error
    return count, left_out


def _iterate_uris(decisions: pa.Table, decision: str) -> Iterator[str]:
    """Yield the uris of the first gallery's images with a decision."""
    for batch in decisions.select(["uri", "side", "decision"]).to_batches(_ROWS):
        is_chosen = pc.and_(pc.equal(batch["side"], 0), pc.equal(batch["decision"], decision))
        yield from batch["uri"].filter(is_chosen).to_pylist()
