"""Read WIDER FACE's annotations (Yang et al., CVPR 2016), with RetinaFace's landmarks or without, into compact arrays.

Files are read line by line. A line that cannot be read is an error that names it.
"""

from array import array
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from facepipe.errors import SourceError
from facepipe.storage import describe_error
from facepipe.types import Float32, Int64

_LENGTHS = (4, 19, 20)  # a box; with five points of three numbers; with the blur
# Numbers per line of the official file: a box alone, or with six attributes.
_OFFICIAL_LENGTHS = (4, 10)
_INVALID = 7  # column of the official file that says not to use a face
_NO_POINTS = [float("nan")] * 10
# A face has four numbers of its box and ten of its landmarks.
_NUMBERS_PER_FACE = 14


class AnnotatedFaces(NamedTuple):
    """The annotated faces of one image.

    Attributes:
        boxes: x1 y1 x2 y2, (n, 4).
        landmarks: x y of five points in image order, (n, 5, 2); NaN if unknown.
    """

    boxes: Float32
    landmarks: Float32


class Annotations(NamedTuple):
    """Images and their faces. Those of image n are rows offsets[n] to offsets[n + 1].

    Attributes:
        paths: relative path of each image, with slashes.
        offsets: first face of each image, and the number of faces, (n + 1,) int64.
        boxes: boxes of all faces, (m, 4), as in AnnotatedFaces.
        landmarks: landmarks of all faces, (m, 5, 2), as in AnnotatedFaces.
        dropped: faces left out because the file marks them as invalid or their box is empty.
    """

    paths: list[str]
    offsets: Int64
    boxes: Float32
    landmarks: Float32
    dropped: int

    def get_faces(self, image: int) -> AnnotatedFaces:
        """Return the faces of one image."""
        rows = slice(*self.offsets[image : image + 2])
        return AnnotatedFaces(self.boxes[rows], self.landmarks[rows])


class _AnnotationParser:
    """The base of parsers: arrays that grow line by line."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        # Compact arrays: images of a large set have hundreds of thousands of faces.
        self.offsets = array("q")
        self.numbers = array("f")
        self.dropped = 0

    def parse_line(self, line: str) -> None:
        """Parse a line. Raises ValueError if it does not belong where it is."""
        raise NotImplementedError

    def add_image(self, path: str) -> None:
        """Begin an image."""
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts:
            raise ValueError(f"{path!r} is not a path below the images' folder")
        self.paths.append(path)
        self.offsets.append(len(self.numbers) // _NUMBERS_PER_FACE)

    def add_face(self, box: list[float], points: list[float]) -> None:
        """Add a face (x y w h, and ten coordinates) to the current image, unless its box is empty."""
        x, y, w, h = box
        if w > 0 and h > 0:
            self.numbers.extend([x, y, x + w, y + h, *points])
        else:
            self.dropped += 1

    def build_annotations(self) -> Annotations:
        """Build the annotations. Raises ValueError if there are no images."""
        if not self.paths:
            raise ValueError("no image is annotated")
        # One row per face: box, then landmarks; the last offset ends the last image.
        numbers = np.array(self.numbers, np.float32).reshape(-1, _NUMBERS_PER_FACE)
        return Annotations(
            paths=self.paths,
            offsets=np.array([*self.offsets, len(numbers)], np.int64),
            boxes=numbers[:, :4].copy(),
            landmarks=numbers[:, 4:].reshape(-1, 5, 2).copy(),
            dropped=self.dropped,
        )


class _LandmarkParser(_AnnotationParser):
    """RetinaFace's label.txt: `# path`, then per face x y w h, five times x y flag (-1: unknown), and the blur."""

    def parse_line(self, line: str) -> None:
        if line.startswith("#"):
            self.add_image(line[1:].strip())
            return
        numbers = _parse_numbers(line, _LENGTHS)
        # Unknown landmarks are marked by -1; else every third number is a flag to skip.
        has_points = len(numbers) > 4 and numbers[4] >= 0
        points = [n for start in range(4, 19, 3) for n in numbers[start : start + 2]]
        self.add_face(numbers[:4], points if has_points else _NO_POINTS)


class _BoxParser(_AnnotationParser):
    """wider_face_*_bbx_gt.txt: a path, the number of faces, then per face x y w h and six attributes.

    An image without faces has one line of zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self._expected: int | None = 0  # faces of the image that are still to come; None: their number is
        self._is_empty = False

    def parse_line(self, line: str) -> None:
        # A line is a number of faces, a face, the zeros of an empty image, or a path, depending on the last ones.
        if self._expected is None:
            self._parse_count(line)
        elif self._expected:
            self._expected -= 1
            numbers = _parse_numbers(line, _OFFICIAL_LENGTHS)
            is_invalid = len(numbers) > _INVALID and numbers[_INVALID]
            self.add_face([0.0] * 4 if is_invalid else numbers[:4], _NO_POINTS)
        elif self._is_empty and not line.strip(" 0"):
            self._is_empty = False
        else:
            self._parse_path(line)

    def _parse_path(self, line: str) -> None:
        # A line of numbers alone in the place of a path is one face too many.
        if len(line.split()) >= 4 and not line.strip(" -.0123456789"):
            raise ValueError("the image has more faces than announced")
        self.add_image(line)
        self._expected = None
        self._is_empty = False

    def _parse_count(self, line: str) -> None:
        if not line.isdigit():
            raise ValueError(f"{line[:40]!r} is not a number of faces")
        self._expected = int(line)
        self._is_empty = not self._expected

    def build_annotations(self) -> Annotations:
        if self._expected is None or self._expected:
            raise ValueError("the file ends before the last image's faces")
        return super().build_annotations()


def _parse_numbers(line: str, lengths: tuple[int, ...]) -> list[float]:
    numbers = [float(word) for word in line.split()]
    if len(numbers) not in lengths:
        raise ValueError(f"{len(numbers)} numbers; a face has {' or '.join(map(str, lengths))}")
    if not all(isfinite(number) for number in numbers):
        raise ValueError("a number is not finite")
    return numbers


def read_annotations(path: str | Path) -> Annotations:
    """Read the annotations of a file. Its first line tells which form it has.

    Raises:
        SourceError: The file cannot be read, or has no images. The message names file and line.
    """
    parser: _AnnotationParser | None = None
    number = 0
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 - the line that an error is about
                text = line.strip()
                if not text:
                    continue
                # The first line that is not blank tells the form.
                if parser is None:
                    parser = _LandmarkParser() if text.startswith("#") else _BoxParser()
                parser.parse_line(text)
        return (parser or _LandmarkParser()).build_annotations()
    except OSError as error:
        raise SourceError(f"cannot read the annotations {str(path)!r}: {describe_error(error)}") from error
    except ValueError as error:
        raise SourceError(f"{path}, line {number}: {error}") from error
