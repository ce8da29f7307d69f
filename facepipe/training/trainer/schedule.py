"""The learning rate as a function of the step. Only the reductions on a plateau depend on anything else."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from facepipe.errors import ConfigError
from facepipe.training.trainer.config import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """A schedule in steps.

    Attributes:
        config: the schedule's settings.
        total: steps of the whole training.
        warmup: steps of the linear rise at the beginning.
        milestones: steps at which policy step lowers the learning rate.
    """

    config: ScheduleConfig
    total: int
    warmup: int
    milestones: tuple[int, ...]

    def compute_factor(self, step: int, reductions: int = 0) -> float:
        """Compute the factor on the peak learning rate.

        Args:
            step: number of the step, from 0.
            reductions: how often the learning rate was reduced on a plateau so far.
        """
        # The warm-up rises to the peak in its last step.
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self._compute_decay(step, reductions)

    def _compute_decay(self, step: int, reductions: int) -> float:
        """Compute the factor after the warm-up."""
        config = self.config
        # Policies step and plateau reduce in jumps; the others follow the share that is done.
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


def to_steps(config: ScheduleConfig, length: float, steps_per_epoch: int) -> int:
    """Convert a length of the config, in epochs or steps, to steps. A length above 0 is at least one step."""
    if not length:
        return 0
    unit = 1 if config.steps else steps_per_epoch
    return max(1, round(length * unit))


def get_validation_interval(config: ScheduleConfig, steps_per_epoch: int) -> int:
    """Return the number of steps between two validations, or 0 without validation."""
    if config.validate is None:
        return steps_per_epoch
    return to_steps(config, config.validate, steps_per_epoch)


def build_schedule(config: ScheduleConfig, steps_per_epoch: int) -> Schedule:
    """Convert the config to a schedule in steps.

    Raises:
        ConfigError: The warm-up is longer than the training, or policy step has no milestones.
    """
    # Convert all lengths to steps, and check that they fit each other.
    total = config.steps or max(1, round(config.epochs * steps_per_epoch))
    warmup = to_steps(config, config.warmup, steps_per_epoch)
    milestones = tuple(to_steps(config, m, steps_per_epoch) for m in config.milestones)
    if warmup >= total:
        raise ConfigError(f"schedule.warmup is {warmup} steps, but the training has {total}: set a shorter warm-up")
    if config.policy == "step" and not milestones:
        raise ConfigError("schedule.policy=step needs schedule.milestones, which is empty: set where the rate falls")
    return Schedule(config, total, warmup, milestones)


@dataclass(frozen=True)
class ValidationHistory:
    """The best score so far, and what follows from the later validations.

    Checkpoints hold these fields under these names.

    Attributes:
        best: best score.
        step: step of the best score.
        stale: validations since the best score.
        since: validations since the best score or the last reduction of the learning rate.
        reductions: reductions of the learning rate so far.
        scores: all scores of the best validation, by name.
    """

    best: float = -math.inf
    step: int = 0
    stale: int = 0
    since: int = 0
    reductions: int = 0
    scores: dict[str, float] = field(default_factory=dict)

    def record(self, scores: dict[str, float], step: int, config: ScheduleConfig) -> "ValidationHistory":
        """Return the history with one more validation.

        Args:
            scores: scores by name; "score" decides.
            step: step of the validation.
            config: the schedule, which says after how many stale validations the learning rate falls.
        """
        if scores["score"] > self.best:
            return ValidationHistory(best=scores["score"], step=step, reductions=self.reductions, scores=scores)
        later = replace(self, stale=self.stale + 1, since=self.since + 1)
        if config.policy == "plateau" and later.since > config.plateau_patience:
            return replace(later, since=0, reductions=self.reductions + 1)
        return later

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, for checkpoints."""
        return dict(vars(self))
