"""What a failed image was tried with, in short form, and when it is worth trying again.

A failure is final only for the decoder, the limits and the settings that failed it. Each failed row says what they
were.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.errors import ConfigError
from facepipe.hashing import hash64
from facepipe.schema import CRASHED, DECODE_ERROR, NO_FACE, READ_ERROR, TOO_LARGE
from facepipe.types import Bool

RETRYABLE = (READ_ERROR, DECODE_ERROR, TOO_LARGE, NO_FACE, CRASHED)
"""Statuses of images that may be tried again. Those that could not be read always are."""

# A crash may have had other causes than the image, so that another worker tries it once more in the next run.
_ON_MACHINE = ", on "
_TWICE = ", twice"


@dataclass(frozen=True)
class RetryRule:
    """Decides which failed images are tried again.

    Attributes:
        settings: What images of each status are tried with now, in short form.
        statuses: Statuses of which all images are tried again.
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    statuses: frozenset[str] = frozenset((READ_ERROR,))

    def find(self, images: pa.Table) -> Bool:
        """Find the images to try again.

        Args:
            images: columns `status` and `failed_with`, one row per image.

        Returns:
            (n,).
        """
        is_retried = pc.is_in(images["status"], pa.array(sorted(self.statuses), pa.string()))
        for status, settings in self.settings.items():
            # Older versions did not say what an image was tried with. Whether it shows no face would cost too much to
            # ask for all of them, so that this is done on request.
            if_unknown = status != NO_FACE
            final = _crash_twice(settings) if status == CRASHED else settings
            is_other = pc.not_equal(images["failed_with"], final)
            is_other = pc.if_else(pc.is_valid(images["failed_with"]), is_other, if_unknown)
            is_retried = pc.or_(is_retried, pc.and_(pc.equal(images["status"], status), is_other))
        return np.asarray(pc.fill_null(is_retried, False).to_numpy(zero_copy_only=False), bool)


def describe_crash(programs: str, machine: str) -> str:
    """Describe in short form what a crashed image was tried with.

    Args:
        programs: versions of the programs.
        machine: name of the machine; a few digits of its hash are kept.
    """
    return f"{programs}{_ON_MACHINE}{hash64(machine) & 0xFFFF:04x}"


def _crash_twice(text: str) -> str:
    """Describe the same for an image that has crashed in two runs."""
    return text.rpartition(_ON_MACHINE)[0] + _TWICE


def check_statuses(statuses: frozenset[str]) -> None:
    """Raise ConfigError for a status of which no image can be tried again."""
    unknown = sorted(statuses.difference(RETRYABLE))
    if unknown:
        raise ConfigError(f"retry.statuses: {unknown[0]!r} is not one of {', '.join(RETRYABLE)}")


def describe_failures(statuses: pa.ChunkedArray, is_retried: Bool, settings: Mapping[str, str]) -> pa.Array:
    """Say what the failed rows of a block were tried with; null for other rows.

    Args:
        statuses: status of each row, (n,).
        is_retried: whether the image of the row had failed before, (n,).
        settings: what images of each status are tried with, in short form.
    """
    texts = []
    for status, is_second in zip(statuses.to_pylist(), is_retried.tolist(), strict=True):
        text = settings.get(status)
        if text is not None and status == CRASHED and is_second:
            text = _crash_twice(text)
        texts.append(text)
    return pa.array(texts, pa.string())
