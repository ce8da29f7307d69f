"""Perceptual hashes of whole images: 64 bits that hardly change when an image is resized or re-encoded."""

from dataclasses import dataclass

import cv2
import numpy as np

from facepipe.types import Bool, Int64, UInt8

_SIDE = 32
_HASHES_PER_BLOCK = 1 << 16  # whose bits are spread out at a time
# Sampled pixels per side. That is 64 for each pixel of the small image, and a twentieth of averaging 12 megapixels.
_SAMPLES = 256
# The 64 lowest frequencies (down, across) by their sum, without the mean: the mean would always be the same bit.
_LOWEST = sorted(((v, u) for v in range(_SIDE) for u in range(_SIDE)), key=lambda f: (sum(f), f))[1:65]
_DOWN, _ACROSS = (np.array(axis) for axis in zip(*_LOWEST, strict=True))
# Place in the transposed picture's hash of each coefficient; -1 for the one whose partner the hash does not hold.
_POSITIONS = {frequency: n for n, frequency in enumerate(_LOWEST)}
_TRANSPOSED = np.array([_POSITIONS.get((u, v), -1) for v, u in _LOWEST])
QUARTER_TURNS = (0, 90, 180, 270)
"""Degrees clockwise by which a picture may be turned."""
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


def turn_hashes(hashes: Int64, degrees: int) -> Int64:
    """Compute the hashes (n,) of turned images.

    Args:
        hashes: (n,).
        degrees: 0, 90, 180 or 270, clockwise. After 90 and 270 one bit is not known; it is 0, and `get_known_bits`
            leaves it out.
    """
    hashes = np.asarray(hashes, np.int64)
    if degrees in (90, 270):
        hashes = _transpose_hashes(hashes)
    # A turn is a transposition and a mirror; mirrors change the sign of odd frequencies.
    odd = {0: np.zeros_like(_DOWN), 90: _ACROSS, 180: _DOWN + _ACROSS, 270: _DOWN}[degrees]
    return (hashes ^ _pack_bits(odd % 2 == 1)) & get_known_bits(degrees)


def _transpose_hashes(hashes: Int64) -> Int64:
    """Compute the hashes (n,) of images with rows and columns exchanged. A bit that is not known is 0."""
    transposed = np.empty(len(hashes), np.int64)
    for at in range(0, len(hashes), _HASHES_PER_BLOCK):
        block = slice(at, at + _HASHES_PER_BLOCK)
        bits = np.unpackbits(np.ascontiguousarray(hashes[block], ">i8").view(np.uint8).reshape(-1, 8), axis=1)
        packed = np.packbits(bits[:, _TRANSPOSED], axis=1)
        transposed[block] = np.ascontiguousarray(packed).view(">i8").ravel()
    return transposed & get_known_bits(90)


def get_known_bits(degrees: int) -> np.int64:
    """Return the bits that are known of the hash of an image that was turned clockwise."""
    return _pack_bits(_TRANSPOSED >= 0 if degrees in (90, 270) else np.ones(64, bool))


def _pack_bits(bits: Bool) -> np.int64:
    """Pack 64 bits, the most significant one first."""
    return np.int64(int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True))


@dataclass(frozen=True)
class HashMatch:
    """How the pictures of pairs of hashes lie to each other, by the turn and mirror with the fewest differing bits.

    Attributes:
        bits: Differing bits, (m,).
        turn: Degrees clockwise by which the second picture is turned, (m,); of a mirror image before it is mirrored.
        is_mirrored: Whether one is a mirror image of the other, (m,).
    """

    bits: UInt8
    turn: Int64
    is_mirrored: Bool


def match_hashes(a: Int64, b: Int64) -> HashMatch:
    """Compare hashes a (m,) with b (m,), as they are, mirrored, and turned by quarters. The plainest match counts."""
    best = HashMatch(np.full(len(a), 65, np.uint8), np.zeros(len(a), np.int64), np.zeros(len(a), bool))
    for degrees in QUARTER_TURNS:
        for is_mirrored in (False, True):
            source = mirror_hashes(a) if is_mirrored else a
            turned = turn_hashes(source, degrees)
            bits = count_differing_bits(turned, np.asarray(b, np.int64) & get_known_bits(degrees))
            is_better = bits < best.bits
            best = HashMatch(
                np.where(is_better, bits, best.bits).astype(np.uint8),
                np.where(is_better, degrees, best.turn),
                np.where(is_better, is_mirrored, best.is_mirrored),
            )
    return best


def count_differing_bits(a: Int64, b: Int64) -> UInt8:
    """Count how many of the 64 bits differ, element by element."""
    # Unsigned: bitwise_count counts the bits of a negative number's absolute value.
    return np.bitwise_count((np.asarray(a, np.int64) ^ np.asarray(b, np.int64)).view(np.uint64))
