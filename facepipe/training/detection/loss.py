"""RetinaFace's multi-task loss without the dense branch (Deng et al., CVPR 2020, eq. 1), hard negatives as in SSD."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.models.detectors.retinaface import Predictions
from facepipe.training.detection.config import MultiTaskConfig
from facepipe.training.detection.matching import encode_boxes, encode_points, match_anchors

MARK_COLUMN = 14  # column of a target: 1 for a face with landmarks, -1 for one without


class MultiTaskLoss(nn.Module):
    """Of face and background, boxes and landmarks; it learns nothing itself.

    figures: the three losses before their weights, and the anchors that were faces, of the last batch
    """

    def __init__(self, config: MultiTaskConfig):
        super().__init__()
        self.config = config
        self.figures: dict[str, Tensor] = {}

    def forward(self, predictions: Predictions, targets: Tensor, valid: Tensor, priors: Tensor) -> Tensor:
        """A scalar.

        predictions: offsets (n, a, 4), logits (n, a, 2), landmark offsets (n, a, 10) of a network in training
        targets: (n, f, 15) float: x1 y1 x2 y2, five landmarks x y, mark; valid (n, f) bool: False fills up
        priors: anchors (a, 4) centre and size in pixels
        """
        boxes, logits, points = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in predictions)
        limits = (self.config.positive, self.config.ignore)
        faces = [t[v] for t, v in zip(targets, valid, strict=True)]
        assigned = torch.stack([match_anchors(f[:, :4], priors, *limits) for f in faces])
        image, anchor = (assigned >= 0).nonzero(as_tuple=True)
        target = torch.cat([f[a[a >= 0]] for f, a in zip(faces, assigned, strict=True)])
        at, marked = priors[anchor], target[:, MARK_COLUMN] > 0
        box = _compute_smooth_l1(boxes[image, anchor], encode_boxes(target[:, :4], at))
        landmarks = _compute_smooth_l1(
            points[image, anchor][marked], encode_points(target[marked, 4:MARK_COLUMN], at[marked])
        )
        score = self._compute_score_loss(logits, (assigned >= 0).long())
        figures = {"box": box, "score": score, "landmarks": landmarks, "positives": boxes.new_tensor(len(at))}
        self.figures = {name: figure.detach() for name, figure in figures.items()}
        c = self.config
        return c.box * box + c.score * score + c.landmarks * landmarks

    def _compute_score_loss(self, logits: Tensor, face: Tensor) -> Tensor:
        """Cross-entropy of all faces and of each image's hardest background, by the number of faces."""
        losses = F.cross_entropy(logits.flatten(0, 1), face.flatten(), reduction="none").view_as(face)
        count = face.sum(1, keepdim=True)
        wanted = (count * self.config.negatives).long().clamp(max=face.shape[1] - 1)
        order = losses.detach().masked_fill(face > 0, 0).argsort(dim=1, descending=True, stable=True)
        ranked = torch.arange(face.shape[1], device=face.device) < wanted
        hard = torch.zeros_like(ranked).scatter(1, order, ranked)
        return losses[hard | (face > 0)].sum() / count.sum().clamp(min=1)


def _compute_smooth_l1(found: Tensor, wanted: Tensor) -> Tensor:
    """Smooth L1 summed over coordinates, averaged over anchors; 0 for none."""
    return F.smooth_l1_loss(found, wanted, reduction="sum") / max(len(found), 1)
