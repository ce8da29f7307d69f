"""Build the cleaning report: labels that are probably wrong first, then identities to merge or to split."""

import shlex
from collections.abc import Iterator

import numpy as np

from facepipe.curation.cleaning.decide import (
    BYSTANDER,
    DECISIONS,
    FITS_NONE,
    KEEP,
    OUTLIER,
    PROBABLY_RIGHT,
    PROBABLY_WRONG,
    REASONS,
    RELABEL,
    REVIEW,
    TWO_NAMES,
    UNVERIFIED,
    WRONG_OF_WHOM,
    LabelVerdicts,
    estimate_errors,
    estimate_wrong,
)
from facepipe.curation.cleaning.judge import LabelJudgement
from facepipe.curation.graph import Graph
from facepipe.curation.graph.describe import describe_recall
from facepipe.gallery import Gallery
from facepipe.reports.faces import FaceDetails, list_distances, read_face_details
from facepipe.reports.histogram import count_values, linear_edges, log_edges
from facepipe.reports.model import Choice, Face, Figure, Group, Histogram, Report, ReviewTarget, Step, Table
from facepipe.reports.questions import ASKS_FOR, build_label_choices, build_pair_choices, list_review_steps
from facepipe.reports.top import SLICE, BestMembers, find_highest
from facepipe.types import Bool, Float32, Int64

_EXAMPLES = 4  # faces of an identity beside a suspicious one
# Bounds of the bins of probabilities, as in `facepipe evaluate clean`.
_NOISE_BINS = (0.0, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 1.0)
_MAX_LABEL_GROUPS = 6000
_MAX_IDENTITY_GROUPS = 1500  # of merges, and of splits
_UNKNOWN_FACE = FaceDetails("", None, None)
# What a page says for a reason, if the words of the tables do not speak to its reader.
_READER_REASONS = {
    PROBABLY_WRONG: "probably mislabelled, please check",
    WRONG_OF_WHOM: "mislabelled: whose face is it?",
    PROBABLY_RIGHT: "probably right, please check",
    FITS_NONE: "looks like nobody of this name",
    TWO_NAMES: "the same picture has another name too",
}


def build_clean_report(graph: Graph, gallery: Gallery, judgement: LabelJudgement) -> Report:
    """Build the report of a cleaning."""
    groups = _CleanGroups(graph, gallery, judgement)
    noise = judgement.verdicts.noise[judgement.verdicts.is_counted]
    notes = (
        "noise is the probability that a label is wrong. It comes from the corpus itself: how alike faces are to the "
        "rest of their identity and to others, and how often labels are swapped. No threshold is set by hand.",
        "Expected errors are what the probabilities predict; labels to review and unverified ones are not decided. "
        "`facepipe evaluate clean` compares with the truth, and docs/performance.md has the result on known faces.",
        "A label of an image counts once. Other faces of the image are bystanders, and no wrong labels.",
        "The lists and all decisions are beside this page: clean.csv, clean.txt, msceleb.txt, relabel.csv, review.csv, "
        "decisions.parquet (faces), images.parquet (every image once), identities.parquet.",
    )
    return Report(
        title="Noisy identities",
        subtitle=f"{gallery.path}, table version {graph.info.versions[0]}",
        findings=_describe_findings(judgement),
        steps=list_review_steps(
            gallery.path,
            "clean",
            Step("Clean again, with your decisions:", f"facepipe clean {shlex.quote(gallery.path)}"),
        ),
        figures=_build_figures(judgement),
        details=_build_details(graph, judgement.verdicts),
        review=ReviewTarget(gallery.path, "clean", graph.info.versions[0]),
        histograms=(
            _build_similarity_histogram(judgement.verdicts),
            _build_noise_histogram(noise),
            _build_size_histogram(judgement),
        ),
        tables=(
            _build_decision_table(judgement.verdicts),
            _build_certainty_table(judgement.verdicts),
            _build_round_table(judgement),
        ),
        groups=groups,
        notes=notes,
        groups_total=groups.total,
    )


def _describe_findings(judgement: LabelJudgement) -> tuple[str, ...]:
    """Say what was found, and what it means."""
    verdicts = judgement.verdicts
    counts = np.bincount(verdicts.decision[verdicts.decision >= 0], minlength=len(DECISIONS))
    label_count = int(verdicts.is_counted.sum())
    wrong = estimate_wrong(verdicts)
    relabels = counts[DECISIONS.index(RELABEL)]
    outliers = counts[DECISIONS.index(OUTLIER)]
    findings = [
        f"About {wrong:,.0f} of {label_count:,} labels ({wrong / max(1, label_count):.1%}) are wrong.",
        f"Kept: {counts[DECISIONS.index(KEEP)]:,} faces. Left out of the clean lists: {relabels:,} that fit another "
        f"name of the gallery, and {outliers:,} that fit none.",
    ]
    reviews = counts[DECISIONS.index(REVIEW)]
    if reviews:
        findings.append(f"Doubtful labels: {reviews:,}. Only a person can tell, and your answers settle them.")
    return tuple(findings)


def _build_details(graph: Graph, verdicts: LabelVerdicts) -> tuple[Figure, ...]:
    errors = estimate_errors(verdicts)
    return (
        Figure("expected errors", f"{errors:,.1f}", "decisions expected to be wrong, by their own probabilities"),
        Figure("edge recall", f"{graph.info.recall:.4f}", describe_recall(graph.info)),
    )


def _build_figures(judgement: LabelJudgement) -> tuple[Figure, ...]:
    verdicts = judgement.verdicts
    identities = judgement.identities
    is_labelled = verdicts.decision >= 0
    counts = np.bincount(verdicts.decision[is_labelled], minlength=len(DECISIONS))
    label_count = int(verdicts.is_counted.sum())
    wrong = estimate_wrong(verdicts)
    return (
        Figure("labelled faces", f"{int(is_labelled.sum()):,}", f"of {len(judgement.labels):,} in the gallery"),
        Figure("identities", f"{len(judgement.names):,}"),
        Figure("wrong labels", f"{wrong:,.0f}", f"estimated: {wrong / max(1, label_count):.2%} of all"),
        Figure("kept", f"{int(counts[DECISIONS.index(KEEP)]):,}"),
        Figure("to review", f"{int(counts[DECISIONS.index(REVIEW)]):,}", "labels that are not sure"),
        Figure("unverified", f"{int(counts[DECISIONS.index(UNVERIFIED)]):,}", "only images of their identities"),
        Figure("bystanders", f"{int(counts[DECISIONS.index(BYSTANDER)]):,}", "other faces of images, no wrong labels"),
        Figure(
            "one person, two names", f"{len(identities.merges):,}", _describe_expected(identities.merges.probability)
        ),
        Figure("look-alikes", f"{len(identities.look_alikes):,}", "pairs of identities, hardly one person each"),
        Figure(
            "two persons, one name",
            f"{int((identities.apart_count > 0).sum()):,}",
            _describe_expected(identities.apart_probability[identities.apart_count > 0]),
        ),
    )


def _describe_expected(probability: Float32) -> str:
    return f"about {float(probability.sum()):.1f} of them expected to be right"


def _build_similarity_histogram(verdicts: LabelVerdicts) -> Histogram:
    own = verdicts.own_similarity
    other = verdicts.other_similarity
    is_kept = verdicts.is_kept
    # The bins cover similarities to the own identity and to others.
    low = min(np.fmin.reduce(values, initial=1) for values in (own, other))
    high = max(np.fmax.reduce(values, initial=-1) for values in (own, other))
    edges = linear_edges(float(low), float(high) + 1e-3, 80)
    rows = (
        count_values("own identity, kept", own[is_kept], edges),
        count_values("own identity, not kept", own[~is_kept], edges),
        count_values("best other identity", other, edges),
    )
    return Histogram("Similarity to identities", "mean similarity to the rest of the identity", rows, log=True)


def _build_noise_histogram(noise: Float32) -> Histogram:
    rows = (count_values("faces", noise, np.linspace(0, 1, 51)),)
    return Histogram("How sure it is", "probability that the label is wrong", rows, log=True)


def _build_size_histogram(judgement: LabelJudgement) -> Histogram:
    sizes = judgement.identities.face_count
    edges = log_edges(1, max(2.0, float(sizes.max(initial=1)) + 1))
    kept = np.maximum(judgement.identities.kept_count, 1)
    rows = (count_values("before", sizes, edges), count_values("kept", kept, edges))
    return Histogram("Faces of an identity", "faces", rows, log=True, log_x=True)


def _build_decision_table(verdicts: LabelVerdicts) -> Table:
    # Count each combination of a decision and a reason, slice by slice.
    counts = np.zeros((len(DECISIONS), len(REASONS)), np.int64)
    for begin in range(0, len(verdicts.decision), SLICE):
        decision = verdicts.decision[begin : begin + SLICE]
        is_decided = decision >= 0
        np.add.at(counts, (decision[is_decided], verdicts.reason[begin : begin + SLICE][is_decided]), 1)
    rows = tuple(
        (DECISIONS[decision], REASONS[reason], f"{counts[decision, reason]:,}")
        for decision, reason in np.argwhere(counts)
    )
    return Table("Decisions", ("decision", "because", "faces"), rows)


def _build_certainty_table(verdicts: LabelVerdicts) -> Table:
    """Count labels by their probability of being wrong, beside how many are wrong by it."""
    noise = verdicts.noise[verdicts.is_counted]
    bins = np.minimum(np.digitize(noise, _NOISE_BINS) - 1, len(_NOISE_BINS) - 2)
    counts = np.bincount(bins, minlength=len(_NOISE_BINS) - 1)
    wrong = np.bincount(bins, noise, len(_NOISE_BINS) - 1)
    rows = tuple(
        (f"{_NOISE_BINS[n]:g} to {_NOISE_BINS[n + 1]:g}", f"{counts[n]:,}", f"{wrong[n]:,.1f}")
        for n in np.flatnonzero(counts)
    )
    return Table("Labels by the probability that they are wrong", ("probability", "labels", "wrong, expected"), rows)


def _build_round_table(judgement: LabelJudgement) -> Table:
    rows = tuple(
        (str(n), f"{entry.swapped:.4f}", f"{entry.unknown:.4f}", f"{entry.change:.4f}")
        for n, entry in enumerate(judgement.posteriors.rounds, 1)
    )
    title = "Iterations of the estimation"
    if not judgement.posteriors.has_settled:
        title += ", stopped before they settled"
    return Table(title, ("round", "labels swapped", "faces of no identity", "largest change"), rows)


class _CleanGroups:
    """Groups of faces to look at. Their pictures are read from the gallery when the groups are iterated."""

    def __init__(self, graph: Graph, gallery: Gallery, judgement: LabelJudgement):
        self._graph = graph
        self._gallery = gallery
        self._judgement = judgement
        verdicts = judgement.verdicts
        identities = judgement.identities
        # Suspicious labels, by falling noise.
        is_flagged = np.isin(verdicts.decision, [DECISIONS.index(name) for name in (OUTLIER, RELABEL, REVIEW)])
        self._suspects = find_highest(verdicts.noise, _MAX_LABEL_GROUPS, is_flagged)
        # Identities that may be two persons, the least similar parts first.
        split = np.flatnonzero(identities.apart_count > 0)
        self._split = split[np.argsort(identities.apart_similarity[split], kind="stable")]
        # Pairs of identities that are likely one person, and behind them the look-alikes.
        self._named_count = len(identities.merges)
        self._pairs = np.stack(
            [
                np.concatenate([identities.merges.left, identities.look_alikes.left]),
                np.concatenate([identities.merges.right, identities.look_alikes.right]),
            ],
            axis=1,
        )
        # The best faces of the identities that are shown, and of the parts of those that may be two persons.
        shown = [judgement.labels[self._suspects], verdicts.other[self._suspects], self._pairs[:_MAX_IDENTITY_GROUPS]]
        identities_shown = np.concatenate([numbers.reshape(-1) for numbers in shown])
        self._best = BestMembers(
            len(judgement.labels),
            identities_shown[identities_shown >= 0],
            _EXAMPLES,
            lambda part: judgement.labels[part],
            self._rank,
        )
        split_shown = self._split[:_MAX_IDENTITY_GROUPS]
        self._parts = BestMembers(
            len(judgement.labels),
            np.concatenate([2 * split_shown, 2 * split_shown + 1]),
            _EXAMPLES,
            self._number_parts,
            self._rank,
        )
        self.total = int(is_flagged.sum()) + len(self._pairs) + len(split)

    def __iter__(self) -> Iterator[Group]:
        suspects = self._suspects.tolist()
        merges = range(min(_MAX_IDENTITY_GROUPS, len(self._pairs)))
        split = self._split[:_MAX_IDENTITY_GROUPS].tolist()
        # Read all faces in one pass over the gallery.
        nodes = [np.empty(0, np.int64)]
        nodes += [self._select_around(face) for face in suspects]
        nodes += [self._select_merge(pair) for pair in merges]
        nodes += [self._select_parts(identity) for identity in split]
        faces = read_face_details(self._gallery, self._graph.nodes.ids[np.unique(np.concatenate(nodes))])
        yield from (self._build_label_group(face, faces) for face in suspects)
        yield from (self._build_merge_group(pair, faces) for pair in merges)
        yield from (self._build_split_group(identity, faces) for identity in split)

    def _rank(self, faces: Int64) -> tuple[Float32, Bool]:
        """Order faces: the kept ones first, and of these the best fit."""
        verdicts = self._judgement.verdicts
        chosen = verdicts.decision[faces]
        is_kept = (chosen == DECISIONS.index(KEEP)) | (chosen == DECISIONS.index(UNVERIFIED))
        return -np.nan_to_num(verdicts.own_similarity[faces]), ~is_kept

    def _number_parts(self, faces: slice) -> Int64:
        """Assign numbers to the two largest parts of each identity; faces of neither get -1."""
        part = self._judgement.parts.part[faces]
        labels = self._judgement.labels[faces]
        return np.where((labels >= 0) & ((part == 0) | (part == 1)), 2 * labels + part, -1)

    def _select_best(self, identity: int) -> Int64:
        """Select the best faces of an identity. There are none for the identity -1."""
        return self._best.list_members(identity)

    def _select_around(self, face: int) -> Int64:
        own = int(self._judgement.labels[face])
        other = int(self._judgement.verdicts.other[face])
        return np.concatenate([[face], self._select_best(own), self._select_best(other)])

    def _select_merge(self, pair: int) -> Int64:
        left, right = self._pairs[pair].tolist()
        return np.concatenate([self._select_best(left), self._select_best(right)])

    def _select_parts(self, identity: int) -> Int64:
        return np.concatenate([self._parts.list_members(2 * identity + number) for number in (0, 1)])

    def _build_label_group(self, face: int, faces: dict[int, FaceDetails]) -> Group:
        """Show a suspicious face beside the best faces of its label and of the most likely other identity."""
        verdicts = self._judgement.verdicts
        label = int(self._judgement.labels[face])
        other = int(verdicts.other[face])
        decision = DECISIONS[verdicts.decision[face]]
        figures = [
            ("label wrong, probability", f"{verdicts.noise[face]:.3f}"),
            ("distance to its identity", self._format_distance(verdicts.own_similarity[face])),
        ]
        if other >= 0:
            figures.append((self._get_name(other), self._format_distance(verdicts.other_similarity[face])))
        # The face itself, then the best faces of both identities.
        of_label = [n for n in self._select_best(label).tolist() if n != face]
        of_other = [n for n in self._select_best(other).tolist() if n != face]
        nodes = [face, *of_label, *of_other]
        rows = [self._build_face(face, decision, faces)]
        rows += [self._build_face(n, "label", faces) for n in of_label]
        rows += [self._build_face(n, "other", faces) for n in of_other]
        name = self._get_name(label)
        other_name = self._get_name(other) if other >= 0 else ""
        suggests_other = decision == RELABEL and bool(other_name)
        # The title asks for the suggested name; `facepipe.erasure.pages` finds both names in it.
        reason = int(verdicts.reason[face])
        title = f"{name}: {_READER_REASONS.get(reason, REASONS[reason])}"
        if suggests_other:
            title = f"{name}{ASKS_FOR}{other_name}?"
        noise = float(verdicts.noise[face])
        face_id = int(self._graph.nodes.ids[face])
        return Group(
            title,
            decision,
            tuple(figures),
            tuple(rows),
            suspicion=noise,
            choices=build_label_choices(face_id, name, other_name, suggests_other=suggests_other),
            has_subject=True,
            probability=None if np.isnan(noise) else noise,
            distances=self._list_distances(nodes),
        )

    def _build_merge_group(self, pair: int, faces: dict[int, FaceDetails]) -> Group:
        """Show the best faces of two identities that may be one person, side by side."""
        identities = self._judgement.identities
        is_named = pair < self._named_count
        pairs = identities.merges if is_named else identities.look_alikes
        at = pair if is_named else pair - self._named_count
        left, right = self._pairs[pair].tolist()
        left_nodes = self._select_best(left).tolist()
        right_nodes = self._select_best(right).tolist()
        rows = [self._build_face(n, "first", faces) for n in left_nodes]
        rows += [self._build_face(n, "second", faces) for n in right_nodes]
        probability = float(pairs.probability[at])
        figures = (
            ("probability", f"{probability:.3f}"),
            ("mean distance", self._format_distance(float(pairs.similarity[at]))),
            ("faces", f"{pairs.face_counts[at, 0]} + {pairs.face_counts[at, 1]}"),
        )
        question = "one person?" if is_named else "look-alikes"
        title = f"{self._get_name(left)} and {self._get_name(right)}: {question}"
        kind = "merge" if is_named else "look-alike"
        choices: tuple[Choice, ...] = ()
        if left_nodes and right_nodes:
            choices = build_pair_choices(rows[0], rows[len(left_nodes)], suggests_one=is_named)
        return Group(
            title,
            kind,
            figures,
            tuple(rows),
            0.5 * probability,
            choices=choices,
            probability=probability if is_named else 1 - probability,
            gain=float(pairs.face_counts[at].min()) if is_named else 0.0,
            distances=self._list_distances([*left_nodes, *right_nodes]),
        )

    def _build_split_group(self, identity: int, faces: dict[int, FaceDetails]) -> Group:
        """Show the two largest parts of an identity that may be two persons."""
        identities = self._judgement.identities
        part = self._judgement.parts.part
        nodes = self._select_parts(identity).tolist()
        rows = [self._build_face(n, "second" if part[n] else "first", faces) for n in nodes]
        second = next((row for row in rows if row.badge == "second"), None)
        choices: tuple[Choice, ...] = ()
        if second is not None and rows[0].badge == "first":
            choices = build_pair_choices(rows[0], second, suggests_one=False)
        probability = float(identities.apart_probability[identity])
        figures = (
            ("probability", f"{identities.apart_probability[identity]:.3f}"),
            ("distance between the parts", self._format_distance(identities.apart_similarity[identity])),
            ("faces", f"{identities.face_count[identity]}, {identities.apart_count[identity]} apart"),
        )
        return Group(
            f"{self._get_name(identity)}: two persons?",
            "split",
            figures,
            tuple(rows),
            0.5,
            choices=choices,
            probability=None if np.isnan(probability) else probability,
            gain=float(identities.apart_count[identity]),
            distances=self._list_distances(nodes),
        )

    def _list_distances(self, nodes: list[int]) -> tuple[float, ...]:
        return list_distances(np.asarray(self._graph.nodes.vectors[np.array(nodes, np.int64)]))

    def _build_face(self, node: int, badge: str, faces: dict[int, FaceDetails]) -> Face:
        face_id = int(self._graph.nodes.ids[node])
        face = faces.get(face_id, _UNKNOWN_FACE)
        figures = (("label", face.identity),) if face.identity else ()
        return Face(face.uri, figures, face.thumb, badge, face_id, face.identity or "", face.place)

    def _get_name(self, identity: int) -> str:
        return str(self._judgement.names[identity].as_py())

    def _format_distance(self, similarity: float) -> str:
        if np.isnan(similarity):
            return "nothing to compare with"
        return f"{self._graph.info.to_distance(similarity):.3f}"
