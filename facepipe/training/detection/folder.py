"""Annotated images below a folder. What is missing or damaged is named and passed over, never fatal."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from facepipe.errors import SourceError
from facepipe.imaging.decode import DecodeError, decode
from facepipe.imaging.header import HeaderError, read_header
from facepipe.storage import describe_error
from facepipe.training.detection.annotations import Annotations, read_annotations
from facepipe.types import Int64, UInt8Image

_log = logging.getLogger(__name__)


class AnnotatedFolder(NamedTuple):
    """Annotated images below a folder; rows (n,): images that are there."""

    root: Path
    annotations: Annotations
    rows: Int64

    @property
    def missing(self) -> int:
        """Annotated images that are not there."""
        return len(self.annotations.paths) - len(self.rows)

    def load_pixels(self, row: int) -> UInt8Image | None:
        """An image, None where it cannot be read."""
        return _load_pixels(self.root / self.annotations.paths[row])


def open_folder(annotations: str, images: str) -> AnnotatedFolder:
    """Annotations and where their images lie; each image that is missing is named in a warning."""
    read = read_annotations(annotations)
    root = Path(images) if images else Path(annotations).parent / "images"
    there = np.array([(root / path).is_file() for path in read.paths])
    for row in np.flatnonzero(~there):
        _log.warning("%s is missing", root / read.paths[row])
    if not there.any():
        raise SourceError(f"none of the {len(there)} images annotated in {annotations!r} is below {str(root)!r}")
    return AnnotatedFolder(root, read, np.flatnonzero(there))


def _load_pixels(path: Path) -> UInt8Image | None:
    """(h, w, 3) uint8 RGB of an image file, or None, with a warning that names it."""
    try:
        data = path.read_bytes()
        return decode(data, read_header(data))
    except (OSError, HeaderError, DecodeError) as error:
        reason = describe_error(error)
        _log.warning("%s is passed over: %s", path, reason)
        return None
