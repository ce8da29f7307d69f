"""What every worker builds for itself: the task, from a config, a folder of chips and files that all can read."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from facepipe.errors import ConfigError
from facepipe.models.runtime.device import resolve_device
from facepipe.models.runtime.preprocess import Input
from facepipe.training.data.chip_set import ChipSet
from facepipe.training.data.sampling import BatchSampler
from facepipe.training.data.split import SplitConfig, split_rows
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
from facepipe.types import Int64
from pipelines.train.config import DetectorConfig, TrainConfig

# Sections that the weights depend on: a checkpoint is resumed only if they are the same.
_EMBEDDER_SECTIONS = ("data", "loss", "sample", "augment", "split", "validate")
_DETECTOR_SECTIONS = ("detection",)
_COMMON_SECTIONS = ("model", "optim", "schedule")
# Fields that came into a section later. They count only if they are set.
_LATER_FIELDS = {
    "loss": ("miner", "margin_high", "norm_low", "norm_high", "norm_weight", "norm_rate", "concentration"),
}


@dataclass(frozen=True)
class EmbedderPlan:
    """The training of an embedder on a chip set.

    Attributes:
        config: all settings.
        chips: folder of the chip set.
        pairs: folder of the chip set with the images of `validate.pairs`; empty without a pairs file.
    """

    config: TrainConfig
    chips: str
    pairs: str = ""

    @property
    def run(self) -> TrainingRunConfig:
        """The settings of the run."""
        return self.config.run

    def build(self) -> tuple[TrainingTask, LoopSettings]:
        """Build the task and the settings of its loop."""
        config = self.config
        seed = self.run.seed
        start = resolve_start(config.model)
        train, _ = self.split_chips()
        net = start.build(seed, config.model.dropout)
        head = build_objective(config.loss, start.dim, len(train.identities), seed)
        # Centres are taken from faces only at the start: a checkpoint holds trained ones.
        if config.model.imprint and not CheckpointFolder(self.run.output).has_checkpoint:
            self._imprint_centres(net, head, start.input, train)
        task = self._build_task(net, head, train, start.input)
        # The identity ties checkpoints to the settings, the initial weights and the chips.
        identity = _hash_sections(config, _EMBEDDER_SECTIONS)
        identity["weights"] = start.sha256
        identity["images"] = train.info.fingerprint
        settings = build_loop_settings(config, task, start, identity)
        earlier = frozenset(_hash_values(form) for form in config.data.list_forms())
        return task, replace(settings, earlier={"data": earlier})

    def _build_task(self, net: nn.Module, head: nn.Module, train: ChipSet, model_input: Input) -> TrainingTask:
        config = self.config
        seed = self.run.seed
        # Offline mining has batches of its own; other losses draw them from the labels.
        verify = PairVerifier(self)
        if config.loss.offline:
            triplets = TripletSampler(train.labels, config.loss, config.sample.batch, seed)
            return TripletTask(net, head, Examples(train, triplets, config.augment, verify), model_input, seed)
        sampler = BatchSampler(train.labels, config.sample, seed)
        return EmbeddingTask(net, head, Examples(train, sampler, config.augment, verify), model_input, seed)

    def _imprint_centres(self, net: nn.Module, head: nn.Module, model_input: Input, train: ChipSet) -> None:
        # Embed in evaluation mode, so that centres do not depend on dropout or on the other faces of a batch.
        device = torch.device(resolve_device(self.run.device))
        net.to(device).eval()
        images = self.config.model.imprint
        imprint_centres(head, lambda chips: embed_chips(net, chips, model_input, device), train, images)
        net.train()

    def collect_notes(self, train: ChipSet) -> list[str]:
        """Collect remarks on the training data, with counts."""
        config = self.config
        notes: list[str] = []
        if not config.loss.offline:
            notes += BatchSampler(train.labels, config.sample, self.run.seed).notes
        # Warn if persons of the pairs file may be among those that are trained on.
        excludes = config.data.exclude or config.data.exclude_identities or config.validate.held_only
        if self.pairs and not excludes:
            notes.append(
                f"nothing of {config.validate.pairs} is left out of the training data: set data.exclude, "
                "data.exclude_identities or validate.held_only"
            )
        return notes

    def split_chips(self) -> tuple[ChipSet, ChipSet]:
        """Split the chips into those to train on and those held out."""
        chips = ChipSet.open(self.chips)
        train, held = self._split_rows(chips)
        return chips.select(train), chips.select(held)

    def _split_rows(self, chips: ChipSet) -> tuple[Int64, Int64]:
        split = self.config.split
        validate = self.config.validate
        if validate.pairs and not validate.held_only and not split.names:
            split = SplitConfig("none")  # the pairs file scores the network, so nothing needs to be held out
        return split_rows(chips.labels, split, self.run.seed, chips.identities, chips.face_ids)

    def build_pair_set(self) -> PairSet | None:
        """Build the pairs that score the network, or None if nothing is held out and there is no pairs file."""
        config = self.config.validate
        if self.config.schedule.validate == 0:
            return None
        # Pairs of a file come first, then pairs drawn from held-out images or persons.
        train, held = self.split_chips()
        if self.pairs:
            pairs = read_validation_pairs(config, train.identities)
            return PairSet.from_names(ChipSet.open(self.pairs), pairs, config.pairs)
        if not len(held):
            return None
        if self.config.split.by == "images" and not self.config.split.names:
            # If images are held out, their persons are also trained on, so pairs are drawn from rows of the whole set.
            whole = ChipSet.open(self.chips)
            _, held_rows = self._split_rows(whole)
            return PairSet.draw(whole, config, self.run.seed, held_rows)
        return PairSet.draw(held, config, self.run.seed)


class PairVerifier:
    """Verification on a plan's pairs, which are built at the first call. Small to pickle."""

    def __init__(self, plan: EmbedderPlan):
        self._plan = plan

    @cached_property
    def _pairs(self) -> PairSet | None:
        return self._plan.build_pair_set()

    def __call__(self, embed: EmbedChips) -> dict[str, float]:
        """Score an embedding function; empty if there are no pairs."""
        config = self._plan.config.validate
        return verify_pairs(embed, self._pairs, config.flip, config.batch) if self._pairs else {}


@dataclass(frozen=True)
class DetectorPlan:
    """The training of a detector.

    Attributes:
        config: all settings.
    """

    config: DetectorConfig

    @property
    def run(self) -> TrainingRunConfig:
        """The settings of the run."""
        return self.config.run

    def build(self) -> tuple[TrainingTask, LoopSettings]:
        """Build the task and the settings of its loop."""
        start, task = self.build_task()
        identity = _hash_sections(self.config, _DETECTOR_SECTIONS)
        identity["weights"] = start.sha256
        return task, build_loop_settings(self.config, task, start, identity)

    def build_task(self) -> tuple[NetworkStart, DetectionTask]:
        """Build the task, and return it with what its network starts from.

        Raises:
            ConfigError: The settings do not suit the data.
            SourceError: The annotations or images cannot be used.
        """
        start = resolve_start(self.config.model, "detector")
        net = start.build(self.run.seed, self.config.model.dropout)
        channels = cast(Any, start.input.channels)
        return start, DetectionTask(net, self.config.detection, self.run.seed, channels)


def build_loop_settings(
    config: TrainConfig | DetectorConfig, task: TrainingTask, start: NetworkStart, identity: dict[str, str]
) -> LoopSettings:
    """Build the settings of the loop.

    Args:
        config: all settings.
        task: what is trained.
        start: what its network starts from.
        identity: values that a checkpoint must have too.

    Raises:
        ConfigError: `model.freeze` freezes all parameters.
    """
    steps = task.steps_per_epoch
    frozen = optim.find_frozen_names(task.net, start.list_frozen_prefixes(config.model))
    has_head = next(task.objective.parameters(), None) is not None
    # With a head to train, the network may be frozen as a whole until it is unfrozen.
    can_learn = config.model.unfreeze_at and has_head
    if len(frozen) == len(list(task.net.parameters())) and not can_learn:
        raise ConfigError("model.freeze freezes all parameters of the network: freeze fewer layers")
    return LoopSettings(
        optim=config.optim,
        schedule=config.schedule,
        run=config.run,
        frozen=frozen,
        unfreeze_step=schedule.to_steps(config.schedule, config.model.unfreeze_at, steps),
        layer_decay=config.model.layer_decay,
        validate_steps=schedule.get_validation_interval(config.schedule, steps),
        identity=identity,
        starts_at_random=start.state is None,
    )


def _hash_sections(config: Any, sections: tuple[str, ...]) -> dict[str, str]:
    """Hash the sections of the config that the weights depend on, by name."""
    hashes = {name: _hash_values(_drop_later_fields(name, config)) for name in (*sections, *_COMMON_SECTIONS)}
    hashes["run.seed"] = str(config.run.seed)
    hashes["run.precision"] = config.run.precision
    return hashes


def _drop_later_fields(section: str, config: Any) -> dict[str, Any]:
    """Drop unset fields that versions before did not have, so that their runs can be resumed."""
    values = asdict(getattr(config, section))
    later = _LATER_FIELDS.get(section, ())
    return {name: value for name, value in values.items() if value is not None or name not in later}


def _hash_values(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
