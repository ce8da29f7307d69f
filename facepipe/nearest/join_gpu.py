"""All pairs of faces above a similarity, on a device: what facepipe.nearest.join.candidates finds, by the same rule.

Products in half precision rule out nearly all pairs by the bound of facepipe.nearest.half_precision; the others are
computed again in double precision, on the device, so that a pair is found or not whatever the tiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from facepipe.models.runtime.batches import Batches
from facepipe.nearest.half_precision import Half, Tile, halved, with_ones, with_term
from facepipe.nearest.knn_gpu import Work, knn
from facepipe.nearest.similarity import crowding, reaching
from facepipe.nearest.upload import Arrived, uploaded
from facepipe.types import Bool, Float32, Int64

_PAIRS = 1 << 18  # pairs computed again at a time: 256 MiB of each side in double precision
_NO_PAIRS = (np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass(frozen=True)
class Rule:
    """Which pairs are meant. threshold: similarity; most: pairs that rows have on average before they count as crowded
    and keep their `most` nearest only; rows: so many are crowded together, or not."""

    threshold: float
    most: int
    rows: int


def join(
    vectors: Float32, densities: Float32, rule: Rule, device: str, work: Work | None = None
) -> tuple[Int64, Int64]:
    """(u (m,), v (m,)), u < v, of unit vectors (n, d) whose product less their mean density reaches the threshold.

    Vectors may be mapped from a file: they are read once for each `work.held` rows. Of crowded rows a pair stays where
    it is among the nearest of either. Raises torch.OutOfMemoryError where a block and one row do not fit the device.
    """
    work = work or Work()
    densities = np.array(densities, np.float32)  # a copy: it may be mapped read-only, which torch does not know
    held = max(1, work.held // rule.rows) * rule.rows
    found, crowded, crowd, at = [_NO_PAIRS], [np.empty(0, np.int64)], None, 0
    while at < len(vectors):
        scan = _Scan((vectors, densities), slice(at, min(at + held, len(vectors))), crowd, (rule, device, work))
        scan.run()
        full = scan.crowded()
        if crowd is None and full.any():
            # Rows from the first crowded ones on look at what is before them as well, back to there: begin again.
            crowd = at + int(np.argmax(full)) * rule.rows
            found.append(scan.pairs(crowd))
            at = crowd
            continue
        found.append(scan.pairs(len(vectors)))
        crowded.append(scan.rows(full))
        at += held
    found += _nearest(vectors, densities, np.concatenate(crowded), (rule, device, work))
    u, v = (np.concatenate(column) for column in zip(*found, strict=True))
    if crowd is None:
        return u, v
    key = np.unique(np.minimum(u, v) * len(vectors) + np.maximum(u, v))
    return key // len(vectors), key % len(vectors)


class _Scan:
    """Rows that stay on the device while the others pass, and the pairs found.

    crowd: the first row that is crowded, where there is one before these: they look at all from there on
    """

    def __init__(self, data: tuple[Float32, Float32], part: slice, crowd: int | None, how: tuple[Rule, str, Work]):
        (self._vectors, self._densities), self._part, self._crowd = data, part, crowd
        self._rule, self._device, self._work = how
        self._kind = self._work.format(self._device)
        self._begins = np.arange(part.start, part.stop, self._rule.rows)
        sizes = np.diff(np.append(self._begins, part.stop))
        self._allowed, self._counts = self._rule.most * sizes, np.zeros(len(sizes), np.int64)
        self._found: list[tuple[Int64, Int64]] = [_NO_PAIRS]
        self._there = torch.tensor(np.asarray(self._vectors[part])).to(self._device)
        self._rows = halved(with_ones(self._there), self._kind)
        self._crowding = torch.from_numpy(self._densities[part]).to(self._device)
        # The row's half of the mean density; the column's is in the product.
        self._limit = self._rule.threshold + self._crowding.double() / 2

    def run(self) -> None:
        """Compare with all rows behind, and with those between a crowd and these."""
        size = self._work.block
        starts = range(self._part.start if self._crowd is None else self._crowd, len(self._vectors), size)
        batches: Batches[tuple[Int64, list[tuple[Int64, Int64]]]] = Batches(self._work.tile(self._device, size))
        for arrived in uploaded(((at, self._vectors[at : at + size]) for at in starts), self._device):
            columns = _Columns.of(arrived, self._densities, self._kind)

            def compare(tile: slice, columns: _Columns = columns) -> tuple[Int64, list[tuple[Int64, Int64]]]:
                # Of rows before a tile's first group the tiles before have found all.
                first = self._part.start + tile.start // self._rule.rows * self._rule.rows
                return self._compare(tile, columns if self._crowd is not None else columns.since(first))

            for _, (counts, pairs) in batches(compare, len(self._there)):
                self._counts += counts
                self._found += pairs
            self._drop()

    def crowded(self) -> Bool:
        """(groups,) whether they have more pairs than `most` a row."""
        return np.asarray(self._counts > self._allowed)

    def rows(self, groups: Bool) -> Int64:
        """Positions of the rows of groups."""
        positions = np.arange(self._part.start, self._part.stop)
        return positions[groups[self._group(positions)]]

    def pairs(self, end: int) -> tuple[Int64, Int64]:
        """Those of rows before `end` that are not crowded, each once, or once from either side of a crowd."""
        u, v = (np.concatenate(column) for column in zip(*self._found, strict=True))
        group = self._group(u)
        new = v > u
        if self._crowd is not None:
            new |= v < self._begins[group]
        kept = new & (u < end) & ~self.crowded()[group]
        return u[kept], v[kept]

    def _group(self, positions: Int64) -> Int64:
        return (positions - self._part.start) // self._rule.rows

    def _compare(self, part: slice, columns: "_Columns") -> tuple[Int64, list[tuple[Int64, Int64]]]:
        """(pairs in each group of rows, the pairs); a group that turns out to be crowded is looked at no more."""
        counts = np.zeros(len(self._counts), np.int64)
        found: list[tuple[Int64, Int64]] = []
        if not len(columns.there):
            return counts, found
        tile = Tile(self._rows[part], columns.half, self._work.group)
        for i, j in tile.reaching(self._limit[part]):
            for u, v in self._exact(i + part.start, j, columns):
                group = self._group(u)
                counted = group if self._crowd is not None else group[v >= self._begins[group]]
                counts += np.bincount(counted, minlength=len(counts))
                self._close(self._counts + counts > self._allowed)
                found.append((u, v))
        return counts, found

    def _exact(self, i: torch.Tensor, j: torch.Tensor, columns: "_Columns") -> Iterator[tuple[Int64, Int64]]:
        """Positions of pairs whose similarity reaches the threshold in double precision, of groups not yet closed."""
        for at in range(0, len(i), _PAIRS):
            a, b = i[at : at + _PAIRS], j[at : at + _PAIRS]
            still = torch.isfinite(self._limit[a])
            a, b = a[still], b[still]
            product = (self._there[a].double() * columns.there[b]).sum(dim=1)
            mean = (self._crowding[a].double() + columns.crowding[b]) / 2
            near = product - mean >= self._rule.threshold
            yield a[near].cpu().numpy() + self._part.start, b[near].cpu().numpy() + columns.start

    def _close(self, full: Bool) -> None:
        for group in np.flatnonzero(full):
            first = int(self._begins[group]) - self._part.start
            self._limit[first : first + self._rule.rows] = torch.inf

    def _drop(self) -> None:
        """Forget the pairs of crowded groups: their nearest are looked for later."""
        full = self.crowded()
        if full.any():
            kept = [~full[self._group(u)] for u, _ in self._found]
            self._found = [(u[k], v[k]) for (u, v), k in zip(self._found, kept, strict=True)]


@dataclass(frozen=True)
class _Columns:
    """Faces from position `start` on: vectors and densities on the device."""

    start: int
    there: torch.Tensor
    crowding: torch.Tensor
    half: Half

    @classmethod
    def of(cls, arrived: Arrived[int], densities: Float32, kind: torch.dtype) -> "_Columns":
        crowding = torch.from_numpy(densities[arrived.label : arrived.label + len(arrived.here)])
        crowding = crowding.to(arrived.there.device)
        half = halved(with_term(arrived.there, -crowding / 2, kind), kind)
        return cls(arrived.label, arrived.there, crowding, half)

    def since(self, first: int) -> "_Columns":
        """Those from a position on."""
        skip = slice(max(0, first - self.start), None)
        return _Columns(self.start + (skip.start or 0), self.there[skip], self.crowding[skip], self.half[skip])


def _nearest(
    vectors: Float32, densities: Float32, rows: Int64, how: tuple[Rule, str, Work]
) -> Iterator[tuple[Int64, Int64]]:
    """The `most` nearest among all faces of crowded rows."""
    rule, device, work = how
    if not len(rows):
        return
    added, everything, size = crowding(densities), np.arange(len(vectors)), work.block
    parts = (slice(at, at + size) for at in range(0, len(vectors), size))
    blocks = (((everything[part], added[part]), vectors[part]) for part in parts)
    hits = knn(np.asarray(vectors[rows]), blocks, min(rule.most + 1, len(vectors)), device, work)
    yield reaching(rows, hits.ids, hits.distances - added[hits.ids], densities, rule.threshold)
