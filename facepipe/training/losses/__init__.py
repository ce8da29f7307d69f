"""Losses of embedding training: `objective(config, dim, classes, seed)` is a module (embeddings, labels) -> loss."""

from facepipe.training.losses.build import Objective, objective
from facepipe.training.losses.config import NAMES, LossConfig, has_centres, needs_pairs, settled
from facepipe.training.losses.dominant import dominant_angles
from facepipe.training.losses.heads import ClassHead
from facepipe.training.losses.offline import offline_triplets
from facepipe.training.losses.shards import full_rows, full_state, load_full_state, own_rows
from facepipe.training.losses.triplets import triplet_loss

__all__ = [
    "NAMES",
    "ClassHead",
    "LossConfig",
    "Objective",
    "dominant_angles",
    "full_rows",
    "full_state",
    "has_centres",
    "load_full_state",
    "needs_pairs",
    "objective",
    "offline_triplets",
    "own_rows",
    "settled",
    "triplet_loss",
]
