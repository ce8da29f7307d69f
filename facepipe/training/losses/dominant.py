"""Sub-center ArcFace's cleaning: angles to the sub-centre that most of a class's faces are nearest to.

Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-Scale Noisy Web Faces, ECCV 2020: faces more than 75
degrees from it are dropped, the other sub-centres too, and training starts again with one centre a class.
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

_BLOCK = 8192


@torch.no_grad()
def measure_dominant_angles(
    objective: nn.Module, vectors: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]
) -> Float32:
    """(n,) degrees from each vector to its class's dominant sub-centre: the one most faces of the class are nearest to.

    vectors (n, dim) raw, labels (n,) as in training: the whole set, or a class's votes are of a part.
    A sharded objective makes this a collective call. Errors: ConfigError for an objective without class centres.
    """
    if not isinstance(objective, ClassHead):
        raise ConfigError(f"{type(objective).__name__} has no class centres: train with subcenter-arcface")
    centres = gather_state(objective)["weight"].detach().float().cpu()
    centres = F.normalize(centres.reshape(objective.shard.classes, objective.sub_centers, -1), dim=2)
    codes = torch.from_numpy(np.asarray(labels, np.int64))
    cosines = torch.cat(
        [
            _compute_cosines(vectors[n : n + _BLOCK], centres, codes[n : n + _BLOCK])
            for n in range(0, len(codes), _BLOCK)
        ]
        or [torch.empty(0, objective.sub_centers)]
    )
    votes = torch.bincount(codes * objective.sub_centers + cosines.argmax(1), minlength=centres.shape[:2].numel())
    dominant = votes.view(-1, objective.sub_centers).argmax(1)
    angles = cosines.gather(1, dominant[codes][:, None]).squeeze(1).clamp(-1, 1).acos().rad2deg()
    return np.asarray(angles.numpy(), np.float32)


def _compute_cosines(vectors: npt.NDArray[np.floating], centres: Tensor, codes: Tensor) -> Tensor:
    """(n, sub_centers) cosines to the own class's sub-centres."""
    x = F.normalize(torch.from_numpy(np.asarray(vectors, np.float32)))
    return torch.einsum("nd,nkd->nk", x, centres[codes])
