"""A line of a list as an array of fixed width, so that millions of lines are no objects."""

import enum
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from facepipe.types import Bool

# A number of a list's line holds the number of the list above these bits.
_LINE_BITS = 40
_MAX_EXAMPLES = 3

RECORD = np.dtype(
    [
        ("key", "<u8"),  # hash of the image's name
        ("line", "<i8"),  # `number_line` of where it stands
        ("kind", "u1"),  # a `Kind`
        ("box", "<f4", 4),  # x1 y1 x2 y2; NaN for none
        ("points", "<f4", 10),  # as `Faces.landmarks`; NaN for none
        ("score", "<f4"),  # NaN for none
        ("label", "<i4"),  # position in the list of labels; -1 for none
        ("size", "<i4", 2),  # width and height that the list gives the image; 0 if it gives none
    ]
)
Records = npt.NDArray[Any]


class Kind(enum.IntEnum):
    """What a line says of an image."""

    FACE = 0
    EMPTY = 1  # the image is listed, and has no face
    UNUSABLE = 2  # there is a face, and its numbers cannot be used


def number_line(number_of_list: int, line: int) -> int:
    """Make one number of the position of a line: that of its list, from 0, and that of the line, from 1."""
    return number_of_list << _LINE_BITS | line


def split_line_number(number: int) -> tuple[int, int]:
    """Return the number of the list, and of the line in it."""
    return number >> _LINE_BITS, number & (1 << _LINE_BITS) - 1


def has_box(records: Records) -> Bool:
    """Tell which records have a box, (n,)."""
    return np.asarray(~np.isnan(records["box"][:, 0]))


def has_points(records: Records) -> Bool:
    """Tell which records have landmarks, (n,)."""
    return np.asarray(~np.isnan(records["points"][:, 0]))


@dataclass
class ListFigures:
    """What was read of lists.

    Attributes:
        lists: Paths of the lists.
        faces: Faces that they give.
        images: Images that they name.
        unusable: Lines whose numbers cannot be used.
        examples: Some of these, with the reason.
        crowds: Annotations of crowds, which are no single faces.
        others: Annotations of something else than a face.
        repeated: Lines that say the same as another one.
        mirrored: Lists whose left and right are those of the person, not of the picture.
        depths: Numbers of parts that names have, falling.
        has_labels: Whether any face has a label.
    """

    lists: list[str]
    faces: int = 0
    images: int = 0
    unusable: int = 0
    examples: list[str] = field(default_factory=list)
    crowds: int = 0
    others: int = 0
    repeated: int = 0
    mirrored: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    has_labels: bool = False

    def add_unusable(self, line: int, reason: str) -> None:
        """Count a line whose numbers cannot be used.

        Args:
            line: `number_line` of it.
            reason: what is wrong.
        """
        self.unusable += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(f"{self.describe_line(line)}: {reason}")

    def describe_line(self, line: int) -> str:
        """Describe where a line stands: its list and its number in it."""
        number_of_list, number = split_line_number(line)
        path = self.lists[number_of_list]
        return f"{path} {'entry' if path.lower().endswith('.json') else 'line'} {number}"
