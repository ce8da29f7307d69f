"""The settings of the loss. A setting that the loss does not have is an error; it is never ignored."""

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from facepipe.errors import ConfigError

Mining = Literal["batch-all", "batch-hard", "semi-hard"]


@dataclass(frozen=True)
class LossConfig:
    """Configure the loss over embeddings. Defaults are those of each loss's paper.

    Attributes:
        name: loss. Against class centres: softmax, normface, l-softmax, a-softmax (sphereface), am-softmax (cosface),
            arcface, subcenter-arcface, circle, adaface, magface. Among the faces of a batch: circle-pair, triplet,
            cosine. Both: triplet-softmax. pml:NAME or pml:NAME(argument=value) is a loss of pytorch-metric-learning, an
            optional extra.
        miner: pml:NAME, a miner of pytorch-metric-learning that chooses the pairs or triplets of a batch (pml losses).
        scale: factor on cosines. Default: 30 for normface and am-softmax; 64 for cosface, arcface,
            subcenter-arcface, adaface and magface; 256 for circle and 80 for circle-pair (their gamma).
        margin: margin. Default: 0.5 for arcface and subcenter-arcface (radians); 0.35 for am-softmax (cosine); 4 for
            l-softmax and a-softmax (factor on the angle, a whole number); 0.25 for circle; 0.4 for circle-pair; 0.2
            for triplet and triplet-softmax (squared distance of unit vectors); 0 for cosine (cosine below which two
            persons cost nothing); 0.4 for adaface; 0.45 for magface (radians, of the shortest embeddings).
        margin_high: margin of the longest embeddings (magface). Default: 0.8.
        norm_low: length of embeddings below which the margin does not change (magface). Default: 10.
        norm_high: length of embeddings above which the margin does not change (magface). Default: 110.
        norm_weight: weight of the term that draws lengths apart (magface). Default: 35.
        norm_rate: weight of a new batch in the moving averages of lengths (adaface). Default: 0.01.
        concentration: factor on the deviation of a length from the mean, h of the paper (adaface). Default: 0.333.
        easy_margin: apply the margin only to angles below 90 degrees (arcface and subcenter-arcface). Default: false.
        sub_centers: centres per class (subcenter-arcface). Default: 3.
        lambda_base: initial weight of the plain logit (l-softmax and a-softmax). In step t the weight is
            lambda = max(min, base * (1 + gamma * t) ** -power). Default: 1000.
        lambda_gamma: growth per step in that formula. Default: 2.5e-5 for l-softmax, 0.12 for a-softmax.
        lambda_power: exponent in that formula. Default: 35 for l-softmax, 1 for a-softmax.
        lambda_min: minimum in that formula. Default: 0 for l-softmax, 5 for a-softmax.
        mining: how triplets are chosen: batch-all, batch-hard or semi-hard (triplet and triplet-softmax). Default:
            semi-hard.
        offline: mine triplets over the whole training set at the start of each epoch, batch-hard or semi-hard, instead
            of within batches (triplet and triplet-softmax). This compares all pairs of images. Default: false.
        softmax_weight: factor on the classifier's cross-entropy (triplet-softmax). Default: 1.
        sample_rate: share of the class centres that a step compares with, in (0, 1] (partial FC). It saves logits, not
            the optimiser's memory: the other centres still follow their momentum and weight decay. Default: 1.
        sharded: keep a slice of the class centres on each rank, and compare with all of them. Default: false.
    """

    name: str = "arcface"
    miner: str | None = None
    scale: float | None = None
    margin: float | None = None
    margin_high: float | None = None
    norm_low: float | None = None
    norm_high: float | None = None
    norm_weight: float | None = None
    norm_rate: float | None = None
    concentration: float | None = None
    easy_margin: bool | None = None
    sub_centers: int | None = None
    lambda_base: float | None = None
    lambda_gamma: float | None = None
    lambda_power: float | None = None
    lambda_min: float | None = None
    mining: Mining | None = None
    offline: bool | None = None
    softmax_weight: float | None = None
    sample_rate: float | None = None
    sharded: bool | None = None


# Settings that losses share; a loss has exactly the settings for which it has defaults.
_CENTRES: dict[str, Any] = {"sample_rate": 1.0, "sharded": False}
_ARC = {"scale": 64.0, "margin": 0.5, "easy_margin": False, **_CENTRES}
_TRIPLET = {"margin": 0.2, "mining": "semi-hard", "offline": False}
_L_SOFTMAX = {"lambda_base": 1000.0, "lambda_gamma": 2.5e-5, "lambda_power": 35.0, "lambda_min": 0.0}
_A_SOFTMAX = {"lambda_base": 1000.0, "lambda_gamma": 0.12, "lambda_power": 1.0, "lambda_min": 5.0}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "softmax": _CENTRES,
    "normface": {"scale": 30.0, **_CENTRES},
    "l-softmax": {"margin": 4, **_L_SOFTMAX, **_CENTRES},
    "a-softmax": {"margin": 4, **_A_SOFTMAX, **_CENTRES},
    "am-softmax": {"scale": 30.0, "margin": 0.35, **_CENTRES},
    "arcface": _ARC,
    "subcenter-arcface": {"sub_centers": 3, **_ARC},
    "adaface": {"scale": 64.0, "margin": 0.4, "norm_rate": 0.01, "concentration": 0.333, **_CENTRES},
    "magface": {
        "scale": 64.0,
        "margin": 0.45,
        "margin_high": 0.8,
        "norm_low": 10.0,
        "norm_high": 110.0,
        "norm_weight": 35.0,
        **_CENTRES,
    },
    "circle": {"scale": 256.0, "margin": 0.25, **_CENTRES},
    "circle-pair": {"scale": 80.0, "margin": 0.4},
    "triplet": _TRIPLET,
    "triplet-softmax": {**_TRIPLET, "softmax_weight": 1.0, **_CENTRES},
    "cosine": {"margin": 0.0},
}
_ALIASES = {"cosface": "am-softmax", "sphereface": "a-softmax"}
_ALIAS_DEFAULTS: dict[str, dict[str, Any]] = {"cosface": {"scale": 64.0}}  # where the alias's paper differs
# The margin is added to a cosine or a squared distance, and must be below this.
_MARGIN_LIMITS = {
    "am-softmax": 1.0,
    "adaface": 1.0,
    "circle": 1.0,
    "circle-pair": 1.0,
    "cosine": 1.0,
    "triplet": 4.0,
    "triplet-softmax": 4.0,
}
_PAIRED = ("circle-pair", "triplet", "triplet-softmax", "cosine")

NAMES = tuple(sorted((*_DEFAULTS, *_ALIASES)))
_LAMBDAS = ("lambda_base", "lambda_gamma", "lambda_power", "lambda_min")
_QUALITY = ("margin_high", "norm_low", "norm_high", "norm_weight", "norm_rate", "concentration")
_FINITE = ("scale", "margin", *_LAMBDAS, "softmax_weight", *_QUALITY)
PML = "pml:"
"""What the names of losses of pytorch-metric-learning begin with."""


def resolve_loss_name(name: str) -> str:
    """Resolve the alias of a loss.

    Raises:
        ConfigError: There is no such loss. The message suggests the most similar name.
    """
    name = _ALIASES.get(name, name)
    if name.startswith(PML):
        return name
    if name not in _DEFAULTS:
        similar = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"choose from {', '.join(NAMES)}"
        raise ConfigError(f"loss.name: no loss is named {name!r}: {hint}")
    return name


def needs_pairs(config: LossConfig) -> bool:
    """Tell whether a batch must hold several faces per person (P x K sampling with K of at least 2)."""
    if config.name.startswith(PML):
        from facepipe.training.losses.pml import parse_loss

        return not parse_loss(config.name).takes_classes
    return resolve_loss_name(config.name) in _PAIRED and not config.offline


def has_centres(config: LossConfig) -> bool:
    """Tell whether the loss learns a centre per class."""
    return "sample_rate" in _DEFAULTS.get(resolve_loss_name(config.name), {})


def resolve_loss_config(config: LossConfig) -> LossConfig:
    """Fill in the loss's defaults and replace its alias.

    Raises:
        ConfigError: The loss does not have a setting, or a value is out of range.
    """
    name = resolve_loss_name(config.name)
    # What is set must be a setting of this loss; the rest is filled in.
    settings = _DEFAULTS.get(name, {"miner": None})
    defaults = settings | _ALIAS_DEFAULTS.get(config.name, {})
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    own = {key: value for key, value in values.items() if value is not None}
    for key in own.keys() - {"name", *defaults}:
        users = ", ".join(sorted(loss for loss, keys in _DEFAULTS.items() if key in keys))
        if key == "miner":
            raise ConfigError(f"{name} has no loss.miner: miners belong to losses pml:NAME")
        if name.startswith(PML):
            raise ConfigError(f"{name} has no loss.{key}: its arguments stand in its name, pml:NAME(argument=value)")
        raise ConfigError(f"{name} has no loss.{key}: remove it, or use one of {users}")
    resolved = replace(config, **{**defaults, **own, "name": name})
    _check_values(resolved)
    return resolved


def _check_values(config: LossConfig) -> None:
    """Raise ConfigError for a value out of range."""
    for key in _FINITE:
        value = getattr(config, key)
        if not math.isfinite(value or 0):
            raise ConfigError(f"loss.{key}={value}: set a finite number")
    if config.scale is not None and config.scale <= 0:
        raise ConfigError(f"loss.scale={config.scale}: set a number above 0, the factor on cosines")
    # Ranges of the single settings; None means that the loss does not have one.
    if config.margin is not None:
        _check_margin(config, config.margin)
    if config.sub_centers is not None and config.sub_centers < 1:
        raise ConfigError(f"loss.sub_centers={config.sub_centers}: set at least 1 per class")
    if config.sample_rate is not None and not 0 < config.sample_rate <= 1:
        raise ConfigError(f"loss.sample_rate={config.sample_rate}: set a share in (0, 1]; 1 compares with all classes")
    if config.softmax_weight is not None and config.softmax_weight < 0:
        raise ConfigError(f"loss.softmax_weight={config.softmax_weight}: set 0 or more")
    if config.mining not in (None, "batch-all", "batch-hard", "semi-hard"):
        raise ConfigError(f"loss.mining={config.mining!r}: set batch-all, batch-hard or semi-hard")
    if config.offline and config.mining == "batch-all":
        raise ConfigError("loss.offline takes one triplet per anchor: set loss.mining to batch-hard or semi-hard")
    if config.norm_high is not None and not 0 < (config.norm_low or 0) < config.norm_high:
        raise ConfigError(
            f"loss.norm_low={config.norm_low} and loss.norm_high={config.norm_high}: set lengths above 0, the lower "
            "one first"
        )
    if config.norm_rate is not None and not 0 < config.norm_rate <= 1:
        raise ConfigError(f"loss.norm_rate={config.norm_rate}: set a share in (0, 1]")
    if config.margin_high is not None and not (config.margin or 0) <= config.margin_high < 1.5:
        raise ConfigError(
            f"loss.margin_high={config.margin_high} radians: set a margin between loss.margin and a right angle"
        )
    for key in (*_LAMBDAS, "norm_weight", "concentration"):
        value = getattr(config, key)
        if (value or 0) < 0:
            raise ConfigError(f"loss.{key}={value}: set 0 or more")


def _check_margin(config: LossConfig, margin: float) -> None:
    if config.name in ("l-softmax", "a-softmax") and (margin % 1 or margin < 1):
        raise ConfigError(f"loss.margin={margin}: set 1, 2, 3, ..., the factor of {config.name} on the angle")
    if margin < 0:
        raise ConfigError(f"loss.margin={margin}: set 0 or more; a negative margin rewards errors")
    # Margins on a cosine or a distance are bounded; margins on an angle by a right angle.
    limit = _MARGIN_LIMITS.get(config.name)
    if limit is not None and margin >= limit:
        quantity = "squared distance of unit vectors" if limit > 1 else "cosine"
        raise ConfigError(f"loss.margin={margin}: set less than {limit:g}; {config.name} adds it to a {quantity}")
    if config.easy_margin is not None and margin > 1.5:
        raise ConfigError(f"loss.margin={margin} radians: set less than a right angle; 0.5 is usual")
