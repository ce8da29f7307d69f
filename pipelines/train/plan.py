"""What every worker makes for itself: the task, from a config, a folder of chips and files that all can read."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from facepipe.errors import ConfigError
from facepipe.models.runtime.device import resolve
from facepipe.models.runtime.preprocess import Input
from facepipe.training.data.chip_set import ChipSet
from facepipe.training.data.sampling import Sampler
from facepipe.training.data.split import Rows, SplitConfig, split
from facepipe.training.detection.task import DetectionTask
from facepipe.training.embedding_task import Embed, EmbeddingTask, Examples, embedded
from facepipe.training.imprint import imprint
from facepipe.training.losses import objective
from facepipe.training.start import Start, find
from facepipe.training.trainer import optim, schedule
from facepipe.training.trainer.checkpointing import Checkpoints
from facepipe.training.trainer.config import RunConfig
from facepipe.training.trainer.loop import Settings
from facepipe.training.trainer.task import Task
from facepipe.training.triplet_task import TripletSampler, TripletTask
from facepipe.training.validation import PairSet, read_validation_pairs, verify
from pipelines.train.config import DetectorConfig, TrainConfig

Made = tuple[Task, Settings]


@dataclass(frozen=True)
class EmbedderPlan:
    """The training of an embedder on a chip set. pairs: chip set of the images of `validate.pairs`, if any."""

    config: TrainConfig
    chips: str
    pairs: str = ""

    @property
    def run(self) -> RunConfig:
        return self.config.run

    def __call__(self) -> Made:
        config, seed = self.config, self.run.seed
        start = find(config.model)
        train, _ = self.parts()
        net = start.build(seed, config.model.dropout)
        head = objective(config.loss, start.dim, len(train.identities), seed)
        if config.model.imprint and not Checkpoints(self.run.output).present:
            self._imprint(net, head, start.input, train)
        task = self._task(net, head, train, start.input)
        identity = _identity(config, ("data", "loss", "sample", "augment", "split", "validate"))
        identity |= {"weights": start.sha256, "images": train.info.fingerprint}
        return task, settings(config, task, start, identity)

    def _task(self, net: nn.Module, head: nn.Module, train: ChipSet, fed: Input) -> Task:
        config, seed, judge = self.config, self.run.seed, Judge(self)
        if config.loss.offline:
            triplets = TripletSampler(train.labels, config.loss, config.sample.batch, seed)
            return TripletTask(net, head, Examples(train, triplets, config.augment, judge), fed, seed)
        sampler = Sampler(train.labels, config.sample, seed)
        return EmbeddingTask(net, head, Examples(train, sampler, config.augment, judge), fed, seed)

    def _imprint(self, net: nn.Module, head: nn.Module, fed: Input, train: ChipSet) -> None:
        device = torch.device(resolve(self.run.device))
        net.to(device).eval()
        imprint(head, lambda chips: embedded(net, chips, fed, device), train, self.config.model.imprint)
        net.train()

    def notes(self, train: ChipSet) -> list[str]:
        """What a user should know of the data, with counts."""
        config = self.config
        found = [] if config.loss.offline else list(Sampler(train.labels, config.sample, self.run.seed).notes)
        if self.pairs and not (config.data.exclude or config.data.exclude_identities or config.validate.held_only):
            found.append(
                f"nothing of {config.validate.pairs} is left out of the training data: set data.exclude, "
                "data.exclude_identities or validate.held_only"
            )
        return found

    def parts(self) -> tuple[ChipSet, ChipSet]:
        """Chips to train on, and those held out."""
        chips = ChipSet.open(self.chips)
        train, held = self._rows(chips)
        return chips.select(train), chips.select(held)

    def _rows(self, chips: ChipSet) -> Rows:
        given, validate = self.config.split, self.config.validate
        if validate.pairs and not validate.held_only and not given.names:
            given = SplitConfig("none")  # what nobody would be scored on is not held out
        return split(chips.labels, given, self.run.seed, chips.identities, chips.faces)

    def pair_set(self) -> PairSet | None:
        """The pairs that networks are scored on; None where nothing is held out and no file is given."""
        config = self.config.validate
        if self.config.schedule.validate == 0:
            return None
        train, held = self.parts()
        if self.pairs:
            named = read_validation_pairs(config, train.identities)
            return PairSet.named(ChipSet.open(self.pairs), named, config.pairs)
        if not len(held):
            return None
        if self.config.split.by == "images" and not self.config.split.names:
            whole = ChipSet.open(self.chips)
            return PairSet.drawn(whole, config, self.run.seed, self._rows(whole)[1])
        return PairSet.drawn(held, config, self.run.seed)


class Judge:
    """Verifies networks on a plan's pairs, which are made when the first one comes."""

    def __init__(self, plan: EmbedderPlan):
        self._plan = plan

    @cached_property
    def _pairs(self) -> PairSet | None:
        return self._plan.pair_set()

    def __call__(self, embed: Embed) -> dict[str, float]:
        config = self._plan.config.validate
        return verify(embed, self._pairs, config.flip, config.batch) if self._pairs else {}


@dataclass(frozen=True)
class DetectorPlan:
    """The training of a detector."""

    config: DetectorConfig

    @property
    def run(self) -> RunConfig:
        return self.config.run

    def __call__(self) -> Made:
        config = self.config
        start, task = self.task()
        return task, settings(config, task, start, _identity(config, ("detection",)) | {"weights": start.sha256})

    def task(self) -> tuple[Start, DetectionTask]:
        """What the network starts from, and its task. Raises SourceError and ConfigError for data that cannot be."""
        start = find(self.config.model, "detector")
        net, channels = start.build(self.run.seed, self.config.model.dropout), start.input.channels
        return start, DetectionTask(net, self.config.detection, self.run.seed, cast(Any, channels))


def settings(config: TrainConfig | DetectorConfig, task: Task, start: Start, identity: dict[str, str]) -> Settings:
    """What the loop is told of a config."""
    steps = task.steps_per_epoch
    frozen = optim.frozen_names(task.net, start.frozen(config.model))
    learns_later = config.model.unfreeze_at and next(task.objective.parameters(), None) is not None
    if len(frozen) == len(list(task.net.parameters())) and not learns_later:
        raise ConfigError("model.freeze leaves nothing of the network to train: name less")
    return Settings(
        optim=config.optim,
        schedule=config.schedule,
        run=config.run,
        frozen=frozen,
        unfreeze_step=schedule.in_steps(config.schedule, config.model.unfreeze_at, steps),
        layer_decay=config.model.layer_decay,
        validate_steps=schedule.validation_steps(config.schedule, steps),
        identity=identity,
    )


def _identity(config: Any, sections: tuple[str, ...]) -> dict[str, str]:
    """Digests of what the weights depend on, by section."""
    found = {name: _digest(asdict(getattr(config, name))) for name in (*sections, "model", "optim", "schedule")}
    return found | {"run.seed": str(config.run.seed), "run.precision": config.run.precision}


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
