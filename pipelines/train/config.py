"""What `train` can be told: of an embedder, or of a detector where there is a section `detection`."""

from dataclasses import dataclass, field
from typing import Any

from facepipe.config import build
from facepipe.errors import ConfigError
from facepipe.storage import is_remote
from facepipe.training.config import ModelConfig
from facepipe.training.data.augment import AugmentConfig
from facepipe.training.data.config import DataConfig
from facepipe.training.data.sampling import SampleConfig
from facepipe.training.data.split import SplitConfig
from facepipe.training.detection.config import DetectionConfig
from facepipe.training.losses import LossConfig, has_centres, needs_pairs, resolve_loss_config
from facepipe.training.trainer.config import OptimConfig, ScheduleConfig, TrainingRunConfig
from facepipe.training.validation import ValidateConfig

Tree = dict[str, Any]


@dataclass(frozen=True)
class TrainConfig:
    """Everything the training of an embedder can be told."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: TrainingRunConfig = field(default_factory=TrainingRunConfig)

    @property
    def worker_share(self) -> tuple[str, int]:
        """What has to divide by the number of workers, and its name."""
        if self.sample.identities:
            return "sample.identities", self.sample.identities
        if self.loss.offline:
            return "the number of triplets in sample.batch", self.sample.batch // 3
        return "sample.batch", self.sample.batch

    def check(self) -> "TrainConfig":
        """Itself, with what can be known to be wrong before any data is read. Raises ConfigError."""
        self.data.check()
        loss = resolve_loss_config(self.loss)
        if loss.offline and (self.sample.identities or self.sample.batch % 3):
            raise ConfigError(
                "loss.offline brings triplets of its own: leave sample.identities out, and set sample.batch to three "
                "times the triplets of a batch"
            )
        if needs_pairs(loss) and (self.sample.identities < 2 * self.run.workers or self.sample.images < 2):
            raise ConfigError(
                f"{self.loss.name} compares faces of one person, and persons, within a worker's share of a batch: set "
                "sample.identities (P, of each worker) and sample.images (K) of at least 2"
            )
        if self.model.imprint and not has_centres(loss):
            raise ConfigError(f"model.imprint starts class centres, and {loss.name} has none: leave it out")
        if not self.validate.pairs and (self.validate.source or self.validate.gallery or self.validate.held_only):
            raise ConfigError("validate.source, gallery and held_only are for a pairs file: set validate.pairs")
        if self.schedule.validate != 0 and self._nothing_held and not self.validate.pairs:
            _check_without_validation(
                self.schedule, self.run, "nothing is held out (split), and validate.pairs names no file"
            )
        check_lengths(self.model, self.schedule, self.run)
        return self

    @property
    def _nothing_held(self) -> bool:
        return not self.split.names and (self.split.by == "none" or not self.split.held)


@dataclass(frozen=True)
class DetectorConfig:
    """Everything the training of a detector can be told."""

    detection: DetectionConfig = field(default_factory=DetectionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: TrainingRunConfig = field(default_factory=TrainingRunConfig)

    @property
    def worker_share(self) -> tuple[str, int]:
        """What has to divide by the number of workers, and its name."""
        return "detection.batch", self.detection.batch

    def check(self) -> "DetectorConfig":
        """Itself. Raises ConfigError where there is nothing to train on."""
        if not self.detection.annotations:
            raise ConfigError("detection.annotations is missing: WIDER FACE's label.txt, or a file like it")
        if not self.detection.held:
            _check_without_validation(self.schedule, self.run, "detection.held names no annotations")
        check_lengths(self.model, self.schedule, self.run)
        return self


def check_lengths(model: ModelConfig, schedule: ScheduleConfig, run: TrainingRunConfig) -> None:
    """Raises ConfigError for settings of the schedule that would have no effect."""
    if schedule.milestones and schedule.policy != "step":
        raise ConfigError(f"schedule.milestones are for policy step, and schedule.policy is {schedule.policy}")
    if schedule.policy == "step" and not schedule.milestones:
        raise ConfigError("schedule.policy is step, and schedule.milestones is empty: say where the rate falls")
    if schedule.warmup >= (schedule.steps or schedule.epochs):
        raise ConfigError(f"schedule.warmup: {schedule.warmup:g} is not before the end of the training")
    late = [m for m in schedule.milestones if m >= (schedule.steps or schedule.epochs)]
    if late:
        raise ConfigError(f"schedule.milestones: {late[0]:g} is not before the end of the training")
    if model.unfreeze_at and not model.freeze:
        raise ConfigError("model.unfreeze_at thaws what model.freeze names, and that is empty")
    if model.unfreeze_at >= (schedule.steps or schedule.epochs):
        raise ConfigError(f"model.unfreeze_at: {model.unfreeze_at:g} is not before the end of the training")
    if schedule.validate == 0:
        _check_without_validation(schedule, run, "schedule.validate is 0")


def _check_without_validation(schedule: ScheduleConfig, run: TrainingRunConfig, why: str) -> None:
    if run.patience or schedule.policy == "plateau":
        what = "run.patience" if run.patience else "schedule.policy plateau"
        raise ConfigError(f"{what} waits for validations to get better, and there are none: {why}")


def read_config(*layers: Tree) -> TrainConfig | DetectorConfig:
    """The config of nested mappings, later ones winning, checked as far as it can be without data."""
    kind: type[TrainConfig | DetectorConfig] = TrainConfig
    if any("detection" in layer for layer in layers):
        kind = DetectorConfig
    found = build(kind, *layers).check()
    run = found.run
    if not run.output:
        raise ConfigError("run.output is missing: the folder that the model, its checkpoints and the report go to")
    if is_remote(run.output):
        raise ConfigError(f"run.output is {run.output!r}: checkpoints are locked and replaced, which needs a disk")
    if run.runner == "inline" and run.workers > 1:
        raise ConfigError(f"run.workers is {run.workers}, and the runner inline has one: take ray")
    name, size = found.worker_share
    if size % run.workers:
        raise ConfigError(f"{name} = {size} does not divide by run.workers = {run.workers}: choose a multiple")
    return found
