"""Triplets mined over a whole embedded set, for epochs that are trained on given triplets (`compute_triplet_loss`).

Exact, so the time is that of n^2 dot products; the memory is that of one block of them.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from facepipe.errors import ConfigError
from facepipe.training.losses.config import LossConfig, resolve_loss_config
from facepipe.types import Bool, Float32, Int64

_ANCHORS, _OTHERS = 512, 16384  # a block of cosines has 32 MB


class MinedTriplets(NamedTuple):
    """Rows (t, 3) int64 of anchor, positive, negative, and which of them cost anything (t,) bool."""

    rows: Int64
    active: Bool


def mine_triplets(
    vectors: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], config: LossConfig, seed: int
) -> MinedTriplets:
    """At most one triplet an anchor, in the anchors' order.

    vectors (n, dim) raw, labels (n,). Distances are squared ones of unit vectors, as in the loss.
    batch-hard: the farthest positive and the nearest negative.
    semi-hard: a random positive (by `seed`) and the nearest negative that is farther.
    Errors: ConfigError for batch-all, and for a loss that is none of the triplet losses.
    """
    config = resolve_loss_config(config)
    if config.mining not in ("batch-hard", "semi-hard"):
        raise ConfigError(
            f"offline triplets of {config.name} with mining {config.mining}: give triplet with semi-hard or batch-hard"
        )
    codes = np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1).astype(np.int64)
    x = np.asarray(vectors, np.float32)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))
    partners = _draw_partners(codes, np.random.default_rng(seed)) if config.mining == "semi-hard" else None
    parts = []
    for start in range(0, len(x), _ANCHORS):
        rows = np.arange(start, min(start + _ANCHORS, len(x)))
        given = None if partners is None else partners[rows]
        parts.append(_mine_block(_EmbeddedSet(x, codes, (config.margin or 0) / 2), rows, given))
    if not parts:
        return MinedTriplets(np.empty((0, 3), np.int64), np.empty(0, bool))
    rows, active = (np.concatenate(column) for column in zip(*parts, strict=True))
    return MinedTriplets(rows, active)


class _EmbeddedSet(NamedTuple):
    x: Float32  # unit vectors
    codes: Int64
    margin: float  # in cosine: half of that in squared distance


def _mine_block(of: _EmbeddedSet, rows: Int64, partners: Int64 | None) -> MinedTriplets:
    """Triplets of the anchors `rows`; partners are their given positives, -1 for none."""
    if partners is None:
        positive, low = _find_extremes(of, rows, True, np.full(len(rows), np.inf, np.float32))
        negative, high = _find_extremes(of, rows, False, np.full(len(rows), np.inf, np.float32))
    else:
        positive = partners
        low = np.einsum("nd,nd->n", of.x[rows], of.x[partners]).astype(np.float32)
        negative, high = _find_extremes(of, rows, False, low)
    keep = (positive >= 0) & (negative >= 0)
    return MinedTriplets(np.stack([rows, positive, negative], axis=1)[keep], (low - high < of.margin)[keep])


def _find_extremes(of: _EmbeddedSet, rows: Int64, friends: bool, below: Float32) -> tuple[Int64, Float32]:
    """The least similar of the own class (friends), or the most similar stranger whose cosine is less than `below`."""
    sign = -1 if friends else 1
    found, value = np.full(len(rows), -1, np.int64), np.full(len(rows), -np.inf, np.float32)
    for start in range(0, len(of.x), _OTHERS):
        others = np.arange(start, min(start + _OTHERS, len(of.x)))
        cosines = of.x[rows] @ of.x[others].T
        usable = (of.codes[rows][:, None] == of.codes[others]) == friends
        usable &= (cosines < below[:, None]) & (rows[:, None] != others)
        scores = np.where(usable, sign * cosines, -np.inf)
        best = scores.argmax(1)
        better = scores[np.arange(len(rows)), best] > value
        found[better], value[better] = others[best[better]], scores[np.arange(len(rows)), best][better]
    return found, sign * value


def _draw_partners(codes: Int64, rng: np.random.Generator) -> Int64:
    """For each row another row of its class, uniformly; -1 where it is alone."""
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    size, first = sizes[codes[order]], (np.cumsum(sizes) - sizes)[codes[order]]
    step = 1 + np.floor(rng.random(len(codes)) * (size - 1)).astype(np.int64)
    chosen = order[first + (np.arange(len(codes)) - first + step) % size]
    partners = np.empty_like(codes)
    partners[order] = np.where(size > 1, chosen, -1)
    return partners
