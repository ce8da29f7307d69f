"""dlib's shape predictor files: a boosted cascade of regression trees (dlib/image_processing/shape_predictor.h).

Such a file is nothing but packed integers, so all of them are unpacked at once; what is left over or does not have
the registered cascade's sizes is refused.
"""

from typing import NamedTuple

import numpy as np

from facepipe.models.dlib.format import FormatError
from facepipe.types import Float32, Int64, UInt8

POINTS, LEVELS, TREES, SPLITS, PIXELS = 5, 15, 500, 15, 800
_LEAVES = SPLITS + 1
_MATRIX = 2 + 2 * 2 * POINTS  # two sizes, then mantissa and exponent of every number
_TREE = 1 + 4 * SPLITS + 1 + _LEAVES * _MATRIX


class Cascade(NamedTuple):
    """What the file holds; shapes in units of the face's box, (0, 0) its top left and (1, 1) its bottom right pixel.

    initial: (5, 2) mean shape
    first, second, thresholds: (15, 500, 15) of every split, which two pixels it compares and how
    leaves: (15, 500, 16, 10) what is added to the shape (x, y of point after point)
    anchors, deltas: (15, 800) and (15, 800, 2), where a level's pixels lie: beside which point, and how far
    """

    initial: Float32
    first: Int64
    second: Int64
    thresholds: Float32
    leaves: Float32
    anchors: Int64
    deltas: Float32


def read_cascade(data: bytes) -> Cascade:
    """The cascade of a five-point predictor's file; FormatError for anything else."""
    numbers = _Numbers(read_integers(data))
    numbers.expect(1)
    initial = numbers.matrices(numbers.take(1, _MATRIX))
    numbers.expect(LEVELS)
    trees = numbers.lists(LEVELS, TREES, _TREE)
    anchors = numbers.expect(LEVELS).lists(LEVELS, PIXELS, 1)
    deltas = numbers.expect(LEVELS).lists(LEVELS, PIXELS, 4)
    numbers.finish()
    _expect(bool((trees[..., 0] == SPLITS).all() and (trees[..., 4 * SPLITS + 1] == _LEAVES).all()), "full trees")
    splits = trees[..., 1 : 1 + 4 * SPLITS].reshape(LEVELS, TREES, SPLITS, 4)
    cascade = Cascade(
        initial.reshape(POINTS, 2),
        splits[..., 0],
        splits[..., 1],
        _floats(splits[..., 2:])[..., 0],
        numbers.matrices(trees[..., 2 + 4 * SPLITS :].reshape(LEVELS, TREES, _LEAVES, _MATRIX)),
        anchors[..., 0].copy(),  # a view would keep all of the file's numbers in memory
        _floats(deltas),
    )
    pixels, points = splits[..., :2], cascade.anchors
    _expect(pixels.min() >= 0 and pixels.max() < PIXELS and points.min() >= 0 and points.max() < POINTS, "indices")
    return cascade


def read_integers(data: bytes) -> Int64:
    """All the packed integers of `data`: control byte (bit 7: negative, low bits: number of bytes), magnitude."""
    # A control byte that cannot be one leads past the end.
    past = len(data) + 1
    steps = [1 + (c & 0x0F) if not c & 0x70 and 1 <= c & 0x0F <= 8 else past for c in range(256)]
    starts: list[int] = []
    append, at, end = starts.append, 0, len(data)
    while at < end:
        append(at)
        at += steps[data[at]]
    _expect(at == end, f"an integer at byte {starts[-1] if starts else 0}")
    return _unpacked(np.frombuffer(data + bytes(8), np.uint8), np.array(starts, np.int64))


def _unpacked(octets: UInt8, starts: Int64) -> Int64:
    control = octets[starts]
    sizes = control & 0x0F
    values = np.zeros(len(starts), np.int64)
    for k in range(int(sizes.max(initial=0))):
        values |= np.where(sizes > k, octets[starts + (1 + k)], 0).astype(np.int64) << (8 * k)
    return np.where(control & 0x80, -values, values)


class _Numbers:
    """A cursor over unpacked integers."""

    def __init__(self, values: Int64):
        self.values, self.at = values, 0

    def take(self, *shape: int) -> Int64:
        count = int(np.prod(shape))
        part = self.values[self.at : self.at + count]
        _expect(len(part) == count, "more numbers")
        self.at += count
        return part.reshape(shape)

    def expect(self, value: int) -> "_Numbers":
        _expect(self.take(1)[0] == value, f"{value} at number {self.at - 1}")
        return self

    def lists(self, n: int, length: int, width: int) -> Int64:
        """(n, length, width) of n lists, each with its length before it."""
        rows = self.take(n, 1 + length * width)
        _expect(bool((rows[:, 0] == length).all()), f"lists of {length}")
        return rows[:, 1:].reshape(n, length, width)

    def matrices(self, rows: Int64) -> Float32:
        """(..., 10) numbers of column vectors (..., 22); sizes are stored negative."""
        _expect(bool((rows[..., 0] == -2 * POINTS).all() and (rows[..., 1] == -1).all()), "vectors of 10 numbers")
        return _floats(rows[..., 2:].reshape(*rows.shape[:-1], 2 * POINTS, 2))[..., 0]

    def finish(self) -> None:
        _expect(self.at == len(self.values), f"end of file, {len(self.values) - self.at} numbers are left over")


def _floats(pairs: Int64) -> Float32:
    """(..., n) numbers of (..., 2 n) mantissas and exponents of two."""
    exponents = pairs[..., 1::2]
    _expect(bool((np.abs(exponents) < 150).all()), "finite numbers")  # infinity and NaN have exponents of 32000
    return np.ldexp(pairs[..., 0::2].astype(np.float64), exponents).astype(np.float32)


def _expect(holds: bool | np.bool_, what: str) -> None:
    if not holds:
        raise FormatError(f"not a five-point shape predictor of dlib: expected {what}")
