"""Assign anchors to faces, and encode the targets of their predictions (biubug6's RetinaFace, utils/box_utils.py)."""

import torch
from torch import Tensor

from facepipe.models.detectors.retinaface_decode import CENTRE_VARIANCE, SIZE_VARIANCE
from facepipe.training.detection.overlap import compute_iou, to_corners


def match_anchors(boxes: Tensor, priors: Tensor, positive: float, ignore: float) -> Tensor:
    """Assign anchors to the faces of an image.

    An anchor belongs to its best face if they overlap by `positive` or more. Every face whose best anchor overlaps by
    `ignore` or more gets that anchor in any case. If two faces want the same anchor, the later one gets it. Unlike in
    the reference, a face below `ignore` takes no anchor away from another.

    Args:
        boxes: x1 y1 x2 y2 of the faces, (f, 4).
        priors: centre and size of the anchors, (a, 4).
        positive: minimum overlap at which an anchor is a face.
        ignore: minimum overlap of a face's best anchor.

    Returns:
        The face of each anchor, (a,) int64; -1 for background.
    """
    # Without faces every anchor is background.
    if not len(boxes):
        return torch.full((len(priors),), -1, dtype=torch.int64, device=priors.device)
    # Overlaps (f, a): first each anchor takes its best face.
    overlaps = compute_iou(boxes, to_corners(priors))
    best_overlap, best_face = overlaps.max(0)
    assigned = torch.where(best_overlap >= positive, best_face, -1)
    # Give each face its best anchor.
    face_overlap, face_prior = overlaps.max(1)
    faces = (face_overlap >= ignore).nonzero().squeeze(1)
    forced = torch.full_like(assigned, -1).scatter_reduce_(0, face_prior[faces], faces, "amax")
    return torch.where(forced >= 0, forced, assigned)


def encode_boxes(boxes: Tensor, priors: Tensor) -> Tensor:
    """Encode boxes x1 y1 x2 y2, (k, 4), as offsets from their anchors, (k, 4), which `decode_faces` decodes."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 - priors[:, :2]
    sides = (boxes[:, 2:] - boxes[:, :2]) / priors[:, 2:]
    return torch.cat([centre / (CENTRE_VARIANCE * priors[:, 2:]), sides.log() / SIZE_VARIANCE], 1)


def encode_points(points: Tensor, priors: Tensor) -> Tensor:
    """Encode landmarks x y x y ..., (k, 10), as offsets from their anchors, (k, 10)."""
    centre = priors[:, None, :2]
    side = priors[:, None, 2:]
    return ((points.view(-1, 5, 2) - centre) / (CENTRE_VARIANCE * side)).flatten(1)
