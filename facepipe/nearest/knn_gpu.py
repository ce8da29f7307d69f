"""The k nearest of many vectors to many queries, exactly: a device rules pairs out, the host compares the others.

The device multiplies in half precision and passes on every pair that could still be among a query's k nearest, by the
bound of facepipe.nearest.half_precision. The host computes the distance of each such pair in single precision, as it
does without a device. So the answer equals that of comparing all pairs on the host, bit by bit and ties included. A
coarser format or a looser bound costs time and nothing else, and no query is searched twice.

The k-th nearest comes closer with every block, so that few pairs are passed on after the first one: of n vectors in
random order about k (1 + ln(n / block)) per query, and those that rounding cannot tell from them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from facepipe.models.runtime.batches import Batches, measure_free_memory, plan_batch_size
from facepipe.nearest.distances import Hits, VectorBlock
from facepipe.nearest.half_precision import (
    GROUP,
    HalfVectors,
    Tile,
    append_ones,
    append_term,
    choose_dtype,
    compute_squared_norms,
    round_to_half,
)
from facepipe.nearest.top_k import TopK
from facepipe.nearest.upload import UploadedBlock, upload_blocks
from facepipe.types import Float32

MAX_TILE_ROWS = 4096  # queries per tile: with a block about 1 ms of work, and fewer than 2^31 products
BLOCK_ROWS = 262_144  # vectors that callers should send at a time
_RESIDENT_SHARE = 0.25  # of free memory that queries may take; if they need more they are sent tile by tile
_ROUNDING_BYTES = 4096  # per vector while it is rounded: in double precision, three times


@dataclass(frozen=True)
class Tiling:
    """How the work is cut. None of it changes the result.

    Attributes:
        dtype: Format of the products; by default what suits the device.
        tile_rows: Rows per tile; by default what memory allows.
        group: Columns per group.
        block_rows: Rows of a join that are sent at a time.
        resident_rows: Rows of a join that stay on the device meanwhile.
        threads: Of the host; by default one per CPU.
    """

    dtype: torch.dtype | None = None
    tile_rows: int | None = None
    group: int = GROUP
    block_rows: int = BLOCK_ROWS
    resident_rows: int = BLOCK_ROWS
    threads: int | None = None

    def get_dtype(self, device: str) -> torch.dtype:
        """Return the format that products are computed in."""
        return self.dtype or choose_dtype(device)

    def plan_tile_rows(self, device: str, block_rows: int) -> int:
        """Plan the rows per tile: as many as fit the memory beside a block of vectors."""
        # Per pair its product; per group its maximum, whether it is examined, and its number.
        bytes_per_row = block_rows * self.get_dtype(device).itemsize + block_rows // self.group * 16
        return self.tile_rows or plan_batch_size(
            measure_free_memory(device), bytes_per_row, MAX_TILE_ROWS, fixed_bytes=_ROUNDING_BYTES * block_rows
        )


def find_neighbours(
    queries: Float32, blocks: Iterable[VectorBlock], k: int, device: str, tiling: Tiling | None = None
) -> Hits:
    """Find the k nearest vectors of all blocks to each query.

    Norms may be up to about 100. Another thread reads the blocks, once. An id counts once.

    Args:
        queries: (n, d).
        blocks: the vectors; all blocks have penalties, or none has.
        k: neighbours per query.
        device: of torch.
        tiling: how the work is cut.

    Returns:
        Ids and squared distances, penalties included, (n, k), nearest first, ties by id.

    Raises:
        torch.OutOfMemoryError: a block and one query do not fit the device.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    tiling = tiling or Tiling()
    with TopK(queries, k, tiling.threads) as top_k:
        if len(queries):
            _search(queries, blocks, top_k, k, device=device, tiling=tiling)
        return top_k.hits


def compute_max_rounding(dimension: int) -> float:
    """Compute the largest relative error of a squared distance in single precision, in any order of summing.

    Each of d squared differences rounds twice, sums of d non-negative numbers round d times, and once more for the
    penalty (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    """
    return 1.01 * (dimension + 4) * 2.0**-24


def _search(
    queries: Float32, blocks: Iterable[VectorBlock], top_k: TopK, k: int, *, device: str, tiling: Tiling
) -> None:
    """Compare all blocks with the queries, tile by tile, and update the k nearest."""
    dtype = tiling.get_dtype(device)
    batches: Batches[None] | None = None
    resident: _Queries | None = None
    for uploaded in upload_blocks(((block, block.vectors) for block in blocks), device):
        columns = _Columns.from_block(uploaded, device, dtype)
        # Both are planned once the first block is on the device, by the memory that is then left.
        if batches is None or resident is None:
            batches = Batches[None](tiling.plan_tile_rows(device, len(columns.block.ids)))
            resident = _Queries(queries, device, dtype, with_ones=columns.block.penalties is not None)

        def compare(part: slice, columns: _Columns = columns, resident: _Queries = resident) -> None:
            rows, squares = resident[part]
            # Earlier blocks have brought the k-th nearest closer, so that fewer pairs reach the limit.
            farthest = torch.from_numpy(top_k.get_farthest(part)).to(device).double()
            tile = Tile(rows, columns.half, tiling.group)
            for i, j in tile.find_reaching(_compute_limit(tile, squares, farthest, columns, k)):
                top_k.add(part, i.cpu().numpy(), columns.block, j.cpu().numpy())

        for _ in batches(compare, len(queries)):
            pass
    top_k.wait(slice(0, len(queries)))


def _compute_limit(
    tile: Tile, squares: torch.Tensor, farthest: torch.Tensor, columns: "_Columns", k: int
) -> torch.Tensor:
    """Compute the product (n,) float64 that a vector has at least with a query if it is among the k nearest.

    |x - y|^2 = |x|^2 + |y|^2 - 2 xy, for the smallest |y|. If a query has no k neighbours yet: this block has k vectors
    of at least the product `compute_min_kth`, and with the largest |y| they are no farther than that product says.
    """
    slack = compute_max_rounding(columns.block.vectors.shape[1])
    if torch.isinf(farthest).any():
        within = squares + columns.max_square - 2 * tile.compute_min_kth(k)
        farthest = torch.minimum(farthest, within.clamp(min=0) * (1 + slack))
    return (squares + columns.min_square - farthest * (1 + 2 * slack)) / 2


@dataclass(frozen=True)
class _Columns:
    """A block on the host and, in half precision, on the device, with the extremes of its vectors' squared norms."""

    half: HalfVectors
    min_square: torch.Tensor
    max_square: torch.Tensor
    block: VectorBlock

    @classmethod
    def from_block(cls, uploaded: UploadedBlock[VectorBlock], device: str, dtype: torch.dtype) -> "_Columns":
        ids = uploaded.label.ids
        penalties = uploaded.label.penalties
        squares = compute_squared_norms(uploaded.on_device)
        # A penalty adds to the squared distance, which is -2 times the product.
        term = None if penalties is None else torch.from_numpy(-penalties / 2).to(device)
        half = round_to_half(append_term(uploaded.on_device, term, dtype), dtype)
        return cls(half, squares.min(), squares.max(), VectorBlock(ids, uploaded.on_host, penalties))


class _Queries:
    """Queries in half precision with their squared norms: on the device, or sent to it with every tile."""

    def __init__(self, queries: Float32, device: str, dtype: torch.dtype, with_ones: bool):
        self._queries = queries
        self._device = device
        self._dtype = dtype
        self._with_ones = with_ones
        self._resident: tuple[HalfVectors, torch.Tensor] | None = None
        # Keep all queries on the device if they leave most of its memory free.
        free = measure_free_memory(device)
        if free is None or 4 * queries.nbytes < _RESIDENT_SHARE * free:
            parts = [self._send(slice(at, at + MAX_TILE_ROWS)) for at in range(0, len(queries), MAX_TILE_ROWS)]
            half = HalfVectors.concatenate([half for half, _ in parts])
            self._resident = half, torch.cat([squares for _, squares in parts])

    def __getitem__(self, part: slice) -> tuple[HalfVectors, torch.Tensor]:
        if self._resident is None:
            return self._send(part)
        half, squares = self._resident
        return half[part], squares[part]

    def _send(self, part: slice) -> tuple[HalfVectors, torch.Tensor]:
        on_device = torch.tensor(self._queries[part]).to(self._device)
        rows = append_ones(on_device) if self._with_ones else on_device
        return round_to_half(rows, self._dtype), compute_squared_norms(on_device)
