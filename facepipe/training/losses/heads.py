"""Losses against class centres: logits, a margin on the entry of each face's own class, and cross-entropy.

They compute in float32 (or float64, if the embeddings are), even under autocast. The margin overwrites one entry per
face: there is no mask and no one-hot matrix.
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
    """Softmax cross-entropy of x W^T + b: the plain classifier, and the base of all heads.

    Attributes:
        weight: class centres, (classes, dim), or (classes, sub_centers, dim) if there are several per class. A sharded
            head has the classes of this rank only.
        bias: one number per class, or None.
        figures: after a forward pass: accuracy, the share of faces whose own class has the largest logit before any
            margin.
    """

    needs_pairs = False
    bias: nn.Parameter | None

    def __init__(self, config: LossConfig, dim: int, classes: int, seed: int):
        super().__init__()
        self.config = config
        self.shard = get_own_shard(classes, bool(config.sharded))
        self.sub_centers = config.sub_centers or 1
        self.weight = nn.Parameter(draw_centres(self.shard, self.sub_centers, dim, seed))
        has_bias = config.name in ("softmax", "triplet-softmax")
        self.bias = nn.Parameter(torch.zeros(self.shard.size)) if has_bias else None
        self.figures: dict[str, Tensor] = {}

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters belong to this rank only. Their gradients are complete and must not be averaged."""
        return self.shard.world > 1

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            embeddings: raw embeddings, (n, dim) float.
            labels: labels, (n,) int64.

        Returns:
            A scalar. With a sharded head it is the mean over the faces of all ranks.
        """
        # The whole loss runs in float32 or more: sums over many classes lose too much in 16 bits.
        with torch.autocast(embeddings.device.type, enabled=False):
            x = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            # A sharded head sees the faces of all ranks, and compares them with its own classes.
            if self.is_sharded:
                x = gather_ranks_with_gradient(x)
                labels = gather_ranks(labels)
            centres, bias, positions = self._select_centres(self._to_local_rows(labels))
            logits = self._compute_logits(x, centres, bias)
            # Accuracy is measured before the margin lowers the own logit.
            self.figures = {"accuracy": self._measure_accuracy(logits.detach(), positions)}
            logits = self._apply_margin(logits, positions, x, centres)
            if self.is_sharded:
                return compute_sharded_cross_entropy(logits, positions)
            return F.cross_entropy(logits, positions)

    def _to_local_rows(self, labels: Tensor) -> Tensor:
        """Convert labels to rows of `weight`; -1 for classes of other ranks."""
        if not self.is_sharded:
            return labels
        local = labels - self.shard.start
        return torch.where((local >= 0) & (local < self.shard.size), local, -1)

    def _select_centres(self, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Select the centres and biases of this step, and find the columns of the faces' own classes among them."""
        if not self.training or self.config.sample_rate in (None, 1):
            return self.weight, self.bias, rows
        sampled = sample_classes(rows, self.shard.size, self.config.sample_rate or 1)
        bias = None if self.bias is None else self.bias[sampled]
        return self.weight[sampled], bias, find_positions(sampled, rows)

    def _compute_logits(self, x: Tensor, centres: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, centres, bias)

    def _apply_margin(self, logits: Tensor, positions: Tensor, x: Tensor, centres: Tensor) -> Tensor:
        """Apply the margin to the entries at `positions`; may overwrite the logits."""
        return logits

    @torch.no_grad()
    def _measure_accuracy(self, logits: Tensor, positions: Tensor) -> Tensor:
        own = get_own_entries(logits, positions)
        best = logits.amax(1)
        # Only one rank holds a face's own class, so the sum over ranks is its logit.
        if self.is_sharded:
            dist.all_reduce(own)
            dist.all_reduce(best, dist.ReduceOp.MAX)
        return (own >= best).float().mean()


def write_entries(logits: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Write values (n,) to the entries at the positions, except where a position is -1."""
    # A position of -1 is read at column 0, and written back unchanged.
    columns = positions.clamp(min=0)
    current = logits[torch.arange(len(columns), device=columns.device), columns]
    kept = torch.where(positions >= 0, values, current)
    return logits.scatter_(1, columns[:, None], kept[:, None])


class CosineHead(ClassHead):
    """scale * cosine, with the margin of ArcFace or AM-Softmax, or without a margin.

    NormFace: Wang et al., ACM MM 2017, arXiv 1704.06369 (here with a constant scale). AM-Softmax: Wang et al., IEEE
    Signal Processing Letters 2018, arXiv 1801.05599; CosFace: Wang et al., CVPR 2018, arXiv 1801.09414. ArcFace: Deng
    et al., CVPR 2019, arXiv 1801.07698. Sub-center ArcFace: Deng et al., ECCV 2020; the closest of a class's
    sub-centres counts.
    """

    def _compute_logits(self, x: Tensor, centres: Tensor, bias: Tensor | None) -> Tensor:
        # Scale the faces, which are fewer than the centres.
        scaled = (self.config.scale or 1) * F.normalize(x)
        logits = F.linear(scaled, F.normalize(centres.reshape(-1, centres.shape[-1])))
        if self.sub_centers == 1:
            return logits
        # For the backward pass max keeps its indices, not its values: the margin may overwrite the values.
        return logits.view(len(x), -1, self.sub_centers).max(2).values

    def _apply_margin(self, logits: Tensor, positions: Tensor, x: Tensor, centres: Tensor) -> Tensor:
        scale = self.config.scale or 1
        margin = self.config.margin or 0
        if not margin:
            return logits
        cosine = get_own_entries(logits, positions) / scale
        if self.config.name == "am-softmax":
            moved = cosine - margin
        else:
            moved = add_angle(cosine, margin, bool(self.config.easy_margin))
        return write_entries(logits, positions, scale * moved)


class CircleHead(CosineHead):
    """Circle loss with class labels: Sun et al., CVPR 2020, arXiv 2002.10857, equation 6 with the centre as positive.

    With one positive it is the cross-entropy of scale * a * (s - d). For the own class a = [1 + m - s]+ and d = 1 - m;
    for other classes a = [s + m]+ and d = m. As in the paper, gradients treat the weights a as constants.
    """

    def _apply_margin(self, logits: Tensor, positions: Tensor, x: Tensor, centres: Tensor) -> Tensor:
        scale = self.config.scale or 1
        margin = self.config.margin or 0
        cosine = get_own_entries(logits, positions) / scale
        # The weights in front are detached: they scale the gradient, and have none themselves.
        own = scale * (1 + margin - cosine).detach().clamp(min=0) * (cosine - (1 - margin))
        others = (logits.detach() / scale + margin).clamp(min=0) * (logits - scale * margin)
        return write_entries(others, positions, own)


class AngularHead(ClassHead):
    """L-Softmax and A-Softmax: |W||x| psi(theta) and |x| psi(theta), annealed from the plain |W||x| cos(theta).

    The own logit is the blend (lambda cos + psi) / (1 + lambda) of step `iteration`. A forward pass in training mode
    increments it first, so that the first step is step 1.

    Attributes:
        iteration: number of forward passes in training mode.
    """

    iteration: Tensor

    def __init__(self, config: LossConfig, dim: int, classes: int, seed: int):
        super().__init__(config, dim, classes, seed)
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss; see `ClassHead.forward`."""
        if self.training:
            self.iteration += 1
        loss = super().forward(embeddings, labels)
        self.figures["lambda"] = self._compute_lambda()
        return loss

    def _compute_lambda(self) -> Tensor:
        config = self.config
        return anneal_weight(
            self.iteration,
            base=config.lambda_base or 0,
            gamma=config.lambda_gamma or 0,
            power=config.lambda_power or 0,
            minimum=config.lambda_min or 0,
        )

    def _compute_logits(self, x: Tensor, centres: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, F.normalize(centres) if self.config.name == "a-softmax" else centres)

    def _apply_margin(self, logits: Tensor, positions: Tensor, x: Tensor, centres: Tensor) -> Tensor:
        # The logit divided by the lengths is the cosine that the margin changes.
        length = x.norm(dim=1)
        if self.config.name == "l-softmax":
            length = length * centres[positions.clamp(min=0)].norm(dim=1)
        cosine = get_own_entries(logits, positions) / length.clamp(min=torch.finfo(x.dtype).tiny)
        # Blend the plain cosine in; its weight falls from step to step.
        weight = self._compute_lambda().to(x.dtype)
        psi = multiply_angle(cosine, int(self.config.margin or 1))
        blend = (weight * cosine + psi) / (1 + weight)
        return write_entries(logits, positions, length * blend)
