"""dedup: a gallery in, groups of copies out with the one to keep; or two galleries in, what they share out."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates import DuplicateRule, Duplicates, find_duplicates, shared_identities
from facepipe.curation.duplicates.gather import gather
from facepipe.curation.duplicates.report import duplicates_report
from facepipe.curation.duplicates.stars import face_pairs
from facepipe.curation.graph import Graph
from facepipe.curation.graph.describe import recall_note
from facepipe.errors import ConfigError, StorageError, ThresholdError
from facepipe.gallery import Gallery
from facepipe.gallery.fresh import Mark
from facepipe.nearest.similarity import Pairs
from facepipe.reports.html import write_report
from facepipe.reports.model import Figure
from facepipe.reports.parquet import write_table
from facepipe.storage import describe_error
from pipelines.graph import GraphConfig, GraphRunConfig, Progress, open_graph
from pipelines.runtime.phases import Phases
from pipelines.runtime.run_record import records
from pipelines.runtime.workspace import report_folder, reports_of

NAME, OVERLAP, MARK = "dedup", "overlap", "mark.json"
_ROWS = 65536
_FARTHEST = 2.0


@dataclass(frozen=True)
class DedupConfig:
    """Everything `dedup` can be told."""

    dedup: DuplicateRule = field(default_factory=DuplicateRule)
    graph: GraphConfig = field(default_factory=GraphConfig)
    run: GraphRunConfig = field(default_factory=GraphRunConfig)


@dataclass
class DedupSummary:
    """What was found. pairs: by kind; unlisted: images whose path no text list can hold; shared: identities of both;
    without_threshold: it is not known from which distance faces are of one person, so that shared identities are those
    of near copies alone."""

    images: int = 0
    pairs: dict[str, int] = field(default_factory=dict)
    groups: int = 0
    keep: int = 0
    drop: int = 0
    unlisted: int = 0
    shared: int | None = None
    without_hash: int = 0
    without_threshold: bool = False
    recall: float = 1.0
    out: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@records("dedup")
def run(
    config: DedupConfig, gallery: str, against: str | None = None, progress: Progress = lambda line: None
) -> DedupSummary:
    """Find the copies in a gallery (GALLERY/reports/dedup/), or what it shares with another (GALLERY/reports/overlap/).

    Nothing is deleted. Raises ContractError where the two were made with different models.
    """
    tables_ = [Gallery(gallery)] + ([Gallery(against)] if against else [])
    if against:
        if os.path.realpath(tables_[0].faces_folder) == os.path.realpath(tables_[1].faces_folder):
            raise ConfigError("--against names the same gallery: leave it out to look for copies inside it")
        tables_[0].contract.require(tables_[1].contract, f"the gallery {tables_[1].path!r}")
    wide = replace(config.graph, reach=max(config.graph.reach, config.dedup.radius))
    summary = DedupSummary()
    phases = Phases(summary.seconds)
    name = OVERLAP if against else NAME
    with report_folder(tables_[0], name) as folder:
        place = os.path.join(folder, "graph") if against else os.path.join(reports_of(tables_[0]), "graph")
        try:
            graph = open_graph(tables_, wide, config.run, place, progress)
        except ThresholdError:  # copies are told by distances of their own
            summary.without_threshold = True
            graph = open_graph(tables_, replace(wide, threshold=config.dedup.radius), config.run, place, progress)
        phases.end("graph")
        progress("comparing pictures")
        found, shared = _found(config, tables_, graph)
        phases.end("compare")
        progress("writing")
        write_tables(folder, found, shared, summary)
        recall = Figure("edge recall", f"{graph.info.recall:.4f}", recall_note(graph.info))
        report = duplicates_report(tables_, found, config.dedup, recall, shared)
        write_report(report, os.path.join(folder, "report.html"))
        summary.recall = graph.info.recall
        if against:
            shutil.rmtree(place)  # it holds the vectors of the other gallery
        else:
            Mark.of(tables_[0]).save(os.path.join(folder, MARK))  # from where `dedup --new` goes on
        phases.end("write")
    summary.without_hash = _without_hash(tables_)
    summary.out = os.path.join(reports_of(tables_[0]), name)
    return summary


def _found(config: DedupConfig, galleries: list[Gallery], graph: Graph) -> tuple[Duplicates, pa.Table | None]:
    table, row_of_node = gather(galleries, graph.nodes)
    near = face_pairs(graph, table, row_of_node, config.dedup)
    ends = np.sort(np.stack([row_of_node[near.u], row_of_node[near.v]]), axis=0)
    found = find_duplicates(table, ends[0], ends[1], near.distance, config.dedup)
    if len(galleries) < 2:
        return found, None
    pairs = graph.edges.within(_FARTHEST)
    edges = Pairs(row_of_node[pairs.u], row_of_node[pairs.v], pairs.distance)
    first = np.full(table.num_rows, -1, np.int64)
    first[row_of_node] = row_of_node[graph.representatives]
    return found, shared_identities(table, edges, first, graph.info.distance, graph.info.most)


def _without_hash(galleries: list[Gallery]) -> int:
    """Images embedded before the gallery knew perceptual hashes: of these only exact copies are found."""
    return sum(
        batch.num_rows
        for gallery in galleries
        for batch in gallery.batches(["image_hash"], "status = 'ok' and face_index = 0 and image_hash is null")
    )


def write_tables(folder: str, found: Duplicates, shared: pa.Table | None, summary: DedupSummary) -> None:
    named = [("pairs", found.pairs), ("groups", found.groups), ("decisions", found.decisions)]
    for name, table in named + ([("identities", shared)] if shared is not None else []):
        write_table(os.path.join(folder, f"{name}.parquet"), table)
    decided = found.decisions.filter(pc.equal(found.decisions["side"], 0))
    for name in ("keep", "drop"):
        uris = decided.filter(pc.equal(decided["decision"], name))["uri"]
        setattr(summary, name, len(uris))
        summary.unlisted += _write_list(os.path.join(folder, f"{name}.txt"), uris)
    kinds = found.pairs["kind"].value_counts().to_pylist()
    summary.images, summary.groups = decided.num_rows, found.groups.num_rows
    summary.pairs = {row["values"]: row["counts"] for row in kinds}
    summary.shared = None if shared is None else shared.num_rows


def _write_list(path: str, uris: pa.ChunkedArray) -> int:
    """One uri a line; how many cannot be in such a list."""
    left_out = 0
    try:
        with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            for uri in _texts(uris):
                if "\n" in uri or "\r" in uri:
                    left_out += 1
                else:
                    file.write(uri + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}") from error
    return left_out


def _texts(column: pa.ChunkedArray) -> Iterator[str]:
    for at in range(0, len(column), _ROWS):
        yield from column.slice(at, _ROWS).to_pylist()
