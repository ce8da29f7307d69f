"""Detect faces in images on the device: group the images by input shape, letterbox and search them without waiting.

`BatchDetector.begin` only queues work. `BatchDetector.finish` waits for what was queued first, and for no more.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from facepipe.models.protocols import Faces
from facepipe.models.runtime.batches import Batches, measure_free_memory, plan_batch_size
from facepipe.models.runtime.cuda_graphs import CudaGraphCache
from facepipe.models.runtime.transfers import Download, Uploads
from facepipe.stages.detect import Letterbox
from facepipe.stages.resident.coordinates import FaceArrays, undo_letterbox
from facepipe.stages.resident.letterbox import LetterboxPlacement, LetterboxRule, letterbox_images
from facepipe.stages.resident.retinaface import PackedFaces, ResidentLimits, ResidentRetinaFace
from facepipe.stages.resident.sampling import ResidentImages
from facepipe.types import Int64

# Bytes per pixel of a frame that are in use at once, beside its own 3 (tests/facepipe/stages/resident/test_memory.py).
# While frames are letterboxed: whole-number levels and sums of three channels, their product, an index, and the four
# pixels of a block if the image is halved. torch's profiler finds 60, and 128 with halving.
_LETTERBOX_BYTES = 130
# In the network, in numbers of its precision: the input 3 and its copy 3, then the first separable block at half the
# sides, 8 + 16 planes before and after an activation: (8 + 16 + 16) / 4. This is what the profiler finds, and as much
# again for cuDNN. RetinaFace's ResNet-50 trunk has 256 planes at a quarter of the sides, beside them twice the same 64.
_NETWORK_NUMBERS = {"MobileNet025": 26, "ResNet50": 90}
# Per pair of candidates in NMS: four sides in float32, the union, masks.
_PAIR_BYTES = 40


@dataclass(frozen=True)
class _Inputs:
    """Images of one input shape.

    Attributes:
        numbers: number of each image among those that are searched, (m,)
        resident: images on the device
        indices: index of each image in `resident`, (m,)
        placements: placement of each image in the detector's input
        letterboxes: sx, sy, left, top of each image
    """

    numbers: Int64
    resident: ResidentImages
    indices: Int64
    placements: list[LetterboxPlacement]
    letterboxes: list[tuple[float, float, int, int]]

    def select(self, part: slice) -> "_Inputs":
        """Return a part of the images."""
        return _Inputs(
            self.numbers[part],
            self.resident,
            self.indices[part],
            self.placements[part],
            self.letterboxes[part],
        )

    def letterbox(self) -> Tensor:
        """Make the detector's inputs, (m, h, w, 3) uint8, without a copy if the images can be used as they are."""
        if all(placement.is_unchanged for placement in self.placements):
            stack = self.resident.view_stack(self.indices)
            if stack is not None:
                return stack
        return letterbox_images(self.resident.select(self.indices), self.placements)


class QueuedSearch(NamedTuple):
    """A batch whose search is queued.

    Attributes:
        inputs: the images
        rows: rows of `ResidentRetinaFace.detect` on their way to the host
    """

    inputs: _Inputs
    rows: Download


class BatchDetector:
    """A detector that searches images on a device in batches of one shape."""

    def __init__(
        self,
        detector: ResidentRetinaFace,
        limits: ResidentLimits,
        rule: LetterboxRule,
        uploads: Uploads,
        max_batch: int,
    ):
        """Make a detector.

        Args:
            detector: the network.
            limits: what is kept of an image.
            rule: where images lie in the detector's input.
            uploads: sends the inputs that the host makes.
            max_batch: maximum number of images per batch; fewer if memory is short.
        """
        self._detector = detector
        self._limits = limits
        self._rule = rule
        self._uploads = uploads
        self._max_batch = max_batch
        self._graphs = CudaGraphCache(partial(detector.detect, limits=limits), detector.device)
        self._batches: dict[tuple[int, int], Batches[QueuedSearch]] = {}

    def begin(
        self, resident: ResidentImages, chosen: Int64, sizes: Int64, letterbox: Callable[[int], Letterbox]
    ) -> list[QueuedSearch]:
        """Queue the search of images.

        Args:
            resident: images on the device.
            chosen: numbers of the images to search, (m,).
            sizes: longest side of the detector's input for each image on the device; images are shrunk to it.
            letterbox: letterboxes the image of a number on the host, for images that the rule leaves to it.
        """
        # Group the images by what a batch must share: the size of the input, and the averaging step.
        by_shape: dict[tuple[int, int, int], list[tuple[int, LetterboxPlacement]]] = defaultdict(list)
        for_host: list[int] = []
        for n in chosen.tolist():
            height, width = resident.shapes[n].tolist()
            # Images that must be halved repeatedly are left to the host.
            placement = self._rule.place(height, width, int(sizes[n]))
            if placement is None:
                for_host.append(n)
            else:
                by_shape[placement.out_height, placement.out_width, placement.step].append((n, placement))
        searches: list[QueuedSearch] = []
        for group in by_shape.values():
            numbers = np.array([n for n, _ in group], np.int64)
            placements = [placement for _, placement in group]
            letterboxes = [(place.sx, place.sy, place.left, place.top) for place in placements]
            searches += self._queue_batches(_Inputs(numbers, resident, numbers, placements, letterboxes))
        return searches + self._queue_host_inputs(for_host, letterbox)

    def _queue_host_inputs(self, numbers: list[int], letterbox: Callable[[int], Letterbox]) -> list[QueuedSearch]:
        """Letterbox images on the host, send them by shape, and queue their search."""
        by_shape: dict[tuple[int, ...], list[tuple[int, Letterbox]]] = defaultdict(list)
        for n, box in zip(numbers, self._uploads.map_function(letterbox, numbers), strict=True):
            by_shape[box.pixels.shape[:2]].append((n, box))
        searches: list[QueuedSearch] = []
        # Images that need no change are viewed, not copied, if they lie side by side.
        for (height, width), group in by_shape.items():
            inputs = _Inputs(
                # The host's letterboxes are sent as images of their own, so their placements change nothing.
                numbers=np.array([n for n, _ in group], np.int64),
                resident=ResidentImages.upload([box.pixels for _, box in group], self._uploads),
                indices=np.arange(len(group)),
                placements=[LetterboxPlacement(height, width, 0, 0, False, height, width)] * len(group),
                letterboxes=[(box.sx, box.sy, box.left, box.top) for _, box in group],
            )
            searches += self._queue_batches(inputs)
        return searches

    def _queue_batches(self, inputs: _Inputs) -> list[QueuedSearch]:
        """Queue the search of images of one shape."""
        # All images of a batch have one input size, which also picks the planned batches.
        placement = inputs.placements[0]
        batches = self._get_batches(placement.out_height, placement.out_width)

        def queue_batch(part: slice) -> QueuedSearch:
            batch = inputs.select(part)
            return QueuedSearch(batch, Download(self._graphs.run_batch(batch.letterbox(), batches)))

        return [search for _, search in batches(queue_batch, len(inputs.numbers))]

    def _get_batches(self, height: int, width: int) -> Batches[QueuedSearch]:
        """Return the batches of a shape. Their size is planned from the free memory at first use."""
        shape = height, width
        if shape not in self._batches:
            free = measure_free_memory(str(self._detector.device))
            size = plan_batch_size(free, self.estimate_frame_bytes(height, width), self._max_batch)
            self._batches[shape] = Batches(size)
        return self._batches[shape]

    def estimate_frame_bytes(self, height: int, width: int) -> int:
        """Estimate the device memory that a frame of a batch takes."""
        trunk = type(self._detector.net.trunk).__name__
        network_bytes = _NETWORK_NUMBERS[trunk] * self._detector.dtype.itemsize
        pixel_bytes = 3 + max(_LETTERBOX_BYTES, network_bytes)
        return height * width * pixel_bytes + self._limits.candidates**2 * _PAIR_BYTES

    def finish(self, searches: Sequence[QueuedSearch]) -> FaceArrays:
        """Wait for queued searches.

        Returns:
            The faces of all images by their numbers, in pixels of the images.
        """
        return FaceArrays.concatenate([self._collect_faces(search) for search in searches])

    def _collect_faces(self, search: QueuedSearch) -> FaceArrays:
        """Collect the faces of a batch, and map them from the inputs to the images."""
        inputs = search.inputs
        # Images with more faces than fit are searched again without limits.
        packed = PackedFaces.from_rows(search.rows.wait())
        faces = [
            self._detect_on_host(inputs, n) if packed.flagged[n] else packed.unpack_image(n)
            for n in range(len(inputs.numbers))
        ]
        # Flatten the faces of the batch, and remember the image that each came from.
        slot = np.repeat(np.arange(len(faces)), [len(of_image.scores) for of_image in faces])
        boxes = np.concatenate([of_image.boxes for of_image in faces])
        landmarks = np.concatenate([of_image.landmarks for of_image in faces])
        scores = np.concatenate([of_image.scores for of_image in faces])
        letterboxes = np.array(inputs.letterboxes, np.float64)[slot]
        full_boxes = undo_letterbox(boxes.reshape(-1, 2, 2), letterboxes).reshape(-1, 4)
        full_landmarks = undo_letterbox(landmarks, letterboxes)
        return FaceArrays(inputs.numbers[slot], full_boxes, full_landmarks, scores, np.zeros(len(slot), np.int64))

    def _detect_on_host(self, inputs: _Inputs, n: int) -> Faces:
        """Search an image again that has more faces, or candidates, than the fixed sizes hold."""
        frame = inputs.select(slice(n, n + 1)).letterbox()
        return self._detector.detect_on_host(frame, self._limits)[0]
