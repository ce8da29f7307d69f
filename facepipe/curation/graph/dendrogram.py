"""The tree of average linkage over a few thousand faces: what it tells about persons if no threshold is known."""

from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from facepipe.types import Float32, Float64, Int64

# A gap is believed if it is this share of the distance between typical merges inside persons and between them.
_MIN_GAP = 0.25
_ROUNDING = 1e-5  # products of copies differ by so much
# Of the faces so many must be in clusters of several, or the gap is between single faces. A few poor ones are alone.
_MIN_GROUPED = 0.9
_MIN_GROUP = 5
_MIN_CLUSTERS = 2
_MAX_CLUSTER_SHARE = 0.1  # of the faces: more clusters than that are no persons with many faces each

# A drop of the similarity that tells persons apart by itself, the faces that it takes, and the share of them that must
# be of one person with another.
_CLEAR_GAP = 0.3
_MIN_CLEAR_FACES = 100
_MIN_CLEAR_GROUPED = 0.25

# Merges of groups of at least `_MIN_GROUP` faces each. If few lie below a gap, it must be wider.
_MIN_MERGES_INSIDE = 3
_MIN_MERGES_BETWEEN = 3
_MIN_GAP_OF_GROUPS = 0.2
_MIN_GAP_OF_FEW = 0.5
_MIN_LATER = 0.05  # of the merges of single faces come after the typical merge of groups inside persons
_MAX_LARGEST = 0.6  # of the faces in one cluster
_ABOVE_STRANGERS = 1 / 6  # of the gap; single faces of a person reach down to there


@dataclass(frozen=True)
class Gap:
    """A gap between the merges inside persons and those between persons.

    Attributes:
        similarity: Mean cosine of two clusters from which they are one person.
        genuine: Share of the pairs that are of one person.
        grouped: Share of the faces that are in clusters of several.
        largest: Share of the faces that are in the largest cluster.
    """

    similarity: float
    genuine: float
    grouped: float = 1.0
    largest: float = 0.0

    @property
    def is_between_persons(self) -> bool:
        """Whether it parts nearly all faces into several persons: it does not lie between faces, or below strangers."""
        return self.grouped >= _MIN_GROUPED and self.largest <= _MAX_LARGEST


def cut_into(vectors: Float32, clusters: int) -> Int64:
    """Cut the tree of n unit vectors into at most so many clusters; returns the cluster (n,) of each."""
    if len(vectors) <= clusters:
        return np.arange(len(vectors))
    return np.asarray(fcluster(_build_tree(vectors), clusters, "maxclust"), np.int64)


def cut_at(vectors: Float32, density: Float32, similarity: float) -> Int64:
    """Cluster n faces by average linkage; returns the cluster (n,) of each.

    Args:
        vectors: unit vectors (n, dim).
        density: densities (n,).
        similarity: mean similarity from which two clusters are one.
    """
    if len(vectors) < _MIN_CLUSTERS:
        return np.arange(len(vectors))
    return np.asarray(fcluster(_build_tree(vectors, density), 1 - similarity, "distance"), np.int64)


def find_gap(vectors: Float32) -> Gap | None:
    """Find the widest gap between the heights of the tree's merges, if it parts persons with many faces each.

    Args:
        vectors: unit vectors (n, dim).

    Returns:
        None if there is no such gap.
    """
    count = len(vectors)
    if count < _MIN_GROUP * _MIN_CLUSTERS:
        return None
    tree = _build_tree(vectors)
    similarity = 1 - tree[:, 2]  # of the merges, falling
    best: Gap | None = None
    widest = 0.0
    for clusters in range(_MIN_CLUSTERS, int(_MAX_CLUSTER_SHARE * count) + 1):
        # The last clusters - 1 merges are between persons.
        inside = similarity[: count - clusters]
        between = similarity[count - clusters :]
        gap = float(inside[-1] - between[0])
        typical = float(np.median(inside) - np.median(between))
        if gap <= max(widest, _MIN_GAP * typical, _ROUNDING):
            continue
        size = np.bincount(fcluster(tree, clusters, "maxclust"))
        if size[size >= _MIN_GROUP].sum() < _MIN_GROUPED * count or (size >= _MIN_GROUP).sum() < _MIN_CLUSTERS:
            continue
        widest = gap
        genuine = float((size * (size - 1)).sum() / (count * (count - 1)))
        # Look-alikes lie in the gap as well: halfway between typical merges is on the safe side.
        middle = float(np.median(inside) + np.median(between)) / 2
        best = Gap(max(float(between[0] + gap / 2), middle), genuine)
    return best


def find_clear_gap(vectors: Float32, density: Float32 | None = None) -> Gap | None:
    """Find a drop between the merges of the tree that is so wide that persons may have as few as two faces.

    Args:
        vectors: unit vectors (n, dim).
        density: densities (n,).

    Returns:
        None if there is no such gap, or if few faces are of one person with another.
    """
    count = len(vectors)
    if count < _MIN_CLEAR_FACES:
        return None
    tree = _build_tree(vectors, density)
    similarity = 1 - tree[:, 2]  # of the merges, falling
    drops = similarity[:-1] - similarity[1:]
    last = int(np.argmax(drops))  # the last merge within a person
    if drops[last] < _CLEAR_GAP:
        return None
    size = np.bincount(fcluster(tree, count - last - 1, "maxclust"))
    if size[size > 1].sum() < _MIN_CLEAR_GROUPED * count:
        return None
    genuine = float((size * (size - 1)).sum() / (count * (count - 1)))
    return Gap(float(similarity[last + 1] + drops[last] / 2), genuine)


def find_group_gap(vectors: Float32, density: Float32 | None = None, lowest: float = -1.0) -> Gap | None:
    """Find the widest gap between the merges of groups of several faces each.

    A group that stands for a person joins another one of that person at a high similarity, since means hardly vary.
    Groups of two persons who look alike join far below. Single poor faces lie between, and are left out here.

    Args:
        vectors: unit vectors (n, dim).
        density: densities (n,).
        lowest: similarity below which merges are left out: they are known to be of two persons.

    Returns:
        A threshold a little above the most similar persons; None if there is no such gap.
    """
    count = len(vectors)
    if count < _MIN_GROUP * _MIN_CLUSTERS:
        return None
    tree = _build_tree(vectors, density)
    similarity, of_single = _list_group_merges(tree)
    if len(similarity) <= _MIN_MERGES_INSIDE:
        return None
    drops = similarity[:-1] - similarity[1:]
    inside = _MIN_MERGES_INSIDE + int(np.argmax(drops[_MIN_MERGES_INSIDE - 1 :]))
    gap = float(drops[inside - 1])
    # Inside a person poor faces come after groups. If none does, persons have few faces, and all groups are persons.
    if np.mean(of_single < np.median(similarity[:inside])) < _MIN_LATER:
        return None
    # What lies below the gap must be groups that would join otherwise.
    between = similarity[inside:]
    between = between[between >= lowest]
    if not len(between):
        return None
    typical = float(np.median(similarity[:inside]) - np.median(between))
    is_few = len(between) < _MIN_MERGES_BETWEEN
    if gap <= (_MIN_GAP_OF_FEW if is_few else _MIN_GAP_OF_GROUPS) * typical:
        return None
    threshold = float(between[0] + _ABOVE_STRANGERS * gap)
    size = np.bincount(fcluster(tree, 1 - threshold, "distance"))
    genuine = float((size * (size - 1)).sum() / (count * (count - 1)))
    grouped = float(size[size >= _MIN_GROUP].sum() / count)
    return Gap(threshold, genuine, grouped, float(size.max() / count))


def _list_group_merges(tree: Float64) -> tuple[Float64, Float64]:
    """List the similarities, falling, of the merges of two groups of several faces each, and of all others."""
    count = len(tree) + 1
    size = np.concatenate([np.ones(count), tree[:, 3]])
    smaller = np.minimum(size[tree[:, 0].astype(np.int64)], size[tree[:, 1].astype(np.int64)])
    similarity = np.asarray(1 - tree[:, 2], np.float64)
    return similarity[smaller >= _MIN_GROUP], similarity[smaller < _MIN_GROUP]


def _build_tree(vectors: Float32, density: Float32 | None = None) -> Float64:
    """Build the tree of merges (n - 1, 4), by rising mean of 1 - similarity, which is the cosine without densities."""
    similarity = vectors @ vectors.T
    # Row by row, because indices of all pairs would take four times the memory of the tree.
    distance = np.empty(len(vectors) * (len(vectors) - 1) // 2)
    filled = 0
    for row in range(len(vectors)):
        part = similarity[row, row + 1 :]
        if density is not None:
            part -= (density[row] + density[row + 1 :]) / 2
        distance[filled : filled + len(part)] = 1 - part
        filled += len(part)
    del similarity
    np.maximum(distance, 0, out=distance)
    return np.asarray(linkage(distance, "average"))
