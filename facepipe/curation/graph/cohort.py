"""How crowded the space around a face is: what makes one threshold fit all faces.

Blurred, dark or young faces lie close to everyone; a distance means less there. The mean similarity to the nearest of a
fixed cohort of faces, taken from the similarity of a pair as in the symmetric cohort normalisation of speaker
verification (Shum et al., Odyssey 2010), here without the division by the spread, so that means over pairs of faces
remain inner products of sums.
"""

from dataclasses import dataclass

import numpy as np

from facepipe.nearest.faiss_engine import faiss
from facepipe.types import Float32

SIZE = 4096
_NEAREST, _FARTHEST = 0.005, 0.025  # share of the cohort between which neighbours count
_LEAST_NEAREST, _LEAST_FARTHEST = 20, 100  # in small cohorts the nearest are the face's own identity
_BLOCK = 8192


@dataclass(frozen=True)
class Cohort:
    """A sample of faces (m, 128); none where a gallery is too small for one, and then nobody is crowded."""

    vectors: Float32

    @classmethod
    def draw(cls, vectors: Float32, seed: int) -> "Cohort":
        """A seeded sample of all faces, one of each where they are few."""
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(len(vectors), min(SIZE, len(vectors)), replace=False))
        return cls(np.ascontiguousarray(vectors[chosen]))

    @classmethod
    def none(cls) -> "Cohort":
        """No cohort: densities are 0 and similarities are cosines."""
        return cls(np.empty((0, 128), np.float32))

    def density(self, vectors: Float32) -> Float32:
        """(n,) mean cosine to the cohort's faces between the ranks that count."""
        out = np.zeros(len(vectors), np.float32)
        size = len(self.vectors)
        last = min(size, max(_LEAST_FARTHEST, round(_FARTHEST * size)))
        first = min(last // 2, max(_LEAST_NEAREST, round(_NEAREST * size)))
        if not last:
            return out
        for at in range(0, len(vectors), _BLOCK):
            block = np.ascontiguousarray(vectors[at : at + _BLOCK])
            near = faiss.knn(block, self.vectors, last, metric=faiss.METRIC_INNER_PRODUCT)[0]
            out[at : at + _BLOCK] = near[:, first:].mean(axis=1, dtype=np.float64)
        return out
