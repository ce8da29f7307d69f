"""Augmentation of one chip: a pure function of the chip, the config and a random generator.

All random numbers are drawn first, so that one step never depends on which other steps are enabled.
"""

from dataclasses import dataclass
from typing import Annotated

import cv2
import numpy as np
from pydantic import Field

from facepipe.types import Float64, UInt8Image

Share = Annotated[float, Field(ge=0, le=1)]
Quality = Annotated[int, Field(ge=1, le=100)]
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@dataclass(frozen=True)
class AugmentConfig:
    """Configure the augmentation of chips. The probabilities are independent of each other.

    Attributes:
        flip: probability of mirroring left to right.
        crop: probability of moving and zooming about the centre, by one bilinear warp with a mirrored border.
        shift: maximum movement, as a share of the side (crop).
        zoom: maximum enlargement or reduction, as a share (crop).
        colour: probability of changing brightness, contrast and saturation.
        brightness: maximum change of the brightness, as a share (colour).
        contrast: maximum change of the contrast, as a share (colour).
        saturation: maximum change of the saturation, as a share (colour).
        grey: probability of keeping the luminance only (ITU-R BT.601).
        blur: probability of a Gaussian blur.
        blur_sigma: maximum standard deviation of the blur, in pixels.
        jpeg: probability of compressing as JPEG and decoding again.
        jpeg_lowest: minimum JPEG quality.
        jpeg_highest: maximum JPEG quality.
    """

    flip: Share = 0.5
    crop: Share = 0.0
    shift: Share = 0.06
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.1
    colour: Share = 0.0
    brightness: Share = 0.2
    contrast: Share = 0.2
    saturation: Share = 0.2
    grey: Share = 0.0
    blur: Share = 0.0
    blur_sigma: Annotated[float, Field(gt=0)] = 1.5
    jpeg: Share = 0.0
    jpeg_lowest: Quality = 30
    jpeg_highest: Quality = 95


def augment_chip(chip: UInt8Image, config: AugmentConfig, rng: np.random.Generator) -> UInt8Image:
    """Augment a copy of a chip.

    Args:
        chip: (h, w, 3) uint8 RGB.
        config: what to do.
        rng: random generator; 14 numbers are drawn from it.

    Returns:
        A chip of the same shape.
    """
    # The numbers are always drawn, whichever steps are enabled.
    chances = rng.random(6)
    amounts = rng.random(8)
    if chances[0] < config.crop:
        chip = _warp(chip, config, amounts[:3])
    if chances[1] < config.flip:
        chip = chip[:, ::-1]
    if chances[2] < config.colour:
        chip = _change_colour(chip, config, amounts[3:6])
    # Luminance (h, w) becomes all three channels.
    if chances[3] < config.grey:
        chip = np.repeat(np.rint(chip @ _LUMA).astype(np.uint8)[..., None], 3, axis=2)
    if chances[4] < config.blur:
        # A deviation of 0 would make the filter choose one from its size.
        sigma = max(float(amounts[6]) * config.blur_sigma, 1e-3)
        chip = np.asarray(cv2.GaussianBlur(np.ascontiguousarray(chip), (0, 0), sigma), np.uint8)
    if chances[5] < config.jpeg:
        low, high = sorted((config.jpeg_lowest, config.jpeg_highest))
        chip = _recompress(chip, round(low + float(amounts[7]) * (high - low)))
    return np.array(chip, np.uint8, order="C")


def _warp(chip: UInt8Image, config: AugmentConfig, amounts: Float64) -> UInt8Image:
    """Shift the chip, and zoom it about its centre."""
    # Draw movement and zoom from symmetric ranges, and keep the centre fixed under the zoom.
    height, width = chip.shape[:2]
    dx, dy, zoom = (2 * amounts - 1) * (config.shift * width, config.shift * height, config.zoom)
    scale = 1 + zoom
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = centre - scale * centre + (dx, dy)
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    return np.asarray(cv2.warpAffine(chip, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101), np.uint8)


def _change_colour(chip: UInt8Image, config: AugmentConfig, amounts: Float64) -> UInt8Image:
    """Change brightness, then contrast about the mean luminance, then saturation about each pixel's luminance."""
    factors = 1 + (2 * amounts - 1) * (config.brightness, config.contrast, config.saturation)
    brightness, contrast, saturation = factors
    # Compute in float32 throughout, and round once at the end.
    values = chip.astype(np.float32) * np.float32(brightness)
    mean = np.float32((values @ _LUMA).mean())
    values = (values - mean) * np.float32(contrast) + mean
    luma = (values @ _LUMA)[..., None]
    return np.clip(np.rint((values - luma) * np.float32(saturation) + luma), 0, 255).astype(np.uint8)


def _recompress(chip: UInt8Image, quality: int) -> UInt8Image:
    bgr = cv2.cvtColor(np.ascontiguousarray(chip), cv2.COLOR_RGB2BGR)
    jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB), np.uint8)
