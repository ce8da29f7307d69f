"""MTCNN (Zhang et al., SPL 2016): P-Net over a pyramid, then R-Net and O-Net on what it proposes.

Thresholds and rounding are those of the public PyTorch port (facenet-pytorch, models/utils/detect_face.py), so that
weights of that lineage find the same faces. Inside the cascade boxes have inclusive corners that count from 1, as in
the original MATLAB code. Results count from 0.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from facepipe.models.detectors.nms import apply_nms, apply_nms_by_smaller
from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.models.runtime.torch_inference import limit_threads, to_channels_last
from facepipe.types import Float32, Float64, Int32, Int64, UInt8Image

if TYPE_CHECKING:
    from torch import nn

    from facepipe.models.detectors.mtcnn_nets import MtcnnNets

# P-Net's windows: their side, and the distance from one to the next.
_WINDOW_SIDE = 12
_WINDOW_STEP = 2
# The pyramid: the smallest face, and the ratio of two levels.
_SMALLEST_FACE = 20
_LEVEL_RATIO = 0.709
# Lowest scores. O-Net's is an option.
_PNET_SCORE = 0.6
_RNET_SCORE = 0.7
# Highest overlaps: within a level, of all levels, after R-Net, and after O-Net (as a share of the smaller box).
_LEVEL_IOU = 0.5
_PYRAMID_IOU = 0.7
_RNET_IOU = 0.7
_ONET_SHARE = 0.7
# Bounds of memory: crops per run of R-Net and O-Net, and pixels per run of P-Net.
_CROPS_PER_RUN = 512
_PIXELS_PER_STRIPE = 1 << 15

# Integral images: (3, h + 1, w + 1) sums of all pixels above and left.
Sums = Int32 | Float64


class _Windows(NamedTuple):
    """P-Net's windows that may be faces.

    Attributes:
        cells: (n, 2) column and row of each.
        scores: (n,).
        offsets: (n, 4) of the boxes.
    """

    cells: Int64
    scores: Float32
    offsets: Float32


class _Spans(NamedTuple):
    """Where cells begin and end along one side; they may share pixels."""

    starts: Int64
    ends: Int64


class Mtcnn:
    """The cascade on any torch device. It finds faces of 20 pixels and more.

    Images are searched one by one, all windows of an image together.

    Attributes:
        stride: Image sides must be multiples of it.
    """

    stride = 1

    def __init__(self, nets: "MtcnnNets", limits: DetectionLimits, *, device: str = "cpu", threads: int = 1):
        """Move the networks to the device.

        Args:
            nets: The three networks with their weights.
            limits: Which faces are kept; the score is O-Net's.
            device: A torch device.
            threads: Threads of torch on a CPU during detection.
        """
        to_channels_last(nets, device)
        self._nets = nets
        self._limits = limits
        self._device = device
        self._threads = threads

    def detect(self, images: Sequence[UInt8Image]) -> list[Faces]:
        """Find the faces of each image; see `Detector`."""
        import torch

        with limit_threads(self._threads), torch.inference_mode():
            return [self._detect_one(image) for image in images]

    def _detect_one(self, image: UInt8Image) -> Faces:
        height, width = image.shape[:2]
        # Each network moves the boxes of the one before, which are then grown to squares for the next.
        sums = _integrate(image)
        proposals = _to_squares(self._propose(sums, height, width))
        refined = _to_squares(self._refine(sums, proposals, (height, width)))
        return self._decide(sums, refined, (height, width))

    def _propose(self, sums: Sums, height: int, width: int) -> Float32:
        """Run P-Net and return the boxes (n, 4) that may be faces, moved by its offsets."""
        boxes = [np.empty((0, 4), np.float32)]
        scores = [np.empty(0, np.float32)]
        offsets = [np.empty((0, 4), np.float32)]
        # NMS within each level of the pyramid, then over all levels.
        for scale in list_scales(height, width):
            windows = self._find_windows(sums, int(height * scale + 1), int(width * scale + 1))
            # Corners of the windows in the level, inclusive and from 1, then in the image.
            corners = _WINDOW_STEP * np.tile(windows.cells, 2) + np.array([1, 1, _WINDOW_SIDE, _WINDOW_SIDE])
            level_boxes = np.floor(corners.astype(np.float32) / np.float32(scale))
            selected = apply_nms(level_boxes, windows.scores, _LEVEL_IOU)
            boxes.append(level_boxes[selected])
            scores.append(windows.scores[selected])
            offsets.append(windows.offsets[selected])
        all_boxes = np.concatenate(boxes)
        selected = apply_nms(all_boxes, np.concatenate(scores), _PYRAMID_IOU)
        best = all_boxes[selected]
        # Offsets are shares of the sides of a box.
        return best + np.concatenate(offsets)[selected] * np.tile(best[:, 2:] - best[:, :2], 2)

    def _find_windows(self, sums: Sums, height: int, width: int) -> _Windows:
        """Run P-Net on one level of the pyramid.

        The level is computed in stripes, because the networks' maps take many times the memory of the image.
        """
        rows = _divide(0, sums.shape[1] - 1, height)
        columns = _divide(0, sums.shape[2] - 1, width)
        cells = []
        scores = []
        offsets = []
        for start, stop in split_into_stripes(height, width):
            pixels = _average_level(sums, _Spans(rows.starts[start:stop], rows.ends[start:stop]), columns)
            score, offset = self._run(self._nets.pnet, pixels)
            y, x = np.nonzero(score[0] >= _PNET_SCORE)
            cells.append(np.stack([x, y + start // _WINDOW_STEP], 1))
            scores.append(score[0, y, x])
            offsets.append(offset[0, :, y, x])
        return _Windows(np.concatenate(cells), np.concatenate(scores), np.concatenate(offsets))

    def _refine(self, sums: Sums, boxes: Float32, shape: tuple[int, int]) -> Float32:
        """Run R-Net and return the boxes that are still faces, moved by its offsets."""
        boxes, windows = _clip_to_image(boxes, shape)
        scores, offsets = self._predict(self._nets.rnet, sums, windows, 24)
        passed = scores > _RNET_SCORE
        boxes = boxes[passed]
        offsets = offsets[passed]
        selected = apply_nms(boxes, scores[passed], _RNET_IOU)
        return _move(boxes[selected], offsets[selected])

    def _decide(self, sums: Sums, boxes: Float32, shape: tuple[int, int]) -> Faces:
        """Run O-Net and return the faces with their landmarks."""
        boxes, windows = _clip_to_image(boxes, shape)
        scores, offsets, points = self._predict(self._nets.onet, sums, windows, 48)
        passed = scores > self._limits.min_score
        boxes = boxes[passed]
        scores = scores[passed]
        # O-Net gives five x, then five y; as (n, 5, 2) shares of the box they become positions that count from 0.
        points = points[passed].reshape(-1, 2, 5).transpose(0, 2, 1)
        landmarks = boxes[:, None, :2] - 1 + points * (boxes[:, None, 2:] - boxes[:, None, :2] + 1)
        boxes = _move(boxes, offsets[passed])
        # Drop boxes inside others first, as the original does, then apply the option.
        selected = apply_nms_by_smaller(boxes, scores, _ONET_SHARE)
        selected = selected[apply_nms(boxes[selected], scores[selected], self._limits.max_iou)]
        return Faces(
            boxes=(boxes[selected] - 1).astype(np.float32),
            landmarks=landmarks[selected].astype(np.float32),
            scores=scores[selected].astype(np.float32),
        )

    def _predict(self, net: "nn.Module", sums: Sums, windows: Int64, side: int) -> tuple[Float32, ...]:
        """Run a network on windows, each scaled to side x side, in runs that bound memory."""
        parts = [
            self._run(net, _average_windows(sums, windows[start : start + _CROPS_PER_RUN], side))
            for start in range(0, max(len(windows), 1), _CROPS_PER_RUN)
        ]
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def _run(self, net: "nn.Module", pixels: Float32) -> tuple[Float32, ...]:
        import torch

        return tuple(output.float().cpu().numpy() for output in net(torch.from_numpy(pixels).to(self._device)))


def list_scales(height: int, width: int) -> list[float]:
    """List the scales of the pyramid, from 20-pixel faces up to when the shorter side is below P-Net's window."""
    scales = []
    scale = _WINDOW_SIDE / _SMALLEST_FACE
    while min(height, width) * scale >= _WINDOW_SIDE:
        scales.append(scale)
        scale *= _LEVEL_RATIO
    return scales


def split_into_stripes(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the rows (start, stop) of a level's stripes, which together contain each window once."""
    rows = max(_PIXELS_PER_STRIPE // width // _WINDOW_STEP, 8) * _WINDOW_STEP
    last = max(height - _WINDOW_SIDE + _WINDOW_STEP, 1)  # where a window can begin
    for start in range(0, last, rows):
        yield start, height if start + rows >= last else start + rows + _WINDOW_SIDE - _WINDOW_STEP


def _integrate(image: UInt8Image) -> Sums:
    """Compute the exact integral images of the channels."""
    exact_depth = cv2.CV_32S if image.size // 3 * 255 < 2**31 else cv2.CV_64F
    # Sums fit into int32 for images up to about 8 million pixels.
    return np.stack([cv2.integral(channel, sdepth=exact_depth) for channel in cv2.split(image)])


def _divide(low: Int64 | int, high: Int64 | int, n: int) -> _Spans:
    """Divide the spans [low, high) into n cells each, (..., n), rounded outward."""
    k = np.arange(n)
    length: Int64 = np.asarray(high, np.int64) - low
    return _Spans(low + k * length // n, low + ((k + 1) * length + n - 1) // n)


def _average_level(sums: Sums, rows: _Spans, columns: _Spans) -> Float32:
    """Average the image in a grid of cells, (1, 3, r, c), scaled as the networks take it."""
    bands = sums[:, rows.ends] - sums[:, rows.starts]
    totals = (bands.take(columns.ends, 2) - bands.take(columns.starts, 2))[None]
    return _scale_means(totals, (rows.ends - rows.starts)[:, None] * (columns.ends - columns.starts))


def _average_windows(sums: Sums, windows: Int64, side: int) -> Float32:
    """Compute the means of windows (n, 4) in side x side cells, (n, 3, side, side), scaled for the networks."""
    x1, y1, x2, y2 = windows[:, :, None].transpose(1, 0, 2)
    rows = _divide(y1, y2, side)
    columns = _divide(x1, x2, side)
    flat = sums.reshape(3, -1)
    width = sums.shape[2]
    # The sum of a cell from the integral image at its four corners.
    # The sides of all cells are starts and ends of both spans: (n, side) each.
    top_left, top_right, bottom_left, bottom_right = (
        flat.take(y[:, :, None] * width + x[:, None], 1) for y in rows for x in columns
    )
    totals = (bottom_right - top_right - bottom_left + top_left).swapaxes(0, 1)
    areas = (rows.ends - rows.starts)[:, :, None] * (columns.ends - columns.starts)[:, None]
    return _scale_means(totals, areas[:, None])


def _scale_means(totals: Sums, areas: Int64) -> Float32:
    means = np.asarray(totals, np.float32)
    means /= areas.astype(np.float32)
    return (means - np.float32(127.5)) * np.float32(1 / 128)


def _clip_to_image(boxes: Float32, shape: tuple[int, int]) -> tuple[Float32, Int64]:
    """Drop the boxes without pixels of the image; also return their half-open windows, which count from 0."""
    height, width = shape
    windows = np.trunc(boxes).astype(np.int64)
    windows[:, :2] = np.maximum(windows[:, :2], 1) - 1
    windows[:, 2:] = np.minimum(windows[:, 2:], [width, height])
    has_pixels = (windows[:, 2:] > windows[:, :2]).all(1)
    return boxes[has_pixels], windows[has_pixels]


def _to_squares(boxes: Float32) -> Float32:
    """Grow boxes to squares about the same centres, with the longer side."""
    sides = boxes[:, 2:] - boxes[:, :2]
    longer = sides.max(1, keepdims=True)
    # The centre stays in place.
    low = boxes[:, :2] + sides / 2 - longer / 2
    return np.concatenate([low, low + longer], 1)


def _move(boxes: Float32, offsets: Float32) -> Float32:
    return boxes + offsets * np.tile(boxes[:, 2:] - boxes[:, :2] + 1, 2)
