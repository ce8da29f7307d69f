"""Align: one row per image to one row per face, with a chip cut to the embedder's template and quality figures."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from facepipe.arrow import pack_arrays, read_frames, set_columns, to_float_lists, view_buffers, view_images
from facepipe.imaging.alignment import ChipLayout, cut_chip, find_required_scale
from facepipe.imaging.decode import DecodeError, decode
from facepipe.imaging.dlib_chip import PredictPoints
from facepipe.imaging.geometry import Frame, estimate_pose, locate_frame, measure_sharpness
from facepipe.imaging.header import read_header
from facepipe.models.dlib.predictor import load_predictor
from facepipe.models.zoo.registry import find_card, find_chip_layout
from facepipe.types import Bool, Float32, UInt8Image

MapFunction = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


class AlignedFace(NamedTuple):
    """One face."""

    row: int
    face_index: int
    box: Float32
    landmarks: Float32
    score: float
    chip: UInt8Image


@dataclass(frozen=True)
class Align:
    """Cuts chips as the embedder wants them: by default with the similarity that maps five landmarks to its template.

    embedder: whose chips: a registered name, a model's TOML file, or the name of an architecture
    detector: whose boxes these are, for chips that are cut by dlib's own landmarks
    thumbs: keep a small JPEG of every face for the reports; thumb_side in pixels, thumb_quality 1-100
    """

    embedder: str = "dlib-resnet"
    detector: str = "retinaface-mnet025"
    thumbs: bool = True
    thumb_side: int = 112
    thumb_quality: int = 80

    needs: ClassVar = (
        "bytes",
        "pixels",
        "pixels_width",
        "pixels_height",
        "pixels_scale",
        "pixels_left",
        "pixels_top",
        "boxes",
        "points",
        "scores",
    )
    adds: ClassVar = (
        "face_index",
        "box",
        "landmarks",
        "det_score",
        "face_px",
        "sharpness",
        "yaw",
        "roll",
        "chip",
        "thumb",
    )
    drops: ClassVar = (
        *("bytes", "pixels", "pixels_width", "pixels_height", "pixels_scale", "pixels_left", "pixels_top"),
        *("boxes", "points", "scores"),
    )

    @cached_property
    def _layout(self) -> ChipLayout:
        return find_chip_layout(self.embedder)

    @cached_property
    def _square(self) -> tuple[float, float, float] | None:
        return find_card(self.detector, "detector").square

    @property
    def predict_points(self) -> PredictPoints | None:
        """dlib's landmark predictor, if the chips need it. It is loaded once per process."""
        return load_predictor().predict if self._layout.kind == "dlib" else None

    def setup(self) -> None:
        cv2.setNumThreads(1)
        _ = self._layout

    def __call__(self, table: pa.Table) -> pa.Table:
        faces: list[AlignedFace | int] = []
        columns = [table[name].to_pylist() for name in ("boxes", "points", "scores")]
        rows = zip(view_images(table), read_frames(table), view_buffers(table["bytes"]), *columns, strict=True)
        for n, (pixels, frame, data, boxes, points, scores) in enumerate(rows):
            found = self._image(n, (pixels, frame), data, (boxes, points, scores)) if scores else []
            faces += found or [n]
        return self.build_rows(table, faces)

    def build_rows(self, table: pa.Table, faces: Sequence[AlignedFace | int], each: MapFunction = map) -> pa.Table:
        """The table with one row a face, and one for each image without: of such images `faces` holds the row number.

        each: map, or a pool's, under which chips are measured and thumbnails made
        """
        origin = [face if isinstance(face, int) else face.row for face in faces]
        per_image = set_columns(table, {}, drop=self.drops).take(pa.array(origin, pa.int64()))
        return set_columns(per_image, self._columns(faces, each))

    def _image(self, n: int, view: Any, data: memoryview | None, found: Any) -> list[AlignedFace]:
        """The faces of one image, cut from enough pixels."""
        boxes, points, scores = (np.array(values, np.float32) for values in found)
        landmarks = points.reshape(-1, 5, 2)
        boxes = boxes.reshape(-1, 4)
        faces = list(zip(boxes.astype(np.float64), landmarks.astype(np.float64), strict=True))
        # Chip pixels per image pixel: more than the working image has means decoding again, at the scale that has them.
        wanted = min(1.0, max(find_required_scale(self._layout, *face) for face in faces))
        if data is not None and view[1].scale < wanted:
            view = decode_larger(bytes(data), wanted, view)
        pixels, frame = view
        chips = [
            cut_chip(self._layout, pixels, frame, box, points, square=self._square, predict_points=self.predict_points)
            for box, points in faces
        ]
        rows = zip(boxes, landmarks, scores, chips, strict=True)
        return [AlignedFace(n, k, box, p, float(score), chip) for k, (box, p, score, chip) in enumerate(rows)]

    def _columns(self, faces: Sequence[AlignedFace | int], each: MapFunction) -> dict[str, Any]:
        real = [face for face in faces if isinstance(face, AlignedFace)]
        valid = np.array([isinstance(face, AlignedFace) for face in faces], bool)
        boxes = np.array([face.box for face in real], np.float32).reshape(-1, 4)
        landmarks = np.array([face.landmarks for face in real], np.float32).reshape(-1, 5, 2)
        yaw, roll = estimate_pose(landmarks.astype(np.float64)) if real else (np.empty(0), np.empty(0))
        chips = iter(real)
        looks = list(each(self._look, [face.chip for face in real]))
        return {
            "face_index": _spread([face.face_index for face in real], valid, pa.int16()),
            "box": to_float_lists(boxes, valid),
            "landmarks": to_float_lists(landmarks.reshape(-1, 10), valid),
            "det_score": _spread([face.score for face in real], valid, pa.float32()),
            "face_px": _spread((boxes[:, 2:] - boxes[:, :2]).min(1).tolist() if real else [], valid, pa.float32()),
            "sharpness": _spread([sharp for sharp, _ in looks], valid, pa.float32()),
            "yaw": _spread(yaw.tolist(), valid, pa.float32()),
            "roll": _spread(roll.tolist(), valid, pa.float32()),
            "chip": pack_arrays([next(chips).chip if is_face else None for is_face in valid]),
            "thumb": _spread([thumb for _, thumb in looks], valid, pa.binary()),
        }

    def _look(self, chip: UInt8Image) -> tuple[float, bytes | None]:
        return measure_sharpness(chip), self._thumb(chip) if self.thumbs else None

    def _thumb(self, chip: UInt8Image) -> bytes:
        height = round(self.thumb_side * chip.shape[0] / chip.shape[1])
        small = cv2.resize(chip, (self.thumb_side, height), interpolation=cv2.INTER_AREA)
        options = [cv2.IMWRITE_JPEG_QUALITY, self.thumb_quality]
        return bytes(cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)[1])


def decode_larger(data: bytes, wanted: float, view: tuple[UInt8Image, Frame]) -> tuple[UInt8Image, Frame]:
    """The image decoded at the smallest scale of at least `wanted`; the pixels at hand if that fails."""
    reduce = next((r for r in (4, 2) if 1 / r >= wanted), 1)
    try:
        header = read_header(data)
        return decode(data, header, reduce), locate_frame(header, reduce)
    except (DecodeError, ValueError):
        return view


def _spread(values: list[Any], valid: Bool, kind: pa.DataType) -> pa.Array:
    """Values at the rows that are faces, nulls elsewhere."""
    given = iter(values)
    return pa.array([next(given) if is_face else None for is_face in valid], kind)
