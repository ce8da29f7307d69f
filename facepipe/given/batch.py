"""Collect the lines of a list in arrays: names become hashes, labels numbers, and unusable boxes are counted."""

from typing import NamedTuple

import numpy as np

from facepipe.given.names import MAX_DEPTH, split_name
from facepipe.given.records import RECORD, Kind, ListFigures, Records, has_box, has_points, number_line
from facepipe.hashing import hash64_each
from facepipe.types import Bool, Float64

_BATCH_LINES = 8192
_MAX_COORDINATE = 1e7
# All coordinates below this: they are relative to the picture, not pixels.
_MAX_RELATIVE = 2.0
_NAN = float("nan")
NO_BOX = (_NAN,) * 4
NO_POINTS = (_NAN,) * 10


class ListedFace(NamedTuple):
    """What a line says of an image.

    Attributes:
        kind: A face, no face, or one whose numbers cannot be used.
        box: x1 y1 x2 y2, NaN for none.
        points: Ten coordinates of landmarks, NaN for none.
        score: Confidence, NaN for none.
        label: Number of the label, -1 for none.
        size: Width and height of the image, 0 if they are not given.
        problem: Why the numbers cannot be used; empty if they can.
    """

    kind: Kind = Kind.FACE
    box: tuple[float, ...] = NO_BOX
    points: tuple[float, ...] = NO_POINTS
    score: float = _NAN
    label: int = -1
    size: tuple[int, int] = (0, 0)
    problem: str = ""


class LabelCodes:
    """Numbers for labels, in the order in which they come.

    Attributes:
        labels: The labels by their numbers.
    """

    def __init__(self) -> None:
        self.labels: list[str] = []
        self._codes: dict[str, int] = {}

    def encode(self, label: str | None) -> int:
        """Return the number of a label; -1 for none."""
        if label is None:
            return -1
        code = self._codes.setdefault(label, len(self.labels))
        if code == len(self.labels):
            self.labels.append(label)
        return code


class RecordBatch:
    """Collects the lines of one list.

    Attributes:
        depths: Numbers of parts that names have.
        lines: Lines so far.
    """

    def __init__(self, number_of_list: int, labels: LabelCodes, figures: ListFigures):
        """Begin a list.

        Args:
            number_of_list: its number, from 0.
            labels: numbers of labels, shared by all lists.
            figures: counts what cannot be used.
        """
        self.depths: set[int] = set()
        self.lines = 0
        self._list = number_of_list
        self._labels = labels
        self._figures = figures
        self._mirrored = 0
        self._upright = 0
        self._largest = 0.0
        self._names: list[str] = []
        self._keys: list[int] = []
        self._numbers: list[int] = []
        self._faces: list[ListedFace] = []

    @property
    def is_full(self) -> bool:
        """Whether the batch is to be taken."""
        return len(self._faces) >= _BATCH_LINES

    @property
    def is_relative(self) -> bool:
        """Whether the boxes so far look like shares of the picture instead of pixels."""
        return 0 < self._largest <= _MAX_RELATIVE

    @property
    def is_mirrored(self) -> bool:
        """Whether most landmarks so far have the person's left eye first instead of the picture's."""
        return self._mirrored > self._upright

    def encode_label(self, label: str | None) -> int:
        """Return the number of a label; -1 for none."""
        return self._labels.encode(label)

    def add_unusable(self, lines: list[int], reason: str) -> None:
        """Count lines that cannot be used, by the numbers that `number_line` gives them."""
        for line in lines:
            self._figures.add_unusable(line, reason)

    def add_crowd(self) -> None:
        """Count an annotation of a crowd, which is no single face."""
        self._figures.crowds += 1

    def add_other(self) -> None:
        """Count an annotation of something else than a face."""
        self._figures.others += 1

    def add(self, name: str, line: int, face: ListedFace) -> bool:
        """Add a line.

        Args:
            name: name of the image.
            line: position of the line in the list, from 1.
            face: what it says.

        Returns:
            Whether it names an image.
        """
        self.lines += 1
        parts = split_name(name)
        if not parts or len(parts) > MAX_DEPTH:
            self._figures.add_unusable(number_line(self._list, line), "it names no image")
            return False
        self.depths.add(len(parts))
        self._names.append("/".join(parts))
        self._numbers.append(number_line(self._list, line))
        self._faces.append(face)
        return True

    def add_by_key(self, key: int, line: int, face: ListedFace) -> None:
        """Add a line by a hash instead of a name. A batch has either names or hashes."""
        self.lines += 1
        self._keys.append(key)
        self._numbers.append(number_line(self._list, line))
        self._faces.append(face)

    def take(self) -> Records:
        """Return the lines since the last call, (n,)."""
        records = np.zeros(len(self._faces), RECORD)
        if self._faces:
            records["key"] = hash64_each(self._names) if self._names else self._keys
            records["line"] = self._numbers
            columns = list(zip(*self._faces, strict=True))
            for name, values in zip(("kind", "box", "points", "score", "label", "size"), columns[:6], strict=True):
                with np.errstate(over="ignore"):  # what is too large is infinite, and counted below
                    records[name] = np.array(values)
            self._check(records, columns[6])
        self._names = []
        self._keys = []
        self._numbers = []
        self._faces = []
        return records

    def _check(self, records: Records, problems: tuple[str, ...]) -> None:
        """Mark the faces whose numbers cannot be used, and measure the others."""
        is_unusable = np.array([bool(problem) for problem in problems])
        is_unusable |= (records["kind"] == Kind.FACE) & ~_find_usable(records)
        for row in np.flatnonzero(is_unusable).tolist():
            reason = problems[row] or _describe_problem(records[row])
            self._figures.add_unusable(int(records["line"][row]), reason)
        records["kind"][is_unusable] = Kind.UNUSABLE
        records["box"][records["kind"] != Kind.FACE] = np.nan
        records["points"][records["kind"] != Kind.FACE] = np.nan
        boxes = records["box"][has_box(records)]
        self._largest = max(self._largest, float(np.abs(boxes).max(initial=0)))
        points = records["points"][has_points(records)].reshape(-1, 5, 2).astype(np.float64)
        is_mirrored = measure_handedness(points) < 0
        self._mirrored += int(is_mirrored.sum())
        self._upright += int((~is_mirrored).sum())


def measure_handedness(landmarks: Float64) -> Float64:
    """Measure on which side of the face the first eye is, (n,).

    Args:
        landmarks: (n, 5, 2).

    Returns:
        Positive if it is the left one as seen in the picture, however the face lies in it; negative if it is the right.
    """
    across = landmarks[:, 1] - landmarks[:, 0]
    down = landmarks[:, 3:].mean(axis=1) - landmarks[:, :2].mean(axis=1)
    return np.asarray(across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0], np.float64)


def _find_usable(records: Records) -> Bool:
    """Find the faces with a box that has an area, or landmarks that are several points, (n,)."""
    boxes = records["box"].astype(np.float64)
    points = records["points"].reshape(-1, 5, 2).astype(np.float64)
    with_box = ~np.isnan(boxes).all(axis=1)
    with_points = ~np.isnan(points).all(axis=(1, 2))
    # Comparisons with NaN are false, so that a half of a box is none.
    is_box = ((boxes[:, 2:] > boxes[:, :2]) & (np.abs(boxes[:, 2:]) <= _MAX_COORDINATE)).all(axis=1)
    is_box &= (np.abs(boxes[:, :2]) <= _MAX_COORDINATE).all(axis=1)
    is_points = (np.abs(points) <= _MAX_COORDINATE).all(axis=(1, 2)) & (np.ptp(points, axis=1) > 0).all(axis=1)
    return np.asarray((with_box | with_points) & (is_box | ~with_box) & (is_points | ~with_points))


def _describe_problem(record: Records) -> str:
    """Describe what is wrong with the numbers of a face."""
    left, top, right, bottom = record["box"].tolist()
    if not np.isnan(record["box"]).all() and not (right > left and bottom > top):
        return f"a box of {right - left:g} x {bottom - top:g} pixels"
    numbers = np.concatenate([record["box"], record["points"]])
    if np.abs(numbers[~np.isnan(numbers)]).max(initial=0) > _MAX_COORDINATE:
        return f"a coordinate of {np.abs(numbers[~np.isnan(numbers)]).max():g}"
    if not np.isnan(record["points"]).all():
        return "landmarks that are no five points"
    return "neither a box nor landmarks"
