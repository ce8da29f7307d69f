"""How crowded the space around a face is: what makes one threshold fit all faces.

Blurred, dark or young faces lie close to everyone, and a distance means less there. The density of a face is its mean
similarity to the nearest of a fixed cohort of faces. It is subtracted from the similarity of a pair as in the symmetric
cohort normalisation of speaker verification (Shum et al., Odyssey 2010). There is no division by the spread here, so
that means over pairs of faces remain inner products of sums.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from facepipe.nearest.faiss_engine import faiss
from facepipe.types import Float32, Int64

SIZE = 4096
# Shares of the cohort between which neighbours count.
_NEAREST_SHARE = 0.005
_FARTHEST_SHARE = 0.025
# Minimum ranks, because in a small cohort the nearest faces are of the same identity.
_MIN_NEAREST_RANK = 20
_MIN_FARTHEST_RANK = 100
_BLOCK_ROWS = 8192  # a divisor of the rows that a task elsewhere gets, because rounding depends on it


def compute_block_density(vectors: Float32, cohort: "Cohort") -> Float32:
    """Compute the density of a block of vectors (m, 128), as a task on another machine does."""
    return cohort.compute_density(vectors)


@dataclass(frozen=True)
class Cohort:
    """A sample of faces.

    Attributes:
        vectors: Vectors (m, dim); none if a gallery is too small for a sample. Then no face is crowded.
    """

    vectors: Float32

    @classmethod
    def draw(cls, vectors: Float32, seed: int, fit: Int64 | None = None) -> "Cohort":
        """Draw a seeded sample of all faces, or of those at some positions (m,), or take all if they are few."""
        rng = np.random.default_rng(seed)
        count = len(vectors) if fit is None else len(fit)
        chosen = np.sort(rng.choice(count, min(SIZE, count), replace=False))
        if fit is not None:
            chosen = fit[chosen]
        return cls(np.ascontiguousarray(vectors[chosen]))

    @classmethod
    def create_empty(cls, dim: int) -> "Cohort":
        """Create an empty cohort of `dim` numbers: densities are 0 and similarities are cosines."""
        return cls(np.empty((0, dim), np.float32))

    def compute_density(self, vectors: Float32) -> Float32:
        """Compute the density (n,) of faces (n, dim).

        It is the mean cosine to the cohort's faces between the ranks that count.
        """
        density = np.zeros(len(vectors), np.float32)
        size = len(self.vectors)
        last = min(size, max(_MIN_FARTHEST_RANK, round(_FARTHEST_SHARE * size)))
        first = min(last // 2, max(_MIN_NEAREST_RANK, round(_NEAREST_SHARE * size)))
        if not last:
            return density

        def compute_block(at: int) -> None:
            block = np.ascontiguousarray(vectors[at : at + _BLOCK_ROWS])
            cosines = faiss.knn(block, self.vectors, last, metric=faiss.METRIC_INNER_PRODUCT)[0]
            density[at : at + _BLOCK_ROWS] = cosines[:, first:].mean(axis=1, dtype=np.float64)

        # A thread per block, and not per part of a product: that would round sums by the number of threads, which is
        # another one on another machine.
        with ThreadPoolExecutor(
            faiss.omp_get_max_threads(), initializer=faiss.omp_set_num_threads, initargs=(1,)
        ) as threads:
            for _ in threads.map(compute_block, range(0, len(vectors), _BLOCK_ROWS)):
                pass
        return density
