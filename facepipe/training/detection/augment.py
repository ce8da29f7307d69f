"""Augmentation for detectors, after biubug6's RetinaFace (data/data_augment.py): a pure function of its generator."""

from typing import NamedTuple

import cv2
import numpy as np

from facepipe.training.detection.annotations import AnnotatedFaces
from facepipe.training.detection.config import SceneAugmentConfig
from facepipe.types import Float32, UInt8, UInt8Image

# Kernels of resizing, drawn at random so that the network learns from the artefacts of each.
_KERNELS = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_LANCZOS4)
_MIRRORED = [1, 0, 2, 4, 3]  # landmarks after mirroring
Colour = tuple[float, float, float]
Random = np.random.Generator


class Scene(NamedTuple):
    """An image and its faces.

    Coordinates run from 0 to width and height over the outer edges of the pixels.

    Attributes:
        pixels: (h, w, 3) uint8 RGB.
        faces: annotated faces.
    """

    pixels: UInt8Image
    faces: AnnotatedFaces


def augment_scene(scene: Scene, size: int, fill: Colour, config: SceneAugmentConfig, rng: Random) -> Scene:
    """Cut a square with at least one face from a scene, and change its colours, side and orientation at random.

    Args:
        scene: image with faces.
        size: side of the result, in pixels.
        fill: colour that pads to a square.
        config: what to do.
        rng: random generator.
    """
    scene = crop_scene(scene, config, rng)
    if config.distort:
        scene = scene._replace(pixels=distort_colours(scene.pixels, rng))
    scene = pad_to_square(scene, fill)
    if rng.random() < config.mirror:
        scene = mirror_scene(scene)
    return resize_scene(scene, size, _KERNELS[rng.integers(len(_KERNELS))])


def crop_scene(scene: Scene, config: SceneAugmentConfig, rng: Random) -> Scene:
    """Crop a square that holds a whole face. Faces whose centre is inside are kept, cut off at the border.

    If no such square is found, the scene is returned as it is.
    """
    # Draw squares until one holds a whole face.
    h, w = scene.pixels.shape[:2]
    for _ in range(config.tries):
        side = max(1, int(rng.choice(config.scales) * min(h, w)))
        corner = np.array([rng.integers(w - side + 1), rng.integers(h - side + 1)])
        low = corner.astype(np.float32)
        high = (corner + side).astype(np.float32)
        boxes = scene.faces.boxes
        is_whole = ((boxes[:, :2] >= low) & (boxes[:, 2:] <= high)).all(1)
        if is_whole.any():
            x, y = corner
            return Scene(scene.pixels[y : y + side, x : x + side], _select_inside(scene.faces, low, high))
    return scene


def _select_inside(faces: AnnotatedFaces, low: Float32, high: Float32) -> AnnotatedFaces:
    # Faces by their centre; boxes and landmarks move to the square's corner and end at its border.
    centre = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2
    keep = ((centre > low) & (centre < high)).all(1)
    boxes = (faces.boxes[keep].reshape(-1, 2, 2).clip(low, high) - low).reshape(-1, 4)
    return AnnotatedFaces(boxes, faces.landmarks[keep].clip(low, high) - low)  # NaN stays NaN


def pad_to_square(scene: Scene, fill: Colour) -> Scene:
    """Pad a scene to a square, at the right or at the bottom."""
    h, w = scene.pixels.shape[:2]
    if h == w:
        return scene
    side = max(h, w)
    padded = cv2.copyMakeBorder(scene.pixels, 0, side - h, 0, side - w, cv2.BORDER_CONSTANT, value=fill)
    return scene._replace(pixels=np.asarray(padded, np.uint8))


def mirror_scene(scene: Scene) -> Scene:
    """Mirror a scene left to right: the image, the boxes, and the order of the landmarks."""
    width = np.float32(scene.pixels.shape[1])
    boxes = scene.faces.boxes.copy()
    # Left and right edges swap, so that x1 stays below x2.
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    landmarks = scene.faces.landmarks[:, _MIRRORED].copy()
    landmarks[..., 0] = width - landmarks[..., 0]
    return Scene(np.ascontiguousarray(scene.pixels[:, ::-1]), AnnotatedFaces(boxes, landmarks))


def resize_scene(scene: Scene, size: int, kernel: int) -> Scene:
    """Resize a square scene.

    Args:
        scene: square scene.
        size: new side in pixels.
        kernel: interpolation of OpenCV.
    """
    factor = np.float32(size / scene.pixels.shape[0])
    pixels = np.asarray(cv2.resize(scene.pixels, (size, size), interpolation=kernel), np.uint8)
    return Scene(pixels, AnnotatedFaces(scene.faces.boxes * factor, scene.faces.landmarks * factor))


def distort_colours(pixels: UInt8Image, rng: Random) -> UInt8Image:
    """Change brightness by up to 32 levels, contrast and saturation by up to a half, and hue by up to 36 degrees.

    Each change happens with a probability of one half. The contrast changes before or after the tint.
    """
    contrast_first = rng.random() < 0.5
    if rng.random() < 0.5:
        pixels = _scale_levels(pixels, 1.0, rng.uniform(-32, 32))
    if contrast_first:
        pixels = _change_contrast(pixels, rng)
    pixels = _change_tint(pixels, rng)
    return pixels if contrast_first else _change_contrast(pixels, rng)


def _scale_levels(values: UInt8, factor: float, shift: float) -> UInt8Image:
    """Scale and shift levels, truncated to whole levels between 0 and 255."""
    return np.asarray((values.astype(np.float32) * factor + shift).clip(0, 255), np.uint8)


def _change_contrast(pixels: UInt8Image, rng: Random) -> UInt8Image:
    return _scale_levels(pixels, rng.uniform(0.5, 1.5), 0.0) if rng.random() < 0.5 else pixels


def _change_tint(pixels: UInt8Image, rng: Random) -> UInt8Image:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    # Saturation is scaled; hue turns round its circle of 180 steps.
    if rng.random() < 0.5:
        hsv[..., 1] = _scale_levels(hsv[..., 1], rng.uniform(0.5, 1.5), 0.0)
    if rng.random() < 0.5:
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + rng.integers(-18, 19)) % 180
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)
