"""Judge every identity label of a gallery: gather the evidence, decide, and sort out faces unfit for training."""

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from facepipe.arrow import to_vectors
from facepipe.curation.cleaning import decide
from facepipe.curation.cleaning.decide import LabelVerdicts, decide_labels, overrule_kept, question_kept
from facepipe.curation.cleaning.decided_labels import DecidedLabels, confirm_labels
from facepipe.curation.cleaning.evidence import FaceVectors, LabelCandidates, find_candidates
from facepipe.curation.cleaning.identities import (
    IdentityPairs,
    IdentityParts,
    IdentitySummary,
    split_identities,
    summarise_identities,
)
from facepipe.curation.cleaning.model import LabelPosteriors, weigh_names
from facepipe.curation.cleaning.near_identities import estimate_beyond_graph
from facepipe.curation.cleaning.neighbours import NearFaces, NearVoters
from facepipe.curation.cleaning.persons import number_persons
from facepipe.curation.clusters.constraints import find_same_photo_pairs
from facepipe.curation.duplicates import DuplicateRule
from facepipe.curation.duplicates.partitioned import CopySearch, CopySource, find_copies_by_partition
from facepipe.curation.graph import Graph
from facepipe.curation.graph.components import find_components
from facepipe.curation.space import COPY_LIMITS, find_space_scale
from facepipe.decisions.persons import DecidedFaces
from facepipe.gallery import Gallery
from facepipe.storage.memory import release_freed_memory
from facepipe.storage.partitions import RunTables, run_tables_here
from facepipe.types import Bool, Float32, Float64, Int64

_START_OUTSIDE = np.float32(0.1)  # starting probability of a face outside the largest part of its identity
_ROWS = 65536


@dataclass(frozen=True)
class CleanRules:
    """Rules for which faces are unfit for training besides wrong labels, and what the clean lists hold.

    Attributes:
        min_face_px: Minimum shorter side of the face box, in pixels.
        min_sharpness: Minimum variance of the Laplacian on the aligned face.
        duplicates: Keep only the best copy of a picture that an identity holds several times.
        relabels: Put relabelled faces into the clean lists, under their new identity.
        unverified: Put the only images of identities into the clean lists, which nothing can be compared with.
    """

    min_face_px: Annotated[float, Field(ge=0)] = 20.0
    min_sharpness: Annotated[float, Field(ge=0)] = 0.0
    duplicates: bool = True
    relabels: bool = False
    unverified: bool = True


@dataclass(frozen=True)
class LabelJudgement:
    """Everything that is known about the labels of n faces with k identities.

    Attributes:
        labels: Number of each face's identity, (n,), -1 for none.
        names: Names of the identities, (k,).
        verdicts: Decision on each label.
        posteriors: Estimates that the decisions follow from.
        parts: Parts that the identities fall into.
        identities: Figures of the identities.
    """

    labels: Int64
    names: pa.Array
    verdicts: LabelVerdicts
    posteriors: LabelPosteriors
    parts: IdentityParts
    identities: IdentitySummary


def judge_labels(
    graph: Graph,
    gallery: Gallery,
    labels: Int64,
    names: pa.Array,
    *,
    rules: CleanRules,
    duplicates: DuplicateRule,
    seed: int,
    decided: DecidedFaces | None = None,
    run_tables: RunTables = run_tables_here,
) -> LabelJudgement:
    """Judge every label of a gallery.

    Args:
        graph: the gallery's face graph, n nodes.
        gallery: the gallery.
        labels: number of each node's identity, (n,), -1 for none.
        names: names of the identities.
        rules: what makes a face unfit for training.
        duplicates: what counts as a copy.
        seed: seed of the samples.
        decided: what people have decided; nothing by default. Confirmed labels are certain.
        run_tables: runs the steps of the search for copies.
    """
    decisions = DecidedLabels.locate(decided or DecidedFaces(), graph.nodes.ids, labels, names)
    threshold = graph.info.threshold.similarity
    photo, prior = _number_photos(gallery, graph, labels)
    prior = np.where(decisions.is_confirmed, np.float32(1), prior)
    faces = FaceVectors(graph.nodes.vectors, graph.density, photo)
    # A user may look for copies farther apart; that two faces are certainly one is a matter of their space.
    scale = find_space_scale(gallery)
    same_picture = COPY_LIMITS["same_shot"] * scale
    release_freed_memory()
    # Neighbours are the edges that are as similar as one person's.
    near = NearFaces(graph)
    copies = graph.representatives

    # Copies of a picture under one name count once: the first of them votes, and the others share its verdict.
    copied = _find_copies(graph, gallery, duplicates, decisions.decided, run_tables)
    voter = _choose_voters(copied, copies, labels)
    is_voter = voter == np.arange(len(labels))
    voting = np.where(is_voter, labels, -1)
    near_voters = NearVoters.make(near, copies, voter)

    # Estimate how likely each label is right, starting from the largest part of each identity.
    release_freed_memory()
    parts = split_identities(faces, voting, copies, near_voters, threshold, same_picture=same_picture)
    # Further persons of a name are estimated like identities of their own.
    persons = number_persons(faces, voting, parts, near_voters, name_count=len(names), threshold=threshold, seed=seed)
    release_freed_memory()
    candidates = find_candidates(persons.person, near_voters)
    release_freed_memory()
    person_decisions = replace(decisions, names=names.take(pa.array(persons.name)))
    candidates = person_decisions.settle(candidates, voter)
    is_first = parts.is_largest | (persons.person >= len(names))
    start = _start_probabilities(candidates, is_first, prior)
    candidates, posteriors = estimate_beyond_graph(
        faces,
        candidates,
        prior,
        start,
        threshold=threshold,
        seed=seed,
        settle=lambda found: person_decisions.settle(found, voter),
    )
    candidates, posteriors = persons.merge_names(candidates, posteriors, len(names))
    posteriors = weigh_names(
        faces,
        candidates,
        posteriors,
        parts.part,
        prior,
        threshold=threshold,
        pictures=parts.pictures,
        is_further_person=persons.person >= len(names),
    )

    release_freed_memory()

    # Decide, and overrule the decision to keep for unfit faces.
    verdicts = decide_labels(candidates, posteriors, photo, prior).take(voter)
    parts = IdentityParts(parts.part[voter], parts.size[voter], parts.pictures[voter])
    verdicts = _question_conflicts(verdicts, copied, labels, max_distance=COPY_LIMITS["close_near"] * scale)
    verdicts = confirm_labels(verdicts, decisions.is_confirmed)
    verdicts = _reject_low_quality(verdicts, graph, gallery, rules)
    if rules.duplicates:
        verdicts = _reject_copies(verdicts, copied, labels)
    verdicts = confirm_labels(verdicts, decisions.is_kept)
    identities = summarise_identities(
        faces, labels, verdicts, parts, near, identity_count=len(names), threshold=threshold
    )
    return LabelJudgement(labels, names, verdicts, posteriors, parts, identities)


def build_identity_table(judgement: LabelJudgement) -> pa.Table:
    """Build identities.parquet: one row per identity."""
    labels = judgement.labels
    parts = judgement.parts
    identities = judgement.identities
    # Count the parts of several faces in each identity.
    is_solid = (labels >= 0) & (parts.size > 1)
    stride = len(labels) + 1
    identity_of_part = np.unique(labels[is_solid] * stride + parts.part[is_solid]) // stride
    return pa.table(
        {
            "identity": judgement.names,
            "faces": identities.face_count,
            "kept": identities.kept_count,
            "wrong": identities.wrong,
            "purity": (1 - identities.wrong / np.maximum(1, identities.face_count)).astype(np.float32),
            "sub_clusters": np.bincount(identity_of_part, minlength=len(judgement.names)),
            "apart": identities.apart_count,
            "apart_similarity": pa.array(identities.apart_similarity, mask=np.isnan(identities.apart_similarity)),
            "apart_probability": identities.apart_probability,
        }
    )


def build_pair_table(judgement: LabelJudgement, pairs: IdentityPairs) -> pa.Table:
    """Build merges.parquet or look_alikes.parquet: one row per pair of identities, the likeliest first."""
    return pa.table(
        {
            "left": judgement.names.take(pa.array(pairs.left)),
            "right": judgement.names.take(pa.array(pairs.right)),
            "similarity": pairs.similarity,
            "probability": pairs.probability,
            "faces_left": pairs.face_counts[:, 0],
            "faces_right": pairs.face_counts[:, 1],
        }
    )


def _start_probabilities(candidates: LabelCandidates, is_largest: Bool, prior: Float32) -> Float32:
    """Set the starting probabilities (m,): a label counts fully if the face is in its identity's largest part."""
    own = np.where(is_largest[candidates.face], np.float32(1), _START_OUTSIDE) * prior[candidates.face]
    return np.where(candidates.is_own, own, np.float32(0)).astype(np.float32)


@dataclass(frozen=True)
class _CopiedFaces:
    """Which of n faces are copies of one another.

    Attributes:
        rank: Rank of each face's image among its copies, (n,); the better one has the smaller rank.
        group: Image that stands for all copies of the face's image, (n,).
        pairs: Pairs of faces (m, 2) of two copies of one image.
        distance: Distance of each pair, (m,).
    """

    rank: Int64
    group: Int64
    pairs: Int64
    distance: Float32


def _find_copies(
    graph: Graph, gallery: Gallery, rule: DuplicateRule, decided: DecidedFaces, run_tables: RunTables
) -> _CopiedFaces:
    """Find the images that are copies of one another, and the faces in them that are the same."""
    source = CopySource.of_galleries([gallery], graph.nodes, graph.edges)
    search = CopySearch(rule, [decided], 1, graph.info.most, with_squashed=False)
    copies = find_copies_by_partition(source, search, run_tables)
    # Name each group of copies by the image that the search would keep.
    pairs = np.stack([copies.pairs.u, copies.pairs.v], axis=1)
    return _CopiedFaces(copies.rank, copies.group, pairs, copies.pairs.distance)


def _choose_voters(copied: _CopiedFaces, copies: Int64, labels: Int64) -> Int64:
    """Choose the face (n,) that votes for each face: the first of its copies with the same label.

    Args:
        copied: copies of images.
        copies: first face with the same vector, (n,).
        labels: number of each face's identity, (n,), -1 for none.
    """
    count = len(labels)
    # Equal vectors under one label are copies, whatever the label of the first of them.
    _, first_equal, group = np.unique(
        copies * (labels.max(initial=0) + 2) + labels, return_index=True, return_inverse=True
    )
    pairs = np.concatenate([copied.pairs, np.stack([first_equal[group], np.arange(count)], axis=1)])
    pairs = pairs[(labels[pairs[:, 0]] == labels[pairs[:, 1]]) & (labels[pairs[:, 0]] >= 0)]
    group = find_components(count, pairs[:, 0], pairs[:, 1])
    first = np.full(count, count)
    np.minimum.at(first, group, np.arange(count))
    return first[group]


def _question_conflicts(
    verdicts: LabelVerdicts, copied: _CopiedFaces, labels: Int64, *, max_distance: float
) -> LabelVerdicts:
    """Overrule the decision to keep for copies of one face under two names: at most one name can be right.

    There is no question if all copies under other names are surely this name's: they are relabelled to it.
    """
    count = len(labels)
    certain = copied.pairs[copied.distance <= max_distance]
    certain = certain[(labels[certain] >= 0).all(axis=1)]
    # Copies of copies are copies: a group of them with two names is a conflict.
    group = find_components(count, certain[:, 0], certain[:, 1])
    name = np.where(verdicts.is_decided(decide.RELABEL), verdicts.other, labels)
    lowest = np.full(count, count)
    highest = np.full(count, -1)
    np.minimum.at(lowest, group, name)
    np.maximum.at(highest, group, name)
    is_named_twice = (lowest < highest)[group] & (labels >= 0)
    return question_kept(verdicts, is_named_twice, decide.TWO_NAMES)


def _number_photos(gallery: Gallery, graph: Graph, labels: Int64) -> tuple[Int64, Float32]:
    """Assign numbers to the photos, and say how likely a label is meant for the face.

    Returns:
        The number of each face's photo (n,), and the probability (n,): 1 over the faces that share photo and label,
        the larger and the more central ones first.
    """
    count = len(labels)
    photo = np.arange(count)
    pairs = find_same_photo_pairs(gallery, graph.nodes)
    # The number of a photo is its first face.
    np.minimum.at(photo, pairs[:, 1], pairs[:, 0])
    if not len(pairs):
        return photo, np.ones(count, np.float32)
    weight = _weigh_faces(gallery, graph)
    key = photo * (int(labels.max(initial=-1)) + 2) + labels + 1
    _, group = np.unique(key, return_inverse=True)
    total = np.bincount(group, weight)
    return photo, (weight / total[group]).astype(np.float32)


def _weigh_faces(gallery: Gallery, graph: Graph) -> Float64:
    """Weigh faces (n,) as the subject of their photo: by the square of their area, and by how central they are."""
    weight = np.ones(len(graph.nodes))
    for batch in gallery.batches(["face_id", "box", "width", "height"], rows=_ROWS):
        known = batch.filter(pc.and_(batch["face_id"].is_valid(), batch["box"].is_valid()))
        faces = pa.Table.from_batches([known])
        if not faces.num_rows:
            continue
        at = graph.nodes.find(faces["face_id"].to_numpy())
        box = to_vectors(faces["box"], 4).astype(np.float64)
        width = np.nan_to_num(faces["width"].to_numpy().astype(np.float64), nan=1.0)
        height = np.nan_to_num(faces["height"].to_numpy().astype(np.float64), nan=1.0)
        area = np.maximum(1.0, (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]))
        # From 0 in the centre to 1 at the border.
        across = np.abs(box[:, 0] + box[:, 2] - width) / np.maximum(1, width)
        along = np.abs(box[:, 1] + box[:, 3] - height) / np.maximum(1, height)
        central = np.exp(-2 * np.minimum(1, across**2 + along**2))
        weight[at[at >= 0]] = (area**2 * central)[at >= 0]
    return weight


def _reject_low_quality(verdicts: LabelVerdicts, graph: Graph, gallery: Gallery, rules: CleanRules) -> LabelVerdicts:
    """Overrule the decision to keep for faces that are too small or blurred."""
    is_small = np.zeros(len(verdicts.decision), bool)
    is_blurred = np.zeros(len(verdicts.decision), bool)
    for batch in gallery.batches(["face_id", "face_px", "sharpness"], rows=_ROWS):
        faces = batch.filter(batch["face_id"].is_valid())
        at = graph.nodes.find(faces["face_id"].to_numpy())
        face_px = faces["face_px"].to_numpy(zero_copy_only=False)
        sharpness = faces["sharpness"].to_numpy(zero_copy_only=False)
        is_node = at >= 0
        is_small[at[is_node]] = (face_px < rules.min_face_px)[is_node]
        is_blurred[at[is_node]] = (sharpness < rules.min_sharpness)[is_node]
    verdicts = overrule_kept(verdicts, is_small, decide.LOW_QUALITY, decide.SMALL)
    return overrule_kept(verdicts, is_blurred, decide.LOW_QUALITY, decide.BLURRED)


def _reject_copies(verdicts: LabelVerdicts, copied: _CopiedFaces, labels: Int64) -> LabelVerdicts:
    """Overrule the decision to keep for faces whose picture is kept in a better copy under the same label."""
    is_worse = _find_worse_copies(verdicts, copied, labels)
    return overrule_kept(verdicts, is_worse, decide.DUPLICATE, decide.COPY)


def _find_worse_copies(verdicts: LabelVerdicts, copied: _CopiedFaces, labels: Int64) -> Bool:
    """Find the kept faces (n,) whose identity keeps a better copy of their picture too.

    The best copy of all may have another label, or be unfit. So the best copy is chosen per label, among the faces
    that are kept.

    Args:
        verdicts: decisions so far.
        copied: copies of images.
        labels: number of each face's identity, (n,).
    """
    # Of the kept faces of each group and label, all but the first go.
    group = copied.group
    kept = np.flatnonzero(verdicts.is_kept)
    order = kept[np.lexsort((copied.rank[kept], labels[kept], group[kept]))]
    is_repeated = (np.diff(group[order], prepend=-1) == 0) & (np.diff(labels[order], prepend=-1) == 0)
    is_worse = np.zeros(len(labels), bool)
    is_worse[order[is_repeated]] = True
    return is_worse
