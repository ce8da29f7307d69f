"""Normal distributions of similarities, whose variance falls with the faces that a similarity rests on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from facepipe.storage.mapped import TemporaryColumn
from facepipe.types import Float32, Float64

MIN_WEIGHT = 0.3  # faces that an identity must rest on before it counts
# Bounds of the weights, to see how the variance falls with them.
_WEIGHT_BINS = np.array([0.3, 1.5, 2.5, 4.5, 8.5, 16.5, np.inf])
_ROWS = 1 << 16  # similarities that are handled at a time
_MIN_MASS = 8.0  # faces below which a distribution is not estimated


@dataclass(frozen=True)
class Normal:
    """A normal distribution whose variance depends on the weight a similarity rests on.

    Attributes:
        mean: Mean.
        fixed_variance: Part of the variance that does not depend on the weight.
        variance_per_face: The variance is `fixed_variance + variance_per_face / weight`.
    """

    mean: float
    fixed_variance: float
    variance_per_face: float

    def compute_variance(self, weight: Float32) -> Float32:
        """Compute the variance (m,) of similarities that rest on `weight` faces (m,)."""
        return np.asarray(self.fixed_variance + self.variance_per_face / np.maximum(weight, MIN_WEIGHT), np.float32)

    def standardise(self, similarity: Float32, weight: Float32) -> Float32:
        """Compute the deviations (m,) from the mean, in standard deviations."""
        return np.asarray((similarity - self.mean) / np.sqrt(self.compute_variance(weight)), np.float32)

    def compute_log_density(self, similarity: Float32, weight: Float32) -> Float32:
        """Compute the log density (m,), less a constant."""
        variance = self.compute_variance(weight)
        log_density = -0.5 * (similarity - self.mean) ** 2 / variance - 0.5 * np.log(variance)
        return np.asarray(log_density, np.float32)


def fit_distributions(genuine: Normal | None, impostor: Normal | None, threshold: float) -> tuple[Normal, Normal]:
    """Replace a distribution that the corpus does not show by one that mirrors the other at the threshold."""
    if genuine is None:  # no identity has two faces: as far above the threshold as strangers lie below it
        spread = abs(threshold - impostor.mean) if impostor else 0.05
        genuine = Normal(threshold + spread / 2, (spread / 4) ** 2, 0.0)
    if impostor is None or impostor.mean >= genuine.mean:
        impostor = Normal(2 * threshold - genuine.mean, genuine.fixed_variance, genuine.variance_per_face)
    return genuine, impostor


def fit_normal(similarity: Float32, weight: Float32, share: Float32) -> Normal | None:
    """Fit the mean, and the variance as a line in 1 / weight, of similarities that count by their share.

    Returns:
        None if too few faces count.
    """
    # Only those that count, in temporary files. Products are made some at a time, and summed up at once.
    usable = _UsableSimilarities.select(similarity, weight, share)
    total = usable.sum(usable.get_share)
    if total < _MIN_MASS:
        return None
    mean = float(usable.sum(usable.weigh) / total)
    overall = float(usable.sum(lambda block: usable.weigh_squares(block, mean)) / total)
    # Mean of 1 / weight and variance in each bin of weights that holds enough faces.
    bin_count = len(_WEIGHT_BINS) + 1
    mass = np.zeros(bin_count)
    inverse = np.zeros(bin_count)
    variance = np.zeros(bin_count)
    for block in usable.iterate_blocks():
        bins = np.digitize(usable.weight[block], _WEIGHT_BINS)
        shares = usable.get_share(block)
        mass = add_to_bins(mass, bins, shares)
        inverse = add_to_bins(inverse, bins, shares / usable.weight[block])
        variance = add_to_bins(variance, bins, usable.weigh_squares(block, mean))
    is_solid = mass >= _MIN_MASS
    inverse = inverse[is_solid] / mass[is_solid]
    variance = variance[is_solid] / mass[is_solid]
    if is_solid.sum() < 2:
        return Normal(mean, max(overall, 1e-6), 0.0)
    # The variance is a line in 1 / weight, whose two parts must not be negative.
    slope, _ = np.polyfit(inverse, variance, 1, w=np.sqrt(mass[is_solid]))
    per_face = float(np.clip(slope, 0, None))
    fixed = float(np.average(variance - per_face * inverse, weights=mass[is_solid]))
    return Normal(mean, max(fixed, 0.1 * overall, 1e-6), per_face)


def add_to_bins(sums: Float64, bins: npt.NDArray[np.integer[Any]], values: Float64) -> Float64:
    """Add values (m,) to the sums (k,) of their bins (m,), one after the other: as if all came at once."""
    # The sums so far come first.
    places = np.concatenate([np.arange(len(sums)), bins])
    return np.asarray(np.bincount(places, np.concatenate([sums, values]), len(sums)), np.float64)


@dataclass(frozen=True)
class _UsableSimilarities:
    """Similarities that count, in temporary files.

    Attributes:
        similarity: The similarities, (u,).
        weight: Faces that each rests on, (u,).
        share: Share by which each counts, (u,).
        values: Room for what is summed up.
    """

    similarity: Float32
    weight: Float32
    share: Float32
    values: TemporaryColumn

    @classmethod
    def select(cls, similarity: Float32, weight: Float32, share: Float32) -> "_UsableSimilarities":
        columns = [TemporaryColumn(np.float32, len(weight)) for _ in range(3)]
        for at in range(0, len(weight), _ROWS):
            block = slice(at, at + _ROWS)
            is_usable = (weight[block] >= MIN_WEIGHT) & (share[block] > 0.01)
            for column, values in zip(columns, (similarity, weight, share), strict=True):
                column.append(values[block][is_usable])
        first, second, third = (column.array for column in columns)
        return cls(first, second, third, TemporaryColumn(np.float64, len(first)))

    def iterate_blocks(self) -> Iterator[slice]:
        for at in range(0, len(self.weight), _ROWS):
            yield slice(at, at + _ROWS)

    def sum(self, compute: Callable[[slice], Float64]) -> float:
        """Sum what is computed of all rows, a block at a time. The sum does not depend on the blocks."""
        self.values.clear()
        for block in self.iterate_blocks():
            self.values.append(compute(block))
        return float(self.values.array.sum())

    def get_share(self, block: slice) -> Float64:
        """Return the shares (b,)."""
        return self.share[block].astype(np.float64)

    def weigh(self, block: slice) -> Float64:
        """Compute the similarities (b,), times the share."""
        return self.similarity[block].astype(np.float64) * self.get_share(block)

    def weigh_squares(self, block: slice, mean: float) -> Float64:
        """Compute the squared deviations (b,) from the mean, times the share."""
        deviation = self.similarity[block].astype(np.float64) - mean
        return self.get_share(block) * deviation**2
