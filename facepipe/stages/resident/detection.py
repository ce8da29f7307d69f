"""Images on the device to faces: grouped by the shape that they take, placed and searched without waiting.

`begin` only queues; `finish` waits for what was queued first, and for no more.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from facepipe.models.protocols import Faces
from facepipe.models.runtime.batches import Batches, measure_free_memory, plan_batch_size
from facepipe.models.runtime.cuda_graphs import CudaGraphCache
from facepipe.models.runtime.transfers import Download, Uploads
from facepipe.stages.resident.coordinates import Found, restored
from facepipe.stages.resident.letterbox import LetterboxPlacement, PlacementRule, letterbox_images
from facepipe.stages.resident.retinaface import PackedFaces, ResidentLimits, ResidentRetinaFace
from facepipe.stages.resident.sampling import ResidentImages
from facepipe.types import Int64

# Bytes of a pixel of a frame that are live at once, beside its 3. While frames are placed: whole-number levels and sums
# of three channels, their product, an index, and the four pixels of a block where the image is halved; torch's profiler
# finds 60, and 128 with halves. In the network, in numbers of its precision: the input 3 and its copy 3, then the first
# separable block at half the sides, 8 + 16 planes before and after an activation: (8 + 16 + 16) / 4, which is what the
# profiler finds, and as much again for cuDNN. RetinaFace's ResNet-50 trunk has 256 planes at a quarter of the sides,
# and the same 64 twice beside them. tests/facepipe/stages/resident/test_memory.py compares.
_PLACING = 130
_NETWORK = {"MobileNet025": 26, "ResNet50": 90}
_PAIR = 40  # bytes of a pair of candidates in suppression: four sides in float32, the union, masks


class Part(NamedTuple):
    """Images of one shape that are searched together: their numbers, where and how they lie, and what is found."""

    images: Int64
    resident: ResidentImages
    chosen: Int64
    places: list[LetterboxPlacement]
    ways: list[Any]
    rows: Download


class BatchDetector:
    """Searches images on a device.

    rule: where images lie in the detector's input; most: images of a batch, where the device has the memory
    """

    def __init__(
        self, finder: ResidentRetinaFace, limits: ResidentLimits, rule: PlacementRule, uploads: Uploads, most: int
    ):
        self._finder, self._limits, self._rule, self._uploads = finder, limits, rule, uploads
        self._most = most
        self._buckets = CudaGraphCache(partial(finder.detect, limits=limits), finder.device)
        self._batches: dict[tuple[int, int], Batches[Part]] = {}

    def begin(self, resident: ResidentImages, chosen: Int64, size: int, letterbox: Callable[[int], Any]) -> list[Part]:
        """Queue the search of chosen images (m,), shrunk to `size`.

        letterbox: by an image's number what `Detect.letterbox` makes of it, for those that the rule leaves to the host
        """
        groups: dict[tuple[int, int, int], list[tuple[int, LetterboxPlacement]]] = defaultdict(list)
        others: list[int] = []
        for n in chosen.tolist():
            height, width = resident.shapes[n].tolist()
            place = self._rule.place(height, width, size)
            if place is None:
                others.append(n)
            else:
                groups[place.out_height, place.out_width, place.step].append((n, place))
        parts: list[Part] = []
        for rows in groups.values():
            images = np.array([n for n, _ in rows], np.int64)
            places = [place for _, place in rows]
            ways = [(place.sx, place.sy, place.left, place.top) for place in places]
            parts += self._queued(images, resident, images, places, ways)
        return parts + self._by_host(others, letterbox)

    def _by_host(self, images: list[int], letterbox: Callable[[int], Any]) -> list[Part]:
        """Inputs that the host makes, by shape."""
        groups: dict[tuple[int, int], list[tuple[int, Any]]] = defaultdict(list)
        for n, box in zip(images, self._uploads.map_function(letterbox, images), strict=True):
            groups[box.pixels.shape[:2]].append((n, box))
        parts: list[Part] = []
        for (height, width), rows in groups.items():
            resident = ResidentImages.upload([box.pixels for _, box in rows], self._uploads)
            places = [LetterboxPlacement(height, width, 0, 0, False, height, width)] * len(rows)
            ways = [(box.sx, box.sy, box.left, box.top) for _, box in rows]
            numbers = np.array([n for n, _ in rows], np.int64)
            parts += self._queued(numbers, resident, np.arange(len(rows)), places, ways)
        return parts

    def _queued(
        self, images: Int64, resident: ResidentImages, chosen: Int64, places: list[LetterboxPlacement], ways: list[Any]
    ) -> list[Part]:
        """The parts of images of one shape."""
        batches = self._of_shape(places[0].out_height, places[0].out_width)

        def work(at: slice) -> Part:
            frames = _frames(resident, chosen[at], places[at])
            rows = Download(self._buckets.run_batch(frames, batches))
            return Part(images[at], resident, chosen[at], places[at], ways[at], rows)

        return [part for _, part in batches(work, len(images))]

    def _of_shape(self, height: int, width: int) -> Batches[Part]:
        shape = height, width
        if shape not in self._batches:
            size = plan_batch_size(
                measure_free_memory(str(self._finder.device)), self.estimate_frame_bytes(height, width), self._most
            )
            self._batches[shape] = Batches(size)
        return self._batches[shape]

    def estimate_frame_bytes(self, height: int, width: int) -> int:
        """Device memory that a frame of a batch takes."""
        net = self._finder.net
        network = _NETWORK[type(net.trunk).__name__] * self._finder.dtype.itemsize
        return height * width * (3 + max(_PLACING, network)) + self._limits.candidates**2 * _PAIR

    def finish(self, parts: Sequence[Part]) -> Found:
        """The faces of all parts, in the pixels of their images."""
        return Found.joined([self._found(part) for part in parts])

    def _found(self, part: Part) -> Found:
        rows = PackedFaces.from_rows(part.rows.wait())
        exact = {n: self._exactly(part, n) for n in np.flatnonzero(rows.flagged).tolist()}
        faces = [exact.get(n) or rows.unpack_image(n) for n in range(len(part.images))]
        slot = np.repeat(np.arange(len(faces)), [len(f.scores) for f in faces])
        boxes, landmarks, scores = (np.concatenate(columns) for columns in zip(*faces, strict=True))
        ways = np.array(part.ways, np.float64)[slot]
        corners = restored(boxes.reshape(-1, 2, 2), ways).reshape(-1, 4)
        return Found(part.images[slot], corners, restored(landmarks, ways), scores)

    def _exactly(self, part: Part, n: int) -> Faces:
        """An image with more faces, or candidates, than fixed sizes hold: searched again, finished on the host."""
        alone = _frames(part.resident, part.chosen[n : n + 1], part.places[n : n + 1])
        return self._finder.detect_on_host(alone, self._limits)[0]


def _frames(resident: ResidentImages, chosen: Int64, places: list[LetterboxPlacement]) -> Tensor:
    if all(place.whole for place in places) and (frames := resident.view_stack(chosen)) is not None:
        return frames
    return letterbox_images(resident.select(chosen), places)
