"""The rule by which new faces are placed, and how far a gallery has drifted from the clustering that the rule is from.

Two faces of one person are as similar as the threshold says. A face that is compared with a thousand persons at once is
as similar to the best of them by chance. So a new face joins a cluster only from a stricter similarity: that which a
newcomer's most similar stranger rarely has. A face in a crowded region is similar to many persons: what counts is by
how much the best one stands out from the next ones. The limit is found from the clusters: how much the best of all
others stands out for each face. Such maxima have a Gumbel distribution, whose location grows with the logarithm of the
number of clusters.
"""

import os
from dataclasses import dataclass, field

import numpy as np

from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.cohort import Cohort
from facepipe.errors import StorageError
from facepipe.types import Float32, Float64, Int64

STATE = "state.npz"
_NEWCOMERS = 0.015  # share of the faces of new persons that may join a stranger's cluster
_SAMPLE = 4096  # faces that are compared with all clusters
_BLOCK = 512
_BLOCK_CLUSTERS = 4096
_MIN_CLUSTERS = 20  # fewer do not show what the most similar stranger is like
RUNNERS_UP = 9
"""Next clusters behind the most similar one, from which it must stand out."""
_CROWD_SHARE = 0.5  # of their mean similarity, that is taken off
# Quantiles that the distribution is fitted to. Behind them are faces whose own person has a second cluster.
_LOW = 0.25
_HIGH = 0.6


@dataclass(frozen=True)
class StrangerLimit:
    """How much the cluster of the most similar stranger stands out.

    Attributes:
        location: Location of the Gumbel distribution; minus infinity if nothing is known.
        scale: Its scale.
        cluster_count: Clusters that it was measured among.
    """

    location: float = float("-inf")
    scale: float = 0.0
    cluster_count: int = 0

    @classmethod
    def measure(cls, vectors: Float32, density: Float32, labels: Int64, clusters: Clusters) -> "StrangerLimit":
        """Compare a sample of clustered faces with all clusters but their own.

        Args:
            vectors: unit vectors, (n, dim).
            density: their densities, (n,).
            labels: cluster of each face, (n,).
            clusters: the clusters.
        """
        cluster_count = int((clusters.size > 0).sum())
        if cluster_count < _MIN_CLUSTERS:
            return cls(cluster_count=cluster_count)
        rng = np.random.default_rng(0)
        chosen = np.sort(rng.choice(len(labels), min(_SAMPLE, len(labels)), replace=False))
        best = np.full(len(chosen), -np.inf)
        for at in range(0, len(chosen), _BLOCK):
            block = chosen[at : at + _BLOCK]
            best[at : at + _BLOCK] = _find_best_other(vectors[block], density[block], labels[block], clusters)
        low, high = np.quantile(best, [_LOW, _HIGH]).tolist()
        scale = max(0.0, (high - low) / (_invert_gumbel(_HIGH) - _invert_gumbel(_LOW)))
        return cls(low - scale * _invert_gumbel(_LOW), scale, cluster_count)

    def find_threshold(self, cluster_count: int) -> float:
        """Find how much the best of so many clusters stands out for few newcomers only."""
        growth = np.log(max(1, cluster_count) / max(1, self.cluster_count))
        return float(self.location + self.scale * (_invert_gumbel(1 - _NEWCOMERS) + max(0.0, growth)))


def stand_out(nearest: Float32 | Float64) -> Float64:
    """Compute how much the best cluster of each face stands out, (n,).

    Args:
        nearest: mean similarities (n, 10) to the most similar clusters, falling; minus infinity if there are fewer.
    """
    others = np.where(np.isfinite(nearest[:, 1:]), nearest[:, 1:], 0).sum(axis=1)
    count = np.maximum(1, np.isfinite(nearest[:, 1:]).sum(axis=1))
    return np.asarray(nearest[:, 0] - _CROWD_SHARE * others / count, np.float64)


def _find_best_other(vectors: Float32, density: Float32, labels: Int64, clusters: Clusters) -> Float64:
    """Compute how much the best cluster that is not a face's own stands out, (n,)."""
    nearest = np.full((len(vectors), RUNNERS_UP + 1), -np.inf)
    for start in range(0, len(clusters), _BLOCK_CLUSTERS):
        part = clusters.take(np.arange(start, min(len(clusters), start + _BLOCK_CLUSTERS)))
        similarity = vectors @ part.means.T - (density[:, None] + part.density[None]) / 2
        similarity[:, part.size == 0] = -np.inf
        own = np.flatnonzero((labels >= start) & (labels < start + len(part)))
        similarity[own, labels[own] - start] = -np.inf
        both = np.concatenate([nearest, similarity], axis=1)
        nearest = -np.sort(np.partition(-both, RUNNERS_UP, axis=1)[:, : RUNNERS_UP + 1], axis=1)
    return stand_out(nearest)


def _invert_gumbel(probability: float) -> float:
    return float(-np.log(-np.log(probability)))


@dataclass(frozen=True)
class PlacementRule:
    """The rule by which a clustering places new faces, and what it was made from.

    Attributes:
        cohort: Cohort that densities are computed with.
        threshold: Mean similarity from which faces are one person.
        limit: How similar a newcomer is to the most similar stranger.
        min_quality: Quality below which a face founds no person.
        waiting: Sorted numbers of the clusters that hold no fit face, (m,).
        faces: Faces that were clustered; 0 if that is not known, as in reports of older versions.
        distance: Threshold as a distance of faces of mean density.
        settings: Rules and graph of the clustering, as JSON; empty if they are not known.
        next_number: Number of the next new cluster.
        added: Faces that were added since.
        unplaced: How many of these found no cluster.
        decisions: Version of the table of decisions that was respected; -1 if there was none.
        next_person: Id of the next new person.
    """

    cohort: Cohort
    threshold: float
    limit: StrangerLimit = field(default_factory=StrangerLimit)
    min_quality: float = 0.0
    waiting: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    faces: int = 0
    distance: float = 0.0
    settings: str = ""
    next_number: int = 0
    added: int = 0
    unplaced: int = 0
    decisions: int = -1
    next_person: int = 0

    def save(self, folder: str) -> None:
        """Write the rule into a report's folder."""
        np.savez(
            os.path.join(folder, STATE),
            cohort=self.cohort.vectors,
            threshold=self.threshold,
            limit=np.array([self.limit.location, self.limit.scale], np.float64),
            limit_clusters=self.limit.cluster_count,
            min_quality=self.min_quality,
            waiting=self.waiting,
            faces=self.faces,
            distance=self.distance,
            settings=np.array(self.settings),
            next_number=self.next_number,
            added=self.added,
            unplaced=self.unplaced,
            decisions=self.decisions,
            next_person=self.next_person,
        )

    @classmethod
    def load(cls, folder: str) -> "PlacementRule":
        """Load the rule of a report. One of an older version holds the cohort and the threshold only.

        Raises:
            StorageError: if there is none.
        """
        try:
            with np.load(os.path.join(folder, STATE)) as state:
                cohort = Cohort(state["cohort"])
                threshold = float(state["threshold"])
                if "limit" not in state.files:
                    return cls(cohort, threshold)
                location, scale = state["limit"].tolist()
                return cls(
                    cohort,
                    threshold,
                    limit=StrangerLimit(location, scale, int(state["limit_clusters"])),
                    min_quality=float(state["min_quality"]),
                    waiting=state["waiting"].astype(np.int64),
                    faces=int(state["faces"]),
                    distance=float(state["distance"]),
                    settings=str(state["settings"]),
                    next_number=int(state["next_number"]),
                    added=int(state["added"]),
                    unplaced=int(state["unplaced"]),
                    # Reports of older versions knew no decisions.
                    decisions=int(state["decisions"]) if "decisions" in state.files else -1,
                    next_person=int(state["next_person"]) if "next_person" in state.files else 0,
                )
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(
                f"cannot add to the clusters in {folder!r}: {error}; run `facepipe cluster` again"
            ) from error
