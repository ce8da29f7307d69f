"""Densities do not depend on the number of threads, nor on how faces are divided among tasks."""

import numpy as np
import pytest
from bench.galleries import Faces

from facepipe.curation.graph import cohort as cohorts
from facepipe.curation.graph.cells import ASSIGNED_ROWS
from facepipe.curation.graph.cohort import Cohort
from facepipe.nearest.faiss_engine import faiss

COUNT = 12_000


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(threads: int) -> None:
    """To the bit, because Ray's workers have another number of them than the driver."""
    vectors = Faces().draw(np.arange(COUNT) % 3000, 1)
    cohort = Cohort.draw(vectors, 0)
    usual = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(1)
        expected = cohort.compute_density(vectors)
        faiss.omp_set_num_threads(threads)
        assert np.array_equal(cohort.compute_density(vectors), expected)
        assert faiss.omp_get_max_threads() == threads
    finally:
        faiss.omp_set_num_threads(usual)


def test_tasks_do_not_matter() -> None:
    assert ASSIGNED_ROWS % cohorts._BLOCK_ROWS == 0, "each block of a task is one of the whole"
    vectors = Faces().draw(np.arange(COUNT) % 3000, 1)
    cohort = Cohort.draw(vectors, 0)
    begins = range(0, COUNT, cohorts._BLOCK_ROWS)
    parts = [cohorts.compute_block_density(vectors[at : at + cohorts._BLOCK_ROWS], cohort) for at in begins]
    assert np.array_equal(np.concatenate(parts), cohort.compute_density(vectors))
