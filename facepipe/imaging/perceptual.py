"""Perceptual hashes of whole images: 64 bits that hardly change when an image is resized or re-encoded."""

import cv2
import numpy as np

from facepipe.types import Int64, UInt8

_SIDE = 32
# Sampled pixels per side. That is 64 for each pixel of the small image, and a twentieth of averaging 12 megapixels.
_SAMPLES = 256
# The 64 lowest frequencies (down, across) by their sum, without the mean: the mean would always be the same bit.
_LOWEST = sorted(((v, u) for v in range(_SIDE) for u in range(_SIDE)), key=lambda f: (sum(f), f))[1:65]
_DOWN, _ACROSS = (np.array(axis) for axis in zip(*_LOWEST, strict=True))
# Bits of the coefficients that change their sign in a mirror.
_ODD = int.from_bytes(np.packbits(_ACROSS % 2 == 1).tobytes(), "big", signed=True)


def compute_perceptual_hash(pixels: UInt8) -> int:
    """Compute the perceptual hash of an image: the signs of the lowest DCT coefficients of its 32x32 grey levels.

    This follows pHash (Zauner 2010), but the threshold is zero instead of the median. The hash of the mirror image
    then follows from this one (`mirror_hashes`). On 3,811 LFW images that is no worse: 36 pairs of different images
    are within 8 bits, against 82 for pHash's 8x8 block and its median, with the same recall of cropped and recoloured
    copies.

    Args:
        pixels: (h, w, 3) RGB of any size.

    Returns:
        A signed 64-bit integer.
    """
    height, width = pixels.shape[:2]
    # Sample at most 256 pixels per side, then average: averaging a large image in full takes far longer.
    sampled = cv2.resize(pixels, (min(width, _SAMPLES), min(height, _SAMPLES)), interpolation=cv2.INTER_LINEAR)
    grey = cv2.cvtColor(sampled, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    # Pick the 64 coefficients out of the (32, 32) spectrum and keep their signs.
    is_positive = cv2.dct(small.astype(np.float32))[_DOWN, _ACROSS] > 0
    return int.from_bytes(np.packbits(is_positive).tobytes(), "big", signed=True)


def mirror_hashes(hashes: Int64) -> Int64:
    """Compute the hashes (n,) of the mirror images: cosines of odd frequency across change their sign."""
    return np.asarray(hashes, np.int64) ^ np.int64(_ODD)


def count_differing_bits(a: Int64, b: Int64) -> UInt8:
    """Count how many of the 64 bits differ, element by element."""
    # Unsigned: bitwise_count counts the bits of a negative number's absolute value.
    return np.bitwise_count((np.asarray(a, np.int64) ^ np.asarray(b, np.int64)).view(np.uint64))
