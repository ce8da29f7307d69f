"""The learning rate as a function of the step; only the plateau's reductions depend on anything else."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from facepipe.errors import ConfigError
from facepipe.training.trainer.config import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """A schedule laid out in steps. total: steps of the whole training; warmup, milestones: in steps."""

    config: ScheduleConfig
    total: int
    warmup: int
    milestones: tuple[int, ...]

    def factor(self, step: int, reductions: int = 0) -> float:
        """What the learning rate is multiplied by in a step (from 0 on); reductions: how often a plateau was met."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self._falling(step, reductions)

    def _falling(self, step: int, reductions: int) -> float:
        config = self.config
        if config.policy == "step":
            return config.gamma ** sum(step >= m for m in self.milestones)
        if config.policy == "plateau":
            return max(config.gamma**reductions, config.final)
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        if config.policy == "cosine":
            return config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2
        if config.policy == "poly":
            return config.final + (1 - config.final) * (1 - done) ** config.power
        return 1.0


def in_steps(config: ScheduleConfig, length: float, steps_per_epoch: int) -> int:
    """A length of the config, which is in epochs or in steps, as steps; at least one where it is not 0."""
    unit = 1 if config.steps else steps_per_epoch
    return max(1, round(length * unit)) if length else 0


def validation_steps(config: ScheduleConfig, steps_per_epoch: int) -> int:
    """Steps between two validations; 0 where there are none."""
    return steps_per_epoch if config.validate is None else in_steps(config, config.validate, steps_per_epoch)


def lay_out(config: ScheduleConfig, steps_per_epoch: int) -> Schedule:
    """A schedule in steps, for a task with so many steps an epoch.

    Raises ConfigError where the warm-up is longer than the training, or policy step has no milestones.
    """
    total = config.steps or max(1, round(config.epochs * steps_per_epoch))
    warmup = in_steps(config, config.warmup, steps_per_epoch)
    milestones = tuple(in_steps(config, m, steps_per_epoch) for m in config.milestones)
    if warmup >= total:
        raise ConfigError(f"schedule.warmup is {warmup} steps, and the whole training {total}: shorten it")
    if config.policy == "step" and not milestones:
        raise ConfigError("schedule.policy is step, and schedule.milestones is empty: say where the rate falls")
    return Schedule(config, total, warmup, milestones)


@dataclass(frozen=True)
class Standing:
    """How validations have gone: the best score and its step, and what follows from the later ones.

    stale: validations since the best; since: those since the best or the last reduction of the learning rate
    """

    best: float = -math.inf
    step: int = 0
    stale: int = 0
    since: int = 0
    reductions: int = 0
    scores: dict[str, float] = field(default_factory=dict)  # of the best

    def after(self, scores: dict[str, float], step: int, config: ScheduleConfig) -> "Standing":
        """The standing after a validation at a step."""
        if scores["score"] > self.best:
            return Standing(scores["score"], step, 0, 0, self.reductions, scores)
        later = replace(self, stale=self.stale + 1, since=self.since + 1)
        if config.policy == "plateau" and later.since > config.plateau_patience:
            return replace(later, since=0, reductions=self.reductions + 1)
        return later

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dict(vars(self))
