"""Align: from one row per image to one row per face, with a chip in the embedder's layout and quality figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from facepipe.arrow import pack_arrays, read_frames, set_columns, to_float_lists, view_buffers, view_images
from facepipe.imaging.alignment import ChipLayout, cut_chip, find_required_scale
from facepipe.imaging.dlib_chip import BoxToSquare, PredictPoints
from facepipe.imaging.geometry import Frame, estimate_pose, measure_sharpness
from facepipe.imaging.quality import QualityFigures, estimate_quality, measure_visible
from facepipe.models.detectors.turns import TurnModel, load_turn_model
from facepipe.models.dlib.predictor import load_predictor
from facepipe.models.protocols import Faces
from facepipe.models.zoo.registry import find_card, find_chip_layout
from facepipe.stages.turned import get_turns, turn_boxes, turn_pixels, turn_points
from facepipe.stages.views import DecodedView, decode_larger
from facepipe.types import Bool, Float32, Float64, Int64, UInt8Image


class AlignedFace(NamedTuple):
    """A face of an image with its chip.

    Attributes:
        row: row of the image in its table
        face_index: ordinal of the face in its image
        box: x1 y1 x2 y2 in pixels of the full-size image, (4,)
        landmarks: five points in pixels of the full-size image, (5, 2)
        score: confidence of the detector
        chip: RGB pixels, upright
        turn: degrees clockwise by which the face lies in the image
    """

    row: int
    face_index: int
    box: Float32
    landmarks: Float32
    score: float
    chip: UInt8Image
    turn: int = 0


@dataclass(frozen=True)
class Align:
    """Cut a chip of each face, by default with the similarity that maps its five landmarks to the embedder's template.

    Attributes:
        embedder: model whose layout the chips get: a registered name, a model's TOML file, or an architecture
        detector: model that found the boxes, for chips that are cut by dlib's own landmarks
        thumbs: keep a small JPEG of every face for the reports
        thumb_side: width of this JPEG in pixels
        thumb_quality: JPEG quality, 1 to 100
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
        "turns",
        "width",
        "height",
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
        "turn",
        "visible",
        "face_quality",
        "chip",
        "thumb",
    )
    drops: ClassVar = tuple(name for name in needs if name not in ("width", "height"))

    @cached_property
    def _layout(self) -> ChipLayout:
        return find_chip_layout(self.embedder)

    @cached_property
    def _square(self) -> tuple[float, float, float] | None:
        return find_card(self.detector, "detector").square

    @cached_property
    def _turn_model(self) -> TurnModel | None:
        name = find_card(self.detector, "detector").turn_model
        return load_turn_model(name) if name else None

    def setup(self) -> None:
        """Look the layout of the chips up."""
        cv2.setNumThreads(1)
        _ = self._layout

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace each image by its faces; an image without faces stays one row."""
        faces: list[AlignedFace | int] = []
        # Walk the images with what Detect found in them; boxes and points are flat lists of 4 and 10 numbers per face.
        detections = [table[name].to_pylist() for name in ("boxes", "points", "scores", "turns")]
        rows = zip(view_images(table), read_frames(table), view_buffers(table["bytes"]), *detections, strict=True)
        for row, (pixels, frame, data, boxes, points, scores, turns) in enumerate(rows):
            # A row number stands for an image without faces, so that it keeps its row.
            if not scores or pixels is None:
                faces.append(row)
                continue
            detected = Faces(
                np.array(boxes, np.float32).reshape(-1, 4),
                np.array(points, np.float32).reshape(-1, 5, 2),
                np.array(scores, np.float32),
                np.array(turns, np.int64),
            )
            faces += self._cut_faces(row, DecodedView(pixels, frame), data, detected)
        return self._build_rows(table, faces)

    def _build_rows(self, table: pa.Table, faces: Sequence[AlignedFace | int]) -> pa.Table:
        """Build the table of faces from the table of images.

        Args:
            table: one row per image.
            faces: the faces in order of their rows. An image without faces is an integer, the number of its row.

        Returns:
            One row per face, and one per image without faces.
        """
        # Drop the columns of images first, then repeat each row once per face.
        rows = [face if isinstance(face, int) else face.row for face in faces]
        repeated = set_columns(table, {}, drop=self.drops).take(pa.array(rows, pa.int64()))
        sizes = np.array([repeated[name].to_pylist() for name in ("width", "height")], np.float64).T
        return set_columns(repeated, self._build_columns(faces, sizes))

    def _cut_faces(self, row: int, view: DecodedView, data: memoryview | None, detected: Faces) -> list[AlignedFace]:
        """Cut the chips of one image, from a larger decoding if the pixels at hand are too few."""
        boxes = detected.boxes.astype(np.float64)
        landmarks = detected.landmarks.astype(np.float64)
        # (4,) and (5, 2) of each face.
        pairs = list(zip(boxes, landmarks, strict=True))
        # Chip pixels per image pixel. If the view has fewer, the image is decoded again at a scale that has enough.
        scale = min(1.0, max(find_required_scale(self._layout, box, points) for box, points in pairs))
        if data is not None and view.frame.scale < scale:
            view = decode_larger(bytes(data), scale, view)
        faces = []
        turns = get_turns(detected).tolist()
        for index, (box, points) in enumerate(pairs):
            chip = cut_upright_chip(self._layout, view, box, points, turn=turns[index], square=self._square)
            face = AlignedFace(
                row,
                index,
                detected.boxes[index],
                detected.landmarks[index],
                float(detected.scores[index]),
                chip,
                turns[index],
            )
            faces.append(face)
        return faces

    def _build_columns(self, faces: Sequence[AlignedFace | int], sizes: Float64) -> dict[str, Any]:
        """Build the columns that this stage adds, with nulls for images without faces.

        Args:
            faces: the faces, and a number for each image without one.
            sizes: width and height of the image of each row, (n, 2); nan if they are not known.
        """
        # The figures of faces only; `_spread` and `to_float_lists` put nulls between them.
        aligned = [face for face in faces if isinstance(face, AlignedFace)]
        is_face = np.array([isinstance(face, AlignedFace) for face in faces], bool)
        boxes = np.array([face.box for face in aligned], np.float32).reshape(-1, 4)
        landmarks = np.array([face.landmarks for face in aligned], np.float32).reshape(-1, 5, 2)
        # Shorter sides and angles; they stay empty if there are no faces.
        sides: list[float] = []
        yaw = np.empty(0)
        roll = np.empty(0)
        if aligned:
            sides = (boxes[:, 2:] - boxes[:, :2]).min(1).tolist()
            yaw, roll = estimate_pose(landmarks.astype(np.float64))
        chips = [face.chip if isinstance(face, AlignedFace) else None for face in faces]
        measured = [self._measure_chip(face.chip) for face in aligned]
        turns = np.array([face.turn for face in aligned], np.int64)
        visible = measure_visible(boxes, sizes[is_face])
        figures = QualityFigures(
            scores=np.array([face.score for face in aligned], np.float64),
            visible=visible,
            face_px=np.array(sides, np.float64),
            sharpness=np.array([sharpness for sharpness, _ in measured], np.float64),
            yaw=yaw,
            plausibility=self._measure_plausibility(boxes, landmarks, turns),
        )
        return {
            "face_index": _spread([face.face_index for face in aligned], is_face, pa.int16()),
            "box": to_float_lists(boxes, is_face),
            "landmarks": to_float_lists(landmarks.reshape(-1, 10), is_face),
            "det_score": _spread([face.score for face in aligned], is_face, pa.float32()),
            "face_px": _spread(sides, is_face, pa.float32()),
            "sharpness": _spread([sharpness for sharpness, _ in measured], is_face, pa.float32()),
            "yaw": _spread(yaw.tolist(), is_face, pa.float32()),
            "roll": _spread(roll.tolist(), is_face, pa.float32()),
            "turn": _spread(turns.tolist(), is_face, pa.int16()),
            "visible": _spread(visible.tolist(), is_face, pa.float32()),
            "face_quality": _spread(estimate_quality(figures).tolist(), is_face, pa.float32()),
            "chip": pack_arrays(chips),
            "thumb": _spread([thumb for _, thumb in measured], is_face, pa.binary()),
        }

    def _measure_plausibility(self, boxes: Float32, landmarks: Float32, turns: Int64) -> Float64:
        """Measure how plausible the landmarks of faces are, (n,): 1 for detectors without landmarks of their own."""
        if self._turn_model is None or not len(boxes):
            return np.ones(len(boxes))
        # The model judges a face as it is found, so turned ones are turned upright about any point.
        upright_boxes = boxes.copy()
        upright_landmarks = landmarks.copy()
        for turn in set(turns.tolist()) - {0}:
            of_turn = turns == turn
            upright_boxes[of_turn] = turn_boxes(boxes[of_turn], turn // 90, (0, 0))
            upright_landmarks[of_turn] = turn_points(landmarks[of_turn], turn // 90, (0, 0))
        return self._turn_model.predict(upright_boxes, upright_landmarks)[:, 0]

    def _measure_chip(self, chip: UInt8Image) -> tuple[float, bytes | None]:
        """Measure a chip's sharpness, and encode its thumbnail if there are to be any."""
        return measure_sharpness(chip), self._encode_thumb(chip) if self.thumbs else None

    def _encode_thumb(self, chip: UInt8Image) -> bytes:
        # Keep the shape of the chip.
        height = round(self.thumb_side * chip.shape[0] / chip.shape[1])
        small = cv2.resize(chip, (self.thumb_side, height), interpolation=cv2.INTER_AREA)
        options = [cv2.IMWRITE_JPEG_QUALITY, self.thumb_quality]
        return bytes(cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)[1])


def cut_upright_chip(
    layout: ChipLayout,
    view: DecodedView,
    box: Float64,
    landmarks: Float64,
    *,
    turn: int,
    square: BoxToSquare | None,
) -> UInt8Image:
    """Cut the chip of a face, upright however the face lies in the image.

    Only layouts that place a face by its landmarks would turn it by themselves, so the pixels are turned for all.

    Args:
        layout: the embedder's layout.
        view: pixels of the image.
        box: (4,) in pixels of the full-size image.
        landmarks: (5, 2) in pixels of the full-size image.
        turn: degrees clockwise by which the face lies in the image.
        square: how dlib's square follows from the box.
    """
    predict_points = find_point_predictor(layout)
    if not turn:
        return cut_chip(layout, view.pixels, view.frame, box, landmarks, square=square, predict_points=predict_points)
    shape = view.pixels.shape[:2]
    quarters = turn // 90
    box_here = view.frame.from_full(box.reshape(2, 2)).reshape(1, 4)
    return cut_chip(
        layout,
        turn_pixels(view.pixels, quarters),
        Frame(),
        turn_boxes(box_here, quarters, shape)[0],
        turn_points(view.frame.from_full(landmarks), quarters, shape),
        square=square,
        predict_points=predict_points,
    )


def _spread(values: list[Any], is_face: Bool, kind: pa.DataType) -> pa.Array:
    """Spread values over the rows that are faces, with nulls elsewhere."""
    remaining = iter(values)
    return pa.array([next(remaining) if has_value else None for has_value in is_face], kind)


def find_point_predictor(layout: ChipLayout) -> PredictPoints | None:
    """Find dlib's landmark predictor, if the chips of a layout need it. It is loaded once per process."""
    return load_predictor().predict if layout.kind == "dlib" else None
