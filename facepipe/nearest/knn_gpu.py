"""The k nearest of many vectors to many queries, exactly: a device rules out, the host compares what is left.

The device multiplies in half precision and passes on every pair that could still be among a query's k nearest, by the
bound of facepipe.nearest.half_precision. The host computes the distance of each such pair in single precision, as it
does without a device. So the answer is that of comparing all pairs on the host, bit by bit and ties included; a coarser
format or a worse bound costs time and nothing else, and no query has to be searched twice.

The k-th nearest comes closer with every block, so that few pairs are passed on after the first one: of n vectors in
random order some k (1 + ln(n / block)) a query, and those that rounding cannot tell from them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from facepipe.models.runtime.batches import Batches, free_memory, planned
from facepipe.nearest.distances import Hits
from facepipe.nearest.half_precision import GROUP, Half, Tile, default_type, halved, squared_norms, with_ones, with_term
from facepipe.nearest.top_k import Best
from facepipe.nearest.upload import Arrived, uploaded
from facepipe.types import Float32, Int64

Label = tuple[Int64, Float32 | None]
ROWS = 4096  # queries of a tile at most: with a block some 1 ms of work, and fewer than 2^31 products
BLOCK = 262_144  # vectors that callers should send at a time
_RESIDENT = 0.25  # share of free memory that queries may take; more of them are sent tile by tile
_WIDE = 4096  # bytes of a vector while it is rounded: in double precision, three times


@dataclass(frozen=True)
class Work:
    """How the work is cut; none of it changes what comes out.

    kind: format of the products; rows: of a tile, by default what memory allows; group: columns of a group
    block, held: rows of a join that are sent at a time, and those that meanwhile stay on the device
    threads: of the host, by default one a CPU
    """

    kind: torch.dtype | None = None
    rows: int | None = None
    group: int = GROUP
    block: int = BLOCK
    held: int = BLOCK
    threads: int | None = None

    def format(self, device: str) -> torch.dtype:
        """What products are computed in."""
        return self.kind or default_type(device)

    def tile(self, device: str, block: int) -> int:
        """Rows of a tile: as many as fit beside blocks of so many vectors."""
        # Of each pair the product, and of each group its maximum, whether it is looked at, and its number.
        each = block * self.format(device).itemsize + block // self.group * 16
        return self.rows or planned(free_memory(device), each, ROWS, fixed=_WIDE * block)


def knn(
    queries: Float32, blocks: Iterable[tuple[Label, Float32]], k: int, device: str, work: Work | None = None
) -> Hits:
    """The k nearest of all blocks' vectors to queries (n, d): ids, squared distances (n, k), nearest first, ties by id.

    blocks: ((ids (m,), none negative; added (m,) or None), vectors (m, d)). What is added is not negative and counts
    towards a vector's squared distance to every query; either all blocks have it or none. An id counts once. Norms are
    at most some 100. Blocks are read once, by another thread.
    Raises torch.OutOfMemoryError where a block and one query do not fit the device.
    """
    queries, work = np.ascontiguousarray(queries, np.float32), work or Work()
    with Best(queries, k, work.threads) as best:
        if len(queries):
            _search(queries, blocks, best, (k, device, work))
        return best.hits


def rounding(dimension: int) -> float:
    """Relative error of a squared distance computed in single precision, in whatever order it is summed.

    Each of d squared differences rounds twice, sums of d not negative numbers d times, and one more for what is added
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    """
    return 1.01 * (dimension + 4) * 2.0**-24


def _search(queries: Float32, blocks: Iterable[tuple[Label, Float32]], best: Best, how: tuple[int, str, Work]) -> None:
    k, device, work = how
    kind, held, batches = work.format(device), None, None
    for arrived in uploaded(blocks, device):
        columns = _Columns.of(arrived, device, kind)
        batches = batches or Batches[None](work.tile(device, len(arrived.here)))
        held = held or _Queries(queries, device, kind, columns.added is not None)

        def compare(part: slice, columns: _Columns = columns, held: _Queries = held) -> None:
            rows, squares = held[part]
            farthest = torch.from_numpy(best.farthest(part)).to(device).double()
            tile = Tile(rows, columns.half, work.group)
            for i, j in tile.reaching(_limit(tile, (squares, farthest), columns, k)):
                best.add(part, (i.cpu().numpy(), j.cpu().numpy()), (columns.ids, columns.added, columns.vectors))

        for _ in batches(compare, len(queries)):
            pass
    best.wait(slice(0, len(queries)))


def _limit(tile: Tile, rows: tuple[torch.Tensor, torch.Tensor], columns: "_Columns", k: int) -> torch.Tensor:
    """(n,) float64: the product that a vector has at least with a query if it is as near as its k-th nearest so far.

    |x - y|^2 = |x|^2 + |y|^2 - 2 xy, for the smallest |y|. Where there are no k so far: this block has k vectors of at
    least the product `kth`, and for the largest |y| they are no farther than that says.
    """
    (squares, farthest), slack = rows, rounding(columns.vectors.shape[1])
    if torch.isinf(farthest).any():
        within = squares + columns.most - 2 * tile.kth(k)
        farthest = torch.minimum(farthest, within.clamp(min=0) * (1 + slack))
    return (squares + columns.least - farthest * (1 + 2 * slack)) / 2


@dataclass(frozen=True)
class _Columns:
    """A block on the device and on the host; least, most: of its vectors' squared norms."""

    half: Half
    least: torch.Tensor
    most: torch.Tensor
    ids: Int64
    added: Float32 | None
    vectors: Float32

    @classmethod
    def of(cls, arrived: Arrived[Label], device: str, kind: torch.dtype) -> "_Columns":
        (ids, added), here, there = arrived
        squares = squared_norms(there)
        term = None if added is None else torch.from_numpy(-added / 2).to(device)
        return cls(halved(with_term(there, term, kind), kind), squares.min(), squares.max(), ids, added, here)


class _Queries:
    """Queries in half precision with their squared norms: on the device, or on their way to it with every tile."""

    def __init__(self, queries: Float32, device: str, kind: torch.dtype, widened: bool):
        self._queries, self._device, self._kind, self._widened = queries, device, kind, widened
        free = free_memory(device)
        self._held: tuple[Half, torch.Tensor] | None = None
        if free is None or 4 * queries.nbytes < _RESIDENT * free:
            parts = [self._sent(slice(at, at + ROWS)) for at in range(0, len(queries), ROWS)]
            self._held = Half.joined([half for half, _ in parts]), torch.cat([squares for _, squares in parts])

    def __getitem__(self, part: slice) -> tuple[Half, torch.Tensor]:
        return (self._held[0][part], self._held[1][part]) if self._held else self._sent(part)

    def _sent(self, part: slice) -> tuple[Half, torch.Tensor]:
        there = torch.tensor(self._queries[part]).to(self._device)
        return halved(with_ones(there) if self._widened else there, self._kind), squared_norms(there)
