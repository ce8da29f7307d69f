"""Tell from a face's landmarks and box by how many quarters it is turned.

Detectors were trained on upright faces. A face that lies on its side or upside down is found, with a high score, but
an upright face's landmarks are pressed into a box of the wrong shape. Where the landmarks lie in the box gives it away.

The coefficients in turns.json come from public-domain photos (tests/bench/turn_model.py), one model per detector, and
one of all these for detectors that none was fitted for.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from facepipe.types import Float32, Float64

QUARTERS = 4


def measure_geometry(boxes: Float32, landmarks: Float32) -> Float64:
    """Measure where landmarks lie in their boxes.

    Args:
        boxes: (n, 4).
        landmarks: (n, 5, 2).

    Returns:
        The ten coordinates about the box's centre in units of its mean side, and the box's aspect, (n, 11).
    """
    corners = boxes.astype(np.float64)
    sides = np.maximum(corners[:, 2:] - corners[:, :2], 1e-3)
    centre = (corners[:, :2] + corners[:, 2:]) / 2
    mean_side = np.sqrt(sides.prod(1))
    points = (landmarks.astype(np.float64) - centre[:, None]) / mean_side[:, None, None]
    aspect = np.log(sides[:, 1] / sides[:, 0])
    return np.column_stack([points.reshape(-1, 10), aspect]).clip(-3, 3)


@dataclass(frozen=True)
class TurnModel:
    """A logistic model of four outputs: no turn, and one, two or three quarters clockwise.

    Attributes:
        weights: (4, 11).
        biases: (4,).
    """

    weights: Float64
    biases: Float64

    def predict(self, boxes: Float32, landmarks: Float32) -> Float64:
        """Estimate the probability of each turn, (n, 4)."""
        return self.predict_geometry(measure_geometry(boxes, landmarks))

    def predict_geometry(self, geometry: Float64) -> Float64:
        """Estimate the probability of each turn, (n, 4), from `measure_geometry`."""
        logits = geometry @ self.weights.T + self.biases
        logits -= logits.max(1, keepdims=True)
        odds = np.exp(logits)
        return np.asarray(odds / odds.sum(1, keepdims=True), np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return the coefficients as JSON has them, rounded to five digits."""
        return {
            "weights": [[float(f"{value:.5g}") for value in row] for row in self.weights],
            "biases": [float(f"{value:.5g}") for value in self.biases],
        }


@cache
def load_turn_model(detector: str) -> TurnModel:
    """Load the model of a detector, or of detectors that none was fitted for."""
    models = json.loads(files(__package__).joinpath("turns.json").read_text())
    coefficients = models.get(detector, models["other"])
    return TurnModel(np.array(coefficients["weights"]), np.array(coefficients["biases"]))
