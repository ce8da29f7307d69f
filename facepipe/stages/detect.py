"""Detect: from pixels to faces, in pixels of the oriented full-size image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar, NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from facepipe.arrow import read_frames, set_columns, to_ragged_lists, view_buffers, view_images
from facepipe.imaging.geometry import Frame, bound_by_area
from facepipe.imaging.quality import find_shown_faces
from facepipe.models.detectors.turns import TurnModel, load_turn_model
from facepipe.models.protocols import CanAbstain, DetectionLimits, Detector, Faces, KnowsPlaces, RunsOnDevice
from facepipe.models.runtime.device import NetworkPrecision, resolve_device, resolve_precision
from facepipe.models.zoo.registry import find_card
from facepipe.schema import NO_FACE, OK
from facepipe.stages.crowds import add_small_faces, choose_larger_view
from facepipe.stages.turned import find_turned_faces, get_turns
from facepipe.stages.views import DecodedView
from facepipe.types import Float32, UInt8Image

DetectFunction = Callable[[Sequence[UInt8Image]], Sequence[Faces | None]]

# Scores of the quick pass: from DOUBTFUL on something may be a face, from CERTAIN on it is one (docs/performance.md).
DOUBTFUL = 0.02
CERTAIN = 0.9
# Longer side of a close-up's face, as a share of the image's shorter side.
CLOSEUP_SHARE = 0.4
# If nothing scores `min_score`, but something this, it may be a face that is turned.
CANDIDATE = 0.2
# Small faces score so little where they are nine pixels wide.
_SMALL_CANDIDATE = 0.08


class Letterbox(NamedTuple):
    """A detector's input, and how to map points back: x = (x' - left) / sx, likewise y, about pixel centres.

    Attributes:
        pixels: RGB, (h, w, 3)
        sx: scale of x
        sy: scale of y
        left: columns of border or padding before the image
        top: rows of border or padding before the image
    """

    pixels: UInt8Image
    sx: float
    sy: float
    left: int
    top: int


@dataclass(frozen=True)
class Detect:
    """Detect faces with a registered detector.

    Attributes:
        model: name of a detector, or a model's TOML file
        size: longest side of the detector's input in pixels; images are shrunk to it, never enlarged. Images that are
            more than twice as long as high get more, so that the area stays that of a picture of two to one
        quick_look: size of a first search. Its result counts if all its faces are certain and nothing else looks like
            a face (RetinaFace only). 0: always search at `size`
        border_below: images up to this size get a mirrored border of a quarter of their sides, which helps with faces
            that fill the frame (LFW crops)
        small_faces: search an image again at up to four times the size if most of what was found in it is small; this
            takes as many times longer as the area grows
        second_look: search images without a face once more, at half `size` with such a border, for close-ups, whose
            faces fill a good part of the image
        min_score: minimum confidence of a face
        max_iou: maximum overlap of two faces
        min_face: minimum shorter side of a box, in pixels of the full-size image
        turns: search images again, turned by quarters, in which a face seems to be upside down or on its side, or whose
            only faces are doubtful. For detectors with landmarks of their own
        batch: images per batch of a GPU, at most
        device: cpu, cuda, or auto (what the plan of workers says, otherwise a GPU if there is one)
        precision: of the network on a GPU: float32, tf32, bfloat16, float16, or auto (what `run.precision` says,
            otherwise float32)
        threads: threads of a CPU
    """

    model: str = "retinaface-mnet025"
    size: int = 640
    quick_look: int = 384
    border_below: int = 320
    small_faces: bool = True
    second_look: bool = True
    min_score: float = 0.7
    max_iou: float = 0.4
    min_face: float = 12.0
    turns: bool = True
    batch: int = 32
    device: str = "auto"
    precision: NetworkPrecision = "auto"
    threads: int = 1

    needs: ClassVar[tuple[str, ...]] = (
        "pixels",
        "pixels_width",
        "pixels_height",
        "pixels_scale",
        "pixels_left",
        "pixels_top",
        "width",
        "height",
        "status",
    )
    adds: ClassVar = ("boxes", "points", "scores", "turns")

    @cached_property
    def detector(self) -> Detector:
        """The detector, loaded at first use."""
        limits = DetectionLimits(self.lowest_score, self.max_iou)
        card = find_card(self.model, "detector")
        detector: Detector = card.load(resolve_device(self.device), self.threads, limits)
        if isinstance(detector, RunsOnDevice):
            detector.configure(resolve_precision(self.precision), self.batch)
        return detector

    @cached_property
    def has_own_landmarks(self) -> bool:
        """Whether the detector finds landmarks itself."""
        return find_card(self.model, "detector").turn_model is not None

    @cached_property
    def turn_model(self) -> TurnModel | None:
        """What tells how a face is turned; None if `turns` is off or the detector has no landmarks of its own."""
        name = find_card(self.model, "detector").turn_model if self.turns else None
        return load_turn_model(name) if name else None

    @property
    def lowest_score(self) -> float:
        """The score from which on candidates are kept: below `min_score` they may be turned or small faces."""
        if not self.has_own_landmarks or not (self.turns or self.small_faces):
            return self.min_score
        return min(self.min_score, _SMALL_CANDIDATE if self.small_faces else CANDIDATE)

    def setup(self) -> None:
        """Load the detector, and try it on a first image if it runs on a GPU, which may be faulty."""
        cv2.setNumThreads(1)
        detector = self.detector
        if resolve_device(self.device) != "cpu":
            detector.detect([np.zeros((self.size, self.size, 3), np.uint8)])

    def __call__(self, table: pa.Table) -> pa.Table:
        """Add the faces of each image, in pixels of the full-size image."""
        detector = self.detector
        if isinstance(detector, KnowsPlaces):
            return self._add_columns(table, _locate_faces(table, detector))
        # Only rows with pixels are searched; the others have no faces and keep their status.
        pixels = {n: image for n, image in enumerate(view_images(table)) if image is not None}
        candidates = self._run_passes(pixels)
        detected = self._choose_faces(candidates, pixels)
        sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
        frames = list(read_frames(table))
        results = [
            self._to_full_size(detected[row], frame, size) if row in detected else _NO_FACES
            for row, (frame, size) in enumerate(zip(frames, sizes, strict=True))
        ]
        # Images in which most faces are small are searched again at a larger size.
        has_bytes = self.small_faces and "bytes" in table.column_names
        data = list(view_buffers(table["bytes"])) if has_bytes else [None] * table.num_rows
        for n, faces in candidates.items() if self.small_faces else ():
            view = DecodedView(pixels[n], frames[n])
            larger = choose_larger_view(faces, view, data[n], sizes[n], self.size)
            if larger is not None:
                letterbox = self.letterbox(larger.view.pixels, larger.size)
                found = keep_scores(self._search({n: letterbox})[n], self.min_score)
                full = self._to_full_size(found, larger.view.frame, sizes[n])
                results[n] = add_small_faces(results[n], full, larger.max_side)
        return self._add_columns(table, results)

    def _add_columns(self, table: pa.Table, results: list[Faces]) -> pa.Table:
        """Add the faces of each image."""
        # Images that were read but show no face get a status of their own.
        statuses = []
        for faces, status in zip(results, table["status"].to_pylist(), strict=True):
            is_empty = status == OK and not len(faces.scores)
            statuses.append(NO_FACE if is_empty else status)
        columns = {
            "status": pa.array(statuses, pa.string()),
            "boxes": to_ragged_lists([faces.boxes for faces in results]),
            "points": to_ragged_lists([faces.landmarks for faces in results]),
            "scores": to_ragged_lists([faces.scores for faces in results]),
            "turns": to_ragged_lists([get_turns(faces).astype(np.float32) for faces in results]),
        }
        return set_columns(table, columns)

    def detect_faces(self, pixels: dict[int, UInt8Image]) -> dict[int, Faces]:
        """Detect the faces of images, also of such as lie on their side or upside down.

        Args:
            pixels: images (h, w, 3) RGB by number.

        Returns:
            Faces of each image by its number, in pixels of that image.
        """
        return self._choose_faces(self._run_passes(pixels), pixels)

    def _choose_faces(self, candidates: dict[int, Faces], pixels: dict[int, UInt8Image]) -> dict[int, Faces]:
        """Choose the faces among candidates, and look for turned ones."""
        detected = {n: keep_scores(faces, self.min_score) for n, faces in candidates.items()}
        if self.turn_model is None:
            return detected
        weak = {n: keep_scores(candidates[n], CANDIDATE) for n, faces in detected.items() if not len(faces.scores)}

        def search(turned: dict[int, UInt8Image]) -> dict[int, Faces]:
            return {n: keep_scores(faces, self.min_score) for n, faces in self._run_passes(turned).items()}

        return detected | find_turned_faces(detected, weak, pixels, self.turn_model, search)

    def _run_passes(self, pixels: dict[int, UInt8Image]) -> dict[int, Faces]:
        """Search images in up to three passes: quick, at full size, and for close-ups.

        Returns:
            Faces of each image, and candidates from `lowest_score` on of those that were searched at full size.
        """
        # Search small inputs first; images with a certain result are done.
        detected = self._detect_quickly(pixels)
        detected |= self._search(
            {n: self.letterbox(image, self.fit_size(image)) for n, image in pixels.items() if n not in detected}
        )
        if self.second_look:
            # Images up to `border_below` had a mirrored border already, so only larger ones get the second look.
            empty = [n for n, faces in detected.items() if not (faces.scores >= self.min_score).any()]
            size = min(self.size // 2, self.border_below)
            closeups = {
                n: self.letterbox(pixels[n], size) for n in empty if max(pixels[n].shape[:2]) > self.border_below
            }
            # An image without a close-up keeps the candidates of both searches.
            for n, faces in self._search(closeups).items():
                found = keep_closeups(faces, pixels[n].shape[:2])
                has_face = (found.scores >= self.min_score).any()
                detected[n] = found if has_face else join_faces(detected[n], found)
        return detected

    def fit_size(self, pixels: UInt8Image) -> int:
        """Return the longest side of the input of an image."""
        return bound_by_area(self.size, pixels.shape[1], pixels.shape[0])

    def _detect_quickly(self, pixels: dict[int, UInt8Image]) -> dict[int, Faces]:
        """Detect faces in small inputs. The result leaves out images that need the full size."""
        detector = self.detector
        if not self.quick_look or not isinstance(detector, CanAbstain):
            return {}
        # Images that are no larger than the quick look gain nothing from it.
        inputs = {
            n: self.letterbox(image, bound_by_area(self.quick_look, image.shape[1], image.shape[0]))
            for n, image in pixels.items()
            if min(self.size, max(image.shape[:2])) > self.quick_look
        }
        # The options may ask for stricter scores than the quick pass uses.
        reject_below = min(DOUBTFUL, self.min_score)
        accept_above = max(CERTAIN, self.min_score)
        detect = partial(detector.detect_confident, reject_below=reject_below, accept_above=accept_above)
        return self._search(inputs, detect)

    def _search(self, inputs: dict[int, Letterbox], detect: DetectFunction | None = None) -> dict[int, Faces]:
        """Detect faces in letterboxed images.

        Args:
            inputs: letterboxed images by number.
            detect: function of the images; default: the detector's own. It returns None for an image to leave out.

        Returns:
            Faces by number, in pixels of the image that was letterboxed.
        """
        detect = detect or self.detector.detect
        if not inputs:
            return {}
        # The detector makes batches, of as many shapes as suit it.
        faces = detect([letterbox.pixels for letterbox in inputs.values()])
        return {
            n: _undo_letterbox(of_image, inputs[n])
            for n, of_image in zip(inputs, faces, strict=True)
            if of_image is not None
        }

    def letterbox(self, pixels: UInt8Image, size: int) -> Letterbox:
        """Shrink an image to `size`, and pad it to the detector's stride.

        A small image gets a mirrored border instead of black padding (`border_below`).
        """
        # Shrink, then choose between a mirrored border and black padding.
        small = shrink_image(pixels, size)
        height, width = small.pixels.shape[:2]
        if max(height, width) <= self.border_below:
            top, bottom = self._measure_border(height)
            left, right = self._measure_border(width)
            bordered = cv2.copyMakeBorder(small.pixels, top, bottom, left, right, cv2.BORDER_REFLECT_101)
            return Letterbox(bordered, small.sx, small.sy, left, top)
        # Pad below and to the right only, so that points need no shift.
        padded = small.pixels
        bottom = -height % self.detector.stride
        right = -width % self.detector.stride
        if bottom or right:
            padded = cv2.copyMakeBorder(padded, 0, bottom, 0, right, cv2.BORDER_CONSTANT)
        return Letterbox(padded, small.sx, small.sy, 0, 0)

    def _measure_border(self, side: int) -> tuple[int, int]:
        """Return the border before and after: half the side in all, to the nearest multiple of the stride."""
        stride = self.detector.stride
        # The nearest multiple of the stride to 1.5 sides, but never less than the image itself.
        total = max(stride * round(1.5 * side / stride), side + (-side % stride)) - side
        return total // 2, total - total // 2

    def _to_full_size(self, faces: Faces, frame: Frame, size: tuple[int, int]) -> Faces:
        """Map faces to the full-size image, and drop small faces and those that a mirrored border made or completed."""
        boxes = frame.to_full(faces.boxes.reshape(-1, 2, 2)).reshape(-1, 4)
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        # A mirrored border mirrors faces too; their centres are outside the image.
        is_inside = ((centre >= 0) & (centre <= np.array(size) - 1)).all(1)
        is_large = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) >= self.min_face
        landmarks = frame.to_full(faces.landmarks)
        is_kept = is_inside & is_large
        # Landmarks that are predicted from a box, and boxes of other programs, are not completed by a mirror.
        if self.has_own_landmarks:
            is_kept &= find_shown_faces(boxes, landmarks, np.array(size, np.float64))
        keep = np.flatnonzero(is_kept)
        return Faces(boxes[keep], landmarks[keep], faces.scores[keep], get_turns(faces)[keep])


def _locate_faces(table: pa.Table, detector: KnowsPlaces) -> list[Faces]:
    """Locate the face of each image that was read, by its size alone."""
    sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), view_images(table), strict=True)
    return [_NO_FACES if image is None else detector.locate_face(width, height) for width, height, image in sizes]


class ShrunkImage(NamedTuple):
    """An image after shrinking.

    Attributes:
        pixels: RGB, (h, w, 3)
        sx: new width per old width
        sy: new height per old height
    """

    pixels: UInt8Image
    sx: float
    sy: float


def shrink_image(pixels: UInt8Image, size: int) -> ShrunkImage:
    """Shrink an image so that its longer side is at most `size`.

    It is halved by averages, then resized bilinearly, which skips no pixel down to a half. Averaging to any size takes
    five times as long.
    """
    sx = 1.0
    sy = 1.0
    height, width = pixels.shape[:2]
    # Halve by averages as long as more than a factor of two is left; odd last rows and columns are cut off.
    while max(height, width) > 2 * size and min(height, width) > 1:
        half = (width // 2, height // 2)
        even = pixels[: 2 * half[1], : 2 * half[0]]
        pixels = np.asarray(cv2.resize(even, half, interpolation=cv2.INTER_AREA), np.uint8)
        height, width = pixels.shape[:2]
        sx /= 2
        sy /= 2
    # Resize the rest, and measure the scales of both sides, which rounding makes unequal.
    scale = size / max(height, width)
    if scale < 1:
        new_size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = np.asarray(cv2.resize(pixels, new_size, interpolation=cv2.INTER_LINEAR), np.uint8)
        sx = sx * new_size[0] / width
        sy = sy * new_size[1] / height
    return ShrunkImage(pixels, sx, sy)


def keep_closeups(faces: Faces, shape: tuple[int, int]) -> Faces:
    """Keep the faces that fill a good part of an image (height, width): others would have shown at full size."""
    is_large = (faces.boxes[:, 2:] - faces.boxes[:, :2]).max(1, initial=0) >= CLOSEUP_SHARE * min(shape)
    return Faces(faces.boxes[is_large], faces.landmarks[is_large], faces.scores[is_large])


def join_faces(faces: Faces, others: Faces) -> Faces:
    """Join the faces of two searches of one image, by falling score."""
    scores = np.concatenate([faces.scores, others.scores])
    order = np.argsort(-scores, kind="stable")
    boxes = np.concatenate([faces.boxes, others.boxes])[order]
    return Faces(boxes, np.concatenate([faces.landmarks, others.landmarks])[order], scores[order])


def keep_scores(faces: Faces, min_score: float) -> Faces:
    """Keep the faces that score at least so much. Faces come by falling score."""
    count = int((faces.scores >= min_score).sum())
    return Faces(faces.boxes[:count], faces.landmarks[:count], faces.scores[:count])


_NO_FACES = Faces(np.empty((0, 4), np.float32), np.empty((0, 5, 2), np.float32), np.empty(0, np.float32))


def _undo_letterbox(faces: Faces, letterbox: Letterbox) -> Faces:
    shift = np.array([letterbox.left, letterbox.top], np.float32)
    scale = np.array([1 / letterbox.sx, 1 / letterbox.sy], np.float32)
    boxes = _scale_points(faces.boxes.reshape(-1, 2, 2) - shift, scale).reshape(-1, 4)
    return Faces(boxes, _scale_points(faces.landmarks - shift, scale), faces.scores)


def _scale_points(points: Float32, scale: Float32) -> Float32:
    """Scale points about pixel centres: a pixel's centre is at a whole coordinate."""
    return ((points + 0.5) * scale - 0.5).astype(np.float32)
