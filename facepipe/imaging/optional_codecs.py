"""Decode HEIC and JPEG XL, if the packages of the extras `heif` and `jxl` are installed.

pi-heif is BSD and holds libheif and libde265, which are LGPL: that is why it is an extra. Its sibling pillow-heif also
holds x265, which is GPL. pylibjxl is BSD, as libjxl is; pillow-jxl-plugin is GPL. Both libraries turn what they decode
as its container says, so the pixels are as they are seen.
"""

import io
from importlib.util import find_spec

import numpy as np

from facepipe.types import UInt8Image

# Package and extra of each format.
_PACKAGES = {"heic": ("pi_heif", "heif"), "jxl": ("pylibjxl", "jxl")}


class MissingCodecError(ValueError):
    """The package that reads the format is not installed."""


def has_codec(kind: str) -> bool:
    """Tell whether the package that reads a format is installed."""
    return find_spec(_PACKAGES[kind][0]) is not None


def decode_by_extra(data: bytes, kind: str, size: tuple[int, int]) -> UInt8Image:
    """Decode a HEIC or JPEG XL file.

    Args:
        data: The file's bytes.
        kind: heic or jxl.
        size: Width and height that its header says, as it is seen.

    Returns:
        (h, w, 3) RGB as it is seen. Alpha is dropped.

    Raises:
        MissingCodecError: The package is not installed.
        Exception: Any error of the package.
    """
    extra = _PACKAGES[kind][1]
    if not has_codec(kind):
        raise MissingCodecError(f"unsupported: {kind} needs an extra package: pip install 'facepipe[{extra}]'")
    pixels = _decode_heic(data) if kind == "heic" else _decode_jxl(data, size)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    # Grey, grey with alpha, RGB or RGBA.
    colours = pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, 2)
    return np.ascontiguousarray(colours, np.uint8)


def _decode_heic(data: bytes) -> UInt8Image:
    import pi_heif

    image = pi_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
    return np.asarray(image.to_pillow().convert("RGB"), np.uint8)


def _decode_jxl(data: bytes, size: tuple[int, int]) -> UInt8Image:
    import pylibjxl

    info = pylibjxl.probe(data)
    if (info["width"], info["height"]) != size:
        raise ValueError(f"the header says {size}, the image is {info['width']}x{info['height']}")
    return np.asarray(pylibjxl.decode(data), np.uint8)
