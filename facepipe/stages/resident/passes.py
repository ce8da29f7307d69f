"""Detect's looks at images on the device: the quick one, the one at full size, and the second one at close-ups."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from facepipe.models.runtime.transfers import Uploads
from facepipe.stages.detect import CERTAIN, DOUBTFUL, Detect
from facepipe.stages.resident.coordinates import Found
from facepipe.stages.resident.detection import BatchDetector, Part
from facepipe.stages.resident.letterbox import PlacementRule
from facepipe.stages.resident.retinaface import ResidentLimits, ResidentRetinaFace
from facepipe.stages.resident.sampling import ResidentImages
from facepipe.types import Int64, UInt8Image

WAITS = 2  # times that `Looks.search` yields


class Capacity(NamedTuple):
    """Images of one shape that are searched at a time, and candidates and faces of each that the device holds."""

    frames: int = 32
    candidates: int = 512
    faces: int = 128


class Looks:
    """What `Detect.__call__` does with images, by its options, on a device."""

    def __init__(self, detect: Detect, finder: ResidentRetinaFace, uploads: Uploads, capacity: Capacity):
        self._detect = detect
        self._by_host = replace(detect)  # it letterboxes what the device does not, and asks its detector for the stride
        self._by_host.__dict__["detector"] = finder  # where a cached_property looks before it loads anything
        rule = PlacementRule(detect.border_below, finder.stride)

        def detection(min_score: float) -> BatchDetector:
            limits = ResidentLimits(min_score, detect.max_iou, capacity.candidates, capacity.faces)
            return BatchDetector(finder, limits, rule, uploads, capacity.frames)

        self._full = detection(detect.min_score)
        self._quick = detection(min(DOUBTFUL, detect.min_score))

    def search(self, resident: ResidentImages, pixels: Sequence[UInt8Image]) -> Generator[None, None, Found]:
        """The faces of images that are on the device, and as pixels here, in their pixels.

        Yields when something is queued whose end is not to be waited for yet.
        """
        detect, every = self._detect, np.arange(len(pixels))
        sides = resident.shapes.max(1)
        quick = (np.minimum(detect.size, sides) > detect.quick_look) & (detect.quick_look > 0)

        def begin(detection: BatchDetector, chosen: Int64, size: int) -> list[Part]:
            return detection.begin(resident, chosen, size, lambda n: self._by_host.letterbox(pixels[n], size))

        looks = begin(self._quick, every[quick], detect.quick_look)
        parts = begin(self._full, every[~quick], detect.size)
        yield
        sure = self._quick.finish(looks).whose_least(max(CERTAIN, detect.min_score))
        parts += begin(self._full, np.setdiff1d(every[quick], sure.image), detect.size)
        yield
        found = Found.joined([sure, self._full.finish(parts)])
        missed = np.setdiff1d(every, found.image)
        missed = missed[(sides[missed] > detect.border_below) & detect.second_look]
        again = begin(self._full, missed, min(detect.size // 2, detect.border_below))
        return Found.joined([found, self._full.finish(again)])
