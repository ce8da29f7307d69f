"""Normal distributions of similarities, whose variance falls with the faces that a similarity rests on."""

from dataclasses import dataclass

import numpy as np

from facepipe.types import Float32

MIN_WEIGHT = 0.3  # faces that an identity must rest on before it counts
# Bounds of the weights, to see how the variance falls with them.
_WEIGHT_BINS = np.array([0.3, 1.5, 2.5, 4.5, 8.5, 16.5, np.inf])
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
    is_usable = (weight >= MIN_WEIGHT) & (share > 0.01)
    x = similarity[is_usable].astype(np.float64)
    weight = weight[is_usable]
    share = share[is_usable].astype(np.float64)
    if share.sum() < _MIN_MASS:
        return None
    mean = float((x * share).sum() / share.sum())
    overall = float((share * (x - mean) ** 2).sum() / share.sum())
    # Mean of 1 / weight and variance in each bin of weights that holds enough faces.
    bins = np.digitize(weight, _WEIGHT_BINS)
    bin_count = len(_WEIGHT_BINS) + 1
    mass = np.bincount(bins, share, bin_count)
    is_solid = mass >= _MIN_MASS
    inverse = np.bincount(bins, share / weight, bin_count)[is_solid] / mass[is_solid]
    variance = np.bincount(bins, share * (x - mean) ** 2, bin_count)[is_solid] / mass[is_solid]
    if is_solid.sum() < 2:
        return Normal(mean, max(overall, 1e-6), 0.0)
    # The variance is a line in 1 / weight, whose two parts must not be negative.
    slope, _ = np.polyfit(inverse, variance, 1, w=np.sqrt(mass[is_solid]))
    per_face = float(np.clip(slope, 0, None))
    fixed = float(np.average(variance - per_face * inverse, weights=mass[is_solid]))
    return Normal(mean, max(fixed, 0.1 * overall, 1e-6), per_face)
