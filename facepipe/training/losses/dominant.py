"""Data cleaning by Sub-center ArcFace: the angles of faces to the dominant sub-centre of their class.

Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-Scale Noisy Web Faces, ECCV 2020. The paper drops
faces at more than 75 degrees, drops the other sub-centres, and trains again with one centre per class.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.errors import ConfigError
from facepipe.training.losses.heads import ClassHead
from facepipe.training.losses.shards import gather_state
from facepipe.types import Float32

# Faces per block of cosines.
_BLOCK = 8192


@torch.no_grad()
def measure_dominant_angles(
    objective: nn.Module, vectors: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]
) -> Float32:
    """Measure the angle of each face to the sub-centre that most faces of its class are closest to.

    With a sharded objective all ranks must call it.

    Args:
        objective: loss with class centres.
        vectors: raw vectors of the whole training set, (n, dim); a part of a class would distort its votes.
        labels: labels as in training, (n,).

    Returns:
        Angles in degrees, (n,).

    Raises:
        ConfigError: The objective has no class centres.
    """
    if not isinstance(objective, ClassHead):
        raise ConfigError(f"{type(objective).__name__} has no class centres: train with subcenter-arcface")
    # All centres as (classes, sub_centers, dim), whichever ranks hold them.
    centres = gather_state(objective)["weight"].detach().float().cpu()
    centres = F.normalize(centres.reshape(objective.shard.classes, objective.sub_centers, -1), dim=2)
    codes = torch.from_numpy(np.asarray(labels, np.int64))
    # Compare each face with the sub-centres of its own class.
    blocks = [
        _compute_cosines(vectors[n : n + _BLOCK], centres, codes[n : n + _BLOCK]) for n in range(0, len(codes), _BLOCK)
    ]
    cosines = torch.cat(blocks or [torch.empty(0, objective.sub_centers)])
    # Each face votes for its closest sub-centre; the one with most votes is dominant.
    votes = torch.bincount(codes * objective.sub_centers + cosines.argmax(1), minlength=centres.shape[:2].numel())
    dominant = votes.view(-1, objective.sub_centers).argmax(1)
    angles = cosines.gather(1, dominant[codes][:, None]).squeeze(1).clamp(-1, 1).acos().rad2deg()
    return np.asarray(angles.numpy(), np.float32)


def _compute_cosines(vectors: npt.NDArray[np.floating], centres: Tensor, codes: Tensor) -> Tensor:
    """Compute the cosines of faces to the sub-centres of their own classes, (n, sub_centers)."""
    x = F.normalize(torch.from_numpy(np.asarray(vectors, np.float32)))
    return torch.einsum("nd,nkd->nk", x, centres[codes])
