"""All pairs of faces above a similarity.

A matrix product is computed block by block and only the pairs that reach the threshold are kept, so that memory stays
bounded. The similarity of two faces is their cosine less the mean of their densities (facepipe.nearest.similarity).
"""

import numpy as np

from facepipe.nearest.distances import compute_pair_distances
from facepipe.nearest.faiss_engine import faiss
from facepipe.nearest.similarity import compute_penalties, select_similar, sort_pairs
from facepipe.types import Float32, Int64

_ROWS = 384  # rows of a block: its product with some thousand vectors stays in the cache
_SPARE = 22  # neighbours of a crowded row that are compared exactly beyond those it keeps
_SLACK = 1e-5  # products round: what is near the threshold is computed again


def find_candidate_pairs(
    vectors: Float32, densities: Float32, threshold: float, max_neighbours: int, device: str = "cpu"
) -> tuple[Int64, Int64]:
    """Find the pairs whose similarity reaches about the threshold.

    If a block of rows has more than `max_neighbours` pairs per row it is crowded. Each of its rows then keeps its
    nearest only, and a pair stays if it is among the nearest of either of its rows. Every device finds the same pairs,
    as far as `refine_pairs` keeps them.

    Args:
        vectors: unit vectors (n, d).
        densities: densities (n,).
        threshold: similarity.
        max_neighbours: neighbours per row of a crowded block, and mean pairs per row above which a block is crowded.
        device: `cpu`, or a device of torch.

    Returns:
        Positions (u (m,), v (m,)) with u < v, each pair once.
    """
    if device != "cpu":
        from facepipe.nearest.join_gpu import JoinRule, find_pairs_on_device  # loads torch

        rule = JoinRule(threshold - _SLACK, max_neighbours, _ROWS)
        return find_pairs_on_device(vectors, densities, rule, device)
    left, right = _augment(vectors, densities)
    blocks: list[tuple[Int64, Int64]] = []
    first_crowd: int | None = None
    for start in range(0, len(left), _ROWS):
        # Earlier blocks have found the pairs with the rows before this one. A crowded block has not: it kept only the
        # nearest of its own rows. So rows behind the first crowd compare with everything from there on.
        begin = start if first_crowd is None else first_crowd
        pairs = _join_block(
            left, right, start, begin=begin, threshold=threshold - _SLACK, max_pairs_per_row=max_neighbours
        )
        if pairs is None:
            pairs = _find_nearest_of_block(
                vectors, densities, left, right, start, threshold=threshold - _SLACK, max_neighbours=max_neighbours
            )
            if first_crowd is None:
                first_crowd = start
        blocks.append(pairs)
    # The empty arrays keep the type if there is no block.
    u = np.concatenate([np.empty(0, np.int64), *(block[0] for block in blocks)])
    v = np.concatenate([np.empty(0, np.int64), *(block[1] for block in blocks)])
    return (u, v) if first_crowd is None else sort_pairs(u, v, len(left))


def _augment(vectors: Float32, densities: Float32) -> tuple[Float32, Float32]:
    """Append columns to the vectors, on the left and on the right, that make the product of two rows their similarity.

    Four columns instead of two: with 132 in all, every row begins at a full register.
    """
    # Rows of left end in (-density / 2, 1), of right in (1, -density / 2): a product subtracts the mean density.
    left = np.zeros((len(vectors), vectors.shape[1] + 4), np.float32)
    left[:, : vectors.shape[1]] = vectors
    right = left.copy()
    left[:, -2] = -densities / 2
    left[:, -1] = 1
    right[:, -2] = 1
    right[:, -1] = -densities / 2
    return left, right


def _join_block(
    left: Float32, right: Float32, start: int, *, begin: int, threshold: float, max_pairs_per_row: int
) -> tuple[Int64, Int64] | None:
    """Find the pairs of a block's rows with the rows from `begin` on; None if the block is crowded."""
    rows = left[start : start + _ROWS]
    product = (rows @ right[begin:].T).ravel()
    hits = np.flatnonzero(product >= threshold)
    if len(hits) > max_pairs_per_row * len(rows):
        return None
    # Turn flat positions in the product back into positions of faces.
    i, j = np.divmod(hits, len(right) - begin)
    i = i + start
    j = j + begin
    # Behind the block's first row each pair comes twice; before it, only from this side.
    new = (j > i) | (j < start)
    return i[new], j[new]


def _find_nearest_of_block(
    vectors: Float32,
    densities: Float32,
    left: Float32,
    right: Float32,
    start: int,
    *,
    threshold: float,
    max_neighbours: int,
) -> tuple[Int64, Int64]:
    """Find the nearest of each row of a crowded block among all rows, before and behind it."""
    queries = np.ascontiguousarray(left[start : start + _ROWS])
    exact = np.ascontiguousarray(vectors)
    rows = np.arange(start, start + len(queries))
    # More than needed are found, because products round. One more, because a row is its own nearest or as near.
    count = min(max_neighbours + 1 + _SPARE, len(right))
    neighbours = faiss.knn(queries, right, count, metric=faiss.METRIC_INNER_PRODUCT)[1].astype(np.int64)
    squared = compute_pair_distances(exact, np.repeat(rows, count), exact, neighbours.ravel())
    squared = squared.reshape(neighbours.shape)
    # Rank by exact similarity, ties by position.
    order = np.lexsort((neighbours, squared + compute_penalties(densities)[neighbours]), axis=1)
    order = order[:, : max_neighbours + 1]
    neighbours = np.take_along_axis(neighbours, order, axis=1)
    squared = np.take_along_axis(squared, order, axis=1)
    return select_similar(rows, neighbours, squared, densities, threshold)
