"""Try a model: load it as a worker would, and run it on one image."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from facepipe.errors import FacepipeError, ModelError
from facepipe.imaging.alignment import ChipLayout
from facepipe.models.card import Card
from facepipe.models.parity import make_scene_chips
from facepipe.models.protocols import DetectionLimits
from facepipe.models.zoo.card_file import is_onnx, read_card
from facepipe.models.zoo.known import KNOWN_MODELS, KnownModel
from facepipe.models.zoo.loading import load_card, load_embedder, load_net
from facepipe.models.zoo.registry import CARDS, find_card, find_card_file, get_models_folder
from facepipe.schema import DEFAULT_DIM, MAX_DIM, MIN_DIM

_LIMITS = DetectionLimits(min_score=0.5, max_iou=0.4)


@dataclass(frozen=True)
class ModelCheck:
    """A model that was tried.

    Attributes:
        name: What galleries call it.
        role: "detector", "embedder" or "quality".
        architecture: The architecture in its TOML file; empty for registered models.
        licence: Licence of the weights.
        sha256: Fingerprint in a gallery's contract.
        weights: Where the weights come from.
        input: What the model takes, in words.
        layout: How chips are cut, in words; empty for detectors.
        dim: Length of the vectors in a gallery; None for detectors.
        raw_dim: Length of the model's own vectors; None for detectors.
        parameters: Number of trainable parameters, excluding batch-norm statistics; of an ONNX graph all constants.
        milliseconds: Time per chip, or per 640x480 image, on one CPU thread, after a warm-up.
        note: What has to be done before the model can be used.
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
    """Load and run a model.

    Args:
        model: A registered name, or a TOML file.

    Raises:
        ModelError: The model cannot be loaded or run; the message says why.
    """
    path = None if model in CARDS else find_card_file(model)
    role = _find_role(model, path)
    card = find_card(model, role)
    trial = _try_embedder(card, path) if role == "embedder" else _OTHER_TRIALS[role](card)
    return ModelCheck(
        name=card.name,
        role=role,
        architecture=read_card(path).architecture if path else "",
        licence=card.licence,
        sha256=card.sha256,
        weights=card.weights,
        input=card.input,
        layout=describe_layout(card.layout) if card.layout else "",
        dim=card.dim if role == "embedder" else None,
        raw_dim=trial.raw_dim,
        parameters=_count_parameters(card, path),
        milliseconds=round(trial.milliseconds, 2),
        note=trial.note,
    )


def _find_role(model: str, path: Path | None) -> str:
    if path is not None:
        return read_card(path).role
    return CARDS[model].role if model in CARDS else "embedder"


@dataclass(frozen=True)
class _Trial:
    """What a trial measured; see `ModelCheck`."""

    milliseconds: float
    raw_dim: int | None = None
    note: str = ""


def _try_embedder(card: Card, path: Path | None) -> _Trial:
    # Load it raw for the length of its own vectors, and run it as a gallery would if those fit.
    raw = load_embedder(path, "cpu", 1, raw=True) if path else card.load("cpu", 1)
    is_usable = MIN_DIM <= (card.dim or 0) <= MAX_DIM
    embedder = card.load("cpu", 1) if is_usable else raw
    chip = make_scene_chips(embedder.size, 1)
    vectors = embedder.embed(chip)
    if not np.isfinite(vectors).all() or not vectors.any():
        raise ModelError(f"{card.name} gives no usable vector: all of it is 0, or some of it is not finite")
    note = ""
    if not is_usable:
        note = f"a gallery holds vectors of {MIN_DIM} to {MAX_DIM} numbers"
        if raw.dim > MAX_DIM:
            note += ": fit a projection with `facepipe models project`"
    elif (card.dim or 0) > DEFAULT_DIM:
        note = f"{DEFAULT_DIM} numbers take less memory and time: `facepipe models project` fits a projection"
    return _Trial(_measure_milliseconds(lambda: embedder.embed(chip)), raw.dim, note)


def _try_detector(card: Card) -> _Trial:
    detector = card.load("cpu", 1, _LIMITS)
    image = make_scene_chips((640, 480), 1)
    # The first call is slower, so it is not timed.
    detector.detect(image)
    return _Trial(_measure_milliseconds(lambda: detector.detect(image)))


def _try_quality_model(card: Card) -> _Trial:
    model = card.load("cpu", 1)
    chips = make_scene_chips(model.size, 1)
    scores = model.score(chips)
    if not np.isfinite(scores).all():
        raise ModelError(f"{card.name} gives a score of {scores[0]}")
    note = "its scores stand beside `face_quality`, and not in its place (docs/models.md)"
    return _Trial(_measure_milliseconds(lambda: model.score(chips)), note=note)


_OTHER_TRIALS = {"detector": _try_detector, "quality": _try_quality_model}


def _measure_milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _count_parameters(card: Card, path: Path | None) -> int | None:
    if path is None:
        return card.parameters
    file = read_card(path)
    if is_onnx(file):
        import onnx

        graph = onnx.load(str(path.parent / file.weights)).graph
        return sum(int(np.prod(constant.dims)) for constant in graph.initializer)
    return sum(p.numel() for p in load_net(path)[0].parameters())


def describe_layout(layout: ChipLayout) -> str:
    """Describe a layout in words."""
    width, height = layout.size
    alignments = {
        "similarity": "five landmarks to " + ", ".join(f"({x:g}, {y:g})" for x, y in layout.template),
        "eyes": f"eyes level, box letterboxed with {layout.fill}",
        "box": f"box letterboxed with {layout.fill}",
        "dlib": "dlib's own landmarks and chip",
    }
    return f"{width}x{height}, {alignments[layout.kind]}"


@dataclass(frozen=True)
class ListedModel:
    """A model that is registered, or has a TOML file in the models' folder.

    Attributes:
        name: Its name, or that of its file.
        card: Its card; None if the file cannot be used.
        error: Why it cannot be used.
        known: What is known of it, if its file is not here.
    """

    name: str
    card: Card | None
    error: str = ""
    known: KnownModel | None = None


def list_models() -> list[ListedModel]:
    """List the registered models, those with TOML files in the models' folder, and those whose files are not here."""
    models = [ListedModel(card.name, card) for card in CARDS.values() if not card.for_tests]
    paths = sorted(get_models_folder().glob("*.toml"))
    for path in paths:
        try:
            models.append(ListedModel(path.stem, load_card(path)))
        except FacepipeError as error:
            models.append(ListedModel(path.stem, None, str(error)))
    listed = {model.name for model in models}
    missing = [ListedModel(name, None, known=known) for name, known in KNOWN_MODELS.items() if name not in listed]
    return models + missing
