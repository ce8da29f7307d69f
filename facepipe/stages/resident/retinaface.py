"""RetinaFace from frames to faces on one device: the network, its best candidates, decoding, NMS.

All shapes are fixed, so that nothing waits for the host. Images that need more than the fixed sizes are flagged. The
host then computes their faces with its own post-processing (`ResidentRetinaFace.detect_on_host`).
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

_NMS_ROUNDS = 12  # images that need more are flagged
_HEAD_NUMBERS = 2  # that start an image's row: number of faces, flag
_FACE_NUMBERS = 15  # per face: box 4, landmarks 10, score 1
_FLOAT32_LAYERS = ("class_head", "box_head", "landmark_head")


class ResidentLimits(NamedTuple):
    """What is kept of an image.

    Attributes:
        min_score: minimum confidence of a face
        max_iou: maximum overlap of two faces
        candidates: maximum number of candidates that are decoded
        faces: maximum number of faces
    """

    min_score: float = 0.7
    max_iou: float = 0.4
    candidates: int = 512
    faces: int = 128


class PackedFaces(NamedTuple):
    """Faces of n images as they come from the device.

    Attributes:
        number: faces of each image, (n,)
        flagged: whether the host must compute the faces of an image, (n,)
        faces: box, landmarks and score, (n, m, 15)
    """

    number: Int64
    flagged: Bool
    faces: Float32

    @classmethod
    def from_rows(cls, rows: Float32) -> "PackedFaces":
        """Read the rows (n, 2 + 15 m) of `pack_faces`."""
        faces = rows[:, _HEAD_NUMBERS:].reshape(len(rows), -1, _FACE_NUMBERS)
        return cls(rows[:, 0].astype(np.int64), rows[:, 1] > 0, faces)

    def unpack_image(self, n: int) -> Faces:
        """Return the faces of an image that is not flagged."""
        faces = self.faces[n, : self.number[n]]
        return Faces(faces[:, :4], faces[:, 4:14].reshape(-1, 5, 2), faces[:, 14])


class ResidentRetinaFace:
    """RetinaFace on a device."""

    stride = 32

    def __init__(self, net: RetinaFaceNet, channels: Channels, device: str, precision: str = "float32"):
        """Put a network on a device.

        Args:
            net: the network with its weights.
            channels: order of channels in which it was trained.
            device: cuda, cuda:N or cpu.
            precision: float32, bfloat16 or float16. The last layers stay in float32.
        """
        self.device = torch.device(device)
        self.dtype = DTYPES[precision]
        self.net = to_channels_last(cast_network(fold_batch_norms(net), precision, _FLOAT32_LAYERS), device)
        self._is_bgr = channels == "bgr"
        # The mean is whole, so it is exact in every precision.
        mean = torch.tensor(decoding.MEAN_BGR, dtype=self.dtype, device=self.device)
        self._mean = mean.view(1, 3, 1, 1)
        self._anchors: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def detect(self, frames: Tensor, limits: ResidentLimits) -> Tensor:
        """Detect the faces of frames without waiting for the device.

        Args:
            frames: RGB, (n, h, w, 3) uint8.
            limits: what is kept of an image.

        Returns:
            Rows, (n, 2 + 15 m) float32, for `PackedFaces.from_rows` on the host.
        """
        return pack_faces(self.predict(frames), self._get_anchors(frames), limits)

    @torch.inference_mode()
    def predict(self, frames: Tensor) -> Predictions:
        """Run the network on frames.

        Args:
            frames: RGB, (n, h, w, 3) uint8.

        Returns:
            Offsets of boxes (n, a, 4), scores (n, a) and offsets of landmarks (n, a, 10), float32.
        """
        planes = frames.permute(0, 3, 1, 2)
        # Levels are RGB; reverse the channels if the network was trained on BGR.
        ordered = planes.flip(1) if self._is_bgr else planes
        # Levels less the mean are whole numbers below 256: each of the three precisions holds them exactly.
        x = (ordered.to(self.dtype) - self._mean).contiguous(memory_format=torch.channels_last)
        offsets, scores, points = self.net(x)
        return offsets, scores, points

    def detect_on_host(self, frames: Tensor, limits: ResidentLimits) -> list[Faces]:
        """Detect all faces of frames, however many, with the host's post-processing. This waits for the device."""
        offsets, scores, points = (output.cpu().numpy() for output in self.predict(frames))
        height, width = frames.shape[1:3]
        host_limits = DetectionLimits(limits.min_score, limits.max_iou)
        rows = zip(offsets, scores, points, strict=True)
        return [decoding.decode_faces(decoding.RetinaFaceOutputs(*row), (height, width), host_limits) for row in rows]

    def _get_anchors(self, frames: Tensor) -> Tensor:
        size = tuple(frames.shape[1:3])
        if size not in self._anchors:
            self._anchors[size] = torch.from_numpy(decoding.build_anchors(*size)).to(self.device)
        return self._anchors[size]


def pack_faces(predictions: Predictions, anchors: Tensor, limits: ResidentLimits) -> Tensor:
    """Decode the network's outputs into rows of fixed length.

    The flag of a row is 1 if the image has more candidates or faces than `limits` allow, or if NMS has not settled. The
    faces of such a row must not be used.

    Args:
        predictions: outputs of the network for n images.
        anchors: (a, 4).
        limits: what is kept of an image.

    Returns:
        Number of faces, flag, and m faces by descending score, (n, 2 + 15 m) float32.
    """
    offsets, scores, points = predictions
    # Decode the best candidates only.
    # The best anchors (n, k) and how many pass the score; surplus places are not candidates.
    best, count = _select_candidates(scores, limits)
    is_candidate = torch.arange(best.shape[1], device=scores.device) < count[:, None]
    boxes, landmarks = decode_candidates(_gather_rows(offsets, best), _gather_rows(points, best), anchors[best])
    kept, settled = apply_nms(boxes, is_candidate, limits.max_iou, _NMS_ROUNDS)
    # Move the kept boxes to the front. The sort is stable, so they stay in the order of their scores.
    faces = kept.sum(1)
    max_faces = min(limits.faces, best.shape[1])
    order = torch.sort(kept.to(torch.uint8), dim=1, descending=True, stable=True).indices[:, :max_faces]
    values = torch.cat([boxes, landmarks.flatten(2), scores.gather(1, best)[..., None]], 2)
    # Flag what the fixed sizes cannot hold.
    flagged = (count > best.shape[1]) | (faces > max_faces) | ~settled
    head = torch.stack([faces.float(), flagged.float()], 1)
    return torch.cat([head, _gather_rows(values, order).flatten(1)], 1)


def decode_candidates(offsets: Tensor, points: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Decode offsets from anchors, operation by operation as `retinaface_decode.decode_faces` does it.

    Args:
        offsets: offsets of boxes, (n, k, 4).
        points: offsets of landmarks, (n, k, 10).
        anchors: (n, k, 4).

    Returns:
        Boxes (n, k, 4) and landmarks (n, k, 5, 2) in pixels.
    """
    # Anchors are centre and side; boxes become corners.
    anchor_centre = anchors[..., :2]
    anchor_side = anchors[..., 2:]
    centre = anchor_centre + offsets[..., :2] * decoding.CENTRE_VARIANCE * anchor_side
    size = anchor_side * (offsets[..., 2:] * decoding.SIZE_VARIANCE).clamp(-10, 10).exp()
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1)
    shifts = points.view(*points.shape[:-1], 5, 2) * decoding.CENTRE_VARIANCE * anchor_side[..., None, :]
    return boxes, anchor_centre[..., None, :] + shifts


def _select_candidates(scores: Tensor, limits: ResidentLimits) -> tuple[Tensor, Tensor]:
    """Select the anchors with the highest scores; of equal scores, the first anchors.

    Score and anchor are combined into one integer, because the order in which `topk` returns equal values is not
    specified.

    Returns:
        Anchors by descending score, (n, k); and how many reach the minimum score, (n,).
    """
    is_above = scores >= limits.min_score
    anchors = scores.shape[1]
    # The bits of floats >= 0, read as integers, have the order of the floats.
    bits = scores.masked_fill(~is_above, 0).view(torch.int32).to(torch.int64)
    # Scores in the high bits; the reversed anchor number in the low ones, so that the first anchor wins a tie.
    key = (bits << 32) | torch.arange(anchors - 1, -1, -1, device=scores.device)
    best = torch.topk(key, min(limits.candidates, anchors), 1).values
    return anchors - 1 - (best & 0xFFFFFFFF), is_above.sum(1)


def _gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Gather rows (n, k, d) of values (n, a, d) at an index (n, k)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
