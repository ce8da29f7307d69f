"""The cleaning report: labels that are probably wrong first, then identities to merge or to split."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from facepipe.curation.cleaning.decide import (
    DECISIONS,
    KEEP,
    OUTLIER,
    REASONS,
    RELABEL,
    REVIEW,
    Verdicts,
    expected_errors,
)
from facepipe.curation.cleaning.identities import Parts, Summary
from facepipe.curation.cleaning.model import Belief
from facepipe.curation.graph import Graph
from facepipe.curation.graph.describe import recall_note
from facepipe.gallery import Gallery
from facepipe.reports.faces import Shown, shown
from facepipe.reports.histogram import linear_edges, log_edges, series
from facepipe.reports.model import Face, Figure, Group, Histogram, Report, Table
from facepipe.types import Float32, Int64

_SHOWN = 4  # faces of an identity beside a suspicious one
_LABELS, _PAIRS = 6000, 1500  # groups of each kind
_NOBODY = Shown("", None, None)


@dataclass(frozen=True)
class Cleaned:
    """Everything a cleaning has found; arrays (n,) are by node, (k,) by identity."""

    label: Int64
    names: pa.Array
    verdicts: Verdicts
    belief: Belief
    inside: Parts
    identities: Summary
    settled: bool


def clean_report(graph: Graph, gallery: Gallery, found: Cleaned) -> Report:
    """The report of a cleaning."""
    verdicts, info = found.verdicts, graph.info
    labelled = verdicts.decision >= 0
    counts = np.bincount(verdicts.decision[labelled], minlength=len(DECISIONS))
    known = verdicts.noise[labelled]
    wrong, errors = float(known.sum()), expected_errors(verdicts)
    groups = _Groups(graph, gallery, found)
    figures = (
        Figure("labelled faces", f"{int(labelled.sum()):,}", f"of {len(found.label):,} in the gallery"),
        Figure("identities", f"{len(found.names):,}"),
        Figure("wrong labels", f"{wrong:,.0f}", f"estimated: {wrong / max(1, len(known)):.2%} of all"),
        Figure("kept", f"{int(counts[DECISIONS.index(KEEP)]):,}"),
        Figure("expected errors", f"{errors:,.1f}", "decisions that are wrong, by the probabilities themselves"),
        Figure("one person, two names", f"{len(found.identities.left):,}", "pairs of identities"),
        Figure("two persons, one name", f"{int((found.identities.apart > 0).sum()):,}", "identities"),
        Figure("edge recall", f"{info.recall:.4f}", recall_note(info)),
    )
    notes = (
        "noise is the probability that a label is wrong. It comes from the corpus itself: how alike faces are to the "
        "rest of their identity and to others, and how often labels are swapped. No threshold is set by hand.",
        "Expected errors were somewhat above the real ones on LFW with 10 and 20 % of the labels swapped, and a "
        "quarter of them with 40 %.",
        "The lists and all decisions lie beside this page: clean.csv, clean.txt, msceleb.txt, relabel.csv, "
        "decisions.parquet, identities.parquet.",
    )
    return Report(
        title="Noisy identities",
        subtitle=f"{gallery.path}, table version {info.versions[0]}",
        figures=figures,
        histograms=(_similarities(found), _noise(known), _sizes(found)),
        tables=(_reasons(found), _rounds(found)),
        groups=groups,
        notes=notes,
        groups_total=groups.total,
    )


def _similarities(found: Cleaned) -> Histogram:
    own, other = found.verdicts.own, found.verdicts.other_similarity
    kept = found.verdicts.decision == DECISIONS.index(KEEP)
    known = np.concatenate([own[~np.isnan(own)], other[~np.isnan(other)]])
    edges = linear_edges(float(known.min(initial=1)), float(known.max(initial=-1)) + 1e-3, 80)
    rows = (
        series("own identity, kept", own[kept], edges),
        series("own identity, not kept", own[~kept], edges),
        series("best other identity", other, edges),
    )
    return Histogram("Similarity to identities", "mean similarity to the rest of the identity", rows, log=True)


def _noise(known: Float32) -> Histogram:
    edges = np.linspace(0, 1, 51)
    return Histogram(
        "How sure it is", "probability that the label is wrong", (series("faces", known, edges),), log=True
    )


def _sizes(found: Cleaned) -> Histogram:
    sizes = found.identities.faces
    edges = log_edges(1, max(2.0, float(sizes.max(initial=1)) + 1))
    rows = (series("before", sizes, edges), series("kept", np.maximum(found.identities.kept, 1), edges))
    return Histogram("Faces of an identity", "faces", rows, log=True, log_x=True)


def _reasons(found: Cleaned) -> Table:
    decided = found.verdicts.decision >= 0
    pairs = list(zip(found.verdicts.decision[decided], found.verdicts.reason[decided], strict=True))
    keys, counts = np.unique(np.array(pairs, np.int64).reshape(-1, 2), axis=0, return_counts=True)
    rows = tuple((DECISIONS[d], REASONS[r], f"{n:,}") for (d, r), n in zip(keys, counts, strict=True))
    return Table("Decisions", ("decision", "because", "faces"), rows)


def _rounds(found: Cleaned) -> Table:
    rows = tuple(
        (str(n), f"{r['swapped']:.4f}", f"{r['nobody']:.4f}", f"{r['moved']:.4f}")
        for n, r in enumerate(found.belief.rounds, 1)
    )
    title = "Rounds of cleaning and centring anew" + ("" if found.settled else ", stopped before they settled")
    return Table(title, ("round", "labels swapped", "faces of nobody", "largest change"), rows)


class _Groups:
    """Groups of faces, read from the gallery when they are asked for."""

    def __init__(self, graph: Graph, gallery: Gallery, found: Cleaned):
        self._graph, self._gallery, self._found = graph, gallery, found
        verdicts = found.verdicts
        flagged = np.isin(verdicts.decision, [DECISIONS.index(name) for name in (OUTLIER, RELABEL, REVIEW)])
        order = np.lexsort((np.arange(len(flagged)), -verdicts.noise))
        self._faces = order[flagged[order]]
        self._split = np.flatnonzero(found.identities.apart > 0)
        self._split = self._split[np.argsort(found.identities.apart_similarity[self._split], kind="stable")]
        by = np.lexsort((-np.nan_to_num(verdicts.own), verdicts.decision != DECISIONS.index(KEEP), found.label))
        self._order, self._begins = by, np.searchsorted(found.label[by], np.arange(len(found.names) + 1))
        self.total = len(self._faces) + len(found.identities.left) + len(self._split)

    def __iter__(self) -> Iterator[Group]:
        faces, split = self._faces[:_LABELS], self._split[:_PAIRS]
        merges = range(min(_PAIRS, len(self._found.identities.left)))
        wanted = [self._around(int(face)) for face in faces]
        wanted += [self._pair(n) for n in merges] + [self._parts(int(k)) for k in split]
        nodes = np.unique(np.concatenate([np.empty(0, np.int64), *wanted]))
        known = shown(self._gallery, self._graph.nodes.ids[nodes])
        yield from (self._label(int(face), known) for face in faces)
        yield from (self._merge(n, known) for n in merges)
        yield from (self._two(int(k), known) for k in split)

    def _best(self, identity: int, count: int = _SHOWN) -> Int64:
        if identity < 0:
            return np.empty(0, np.int64)
        return self._order[self._begins[identity] : self._begins[identity + 1]][:count]

    def _around(self, face: int) -> Int64:
        own, other = (int(x[face]) for x in (self._found.label, self._found.verdicts.other))
        return np.concatenate([[face], self._best(own), self._best(other)])

    def _pair(self, n: int) -> Int64:
        both = (self._found.identities.left[n], self._found.identities.right[n])
        return np.concatenate([self._best(int(k)) for k in both])

    def _parts(self, identity: int) -> Int64:
        members = self._order[self._begins[identity] : self._begins[identity + 1]]
        part = self._found.inside.part[members]
        return np.concatenate([members[part == p][:_SHOWN] for p in (0, 1)])

    def _label(self, face: int, known: dict[int, Shown]) -> Group:
        verdicts, name = self._found.verdicts, self._name(int(self._found.label[face]))
        kind = DECISIONS[verdicts.decision[face]]
        figures = [("noise", f"{verdicts.noise[face]:.3f}"), ("its identity", self._distance(verdicts.own[face]))]
        other = int(verdicts.other[face])
        if other >= 0:
            figures.append((self._name(other), self._distance(verdicts.other_similarity[face])))
        rows = [self._face(face, kind, known)]
        rows += [self._face(int(n), "label", known) for n in self._best(int(self._found.label[face])) if n != face]
        rows += [self._face(int(n), "other", known) for n in self._best(other) if n != face]
        title = f"{name}: {REASONS[verdicts.reason[face]]}"
        return Group(title, kind, tuple(figures), tuple(rows), suspicion=float(verdicts.noise[face]))

    def _merge(self, n: int, known: dict[int, Shown]) -> Group:
        found = self._found.identities
        left, right, similarity = int(found.left[n]), int(found.right[n]), float(found.similarity[n])
        rows = [self._face(int(f), "first", known) for f in self._best(left)]
        rows += [self._face(int(f), "second", known) for f in self._best(right)]
        figures = (
            ("mean distance", self._distance(similarity)),
            ("faces", f"{found.faces[left]} + {found.faces[right]}"),
        )
        return Group(f"{self._name(left)} and {self._name(right)}: one person?", "merge", figures, tuple(rows), 0.5)

    def _two(self, identity: int, known: dict[int, Shown]) -> Group:
        found = self._found.identities
        nodes = self._parts(identity)
        rows = [self._face(int(f), "second" if self._found.inside.part[f] else "first", known) for f in nodes]
        figures = (
            ("distance between the parts", self._distance(found.apart_similarity[identity])),
            ("faces", f"{found.faces[identity]}, {found.apart[identity]} apart"),
        )
        return Group(f"{self._name(identity)}: two persons?", "split", figures, tuple(rows), 0.5)

    def _name(self, identity: int) -> str:
        return str(self._found.names[identity].as_py())

    def _distance(self, similarity: float) -> str:
        return "nothing to compare with" if np.isnan(similarity) else f"{self._graph.info.distance_at(similarity):.3f}"

    def _face(self, node: int, badge: str, known: dict[int, Shown]) -> Face:
        face = known.get(int(self._graph.nodes.ids[node]), _NOBODY)
        figures: Sequence[tuple[str, str]] = [("label", face.identity)] if face.identity else []
        return Face(face.uri, tuple(figures), face.thumb, badge)
