"""The TOML file of a model: its name, its weights, what it takes, and its licence."""

import hashlib
import json
import math
import tomllib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from facepipe.config import build, read_toml
from facepipe.errors import ConfigError
from facepipe.imaging.alignment import ChipLayout, Kind, Template, scale_arcface_template
from facepipe.models.runtime.preprocess import Input
from facepipe.models.zoo.architectures import ARCHITECTURES, DLIB_TEMPLATE

if TYPE_CHECKING:
    from facepipe.models.checkpoint import State

Numbers = float | tuple[float, float, float]
Metric = Literal["euclidean on unit vectors", "cosine"]

# What the TOML file of an ONNX embedder must say, because its graph does not.
_REQUIRED_FOR_ONNX = ("size", "channels", "mean", "scale")


@dataclass(frozen=True)
class InputConfig:
    """What the model takes. The architecture's values stand in for missing ones.

    Attributes:
        size: [width, height] of a chip in pixels.
        channels: Channel order, rgb or bgr.
        mean: Level subtracted first: one number, or one per channel in that order.
        scale: Divisor of the difference: one number, or one per channel.
        alignment: How a face is placed: similarity (five landmarks to the template), eyes (level eyes, letterboxed
            box), box (letterboxed) or dlib.
        template: Positions in a chip: arcface (scaled to the size), dlib, or five [x, y] of eyes, nose and corners of
            the mouth.
        fill: Grey level beside a letterboxed box.
    """

    size: tuple[int, int] | None = None
    channels: Literal["rgb", "bgr"] | None = None
    mean: Numbers | None = None
    scale: Numbers | None = None
    alignment: Kind | None = None
    template: Literal["arcface", "dlib"] | Template | None = None
    fill: int | None = None


@dataclass(frozen=True)
class CardFile:
    """A model's TOML file.

    Attributes:
        name: What galleries call the model.
        weights: File beside this one: .onnx, or a state dict as .safetensors, .pth, .pt or .ckpt.
        role: embedder, detector, or quality (a model that scores chips).
        architecture: One of `facepipe models --architectures`; optional for an embedder's ONNX graph.
        sha256: Hash of the weights, checked if set.
        keys: Lineage of a checkpoint's tensor names; detected if empty.
        dim: Length of the model's vectors.
        projection: File that brings long vectors to fewer numbers (`facepipe models project`).
        metric: What `same_person` is measured in. A gallery compares vectors by the Euclidean distance of unit vectors.
        same_person: Distance (or, for `cosine`, similarity) that separates two persons best.
        licence: Licence of the weights.
        source: Where the weights come from.
        figures: What was measured with the model.
        input: What the model takes.
    """

    name: str
    weights: str
    role: Literal["embedder", "detector", "quality"] = "embedder"
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
    """Read the TOML file of a model.

    Raises:
        ConfigError: A key is unknown, or values contradict each other.
    """
    card = build(CardFile, read_toml(path))
    # The architecture must exist, be there unless the weights are a graph, and have the file's role.
    architectures = _format_architectures(card.role)
    if card.architecture and card.architecture not in ARCHITECTURES:
        raise ConfigError(f"{path}: no architecture is called {card.architecture!r}; there are {architectures}")
    if not card.architecture and not is_onnx(card):
        raise ConfigError(f"{path}: weights that are not an .onnx graph need an architecture: {architectures}")
    if card.architecture and ARCHITECTURES[card.architecture].role != card.role:
        owner = "a detector" if card.role == "detector" else "an embedder"
        if card.role == "quality":
            raise ConfigError(f"{path}: a quality model is an .onnx graph, without an architecture")
        raise ConfigError(f"{path}: {card.architecture} is not an architecture of {owner}: {architectures}")
    _check_input(card, str(path))
    return card


def _check_input(card: CardFile, path: str) -> None:
    values = card.input
    if not all(math.isfinite(v) and v for v in _expand(values.scale) or ()):
        raise ConfigError(f"{path}: input.scale is {values.scale}, and levels are divided by it")
    if values.size is not None and min(values.size) < 1:
        raise ConfigError(f"{path}: input.size is {list(values.size)}: width and height in pixels")
    if card.role != "detector" and not card.architecture:
        missing = [name for name in _REQUIRED_FOR_ONNX if getattr(values, name) is None]
        if missing:
            raise ConfigError(
                f"{path}: an ONNX graph does not say what it takes: input.{', input.'.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing"
            )
    if card.role == "detector":
        # Only RetinaFace can take either channel order.
        allowed = ("channels",) if card.architecture.startswith("retinaface") else ()
        ignored = [name for name, value in asdict(values).items() if value is not None and name not in allowed]
        if ignored:
            raise ConfigError(
                f"{path}: input.{', input.'.join(ignored)} cannot be set for {card.architecture or 'a detector'}: it "
                "is fed as its authors feed it"
            )


def to_euclidean_threshold(card: CardFile) -> float | None:
    """Convert the card's threshold to a Euclidean distance of unit vectors.

    Raises:
        ConfigError: A cosine is not between -1 and 1.
    """
    if card.same_person is None or card.metric != "cosine":
        return card.same_person
    if not -1 <= card.same_person <= 1:
        raise ConfigError(f"{card.name}: same_person is {card.same_person}, and a cosine is between -1 and 1")
    # Unit vectors: |a - b|^2 = 2 - 2 cos.
    return math.sqrt(2 - 2 * card.same_person)


def _format_architectures(role: str) -> str:
    return ", ".join(architecture.name for architecture in ARCHITECTURES.values() if architecture.role == role)


def is_onnx(card: CardFile) -> bool:
    """Return whether the weights are an ONNX graph, which runs unchanged."""
    return card.weights.endswith(".onnx")


def save_model(path: Path, state: "State", card: CardFile) -> Path:
    """Write NAME.safetensors and NAME.toml, the weights first.

    Args:
        path: NAME, with any suffix.
        state: Tensors by name.
        card: What the TOML file says; `weights` and `sha256` are filled in.

    Returns:
        The path of the TOML file.
    """
    from safetensors.torch import save

    from facepipe.storage import write

    weights_path = path.with_suffix(".safetensors")
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    write(str(weights_path), data)
    complete_card = replace(card, weights=weights_path.name, sha256=hashlib.sha256(data).hexdigest())
    write(str(path.with_suffix(".toml")), to_toml(complete_card).encode())
    return path.with_suffix(".toml")


def set_measured_limits(path: Path, card: CardFile, same_person: float, figures: dict[str, float]) -> None:
    """Write `same_person` and figures into a TOML file. Everything else in it stays, comments included.

    Args:
        path: the file.
        card: what it says.
        same_person: distance of unit vectors.
        figures: figures to add or to replace.

    Raises:
        ConfigError: The file cannot be changed without changing what else it says.
    """
    from facepipe.storage import write

    # A card that speaks of cosines keeps to them.
    value = 1 - same_person**2 / 2 if card.metric == "cosine" else same_person
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = _set_values(lines, "", {"same_person": round(value, 4)})
    lines = _set_values(lines, "figures", figures)
    text = "\n".join(lines) + "\n"
    wanted = replace(card, same_person=round(value, 4), figures={**card.figures, **figures})
    try:
        changed = build(CardFile, tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ConfigError):
        changed = None
    if changed != wanted:
        raise ConfigError(
            f"{path} cannot be changed as it is written: add same_person = {value:.4f} to it, above its sections"
        )
    write(str(path), text.encode())


def _set_values(lines: list[str], section: str, values: dict[str, float]) -> list[str]:
    """Set keys of a section of a TOML file, the empty name being what stands above all sections."""
    headers = [n for n, line in enumerate(lines) if line.lstrip().startswith("[")]
    if section:
        begin = next((n + 1 for n in headers if lines[n].split("#")[0].strip() == f"[{section}]"), None)
        if begin is None:
            return [*lines, "", f"[{section}]", *(f"{key} = {_format_value(value)}" for key, value in values.items())]
    else:
        begin = 0
    end = next((n for n in headers if n >= begin), len(lines))
    keys = [line.split("=")[0].strip().strip('"') for line in lines[begin:end]]
    kept = [line for key, line in zip(keys, lines[begin:end], strict=True) if key not in values]
    # New values stand at the end of the section, before its empty lines.
    last = len(kept)
    while last and not kept[last - 1].strip():
        last -= 1
    added = [f"{key} = {_format_value(value)}" for key, value in values.items()]
    return [*lines[:begin], *kept[:last], *added, *kept[last:], *lines[end:]]


def to_toml(card: CardFile) -> str:
    """Format a card as TOML, without the defaults."""
    fields = asdict(card)
    sections = {"input": fields.pop("input"), "figures": fields.pop("figures")}
    lines = [f"{key} = {_format_value(value)}" for key, value in fields.items() if value not in ("", None, {})]
    for section, values in sections.items():
        set_values = {key: value for key, value in values.items() if value is not None}
        if set_values:
            lines += ["", f"[{section}]"]
            lines += [f"{json.dumps(key)} = {_format_value(value)}" for key, value in set_values.items()]
    return "\n".join(lines) + "\n"


def _format_value(value: Any) -> str:
    # TOML writes strings, numbers and lists of them as JSON does.
    return json.dumps(value, ensure_ascii=False)


def resolve_chip_layout(card: CardFile) -> ChipLayout:
    """Resolve how the embedder's chips are cut, from the file and its architecture.

    Raises:
        ConfigError: Neither of them says it.
    """
    # The file's values come first, then the architecture's, then plain defaults.
    values = card.input
    architecture = ARCHITECTURES.get(card.architecture)
    default = architecture.layout if architecture else None
    size = values.size or (default.size if default else None)
    if size is None:
        raise ConfigError(f"{card.name}: input.size = [width, height] is missing")
    kind = values.alignment or (default.kind if default else "similarity")
    fill = values.fill
    if fill is None:
        fill = default.fill if default else 0
    template = _resolve_template(card, size, default) if kind == "similarity" else ()
    return ChipLayout(size, kind, template, fill)


def _resolve_template(card: CardFile, size: tuple[int, int], default: ChipLayout | None) -> Template:
    template = card.input.template
    if template == "arcface":
        return scale_arcface_template(size)
    if template == "dlib":
        return tuple((x * size[0] / 150, y * size[1] / 150) for x, y in DLIB_TEMPLATE)
    if template:
        if len(template) != 5:
            raise ConfigError(f"{card.name}: a template has five points, input.template has {len(template)}")
        return template
    if default is None or not default.template:
        raise ConfigError(f"{card.name}: input.template is missing: arcface, dlib, or five [x, y]")
    # A default template of another size says nothing; ArcFace's can be scaled to any.
    return default.template if size == default.size else scale_arcface_template(size)


def resolve_input(card: CardFile) -> Input:
    """Resolve the channel order, mean and scale, from the file and its architecture."""
    values = card.input
    architecture = ARCHITECTURES.get(card.architecture)
    default = architecture.input if architecture else Input()
    return Input(
        channels=values.channels or default.channels,
        mean=_expand(values.mean) or default.mean,
        scale=_expand(values.scale) or default.scale,
    )


def _expand(value: Numbers | None) -> tuple[float, float, float] | None:
    return (value, value, value) if isinstance(value, int | float) else value
