"""clean: a gallery with identity labels in, decisions on every label out, with clean lists and a report."""

import os
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from facepipe.curation.cleaning import decide, lists
from facepipe.curation.cleaning.decide import DECISIONS, Verdicts
from facepipe.curation.cleaning.evidence import Candidates, Faces, candidates
from facepipe.curation.cleaning.identities import Parts, Summary, core, parts, summarise
from facepipe.curation.cleaning.model import believe
from facepipe.curation.cleaning.report import Cleaned, clean_report
from facepipe.curation.clusters.constraints import labels as given_labels
from facepipe.curation.clusters.constraints import same_photo
from facepipe.curation.duplicates import DuplicateRule, find_duplicates
from facepipe.curation.duplicates.gather import gather
from facepipe.curation.duplicates.images import Images, images_of
from facepipe.curation.duplicates.stars import face_pairs
from facepipe.curation.graph import Graph
from facepipe.curation.graph.describe import stricter_threshold
from facepipe.errors import GalleryError
from facepipe.gallery import Gallery
from facepipe.nearest.similarity import Pairs
from facepipe.reports.html import write_report
from facepipe.reports.parquet import write_rows, write_table
from facepipe.types import Bool, Float32, Int64
from pipelines.graph import GraphConfig, GraphRunConfig, Progress, open_graph
from pipelines.runtime.phases import Phases
from pipelines.runtime.run_record import records
from pipelines.runtime.workspace import report_folder, reports_of

NAME = "clean"
_ELSEWHERE = np.float32(0.1)  # what a face outside its identity's largest part counts to begin with
_DECISIONS, _IDENTITIES, _MERGES = "decisions.parquet", "identities.parquet", "merges.parquet"


@dataclass(frozen=True)
class CleanRules:
    """What makes a face unfit for training besides its label, and what goes into the clean lists.

    min_face_px: shorter side of the face box in pixels; min_sharpness: variance of the Laplacian on the aligned face
    duplicates: of pictures that an identity holds several times only the best copy is kept
    relabels: relabelled faces are in the clean lists, under their new identity
    """

    min_face_px: Annotated[float, Field(ge=0)] = 20.0
    min_sharpness: Annotated[float, Field(ge=0)] = 0.0
    duplicates: bool = True
    relabels: bool = False


@dataclass(frozen=True)
class CleanConfig:
    """Everything `clean` can be told."""

    clean: CleanRules = field(default_factory=CleanRules)
    duplicates: DuplicateRule = field(default_factory=DuplicateRule)
    graph: GraphConfig = field(default_factory=GraphConfig)
    run: GraphRunConfig = field(default_factory=GraphRunConfig)


@dataclass
class CleanSummary:
    """What a cleaning found.

    wrong: expected number of wrong labels; errors: of wrong decisions
    swapped, nobody: shares of labels that are another identity's, and of faces that belong to no identity here
    root: the folder that paths in msceleb.txt are relative to
    """

    labelled: int = 0
    unlabelled: int = 0
    identities: int = 0
    decisions: dict[str, int] = field(default_factory=dict)
    wrong: float = 0.0
    errors: float = 0.0
    swapped: float = 0.0
    nobody: float = 0.0
    rounds: int = 0
    merges: int = 0
    splits: int = 0
    listed: int = 0
    unlisted: int = 0
    root: str = ""
    recall: float = 1.0
    out: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@records("clean")
def run(config: CleanConfig, gallery: str, progress: Progress = lambda line: None) -> CleanSummary:
    """Judge every label of a gallery into GALLERY/reports/clean/.

    Raises GalleryError where there is no label at all.
    """
    table = Gallery(gallery)
    summary = CleanSummary()
    phases = Phases(summary.seconds)
    wide = replace(config.graph, reach=max(config.graph.reach, config.duplicates.radius))
    with report_folder(table, NAME) as folder:
        graph = open_graph([table], wide, config.run, os.path.join(reports_of(table), "graph"), progress)
        phases.end("graph")
        label, names = given_labels(table, graph.nodes)
        if not len(names):
            raise GalleryError(
                f"no face in {table.path!r} has an identity: there are no labels to clean. `facepipe cluster` finds "
                "the persons without labels; `facepipe embed --identity folder` takes labels from folder names"
            )
        progress(f"{int((label >= 0).sum())} labels of {len(names)} identities: judging")
        found = _cleaned(config, graph, table, label, names)
        phases.end("judge")
        progress("writing")
        written = _write(config, graph, table, found, folder)
        write_report(clean_report(graph, table, found), os.path.join(folder, "report.html"))
        phases.end("write")
    _summarise(summary, graph, found, written)
    summary.out = os.path.join(reports_of(table), NAME)
    return summary


def _cleaned(config: CleanConfig, graph: Graph, gallery: Gallery, label: Int64, names: pa.Array) -> Cleaned:
    threshold = graph.info.threshold.similarity
    faces = Faces(graph.nodes.vectors, graph.density)
    pairs = graph.edges.within(2.0)
    pairs = pairs.take(graph.compute_similarity(pairs) >= threshold)
    copies = graph.representatives
    inside = parts(faces, label, copies, pairs, threshold)
    pool = candidates(label, _with_copies(pairs, copies))
    photo, prior = _photos(gallery, graph, label)
    belief = believe(faces, pool, prior, _start(pool, core(inside), prior), threshold, config.graph.seed)
    verdicts = decide.verdicts(pool, belief, len(label), photo)
    verdicts = _unfit(config, graph, gallery, label, verdicts)
    identities = summarise(faces, label, len(names), verdicts, inside, pairs, stricter_threshold(graph))
    settled = bool(belief.rounds and belief.rounds[-1]["moved"] < 0.01)
    return Cleaned(label, names, verdicts, belief, inside, identities, settled)


def _with_copies(pairs: Pairs, copies: Int64) -> Pairs:
    """Edges with those of copies as well: a copy has the neighbours of the face it equals."""
    moved = copies != np.arange(len(copies))
    if not moved.any():
        return pairs
    last = np.arange(len(copies))
    last[copies[moved]] = np.flatnonzero(moved)  # one copy speaks for all: what matters is the labels around
    u, v = np.concatenate([pairs.u, last[pairs.u]]), np.concatenate([pairs.v, last[pairs.v]])
    return Pairs(u, v, np.concatenate([pairs.distance, pairs.distance]))


def _start(pool: Candidates, inside: Bool, prior: Float32) -> Float32:
    """Labels are believed to begin with where they hold together."""
    believed = np.where(inside[pool.face], np.float32(1), _ELSEWHERE) * prior[pool.face]
    return np.where(pool.own, believed, np.float32(0)).astype(np.float32)


def _photos(gallery: Gallery, graph: Graph, label: Int64) -> tuple[Int64, Float32]:
    """(number of each face's photo (n,), how likely its label is meant for it (n,): one in as many as share both)."""
    count = len(label)
    photo, together = np.arange(count), same_photo(gallery, graph.nodes)
    np.minimum.at(photo, together[:, 1], together[:, 0])
    same = together[label[together[:, 0]] == label[together[:, 1]]]
    sharers = 1 + np.bincount(same.ravel(), minlength=count)
    return photo, (1 / sharers).astype(np.float32)


def _unfit(config: CleanConfig, graph: Graph, gallery: Gallery, label: Int64, found: Verdicts) -> Verdicts:
    """Of the labels that are right, those of faces that training does not want."""
    rules, nodes = config.clean, graph.nodes
    small, blurred = (np.zeros(len(label), bool) for _ in range(2))
    for batch in gallery.batches(["face_id", "face_px", "sharpness"], rows=65536):
        faces = batch.filter(batch["face_id"].is_valid())
        at = nodes.find(faces["face_id"].to_numpy())
        px, sharp = (faces[name].to_numpy(zero_copy_only=False) for name in ("face_px", "sharpness"))
        known = at >= 0
        small[at[known]], blurred[at[known]] = (px < rules.min_face_px)[known], (sharp < rules.min_sharpness)[known]
    found = decide.overruled(found, small, decide.LOW_QUALITY, decide.SMALL)
    found = decide.overruled(found, blurred, decide.LOW_QUALITY, decide.BLURRED)
    if not rules.duplicates:
        return found
    table, row_of_node = gather([gallery], nodes)
    near = face_pairs(graph, table, row_of_node, config.duplicates)
    u, v = row_of_node[near.u], row_of_node[near.v]
    copies = find_duplicates(table, np.minimum(u, v), np.maximum(u, v), near.distance, config.duplicates).decisions
    images = images_of(table, config.duplicates.keep)
    chosen = _worse_copies(found, images, images.of_face[row_of_node], copies, label)
    return decide.overruled(found, chosen, decide.DUPLICATE, decide.COPY)


def _worse_copies(found: Verdicts, images: Images, image: Int64, copies: pa.Table, label: Int64) -> Bool:
    """Kept faces (n,) in whose identity a better copy of their picture is kept too; image (n,) numbers the best first.

    The copy that is best of all may have another label, or be unfit: of the others with one label the best stays.
    """
    copies = copies.filter(copies["kept_uri"].is_valid())
    leader, held = np.arange(len(images)), images.table["uri"]
    worse, best = (pc.index_in(copies[name], value_set=held).to_numpy() for name in ("uri", "kept_uri"))
    leader[worse] = best
    group, kept = leader[image], np.flatnonzero(found.decision == DECISIONS.index(decide.KEEP))
    order = kept[np.lexsort((image[kept], label[kept], group[kept]))]
    again = (np.diff(group[order], prepend=-1) == 0) & (np.diff(label[order], prepend=-1) == 0)
    chosen = np.zeros(len(label), bool)
    chosen[order[again]] = True
    return chosen


def _write(config: CleanConfig, graph: Graph, gallery: Gallery, found: Cleaned, folder: str) -> lists.Written:
    rows = lists.decision_rows(gallery, graph.nodes, found.verdicts, found.names, graph.info)
    write_rows(os.path.join(folder, _DECISIONS), lists.DECISION_ROWS, rows)
    identities = _identity_table(found.identities, found.names, found.inside, found.label)
    left, right = (found.names.take(pa.array(x)) for x in (found.identities.left, found.identities.right))
    merges = pa.table({"left": left, "right": right, "similarity": found.identities.similarity})
    for name, table in ((_IDENTITIES, identities), (_MERGES, merges)):
        write_table(os.path.join(folder, name), table)
    return lists.write_lists(folder, config.clean.relabels)


def _identity_table(found: Summary, names: pa.Array, inside: Parts, label: Int64) -> pa.Table:
    solid = (label >= 0) & (inside.size > 1)
    count = len(names)
    keys = np.unique(label[solid] * (len(label) + 1) + inside.part[solid]) // (len(label) + 1)
    return pa.table(
        {
            "identity": names,
            "faces": found.faces,
            "kept": found.kept,
            "wrong": found.wrong,
            "purity": (1 - found.wrong / np.maximum(1, found.faces)).astype(np.float32),
            "sub_clusters": np.bincount(keys, minlength=count),
            "apart": found.apart,
            "apart_similarity": pa.array(found.apart_similarity, mask=np.isnan(found.apart_similarity)),
        }
    )


def _summarise(summary: CleanSummary, graph: Graph, found: Cleaned, written: lists.Written) -> None:
    decided = found.verdicts.decision[found.verdicts.decision >= 0]
    counts = np.bincount(decided, minlength=len(DECISIONS))
    summary.labelled, summary.unlabelled = len(decided), len(found.label) - len(decided)
    summary.identities, summary.decisions = len(found.names), dict(zip(DECISIONS, counts.tolist(), strict=True))
    summary.wrong = float(np.nansum(found.verdicts.noise))
    summary.errors = decide.expected_errors(found.verdicts)
    summary.swapped, summary.nobody = found.belief.swapped, found.belief.lost
    summary.rounds = len(found.belief.rounds)
    summary.merges, summary.splits = len(found.identities.left), int((found.identities.apart > 0).sum())
    summary.listed, summary.unlisted, summary.recall = written.kept, written.unlisted, graph.info.recall
    summary.root = written.root
