"""Triplet losses on unit vectors with squared distances: FaceNet (Schroff et al., CVPR 2015, arXiv 1503.03832).

Triplets are formed within the batch of one rank, or mined before.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.training.losses.config import LossConfig
from facepipe.training.losses.heads import ClassHead


def compute_triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.2) -> Tensor:
    """Compute the mean of [|a - p|^2 - |a - n|^2 + margin]+ over triplets.

    Args:
        anchor: raw vectors, (t, dim).
        positive: raw vectors of the same persons, (t, dim).
        negative: raw vectors of other persons, (t, dim).
        margin: margin, a squared distance of unit vectors.
    """
    return _compute_costs(anchor, positive, negative, margin).mean()


def _compute_costs(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    with torch.autocast(anchor.device.type, enabled=False):
        raw = (anchor, positive, negative)
        a, p, n = (F.normalize(v if v.dtype == torch.float64 else v.float()) for v in raw)
        return F.relu((a - p).square().sum(1) - (a - n).square().sum(1) + margin)


class OfflineTripletLoss(nn.Module):
    """[|a - p|^2 - |a - n|^2 + margin]+ over a batch whose thirds are anchors, positives and negatives.

    Attributes:
        figures: after a forward pass: active, the share of triplets with a loss above 0.
    """

    needs_pairs = False

    def __init__(self, config: LossConfig):
        super().__init__()
        self.margin = config.margin or 0.0
        self.figures: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, a scalar, from raw embeddings (3 t, dim) and labels (3 t,) int64."""
        anchor, positive, negative = embeddings.chunk(3)
        costs = _compute_costs(anchor, positive, negative, self.margin)
        self.figures = {"active": (costs.detach() > 0).float().mean()}
        return costs.mean()


class TripletLoss(nn.Module):
    """[|a - p|^2 - |a - n|^2 + margin]+ over triplets mined in the batch.

    batch-all: all triplets; the mean over those with a loss above 0 (Hermans et al. 2017, arXiv 1703.07737).
    batch-hard: per anchor the farthest positive and the nearest negative; the mean over anchors (the same paper).
    semi-hard: per pair a, p the nearest negative that is farther than p (FaceNet), or the farthest negative if all are
    nearer; the mean over pairs.
    A batch without a positive or without a negative costs 0.

    Attributes:
        figures: after a forward pass: active, the share of triplets with a loss above 0.
    """

    needs_pairs = True

    def __init__(self, config: LossConfig):
        super().__init__()
        self.margin = config.margin or 0.0
        self.mining = config.mining
        self.figures: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, a scalar, from raw embeddings (n, dim) and labels (n,) int64."""
        with torch.autocast(embeddings.device.type, enabled=False):
            # Squared distances of unit vectors, (n, n).
            x = F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float())
            distances = 2 - 2 * x @ x.T
            same = labels[:, None] == labels
            costs = self._mine_costs(distances, same)
            active = costs > 0
            self.figures = {"active": active.float().sum() / max(costs.numel(), 1)}
            # The mean over active triplets: the many inactive ones would make it vanish.
            if self.mining == "batch-all":
                return costs.sum() / active.sum().clamp(min=1)
            return costs.sum() / max(costs.numel(), 1)

    def _mine_costs(self, distances: Tensor, same: Tensor) -> Tensor:
        """Mine triplets and compute their losses.

        Args:
            distances: squared distances, (n, n).
            same: whether two faces show one person, (n, n).
        """
        positive = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        # One triplet per anchor that has both kinds.
        if self.mining == "batch-hard":
            farthest = distances.masked_fill(~positive, -torch.inf).amax(1)
            nearest = distances.masked_fill(same, torch.inf).amin(1)
            usable = positive.any(1) & ~same.all(1)
            return F.relu(farthest[usable] - nearest[usable] + self.margin)
        # One row per pair of anchor and positive, if the anchor has a negative.
        anchor, other = (positive & ~same.all(1, keepdim=True)).nonzero(as_tuple=True)
        pair_distances = distances[anchor, other]
        anchor_distances = distances[anchor]
        is_negative = ~same[anchor]
        # Each pair against each negative of its anchor.
        if self.mining == "batch-all":
            return F.relu(pair_distances[:, None] - anchor_distances + self.margin)[is_negative]
        negative_distances = _choose_semi_hard(pair_distances, anchor_distances, is_negative)
        return F.relu(pair_distances - negative_distances + self.margin)


def _choose_semi_hard(pair_distances: Tensor, anchor_distances: Tensor, is_negative: Tensor) -> Tensor:
    """Choose the distance of each pair's negative: the nearest that is farther than the positive, else the farthest."""
    # Without a negative beyond the positive, the farthest one is the easiest that is left.
    is_farther = is_negative & (anchor_distances > pair_distances[:, None])
    nearest = anchor_distances.masked_fill(~is_farther, torch.inf).amin(1)
    farthest = anchor_distances.masked_fill(~is_negative, -torch.inf).amax(1)
    return torch.where(is_farther.any(1), nearest, farthest)


class TripletSoftmax(nn.Module):
    """Triplet loss plus softmax_weight times the cross-entropy of a linear classifier on the raw embeddings.

    The classifier keeps the embeddings from collapsing to a point early in training. It is not part of the model.
    """

    def __init__(self, config: LossConfig, dim: int, classes: int, seed: int):
        super().__init__()
        self.triplet = OfflineTripletLoss(config) if config.offline else TripletLoss(config)
        self.needs_pairs = self.triplet.needs_pairs
        self.softmax_weight = config.softmax_weight or 0.0
        self.classifier = ClassHead(config, dim, classes, seed)
        self.figures: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, a scalar, from raw embeddings (n, dim) and labels (n,) int64."""
        triplet = self.triplet(embeddings, labels)
        softmax = self.classifier(embeddings, labels)
        parts = {"triplet": triplet.detach(), "softmax": softmax.detach()}
        self.figures = parts | self.triplet.figures | self.classifier.figures
        loss: Tensor = triplet + self.softmax_weight * softmax
        return loss
