"""What a gallery knows of listed images, before any byte of them is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from facepipe.hashing import hash_each_in_process
from facepipe.sources.number_ranges import NumberRanges
from facepipe.types import Bool, UInt64

# Verdicts of a listed image; they are indices of the counts per verdict.
NEW, CHANGED, SKIP, REPEATED, ERASED = range(5)


@dataclass(frozen=True)
class Screening:
    """What a gallery knows of listed images.

    Attributes:
        verdicts: One verdict per image, (n,).
        contents: Hash of the content that the gallery has, (n,).
        labels: `hash_labels` of the label that the gallery has, (n,); None if labels do not matter.
        is_own: Whether the image came from the source that is listed, (n,).
        other_numbers: The numbers that are labels of other sources.
    """

    verdicts: npt.NDArray[np.int8]
    contents: UInt64
    labels: UInt64 | None = None
    is_own: Bool | None = None
    other_numbers: NumberRanges | None = None


def hash_labels(labels: Sequence[str | None]) -> UInt64:
    """Hash labels for comparison within this process; (n,), 0 for none. The two lowest bits are 0."""
    return hash_each_in_process([label or "" for label in labels]) & ~np.uint64(3)
