"""What an objective can be told; a setting that the named loss does not have is an error, never ignored."""

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from facepipe.errors import ConfigError

Mining = Literal["batch-all", "batch-hard", "semi-hard"]


@dataclass(frozen=True)
class LossConfig:
    """Which loss the embeddings are trained with. What is not set has the default of that loss's paper.

    name: against class centres: softmax, normface, l-softmax, a-softmax (sphereface), am-softmax (cosface), arcface,
        subcenter-arcface, circle; among the faces of a batch: circle-pair, triplet, cosine; both: triplet-softmax
    scale: what cosines are multiplied by: normface and am-softmax 30, cosface, arcface and subcenter-arcface 64;
        circle's gamma: 256, circle-pair 80
    margin: arcface and subcenter-arcface 0.5 (radians), am-softmax 0.35 (cosine), l-softmax and a-softmax 4 (times the
        angle, a whole number), circle 0.25, circle-pair 0.4, triplet and triplet-softmax 0.2 (squared distance of unit
        vectors), cosine 0 (cosine up to which two persons cost nothing)
    easy_margin: arcface and subcenter-arcface: the margin only where the angle is below 90 degrees; default false
    sub_centers: subcenter-arcface: centres a class, 3
    lambda_base, lambda_gamma, lambda_power, lambda_min: l-softmax and a-softmax: the plain logit counts lambda times in
        step t, lambda = max(min, base * (1 + gamma * t) ** -power); l-softmax 1000, 2.5e-5, 35, 0;
        a-softmax 1000, 0.12, 1, 5
    mining: triplet and triplet-softmax: batch-all, batch-hard or semi-hard; default semi-hard
    offline: triplet and triplet-softmax: triplets are mined over the whole training set at the beginning of each epoch,
        batch-hard or semi-hard, not within batches; the time is that of all pairs; default false
    softmax_weight: triplet-softmax: what the classifier's cross-entropy is multiplied by; default 1
    sample_rate: partial FC: the share of class centres a step compares with, in (0, 1]; default 1. It saves logits, not
        the optimiser's memory: centres that are left out still follow their momentum and weight decay
    sharded: every rank keeps a slice of the class centres and all compare with all of them; default false
    """

    name: str = "arcface"
    scale: float | None = None
    margin: float | None = None
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


_CENTRES: dict[str, Any] = {"sample_rate": 1.0, "sharded": False}
_ARC = {"scale": 64.0, "margin": 0.5, "easy_margin": False, **_CENTRES}
_TRIPLET = {"margin": 0.2, "mining": "semi-hard", "offline": False}
_L = {"lambda_base": 1000.0, "lambda_gamma": 2.5e-5, "lambda_power": 35.0, "lambda_min": 0.0}
_A = {"lambda_base": 1000.0, "lambda_gamma": 0.12, "lambda_power": 1.0, "lambda_min": 5.0}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "softmax": _CENTRES,
    "normface": {"scale": 30.0, **_CENTRES},
    "l-softmax": {"margin": 4, **_L, **_CENTRES},
    "a-softmax": {"margin": 4, **_A, **_CENTRES},
    "am-softmax": {"scale": 30.0, "margin": 0.35, **_CENTRES},
    "arcface": _ARC,
    "subcenter-arcface": {"sub_centers": 3, **_ARC},
    "circle": {"scale": 256.0, "margin": 0.25, **_CENTRES},
    "circle-pair": {"scale": 80.0, "margin": 0.4},
    "triplet": _TRIPLET,
    "triplet-softmax": {**_TRIPLET, "softmax_weight": 1.0, **_CENTRES},
    "cosine": {"margin": 0.0},
}
_ALIASES = {"cosface": "am-softmax", "sphereface": "a-softmax"}
_ALIAS_DEFAULTS: dict[str, dict[str, Any]] = {"cosface": {"scale": 64.0}}  # where a paper's differ from its twin's
_MOST_MARGIN = {
    "am-softmax": 1.0,
    "circle": 1.0,
    "circle-pair": 1.0,
    "cosine": 1.0,
    "triplet": 4.0,
    "triplet-softmax": 4.0,
}
_PAIRED = ("circle-pair", "triplet", "triplet-softmax", "cosine")

NAMES = tuple(sorted((*_DEFAULTS, *_ALIASES)))


def resolve_loss_name(name: str) -> str:
    """The loss that a name or alias stands for; ConfigError where there is none, with the nearest name."""
    name = _ALIASES.get(name, name)
    if name not in _DEFAULTS:
        near = difflib.get_close_matches(name, NAMES, n=1)
        raise ConfigError(f"no loss is named {name!r}: " + (f"did you mean {near[0]}?" if near else ", ".join(NAMES)))
    return name


def needs_pairs(config: LossConfig) -> bool:
    """Whether a batch must hold several faces of a person (P x K sampling with K of at least 2)."""
    return resolve_loss_name(config.name) in _PAIRED and not config.offline


def has_centres(config: LossConfig) -> bool:
    """Whether the loss learns a centre for every class."""
    return "sample_rate" in _DEFAULTS[resolve_loss_name(config.name)]


def resolve_loss_config(config: LossConfig) -> LossConfig:
    """The config with the loss's defaults filled in and its alias replaced; ConfigError where it cannot be used."""
    name = resolve_loss_name(config.name)
    defaults = _DEFAULTS[name] | _ALIAS_DEFAULTS.get(config.name, {})
    given = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) is not None}
    for key in given.keys() - {"name", *defaults}:
        users = ", ".join(sorted(n for n, d in _DEFAULTS.items() if key in d))
        raise ConfigError(f"loss.{key} means nothing to {name}: leave it out, or use one of {users}")
    full = replace(config, **{**defaults, **given, "name": name})
    _check_values(full)
    return full


def _check_values(config: LossConfig) -> None:
    whole = config.name in ("l-softmax", "a-softmax")
    for key in ("scale", "margin", "lambda_base", "lambda_gamma", "lambda_power", "lambda_min", "softmax_weight"):
        if not math.isfinite(getattr(config, key) or 0):
            raise ConfigError(f"loss.{key} is {getattr(config, key)}: give a finite number")
    if config.scale is not None and config.scale <= 0:
        raise ConfigError(f"loss.scale is {config.scale}: cosines are multiplied by it, give a number above 0")
    if config.margin is not None and whole and (config.margin % 1 or config.margin < 1):
        raise ConfigError(
            f"loss.margin is {config.margin}: {config.name} multiplies the angle by it, give 1, 2, 3, ..."
        )
    if config.margin is not None and config.margin < 0:
        raise ConfigError(f"loss.margin is {config.margin}: a negative margin rewards errors, give 0 or more")
    most = _MOST_MARGIN.get(config.name)
    if most is not None and config.margin is not None and config.margin >= most:
        what = "squared distance of unit vectors" if most > 1 else "cosine"
        raise ConfigError(f"loss.margin is {config.margin}: {config.name} adds it to a {what}, give less than {most:g}")
    if config.easy_margin is not None and config.margin is not None and config.margin > 1.5:
        raise ConfigError(f"loss.margin is {config.margin} radians: give less than a right angle, 0.5 is usual")
    if config.sub_centers is not None and config.sub_centers < 1:
        raise ConfigError(f"loss.sub_centers is {config.sub_centers}: every class has at least 1")
    if config.sample_rate is not None and not 0 < config.sample_rate <= 1:
        raise ConfigError(
            f"loss.sample_rate is {config.sample_rate}: give a share in (0, 1], 1 compares with all classes"
        )
    if config.softmax_weight is not None and config.softmax_weight < 0:
        raise ConfigError(f"loss.softmax_weight is {config.softmax_weight}: give 0 or more")
    if config.mining not in (None, "batch-all", "batch-hard", "semi-hard"):
        raise ConfigError(f"loss.mining is {config.mining!r}: give batch-all, batch-hard or semi-hard")
    if config.offline and config.mining == "batch-all":
        raise ConfigError("loss.offline takes one triplet an anchor: give loss.mining batch-hard or semi-hard")
    for key in ("lambda_base", "lambda_gamma", "lambda_power", "lambda_min"):
        if (getattr(config, key) or 0) < 0:
            raise ConfigError(f"loss.{key} is {getattr(config, key)}: give 0 or more")
