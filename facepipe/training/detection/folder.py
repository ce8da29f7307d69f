"""Annotated images below a folder. Missing or damaged images are logged and skipped."""

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
    """Annotated images below a folder.

    Attributes:
        root: the folder.
        annotations: annotations of all images.
        rows: numbers of the images that exist, (n,).
    """

    root: Path
    annotations: Annotations
    rows: Int64

    @property
    def missing(self) -> int:
        """Number of annotated images that do not exist."""
        return len(self.annotations.paths) - len(self.rows)

    def load_pixels(self, row: int) -> UInt8Image | None:
        """Decode an image, or log a warning and return None if it cannot be read."""
        return _load_pixels(self.root / self.annotations.paths[row])


def open_folder(annotations: str, images: str) -> AnnotatedFolder:
    """Open annotated images. Each missing image is logged as a warning.

    Args:
        annotations: file of the annotations.
        images: folder of the images; empty: `images` beside the file.

    Raises:
        SourceError: The annotations cannot be read, or none of the images exists.
    """
    contents = read_annotations(annotations)
    # Look for all images once, so that a missing one does not stop a step later.
    root = Path(images) if images else Path(annotations).parent / "images"
    exists = np.array([(root / path).is_file() for path in contents.paths])
    for row in np.flatnonzero(~exists):
        _log.warning("%s is missing", root / contents.paths[row])
    if not exists.any():
        raise SourceError(f"none of the {len(exists)} images annotated in {annotations!r} is below {str(root)!r}")
    return AnnotatedFolder(root, contents, np.flatnonzero(exists))


def _load_pixels(path: Path) -> UInt8Image | None:
    try:
        data = path.read_bytes()
        return decode(data, read_header(data))
    except (OSError, HeaderError, DecodeError) as error:
        reason = describe_error(error) if isinstance(error, OSError) else str(error)
        _log.warning("%s is skipped: %s", path, reason)
        return None
