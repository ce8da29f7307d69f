"""FacesOnDevice: decoded images to embedded faces, pixels sent to a GPU once; where Detect, Align, Embed would be."""

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
from facepipe.imaging.alignment import ChipLayout, cut_chip
from facepipe.imaging.geometry import Frame
from facepipe.models.zoo.registry import find_card, find_chip_layout
from facepipe.schema import EMBEDDING_DIM, NO_FACE, OK
from facepipe.stages.align import Align, AlignedFace, MapFunction, decode_larger
from facepipe.stages.detect import Detect
from facepipe.stages.embed import Embed
from facepipe.stages.resident.coordinates import Found, Frames, full_size
from facepipe.types import Float64, Int64, UInt8Image

if TYPE_CHECKING:
    from facepipe.models.runtime.transfers import Download, Uploads
    from facepipe.stages.resident.embedding import ChipEmbedder
    from facepipe.stages.resident.passes import Looks
    from facepipe.stages.resident.sampling import ResidentImages


_IN_FLIGHT = 4  # tables: one at its quick look, one at the full one, one being embedded, one whose rows are made


class _Images(NamedTuple):
    """A table's images that have pixels: their rows, pixels, frames, and the files they came from."""

    rows: list[int]
    pixels: list[UInt8Image]
    frames: list[Frame]
    data: list[memoryview | None]

    @classmethod
    def of(cls, table: pa.Table) -> "_Images":
        columns = zip(view_images(table), read_frames(table), view_buffers(table["bytes"]), strict=True)
        there = [(n, *row) for n, row in enumerate(columns) if row[0] is not None]
        return cls(*(list(column) for column in zip(*there, strict=True))) if there else cls([], [], [], [])


class _Queued(NamedTuple):
    """Chips and vectors on their way to the host, and which face each is of."""

    face: Int64
    chips: "Download"
    vectors: "Download"


@dataclass(frozen=True)
class FacesOnDevice:
    """Finds, aligns and embeds on one device, with RetinaFace and a torch embedder.

    detect, align, embed: the stages in whose place this one stands; all their options but device and batch are kept
    device: cuda, cuda:N or cpu; precision: float32, bfloat16 or float16, of what passes between the networks' layers
    frames, chips: images of one shape, and faces, computed at a time; fewer where memory is short
    candidates, faces: of an image on the device; images with more are finished on the host
    threads: for copies, thumbnails, and chips that the host cuts
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
        cv2.setNumThreads(1)
        _ = self._looks, self._embedder

    def __call__(self, table: pa.Table) -> pa.Table:
        return next(self.stream([table]))

    def stream(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The tables' results in order. While the host has one in hand, the device has the next ones."""
        works: deque[Iterator[pa.Table | None]] = deque()
        for table in chain(tables, [None] * (_IN_FLIGHT - 1)):
            works.append(iter((None,) * _IN_FLIGHT) if table is None else self._steps(table))
            # The newest first: its search is queued before what comes of the searches before.
            done = [next(work) for work in reversed(works)][-1]
            if len(works) == _IN_FLIGHT:
                works.popleft()
                if done is not None:
                    yield done

    def _steps(self, table: pa.Table) -> Iterator[pa.Table | None]:
        """None whenever something is queued whose end is not to be waited for yet; at last the table."""
        from facepipe.stages.resident.sampling import ResidentImages

        inputs = _Images.of(table)
        if not inputs.rows:
            yield from [None] * (_IN_FLIGHT - 1)
            yield self._rows(table, Found.joined([]), None)
            return
        resident = ResidentImages.upload(inputs.pixels, self._uploads)
        found = yield from self._looks.search(resident, inputs.pixels)
        sizes = np.array([table[name].to_pylist() for name in ("width", "height")], np.float64).T
        faces = full_size(found, Frames.of(inputs.frames), sizes[inputs.rows], self.detect.min_face)
        queued = self._embedded(faces, inputs, resident) if len(faces.image) else None
        del resident  # the images on the device go as soon as they have been read
        yield None
        yield self._rows(table, faces._replace(image=np.array(inputs.rows)[faces.image]), queued)

    def _embedded(self, faces: Found, inputs: _Images, resident: "ResidentImages") -> _Queued:
        """Chips and vectors of the faces, queued."""
        import torch

        from facepipe.models.runtime.transfers import Download
        from facepipe.stages.resident import cutting

        view = Frames.of(inputs.frames)
        wanted = np.zeros(len(inputs.rows))
        np.maximum.at(wanted, faces.image, np.minimum(1.0, cutting.wanted(self._layout, faces)))
        again = np.array([data is not None for data in inputs.data], bool) & (view.scale < wanted)
        there = ~again[faces.image] & cutting.on_device(self._layout)
        mine, others = np.flatnonzero(there), np.flatnonzero(~there)
        chips, order = [], [others]
        if len(mine):
            landmarks = view.from_full(faces.landmarks[mine].astype(np.float64), faces.image[mine])
            cut, places = cutting.chips_of(self._layout, resident, faces.image[mine], landmarks)
            chips, order = [cut], [mine[places], others]
        if len(others):
            made = self._by_host(faces, others, inputs, np.where(again, wanted, 0))
            chips.append(cutting.uploaded(self._uploads, made))
        joined = torch.cat(chips)
        return _Queued(np.concatenate(order), Download(joined), Download(self._embedder(joined)))

    def _by_host(self, faces: Found, chosen: Int64, inputs: _Images, wanted: Float64) -> list[UInt8Image]:
        """The chips of chosen faces as Align cuts them; wanted: by image the scale to decode again at, 0 for none."""

        def cut(image: int) -> list[UInt8Image]:
            view, data = (inputs.pixels[image], inputs.frames[image]), inputs.data[image]
            if wanted[image] and data is not None:
                view = decode_larger(bytes(data), float(wanted[image]), view)
            mine = chosen[faces.image[chosen] == image]
            pairs = zip(faces.boxes[mine].astype(np.float64), faces.landmarks[mine].astype(np.float64), strict=True)
            predict_points = self.align.predict_points
            return [
                cut_chip(self._layout, *view, *face, square=self._square, predict_points=predict_points)
                for face in pairs
            ]

        return [chip for chips in self._each(cut, np.unique(faces.image[chosen]).tolist()) for chip in chips]

    def _rows(self, table: pa.Table, faces: Found, queued: _Queued | None) -> pa.Table:
        """One row a face, or for an image without."""
        chips: dict[int, UInt8Image] = {}
        raw = np.empty((0, EMBEDDING_DIM), np.float32)
        if queued is not None:
            chips = dict(zip(queued.face.tolist(), queued.chips.wait(), strict=True))
            raw = self._embedder.project(queued.vectors.wait()[np.argsort(queued.face)])
        by_row: dict[int, list[AlignedFace | int]] = {n: [] for n in range(table.num_rows)}
        values = zip(faces.image.tolist(), faces.ordinals().tolist(), *faces[1:], strict=True)
        for f, (n, ordinal, box, points, score) in enumerate(values):
            by_row[n].append(AlignedFace(n, ordinal, box, points, float(score), chips[f]))
        before = table["status"].to_pylist()
        status = [(OK if by_row[n] else NO_FACE) if was == OK else was for n, was in enumerate(before)]
        aligned = [face for n, found in by_row.items() for face in found or [n]]
        table = set_columns(table, {"status": pa.array(status, pa.string())})
        valid = np.array([isinstance(face, AlignedFace) for face in aligned], bool)
        return self.embed.build_rows(self.align.build_rows(table, aligned, self._each), valid, raw)

    @property
    def _each(self) -> MapFunction:
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

        return Uploads(torch.device(self.device), self._each)

    @cached_property
    def _looks(self) -> "Looks":
        from facepipe.models.zoo.networks import load_detector_net
        from facepipe.stages.resident.passes import Capacity, Looks
        from facepipe.stages.resident.retinaface import ResidentRetinaFace

        finder = ResidentRetinaFace(*load_detector_net(self.detect.model), self.device, self.precision)
        return Looks(self.detect, finder, self._uploads, Capacity(self.frames, self.candidates, self.faces))

    @cached_property
    def _embedder(self) -> "ChipEmbedder":
        from facepipe.models.zoo.networks import load_embedder_net
        from facepipe.stages.resident.embedding import ChipEmbedder

        return ChipEmbedder(
            load_embedder_net(self.embed.model), self.device, self.precision, self.embed.flip, self.chips
        )
