"""Triplet losses on unit vectors with squared distances: FaceNet (Schroff et al., CVPR 2015, arXiv 1503.03832).

Triplets are formed within the batch that one rank sees.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.training.losses.config import LossConfig
from facepipe.training.losses.heads import ClassHead


def compute_triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.2) -> Tensor:
    """Mean of [|a - p|^2 - |a - n|^2 + margin]+ over given triplets: three (t, dim) tensors, not yet unit vectors."""
    return _compute_costs((anchor, positive, negative), margin).mean()


def _compute_costs(triplets: tuple[Tensor, ...], margin: float) -> Tensor:
    with torch.autocast(triplets[0].device.type, enabled=False):
        a, p, n = (F.normalize(v if v.dtype == torch.float64 else v.float()) for v in triplets)
        return F.relu((a - p).square().sum(1) - (a - n).square().sum(1) + margin)


class OfflineTripletLoss(nn.Module):
    """[|a - p|^2 - |a - n|^2 + margin]+ over a batch whose thirds are anchors, positives and negatives.

    `figures`: active, the share of triplets that cost anything.
    """

    needs_pairs = False

    def __init__(self, config: LossConfig):
        super().__init__()
        self.margin = config.margin or 0.0
        self.figures: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(3 t, dim) float, (3 t,) int64 -> scalar."""
        costs = _compute_costs(embeddings.chunk(3), self.margin)
        self.figures = {"active": (costs.detach() > 0).float().mean()}
        return costs.mean()


class TripletLoss(nn.Module):
    """[|a - p|^2 - |a - n|^2 + margin]+ over triplets mined in the batch.

    batch-all: all triplets; the mean over those that cost anything (Hermans et al. 2017, arXiv 1703.07737).
    batch-hard: for every anchor the farthest positive and the nearest negative; the mean over anchors (the same paper).
    semi-hard: for every pair a, p the nearest negative that is farther than p (FaceNet), or the farthest negative where
    all are nearer; the mean over pairs.
    A batch without a positive or without a negative costs 0. `figures`: active, the share of triplets that cost
    anything.
    """

    needs_pairs = True

    def __init__(self, config: LossConfig):
        super().__init__()
        self.margin, self.mining = config.margin or 0.0, config.mining
        self.figures: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(n, dim) float, (n,) int64 -> scalar."""
        with torch.autocast(embeddings.device.type, enabled=False):
            x = F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float())
            distances = 2 - 2 * x @ x.T
            same = labels[:, None] == labels
            costs = self._mine_costs(distances, same)
            active = costs > 0
            self.figures = {"active": active.float().sum() / max(costs.numel(), 1)}
            if self.mining == "batch-all":
                return costs.sum() / active.sum().clamp(min=1)
            return costs.sum() / max(costs.numel(), 1)

    def _mine_costs(self, distances: Tensor, same: Tensor) -> Tensor:
        """Costs (t,) of the mined triplets."""
        positive = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        if self.mining == "batch-hard":
            farthest = distances.masked_fill(~positive, -torch.inf).amax(1)
            nearest = distances.masked_fill(same, torch.inf).amin(1)
            usable = positive.any(1) & ~same.all(1)
            return F.relu(farthest[usable] - nearest[usable] + self.margin)
        anchor, other = (positive & ~same.all(1, keepdim=True)).nonzero(as_tuple=True)
        apart, negatives, strangers = distances[anchor, other], distances[anchor], ~same[anchor]
        if self.mining == "batch-all":
            return F.relu(apart[:, None] - negatives + self.margin)[strangers]
        return F.relu(apart - _choose_semi_hard(apart, negatives, strangers) + self.margin)


def _choose_semi_hard(apart: Tensor, negatives: Tensor, strangers: Tensor) -> Tensor:
    farther = strangers & (negatives > apart[:, None])
    nearest = negatives.masked_fill(~farther, torch.inf).amin(1)
    farthest = negatives.masked_fill(~strangers, -torch.inf).amax(1)
    return torch.where(farther.any(1), nearest, farthest)


class TripletSoftmax(nn.Module):
    """Triplet loss plus softmax_weight times the cross-entropy of a linear classifier on the raw embeddings.

    The classifier, which training leaves behind, keeps the triplets from collapsing to a point early on.
    """

    def __init__(self, config: LossConfig, dim: int, classes: int, seed: int):
        super().__init__()
        self.triplet = OfflineTripletLoss(config) if config.offline else TripletLoss(config)
        self.needs_pairs, self.softmax_weight = self.triplet.needs_pairs, config.softmax_weight or 0.0
        self.classifier = ClassHead(config, dim, classes, seed)
        self.figures: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(n, dim) float, (n,) int64 -> scalar."""
        triplet = self.triplet(embeddings, labels)
        softmax = self.classifier(embeddings, labels)
        parts = {"triplet": triplet.detach(), "softmax": softmax.detach()}
        self.figures = parts | self.triplet.figures | self.classifier.figures
        loss: Tensor = triplet + self.softmax_weight * softmax
        return loss
