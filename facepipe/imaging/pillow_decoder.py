"""Decode by Pillow what OpenCV does not read as Pillow, libvips and browsers do: TIFF, GIF, BMP, AVIF, odd JPEG 2000.

OpenCV shows the wrong colours of Lab and premultiplied TIFFs, of odd palettes and of transparent AVIFs. It refuses
TIFFs of 4, 12 and 32 bits, GIFs whose background is not in their palette, and AVIFs with metadata behind the picture.
"""

import io
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from facepipe.types import UInt8Image

if TYPE_CHECKING:
    from PIL.Image import Image


class UnsupportedError(ValueError):
    """The picture is of a kind that cannot be shown in eight bits per channel."""


@cache
def _load_openers() -> dict[str, Callable[[Any], "Image"]]:
    """Load what opens each format. `Image.open` would try several formats, and has limits of its own."""
    from PIL import AvifImagePlugin, BmpImagePlugin, GifImagePlugin, Jpeg2KImagePlugin, TiffImagePlugin

    # One thread per worker, as everywhere. Pillow has no other way to say it.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    return {
        "avif": AvifImagePlugin.AvifImageFile,
        "bmp": BmpImagePlugin.BmpImageFile,
        "gif": GifImagePlugin.GifImageFile,
        "jp2": Jpeg2KImagePlugin.Jpeg2KImageFile,
        "tiff": TiffImagePlugin.TiffImageFile,
    }


def decode_by_pillow(data: bytes, kind: str, size: tuple[int, int]) -> UInt8Image:
    """Decode the first page or frame of a file.

    Args:
        data: The file's bytes.
        kind: Its format: avif, bmp, gif, jp2 or tiff.
        size: Width and height that its header says. They are compared before memory is spent.

    Returns:
        (h, w, 3) RGB as it is stored. Alpha is dropped.

    Raises:
        UnsupportedError: The kind of its pixels is not supported.
        Exception: Any error of Pillow: what a damaged file raises is not defined.
    """
    open_image = _load_openers()[kind]
    with open_image(io.BytesIO(data)) as image:
        if image.size != size:
            raise ValueError(f"the header says {size}, the image is {image.size}")
        image.load()
        return to_rgb(image)


def to_rgb(image: "Image") -> UInt8Image:
    """Convert a loaded image to RGB. 16 bits become the higher 8."""
    if image.mode.startswith("I;16"):
        # The names say the order of the bytes.
        stored = np.asarray(image)
        grey = (stored.astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, 2)
    if image.mode in ("I", "F"):
        raise UnsupportedError("32 bits per channel")
    return np.array(image.convert("RGB"), np.uint8)


# What Pillow warns of (odd metadata, a transparent palette) changes no pixel.
warnings.filterwarnings("ignore", module=r"PIL\..*")
