"""The card of a model: what it is, where its weights come from, under which licence, and what it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from facepipe.imaging.alignment import ChipLayout
from facepipe.imaging.dlib_chip import BoxToSquare


@dataclass(frozen=True)
class Card:
    """One model.

    Attributes:
        name: What galleries call it.
        role: "detector", "embedder" or "quality".
        summary: One line for lists.
        weights: Where the weights come from.
        licence: Licence of the weights.
        sha256: Hash of the weights. For a model with a TOML file: hash of everything that its vectors depend on.
        input: What the model takes, in words.
        load: Loads the model: (device, threads, limits) -> Detector, or (device, threads) -> Embedder or QualityModel.
        layout: How the chips of an embedder are cut.
        dim: Length of an embedder's vectors.
        metric: What `same_person` is measured in.
        same_person: Distance that separates the pairs of LFW View 2 best.
        copy_limits: Distances up to which faces are of copies, by the names of `DuplicateRule`, if they were measured
            (`facepipe models measure`).
        square: Where dlib would put its square about a detector's box: centre (dx, dy) and side, in units of the
            geometric mean of the box's sides. None if the boxes are dlib's own.
        square_known: Whether `square` was measured for this detector.
        turn_model: Which model of `models.detectors.turns` tells from a detector's output how a face is turned.
            None if the detector has no landmarks of its own.
        for_tests: Whether it only serves tests; lists leave it out.
        parameters: Number of trainable parameters, excluding batch-norm statistics.
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
    copy_limits: dict[str, float] | None = None
    square: BoxToSquare | None = None
    square_known: bool = True
    turn_model: str | None = None
    parameters: int | None = None
    for_tests: bool = False
