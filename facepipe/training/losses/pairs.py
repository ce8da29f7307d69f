"""Losses over the pairs of faces within one rank's batch, in float32."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.training.losses.config import LossConfig


class PairLoss(nn.Module):
    """The base of pair losses: cosines of the batch, and which pairs show one person or two."""

    needs_pairs = True

    def __init__(self, config: LossConfig):
        super().__init__()
        self.scale = config.scale or 1.0
        self.margin = config.margin or 0.0
        self.figures: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, a scalar; 0 if no pair can be used.

        Args:
            embeddings: raw embeddings, (n, dim) float.
            labels: labels, (n,) int64.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            x = F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float())
            # Masks (n, n) of pairs; a face and itself are no pair.
            same = labels[:, None] == labels
            diagonal = torch.eye(len(same), dtype=torch.bool, device=same.device)
            return self._compute_loss(x @ x.T, same & ~diagonal, ~same)

    def _compute_loss(self, cosines: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Compute the loss of cosines (n, n) and masks (n, n) of pairs of one person and of two."""
        raise NotImplementedError


class CosineEmbeddingLoss(PairLoss):
    """The mean of 1 - cos over pairs of one person, plus the mean of [cos - margin]+ over pairs of two.

    The means are separate because a batch has many times more pairs of two persons.
    """

    def _compute_loss(self, cosines: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        near = ((1 - cosines) * positive).sum() / positive.sum().clamp(min=1)
        far = (F.relu(cosines - self.margin) * negative).sum() / negative.sum().clamp(min=1)
        return near + far


class CirclePairLoss(PairLoss):
    """Circle loss over pairs: Sun et al., CVPR 2020, arXiv 2002.10857, equation 6, the mean over anchors.

    softplus(LSE_n scale a_n (s_n - m) + LSE_p -scale a_p (s_p - 1 + m)), a_n = [s_n + m]+, a_p = [1 + m - s_p]+.
    Gradients treat the weights a as constants. Anchors without a positive or without a negative do not count.
    """

    def _compute_loss(self, cosines: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        # Only anchors with both kinds of pairs count.
        usable = positive.any(1) & negative.any(1)
        s = cosines[usable]
        toward = -self.scale * (1 + self.margin - s).detach().clamp(min=0) * (s - 1 + self.margin)
        away = self.scale * (s + self.margin).detach().clamp(min=0) * (s - self.margin)
        exponents = _compute_masked_logsumexp(toward, positive[usable]) + _compute_masked_logsumexp(
            away, negative[usable]
        )
        return F.softplus(exponents).sum() / max(len(s), 1)


def _compute_masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, -torch.inf).logsumexp(1)
