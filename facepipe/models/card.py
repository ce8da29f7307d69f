"""What is written down about a model: where its weights come from, under which licence, what it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from facepipe.imaging.alignment import ChipLayout


@dataclass(frozen=True)
class Card:
    """One model.

    load: (device, threads, (min_score, max_iou)) -> Detector, or (device, threads) -> Embedder
    layout: how an embedder's chips are cut
    sha256: of the weights; of a model from a TOML file, of everything that its vectors depend on
    same_person: distance that tells the pairs of LFW View 2 apart best
    square: of a detector, where dlib would put its square box about the face: the centre's (dx, dy) and the side in
        units of the geometric mean of the box's sides; None where the boxes are dlib's
    square_known: False where nobody has measured how the detector's boxes lie to dlib's
    parameters: learnt numbers, batch norms' statistics left aside
    """

    name: str
    role: str
    summary: str
    weights: str
    licence: str
    sha256: str
    input: str
    load: Callable[..., Any]
    layout: ChipLayout | None = None
    dim: int | None = None
    metric: str | None = None
    same_person: float | None = None
    square: tuple[float, float, float] | None = None
    square_known: bool = True
    parameters: int | None = None
