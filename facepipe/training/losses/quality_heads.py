"""Heads whose margin follows the length of an embedding, which stands for the quality of the image."""

import torch
import torch.distributed as dist
from torch import Tensor

from facepipe.training.losses.config import LossConfig
from facepipe.training.losses.heads import CosineHead, write_entries
from facepipe.training.losses.shards import get_own_entries

_EPSILON = 1e-3
# Lengths that are taken for outliers.
_MIN_LENGTH = 1e-3
_MAX_LENGTH = 100.0
# Mean and deviation of lengths before the first batch, as in the authors' code.
_FIRST_MEAN = 20.0
_FIRST_DEVIATION = 100.0


class AdaFaceHead(CosineHead):
    """AdaFace: Kim et al., CVPR 2022, arXiv 2204.00964.

    q = (length - mean) / (deviation / h), cut to [-1, 1]; mean and deviation are moving averages over batches. The own
    logit is s (cos(theta - m q) - (m + m q)): a margin on the angle for poor images, on the cosine for good ones.
    Gradients do not pass through the length.

    Attributes:
        mean: Moving average of the lengths.
        deviation: Moving average of their standard deviation.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: LossConfig, dim: int, classes: int, seed: int):
        super().__init__(config, dim, classes, seed)
        self.register_buffer("mean", torch.tensor(_FIRST_MEAN))
        self.register_buffer("deviation", torch.tensor(_FIRST_DEVIATION))

    def _apply_margin(self, logits: Tensor, positions: Tensor, x: Tensor, centres: Tensor) -> Tensor:
        scale = self.config.scale or 1
        margin = self.config.margin or 0
        quality = self._measure_quality(x)
        angle = -margin * quality
        cosine = (get_own_entries(logits, positions) / scale).clamp(-1, 1)
        # At |cosine| = 1 the sine's slope is infinite, as in `add_angle`.
        sine = ((1 - cosine) * (1 + cosine)).clamp(min=16 * torch.finfo(x.dtype).eps).sqrt()
        moved = cosine * angle.cos() - sine * angle.sin()
        # Beyond 0 and pi the angle stays there.
        moved = torch.where((angle > 0) & (cosine < -angle.cos()), -torch.ones_like(moved), moved)
        moved = torch.where((angle < 0) & (cosine > angle.cos()), torch.ones_like(moved), moved)
        return write_entries(logits, positions, scale * (moved - (margin + margin * quality)))

    @torch.no_grad()
    def _measure_quality(self, x: Tensor) -> Tensor:
        lengths = x.norm(dim=1).clamp(_MIN_LENGTH, _MAX_LENGTH)
        if self.training and len(lengths) > 1:
            rate = self.config.norm_rate or 0
            mean, deviation = _average_over_ranks(lengths, is_shared=self.is_sharded)
            self.mean.lerp_(mean.to(self.mean.dtype), rate)
            self.deviation.lerp_(deviation.to(self.deviation.dtype), rate)
        spread = (lengths - self.mean) / (self.deviation + _EPSILON)
        return (spread * (self.config.concentration or 0)).clamp(-1, 1)


def _average_over_ranks(lengths: Tensor, *, is_shared: bool) -> tuple[Tensor, Tensor]:
    """Average the mean and the deviation of the ranks' lengths; `is_shared` if all ranks see all faces."""
    both = torch.stack([lengths.mean(), lengths.std()])
    if not is_shared and dist.is_available() and dist.is_initialized():
        dist.all_reduce(both)
        both /= dist.get_world_size()
    return both[0], both[1]


class MagFaceHead(CosineHead):
    """MagFace: Meng et al., CVPR 2021, arXiv 2103.06627.

    The margin of ArcFace rises with the length a of an embedding, from `margin` at `norm_low` to `margin_high` at
    `norm_high`; a is cut to that range. To the loss is added norm_weight * mean(a / norm_high^2 + 1 / a), which draws
    easy faces to great lengths.
    """

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss; see `ClassHead.forward`."""
        loss = super().forward(embeddings, labels)
        with torch.autocast(embeddings.device.type, enabled=False):
            x = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            lengths = self._measure_lengths(x)
            high = self.config.norm_high or 1
            self.figures["length"] = lengths.detach().mean()
            return loss + (self.config.norm_weight or 0) * (lengths / high**2 + 1 / lengths).mean()

    def _measure_lengths(self, x: Tensor) -> Tensor:
        return x.norm(dim=1).clamp(self.config.norm_low or 0, self.config.norm_high or 1)

    def _apply_margin(self, logits: Tensor, positions: Tensor, x: Tensor, centres: Tensor) -> Tensor:
        config = self.config
        scale = config.scale or 1
        low = config.norm_low or 0
        slope = ((config.margin_high or 0) - (config.margin or 0)) / ((config.norm_high or 1) - low)
        margin = (config.margin or 0) + slope * (self._measure_lengths(x) - low)
        cosine = get_own_entries(logits, positions) / scale
        sine = ((1 - cosine) * (1 + cosine)).clamp(min=16 * torch.finfo(x.dtype).eps).sqrt()
        moved = cosine * margin.cos() - sine * margin.sin()
        # Beyond pi the line keeps falling, as in ArcFace.
        moved = torch.where(cosine > -margin.cos(), moved, cosine - margin * margin.sin())
        return write_entries(logits, positions, scale * moved)
