"""Which anchor is which face, and what the network has to say there (biubug6's RetinaFace, utils/box_utils.py)."""

import torch
from torch import Tensor

from facepipe.models.detectors.retinaface_decode import CENTRE_VARIANCE, SIZE_VARIANCE
from facepipe.training.detection.overlap import compute_iou, to_corners


def match_anchors(boxes: Tensor, priors: Tensor, positive: float, ignore: float) -> Tensor:
    """Faces (f, 4) x1 y1 x2 y2 and anchors (a, 4) centre and size -> (a,) int64: the anchor's face, -1 for background.

    An anchor is its best face's where they overlap by `positive` or more. Every face whose best anchor overlaps by
    `ignore` or more has that anchor in any case; of two faces that want the same the later has it. Unlike in the
    reference, a face below `ignore` takes no anchor away from another.
    """
    if not len(boxes):
        return torch.full((len(priors),), -1, dtype=torch.int64, device=priors.device)
    overlaps = compute_iou(boxes, to_corners(priors))
    best, face = overlaps.max(0)
    assigned = torch.where(best >= positive, face, -1)
    reached, prior = overlaps.max(1)
    kept = (reached >= ignore).nonzero().squeeze(1)
    forced = torch.full_like(assigned, -1).scatter_reduce_(0, prior[kept], kept, "amax")
    return torch.where(forced >= 0, forced, assigned)


def encode_boxes(boxes: Tensor, priors: Tensor) -> Tensor:
    """(k, 4) x1 y1 x2 y2 and their anchors -> offsets (k, 4), which `postprocess` turns back."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 - priors[:, :2]
    sides = (boxes[:, 2:] - boxes[:, :2]) / priors[:, 2:]
    return torch.cat([centre / (CENTRE_VARIANCE * priors[:, 2:]), sides.log() / SIZE_VARIANCE], 1)


def encode_points(points: Tensor, priors: Tensor) -> Tensor:
    """Landmarks (k, 10) x y x y ... and their anchors -> offsets (k, 10)."""
    centre, side = priors[:, None, :2], priors[:, None, 2:]
    return ((points.view(-1, 5, 2) - centre) / (CENTRE_VARIANCE * side)).flatten(1)
