"""Losses of embedding training. `build_objective(config, dim, classes, seed)` builds one."""

from facepipe.training.losses.build import Objective, build_objective
from facepipe.training.losses.config import NAMES, LossConfig, has_centres, needs_pairs, resolve_loss_config
from facepipe.training.losses.dominant import measure_dominant_angles
from facepipe.training.losses.heads import ClassHead
from facepipe.training.losses.offline import mine_triplets
from facepipe.training.losses.shards import gather_rows, gather_state, load_gathered_state, slice_own_rows
from facepipe.training.losses.triplets import compute_triplet_loss

__all__ = [
    "NAMES",
    "ClassHead",
    "LossConfig",
    "Objective",
    "build_objective",
    "compute_triplet_loss",
    "gather_rows",
    "gather_state",
    "has_centres",
    "load_gathered_state",
    "measure_dominant_angles",
    "mine_triplets",
    "needs_pairs",
    "resolve_loss_config",
    "slice_own_rows",
]
