"""Measure what the distances of a model mean: which faces are one person's, and which images are copies.

Strangers are pairs of different images. Genuine pairs come from labels; without labels there are only altered copies of
an image, which say how near copies are, and not how near two photos of a person are.
"""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import cv2
import numpy as np

from facepipe.evaluation.projected import draw_pairs
from facepipe.evaluation.roc import find_best_threshold
from facepipe.types import Float32, Float64, Int64, UInt8

Basis = Literal["labels", "strangers"]
Alteration = Literal["moved", "degraded"]
"""How a copy differs: cut or recoloured, which moves the image's hash; or compressed or shrunk, which does not."""

MIN_FACES = 200
_MIN_SAME = 200  # pairs of one person, to use labels
_MIN_PERSONS = 30
_STRANGERS = 500_000  # pairs drawn
_RESAMPLES = 40
# The share of strangers that are nearer than the distance of one person, and its range.
_FAR = 0.005
_FAR_RANGE = (0.001, 0.01)
# Shares of strangers that the tail is extrapolated from. Same persons among the pairs drawn are rarer.
_TAIL_SHARES = (0.01, 0.02, 0.05, 0.1, 0.25)
_COPY_SHARE = 0.98  # of copies that a limit has to cover
_COPY_FAR = 1e-6  # largest share of strangers within a limit of copies
_SHRINK = 0.4
_CROP = 0.05
_JPEG_QUALITY = 30


@dataclass(frozen=True)
class SamePersonEstimate:
    """The distance up to which two faces are likely of one person.

    Attributes:
        distance: Euclidean distance of unit vectors.
        low: Lower end of its range: of 90 % of resamples, or where 0.1 % of strangers are nearer.
        high: Upper end: of 90 % of resamples, or where 1 % of strangers are nearer.
        basis: Whether labels told who is one person, or only strangers were compared.
        same: Pairs of one person.
        different: Pairs of two images of strangers.
    """

    distance: float
    low: float
    high: float
    basis: Basis
    same: int
    different: int


@dataclass(frozen=True)
class CopyLimits:
    """Distances up to which the faces of two images are of copies.

    Attributes:
        near: Of copies that are cut or recoloured.
        close_near: Of copies that are shrunk or compressed.
        same_shot: Of two photos of one moment.
        copies: Copies measured.
    """

    near: float
    close_near: float
    same_shot: float
    copies: int


def estimate_same_person(vectors: Float32, persons: Int64 | None, seed: int = 0) -> SamePersonEstimate:
    """Estimate the distance up to which two faces are likely of one person.

    With labels it is the distance that tells as many pairs of one person as of two apart best, as on LFW's pairs.
    Without, it is where 0.5 % of strangers are nearer, extrapolated from pairs that are surely of strangers.

    Args:
        vectors: unit vectors of faces of different images, (n, d).
        persons: number of each face's person, (n,), -1 without a label.
        seed: random seed of the pairs.
    """
    rng = np.random.default_rng(seed)
    if persons is not None:
        labelled = np.flatnonzero(persons >= 0)
        pairs = draw_pairs(persons[labelled], seed)
        repeated = (np.unique(persons[labelled], return_counts=True)[1] > 1).sum()
        if pairs is not None and pairs.same.sum() >= _MIN_SAME and repeated >= _MIN_PERSONS:
            distances = _measure(vectors[labelled], pairs.left, pairs.right)
            return _fit_labelled(distances[pairs.same], distances[~pairs.same], rng)
    distances = _draw_strangers(vectors, rng)
    curve = _StrangerCurve.fit(distances)
    return SamePersonEstimate(
        distance=curve.find_distance(_FAR),
        low=curve.find_distance(_FAR_RANGE[0]),
        high=curve.find_distance(_FAR_RANGE[1]),
        basis="strangers",
        same=0,
        different=len(distances),
    )


def measure_copy_limits(
    vectors: Float32, copies: dict[Alteration, list[tuple[Int64, Float32]]], seed: int = 0
) -> CopyLimits:
    """Measure how far the faces of copies lie from those of their originals.

    Args:
        vectors: unit vectors of faces of different images, (n, d).
        copies: per alteration, positions (m,) of originals and the vectors (m, d) of their copies.
        seed: random seed of the pairs of strangers.
    """
    curve = _StrangerCurve.fit(_draw_strangers(vectors, np.random.default_rng(seed)))
    ceiling = curve.find_distance(_COPY_FAR)
    limits: dict[Alteration, float] = {}
    for alteration, sets in copies.items():
        # The alteration that costs most decides.
        reach = [float(np.quantile(np.linalg.norm(made - vectors[at], axis=1), _COPY_SHARE)) for at, made in sets]
        limits[alteration] = min(max(reach), ceiling)
    near = limits["moved"]
    return CopyLimits(
        near=near,
        close_near=max(near, limits["degraded"]),
        # dlib's ratio of the two limits, which was set by eye.
        same_shot=min(1.25 * near, ceiling),
        copies=sum(len(at) for sets in copies.values() for at, _ in sets),
    )


def alter_chips(chips: UInt8) -> dict[Alteration, list[UInt8]]:
    """Make altered copies of face chips (n, h, w, 3)."""
    return {
        "moved": [np.stack([_crop(chip) for chip in chips]), np.stack([_recolour(chip) for chip in chips])],
        "degraded": [np.stack([_shrink(chip) for chip in chips]), np.stack([_compress(chip) for chip in chips])],
    }


def _crop(chip: UInt8) -> UInt8:
    height, width = chip.shape[:2]
    top = max(1, round(height * _CROP / 2))
    left = max(1, round(width * _CROP / 2))
    return np.asarray(cv2.resize(chip[top : height - top, left : width - left], (width, height)), np.uint8)


def _recolour(chip: UInt8) -> UInt8:
    tint = np.array([1.15, 1.05, 0.9])
    return np.clip(chip.astype(np.float32) * tint + 10, 0, 255).astype(np.uint8)


def _shrink(chip: UInt8) -> UInt8:
    height, width = chip.shape[:2]
    small = (max(1, round(width * _SHRINK)), max(1, round(height * _SHRINK)))
    reduced = cv2.resize(chip, small, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(reduced, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def _compress(chip: UInt8) -> UInt8:
    data = cv2.imencode(".jpg", np.ascontiguousarray(chip[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
    return np.ascontiguousarray(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)[:, :, ::-1])


def _fit_labelled(same: Float64, different: Float64, rng: np.random.Generator) -> SamePersonEstimate:
    """Find the threshold over as many pairs of either kind, and its range over resamples."""
    count = min(len(same), len(different))
    is_same = np.repeat([True, False], count)

    def find(left: Float64, right: Float64) -> float:
        return float(find_best_threshold(np.concatenate([left, right]), is_same))

    drawn = [find(rng.choice(same, count), rng.choice(different, count)) for _ in range(_RESAMPLES)]
    return SamePersonEstimate(
        # The mean over resamples is steadier than the threshold of the pairs themselves.
        distance=float(np.mean(drawn)),
        low=float(np.quantile(drawn, 0.05)),
        high=float(np.quantile(drawn, 0.95)),
        basis="labels",
        same=len(same),
        different=len(different),
    )


@dataclass(frozen=True)
class _StrangerCurve:
    """Distances of strangers by the standard normal deviate of their share.

    Attributes:
        slope: Distance per unit of the deviate.
        intercept: Distance at the deviate 0.
    """

    slope: float
    intercept: float

    @classmethod
    def fit(cls, distances: Float64) -> "_StrangerCurve":
        deviates = [NormalDist().inv_cdf(share) for share in _TAIL_SHARES]
        slope, intercept = np.polyfit(deviates, np.quantile(distances, _TAIL_SHARES), 1)
        return cls(float(slope), float(intercept))

    def find_distance(self, share: float) -> float:
        """Find the distance that this share of strangers is nearer than."""
        return max(0.0, self.intercept + self.slope * NormalDist().inv_cdf(share))


def _draw_strangers(vectors: Float32, rng: np.random.Generator) -> Float64:
    left = rng.integers(0, len(vectors), _STRANGERS)
    right = rng.integers(0, len(vectors), _STRANGERS)
    is_pair = left != right
    return _measure(vectors, left[is_pair], right[is_pair])


def _measure(vectors: Float32, left: Int64, right: Int64) -> Float64:
    distances = np.empty(len(left))
    for at in range(0, len(left), 1 << 16):
        block = slice(at, at + (1 << 16))
        distances[block] = np.linalg.norm(vectors[left[block]] - vectors[right[block]], axis=1)
    return distances
