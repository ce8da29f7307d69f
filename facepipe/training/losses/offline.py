"""Mine triplets over a whole embedded set, for epochs that train on them.

The mining is exact. Its time is that of n^2 dot products; its memory is that of one block of them.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from facepipe.errors import ConfigError
from facepipe.training.losses.config import LossConfig, resolve_loss_config
from facepipe.types import Bool, Float32, Int64

# A block of cosines takes 32 MB.
_ANCHORS = 512
_OTHERS = 16384


class MinedTriplets(NamedTuple):
    """Triplets of a set.

    Attributes:
        rows: rows of anchor, positive and negative, (t, 3) int64.
        active: whether a triplet has a loss above 0, (t,) bool.
    """

    rows: Int64
    active: Bool


def mine_triplets(
    vectors: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], config: LossConfig, seed: int
) -> MinedTriplets:
    """Mine at most one triplet per anchor.

    batch-hard takes the farthest positive and the nearest negative. semi-hard takes a random positive and the nearest
    negative that is farther. Distances are squared distances of unit vectors, as in the loss.

    Args:
        vectors: raw vectors, (n, dim).
        labels: labels, (n,).
        config: a triplet loss.
        seed: random seed of the positives.

    Returns:
        The triplets, in the order of the anchors.

    Raises:
        ConfigError: The mining is batch-all, or the loss is not a triplet loss.
    """
    config = resolve_loss_config(config)
    if config.mining not in ("batch-hard", "semi-hard"):
        raise ConfigError(
            f"{config.name} with loss.mining={config.mining} has no offline triplets: use triplet with semi-hard or "
            "batch-hard"
        )
    # Labels become codes from 0, and vectors unit vectors.
    codes = np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1).astype(np.int64)
    x = np.asarray(vectors, np.float32)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))
    embedded = _EmbeddedSet(x, codes, (config.margin or 0) / 2)
    partners = None
    if config.mining == "semi-hard":
        partners = _draw_partners(codes, np.random.default_rng(seed))
    blocks = []
    for start in range(0, len(x), _ANCHORS):
        rows = np.arange(start, min(start + _ANCHORS, len(x)))
        blocks.append(_mine_block(embedded, rows, None if partners is None else partners[rows]))
    if not blocks:
        return MinedTriplets(np.empty((0, 3), np.int64), np.empty(0, bool))
    return MinedTriplets(
        rows=np.concatenate([block.rows for block in blocks]), active=np.concatenate([block.active for block in blocks])
    )


class _EmbeddedSet(NamedTuple):
    """The set to mine.

    Attributes:
        x: unit vectors, (n, dim).
        codes: class of each vector, (n,).
        margin: margin in cosine, half of that in squared distance.
    """

    x: Float32
    codes: Int64
    margin: float


def _mine_block(embedded: _EmbeddedSet, rows: Int64, partners: Int64 | None) -> MinedTriplets:
    """Mine the triplets of some anchors.

    Args:
        embedded: the set.
        rows: rows of the anchors.
        partners: row of each anchor's positive, -1 for none; None: the farthest positive.
    """
    # Batch-hard takes extremes of both kinds; semi-hard bounds the negative by its positive's cosine.
    unbounded = np.full(len(rows), np.inf, np.float32)
    if partners is None:
        positive, positive_cosine = _find_extremes(embedded, rows, unbounded, same_class=True)
        negative, negative_cosine = _find_extremes(embedded, rows, unbounded, same_class=False)
    else:
        positive = partners
        positive_cosine = np.einsum("nd,nd->n", embedded.x[rows], embedded.x[partners]).astype(np.float32)
        negative, negative_cosine = _find_extremes(embedded, rows, positive_cosine, same_class=False)
    # An anchor without a positive or a negative makes no triplet.
    is_whole = (positive >= 0) & (negative >= 0)
    triplets = np.stack([rows, positive, negative], axis=1)
    is_active = positive_cosine - negative_cosine < embedded.margin
    return MinedTriplets(triplets[is_whole], is_active[is_whole])


def _find_extremes(embedded: _EmbeddedSet, rows: Int64, below: Float32, *, same_class: bool) -> tuple[Int64, Float32]:
    """Find per anchor the least similar row of its own class, or the most similar row of another class.

    Args:
        embedded: the set.
        rows: rows of the anchors.
        below: only rows with a smaller cosine count, (n,).
        same_class: search the own class.

    Returns:
        The rows found, -1 for none; and their cosines.
    """
    # One search serves both: with a negative sign the least similar row is the best.
    sign = -1 if same_class else 1
    extremes = np.full(len(rows), -1, np.int64)
    values = np.full(len(rows), -np.inf, np.float32)
    for start in range(0, len(embedded.x), _OTHERS):
        others = np.arange(start, min(start + _OTHERS, len(embedded.x)))
        # Cosines (anchors, others) of a block; a row is not its own positive.
        cosines = embedded.x[rows] @ embedded.x[others].T
        usable = (embedded.codes[rows][:, None] == embedded.codes[others]) == same_class
        usable &= (cosines < below[:, None]) & (rows[:, None] != others)
        scores = np.where(usable, sign * cosines, -np.inf)
        best = scores.argmax(1)
        best_scores = scores[np.arange(len(rows)), best]
        # Keep the best over the blocks so far.
        is_better = best_scores > values
        extremes[is_better] = others[best[is_better]]
        values[is_better] = best_scores[is_better]
    return extremes, sign * values


def _draw_partners(codes: Int64, rng: np.random.Generator) -> Int64:
    """Draw for each row another row of its class, uniformly; -1 if there is none."""
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    size = sizes[codes[order]]
    first = (np.cumsum(sizes) - sizes)[codes[order]]
    # Step from each row to another one of its class, round the end.
    step = 1 + np.floor(rng.random(len(codes)) * (size - 1)).astype(np.int64)
    chosen = order[first + (np.arange(len(codes)) - first + step) % size]
    partners = np.empty_like(codes)
    partners[order] = np.where(size > 1, chosen, -1)
    return partners
