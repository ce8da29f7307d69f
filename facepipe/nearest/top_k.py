"""The nearest so far of each query, on the host: pairs come in any order, and what is kept does not depend on it."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from facepipe.nearest.distances import Hits, pair_distances
from facepipe.nearest.faiss_engine import faiss
from facepipe.types import Float32, Int64

_BEHIND = 4  # pieces of work a thread may have waiting


class Best:
    """The k nearest so far of queries (n, d). Threads compare and keep; parts of the queries are independent."""

    def __init__(self, queries: Float32, k: int, threads: int | None = None):
        self._queries = queries
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads, initializer=faiss.omp_set_num_threads, initargs=(1,))
        self._pending: list[tuple[slice, Future[None]]] = []
        shape = (len(queries), k)
        self.hits = Hits(np.full(shape, -1, np.int64), np.full(shape, np.inf, np.float32))

    def __enter__(self) -> "Best":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def farthest(self, part: slice) -> Float32:
        """(m,) squared distance of the k-th nearest of a part of the queries, infinite where there are fewer."""
        self.wait(part)
        return self.hits.distances[part, -1]

    def add(self, part: slice, pairs: tuple[Int64, Int64], block: tuple[Int64, Float32 | None, Float32]) -> None:
        """Compare query part.start + i with the block's vector j, for pairs (i (m,) rising, j (m,)).

        block: (ids, what is added to squared distances, vectors)
        """
        self.wait(part)
        self._pending.append((part, self._pool.submit(self._compare, part, pairs, block)))

    def wait(self, part: slice) -> None:
        """Until all pairs of this part are compared, and not too many of the others wait."""
        late, left = len(self._pending) - _BEHIND * self._threads, []
        for n, (other, done) in enumerate(self._pending):
            if n < late or (other.start < part.stop and part.start < other.stop):
                done.result()
            else:
                left.append((other, done))
        self._pending = left

    def _compare(self, part: slice, pairs: tuple[Int64, Int64], block: tuple[Int64, Float32 | None, Float32]) -> None:
        (i, j), (ids, added, vectors) = pairs, block
        distances = pair_distances(self._queries[part], i, vectors, j)
        if added is not None:
            distances += added[j]
        keep(Hits(self.hits.ids[part], self.hits.distances[part]), i, ids[j], distances)


def keep(best: Hits, rows: Int64, ids: Int64, distances: Float32) -> None:
    """Put pairs (row (m,) rising, id (m,), distance (m,) >= 0) into the best (n, k), in place, if they are among them.

    Sorted by distance, ties by id. An id that a row has already with the same distance is not put in again.
    """
    k = best.ids.shape[1]
    last_id, last = best.ids[rows, -1], best.distances[rows, -1]
    better = (distances < last) | ((distances == last) & (ids < last_id))
    rows, ids, distances = rows[better], ids[better], distances[better]
    if not len(rows):
        return
    first = np.flatnonzero(np.diff(rows, prepend=-1))
    touched = rows[first]
    lengths = np.diff(first, append=len(rows))
    old_ids, old = best.ids[touched].ravel(), best.distances[touched].ravel()
    held = old_ids >= 0
    which = np.concatenate([np.repeat(np.arange(len(touched)), k)[held], np.repeat(np.arange(len(touched)), lengths)])
    every = np.concatenate([old_ids[held], ids])
    values = np.concatenate([old[held], distances])
    # Bits of non-negative floats rise with their values: row and distance are one integer to sort by.
    key = (which.astype(np.uint64) << np.uint64(32)) | values.view(np.uint32)
    order = np.argsort(key)
    ranked = key[order]
    if (ranked[1:] == ranked[:-1]).any():
        order = np.lexsort((every, key))
        ranked, named = key[order], every[order]
        again = np.concatenate([[False], (ranked[1:] == ranked[:-1]) & (named[1:] == named[:-1])])
        order = order[~again]
    which, every, values = which[order], every[order], values[order]
    place = np.arange(len(which)) - np.searchsorted(which, which)
    inside = place < k
    best.ids[touched[which[inside]], place[inside]] = every[inside]
    best.distances[touched[which[inside]], place[inside]] = values[inside]
