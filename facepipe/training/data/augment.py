"""Augmentation of one chip: a pure function of the chip, the config and a random generator. The chip is not touched.

All random numbers are drawn up front, so that what one step does never depends on which others are switched on.
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
    """How chips are varied. `flip`, `crop`, `colour`, `grey`, `blur` and `jpeg` are probabilities, each for itself.

    flip: mirrored left to right
    crop: moved and zoomed about the centre by one bilinear warp, the border mirrored
    shift: the most it is moved, as a share of the side; zoom: the most it is enlarged or shrunk, as a share
    colour: brightness, contrast and saturation are each multiplied by up to 1 plus or minus their share
    grey: luminance alone (ITU-R BT.601)
    blur: Gaussian, with a standard deviation of up to `blur_sigma` pixels
    jpeg: compressed with a quality between `jpeg_lowest` and `jpeg_highest`, and decoded again
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
    """A varied copy of a chip (h, w, 3) uint8 RGB, of the same shape; takes 14 numbers from the generator."""
    happens, draw = rng.random(6), rng.random(8)
    if happens[0] < config.crop:
        chip = _warp(chip, config, draw[:3])
    if happens[1] < config.flip:
        chip = chip[:, ::-1]
    if happens[2] < config.colour:
        chip = _change_colour(chip, config, draw[3:6])
    if happens[3] < config.grey:
        chip = np.repeat(np.rint(chip @ _LUMA).astype(np.uint8)[..., None], 3, axis=2)
    if happens[4] < config.blur:
        sigma = max(float(draw[6]) * config.blur_sigma, 1e-3)
        chip = np.asarray(cv2.GaussianBlur(np.ascontiguousarray(chip), (0, 0), sigma), np.uint8)
    if happens[5] < config.jpeg:
        low, high = sorted((config.jpeg_lowest, config.jpeg_highest))
        chip = _recompress(chip, round(low + float(draw[7]) * (high - low)))
    return np.array(chip, np.uint8, order="C")


def _warp(chip: UInt8Image, config: AugmentConfig, draw: Float64) -> UInt8Image:
    """Shifted and zoomed about the chip's centre."""
    height, width = chip.shape[:2]
    dx, dy, zoom = (2 * draw - 1) * (config.shift * width, config.shift * height, config.zoom)
    scale = 1 + zoom
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = centre - scale * centre + (dx, dy)
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    return np.asarray(cv2.warpAffine(chip, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101), np.uint8)


def _change_colour(chip: UInt8Image, config: AugmentConfig, draw: Float64) -> UInt8Image:
    """Brightness, then contrast about the mean luminance, then saturation about each pixel's luminance."""
    brightness, contrast, saturation = 1 + (2 * draw - 1) * (config.brightness, config.contrast, config.saturation)
    values = chip.astype(np.float32) * np.float32(brightness)
    mean = np.float32((values @ _LUMA).mean())
    values = (values - mean) * np.float32(contrast) + mean
    luma = (values @ _LUMA)[..., None]
    return np.clip(np.rint((values - luma) * np.float32(saturation) + luma), 0, 255).astype(np.uint8)


def _recompress(chip: UInt8Image, quality: int) -> UInt8Image:
    bgr = cv2.cvtColor(np.ascontiguousarray(chip), cv2.COLOR_RGB2BGR)
    data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB), np.uint8)
