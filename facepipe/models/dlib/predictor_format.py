"""dlib's shape predictor files: a boosted cascade of regression trees (dlib/image_processing/shape_predictor.h).

Such a file consists of packed integers only, so all of them are unpacked at once. A file with numbers left over, or
with other sizes than the registered cascade, is refused.
"""

from typing import NamedTuple

import numpy as np

from facepipe.models.dlib.format import FormatError
from facepipe.types import Float32, Int64, UInt8

# Sizes of the cascade: points, levels, trees per level, splits per tree, and pixels per level.
POINTS = 5
LEVELS = 15
TREES = 500
SPLITS = 15
PIXELS = 800

_LEAVES = SPLITS + 1
_MATRIX = 2 + 2 * 2 * POINTS  # two sizes, then mantissa and exponent of every number
_TREE = 1 + 4 * SPLITS + 1 + _LEAVES * _MATRIX


class Cascade(NamedTuple):
    """What the file holds. In shapes (0, 0) is the top left and (1, 1) the bottom right pixel of the face's box.

    Attributes:
        initial: (5, 2) mean shape.
        first: (15, 500, 15) the first pixel that each split compares.
        second: (15, 500, 15) the second one.
        thresholds: (15, 500, 15) of the splits.
        leaves: (15, 500, 16, 10) what each leaf adds to the shape, (x, y) of point after point.
        anchors: (15, 800) the point beside which each pixel of a level lies.
        deltas: (15, 800, 2) how far it lies from it.
    """

    initial: Float32
    first: Int64
    second: Int64
    thresholds: Float32
    leaves: Float32
    anchors: Int64
    deltas: Float32


def read_cascade(data: bytes) -> Cascade:
    """Read the cascade of a five-point predictor's file.

    Raises:
        FormatError: The bytes are anything else.
    """
    numbers = _Numbers(read_integers(data))
    # Walk through the file.
    numbers.expect(1)
    initial = numbers.convert_matrices(numbers.take(1, _MATRIX))
    numbers.expect(LEVELS)
    trees = numbers.take_lists(LEVELS, TREES, _TREE)
    anchors = numbers.expect(LEVELS).take_lists(LEVELS, PIXELS, 1)
    deltas = numbers.expect(LEVELS).take_lists(LEVELS, PIXELS, 4)
    numbers.expect_end()
    # Convert it.
    has_all_splits = (trees[..., 0] == SPLITS).all()
    has_all_leaves = (trees[..., 4 * SPLITS + 1] == _LEAVES).all()
    _expect(bool(has_all_splits and has_all_leaves), "full trees")
    # A split is two pixels and its threshold's mantissa and exponent, (15, 500, 15, 4).
    splits = trees[..., 1 : 1 + 4 * SPLITS].reshape(LEVELS, TREES, SPLITS, 4)
    leaves = trees[..., 2 + 4 * SPLITS :].reshape(LEVELS, TREES, _LEAVES, _MATRIX)
    cascade = Cascade(
        initial=initial.reshape(POINTS, 2),
        first=splits[..., 0],
        second=splits[..., 1],
        thresholds=_to_floats(splits[..., 2:])[..., 0],
        leaves=numbers.convert_matrices(leaves),
        anchors=anchors[..., 0].copy(),  # a view would keep all of the file's numbers in memory
        deltas=_to_floats(deltas),
    )
    # Check that indices are in range.
    pixels = splits[..., :2]
    points = cascade.anchors
    _expect(pixels.min() >= 0 and pixels.max() < PIXELS and points.min() >= 0 and points.max() < POINTS, "indices")
    return cascade


def read_integers(data: bytes) -> Int64:
    """Read all packed integers: a control byte (bit 7: negative, low bits: number of bytes), then the magnitude.

    Raises:
        FormatError: The bytes are anything else.
    """
    # Bytes from one control byte to the next. A byte that cannot be a control byte leads past the end.
    past_end = len(data) + 1
    steps = [1 + (c & 0x0F) if not c & 0x70 and 1 <= c & 0x0F <= 8 else past_end for c in range(256)]
    starts: list[int] = []
    append = starts.append
    offset = 0
    end = len(data)
    while offset < end:
        append(offset)
        offset += steps[data[offset]]
    _expect(offset == end, f"an integer at byte {starts[-1] if starts else 0}")
    # Eight more bytes keep reads behind the last integer inside the array.
    return _unpack(np.frombuffer(data + bytes(8), np.uint8), np.array(starts, np.int64))


def _unpack(octets: UInt8, starts: Int64) -> Int64:
    control = octets[starts]
    sizes = control & 0x0F
    values = np.zeros(len(starts), np.int64)
    # Add byte k of all integers that are long enough at once.
    for k in range(int(sizes.max(initial=0))):
        values |= np.where(sizes > k, octets[starts + (1 + k)], 0).astype(np.int64) << (8 * k)
    return np.where(control & 0x80, -values, values)


class _Numbers:
    """A cursor over unpacked integers. What it reads raises FormatError if the numbers are something else."""

    def __init__(self, values: Int64):
        self._values = values
        self._offset = 0

    def take(self, *shape: int) -> Int64:
        count = int(np.prod(shape))
        part = self._values[self._offset : self._offset + count]
        _expect(len(part) == count, "more numbers")
        self._offset += count
        return part.reshape(shape)

    def expect(self, value: int) -> "_Numbers":
        _expect(self.take(1)[0] == value, f"{value} at number {self._offset - 1}")
        return self

    def take_lists(self, n: int, length: int, width: int) -> Int64:
        """Take n lists, each with its length before it, (n, length, width)."""
        rows = self.take(n, 1 + length * width)
        _expect(bool((rows[:, 0] == length).all()), f"lists of {length}")
        return rows[:, 1:].reshape(n, length, width)

    def convert_matrices(self, rows: Int64) -> Float32:
        """Convert column vectors (..., 22) to their numbers (..., 10); sizes are stored negative."""
        has_sizes = (rows[..., 0] == -2 * POINTS).all() and (rows[..., 1] == -1).all()
        _expect(bool(has_sizes), "vectors of 10 numbers")
        return _to_floats(rows[..., 2:].reshape(*rows.shape[:-1], 2 * POINTS, 2))[..., 0]

    def expect_end(self) -> None:
        remaining = len(self._values) - self._offset
        _expect(remaining == 0, f"end of file, {remaining} numbers are left over")


def _to_floats(pairs: Int64) -> Float32:
    """Convert mantissas and exponents of two (..., 2 n) to numbers (..., n)."""
    exponents = pairs[..., 1::2]
    _expect(bool((np.abs(exponents) < 150).all()), "finite numbers")  # infinity and NaN have exponents of 32000
    return np.ldexp(pairs[..., 0::2].astype(np.float64), exponents).astype(np.float32)


def _expect(condition: bool | np.bool_, expected: str) -> None:
    if not condition:
        raise FormatError(f"not a five-point shape predictor of dlib: expected {expected}")
