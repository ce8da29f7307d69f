"""The settings of `train`: of an embedder, or of a detector if there is a section `detection`."""

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from facepipe.config import build
from facepipe.errors import ConfigError
from facepipe.storage import is_remote
from facepipe.training.comparison import VerificationSetConfig
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
class BatchSize:
    """The size of a batch in the units that workers share.

    Attributes:
        name: what it counts, for error messages.
        value: number per batch.
    """

    name: str
    value: int


@dataclass(frozen=True)
class TrainConfig:
    """Configure the training of an embedder.

    Attributes:
        data: training data.
        model: network and initial weights.
        loss: loss.
        sample: choice of the faces of a batch.
        augment: augmentation of chips.
        split: part of the data that is held out.
        validate: pairs that score the network.
        test: sets of pairs that score the start weights and the resulting model.
        optim: optimiser.
        schedule: length and learning rate.
        run: where the training runs and what it writes.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    test: tuple[VerificationSetConfig, ...] = ()
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: TrainingRunConfig = field(default_factory=TrainingRunConfig)

    @property
    def batch_size(self) -> BatchSize:
        """The number that must divide by the number of workers."""
        # The unit is what must not be split between workers: an identity, a triplet or a face.
        if self.sample.identities:
            return BatchSize("sample.identities", self.sample.identities)
        if self.loss.offline:
            return BatchSize("the number of triplets in sample.batch", self.sample.batch // 3)
        return BatchSize("sample.batch", self.sample.batch)

    def check(self) -> "TrainConfig":
        """Return the config if nothing is wrong that can be seen without reading data.

        Raises:
            ConfigError: Settings contradict each other.
        """
        self.data.check()
        self._check_sampling()
        if self.model.imprint and not has_centres(self.loss):
            name = resolve_loss_config(self.loss).name
            raise ConfigError(f"model.imprint={self.model.imprint} needs class centres, but {name} has none: remove it")
        if not self.validate.pairs and (self.validate.source or self.validate.gallery or self.validate.held_only):
            raise ConfigError("validate.source, gallery and held_only need a pairs file: set validate.pairs")
        if self.schedule.validate != 0 and not self._holds_data_out and not self.validate.pairs:
            _check_without_validation(
                self.schedule, self.run, "nothing is held out (split), and validate.pairs names no file"
            )
        check_lengths(self.model, self.schedule, self.run)
        labels = [test.check().label for test in self.test_sets]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ConfigError(f"several test sets are called {repeated[0]!r}: set test.name")
        return self

    @property
    def test_sets(self) -> list[VerificationSetConfig]:
        """The test sets that name any data."""
        return [test for test in self.test if test.is_set]

    def _check_sampling(self) -> None:
        """Raise ConfigError if the batches do not suit the loss."""
        loss = resolve_loss_config(self.loss)
        if loss.offline and (self.sample.identities or self.sample.batch % 3):
            raise ConfigError(
                "loss.offline mines its own triplets: remove sample.identities, and set sample.batch to three times "
                "the triplets of a batch"
            )
        too_few = self.sample.identities < 2 * self.run.workers or self.sample.images < 2
        if needs_pairs(loss) and too_few:
            raise ConfigError(
                f"{self.loss.name} compares faces of one person and of different persons within each worker's share of "
                f"a batch: set sample.identities to at least {2 * self.run.workers} and sample.images to at least 2"
            )

    @property
    def _holds_data_out(self) -> bool:
        return bool(self.split.names) or (self.split.by != "none" and self.split.held > 0)


@dataclass(frozen=True)
class DetectorConfig:
    """Configure the training of a detector.

    Attributes:
        detection: images, annotations, augmentation and loss.
        model: network and initial weights.
        optim: optimiser.
        schedule: length and learning rate.
        run: where the training runs and what it writes.
    """

    detection: DetectionConfig = field(default_factory=DetectionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: TrainingRunConfig = field(default_factory=TrainingRunConfig)

    @property
    def batch_size(self) -> BatchSize:
        """The number that must divide by the number of workers."""
        return BatchSize("detection.batch", self.detection.batch)

    def check(self) -> "DetectorConfig":
        """Return the config if nothing is wrong that can be seen without reading data.

        Raises:
            ConfigError: There are no annotations, or settings contradict each other.
        """
        if not self.detection.annotations:
            raise ConfigError("detection.annotations is missing: set it to WIDER FACE's label.txt or a file like it")
        if not self.detection.held:
            _check_without_validation(self.schedule, self.run, "detection.held names no annotations")
        check_lengths(self.model, self.schedule, self.run)
        return self


C = TypeVar("C", bound=TrainConfig | DetectorConfig)


def check_lengths(model: ModelConfig, schedule: ScheduleConfig, run: TrainingRunConfig) -> None:
    """Check that no setting of the schedule is without effect.

    Raises:
        ConfigError: A setting would have no effect, such as a milestone after the end.
    """
    # Milestones, warm-up and unfreezing are in the unit of the length: steps if they are set, else epochs.
    length = schedule.steps or schedule.epochs
    if schedule.milestones and schedule.policy != "step":
        raise ConfigError(f"schedule.milestones need policy step, but schedule.policy={schedule.policy}: remove one")
    if schedule.policy == "step" and not schedule.milestones:
        raise ConfigError("schedule.policy=step needs schedule.milestones, which is empty: set where the rate falls")
    if schedule.warmup >= length:
        raise ConfigError(f"schedule.warmup={schedule.warmup:g} is not before the end of the training ({length:g})")
    for milestone in schedule.milestones:
        if milestone >= length:
            raise ConfigError(f"schedule.milestones: {milestone:g} is not before the end of the training ({length:g})")
    if model.unfreeze_at and not model.freeze:
        raise ConfigError(f"model.unfreeze_at={model.unfreeze_at:g} needs model.freeze, which is empty")
    if model.unfreeze_at >= length:
        raise ConfigError(f"model.unfreeze_at={model.unfreeze_at:g} is not before the end of the training ({length:g})")
    if schedule.validate == 0:
        _check_without_validation(schedule, run, "schedule.validate is 0")


def _check_without_validation(schedule: ScheduleConfig, run: TrainingRunConfig, why: str) -> None:
    """Raise ConfigError if a setting needs the validation that is disabled."""
    if run.patience:
        raise ConfigError(f"run.patience={run.patience} needs validation, which is disabled: {why}")
    if schedule.policy == "plateau":
        raise ConfigError(f"schedule.policy=plateau needs validation, which is disabled: {why}")


def resolve_learning_rate(config: C) -> C:
    """Return the config with the learning rate that it stands for, so that reports and checkpoints name it."""
    return replace(config, optim=config.optim.resolve(has_start=bool(config.model.start)))


def read_config(*layers: Tree) -> TrainConfig | DetectorConfig:
    """Build the config from nested mappings, and check it as far as possible without data.

    Args:
        layers: nested mappings; later ones win.

    Raises:
        ConfigError: A setting is unknown, has a wrong value or contradicts another.
    """
    # A section `detection` in any layer decides for a detector.
    kind: type[TrainConfig | DetectorConfig] = TrainConfig
    if any("detection" in layer for layer in layers):
        kind = DetectorConfig
    config = resolve_learning_rate(build(kind, *layers).check())
    run = config.run
    if not run.output:
        raise ConfigError("run.output is missing: set the folder for the model, its checkpoints and the report")
    if is_remote(run.output):
        raise ConfigError(
            f"run.output={run.output!r} is in an object store: set a local folder, because checkpoints are locked and "
            "replaced"
        )
    if run.runner == "inline" and run.workers > 1:
        raise ConfigError(f"run.workers={run.workers} needs run.runner=ray (inline runs one process)")
    size = config.batch_size
    if size.value % run.workers:
        raise ConfigError(f"{size.name} = {size.value} does not divide by run.workers = {run.workers}: use a multiple")
    return config
