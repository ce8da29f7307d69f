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
    """The scores of the start weights, the best score in training, and what follows from the later validations.

    Checkpoints hold these fields under these names. Patience and reductions depend on validations in training only: a
    network that is fine-tuned may be worse than its start for a while.

    Attributes:
        best: best score in training.
        step: step of the best score.
        stale: validations since the best score.
        since: validations since the best score or the last reduction of the learning rate.
        reductions: reductions of the learning rate so far.
        scores: all scores of the best validation, by name.
        start: scores of the start weights, by name; empty if they were not scored.
        keeps_start: whether no validation in training was better than the start weights, which then are the model.
    """

    best: float = -math.inf
    step: int = 0
    stale: int = 0
    since: int = 0
    reductions: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    keeps_start: bool = False

    @property
    def model_step(self) -> int:
        """Step of the weights that are the model so far; 0: the start weights."""
        return 0 if self.keeps_start else self.step

    @property
    def model_scores(self) -> dict[str, float]:
        """Scores of the weights that are the model so far, by name."""
        return self.start if self.keeps_start else self.scores

    def record_start(self, scores: dict[str, float]) -> "ValidationHistory":
        """Return the history with the scores of the start weights."""
        return replace(self, start=scores, keeps_start=True)

    def record(
        self, scores: dict[str, float], step: int, config: ScheduleConfig, *, starts_at_random: bool = False
    ) -> "ValidationHistory":
        """Return the history with one more validation in training.

        Args:
            scores: scores by name; "score" decides.
            step: step of the validation.
            config: the schedule, which says after how many stale validations the learning rate falls.
            starts_at_random: whether the start weights are random. Equal scores are then for the trained network; else
                they are for the start weights.
        """
        if scores["score"] > self.best:
            keeps_start = self.keeps_start and not _beats(scores, self.start, ties=starts_at_random)
            return replace(
                self, best=scores["score"], step=step, stale=0, since=0, scores=scores, keeps_start=keeps_start
            )
        later = replace(self, stale=self.stale + 1, since=self.since + 1)
        if config.policy == "plateau" and later.since > config.plateau_patience:
            return replace(later, since=0, reductions=self.reductions + 1)
        return later

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, for checkpoints."""
        return dict(vars(self))


def _beats(scores: dict[str, float], start: dict[str, float], *, ties: bool) -> bool:
    """Tell whether a validation is better than that of the start, or with `ties` equal to it."""
    return scores["score"] > start["score"] or (ties and scores["score"] == start["score"])
