"""RetinaFace's multi-task loss without the dense branch (Deng et al., CVPR 2020, eq. 1); hard negatives as in SSD."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.models.detectors.retinaface import Predictions
from facepipe.training.detection.config import MultiTaskConfig
from facepipe.training.detection.matching import encode_boxes, encode_points, match_anchors

MARK_COLUMN = 14  # of a target: 1 for a face with landmarks, -1 for one without


class MultiTaskLoss(nn.Module):
    """The weighted sum of the losses of scores, boxes and landmarks. It has no parameters.

    Attributes:
        figures: of the last batch: the three losses before their weights, and the number of anchors that are faces.
    """

    def __init__(self, config: MultiTaskConfig):
        super().__init__()
        self.config = config
        self.figures: dict[str, Tensor] = {}

    def forward(self, predictions: Predictions, targets: Tensor, valid: Tensor, priors: Tensor) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            predictions: offsets (n, a, 4), logits (n, a, 2) and landmark offsets (n, a, 10) of a network in training.
            targets: x1 y1 x2 y2, five landmarks x y, mark, (n, f, 15) float.
            valid: False for rows that fill up, (n, f) bool.
            priors: centre and size of the anchors in pixels, (a, 4).
        """
        config = self.config
        boxes, logits, points = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in predictions)
        # Assign the anchors of each image to its faces.
        faces = [t[v] for t, v in zip(targets, valid, strict=True)]
        assigned = torch.stack([match_anchors(f[:, :4], priors, config.positive, config.ignore) for f in faces])
        image, anchor = (assigned >= 0).nonzero(as_tuple=True)
        target = torch.cat([f[a[a >= 0]] for f, a in zip(faces, assigned, strict=True)])
        matched_priors = priors[anchor]
        marked = target[:, MARK_COLUMN] > 0
        # Compare the predictions of anchors that are faces. Landmarks count if they are known.
        box_targets = encode_boxes(target[:, :4], matched_priors)
        point_targets = encode_points(target[marked, 4:MARK_COLUMN], matched_priors[marked])
        box = _compute_smooth_l1(boxes[image, anchor], box_targets)
        landmarks = _compute_smooth_l1(points[image, anchor][marked], point_targets)
        # Scores are compared at all anchors, boxes and landmarks at those that are faces only.
        score = self._compute_score_loss(logits, (assigned >= 0).long())
        positives = boxes.new_tensor(len(matched_priors))
        figures = {"box": box, "score": score, "landmarks": landmarks, "positives": positives}
        self.figures = {name: figure.detach() for name, figure in figures.items()}
        return config.box * box + config.score * score + config.landmarks * landmarks

    def _compute_score_loss(self, logits: Tensor, face: Tensor) -> Tensor:
        """Compute the cross-entropy of all faces and of each image's hardest background, per face.

        Args:
            logits: logits of background and face, (n, a, 2).
            face: 1 for anchors that are faces, else 0, (n, a) int64.
        """
        # One cross-entropy per anchor, (n, a).
        losses = F.cross_entropy(logits.flatten(0, 1), face.flatten(), reduction="none").view_as(face)
        count = face.sum(1, keepdim=True)
        negatives = (count * self.config.negatives).long().clamp(max=face.shape[1] - 1)
        # Rank background anchors by their loss, and use the hardest few per face of the image.
        order = losses.detach().masked_fill(face > 0, 0).argsort(dim=1, descending=True, stable=True)
        is_ranked = torch.arange(face.shape[1], device=face.device) < negatives
        is_hard = torch.zeros_like(is_ranked).scatter(1, order, is_ranked)
        return losses[is_hard | (face > 0)].sum() / count.sum().clamp(min=1)


def _compute_smooth_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Compute the smooth L1 loss, summed over coordinates and averaged over anchors; 0 for no anchors."""
    return F.smooth_l1_loss(predicted, target, reduction="sum") / max(len(predicted), 1)
