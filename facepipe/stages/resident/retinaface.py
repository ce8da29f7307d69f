"""RetinaFace from frames to faces on one device: the network, its best candidates, decoding, suppression.

All shapes are fixed, so that nothing waits for the host. Images that the fixed sizes do not hold are flagged, and
`ResidentRetinaFace.detect_on_host` then gives their faces by the host's own post-processing.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facepipe.models.detectors import retinaface_decode as decoding
from facepipe.models.detectors.retinaface import Channels, Predictions, RetinaFaceNet, fold_batch_norms
from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.models.runtime.precision import DTYPES, cast_network
from facepipe.models.runtime.torch_inference import to_channels_last
from facepipe.stages.resident.nms import apply_nms
from facepipe.types import Bool, Float32, Int64

_ROUNDS = 12  # of suppression; what needs more is flagged
_HEAD, _FACE = 2, 15  # numbers that lead an image's row, and those of a face: box 4, landmarks 10, score 1
_HEADS = ("class_head", "box_head", "landmark_head")


class ResidentLimits(NamedTuple):
    """What is kept of an image: lowest score, highest overlap (IoU); candidates looked at, and faces at most."""

    min_score: float = 0.7
    max_iou: float = 0.4
    candidates: int = 512
    faces: int = 128


class PackedFaces(NamedTuple):
    """Faces of n images as they come from the device: number (n,), flagged (n,) bool, faces (n, m, 15) float32."""

    number: Int64
    flagged: Bool
    faces: Float32

    @classmethod
    def from_rows(cls, rows: Float32) -> "PackedFaces":
        """Of the rows (n, 2 + 15 m) that `packed` makes."""
        faces = rows[:, _HEAD:].reshape(len(rows), -1, _FACE)
        return cls(rows[:, 0].astype(np.int64), rows[:, 1] > 0, faces)

    def unpack_image(self, n: int) -> Faces:
        """The faces of an image that is not flagged."""
        found = self.faces[n, : self.number[n]]
        return Faces(found[:, :4], found[:, 4:14].reshape(-1, 5, 2), found[:, 14])


class ResidentRetinaFace:
    """RetinaFace on a device.

    channels: the order in which the network was trained to get them
    """

    stride = 32

    def __init__(self, net: RetinaFaceNet, channels: Channels, device: str, precision: str = "float32"):
        self.device = torch.device(device)
        self.dtype, self._flipped = DTYPES[precision], channels == "bgr"
        self.net = to_channels_last(cast_network(fold_batch_norms(net), precision, _HEADS), device)
        mean = torch.tensor(decoding.MEAN_BGR, dtype=self.dtype, device=self.device)
        self._mean = mean.view(1, 3, 1, 1)
        self._anchors: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def detect(self, frames: Tensor, limits: ResidentLimits) -> Tensor:
        """(n, h, w, 3) uint8 RGB -> (n, 2 + 15 m) float32, for `PackedFaces.from_rows` on the host."""
        return pack_faces(self.predict(frames), self._prior(frames), limits)

    @torch.inference_mode()
    def predict(self, frames: Tensor) -> Predictions:
        """(n, h, w, 3) uint8 RGB -> offsets (n, a, 4), scores (n, a), landmark offsets (n, a, 10), float32."""
        planes = frames.permute(0, 3, 1, 2)
        ordered = planes.flip(1) if self._flipped else planes
        # Levels less the mean are whole numbers below 256: each of the three precisions holds them exactly.
        x = (ordered.to(self.dtype) - self._mean).contiguous(memory_format=torch.channels_last)
        offsets, scores, points = self.net(x)
        return offsets, scores, points

    def detect_on_host(self, frames: Tensor, limits: ResidentLimits) -> list[Faces]:
        """All faces of frames, however many, by `retinaface_decode.decode_faces`; waits for the device."""
        offsets, scores, points = (out.cpu().numpy() for out in self.predict(frames))
        height, width = frames.shape[1:3]
        rows = zip(offsets, scores, points, strict=True)
        kept = DetectionLimits(limits.min_score, limits.max_iou)
        return [decoding.decode_faces(decoding.RetinaFaceOutputs(*row), (height, width), kept) for row in rows]

    def _prior(self, frames: Tensor) -> Tensor:
        size = tuple(frames.shape[1:3])
        if size not in self._anchors:
            self._anchors[size] = torch.from_numpy(decoding.build_anchors(*size)).to(self.device)
        return self._anchors[size]


def pack_faces(predictions: Predictions, prior: Tensor, limits: ResidentLimits) -> Tensor:
    """(n, 2 + 15 m) float32 of the network's outputs and the anchors (a, 4): count, flag, and m faces by falling score.

    The flag is 1 where an image has more candidates or faces than `limits` lets through, or where suppression has not
    settled: what the row then holds is not to be used.
    """
    offsets, scores, points = predictions
    best, count = _candidates(scores, limits)
    valid = torch.arange(best.shape[1], device=scores.device) < count[:, None]
    boxes, landmarks = decoded(_rows(offsets, best), _rows(points, best), prior[best])
    kept, settled = apply_nms(boxes, valid, limits.max_iou, _ROUNDS)
    faces = kept.sum(1)
    most = min(limits.faces, best.shape[1])
    order = torch.sort(kept.to(torch.uint8), dim=1, descending=True, stable=True).indices[:, :most]
    values = torch.cat([boxes, landmarks.flatten(2), scores.gather(1, best)[..., None]], 2)
    flagged = (count > best.shape[1]) | (faces > most) | ~settled
    head = torch.stack([faces.float(), flagged.float()], 1)
    return torch.cat([head, _rows(values, order).flatten(1)], 1)


def decoded(offsets: Tensor, points: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (n, k, 4) and landmarks (n, k, 5, 2) in pixels of offsets (n, k, 4) and (n, k, 10) from anchors (n, k, 4).

    Operation by operation what `retinaface_decode.postprocess` does.
    """
    middle, side = prior[..., :2], prior[..., 2:]
    centre = middle + offsets[..., :2] * decoding.CENTRE_VARIANCE * side
    size = side * (offsets[..., 2:] * decoding.SIZE_VARIANCE).clamp(-10, 10).exp()
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1)
    spots = points.view(*points.shape[:-1], 5, 2) * decoding.CENTRE_VARIANCE * side[..., None, :]
    return boxes, middle[..., None, :] + spots


def _candidates(scores: Tensor, limits: ResidentLimits) -> tuple[Tensor, Tensor]:
    """Anchors (n, k) by falling score, of equal ones the first first, and how many (n,) reach the lowest score kept.

    Scores and anchors make one integer each, since the order in which `topk` gives equal values is nowhere promised.
    """
    above = scores >= limits.min_score
    number = scores.shape[1]
    bits = scores.masked_fill(~above, 0).view(torch.int32).to(torch.int64)  # of floats >= 0 ordered as they are
    key = (bits << 32) | torch.arange(number - 1, -1, -1, device=scores.device)
    best = torch.topk(key, min(limits.candidates, number), 1).values
    return number - 1 - (best & 0xFFFFFFFF), above.sum(1)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """(n, k, d) of values (n, a, d) at index (n, k)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
