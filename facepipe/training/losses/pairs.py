"""Losses over the pairs of faces within the batch that one rank sees, in float32."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.training.losses.config import LossConfig


class PairLoss(nn.Module):
    """What pair losses share: cosines (n, n) of the batch, and which pairs are of one person or of two."""

    needs_pairs = True

    def __init__(self, config: LossConfig):
        super().__init__()
        self.scale, self.margin = config.scale or 1.0, config.margin or 0.0
        self.figures: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(n, dim) float, (n,) int64 -> scalar; 0 without a pair that the loss can use."""
        with torch.autocast(embeddings.device.type, enabled=False):
            x = F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float())
            same = labels[:, None] == labels
            itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
            return self._compute_loss(x @ x.T, same & ~itself, ~same)

    def _compute_loss(self, cosines: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        raise NotImplementedError


class CosineEmbeddingLoss(PairLoss):
    """1 - cos over pairs of one person, [cos - margin]+ over pairs of two: the mean of each, added.

    The means are apart because a batch has many times more pairs of two persons.
    """

    def _compute_loss(self, cosines: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        near = ((1 - cosines) * positive).sum() / positive.sum().clamp(min=1)
        far = (F.relu(cosines - self.margin) * negative).sum() / negative.sum().clamp(min=1)
        return near + far


class CirclePairLoss(PairLoss):
    """Circle loss over pairs: Sun et al., CVPR 2020, arXiv 2002.10857, equation 6, the mean over anchors.

    softplus(LSE_n scale a_n (s_n - m) + LSE_p -scale a_p (s_p - 1 + m)), a_n = [s_n + m]+, a_p = [1 + m - s_p]+; the
    weights a are constants to the gradient. Anchors without a positive or without a negative do not count.
    """

    def _compute_loss(self, cosines: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        usable = positive.any(1) & negative.any(1)
        s, p, n = cosines[usable], positive[usable], negative[usable]
        toward = -self.scale * (1 + self.margin - s).detach().clamp(min=0) * (s - 1 + self.margin)
        away = self.scale * (s + self.margin).detach().clamp(min=0) * (s - self.margin)
        both = _masked_logsumexp(toward, p) + _masked_logsumexp(away, n)
        return F.softplus(both).sum() / max(len(s), 1)


def _masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, -torch.inf).logsumexp(1)
