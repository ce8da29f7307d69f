"""All pairs of faces above a similarity, on a device: what facepipe.nearest.join finds on CPUs, by the same rule.

Products in half precision rule out nearly all pairs by the bound of facepipe.nearest.half_precision. The others are
computed again in double precision, on the device, so that a pair is found or not whatever the tiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from facepipe.models.runtime.batches import Batches
from facepipe.nearest.distances import VectorBlock
from facepipe.nearest.half_precision import HalfVectors, Tile, append_ones, append_term, round_to_half
from facepipe.nearest.knn_gpu import Tiling, find_neighbours
from facepipe.nearest.similarity import compute_penalties, select_similar, sort_pairs
from facepipe.nearest.upload import UploadedBlock, upload_blocks
from facepipe.types import Bool, Float32, Int64

_PAIRS_PER_CHUNK = 1 << 18  # pairs computed again at a time: 256 MiB of each side in double precision


@dataclass(frozen=True)
class JoinRule:
    """Which pairs a join finds.

    Attributes:
        threshold: Similarity of a pair at least.
        max_neighbours: Mean pairs per row above which a block is crowded; its rows then keep so many nearest each.
        block_rows: Rows that are crowded together, or not.
    """

    threshold: float
    max_neighbours: int
    block_rows: int


@dataclass(frozen=True)
class _Faces:
    """What a join is over: vectors (n, d), which may be mapped from a file, and densities (n,)."""

    vectors: Float32
    densities: Float32

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class _FoundPairs:
    """Pairs of positions (u (m,), v (m,))."""

    u: Int64
    v: Int64

    @classmethod
    def concatenate(cls, parts: "list[_FoundPairs]") -> "_FoundPairs":
        none = np.empty(0, np.int64)
        return cls(
            np.concatenate([none, *(part.u for part in parts)]), np.concatenate([none, *(part.v for part in parts)])
        )

    def take(self, mask: Bool) -> "_FoundPairs":
        return _FoundPairs(self.u[mask], self.v[mask])


def find_pairs_on_device(
    vectors: Float32, densities: Float32, rule: JoinRule, device: str, tiling: Tiling | None = None
) -> tuple[Int64, Int64]:
    """Find the pairs whose product less their mean density reaches the threshold.

    Vectors may be mapped from a file: they are read once per `tiling.resident_rows` rows. A pair of crowded rows stays
    if it is among the nearest of either.

    Args:
        vectors: unit vectors (n, d).
        densities: densities (n,).
        rule: which pairs are meant.
        device: of torch.
        tiling: how the work is cut.

    Returns:
        Positions (u (m,), v (m,)) with u < v, each pair once.

    Raises:
        torch.OutOfMemoryError: a block and one row do not fit the device.
    """
    tiling = tiling or Tiling()
    # A copy: densities may be mapped read-only, and torch has no tensors that are.
    faces = _Faces(vectors, np.array(densities, np.float32))
    # Whole blocks of rows, because a block is crowded or not as one.
    resident_rows = max(1, tiling.resident_rows // rule.block_rows) * rule.block_rows
    parts: list[_FoundPairs] = []
    crowded_rows = [np.empty(0, np.int64)]
    first_crowd: int | None = None
    start = 0
    while start < len(faces):
        part = slice(start, min(start + resident_rows, len(faces)))
        scan = _JoinScan(faces, part, rule, first_crowd=first_crowd, device=device, tiling=tiling)
        scan.run()
        crowded = scan.find_crowded()
        if first_crowd is None and crowded.any():
            # Rows from the first crowded ones on compare with what is before them too, back to there: begin again.
            first_crowd = start + int(np.argmax(crowded)) * rule.block_rows
            parts.append(scan.collect_pairs(first_crowd))
            start = first_crowd
            continue
        parts.append(scan.collect_pairs(len(faces)))
        crowded_rows.append(scan.list_rows(crowded))
        start += resident_rows
    parts += _find_nearest(faces, np.concatenate(crowded_rows), rule, device=device, tiling=tiling)
    pairs = _FoundPairs.concatenate(parts)
    if first_crowd is None:
        return pairs.u, pairs.v
    return sort_pairs(pairs.u, pairs.v, len(faces))


class _JoinScan:
    """Rows that stay on the device while the others pass, and the pairs they form."""

    def __init__(
        self, faces: _Faces, part: slice, rule: JoinRule, *, first_crowd: int | None, device: str, tiling: Tiling
    ):
        """Send a part of the rows to the device.

        Args:
            faces: all rows.
            part: the rows that stay on the device.
            rule: which pairs are meant.
            first_crowd: the first crowded row before these, if there is one: they compare with all rows from there on.
            device: of torch.
            tiling: how the work is cut.
        """
        self._faces = faces
        self._part = part
        self._rule = rule
        self._first_crowd = first_crowd
        self._device = device
        self._tiling = tiling
        self._dtype = tiling.get_dtype(device)

        # Blocks of rows that are crowded together or not, and the pairs counted in each.
        self._block_starts = np.arange(part.start, part.stop, rule.block_rows)
        block_sizes = np.diff(np.append(self._block_starts, part.stop))
        self._max_counts = rule.max_neighbours * block_sizes
        self._counts = np.zeros(len(block_sizes), np.int64)
        self._pairs: list[_FoundPairs] = []

        self._vectors = torch.tensor(np.asarray(faces.vectors[part])).to(device)
        self._half = round_to_half(append_ones(self._vectors), self._dtype)
        self._densities = torch.from_numpy(faces.densities[part]).to(device)
        # The row's half of the mean density; the column's half is in the product.
        self._limit = rule.threshold + self._densities.double() / 2

    def run(self) -> None:
        """Compare the rows with all rows behind them, and with those between the first crowd and them."""
        block_rows = self._tiling.block_rows
        first_column = self._part.start if self._first_crowd is None else self._first_crowd
        starts = range(first_column, len(self._faces), block_rows)
        batches: Batches[tuple[Int64, list[_FoundPairs]]] = Batches(
            self._tiling.plan_tile_rows(self._device, block_rows)
        )
        blocks = ((start, self._faces.vectors[start : start + block_rows]) for start in starts)
        for uploaded in upload_blocks(blocks, self._device):
            columns = _JoinColumns.from_block(uploaded, self._faces.densities, self._dtype)

            def compare(tile: slice, columns: _JoinColumns = columns) -> tuple[Int64, list[_FoundPairs]]:
                if self._first_crowd is not None:
                    return self._compare(tile, columns)
                # Earlier tiles have found all pairs with the rows before this tile's first block.
                rows_before = tile.start // self._rule.block_rows * self._rule.block_rows
                return self._compare(tile, columns.skip_before(self._part.start + rows_before))

            for _, (counts, pairs) in batches(compare, len(self._vectors)):
                self._counts += counts
                self._pairs += pairs
            self._drop_crowded()

    def find_crowded(self) -> Bool:
        """Return which blocks (b,) have more pairs than the rule allows."""
        return np.asarray(self._counts > self._max_counts)

    def list_rows(self, blocks: Bool) -> Int64:
        """List the positions of the rows of some blocks (b,)."""
        positions = np.arange(self._part.start, self._part.stop)
        return positions[blocks[self._find_block(positions)]]

    def collect_pairs(self, end: int) -> _FoundPairs:
        """Collect the pairs of rows before `end` that are not crowded.

        Each pair comes once, or once from either side if there is a crowd.
        """
        pairs = _FoundPairs.concatenate(self._pairs)
        block = self._find_block(pairs.u)
        new = pairs.v > pairs.u
        if self._first_crowd is not None:
            new |= pairs.v < self._block_starts[block]
        return pairs.take(new & (pairs.u < end) & ~self.find_crowded()[block])

    def _find_block(self, positions: Int64) -> Int64:
        return (positions - self._part.start) // self._rule.block_rows

    def _compare(self, part: slice, columns: "_JoinColumns") -> tuple[Int64, list[_FoundPairs]]:
        """Compare a tile of rows with columns.

        A block that turns out to be crowded is not compared any further.

        Returns:
            The number of pairs in each block of rows (b,), and the pairs.
        """
        counts = np.zeros(len(self._counts), np.int64)
        parts: list[_FoundPairs] = []
        if not len(columns.vectors):
            return counts, parts
        tile = Tile(self._half[part], columns.half, self._tiling.group)
        for i, j in tile.find_reaching(self._limit[part]):
            for pairs in self._refine(i + part.start, j, columns):
                # Without a crowd a block counts its pairs with rows from its own start on, as the join on CPUs does.
                block = self._find_block(pairs.u)
                counted = block if self._first_crowd is not None else block[pairs.v >= self._block_starts[block]]
                counts += np.bincount(counted, minlength=len(counts))
                self._close_blocks(self._counts + counts > self._max_counts)
                parts.append(pairs)
        return counts, parts

    def _refine(self, i: torch.Tensor, j: torch.Tensor, columns: "_JoinColumns") -> Iterator[_FoundPairs]:
        """Yield the pairs whose similarity reaches the threshold in double precision, of blocks not yet closed."""
        for at in range(0, len(i), _PAIRS_PER_CHUNK):
            a = i[at : at + _PAIRS_PER_CHUNK]
            b = j[at : at + _PAIRS_PER_CHUNK]
            # Leave out rows of blocks that were closed since the tile was examined.
            is_open = torch.isfinite(self._limit[a])
            a = a[is_open]
            b = b[is_open]
            product = (self._vectors[a].double() * columns.vectors[b]).sum(dim=1)
            mean_density = (self._densities[a].double() + columns.densities[b]) / 2
            similar = product - mean_density >= self._rule.threshold
            u = a[similar].cpu().numpy() + self._part.start
            v = b[similar].cpu().numpy() + columns.start
            yield _FoundPairs(u, v)

    def _close_blocks(self, crowded: Bool) -> None:
        """Set the limits of the rows of crowded blocks (b,) to infinity, so that no product reaches them."""
        for block in np.flatnonzero(crowded):
            first = int(self._block_starts[block]) - self._part.start
            self._limit[first : first + self._rule.block_rows] = torch.inf

    def _drop_crowded(self) -> None:
        """Drop the pairs of crowded blocks: the nearest of their rows are searched later."""
        crowded = self.find_crowded()
        if crowded.any():
            self._pairs = [pairs.take(~crowded[self._find_block(pairs.u)]) for pairs in self._pairs]


@dataclass(frozen=True)
class _JoinColumns:
    """Faces from position `start` on, on the device."""

    start: int
    vectors: torch.Tensor
    densities: torch.Tensor
    half: HalfVectors

    @classmethod
    def from_block(cls, uploaded: UploadedBlock[int], densities: Float32, dtype: torch.dtype) -> "_JoinColumns":
        own = torch.from_numpy(densities[uploaded.label : uploaded.label + len(uploaded.on_host)])
        own = own.to(uploaded.on_device.device)
        half = round_to_half(append_term(uploaded.on_device, -own / 2, dtype), dtype)
        return cls(uploaded.label, uploaded.on_device, own, half)

    def skip_before(self, position: int) -> "_JoinColumns":
        """Return the columns from a position on."""
        part = slice(max(0, position - self.start), None)
        return _JoinColumns(self.start + part.start, self.vectors[part], self.densities[part], self.half[part])


def _find_nearest(faces: _Faces, rows: Int64, rule: JoinRule, *, device: str, tiling: Tiling) -> Iterator[_FoundPairs]:
    """Find the nearest of crowded rows (r,) among all faces, `rule.max_neighbours` of them per row."""
    if not len(rows):
        return
    penalties = compute_penalties(faces.densities)
    positions = np.arange(len(faces))
    size = tiling.block_rows
    parts = (slice(at, at + size) for at in range(0, len(faces), size))
    blocks = (VectorBlock(positions[part], faces.vectors[part], penalties[part]) for part in parts)
    # One more neighbour than kept, because a row is its own nearest.
    count = min(rule.max_neighbours + 1, len(faces))
    hits = find_neighbours(np.asarray(faces.vectors[rows]), blocks, count, device, tiling)
    squared = hits.distances - penalties[hits.ids]
    yield _FoundPairs(*select_similar(rows, hits.ids, squared, faces.densities, rule.threshold))
