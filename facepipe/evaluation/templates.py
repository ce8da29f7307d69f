"""Measure verification and identification of templates, by the protocols of IJB-B and IJB-C.

A template's vector is the sum of its media's, each of which is the mean of its images', at length 1. Identification
follows the definition of the open-set protocol (and of insightface's pull request 1387): each gallery is searched by
itself, a probe of somebody who is not enrolled gives at most one false alarm, which is its highest similarity, and a
probe of somebody who is enrolled counts if the right template is the first one and reaches the threshold.
"""

import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from facepipe.errors import EvaluationError
from facepipe.evaluation.pairs import score_prominence
from facepipe.evaluation.roc import compute_auc, compute_roc, find_tar_at_far
from facepipe.evaluation.template_files import (
    Subjects,
    TemplateImages,
    TemplatePairs,
    read_template_protocol,
)
from facepipe.gallery import Gallery
from facepipe.types import Bool, Float32, Float64, Int64

Weight = Literal["none", "score", "norm"]
FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FPIRS = (0.01, 0.1)
RANKS = (1, 5, 10)
_PAIRS_AT_A_TIME = 100_000
_PROBES_AT_A_TIME = 1024


@dataclass(frozen=True)
class Verification:
    """Figures of 1:1.

    Attributes:
        pairs: Number of pairs.
        genuine: Number of those of one person.
        auc: Area under the ROC curve.
        tar: True accept rate by FAR: of the lowest threshold whose FAR does not exceed it. None if there are fewer than
            1 / FAR impostor pairs.
    """

    pairs: int
    genuine: int
    auc: float
    tar: dict[str, float | None]


@dataclass(frozen=True)
class TemplateSearch:
    """Figures of 1:N in one gallery.

    Attributes:
        enrolled: Number of templates in the gallery.
        mated: Number of probes whose person is enrolled.
        others: Number of probes whose person is not.
        ranks: Share of mated probes whose template is among the nearest, by their number.
        tpir: True positive identification rate by FPIR. None if there are fewer than 1 / FPIR other probes.
    """

    enrolled: int
    mated: int
    others: int
    ranks: dict[str, float]
    tpir: dict[str, float | None]


@dataclass(frozen=True)
class TemplatesResult:
    """Figures of templates.

    Attributes:
        images: Number of images.
        without_face: Number of those without a face. A template of none has the vector zero, which is like no other.
        templates: Number of templates.
        weight: What the images' vectors were multiplied by.
        verification: Figures of 1:1, or None.
        searches: Figures of 1:N, per gallery.
        tpir: Mean over galleries by FPIR; None for those that a gallery cannot show.
    """

    images: int
    without_face: int
    templates: int
    weight: str
    verification: Verification | None = None
    searches: list[TemplateSearch] = field(default_factory=list)
    tpir: dict[str, float | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON."""
        return asdict(self)


def evaluate_templates(gallery: Gallery, folder: str, weight: Weight = "none") -> TemplatesResult:
    """Evaluate the protocols of a folder on a gallery.

    Args:
        gallery: a gallery with the images of the templates.
        folder: folder of the protocol's files.
        weight: what an image's vector is multiplied by: nothing, the score of the protocol's detector, or the length
            that the network gave it.

    Raises:
        EvaluationError: Files or images are missing.
    """
    protocol = read_template_protocol(folder)
    vectors = _read_vectors(gallery, protocol.images.names, folder, with_norm=weight == "norm")
    without_face = int((~vectors.any(axis=1)).sum())
    if weight == "score":
        vectors *= protocol.images.scores[:, None]
    templates, pooled = pool_templates(vectors, protocol.images)
    verification = None
    if protocol.pairs is not None:
        verification = verify_templates(templates, pooled, protocol.pairs)
    searches = []
    if protocol.probes is not None:
        searches = [search_templates(templates, pooled, enrolled, protocol.probes) for enrolled in protocol.galleries]
    return TemplatesResult(
        images=len(vectors),
        without_face=without_face,
        templates=len(templates),
        weight=weight,
        verification=verification,
        searches=searches,
        tpir={f"{fpir:g}": _average([search.tpir[f"{fpir:g}"] for search in searches]) for fpir in FPIRS}
        if searches
        else {},
    )


def _average(rates: list[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return float(np.mean(known)) if len(known) == len(rates) else None


def _read_vectors(gallery: Gallery, names: list[str], folder: str, *, with_norm: bool) -> Float32:
    """Read the vector of each image's subject, (n, dim); zeros for an image without a face."""
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows_of.setdefault(name, []).append(row)
    depths = sorted({name.count("/") + 1 for name in rows_of})
    vectors = np.zeros((len(names), 0), np.float32)
    best = dict.fromkeys(rows_of, -np.inf)
    seen: set[str] = set()
    columns = ["uri", "box", "width", "height", "embedding", "embedding_norm"]
    for batch in gallery.batches(columns):
        boxes = batch.select(["uri", "box", "width", "height"]).to_pylist()
        for n, row in enumerate(boxes):
            parts = os.path.splitext(row["uri"].replace("#", "/"))[0].split("/")
            ends = ["/".join(parts[-depth:]) for depth in depths]
            matches = [end for end in ends if end in rows_of]
            if not matches:
                continue
            name = matches[0]
            seen.add(name)
            score = score_prominence(row)
            if score <= best[name]:
                continue
            best[name] = score
            vector = batch["embedding"][n].values.to_numpy()
            if not vectors.shape[1]:
                vectors = np.zeros((len(names), len(vector)), np.float32)
            norm = batch["embedding_norm"][n].as_py() if with_norm else 1.0
            vectors[rows_of[name]] = vector * np.float32(norm or 1.0)
    missing = sorted(rows_of.keys() - seen)
    if missing:
        raise EvaluationError(
            f"{len(missing)} images of {folder!r} are not in the gallery, such as {', '.join(missing[:3])}; "
            "embed the folder they are in first"
        )
    return vectors


def pool_templates(vectors: Float32, images: TemplateImages) -> tuple[Int64, Float64]:
    """Pool the vectors of images to one per template.

    Args:
        vectors: of the images, (n, dim).
        images: which template and photo or video each belongs to.

    Returns:
        The templates, (t,), rising, and their vectors at length 1, (t, dim).
    """
    # Number the photos and videos of each template, then sum up by them.
    pairs = np.stack([images.templates, images.media], axis=1)
    media, inverse, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    sums = np.zeros((len(media), vectors.shape[1]))
    np.add.at(sums, inverse.reshape(-1), vectors)
    means = sums / counts[:, None]
    templates, owner = np.unique(media[:, 0], return_inverse=True)
    pooled = np.zeros((len(templates), vectors.shape[1]))
    np.add.at(pooled, owner, means)
    norms = np.linalg.norm(pooled, axis=1, keepdims=True)
    return templates, np.divide(pooled, norms, out=np.zeros_like(pooled), where=norms > 0)


def verify_templates(templates: Int64, pooled: Float64, pairs: TemplatePairs) -> Verification:
    """Compute the figures of 1:1.

    Args:
        templates: the templates, (t,), rising.
        pooled: their vectors, (t, dim).
        pairs: the pairs.

    Raises:
        EvaluationError: The pairs are all of one kind.
    """
    if pairs.same.all() or not pairs.same.any():
        raise EvaluationError("the pairs of templates are all of one kind: both same and different ones are needed")
    similarities = np.empty(len(pairs.same))
    for begin in range(0, len(similarities), _PAIRS_AT_A_TIME):
        part = slice(begin, begin + _PAIRS_AT_A_TIME)
        left = pooled[np.searchsorted(templates, pairs.left[part])]
        right = pooled[np.searchsorted(templates, pairs.right[part])]
        similarities[part] = np.einsum("ij,ij->i", left, right)
    curve = compute_roc(-similarities, pairs.same)
    impostors = int((~pairs.same).sum())
    tar = {f"{far:g}": find_tar_at_far(curve, far)[0] if impostors * far >= 1 else None for far in FARS}
    return Verification(len(similarities), int(pairs.same.sum()), compute_auc(curve), tar)


def search_templates(templates: Int64, pooled: Float64, enrolled: Subjects, probes: Subjects) -> TemplateSearch:
    """Compute the figures of 1:N in one gallery.

    Args:
        templates: the templates, (t,), rising.
        pooled: their vectors, (t, dim).
        enrolled: the templates of the gallery, one per person.
        probes: the templates that are searched.

    Raises:
        EvaluationError: A person is enrolled twice, or no probe's person is enrolled.
    """
    subjects, first = np.unique(enrolled.subjects, return_index=True)
    if len(subjects) != len(enrolled.subjects):
        raise EvaluationError("a person has several templates in a gallery of the 1:N protocol")
    gallery = pooled[np.searchsorted(templates, enrolled.templates[first])]
    at = np.searchsorted(subjects, probes.subjects).clip(max=len(subjects) - 1)
    is_mated = subjects[at] == probes.subjects
    if not is_mated.any():
        raise EvaluationError("no probe of the 1:N protocol shows somebody who is enrolled")
    own = np.full(len(probes.subjects), -np.inf)
    highest = np.empty(len(own))  # of the others
    rank = np.zeros(len(own), np.int64)
    for begin in range(0, len(own), _PROBES_AT_A_TIME):
        part = slice(begin, begin + _PROBES_AT_A_TIME)
        similarities = pooled[np.searchsorted(templates, probes.templates[part])] @ gallery.T
        rows = np.flatnonzero(is_mated[part])
        mates = at[part][rows]
        own[begin + rows] = similarities[rows, mates]
        similarities[rows, mates] = -np.inf
        highest[part] = similarities.max(axis=1)
        rank[begin + rows] = (similarities[rows] >= own[begin + rows, None]).sum(axis=1)
    return TemplateSearch(
        enrolled=len(subjects),
        mated=int(is_mated.sum()),
        others=int((~is_mated).sum()),
        ranks={str(k): float((rank[is_mated] < k).mean()) for k in RANKS},
        tpir=_compute_tpir(own[is_mated], highest[is_mated], highest[~is_mated]),
    )


def _compute_tpir(own: Float64, highest: Float64, alarms: Float64) -> dict[str, float | None]:
    """Compute the true positive identification rate by FPIR.

    Args:
        own: similarity of each mated probe to its own template, (m,).
        highest: its highest similarity to another, (m,).
        alarms: highest similarity of each other probe, (k,).
    """
    falling = np.sort(alarms)[::-1]
    is_first: Bool = own > highest
    rates: dict[str, float | None] = {}
    for fpir in FPIRS:
        # So many probes of strangers may reach the threshold; of equal ones none does.
        allowed = int(len(falling) * fpir + 1e-9)
        if not allowed:
            rates[f"{fpir:g}"] = None
            continue
        threshold = falling[allowed - 1]
        if allowed < len(falling) and falling[allowed] == threshold:
            threshold = np.nextafter(threshold, np.inf)
        rates[f"{fpir:g}"] = float((is_first & (own >= threshold)).mean())
    return rates
