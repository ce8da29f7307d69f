"""Likelihoods of the mean similarity of two groups of faces, if they are one person and if they are two.

Parts of one group, drawn at random, show how similar the faces of one person are. Pairs of groups show how similar
strangers are. The tail of strangers is fitted as a cubic of the logarithm of its density, and extrapolated. Some
regions of the embedding space are crowded: strangers there are more alike. So each group has a location and a scale of
its own, from the groups that it is most similar to (as in the adaptive score normalisation of speaker verification,
Matejka et al., Interspeech 2017).
"""

from dataclasses import dataclass, replace

import numpy as np

from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.grouped_sums import add_pieces, iterate_pieces
from facepipe.storage.mapped import make_temporary_array
from facepipe.types import Bool, Float32, Float64, Int64

_MAX_COHORT = 4096  # groups that others are compared with
_MAX_SPLITS = 20_000  # groups whose parts show how alike the faces of one person are
_MAX_PART = 32  # faces of a group that are used for it
_REPEATS = 3
_BLOCK = 512
_COMPARED_ROWS = 64  # of a block, whose deviations are computed at a time: some 10 MB
# Strangers by their number of standard deviations above the mean, in bins.
_STEP = 0.1
_REACH = 40.0
_BIN_EDGES = np.arange(0, _REACH + _STEP, _STEP)
_MIN_COUNT = 30  # pairs beyond the end of the fit, at least
# Share of pairs beyond the end of a fit that pairs of one person must have no part in; each group may be in some.
_HOPEFUL_END = 1e-3
_HOPEFUL_PAIRS = 4
_LOWEST_SCORED = 1.0  # deviation from which it counts how well the tail and pairs of one person explain what there is
_MIN_BINS = 8
_MIN_PAIRS = 1000  # of strangers; fewer do not show a tail
_DEGREE = 2  # of the logarithm of their density
_BEGIN_SHARE = 0.1  # of pairs that are in the fit: their tail has a shape of its own
# Ranks of the most similar groups that tell how crowded a region is. The first one may be the same person.
_RANK_SHARE = 0.02
_MIN_RANK = 10
_MAX_RANK = 80
_MIN_COHORT = 200  # groups below which nothing is said about regions
_LOCAL_SHARE = 0.5  # of a region's own location
_LOCAL_POWER = 1 / 3  # of its scale: both are measured on few groups
_MIN_SCALE = 0.02
# Bounds of the log likelihood ratio. About one group in 400 is as far off as you like, and two faces hardly ever.
_MAX_FOR = 30.0
_MAX_AGAINST_FACE = 6.0
_MAX_AGAINST_FACES = 9.0
_ASSUMED_SPREAD = (
    0.2  # of the distance from the threshold to strangers, if nothing shows how alike one person's faces are
)
_ASSUMED_STRANGERS = 0.1  # how far below the threshold strangers lie, if there are none
_MAX_ASSUMED = 1.0  # bound of the ratio on a side that is assumed: for one person without strangers, and the reverse
_LOG_ROOT = 0.5 * float(np.log(2 * np.pi))


@dataclass(frozen=True)
class SizedNormal:
    """A normal distribution whose variance falls with the faces that a mean rests on.

    Attributes:
        mean: Mean.
        fixed: Part of the variance that does not depend on the faces.
        per_face: The variance is `fixed + per_face * (1 / n + 1 / m)` for groups of n and m faces.
    """

    mean: float
    fixed: float
    per_face: float

    @classmethod
    def fit(cls, similarity: Float64, inverse: Float64, share: Float64) -> "SizedNormal":
        """Fit similarities (n,) that rest on `inverse` (n,) and count by their share (n,)."""
        mean = float(np.average(similarity, weights=share))
        squared = (similarity - mean) ** 2
        overall = max(1e-6, float(np.average(squared, weights=share)))
        per_face = 0.0
        if float(np.ptp(inverse)) > 1e-6:
            slope = np.polyfit(inverse, squared, 1, w=np.sqrt(share))[0]
            per_face = float(np.clip(slope, 0, overall / max(1e-6, float(np.average(inverse, weights=share)))))
        fixed = overall - per_face * float(np.average(inverse, weights=share))
        return cls(mean, max(fixed, 0.1 * overall), per_face)

    def compute_deviation(self, inverse: Float64) -> Float64:
        """Compute standard deviations (n,) of similarities that rest on `inverse` (n,)."""
        return np.asarray(np.sqrt(self.fixed + self.per_face * inverse), np.float64)

    def compute_log_density(self, similarity: Float64, inverse: Float64) -> Float64:
        """Compute the log density (n,)."""
        deviation = self.compute_deviation(inverse)
        log_density = -0.5 * ((similarity - self.mean) / deviation) ** 2 - np.log(deviation) - _LOG_ROOT
        return np.asarray(log_density, np.float64)


@dataclass(frozen=True)
class StrangerRegions:
    """How strangers are distributed around each of k groups.

    Attributes:
        location: Deviations (k,) that a group's most similar strangers have, by a low rank among them.
        scale: How far (k,) those above it are from it, on average.
        usual_location: Median of the locations.
        usual_scale: Median of the scales.
    """

    location: Float64
    scale: Float64
    usual_location: float
    usual_scale: float

    def normalise(self, deviation: Float64, group: Int64) -> tuple[Float64, Float64]:
        """Map deviations (n,) of groups (n,) to what they would be in a usual region, with the factors (n,) of it."""
        location = self.location[group]
        factor = (self.usual_scale / self.scale[group]) ** _LOCAL_POWER
        start = self.usual_location + (1 - _LOCAL_SHARE) * (location - self.usual_location)
        return start + (deviation - location) * factor, factor


@dataclass(frozen=True)
class OnePersonModel:
    """Likelihoods of the mean similarity of two groups.

    Attributes:
        genuine: Mean similarities of two groups of one person.
        strangers: Mean similarities of two groups of different persons.
        counts: Sampled pairs of strangers by their deviation from the mean, (400,), and in all at the end.
        pair_count: Number of sampled pairs.
        sampling: Sampled pairs per pair that there is.
        group_count: Number of groups with faces.
        log_tail: Log density of strangers' deviations, (400,), falling; None if it is taken for normal.
        regions: Regions of the groups; None if the groups are too few.
        max_for: Bound of the log likelihood ratio in favour of one person.
        max_against: Bound of it in favour of two.
    """

    genuine: SizedNormal
    strangers: SizedNormal
    counts: Float64
    pair_count: float
    sampling: float
    group_count: int
    log_tail: Float64 | None
    regions: StrangerRegions | None
    max_for: float
    max_against: float

    @classmethod
    def fit(
        cls,
        groups: Clusters,
        vectors: Float32,
        density: Float32,
        labels: Int64,
        *,
        compared: Int64,
        threshold: float,
        seed: int = 0,
    ) -> "OnePersonModel":
        """Fit the likelihoods to a corpus.

        Args:
            groups: k groups, some may be empty.
            vectors: unit vectors of the faces, (n, dim).
            density: densities of the faces, (n,).
            labels: group of each face, (n,), -1 for none.
            compared: groups (c,) that will be compared: their regions are looked at.
            threshold: similarity from which two faces count as one person. It stands in for what the corpus does not
                show.
            seed: seed of the samples.
        """
        rng = np.random.default_rng(seed)
        used = np.flatnonzero(groups.size > 0)
        cohort = _draw(used, _MAX_COHORT, rng)
        rows = cohort if len(used) <= _MAX_COHORT else _draw(used, _MAX_COHORT, rng)
        strangers = _fit_strangers(groups, used, rng)
        genuine = _fit_genuine(vectors, density, labels, strangers, rng)
        max_for = _MAX_FOR if strangers else _MAX_ASSUMED
        max_against = _MAX_AGAINST_FACES if genuine else _MAX_ASSUMED
        strangers, genuine = _complete(strangers, genuine, threshold)
        counts, location, scale = _measure_rows(groups, rows, cohort, strangers)
        regions = None
        if len(cohort) >= _MIN_COHORT:
            compared = np.unique(compared)
            _, own_location, own_scale = _measure_rows(groups, compared, cohort, strangers)
            regions = _spread_regions(len(groups), compared, own_location, own_scale, location, scale)
        pair_count = float(len(rows) * len(cohort) - len(np.intersect1d(rows, cohort)))
        model = cls(
            genuine=genuine,
            strangers=strangers,
            counts=counts,
            pair_count=pair_count,
            sampling=2 * pair_count / max(1.0, len(used) * (len(used) - 1.0)),
            group_count=len(used),
            log_tail=None,
            regions=regions,
            max_for=max_for,
            max_against=max_against,
        )
        return replace(model, log_tail=_fit_tail(counts, pair_count, 0.0))

    def hope(self) -> "OnePersonModel":
        """Fit the tail of strangers to pairs that are not very similar, as if all others were of one person."""
        end = max(_HOPEFUL_END, _HOPEFUL_PAIRS / max(1, self.group_count))
        return replace(self, log_tail=_fit_tail(self.counts, self.pair_count, end * self.pair_count))

    def refit(self, deviation: Float64, probability: Float64) -> "OnePersonModel":
        """Fit the tail of strangers anew, without pairs (m,) that are one person with some probability (m,)."""
        one_person, _ = np.histogram(deviation, _BIN_EDGES, weights=probability)
        counts = np.maximum(0, self.counts - self.sampling * one_person)
        return replace(self, log_tail=_fit_tail(counts, self.pair_count, 0.0))

    def score(self, inverse: Float64, probability: Float64) -> float:
        """Compute the log likelihood of all sampled pairs, if those listed (m,) are one person with `probability` (m,).

        Args:
            inverse: 1 / n + 1 / m for groups of n and m faces, (m,).
            probability: probability that each pair is one person, (m,).
        """
        centres = (_BIN_EDGES[:-1] + _BIN_EDGES[1:]) / 2
        strangers = np.exp(self._interpolate(centres)) * self.pair_count
        total = float(probability.sum())
        typical = float(np.average(inverse, weights=probability)) if total > 0 else 1.0
        spread = float(self.strangers.compute_deviation(np.array([typical]))[0])
        similarity = self.strangers.mean + centres * spread
        genuine = np.exp(self.genuine.compute_log_density(similarity, np.full(len(centres), typical))) * spread
        rate = np.maximum(1e-12, (strangers + genuine * total * self.sampling) * _STEP)
        scored = centres >= _LOWEST_SCORED
        return float((self.counts * np.log(rate) - rate)[scored].sum())

    def compute_deviation(self, similarity: Float64, inverse: Float64) -> Float64:
        """Compute how many standard deviations (m,) similarities are above the mean of strangers."""
        return (similarity - self.strangers.mean) / self.strangers.compute_deviation(inverse)

    def compute_log_ratio(
        self, similarity: Float64, inverse: Float64, ends: Int64 | None = None, *, is_face: Bool | None = None
    ) -> Float64:
        """Compute the log likelihood ratio (m,) of one person against two.

        Above the mean of one person's groups a pair cannot become less likely.

        Args:
            similarity: mean similarity of each pair, (m,).
            inverse: 1 / n + 1 / m for groups of n and m faces, (m,).
            ends: the two groups of each pair, (m, 2), for what is known of their regions.
            is_face: whether one of the two is a single face, (m,); by default all are taken for that.
        """
        capped = np.minimum(similarity, self.genuine.mean)
        genuine = self.genuine.compute_log_density(capped, inverse)
        ratio = genuine - self._compute_stranger_density(similarity, inverse, ends)
        against = np.where(np.True_ if is_face is None else is_face, _MAX_AGAINST_FACE, _MAX_AGAINST_FACES)
        return np.asarray(np.clip(ratio, -np.minimum(against, self.max_against), self.max_for), np.float64)

    def _compute_stranger_density(self, similarity: Float64, inverse: Float64, ends: Int64 | None) -> Float64:
        spread = np.log(self.strangers.compute_deviation(inverse))
        deviation = self.compute_deviation(similarity, inverse)
        if ends is None or self.regions is None:
            return np.asarray(self._interpolate(deviation) - spread, np.float64)
        log_density = np.zeros(len(similarity))
        for end in (0, 1):
            local, factor = self.regions.normalise(deviation, ends[:, end])
            log_density += 0.5 * (self._interpolate(local) + np.log(factor))
        return log_density - spread

    def _interpolate(self, deviation: Float64) -> Float64:
        """Compute the log density (m,) of strangers at deviations (m,)."""
        normal = -0.5 * deviation**2 - _LOG_ROOT
        if self.log_tail is None:
            return np.asarray(normal, np.float64)
        centres = (_BIN_EDGES[:-1] + _BIN_EDGES[1:]) / 2
        tail = np.interp(deviation, centres, self.log_tail)
        return np.asarray(np.where(deviation > 0, tail, normal), np.float64)


def sum_groups(vectors: Float32, density: Float32, labels: Int64, count: int, rows: Int64 | None = None) -> Clusters:
    """Sum the faces of each of `count` groups. A label of -1 does not count; an empty group has size 0.

    Args:
        vectors: unit vectors, (n, 128).
        density: densities, (n,).
        labels: group of each face, (n,), or of each of the rows, (m,).
        count: number of groups.
        rows: faces that are summed, (m,); by default all.
    """
    used = np.flatnonzero(labels >= 0)
    # Sort by group, so that each group is one run of rows.
    order = used[np.argsort(labels[used], kind="stable")]
    groups = labels[order]
    faces = order if rows is None else rows[order]
    flat = np.asarray(vectors)
    sums = make_temporary_array(np.float32, (count, flat.shape[1]))
    crowd = np.zeros(count, np.float32)
    for block, starts in iterate_pieces(groups):
        add_pieces(sums, groups[block], flat[faces[block]], starts)
        add_pieces(crowd, groups[block], density[faces[block]], starts)
    return Clusters(sums, crowd, np.bincount(labels[used], minlength=count))


def _draw(numbers: Int64, count: int, rng: np.random.Generator) -> Int64:
    """Draw up to `count` of the numbers, sorted."""
    if len(numbers) <= count:
        return numbers
    return np.sort(rng.choice(numbers, count, replace=False))


def _fit_strangers(groups: Clusters, used: Int64, rng: np.random.Generator) -> SizedNormal | None:
    """Fit the mean and the variance of pairs of groups; None if there are hardly any."""
    pair_count = len(used) * (len(used) - 1) // 2
    if pair_count < 1:
        return None
    size = min(100_000, 20 * pair_count)
    u = rng.choice(used, size)
    v = rng.choice(used, size)
    is_pair = u != v
    u = u[is_pair]
    v = v[is_pair]
    if pair_count < _MIN_BINS:
        return None
    similarity = groups.compute_linkage(u, v).astype(np.float64)
    return SizedNormal.fit(similarity, 1 / groups.size[u] + 1 / groups.size[v], np.ones(len(u)))


def _fit_genuine(
    vectors: Float32, density: Float32, labels: Int64, strangers: SizedNormal | None, rng: np.random.Generator
) -> SizedNormal | None:
    """Fit the mean and the variance of two random parts of one group; None if there are hardly any groups."""
    similarity, inverse = _compare_parts(vectors, density, labels, rng)
    if len(similarity) < _MIN_BINS:
        return None
    share = np.ones(len(similarity))
    genuine = SizedNormal.fit(similarity, inverse, share)
    if strangers is None:
        return genuine
    # Groups with wrong labels in them have parts that are strangers: these do not count.
    rate = 0.9
    for _ in range(10):
        one = np.log(rate) + genuine.compute_log_density(np.minimum(similarity, genuine.mean), inverse)
        two = np.log(1 - rate) + strangers.compute_log_density(similarity, inverse)
        share = 1 / (1 + np.exp(np.clip(two - one, -50, 50)))
        if share.sum() < _MIN_BINS:
            return None
        genuine = SizedNormal.fit(similarity, inverse, share)
        rate = float(np.clip(share.mean(), 0.1, 0.99))
    return genuine


def _compare_parts(
    vectors: Float32, density: Float32, labels: Int64, rng: np.random.Generator
) -> tuple[Float64, Float64]:
    """Compute the mean similarity (m,) of random parts of groups, and 1 / n + 1 / m (m,) of their sizes."""
    count = int(labels.max(initial=-1)) + 1
    size = np.bincount(labels[labels >= 0], minlength=count)
    chosen = np.zeros(count + 1, bool)
    chosen[_draw(np.flatnonzero(size >= 2), _MAX_SPLITS, rng)] = True
    at = np.flatnonzero(chosen[labels])
    similarity = [np.empty(0)]
    inverse = [np.empty(0)]
    for _ in range(_REPEATS):
        # Rank the faces of each group at random. Both parts are cut from that order.
        order = at[np.lexsort((rng.random(len(at)), labels[at]))]
        group = labels[order]
        rank = np.arange(len(order)) - np.searchsorted(group, group)
        total = np.minimum(size, _MAX_PART)
        cut = 1 + (rng.random(count) * np.maximum(0, total - 1)).astype(np.int64)
        left = 1 + (rng.random(count) * cut).astype(np.int64)
        right = 1 + (rng.random(count) * np.maximum(1, total - cut)).astype(np.int64)
        part = np.where(rank < np.minimum(left, cut)[group], 0, -1)
        is_right = (rank >= cut[group]) & (rank < np.minimum(cut + right, total)[group])
        part = np.where(is_right, 1, part)
        label = np.where(part >= 0, 2 * group + part, -1)
        parts = sum_groups(vectors, density, label, 2 * count, order)
        whole = np.flatnonzero((parts.size[0::2] > 0) & (parts.size[1::2] > 0))
        similarity.append(parts.compute_linkage(2 * whole, 2 * whole + 1).astype(np.float64))
        inverse.append(1 / parts.size[2 * whole] + 1 / parts.size[2 * whole + 1])
    return np.concatenate(similarity), np.concatenate(inverse)


def _complete(
    strangers: SizedNormal | None, genuine: SizedNormal | None, threshold: float
) -> tuple[SizedNormal, SizedNormal]:
    """Replace what a corpus does not show by what the threshold says."""
    if genuine is None or (strangers is not None and genuine.mean <= strangers.mean):
        gap = threshold - strangers.mean if strangers else _ASSUMED_STRANGERS
        spread = _ASSUMED_SPREAD * max(gap, 0.1 * _ASSUMED_STRANGERS)
        genuine = SizedNormal(threshold + spread, spread**2 / 2, spread**2 / 4)
    if strangers is None:
        mean = min(threshold - _ASSUMED_STRANGERS, 2 * threshold - genuine.mean)
        strangers = SizedNormal(mean, (0.4 * (threshold - mean)) ** 2, 0.0)
    return strangers, genuine


def _measure_rows(
    groups: Clusters, rows: Int64, cohort: Int64, strangers: SizedNormal
) -> tuple[Float64, Float64, Float64]:
    """Compare groups with the cohort's.

    Returns:
        Counts (400,) of the deviations above the mean; the location (r,) and the scale (r,) of each row's most similar.
    """
    rank = int(np.clip(round(_RANK_SHARE * len(cohort)), _MIN_RANK, _MAX_RANK))
    counts = np.zeros(len(_BIN_EDGES) - 1)
    location = np.zeros(len(rows))
    scale = np.ones(len(rows))
    others = groups.take(cohort)
    means = others.means
    for at in range(0, len(rows), _BLOCK):
        block = rows[at : at + _BLOCK]
        own = groups.take(block)
        product = own.sums @ means.T
        for first in range(0, len(block), _COMPARED_ROWS):
            part = slice(first, first + _COMPARED_ROWS)
            similarity = product[part] / own.size[part, None] - (own.density[part, None] + others.density[None]) / 2
            inverse = 1 / own.size[part, None] + 1 / others.size[None]
            deviation = (similarity - strangers.mean) / strangers.compute_deviation(inverse)
            deviation[block[part, None] == cohort[None]] = -np.inf
            counts += np.histogram(deviation, _BIN_EDGES)[0]
            if len(cohort) >= _MIN_COHORT:
                nearest = -np.sort(-np.partition(deviation, -rank - 1, axis=1)[:, -rank - 1 :], axis=1)
                rows_of_part = slice(at + first, at + first + len(deviation))
                location[rows_of_part] = nearest[:, -1]
                above = nearest[:, 1:-1].mean(axis=1) - nearest[:, -1]
                scale[rows_of_part] = np.maximum(above, _MIN_SCALE)
    return counts, location, scale


def _spread_regions(
    count: int, compared: Int64, own_location: Float64, own_scale: Float64, location: Float64, scale: Float64
) -> StrangerRegions:
    """Put the regions of the compared groups at their places among k."""
    usual_location = float(np.median(location))
    usual_scale = float(np.median(scale))
    locations = np.full(count, usual_location)
    scales = np.full(count, usual_scale)
    locations[compared] = own_location
    scales[compared] = own_scale
    return StrangerRegions(locations, scales, usual_location, usual_scale)


def _fit_tail(counts: Float64, pair_count: float, min_above: float) -> Float64 | None:
    """Fit a falling parabola to the logarithms of the counts in the tail; None if they do not show one.

    Args:
        counts: pairs of strangers by their deviation, (400,).
        pair_count: pairs of strangers in all.
        min_above: pairs beyond the end of the fit, at least.
    """
    above = counts[::-1].cumsum()[::-1]
    is_tail = above <= _BEGIN_SHARE * pair_count
    used = np.flatnonzero(is_tail & (above >= max(_MIN_COUNT, min_above)) & (counts > 0))
    if pair_count < _MIN_PAIRS or len(used) < _MIN_BINS:
        return None
    position = (_BIN_EDGES[:-1] + _BIN_EDGES[1:]) / 2
    curve = np.polynomial.Polynomial.fit(
        position[used], np.log(counts[used]), _DEGREE, w=np.sqrt(counts[used]), domain=[0, _REACH]
    )
    fitted = curve(position)
    fitted = np.where(is_tail, fitted, np.log(np.maximum(counts, 1)))
    # Behind the pairs the curve falls on at least as steeply as at their end: it may bend up.
    last = int(used[-1])
    slope = min(0.0, float(curve.deriv()(position[last])))
    beyond = np.arange(last + 1, len(fitted))
    fitted[beyond] = np.minimum(fitted[beyond], fitted[last] + slope * (position[beyond] - position[last]))
    return np.asarray(np.minimum.accumulate(fitted) - np.log(pair_count * _STEP), np.float64)
