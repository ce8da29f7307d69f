"""Compare the vectors that two engines compute from the same seeded chips."""

import cv2
import numpy as np

from facepipe.errors import ModelError
from facepipe.models.projection import to_unit_vectors
from facepipe.models.protocols import Embedder
from facepipe.types import UInt8Image

# Of unit vectors: a hundredth of what separates two persons, and a hundred times the rounding of float32.
TOLERANCE = 1e-4
_CHIPS = 10  # more than one run of ONNX Runtime takes


def make_noise_chips(size: tuple[int, int], n: int = _CHIPS, seed: int = 0) -> UInt8Image:
    """Make chips of independent levels.

    Args:
        size: (width, height).
        n: Number of chips.
        seed: Random seed.

    Returns:
        (n, h, w, 3).
    """
    return np.random.default_rng(seed).integers(0, 256, (n, size[1], size[0], 3), np.uint8)


def make_scene_chips(size: tuple[int, int], n: int = _CHIPS, seed: int = 0) -> UInt8Image:
    """Make chips with structure at every scale; their spectra fall as those of photographs do (Field, 1987).

    Args:
        size: (width, height).
        n: Number of chips.
        seed: Random seed.

    Returns:
        (n, h, w, 3).
    """
    rng = np.random.default_rng(seed)
    sides = [side for side in (2, 4, 8, 16, 32, 64, 128) if side <= max(size)]
    return np.stack([_make_scene(rng, size, sides) for _ in range(n)])


def _make_scene(rng: np.random.Generator, size: tuple[int, int], sides: list[int]) -> UInt8Image:
    # Noise on grids of growing fineness, with falling amplitude.
    layers = [
        cv2.resize(rng.normal(size=(side, side, 3)).astype(np.float32), size, interpolation=cv2.INTER_CUBIC) / k
        for k, side in enumerate(sides, 1)
    ]
    scene = np.sum(layers, axis=0, dtype=np.float32)
    scene = (scene - scene.min()) / max(float(np.ptp(scene)), 1e-6)
    return np.asarray(np.round(scene * 255), np.uint8)


def measure_difference(one: Embedder, other: Embedder) -> float:
    """Measure the largest absolute difference between components of unit vectors.

    Both embedders get noise and scenes, in batches and alone.

    Raises:
        ModelError: The shapes of the vectors differ, or vectors are not finite.
    """
    # Two batches and a single chip.
    worst = 0.0
    for chips in (make_noise_chips(one.size), make_scene_chips(one.size), make_scene_chips(one.size, 1, 1)):
        a = one.embed(chips)
        b = other.embed(chips)
        if a.shape != b.shape:
            raise ModelError(f"the engines give vectors of shape {a.shape} and {b.shape}")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ModelError("the model gives vectors that are not finite")
        worst = max(worst, float(np.abs(to_unit_vectors(a) - to_unit_vectors(b)).max()))
    return worst
