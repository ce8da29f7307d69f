"""A deterministic detector and embedder without weights: for tests, and for simulating runs of any size."""

import ctypes

import cv2
import numpy as np

from facepipe.models.protocols import Faces
from facepipe.types import Float32, UInt8Image

_MIN_AREA = 16


class FakeDetector:
    """A face is a rectangle of red (r > 180, g and b < 80); its landmarks stand at fixed places inside it."""

    stride = 8

    def detect(self, images: UInt8Image) -> list[Faces]:
        return [self._one(image) for image in images]

    def _one(self, image: UInt8Image) -> Faces:
        mask = ((image[..., 0] > 180) & (image[..., 1] < 80) & (image[..., 2] < 80)).astype(np.uint8)
        found = cv2.connectedComponentsWithStats(mask)[2][1:]
        found = found[found[:, cv2.CC_STAT_AREA] >= _MIN_AREA]
        found = found[np.argsort(-found[:, cv2.CC_STAT_AREA], kind="stable")]
        low = found[:, :2].astype(np.float32)
        side = found[:, 2:4].astype(np.float32)
        spots = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]], np.float32)
        scores = (found[:, cv2.CC_STAT_AREA] / (found[:, cv2.CC_STAT_AREA] + 100.0)).astype(np.float32)
        return Faces(np.concatenate([low, low + side], 1), low[:, None] + spots * side[:, None], scores)


class FatalDetector(FakeDetector):
    """A FakeDetector that kills its process, as a fault in native code would, at an image whose corner is magenta."""

    def _one(self, image: UInt8Image) -> Faces:
        r, g, b = map(int, image[:4, :4].reshape(-1, 3).mean(0))
        if r > 200 and g < 60 and b > 200:
            ctypes.string_at(0)  # a real one: SIGSEGV
        return super()._one(image)


class FakeEmbedder:
    """The chip's mean colours on a 7x6 grid and two constants: 128 numbers that tell chips apart."""

    dim, size = 128, (32, 32)

    def embed(self, chips: UInt8Image) -> Float32:
        grids = [cv2.resize(chip, (7, 6), interpolation=cv2.INTER_AREA).astype(np.float32).ravel() for chip in chips]
        body = np.stack(grids) / 255 if grids else np.empty((0, 126), np.float32)
        return np.concatenate([body, np.full((len(body), 2), 0.5, np.float32)], 1)
