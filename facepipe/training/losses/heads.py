"""Losses against class centres: logits, a margin on the one entry of the own class, cross-entropy.

In float32 (float64 if fed so), whatever autocast says. The margin is written over the one entry: no mask, no one-hot.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.training.losses.centres import draw_centres
from facepipe.training.losses.config import LossConfig
from facepipe.training.losses.margins import add_angle, anneal_weight, multiply_angle
from facepipe.training.losses.partial import find_positions, sample_classes
from facepipe.training.losses.shards import (
    compute_sharded_cross_entropy,
    gather_ranks,
    gather_ranks_with_gradient,
    get_own_entries,
    get_own_shard,
)


class ClassHead(nn.Module):
    """Softmax cross-entropy of x W^T + b: the plain classifier, and what all heads share.

    weight (classes, dim), or (classes, sub_centers, dim) where there are several; a sharded head has this rank's
    classes only.
    `figures` after a forward: accuracy, the share of faces whose own class has the largest logit before any margin.
    """

    needs_pairs = False
    bias: nn.Parameter | None

    def __init__(self, config: LossConfig, dim: int, classes: int, seed: int):
        super().__init__()
        self.config = config
        self.shard = get_own_shard(classes, bool(config.sharded))
        self.sub_centers = config.sub_centers or 1
        self.weight = nn.Parameter(draw_centres(self.shard, self.sub_centers, dim, seed))
        self.bias = (
            nn.Parameter(torch.zeros(self.shard.size)) if config.name in ("softmax", "triplet-softmax") else None
        )
        self.figures: dict[str, Tensor] = {}

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters are this rank's alone: their gradients are whole and must not be averaged."""
        return self.shard.world > 1

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(n, dim) float, (n,) int64 -> scalar; on several ranks of a sharded head the mean over the faces of all."""
        with torch.autocast(embeddings.device.type, enabled=False):
            x = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            if self.is_sharded:
                x, labels = gather_ranks_with_gradient(x), gather_ranks(labels)
            centres, bias, positions = self._select_centres(self._to_local_rows(labels))
            logits = self._compute_logits(x, centres, bias)
            self.figures = {"accuracy": self._measure_accuracy(logits.detach(), positions)}
            logits = self._apply_margin(logits, positions, (x, centres))
            return (
                compute_sharded_cross_entropy(logits, positions)
                if self.is_sharded
                else F.cross_entropy(logits, positions)
            )

    def _to_local_rows(self, labels: Tensor) -> Tensor:
        """Rows of `weight`; -1 for classes of other ranks."""
        if not self.is_sharded:
            return labels
        local = labels - self.shard.start
        return torch.where((local >= 0) & (local < self.shard.size), local, -1)

    def _select_centres(self, own: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The centres and biases of this step, and the faces' columns among them."""
        if not self.training or self.config.sample_rate in (None, 1):
            return self.weight, self.bias, own
        rows = sample_classes(own, self.shard.size, self.config.sample_rate or 1)
        return self.weight[rows], None if self.bias is None else self.bias[rows], find_positions(rows, own)

    def _compute_logits(self, x: Tensor, centres: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, centres, bias)

    def _apply_margin(self, logits: Tensor, positions: Tensor, of: tuple[Tensor, Tensor]) -> Tensor:
        """Logits with the margin in the entries at `positions`; may write into those given."""
        return logits

    @torch.no_grad()
    def _measure_accuracy(self, logits: Tensor, positions: Tensor) -> Tensor:
        own, best = get_own_entries(logits, positions), logits.amax(1)
        if self.is_sharded:
            dist.all_reduce(own)
            dist.all_reduce(best, dist.ReduceOp.MAX)
        return (own >= best).float().mean()


def _write_entries(logits: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Writes values (n,) to the entries at the positions, except where a position is -1."""
    at = positions.clamp(min=0)
    kept = torch.where(positions >= 0, values, logits[torch.arange(len(at), device=at.device), at])
    return logits.scatter_(1, at[:, None], kept[:, None])


class CosineHead(ClassHead):
    """scale * cosine, with ArcFace's or AM-Softmax's margin or none.

    NormFace: Wang et al., ACM MM 2017, arXiv 1704.06369 (here with a constant scale). AM-Softmax: Wang et al., IEEE
    Signal Processing Letters 2018, arXiv 1801.05599; CosFace: Wang et al., CVPR 2018, arXiv 1801.09414. ArcFace: Deng
    et al., CVPR 2019, arXiv 1801.07698. Sub-center ArcFace: Deng et al., ECCV 2020: the nearest of a class's
    sub-centres.
    """

    def _compute_logits(self, x: Tensor, centres: Tensor, bias: Tensor | None) -> Tensor:
        scaled = (self.config.scale or 1) * F.normalize(x)
        logits = F.linear(scaled, F.normalize(centres.reshape(-1, centres.shape[-1])))
        # max keeps its indices for the way back, not its values: the margin may be written over them
        return logits if self.sub_centers == 1 else logits.view(len(x), -1, self.sub_centers).max(2).values

    def _apply_margin(self, logits: Tensor, positions: Tensor, of: tuple[Tensor, Tensor]) -> Tensor:
        scale, margin = self.config.scale or 1, self.config.margin or 0
        if not margin:
            return logits
        cosine = get_own_entries(logits, positions) / scale
        if self.config.name == "am-softmax":
            moved = cosine - margin
        else:
            moved = add_angle(cosine, margin, bool(self.config.easy_margin))
        return _write_entries(logits, positions, scale * moved)


class CircleHead(CosineHead):
    """Circle loss with class labels: Sun et al., CVPR 2020, arXiv 2002.10857, equation 6 with one positive, the centre.

    With one positive it is cross-entropy of scale * a * (s - d): a = [1 + m - s]+ and d = 1 - m for the own class,
    a = [s + m]+ and d = m for others. The weights a are constants to the gradient, as in the paper's.
    """

    def _apply_margin(self, logits: Tensor, positions: Tensor, of: tuple[Tensor, Tensor]) -> Tensor:
        scale, margin = self.config.scale or 1, self.config.margin or 0
        cosine = get_own_entries(logits, positions) / scale
        own = scale * (1 + margin - cosine).detach().clamp(min=0) * (cosine - (1 - margin))
        others = (logits.detach() / scale + margin).clamp(min=0) * (logits - scale * margin)
        return _write_entries(others, positions, own)


class AngularHead(ClassHead):
    """L-Softmax and A-Softmax: |W||x| psi(theta) and |x| psi(theta), annealed from the plain |W||x| cos(theta).

    The own logit is blended, (lambda cos + psi) / (1 + lambda), in step `iteration`; a forward in training mode raises
    that first, so that the first step is step 1.
    """

    iteration: Tensor

    def __init__(self, config: LossConfig, dim: int, classes: int, seed: int):
        super().__init__(config, dim, classes, seed)
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if self.training:
            self.iteration += 1
        loss = super().forward(embeddings, labels)
        self.figures["lambda"] = self._compute_lambda()
        return loss

    def _compute_lambda(self) -> Tensor:
        c = self.config
        return anneal_weight(
            self.iteration, c.lambda_base or 0, c.lambda_gamma or 0, c.lambda_power or 0, c.lambda_min or 0
        )

    def _compute_logits(self, x: Tensor, centres: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, F.normalize(centres) if self.config.name == "a-softmax" else centres)

    def _apply_margin(self, logits: Tensor, positions: Tensor, of: tuple[Tensor, Tensor]) -> Tensor:
        x, centres = of
        length = x.norm(dim=1)
        if self.config.name == "l-softmax":
            length = length * centres[positions.clamp(min=0)].norm(dim=1)
        cosine = get_own_entries(logits, positions) / length.clamp(min=torch.finfo(x.dtype).tiny)
        weight = self._compute_lambda().to(x.dtype)
        moved = (weight * cosine + multiply_angle(cosine, int(self.config.margin or 1))) / (1 + weight)
        return _write_entries(logits, positions, length * moved)
