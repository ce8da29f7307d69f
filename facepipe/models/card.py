"""What is written down about a model: where its weights come from, under which licence, what it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Alignment = Literal["similarity", "eyes", "box", "dlib"]


@dataclass(frozen=True)
class Card:
    """One model.

    load: (device, threads, (min_score, max_iou)) -> Detector, or (device, threads) -> Embedder
    size: (width, height) of an embedder's chips; alignment: how they are cut (imaging/alignment.py)
    template: the five landmarks (x, y) in such a chip, where the alignment is by similarity
    same_person: distance that tells the pairs of LFW View 2 apart best
    square: of a detector, where dlib would put its square box about the face: centre (dx, dy) and side in units of
        the geometric mean of the box's sides; None where the boxes are like dlib's
    parameters: learnt numbers, batch norm statistics left aside
    """

    name: str
    role: str
    summary: str
    weights: str
    licence: str
    sha256: str
    input: str
    load: Callable[..., Any]
    size: tuple[int, int] | None = None
    template: tuple[tuple[float, float], ...] | None = None
    alignment: Alignment = "similarity"
    dim: int | None = None
    metric: str | None = None
    same_person: float | None = None
    square: tuple[float, float, float] | None = None
    parameters: int | None = None
