"""Trying a model out: it is loaded as a worker would load it, and run on one picture."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facepipe.errors import FacepipeError, ModelError
from facepipe.imaging.alignment import ChipLayout
from facepipe.models.card import Card
from facepipe.models.parity import make_scene_chips
from facepipe.models.zoo.card_file import is_onnx, read_card
from facepipe.models.zoo.registry import CARDS, MODELS_FOLDER, find_card, find_card_file
from facepipe.schema import EMBEDDING_DIM

_LIMITS = (0.5, 0.4)


@dataclass(frozen=True)
class ModelCheck:
    """What was found. dim: of the vectors that a gallery gets; raw_dim: of the model's own; None for detectors.

    parameters: learnt numbers, batch norms' statistics left aside; of an ONNX graph all its constants
    milliseconds: of one chip, or one 640x480 picture, on one CPU thread, after a first one
    """

    name: str
    role: str
    architecture: str
    licence: str
    sha256: str
    weights: str
    input: str
    layout: str
    dim: int | None
    raw_dim: int | None
    parameters: int | None
    milliseconds: float
    note: str = ""


def check_model(model: str) -> ModelCheck:
    """Load and run a registered model or that of a TOML file. Raises ModelError, with why, where that fails."""
    path = None if model in CARDS else find_card_file(model)
    role = read_card(path).role if path else CARDS[model].role if model in CARDS else "embedder"
    found = find_card(model, role)
    raw_dim, spent, note = (None, _detect(found), "") if role == "detector" else _embed(found, path)
    return ModelCheck(
        name=found.name,
        role=role,
        architecture=read_card(path).architecture if path else "",
        licence=found.licence,
        sha256=found.sha256,
        weights=found.weights,
        input=found.input,
        layout=describe_layout(found.layout) if found.layout else "",
        dim=None if role == "detector" else found.dim,
        raw_dim=raw_dim,
        parameters=_parameters(found, path),
        milliseconds=round(spent, 2),
        note=note,
    )


def _embed(found: Card, path: Path | None) -> tuple[int, float, str]:
    from facepipe.models.zoo.loading import load_embedder

    raw = load_embedder(path, "cpu", 1, raw=True) if path else found.load("cpu", 1)
    usable = found.dim == EMBEDDING_DIM
    made = found.load("cpu", 1) if usable else raw
    chip = make_scene_chips(made.size, 1)
    vectors = made.embed(chip)
    if not np.isfinite(vectors).all() or not vectors.any():
        raise ModelError(f"{found.name} gives no usable vector: all of it is 0, or some of it is not finite")
    note = (
        "" if usable else f"a gallery holds {EMBEDDING_DIM}-D vectors: fit a projection with `facepipe models project`"
    )
    return raw.dim, _milliseconds(lambda: made.embed(chip)), note


def _detect(found: Card) -> float:
    made = found.load("cpu", 1, _LIMITS)
    picture = make_scene_chips((640, 480), 1)
    made.detect(picture)
    return _milliseconds(lambda: made.detect(picture))


def _milliseconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def _parameters(found: Card, path: Path | None) -> int | None:
    if path is None:
        return found.parameters
    file = read_card(path)
    if is_onnx(file):
        import onnx

        graph = onnx.load(str(path.parent / file.weights)).graph
        return sum(int(np.prod(constant.dims)) for constant in graph.initializer)
    from facepipe.models.zoo.loading import load_net

    return sum(p.numel() for p in load_net(path)[0].parameters())


def describe_layout(layout: ChipLayout) -> str:
    """A layout in words."""
    width, height = layout.size
    how = {
        "similarity": "five landmarks to " + ", ".join(f"({x:g}, {y:g})" for x, y in layout.template),
        "eyes": f"eyes level, box letterboxed with {layout.fill}",
        "box": f"box letterboxed with {layout.fill}",
        "dlib": "dlib's own landmarks and chip",
    }
    return f"{width}x{height}, {how[layout.kind]}"


def list_models() -> Iterator[tuple[Card | None, str, str]]:
    """(card, name, why there is none) of what is registered and of the TOML files in the models' folder."""
    for found in CARDS.values():
        yield found, found.name, ""
    folder = os.environ.get(MODELS_FOLDER)
    for path in sorted(Path(folder).glob("*.toml")) if folder else []:
        from facepipe.models.zoo.loading import load_card

        try:
            yield load_card(path), path.stem, ""
        except FacepipeError as error:
            yield None, path.stem, str(error)
