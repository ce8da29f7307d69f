"""Detect's passes over images on the device: the quick one, the one at full size, and one for close-ups."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from facepipe.imaging.geometry import bound_by_area
from facepipe.models.protocols import Faces
from facepipe.models.runtime.transfers import Uploads
from facepipe.stages.detect import CANDIDATE, CERTAIN, DOUBTFUL, Detect, join_faces
from facepipe.stages.resident.coordinates import FaceArrays
from facepipe.stages.resident.detection import BatchDetector, QueuedSearch
from facepipe.stages.resident.letterbox import LetterboxRule
from facepipe.stages.resident.retinaface import ResidentLimits, ResidentRetinaFace
from facepipe.stages.resident.sampling import ResidentImages
from facepipe.stages.turned import find_turned_faces
from facepipe.types import Int64, UInt8Image


class BatchCapacity(NamedTuple):
    """What is searched at a time.

    Attributes:
        frames: images of one shape
        candidates: candidates of each image that the device holds
        faces: faces of each image that the device holds
    """

    frames: int = 32
    candidates: int = 512
    faces: int = 128


class SearchResult(NamedTuple):
    """What a search found, in pixels of the images.

    Attributes:
        faces: the faces
        candidates: faces, and candidates of images that were searched at full size, before turned ones were looked for
    """

    faces: FaceArrays
    candidates: FaceArrays


class DetectionPasses:
    """What `Detect.detect_faces` does with images, by its options, on a device."""

    def __init__(self, detect: Detect, detector: ResidentRetinaFace, uploads: Uploads, capacity: BatchCapacity):
        """Prepare the passes.

        Args:
            detect: options.
            detector: the network on the device.
            uploads: sends the inputs that the host makes.
            capacity: what is searched at a time.
        """
        self._detect = detect
        # This copy letterboxes images that the device does not, and asks its detector for the stride. The detector is
        # put where a cached_property looks before it loads anything.
        self._host_stage: Any = replace(detect)
        self._host_stage.__dict__["detector"] = detector
        rule = LetterboxRule(detect.border_below, detector.stride)

        # Two detectors that differ in their minimum score alone: the quick pass must also see what is doubtful.
        def make_detector(min_score: float) -> BatchDetector:
            limits = ResidentLimits(min_score, detect.max_iou, capacity.candidates, capacity.faces)
            return BatchDetector(detector, limits, rule, uploads, capacity.frames)

        # The full pass keeps candidates that may be turned faces.
        self._full_detector = make_detector(detect.lowest_score)
        self._uploads = uploads
        self._quick_detector = make_detector(min(DOUBTFUL, detect.min_score))

    def search(self, resident: ResidentImages, pixels: Sequence[UInt8Image]) -> Generator[None, None, SearchResult]:
        """Search images for faces, also for such as lie on their side or upside down.

        Yield twice, each time after work was queued that need not be waited for yet.

        Args:
            resident: the images on the device.
            pixels: the same images on the host.

        Returns:
            Faces and candidates in pixels of the images.
        """
        candidates = yield from self._run_passes(resident, pixels)
        detect = self._detect
        faces = candidates.keep_scores(detect.min_score)
        if detect.turn_model is None:
            return SearchResult(faces, candidates)
        weak = candidates.keep_scores(CANDIDATE).leave_out_images(faces.image).split_images()
        images = dict(enumerate(pixels))
        changed = find_turned_faces(faces.split_images(), weak, images, detect.turn_model, self._search_turned)
        if changed:
            unchanged = faces.leave_out_images(np.array(list(changed), np.int64))
            faces = FaceArrays.concatenate([unchanged, FaceArrays.join_images(changed)])
        return SearchResult(faces, candidates)

    def search_larger(self, pixels: UInt8Image, size: int) -> Faces:
        """Search one image at another size, and wait for the result: such images are few."""
        resident = ResidentImages.upload([pixels], self._uploads)
        sizes = np.array([size], np.int64)
        queued = self._full_detector.begin(
            resident, np.zeros(1, np.int64), sizes, lambda n: self._host_stage.letterbox(pixels, size)
        )
        return self._full_detector.finish(queued).keep_scores(self._detect.min_score).split_images().get(0, _NO_FACES)

    def _search_turned(self, turned: dict[int, UInt8Image]) -> dict[int, Faces]:
        """Search turned images by number, and wait for the result: they are few."""
        pixels = list(turned.values())
        passes = self._run_passes(ResidentImages.upload(pixels, self._uploads), pixels)
        try:
            while True:
                next(passes)
        except StopIteration as end:
            faces: FaceArrays = end.value
        by_place = faces.keep_scores(self._detect.min_score).split_images()
        return {n: by_place.get(place, _NO_FACES) for place, n in enumerate(turned)}

    def _run_passes(self, resident: ResidentImages, pixels: Sequence[UInt8Image]) -> Generator[None, None, FaceArrays]:
        """Run the passes. Yield twice; return faces, and candidates of images searched at full size."""
        detect = self._detect
        # The longest side decides which pass an image gets.
        numbers = np.arange(len(pixels))
        sides = resident.shapes.max(1)

        def begin(detector: BatchDetector, chosen: Int64, size: int) -> list[QueuedSearch]:
            # Images that are much longer than high get larger inputs of the same area.
            shapes = resident.shapes.tolist()
            fitted = np.array([bound_by_area(size, width, height) for height, width in shapes], np.int64)
            return detector.begin(
                resident, chosen, fitted, lambda n: self._host_stage.letterbox(pixels[n], int(fitted[n]))
            )

        def begin_closeups(chosen: Int64, size: int) -> list[QueuedSearch]:
            sizes = np.full(len(pixels), size, np.int64)
            return self._full_detector.begin(
                resident, chosen, sizes, lambda n: self._host_stage.letterbox(pixels[n], size)
            )

        # The quick pass, and the full pass of images that are small anyway.
        is_quick = (np.minimum(detect.size, sides) > detect.quick_look) & (detect.quick_look > 0)
        quick_searches = begin(self._quick_detector, numbers[is_quick], detect.quick_look)
        full_searches = begin(self._full_detector, numbers[~is_quick], detect.size)
        yield
        # The full pass of images about which the quick pass was not certain.
        certain = self._quick_detector.finish(quick_searches).keep_confident_images(max(CERTAIN, detect.min_score))
        uncertain = np.setdiff1d(numbers[is_quick], certain.image)
        full_searches += begin(self._full_detector, uncertain, detect.size)
        yield
        # The pass for close-ups, of images without a face.
        faces = FaceArrays.concatenate([certain, self._full_detector.finish(full_searches)])
        empty = np.setdiff1d(numbers, faces.keep_scores(detect.min_score).image)
        empty = empty[(sides[empty] > detect.border_below) & detect.second_look]
        closeups = begin_closeups(empty, min(detect.size // 2, detect.border_below))
        found = self._full_detector.finish(closeups).keep_closeups(resident.shapes)
        with_face = found.keep_scores(detect.min_score).image
        # An image without a close-up keeps the candidates of both searches.
        known = faces.split_images()
        joined = {
            n: of_image if n in with_face else join_faces(known.get(n, _NO_FACES), of_image)
            for n, of_image in found.split_images().items()
        }
        return FaceArrays.concatenate([faces.leave_out_images(found.image), FaceArrays.join_images(joined)])


_NO_FACES = Faces(np.empty((0, 4), np.float32), np.empty((0, 5, 2), np.float32), np.empty(0, np.float32))
