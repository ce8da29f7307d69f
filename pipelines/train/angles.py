"""The data cleaning of Sub-center ArcFace: after a training, the faces far from the dominant centre of their class.

Deng et al. (ECCV 2020) drop what lies at more than 75 degrees, and train again with one centre per class.
"""

import csv
import os
from dataclasses import dataclass, replace

import numpy as np
import torch

from facepipe.errors import ConfigError, TrainingError
from facepipe.models.runtime.device import resolve_device
from facepipe.storage.atomic import replace_file
from facepipe.text import protect_cell
from facepipe.training.data.chip_set import ChipSet
from facepipe.training.embedding_task import embed_chips
from facepipe.training.losses import measure_dominant_angles
from facepipe.training.start import resolve_start
from facepipe.training.trainer.checkpointing import CheckpointFolder
from facepipe.types import Bool, Float32
from pipelines.train.config import TrainConfig, resolve_learning_rate
from pipelines.train.plan import EmbedderPlan

MAX_ANGLE = 75.0
_CHIPS_PER_RUN = 64


@dataclass(frozen=True)
class AnglesSummary:
    """What was found.

    Attributes:
        kept: faces in the list to train on.
        dropped: faces that are left out.
        list: the list to train on.
        dropped_list: the other faces.
        median: median angle of all faces, degrees.
    """

    kept: int
    dropped: int
    list: str
    dropped_list: str
    median: float


def write_angles(config: TrainConfig, path: str, max_angle: float = MAX_ANGLE) -> AnglesSummary:
    """Measure the angle of each face of a training to the dominant centre of its class, and write two lists.

    Args:
        config: the training, which has a checkpoint.
        path: CSV of the faces to train on: face_id, identity, angle, uri. The others go to `NAME.dropped.csv` beside
            it.
        max_angle: faces at more degrees are dropped.

    Raises:
        ConfigError: The loss has no class centres.
        TrainingError: There is no checkpoint.
    """
    config = resolve_learning_rate(config)
    checkpoint = CheckpointFolder(config.run.output).load()
    if checkpoint is None:
        raise TrainingError(f"no checkpoint in {config.run.output!r}: train first, without --angles")
    # The head has all centres in one process, however many workers trained it.
    config = replace(config, loss=replace(config.loss, sharded=False), model=replace(config.model, imprint=0))
    chips_folder = config.run.chips or os.path.join(config.run.output, "chips")
    plan = EmbedderPlan(config, chips_folder)
    train, _ = plan.split_chips()
    task, _ = plan.build()
    try:
        task.net.load_state_dict(checkpoint["net"])
        task.objective.load_state_dict(checkpoint["head"])
    except RuntimeError as error:
        raise ConfigError(
            f"the checkpoint in {config.run.output!r} is of other settings: {str(error).splitlines()[0]}"
        ) from error
    vectors = _embed_all(task.net, train, config)
    angles = measure_dominant_angles(task.objective, vectors, train.labels)
    is_kept = angles <= max_angle
    dropped_path = f"{os.path.splitext(path)[0]}.dropped.csv"
    _write_list(path, train, angles, is_kept)
    _write_list(dropped_path, train, angles, ~is_kept)
    return AnglesSummary(int(is_kept.sum()), int((~is_kept).sum()), path, dropped_path, float(np.median(angles)))


def _embed_all(net: torch.nn.Module, chips: ChipSet, config: TrainConfig) -> Float32:
    device = torch.device(resolve_device(config.run.device))
    net.to(device).eval()
    model_input = resolve_start(config.model).input
    rows = np.arange(len(chips))
    return np.concatenate(
        [
            embed_chips(net, chips.load_chips(rows[start : start + _CHIPS_PER_RUN]), model_input, device)
            for start in range(0, len(rows), _CHIPS_PER_RUN)
        ]
    )


def _write_list(path: str, chips: ChipSet, angles: Float32, is_listed: Bool) -> None:
    """Write the listed faces, the farthest last."""
    rows = np.flatnonzero(is_listed)
    rows = rows[np.argsort(angles[rows], kind="stable")]
    with replace_file(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("face_id", "identity", "angle", "uri"))
        for row, uri in zip(rows.tolist(), chips.read_uris(rows) if len(rows) else (), strict=True):
            identity = chips.identities[int(chips.labels[row])]
            face_id = int(chips.face_ids[row])
            writer.writerow((face_id, protect_cell(identity), f"{angles[row]:.2f}", protect_cell(uri)))
