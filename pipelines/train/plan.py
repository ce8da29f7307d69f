"""What every worker makes for itself: the task, from a config, a folder of chips and files that all can read."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from facepipe.errors import ConfigError
from facepipe.models.runtime.device import resolve_device
from facepipe.models.runtime.preprocess import Input
from facepipe.training.data.chip_set import ChipSet
from facepipe.training.data.sampling import BatchSampler
from facepipe.training.data.split import Rows, SplitConfig, split_rows
from facepipe.training.detection.task import DetectionTask
from facepipe.training.embedding_task import EmbedChips, EmbeddingTask, Examples, embed_chips
from facepipe.training.imprint import imprint_centres
from facepipe.training.losses import build_objective
from facepipe.training.start import NetworkStart, resolve_start
from facepipe.training.trainer import optim, schedule
from facepipe.training.trainer.checkpointing import CheckpointFolder
from facepipe.training.trainer.config import TrainingRunConfig
from facepipe.training.trainer.loop import LoopSettings
from facepipe.training.trainer.task import TrainingTask
from facepipe.training.triplet_task import TripletSampler, TripletTask
from facepipe.training.validation import PairSet, read_validation_pairs, verify_pairs
from pipelines.train.config import DetectorConfig, TrainConfig

Made = tuple[TrainingTask, LoopSettings]


@dataclass(frozen=True)
class EmbedderPlan:
    """The training of an embedder on a chip set. pairs: chip set of the images of `validate.pairs`, if any."""

    config: TrainConfig
    chips: str
    pairs: str = ""

    @property
    def run(self) -> TrainingRunConfig:
        return self.config.run

    def __call__(self) -> Made:
        config, seed = self.config, self.run.seed
        start = resolve_start(config.model)
        train, _ = self.split_chips()
        net = start.build(seed, config.model.dropout)
        head = build_objective(config.loss, start.dim, len(train.identities), seed)
        if config.model.imprint and not CheckpointFolder(self.run.output).has_checkpoint:
            self._imprint_centres(net, head, start.input, train)
        task = self._build_task(net, head, train, start.input)
        identity = _hash_sections(config, ("data", "loss", "sample", "augment", "split", "validate"))
        identity |= {"weights": start.sha256, "images": train.info.fingerprint}
        return task, build_loop_settings(config, task, start, identity)

    def _build_task(self, net: nn.Module, head: nn.Module, train: ChipSet, fed: Input) -> TrainingTask:
        config, seed, judge = self.config, self.run.seed, PairVerifier(self)
        if config.loss.offline:
            triplets = TripletSampler(train.labels, config.loss, config.sample.batch, seed)
            return TripletTask(net, head, Examples(train, triplets, config.augment, judge), fed, seed)
        sampler = BatchSampler(train.labels, config.sample, seed)
        return EmbeddingTask(net, head, Examples(train, sampler, config.augment, judge), fed, seed)

    def _imprint_centres(self, net: nn.Module, head: nn.Module, fed: Input, train: ChipSet) -> None:
        device = torch.device(resolve_device(self.run.device))
        net.to(device).eval()
        imprint_centres(head, lambda chips: embed_chips(net, chips, fed, device), train, self.config.model.imprint)
        net.train()

    def collect_notes(self, train: ChipSet) -> list[str]:
        """What a user should know of the data, with counts."""
        config = self.config
        found = [] if config.loss.offline else list(BatchSampler(train.labels, config.sample, self.run.seed).notes)
        if self.pairs and not (config.data.exclude or config.data.exclude_identities or config.validate.held_only):
            found.append(
                f"nothing of {config.validate.pairs} is left out of the training data: set data.exclude, "
                "data.exclude_identities or validate.held_only"
            )
        return found

    def split_chips(self) -> tuple[ChipSet, ChipSet]:
        """Chips to train on, and those held out."""
        chips = ChipSet.open(self.chips)
        train, held = self._split_rows(chips)
        return chips.select(train), chips.select(held)

    def _split_rows(self, chips: ChipSet) -> Rows:
        given, validate = self.config.split, self.config.validate
        if validate.pairs and not validate.held_only and not given.names:
            given = SplitConfig("none")  # what nobody would be scored on is not held out
        return split_rows(chips.labels, given, self.run.seed, chips.identities, chips.face_ids)

    def build_pair_set(self) -> PairSet | None:
        """The pairs that networks are scored on; None where nothing is held out and no file is given."""
        config = self.config.validate
        if self.config.schedule.validate == 0:
            return None
        train, held = self.split_chips()
        if self.pairs:
            named = read_validation_pairs(config, train.identities)
            return PairSet.from_names(ChipSet.open(self.pairs), named, config.pairs)
        if not len(held):
            return None
        if self.config.split.by == "images" and not self.config.split.names:
            whole = ChipSet.open(self.chips)
            return PairSet.draw(whole, config, self.run.seed, self._split_rows(whole)[1])
        return PairSet.draw(held, config, self.run.seed)


class PairVerifier:
    """Verifies networks on a plan's pairs, which are made when the first one comes."""

    def __init__(self, plan: EmbedderPlan):
        self._plan = plan

    @cached_property
    def _pairs(self) -> PairSet | None:
        return self._plan.build_pair_set()

    def __call__(self, embed: EmbedChips) -> dict[str, float]:
        config = self._plan.config.validate
        return verify_pairs(embed, self._pairs, config.flip, config.batch) if self._pairs else {}


@dataclass(frozen=True)
class DetectorPlan:
    """The training of a detector."""

    config: DetectorConfig

    @property
    def run(self) -> TrainingRunConfig:
        return self.config.run

    def __call__(self) -> Made:
        config = self.config
        start, task = self.build_task()
        return task, build_loop_settings(
            config, task, start, _hash_sections(config, ("detection",)) | {"weights": start.sha256}
        )

    def build_task(self) -> tuple[NetworkStart, DetectionTask]:
        """What the network starts from, and its task. Raises SourceError and ConfigError for data that cannot be."""
        start = resolve_start(self.config.model, "detector")
        net, channels = start.build(self.run.seed, self.config.model.dropout), start.input.channels
        return start, DetectionTask(net, self.config.detection, self.run.seed, cast(Any, channels))


def build_loop_settings(
    config: TrainConfig | DetectorConfig, task: TrainingTask, start: NetworkStart, identity: dict[str, str]
) -> LoopSettings:
    """What the loop is told of a config."""
    steps = task.steps_per_epoch
    frozen = optim.find_frozen_names(task.net, start.list_frozen_prefixes(config.model))
    learns_later = config.model.unfreeze_at and next(task.objective.parameters(), None) is not None
    if len(frozen) == len(list(task.net.parameters())) and not learns_later:
        raise ConfigError("model.freeze leaves nothing of the network to train: name less")
    return LoopSettings(
        optim=config.optim,
        schedule=config.schedule,
        run=config.run,
        frozen=frozen,
        unfreeze_step=schedule.to_steps(config.schedule, config.model.unfreeze_at, steps),
        layer_decay=config.model.layer_decay,
        validate_steps=schedule.get_validation_interval(config.schedule, steps),
        identity=identity,
    )


def _hash_sections(config: Any, sections: tuple[str, ...]) -> dict[str, str]:
    """Digests of what the weights depend on, by section."""
    found = {name: _hash_values(asdict(getattr(config, name))) for name in (*sections, "model", "optim", "schedule")}
    return found | {"run.seed": str(config.run.seed), "run.precision": config.run.precision}


def _hash_values(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
