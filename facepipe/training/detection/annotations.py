"""WIDER FACE's annotations (Yang et al., CVPR 2016), with RetinaFace's landmarks or without, in compact arrays.

Lines are read one at a time; a line that cannot be read is an error that names it.
"""

from array import array
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from facepipe.errors import SourceError
from facepipe.storage import describe_error
from facepipe.types import Float32, Int64

_LENGTHS = (4, 19, 20)  # a box; and five points of three numbers; and the blur
_INVALID = 7  # where the official file says that a face is not to be used
_NO_POINTS = [float("nan")] * 10


class AnnotatedFaces(NamedTuple):
    """Annotated faces of one image: boxes (n, 4) x1 y1 x2 y2, landmarks (n, 5, 2) in image order, NaN for none."""

    boxes: Float32
    landmarks: Float32


class Annotations(NamedTuple):
    """Images and their faces: those of image n are rows offsets[n] to offsets[n + 1].

    paths: relative, with slashes; offsets (n + 1,) int64; boxes (m, 4), landmarks (m, 5, 2) as in Truth
    dropped: faces left out, as the file calls them invalid or their box is empty
    """

    paths: list[str]
    offsets: Int64
    boxes: Float32
    landmarks: Float32
    dropped: int

    def get_faces(self, image: int) -> AnnotatedFaces:
        """The faces of one image."""
        rows = slice(*self.offsets[image : image + 2])
        return AnnotatedFaces(self.boxes[rows], self.landmarks[rows])


class _AnnotationParser:
    """Arrays that grow line by line; `parse_line` raises ValueError for a line that does not belong."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.offsets, self.numbers = array("q"), array("f")
        self.dropped = 0

    def parse_line(self, line: str) -> None:
        raise NotImplementedError

    def add_image(self, path: str) -> None:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts:
            raise ValueError(f"{path!r} is no path below the images' folder")
        self.paths.append(path)
        self.offsets.append(len(self.numbers) // 14)

    def add_face(self, box: list[float], points: list[float]) -> None:
        x, y, w, h = box
        if w > 0 and h > 0:
            self.numbers.extend([x, y, x + w, y + h, *points])
        else:
            self.dropped += 1

    def build_annotations(self) -> Annotations:
        if not self.paths:
            raise ValueError("no image is annotated")
        numbers = np.array(self.numbers, np.float32).reshape(-1, 14)
        offsets = np.array([*self.offsets, len(numbers)], np.int64)
        boxes, landmarks = numbers[:, :4].copy(), numbers[:, 4:].reshape(-1, 5, 2).copy()
        return Annotations(self.paths, offsets, boxes, landmarks, self.dropped)


class _LandmarkParser(_AnnotationParser):
    """RetinaFace's label.txt: `# path`, then x y w h, five times x y flag (-1: none), and the blur, of each face."""

    def parse_line(self, line: str) -> None:
        if line.startswith("#"):
            self.add_image(line[1:].strip())
            return
        numbers = _parse_numbers(line, _LENGTHS)
        points = [n for at in range(4, 19, 3) for n in numbers[at : at + 2]]
        self.add_face(numbers[:4], points if len(numbers) > 4 and numbers[4] >= 0 else _NO_POINTS)


class _BoxParser(_AnnotationParser):
    """wider_face_*_bbx_gt.txt: a path, the number of faces, then x y w h and six attributes of each.

    An image without faces has one line of zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self._expected: int | None = 0
        self._empty = False

    def parse_line(self, line: str) -> None:
        if self._expected is None:
            self._parse_count(line)
        elif self._expected:
            self._expected -= 1
            numbers = _parse_numbers(line, (4, 10))
            self.add_face([0.0] * 4 if len(numbers) > _INVALID and numbers[_INVALID] else numbers[:4], _NO_POINTS)
        elif self._empty and not line.strip(" 0"):
            self._empty = False
        else:
            self._parse_path(line)

    def _parse_path(self, line: str) -> None:
        if len(line.split()) >= 4 and not line.strip(" -.0123456789"):
            raise ValueError("one more face than its image announced")
        self.add_image(line)
        self._expected, self._empty = None, False

    def _parse_count(self, line: str) -> None:
        if not line.isdigit():
            raise ValueError(f"{line[:40]!r} is no number of faces")
        self._expected = int(line)
        self._empty = not self._expected

    def build_annotations(self) -> Annotations:
        if self._expected is None or self._expected:
            raise ValueError("the file ends before the last image's faces")
        return super().build_annotations()


def _parse_numbers(line: str, lengths: tuple[int, ...]) -> list[float]:
    numbers = [float(word) for word in line.split()]
    if len(numbers) not in lengths:
        raise ValueError(f"{len(numbers)} numbers, where a face has {' or '.join(map(str, lengths))}")
    if not all(isfinite(number) for number in numbers):
        raise ValueError("a number is not finite")
    return numbers


def read_annotations(path: str | Path) -> Annotations:
    """The annotations of a file of either form; its first line tells which.

    Raises SourceError with file and line for what cannot be read, and for a file without images.
    """
    collected: _AnnotationParser | None = None
    number = 0
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 - the line an error is about
                text = line.strip()
                if text:
                    collected = collected or (_LandmarkParser() if text.startswith("#") else _BoxParser())
                    collected.parse_line(text)
        return (collected or _LandmarkParser()).build_annotations()
    except OSError as error:
        raise SourceError(f"cannot read the annotations {str(path)!r}: {describe_error(error)}") from error
    except ValueError as error:
        raise SourceError(f"{path}, line {number}: {error}") from error
