"""The k nearest of each query, updated on the host. Pairs come in any order, and the result does not depend on it."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from facepipe.nearest.distances import Hits, VectorBlock, compute_pair_distances
from facepipe.nearest.faiss_engine import faiss
from facepipe.types import Float32, Int64

# Comparisons that may wait per thread. Each keeps its block of vectors in memory.
_PENDING_PER_THREAD = 4


class TopK:
    """The k nearest of queries (n, d). Threads compare pairs and update; parts of the queries are independent."""

    def __init__(self, queries: Float32, k: int, threads: int | None = None):
        self._queries = queries
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads, initializer=faiss.omp_set_num_threads, initargs=(1,))
        self._pending: list[tuple[slice, Future[None]]] = []
        self.hits = Hits.create_empty(len(queries), k)

    def __enter__(self) -> "TopK":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def get_farthest(self, part: slice) -> Float32:
        """Return the squared distance (m,) of the k-th nearest per query of a part; infinite if there are fewer."""
        self.wait(part)
        return self.hits.distances[part, -1]

    def add(self, part: slice, query_rows: Int64, block: VectorBlock, block_rows: Int64) -> None:
        """Compare pairs of a query and a vector in another thread.

        Args:
            part: a part of the queries.
            query_rows: position of each pair's query within the part, (m,), rising.
            block: the vectors.
            block_rows: position of each pair's vector in the block, (m,).
        """
        self.wait(part)
        self._pending.append((part, self._pool.submit(self._compare, part, query_rows, block, block_rows)))

    def wait(self, part: slice) -> None:
        """Wait until all pairs of a part are compared, and until few enough others are pending."""
        overdue = len(self._pending) - _PENDING_PER_THREAD * self._threads
        still_pending = []
        # Wait for the oldest comparisons beyond the limit, and for all that overlap the part.
        for number, (other, comparison) in enumerate(self._pending):
            if number < overdue or (other.start < part.stop and part.start < other.stop):
                comparison.result()
            else:
                still_pending.append((other, comparison))
        self._pending = still_pending

    def _compare(self, part: slice, query_rows: Int64, block: VectorBlock, block_rows: Int64) -> None:
        distances = compute_pair_distances(self._queries[part], query_rows, block.vectors, block_rows)
        if block.penalties is not None:
            distances += block.penalties[block_rows]
        hits = Hits(self.hits.ids[part], self.hits.distances[part])
        insert_hits(hits, query_rows, block.ids[block_rows], distances)


def insert_hits(hits: Hits, rows: Int64, ids: Int64, distances: Float32) -> None:
    """Insert faces into hits, in place, if they are among the k nearest.

    Hits stay sorted by distance, ties by id. An id that a row holds already at the same distance is not inserted again.

    Args:
        hits: the nearest so far, (n, k).
        rows: the row of each face, (m,), rising.
        ids: face ids (m,).
        distances: their distances (m,), none negative.
    """
    # Drop what is farther than the row's last hit.
    k = hits.ids.shape[1]
    last_ids = hits.ids[rows, -1]
    last_distances = hits.distances[rows, -1]
    better = (distances < last_distances) | ((distances == last_distances) & (ids < last_ids))
    rows = rows[better]
    ids = ids[better]
    distances = distances[better]
    if not len(rows):
        return

    # Put the new faces behind the hits of the rows that they change.
    first = np.flatnonzero(np.diff(rows, prepend=-1))
    changed_rows = rows[first]
    new_per_row = np.diff(first, append=len(rows))
    old_ids = hits.ids[changed_rows].ravel()
    old_distances = hits.distances[changed_rows].ravel()
    filled = old_ids >= 0
    numbers = np.arange(len(changed_rows))
    which = np.concatenate([np.repeat(numbers, k)[filled], np.repeat(numbers, new_per_row)])
    all_ids = np.concatenate([old_ids[filled], ids])
    all_distances = np.concatenate([old_distances[filled], distances])

    # The bits of non-negative floats rise with their values: row and distance are one integer to sort by.
    keys = (which.astype(np.uint64) << np.uint64(32)) | all_distances.view(np.uint32)
    order = np.argsort(keys)
    sorted_keys = keys[order]
    if (sorted_keys[1:] == sorted_keys[:-1]).any():
        # Equal distances: sort by id as well, and drop repeated ids.
        order = np.lexsort((all_ids, keys))
        sorted_keys = keys[order]
        sorted_ids = all_ids[order]
        repeated = (sorted_keys[1:] == sorted_keys[:-1]) & (sorted_ids[1:] == sorted_ids[:-1])
        order = order[~np.concatenate([[False], repeated])]
    which = which[order]
    all_ids = all_ids[order]
    all_distances = all_distances[order]

    # Write back the first k of each row.
    rank = np.arange(len(which)) - np.searchsorted(which, which)
    inside = rank < k
    hits.ids[changed_rows[which[inside]], rank[inside]] = all_ids[inside]
    hits.distances[changed_rows[which[inside]], rank[inside]] = all_distances[inside]
