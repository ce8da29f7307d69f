"""The TOML file of a model: what it is called, where its weights are, what it takes, and under which licence."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from facepipe.config import build, read_toml
from facepipe.errors import ConfigError
from facepipe.imaging.alignment import ChipLayout, Kind, scale_arcface_template
from facepipe.models.runtime.preprocess import Input
from facepipe.models.zoo.architectures import ARCHITECTURES, DLIB_TEMPLATE

if TYPE_CHECKING:
    from facepipe.models.checkpoint import State

Numbers = float | tuple[float, float, float]
Metric = Literal["euclidean on unit vectors", "cosine"]
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class InputConfig:
    """What the model is fed; what is not given is the architecture's.

    size: [width, height] of a chip in pixels
    channels: rgb or bgr
    mean, scale: the model sees (x - mean) / scale of 0-255 levels; one number, or one a channel in that order
    alignment: similarity (five landmarks to the template), eyes (level eyes, letterboxed box), box (letterboxed), dlib
    template: arcface (scaled to the size), dlib, or five [x, y] in a chip: eyes, nose, corners of the mouth
    fill: grey level beside a letterboxed box
    """

    size: tuple[int, int] | None = None
    channels: Literal["rgb", "bgr"] | None = None
    mean: Numbers | None = None
    scale: Numbers | None = None
    alignment: Kind | None = None
    template: Literal["arcface", "dlib"] | Points | None = None
    fill: int | None = None


@dataclass(frozen=True)
class CardFile:
    """A model's TOML file.

    name: what galleries call it; role: embedder or detector
    architecture: one of `facepipe models --architectures`; may be left out for an embedder's ONNX graph
    weights: .safetensors, .pth, .pt, .ckpt (a state dict) or .onnx, beside this file; sha256: checked where given
    keys: whose names a checkpoint's tensors have; found by itself where not given
    dim: length of the model's vectors; projection: file that brings another length to 128 (`facepipe models project`)
    metric: what same_person is in; vectors of a gallery are compared by the Euclidean distance of unit vectors
    same_person: distance (or, in `cosine`, similarity) that tells two persons apart best
    licence, source: of the weights; figures: what was measured with it
    """

    name: str
    weights: str
    role: Literal["embedder", "detector"] = "embedder"
    architecture: str = ""
    sha256: str = ""
    keys: str = ""
    dim: int = 128
    projection: str = ""
    metric: Metric = "euclidean on unit vectors"
    same_person: float | None = None
    licence: str = "unknown"
    source: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    input: InputConfig = field(default_factory=InputConfig)


def read_card(path: str | Path) -> CardFile:
    """The TOML file of a model. Raises ConfigError for unknown keys and for what cannot be."""
    found = build(CardFile, read_toml(path))
    if found.architecture and found.architecture not in ARCHITECTURES:
        raise ConfigError(f"{path}: no architecture is called {found.architecture!r}; there are {_names(found.role)}")
    if not found.architecture and not is_onnx(found):
        raise ConfigError(f"{path}: weights that are no .onnx graph need an architecture: {_names(found.role)}")
    if found.architecture and ARCHITECTURES[found.architecture].role != found.role:
        raise ConfigError(f"{path}: {found.architecture} is no {found.role}")
    _check_input(found, str(path))
    return found


def _check_input(card: CardFile, path: str) -> None:
    given = card.input
    if not all(math.isfinite(v) and v for v in _three(given.scale) or ()):
        raise ConfigError(f"{path}: input.scale is {given.scale}, and levels are divided by it")
    if given.size is not None and min(given.size) < 1:
        raise ConfigError(f"{path}: input.size is {list(given.size)}: width and height in pixels")
    if card.role == "embedder" and not card.architecture:
        missing = [name for name in ("size", "channels", "mean", "scale") if getattr(given, name) is None]
        if missing:
            raise ConfigError(
                f"{path}: an ONNX graph does not say what it takes: input.{', input.'.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing"
            )
    if card.role == "detector":
        honoured = ("channels",) if card.architecture.startswith("retinaface") else ()
        ignored = [name for name, value in asdict(given).items() if value is not None and name not in honoured]
        if ignored:
            raise ConfigError(
                f"{path}: input.{', input.'.join(ignored)} cannot be set for {card.architecture or 'a detector'}: it "
                "is fed as its authors feed it"
            )


def to_euclidean_threshold(card: CardFile) -> float | None:
    """The card's threshold as a Euclidean distance of unit vectors."""
    if card.same_person is None or card.metric != "cosine":
        return card.same_person
    if not -1 <= card.same_person <= 1:
        raise ConfigError(f"{card.name}: same_person is {card.same_person}, and a cosine is between -1 and 1")
    return math.sqrt(2 - 2 * card.same_person)


def _names(role: str) -> str:
    return ", ".join(a.name for a in ARCHITECTURES.values() if a.role == role)


def is_onnx(card: CardFile) -> bool:
    """Whether the weights are an ONNX graph, which is run as it is."""
    return card.weights.endswith(".onnx")


def save_model(path: Path, state: "State", card: CardFile) -> Path:
    """Write NAME.safetensors and NAME.toml beside it, the weights first; returns the TOML's path."""
    from safetensors.torch import save

    from facepipe.storage import write

    weights = path.with_suffix(".safetensors")
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    write(str(weights), data)
    written = replace(card, weights=weights.name, sha256=hashlib.sha256(data).hexdigest())
    write(str(path.with_suffix(".toml")), to_toml(written).encode())
    return path.with_suffix(".toml")


def to_toml(card: CardFile) -> str:
    """The file's text; what is the default is left out."""
    tree = {k: v for k, v in asdict(card).items() if v not in ("", None, {}) and k not in ("input", "figures")}
    lines = [f"{key} = {_toml(value)}" for key, value in tree.items()]
    for section, values in (("input", asdict(card.input)), ("figures", card.figures)):
        given = {k: v for k, v in values.items() if v is not None}
        if given:
            lines += ["", f"[{section}]", *(f"{json.dumps(k)} = {_toml(v)}" for k, v in given.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and lists of them are written alike in both


def resolve_chip_layout(card: CardFile) -> ChipLayout:
    """How the embedder's chips are cut. Raises ConfigError where neither file nor architecture says."""
    given, made = card.input, ARCHITECTURES.get(card.architecture)
    known = made.layout if made else None
    size = given.size or (known.size if known else None)
    if size is None:
        raise ConfigError(f"{card.name}: input.size = [width, height] is missing")
    kind = given.alignment or (known.kind if known else "similarity")
    fill = given.fill if given.fill is not None else (known.fill if known else 0)
    return ChipLayout(size, kind, _template(card, size, known) if kind == "similarity" else (), fill)


def _template(card: CardFile, size: tuple[int, int], known: ChipLayout | None) -> Points:
    given = card.input.template
    if given == "arcface":
        return scale_arcface_template(size)
    if given == "dlib":
        return tuple((x * size[0] / 150, y * size[1] / 150) for x, y in DLIB_TEMPLATE)
    if given:
        if len(given) != 5:
            raise ConfigError(f"{card.name}: a template has five points, input.template has {len(given)}")
        return given
    if known is None or not known.template:
        raise ConfigError(f"{card.name}: input.template is missing: arcface, dlib, or five [x, y]")
    return known.template if size == known.size else scale_arcface_template(size)


def resolve_input(card: CardFile) -> Input:
    """Channel order, mean and scale."""
    given, made = card.input, ARCHITECTURES.get(card.architecture)
    known = made.input if made else Input()
    mean, scale = (_three(v) for v in (given.mean, given.scale))
    return Input(given.channels or known.channels, mean or known.mean, scale or known.scale)


def _three(value: Numbers | None) -> tuple[float, float, float] | None:
    return (value, value, value) if isinstance(value, int | float) else value
