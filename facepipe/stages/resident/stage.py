"""FacesOnDevice: Detect, Align and Embed on one GPU, to which pixels are sent once."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from facepipe.arrow import read_frames, set_columns, view_buffers, view_images
from facepipe.imaging.alignment import ChipLayout
from facepipe.imaging.geometry import Frame
from facepipe.models.protocols import Faces
from facepipe.models.zoo.registry import find_card, find_chip_layout
from facepipe.schema import EMBEDDING_DIM, NO_FACE, OK
from facepipe.stages.align import Align, AlignedFace, MapFunction, cut_upright_chip
from facepipe.stages.crowds import add_small_faces, choose_larger_view
from facepipe.stages.detect import Detect
from facepipe.stages.embed import Embed
from facepipe.stages.resident.coordinates import FaceArrays, FrameArrays, to_full_size
from facepipe.stages.views import DecodedView, decode_larger
from facepipe.types import Bool, Float64, Int64, UInt8Image

if TYPE_CHECKING:
    from torch import Tensor

    from facepipe.models.runtime.transfers import Download, Uploads
    from facepipe.stages.resident.embedding import ChipEmbedder
    from facepipe.stages.resident.passes import DetectionPasses
    from facepipe.stages.resident.sampling import ResidentImages

_NO_FACES = Faces(np.empty((0, 4), np.float32), np.empty((0, 5, 2), np.float32), np.empty(0, np.float32))
# Tables: one in the quick pass, one in the full pass, one being embedded, one whose rows are built.
_IN_FLIGHT = 4


class _ImageInputs(NamedTuple):
    """The images of a table that have pixels.

    Attributes:
        rows: their rows in the table
        pixels: RGB pixels, (h, w, 3)
        frames: where the pixels lie in the full-size images
        data: the image files, if they are at hand
    """

    rows: list[int]
    pixels: list[UInt8Image]
    frames: list[Frame]
    data: list[memoryview | None]

    @classmethod
    def from_table(cls, table: pa.Table) -> "_ImageInputs":
        inputs = cls([], [], [], [])
        columns = zip(view_images(table), read_frames(table), view_buffers(table["bytes"]), strict=True)
        for row, (pixels, frame, data) in enumerate(columns):
            if pixels is not None:
                inputs.rows.append(row)
                inputs.pixels.append(pixels)
                inputs.frames.append(frame)
                inputs.data.append(data)
        return inputs


class _QueuedFaces(NamedTuple):
    """Chips and vectors on their way to the host, in an order of their own.

    Attributes:
        faces: index of the face that each chip is of, (f,)
        chips: RGB, (f, h, w, 3) uint8
        vectors: raw vectors, (f, d)
    """

    faces: Int64
    chips: "Download"
    vectors: "Download"


@dataclass(frozen=True)
class FacesOnDevice:
    """Detect, align and embed faces on one device, with RetinaFace and a torch embedder.

    Attributes:
        detect: options of the detection; `batch` and `device` are ignored
        align: options of the alignment
        embed: options of the embedding; `batch` and `device` are ignored
        device: cuda, cuda:N or cpu
        precision: float32, bfloat16 or float16, of what passes between the layers of the networks
        frames: images of one shape per batch; fewer if memory is short
        chips: faces per batch; fewer if memory is short
        candidates: candidates per image on the device; images with more are finished on the host
        faces: faces per image on the device; images with more are finished on the host
        threads: threads for copies, thumbnails, and chips that the host cuts
    """

    detect: Detect = field(default_factory=Detect)
    align: Align = field(default_factory=Align)
    embed: Embed = field(default_factory=Embed)
    device: str = "cuda"
    precision: str = "float32"
    frames: int = 32
    chips: int = 128
    candidates: int = 512
    faces: int = 128
    threads: int = 1

    needs: ClassVar = tuple(dict.fromkeys((*Detect.needs, "bytes", "uri", "image_id")))
    adds: ClassVar = (*(name for name in Align.adds if name != "chip"), *Embed.adds)
    drops: ClassVar = tuple(name for name in Align.drops if name not in Detect.adds)

    def setup(self) -> None:
        """Load the networks, and try them on a first batch: the device may be faulty."""
        cv2.setNumThreads(1)
        side = self.detect.size
        self._passes.search_larger(np.zeros((side, side, 3), np.uint8), side)
        width, height = self._layout.size
        self._embedder(self._uploads([np.zeros((height, width, 3), np.uint8)]).view(1, height, width, 3)).cpu()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace each image of a table by its faces."""
        return next(self.stream([table]))

    def stream(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Replace the images of tables by their faces, in order.

        While the host works on one table, the device works on the next ones.
        """
        # The tables in work, the oldest first; each takes one step per turn.
        works: deque[Iterator[pa.Table | None]] = deque()
        for table in chain(tables, [None] * (_IN_FLIGHT - 1)):
            works.append(iter((None,) * _IN_FLIGHT) if table is None else self._run_steps(table))
            # The newest table first: its search is queued before the work that follows earlier searches.
            results = [next(work) for work in reversed(works)]
            if len(works) == _IN_FLIGHT:
                works.popleft()
                oldest = results[-1]
                if oldest is not None:
                    yield oldest

    def _run_steps(self, table: pa.Table) -> Iterator[pa.Table | None]:
        """Yield None each time work was queued that need not be waited for yet, and the resulting table at the end."""
        from facepipe.stages.resident.sampling import ResidentImages

        # A table without pixels still takes as many steps as any other.
        inputs = _ImageInputs.from_table(table)
        if not inputs.rows:
            yield from [None] * (_IN_FLIGHT - 1)
            yield self._build_rows(table, FaceArrays.concatenate([]), None)
            return
        # Search the images, and map the faces to the full-size images.
        resident = ResidentImages.upload(inputs.pixels, self._uploads)
        detected, candidates = yield from self._passes.search(resident, inputs.pixels)
        sizes = np.array([table[name].to_pylist() for name in ("width", "height")], np.float64).T
        view = FrameArrays.from_frames(inputs.frames)
        faces = to_full_size(detected, view, sizes[inputs.rows], self.detect.min_face)
        if self.detect.small_faces:
            faces = self._add_small_faces(faces, candidates, inputs, sizes[inputs.rows])
        queued = self._queue_embedding(faces, inputs, resident) if len(faces.image) else None
        del resident  # frees the images on the device as soon as they have been read
        yield None
        # From here on a face's image is the row of its table.
        rows = np.array(inputs.rows)[faces.image]
        yield self._build_rows(table, faces._replace(image=rows), queued)

    def _add_small_faces(
        self, faces: FaceArrays, candidates: FaceArrays, inputs: _ImageInputs, sizes: Float64
    ) -> FaceArrays:
        """Search images in which most faces are small at a larger size, as Detect does.

        Args:
            faces: faces in pixels of the full-size images.
            candidates: faces and candidates in pixels of the decoded images.
            inputs: the images.
            sizes: width and height of the full-size images, (n, 2).
        """
        changed: dict[int, Faces] = {}
        known = faces.split_images()
        for n, of_image in candidates.split_images().items():
            full_size = (int(sizes[n, 0]), int(sizes[n, 1]))
            view = DecodedView(inputs.pixels[n], inputs.frames[n])
            larger = choose_larger_view(of_image, view, inputs.data[n], full_size, self.detect.size)
            if larger is None:
                continue
            found = FaceArrays.join_images({0: self._passes.search_larger(larger.view.pixels, larger.size)})
            frame = FrameArrays.from_frames([larger.view.frame])
            full = to_full_size(found, frame, sizes[n : n + 1], self.detect.min_face).split_images().get(0)
            if full is not None:
                changed[n] = add_small_faces(known.get(n, _NO_FACES), full, larger.max_side)
        if not changed:
            return faces
        unchanged = faces.leave_out_images(np.array(list(changed), np.int64))
        return FaceArrays.concatenate([unchanged, FaceArrays.join_images(changed)])

    def _queue_embedding(self, faces: FaceArrays, inputs: _ImageInputs, resident: "ResidentImages") -> _QueuedFaces:
        """Queue the cutting and embedding of faces."""
        import torch

        from facepipe.models.runtime.transfers import Download
        from facepipe.stages.resident import chips as resident_chips

        view = FrameArrays.from_frames(inputs.frames)
        # Images with too few pixels for one of their faces are decoded again, on the host.
        required = np.zeros(len(inputs.rows))
        scales = np.minimum(1.0, resident_chips.find_required_scales(self._layout, faces))
        np.maximum.at(required, faces.image, scales)
        has_data: Bool = np.array([data is not None for data in inputs.data], bool)
        is_decoded_again = has_data & (view.scale < required)
        # The host cuts turned faces, from turned pixels, as Align does.
        is_upright = faces.turns == 0
        is_on_device = is_upright & ~is_decoded_again[faces.image] & resident_chips.can_cut_on_device(self._layout)
        device_faces = np.flatnonzero(is_on_device)
        host_faces = np.flatnonzero(~is_on_device)
        chips: list[Tensor] = []
        order = []
        # Landmarks in decoded pixels place the chips; the device returns them in an order of its own.
        if len(device_faces):
            image = faces.image[device_faces]
            landmarks = view.from_full(faces.landmarks[device_faces].astype(np.float64), image)
            cut = resident_chips.cut_aligned_chips(self._layout, resident, image, landmarks)
            chips.append(cut.chips)
            order.append(device_faces[cut.faces])
        # The host cuts the others, from a larger decoding if there is one.
        if len(host_faces):
            host_chips = self._cut_on_host(faces, host_faces, inputs, np.where(is_decoded_again, required, 0))
            chips.append(resident_chips.upload_chips(self._uploads, host_chips))
            order.append(host_faces)
        all_chips = torch.cat(chips)
        return _QueuedFaces(np.concatenate(order), Download(all_chips), Download(self._embedder(all_chips)))

    def _cut_on_host(self, faces: FaceArrays, chosen: Int64, inputs: _ImageInputs, scales: Float64) -> list[UInt8Image]:
        """Cut chips as Align does.

        Args:
            faces: all faces.
            chosen: indices of the faces to cut, ascending.
            inputs: the images.
            scales: scale at which each image is decoded again; 0: use the pixels at hand.

        Returns:
            Chips of the chosen faces, in order.
        """

        def cut_image(image: int) -> list[UInt8Image]:
            view = DecodedView(inputs.pixels[image], inputs.frames[image])
            data = inputs.data[image]
            if scales[image] and data is not None:
                view = decode_larger(bytes(data), float(scales[image]), view)
            # Faces of this image among the chosen ones.
            of_image = chosen[faces.image[chosen] == image]
            boxes = faces.boxes[of_image].astype(np.float64)
            landmarks = faces.landmarks[of_image].astype(np.float64)
            turns = faces.turns[of_image].tolist()
            return [
                cut_upright_chip(self._layout, view, box, points, turn=turn, square=self._square)
                for box, points, turn in zip(boxes, landmarks, turns, strict=True)
            ]

        image_numbers = np.unique(faces.image[chosen]).tolist()
        return [chip for chips in self._map(cut_image, image_numbers) for chip in chips]

    def _build_rows(self, table: pa.Table, faces: FaceArrays, queued: _QueuedFaces | None) -> pa.Table:
        """Wait for chips and vectors, and build one row per face, and one per image without faces.

        Args:
            table: one row per image.
            faces: the faces, whose `image` is the row of the table.
            queued: chips and vectors of the faces; None if there are no faces.
        """
        # Wait for the results and put them in the order of the faces.
        chips: dict[int, UInt8Image] = {}
        raw = np.empty((0, EMBEDDING_DIM), np.float32)
        if queued is not None:
            chips = dict(zip(queued.faces.tolist(), queued.chips.wait(), strict=True))
            raw = self._embedder.project(queued.vectors.wait()[np.argsort(queued.faces)])
        # Collect the faces of each row; a row without any keeps its number.
        faces_by_row: dict[int, list[AlignedFace]] = {row: [] for row in range(table.num_rows)}
        index_in_image = faces.number_faces().tolist()
        for n, row in enumerate(faces.image.tolist()):
            face = AlignedFace(
                row,
                index_in_image[n],
                faces.boxes[n],
                faces.landmarks[n],
                float(faces.scores[n]),
                chips[n],
                int(faces.turns[n]),
            )
            faces_by_row[row].append(face)
        rows: list[AlignedFace | int] = []
        statuses = []
        for row, status in enumerate(table["status"].to_pylist()):
            of_image = faces_by_row[row]
            rows += of_image or [row]
            statuses.append(NO_FACE if status == OK and not of_image else status)
        table = set_columns(table, {"status": pa.array(statuses, pa.string())})
        is_face = np.array([isinstance(face, AlignedFace) for face in rows], bool)
        return self.embed.build_rows(self.align.build_rows(table, rows, self._map), is_face, raw)

    @property
    def _map(self) -> MapFunction:
        return self._pool.map if self.threads > 1 else map

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, "faces")

    @cached_property
    def _layout(self) -> ChipLayout:
        return find_chip_layout(self.embed.model)

    @cached_property
    def _square(self) -> tuple[float, float, float] | None:
        return find_card(self.detect.model, "detector").square

    @cached_property
    def _uploads(self) -> "Uploads":
        import torch

        from facepipe.models.runtime.transfers import Uploads

        return Uploads(torch.device(self.device), self._map)

    @cached_property
    def _passes(self) -> "DetectionPasses":
        from facepipe.models.zoo.networks import load_detector_net
        from facepipe.stages.resident.passes import BatchCapacity, DetectionPasses
        from facepipe.stages.resident.retinaface import ResidentRetinaFace

        net, channels = load_detector_net(self.detect.model)
        detector = ResidentRetinaFace(net, channels, self.device, self.precision)
        capacity = BatchCapacity(self.frames, self.candidates, self.faces)
        return DetectionPasses(self.detect, detector, self._uploads, capacity)

    @cached_property
    def _embedder(self) -> "ChipEmbedder":
        from facepipe.models.zoo.networks import load_embedder_net
        from facepipe.stages.resident.embedding import ChipEmbedder

        network = load_embedder_net(self.embed.model)
        return ChipEmbedder(network, self.device, self.precision, self.embed.flip, self.chips)
