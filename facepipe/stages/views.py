"""Views of an image: its pixels at some scale. Small faces and chips may need a larger one than the detector."""

from dataclasses import dataclass

from facepipe.imaging.decode import DecodeError, decode
from facepipe.imaging.geometry import Frame, locate_frame
from facepipe.imaging.header import read_header
from facepipe.types import UInt8Image

# Larger views of an image are decoded at a smaller scale, though a chip then has fewer pixels than it could.
_MAX_VIEW_PIXELS = 100_000_000


@dataclass(frozen=True)
class DecodedView:
    """Pixels of an image that chips are cut from.

    Attributes:
        pixels: RGB, (h, w, 3)
        frame: where the pixels lie in the full-size image
    """

    pixels: UInt8Image
    frame: Frame


def decode_larger(data: bytes, scale: float, view: DecodedView) -> DecodedView:
    """Decode an image at the smallest scale that is large enough.

    Args:
        data: the image file.
        scale: required pixels per pixel of the full-size image, at most 1.
        view: the pixels at hand, returned if decoding fails.
    """
    # The smallest scale that is enough decodes fastest.
    reduce = next((divisor for divisor in (4, 2) if 1 / divisor >= scale), 1)
    try:
        header = read_header(data)
        # A view of a very large image would fill the memory.
        while header.width * header.height > _MAX_VIEW_PIXELS * reduce * reduce and reduce < 8:
            reduce *= 2
        if 1 / reduce <= view.frame.scale:
            return view
        return DecodedView(decode(data, header, reduce), locate_frame(header, reduce))
    except (DecodeError, ValueError):
        return view
