"""clean: judge the identity labels of a gallery, and write decisions, clean lists and a report."""

import os
from dataclasses import dataclass, field, replace

import numpy as np

from facepipe.curation.cleaning.decide import DECISIONS, estimate_errors, estimate_wrong
from facepipe.curation.cleaning.judge import (
    CleanRules,
    LabelJudgement,
    build_identity_table,
    build_pair_table,
    judge_labels,
)
from facepipe.curation.cleaning.lists import (
    DECISION_SCHEMA,
    DECISIONS_FILE,
    IMAGE_SCHEMA,
    IMAGES_FILE,
    ListSummary,
    build_decision_rows,
    build_image_rows,
    write_lists,
)
from facepipe.curation.cleaning.report import build_clean_report
from facepipe.curation.clusters.constraints import read_labels
from facepipe.curation.duplicates import DuplicateRule
from facepipe.curation.graph import Graph
from facepipe.curation.space import find_space_limits
from facepipe.decisions.gallery import DecidedGallery
from facepipe.decisions.mark import save_decisions_mark
from facepipe.errors import GalleryError
from facepipe.gallery.changes import ReadMark
from facepipe.reports.html import write_report
from facepipe.reports.parquet import write_rows, write_table
from facepipe.storage.memory import release_freed_memory
from pipelines.graph import GraphConfig, GraphRunConfig, OnProgress, open_graph, uses_ray
from pipelines.runtime.run_record import PhaseTimer, record_calls
from pipelines.runtime.steps import open_step_runner
from pipelines.runtime.workspace import locate_reports, open_report_folder

NAME = "clean"
MARK = "mark.json"


@dataclass(frozen=True)
class CleanConfig:
    """Configuration of `clean`.

    Attributes:
        clean: Which faces are unfit for training, and what the clean lists hold.
        duplicates: What counts as a copy.
        graph: Which faces are joined.
        run: How the graph is made.
    """

    clean: CleanRules = field(default_factory=CleanRules)
    duplicates: DuplicateRule = field(default_factory=DuplicateRule)
    graph: GraphConfig = field(default_factory=GraphConfig)
    run: GraphRunConfig = field(default_factory=GraphRunConfig)


@dataclass
class CleanSummary:
    """Figures of a cleaning.

    Attributes:
        labelled: Faces with a label.
        unlabelled: Faces without one.
        identities: Number of identities.
        decisions: Faces by decision.
        wrong: Expected number of wrong labels.
        errors: Expected number of wrong decisions.
        swapped: Estimated share of labels that are another identity's.
        nobody: Estimated share of faces that belong to no identity here.
        rounds: Rounds of the estimation.
        merges: Pairs of identities that are likely one person.
        splits: Identities that are likely two persons.
        look_alikes: Other pairs of identities with near faces.
        listed: Rows of clean.csv.
        to_review: Rows of review.csv.
        unlisted: Rows of clean.csv that no text list can hold.
        root: Folder that paths in msceleb.txt are relative to.
        recall: Share of the graph's edges that were found, measured on a sample.
        out: Folder of the report.
        seconds: Seconds per phase.
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
    look_alikes: int = 0
    listed: int = 0
    to_review: int = 0
    unlisted: int = 0
    root: str = ""
    recall: float = 1.0
    out: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@record_calls("clean")
def run(config: CleanConfig, gallery: str, progress: OnProgress = lambda line: None) -> CleanSummary:
    """Judge every label of a gallery, and write the report into GALLERY/reports/clean/.

    Args:
        config: the configuration.
        gallery: path of the gallery.
        progress: called with each line of progress.

    Raises:
        GalleryError: if there is no label at all.
    """
    # The labels are those that count: what people have confirmed, else the source's.
    table = DecidedGallery(gallery)
    summary = CleanSummary(out=os.path.join(locate_reports(table), NAME))
    phases = PhaseTimer(summary.seconds)
    # Duplicates are looked up in the same graph, so that it must reach as far as they do.
    duplicates = config.duplicates.fit_model(find_space_limits(table))
    graph_config = replace(config.graph, reach=max(config.graph.reach, duplicates.radius))
    with open_report_folder(table, NAME) as report:
        graph_folder = os.path.join(locate_reports(table), "graph")
        graph = open_graph([table], graph_config, config.run, graph_folder, progress, report.lease)
        phases.end("graph")
        # Labels are (n,), the number of each node's identity in `names`, or -1.
        labels, names = read_labels(table, graph.nodes)
        if not len(names):
            raise GalleryError(
                f"no face in {table.path!r} has an identity: there are no labels to clean. `facepipe cluster` finds "
                "the persons without labels; `facepipe embed --identity folder` takes labels from folder names"
            )
        progress(f"{int((labels >= 0).sum())} labels of {len(names)} identities: judging")
        with open_step_runner(on_ray=uses_ray(config.run), cpus=config.run.cpus) as runner:
            judgement = judge_labels(
                graph,
                table,
                labels,
                names,
                rules=config.clean,
                duplicates=duplicates,
                seed=config.graph.seed,
                decided=table.decided,
                run_tables=runner.run_tables,
            )
        phases.end("judge")
        release_freed_memory()
        progress("writing")
        lists = _write_tables(graph, table, judgement, report.path, config.clean)
        write_report(build_clean_report(graph, table, judgement), os.path.join(report.path, "report.html"))
        # `finish` takes the report as it is if the gallery has not changed since.
        ReadMark.from_gallery(table).save(os.path.join(report.path, MARK))
        save_decisions_mark(report.path, table.decided.version)
        phases.end("write")
    _summarise(summary, graph, judgement, lists)
    return summary


def _write_tables(
    graph: Graph, gallery: DecidedGallery, judgement: LabelJudgement, folder: str, rules: CleanRules
) -> ListSummary:
    rows = build_decision_rows(gallery, graph.nodes, judgement.verdicts, judgement.names, graph.info)
    write_rows(os.path.join(folder, DECISIONS_FILE), DECISION_SCHEMA, rows)
    images = build_image_rows(gallery, graph.nodes, judgement.verdicts, judgement.names)
    write_rows(os.path.join(folder, IMAGES_FILE), IMAGE_SCHEMA, images)
    write_table(os.path.join(folder, "identities.parquet"), build_identity_table(judgement))
    identities = judgement.identities
    write_table(os.path.join(folder, "merges.parquet"), build_pair_table(judgement, identities.merges))
    write_table(os.path.join(folder, "look_alikes.parquet"), build_pair_table(judgement, identities.look_alikes))
    return write_lists(folder, relabels=rules.relabels, unverified=rules.unverified)


def _summarise(summary: CleanSummary, graph: Graph, judgement: LabelJudgement, lists: ListSummary) -> None:
    verdicts = judgement.verdicts
    posteriors = judgement.posteriors
    # A decision below 0 means that the face has no label.
    decided = verdicts.decision[verdicts.decision >= 0]
    counts = np.bincount(decided, minlength=len(DECISIONS))
    summary.labelled = len(decided)
    summary.unlabelled = len(judgement.labels) - len(decided)
    summary.identities = len(judgement.names)
    summary.decisions = dict(zip(DECISIONS, counts.tolist(), strict=True))
    summary.wrong = estimate_wrong(verdicts)
    summary.errors = estimate_errors(verdicts)
    summary.swapped = posteriors.swapped
    summary.nobody = posteriors.unknown
    summary.rounds = len(posteriors.rounds)
    summary.merges = len(judgement.identities.merges)
    summary.splits = int((judgement.identities.apart_count > 0).sum())
    summary.look_alikes = len(judgement.identities.look_alikes)
    summary.listed = lists.kept
    summary.to_review = lists.to_review
    summary.unlisted = lists.unlisted
    summary.root = lists.root
    summary.recall = graph.info.recall
