"""MTCNN (Zhang et al., SPL 2016): P-Net over a pyramid, then R-Net and O-Net on what it proposes.

Thresholds and rounding are those of the public PyTorch port (facenet-pytorch, models/utils/detect_face.py), so that
weights of that lineage give its faces. Inside the cascade boxes have inclusive corners that count from 1, as in the
original's MATLAB; what leaves it counts from 0.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import cv2
import numpy as np

from facepipe.models.detectors.nms import apply_nms, apply_nms_by_smaller
from facepipe.models.protocols import Faces
from facepipe.types import Float32, Float64, Int32, Int64, UInt8Image

if TYPE_CHECKING:
    from torch import nn

    from facepipe.models.detectors.mtcnn_nets import MtcnnNets

_CELL, _STEP = 12, 2
_SMALLEST_FACE = 20
_FACTOR = 0.709
_PNET_SCORE, _RNET_SCORE = 0.6, 0.7
_SCALE_IOU, _PYRAMID_IOU, _RNET_IOU, _ONET_SHARE = 0.5, 0.7, 0.7, 0.7
_CROPS_PER_RUN = 512
_STRIPE = 1 << 15


Sums = Int32 | Float64


class Mtcnn:
    """The cascade on any torch device. `limits`: lowest score of O-Net, highest overlap (IoU) kept.

    Images are searched one by one, all windows of an image together. Faces of 20 pixels and more are found.
    threads: of torch, on a CPU, during detection
    """

    stride = 1

    def __init__(self, nets: "MtcnnNets", limits: tuple[float, float], device: str = "cpu", threads: int = 1):
        from facepipe.models.engines import to_channels_last

        to_channels_last(nets, device)
        self._nets = nets
        self._limits, self._device, self._threads = limits, device, threads

    def detect(self, images: UInt8Image) -> list[Faces]:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                return [self._one(image) for image in images]
        finally:
            torch.set_num_threads(before)

    def _one(self, image: UInt8Image) -> Faces:
        h, w = image.shape[:2]
        sums = _sums(image)
        proposals = _squares(self._propose(sums, h, w))
        refined = _squares(self._refine(sums, proposals, (h, w)))
        return self._output(sums, refined, (h, w))

    def _propose(self, sums: Sums, h: int, w: int) -> Float32:
        """P-Net: boxes (n, 4) of 12-pixel windows that may be faces, moved by the network's offsets."""
        boxes, scores, offsets = ([np.empty((0, *shape), np.float32)] for shape in ((4,), (), (4,)))
        for scale in list_scales(h, w):
            cells, score, offset = self._windows(sums, (int(h * scale + 1), int(w * scale + 1)))
            corners = (_STEP * np.tile(cells, 2) + np.array([1, 1, _CELL, _CELL])).astype(np.float32)
            box = np.floor(corners / np.float32(scale))
            kept = apply_nms(box, score, _SCALE_IOU)
            for whole, part in ((boxes, box), (scores, score), (offsets, offset)):
                whole.append(part[kept])
        box, score, offset = (np.concatenate(parts) for parts in (boxes, scores, offsets))
        kept = apply_nms(box, score, _PYRAMID_IOU)
        return box[kept] + offset[kept] * np.tile(box[kept, 2:] - box[kept, :2], 2)

    def _windows(self, sums: Sums, size: tuple[int, int]) -> tuple[Int64, Float32, Float32]:
        """Cells (x, y), scores and offsets of P-Net's windows on one level of the pyramid.

        Levels are computed in stripes: the networks' maps take many times the memory of the image.
        """
        (top, bottom), columns = _edges(0, sums.shape[1] - 1, size[0]), _edges(0, sums.shape[2] - 1, size[1])
        cells, scores, offsets = [], [], []
        for start, stop in split_into_stripes(*size):
            level = _level(sums, (top[start:stop], bottom[start:stop]), columns)
            score, offset = self._run(self._nets.pnet, level)
            y, x = np.nonzero(score[0] >= _PNET_SCORE)
            cells.append(np.stack([x, y + start // _STEP], 1))
            scores.append(score[0, y, x])
            offsets.append(offset[0, :, y, x])
        return np.concatenate(cells), np.concatenate(scores), np.concatenate(offsets)

    def _refine(self, sums: Sums, boxes: Float32, shape: tuple[int, int]) -> Float32:
        """R-Net: the boxes that are still faces, moved by its offsets."""
        boxes, windows = _inside(boxes, shape)
        score, offset = self._score(self._nets.rnet, sums, windows, 24)
        passed = score > _RNET_SCORE
        boxes, score, offset = boxes[passed], score[passed], offset[passed]
        kept = apply_nms(boxes, score, _RNET_IOU)
        return _moved(boxes[kept], offset[kept])

    def _output(self, sums: Sums, boxes: Float32, shape: tuple[int, int]) -> Faces:
        """O-Net: the faces with their landmarks."""
        min_score, max_iou = self._limits
        boxes, windows = _inside(boxes, shape)
        score, offset, points = self._score(self._nets.onet, sums, windows, 48)
        passed = score > min_score
        boxes, score, offset = boxes[passed], score[passed], offset[passed]
        points = points[passed].reshape(-1, 2, 5).transpose(0, 2, 1)
        landmarks = boxes[:, None, :2] - 1 + points * (boxes[:, None, 2:] - boxes[:, None, :2] + 1)
        boxes = _moved(boxes, offset)
        kept = apply_nms_by_smaller(boxes, score, _ONET_SHARE)
        kept = kept[apply_nms(boxes[kept], score[kept], max_iou)]
        return Faces(
            (boxes[kept] - 1).astype(np.float32), landmarks[kept].astype(np.float32), score[kept].astype(np.float32)
        )

    def _score(self, net: "nn.Module", sums: Sums, windows: Int64, side: int) -> tuple[Float32, ...]:
        """What a network says of the windows, each scaled to side x side, in runs that bound memory."""
        parts = [
            self._run(net, _crops(sums, windows[start : start + _CROPS_PER_RUN], side))
            for start in range(0, max(len(windows), 1), _CROPS_PER_RUN)
        ]
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def _run(self, net: "nn.Module", pixels: Float32) -> tuple[Float32, ...]:
        import torch

        return tuple(out.float().cpu().numpy() for out in net(torch.from_numpy(pixels).to(self._device)))


def list_scales(h: int, w: int) -> list[float]:
    """Scales of the pyramid: from 20-pixel faces upward until the shorter side is below P-Net's window."""
    scale, found = _CELL / _SMALLEST_FACE, []
    while min(h, w) * scale >= _CELL:
        found.append(scale)
        scale *= _FACTOR
    return found


def split_into_stripes(h: int, w: int) -> Iterator[tuple[int, int]]:
    """Rows (start, stop) of a level's stripes, which together have each window once."""
    rows = max(_STRIPE // w // _STEP, 8) * _STEP
    last = max(h - _CELL + _STEP, 1)  # where a window can begin
    for start in range(0, last, rows):
        yield start, h if start + rows >= last else start + rows + _CELL - _STEP


def _sums(image: UInt8Image) -> Sums:
    """(3, h + 1, w + 1) sums of all pixels above and left, exact."""
    exact = cv2.CV_32S if image.size // 3 * 255 < 2**31 else cv2.CV_64F
    return np.stack([cv2.integral(channel, sdepth=exact) for channel in cv2.split(image)])


def _edges(low: Int64 | int, high: Int64 | int, n: int) -> tuple[Int64, Int64]:
    """Where the n cells of the spans [low, high) begin and end, (..., n): rounded outward, so they may share pixels."""
    k = np.arange(n)
    length: Int64 = np.asarray(high, np.int64) - low
    return low + k * length // n, low + ((k + 1) * length + n - 1) // n


def _level(sums: Sums, rows: tuple[Int64, Int64], columns: tuple[Int64, Int64]) -> Float32:
    """(1, 3, r, c) means of the image in a grid of cells with these edges, (r,) and (c,), as the networks take them."""
    (top, bottom), (left, right) = rows, columns
    bands = sums[:, bottom] - sums[:, top]
    total = (bands.take(right, 2) - bands.take(left, 2))[None]
    return _scaled(total, (bottom - top)[:, None] * (right - left))


def _crops(sums: Sums, windows: Int64, side: int) -> Float32:
    """(n, 3, side, side) means of half-open windows (n, 4), as the networks take them."""
    x1, y1, x2, y2 = windows[:, :, None].transpose(1, 0, 2)
    (top, bottom), (left, right) = _edges(y1, y2, side), _edges(x1, x2, side)
    flat, width = sums.reshape(3, -1), sums.shape[2]
    corner = [flat.take(y[:, :, None] * width + x[:, None], 1) for y in (top, bottom) for x in (left, right)]
    total = (corner[3] - corner[1] - corner[2] + corner[0]).swapaxes(0, 1)
    return _scaled(total, ((bottom - top)[:, :, None] * (right - left)[:, None])[:, None])


def _scaled(total: Sums, area: Int64) -> Float32:
    means = np.asarray(total, np.float32)
    means /= area.astype(np.float32)
    return (means - np.float32(127.5)) * np.float32(1 / 128)


def _inside(boxes: Float32, shape: tuple[int, int]) -> tuple[Float32, Int64]:
    """The boxes that have pixels of the image, and these as half-open windows that count from 0."""
    h, w = shape
    windows = np.trunc(boxes).astype(np.int64)
    windows[:, :2] = np.maximum(windows[:, :2], 1) - 1
    windows[:, 2:] = np.minimum(windows[:, 2:], [w, h])
    some = (windows[:, 2:] > windows[:, :2]).all(1)
    return boxes[some], windows[some]


def _squares(boxes: Float32) -> Float32:
    """Squares about the same centres, with the longer side."""
    sides = boxes[:, 2:] - boxes[:, :2]
    longer = sides.max(1, keepdims=True)
    low = boxes[:, :2] + sides / 2 - longer / 2
    return np.concatenate([low, low + longer], 1)


def _moved(boxes: Float32, offsets: Float32) -> Float32:
    return boxes + offsets * np.tile(boxes[:, 2:] - boxes[:, :2] + 1, 2)
