"""Stages for images whose faces a list gives: no detector searches them, but for landmarks inside a given box."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from facepipe.arrow import read_frames, set_columns, view_buffers, view_images
from facepipe.given.records import Kind, Records, has_points
from facepipe.given.source import find_labels
from facepipe.given.table import GivenFaces
from facepipe.imaging.alignment import ARCFACE_112
from facepipe.imaging.header import HeaderError, read_header
from facepipe.imaging.quality import measure_visible
from facepipe.models.detectors.aligned import BOX_112
from facepipe.models.protocols import Faces
from facepipe.sources import BoxesFrame, UnlistedBoxes
from facepipe.stages.detect import Detect
from facepipe.stages.turned import get_turns
from facepipe.stages.views import DecodedView, decode_larger
from facepipe.types import Float32, Float64, UInt8Image

# A detector searches this much around a box, as a share of its sides. With 0.3 landmarks were worse (docs/sources.md).
_MARGIN = 1.0
# Pixels that the shorter side of a box has at least where it is searched, if the image has so many.
_SEARCHED_SIDE = 64
_MIN_CROP = 8
# A face that is found is the given one if it overlaps its box so much, as intersection over union.
_MIN_OVERLAP = 0.15
# A box of which the picture shows less was made for another picture.
_MIN_VISIBLE = 0.1
_NO_FACES = Faces(np.empty((0, 4), np.float32), np.empty((0, 5, 2), np.float32), np.empty(0, np.float32))
_TURNED_SIDE = 5  # EXIF orientations from this one on exchange width and height
# Left and right are exchanged by orientations that mirror.
_MIRRORING = (2, 4, 5, 7)
_MIRRORED = (1, 0, 2, 4, 3)


class ListError(Exception):
    """What a list says of an image cannot be: the image gets no face."""


@dataclass
class _Search:
    """A given box in which landmarks are searched.

    Attributes:
        row: Row of the image.
        face: Position of the face in the image.
        view: Pixels of the image.
        left: First column of the crop in them.
        top: First row of the crop.
    """

    row: int
    face: int
    view: DecodedView
    left: int
    top: int


@dataclass(frozen=True)
class DetectGiven(Detect):
    """Take the faces that a list gives for an image, and detect those of other images.

    A face without landmarks is searched inside its box by the detector. If nothing is found there, the landmarks are
    those of an upright face that fills the box, and the score is 0. The box stays the given one.

    Attributes:
        folder: folder with the files of `facepipe.given.lists`
        unlisted: images that no list names: detect (their faces), or none (a row without a face)
        frame: frame of the coordinates: displayed (EXIF applied), stored, or auto (stored if the size that the list
            gives, or a box outside of the picture, says so)
    """

    folder: str = field(default="", kw_only=True)
    unlisted: UnlistedBoxes = field(default="detect", kw_only=True)
    frame: BoxesFrame = field(default="auto", kw_only=True)

    stage_name: ClassVar = "detect"
    needs: ClassVar = (*Detect.needs, "uri", "bytes", "error")

    @cached_property
    def _faces(self) -> GivenFaces:
        return GivenFaces(self.folder)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Add the faces of each image, in pixels of the full-size image."""
        at = self._faces.find(table["uri"].to_pylist())
        is_given = at >= 0
        if self.unlisted == "none":
            return self._give_faces(table, at)
        if is_given.all():
            return self._give_faces(table, at)
        if not is_given.any():
            return super().__call__(table)
        given = np.flatnonzero(is_given)
        others = np.flatnonzero(~is_given)
        with_given = self._give_faces(table.take(given), at[given])
        detected = super().__call__(table.take(others)).select(with_given.column_names)
        return pa.concat_tables([with_given, detected]).take(np.argsort(np.concatenate([given, others])))

    def _give_faces(self, table: pa.Table, at: Any) -> pa.Table:
        """Add the faces that lists give, and none to images that they do not name."""
        results: list[Faces] = [_NO_FACES] * table.num_rows
        errors = table["error"].to_pylist()
        searches: list[_Search] = []
        rows = zip(view_images(table), read_frames(table), view_buffers(table["bytes"]), strict=True)
        for row, (pixels, frame, data) in enumerate(rows):
            if pixels is None:
                continue
            if at[row] < 0:
                errors[row] = "the list of boxes does not name it"
                continue
            size = (table["width"][row].as_py(), table["height"][row].as_py())
            try:
                faces = self._read_faces(int(at[row]), size, data)
            except ListError as error:
                errors[row] = str(error)
                continue
            results[row] = faces
            view = DecodedView(pixels, frame)
            searches += _plan_searches(row, faces, view, data)
        self._find_landmarks(searches, results)
        return set_columns(self._add_columns(table, results), {"error": pa.array(errors, pa.string())})

    def _read_faces(self, position: int, size: tuple[int, int], data: memoryview | None) -> Faces:
        """Read the faces of an image. Those without landmarks have NaN.

        Raises:
            ListError: the list cannot be of this picture, or its box cannot be used.
        """
        records = self._faces.read(position)
        if records["kind"][0] == Kind.EMPTY:
            return _NO_FACES
        if records["kind"][0] == Kind.UNUSABLE:
            raise ListError("its box in the list of boxes cannot be used")
        boxes = records["box"].astype(np.float64)
        landmarks = records["points"].reshape(-1, 5, 2).astype(np.float64)
        orientation = _find_orientation(records, size, data, self.frame)
        if orientation != 1:
            boxes, landmarks = turn_given(boxes, landmarks, orientation, size)
        visible = measure_visible(boxes.astype(np.float32), np.tile(np.array(size, np.float64), (len(boxes), 1)))
        if (visible < _MIN_VISIBLE).any():
            box = ", ".join(f"{value:g}" for value in boxes[int(visible.argmin())].tolist())
            raise ListError(f"a box of the list ({box}) lies outside the picture of {size[0]}x{size[1]}")
        with_points = has_points(records)
        # A list without scores says that these are faces.
        scores = np.where(np.isnan(records["score"]), 1.0, records["score"])
        turns = np.where(with_points, _measure_turns(landmarks), 0)
        return Faces(boxes.astype(np.float32), landmarks.astype(np.float32), scores.astype(np.float32), turns)

    def _find_landmarks(self, searches: list[_Search], results: list[Faces]) -> None:
        """Find the landmarks of given boxes, and write them into the faces of each image."""
        crops = {n: _cut_crop(search, results[search.row].boxes[search.face]) for n, search in enumerate(searches)}
        searched = {n: crop for n, crop in crops.items() if min(crop.shape[:2]) >= _MIN_CROP}
        candidates = self._run_passes(searched)
        found = self._choose_faces(candidates, searched)
        for n, search in enumerate(searches):
            faces = results[search.row]
            box = faces.boxes[search.face].astype(np.float64)
            best = None
            # What scores too little to be a face by itself may still be the one that the list gives.
            for of_crop in (found.get(n), candidates.get(n)):
                if best is None and of_crop is not None:
                    best = _match_face(_to_full_size(of_crop, search), box)
            if best is None:
                faces.landmarks[search.face] = place_landmarks(box)
                faces.scores[search.face] = 0.0
                continue
            faces.landmarks[search.face] = best.landmarks[0]
            faces.scores[search.face] = best.scores[0]
            get_turns(faces)[search.face] = get_turns(best)[0]


@dataclass(frozen=True)
class LabelGiven:
    """Give each face the label that a list gives it. It follows Align.

    Attributes:
        folder: folder with the files of `facepipe.given.lists`
        prefix: text before each label
    """

    folder: str
    prefix: str = ""

    stage_name: ClassVar = "align"
    needs: ClassVar = ("uri", "identity", "face_index")
    adds: ClassVar = ()

    @cached_property
    def _faces(self) -> GivenFaces:
        return GivenFaces(self.folder)

    def setup(self) -> None:
        """Do nothing: the files are mapped when they are needed."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace the labels of faces that the list gives."""
        identities = table["identity"].to_pylist()
        at = self._faces.find(table["uri"].to_pylist())
        for row, (position, index) in enumerate(zip(at.tolist(), table["face_index"].to_pylist(), strict=True)):
            if position >= 0 and index is not None:
                identities[row] = find_labels(self._faces.read(position), self._faces.labels, self.prefix)[index]
        return set_columns(table, {"identity": pa.array(identities, pa.string())})


def turn_given(boxes: Float64, landmarks: Float64, orientation: int, size: tuple[int, int]) -> tuple[Float64, Float64]:
    """Turn boxes and landmarks as an EXIF orientation turns the pixels.

    Args:
        boxes: (n, 4) in stored pixels.
        landmarks: (n, 5, 2) in stored pixels.
        orientation: 1 to 8.
        size: width and height of the picture as it is displayed.
    """
    corners = _turn_points(boxes.reshape(-1, 2, 2), orientation, size)
    turned = _turn_points(landmarks, orientation, size)
    if orientation in _MIRRORING:
        turned = turned[:, _MIRRORED]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1), turned


def _turn_points(points: Float64, orientation: int, size: tuple[int, int]) -> Float64:
    x = points[..., 0]
    y = points[..., 1]
    if orientation >= _TURNED_SIDE:
        x, y = y, x
    # Which of the displayed sides run backwards.
    if orientation in (2, 3, 6, 7):
        x = size[0] - 1 - x
    if orientation in (3, 4, 7, 8):
        y = size[1] - 1 - y
    return np.stack([x, y], axis=-1)


def _find_orientation(records: Records, size: tuple[int, int], data: memoryview | None, frame: BoxesFrame) -> int:
    """Find by which EXIF orientation coordinates are to be turned; 1 for none.

    Raises:
        ListError: the list gives the picture another size than it has.
    """
    if frame == "displayed" or data is None:
        return 1
    try:
        orientation = read_header(bytes(data)).orientation
    except HeaderError:
        return 1
    if frame == "stored":
        return orientation
    listed = tuple(records["size"][0].tolist())
    if all(listed):
        if listed == size:
            return 1
        if listed == size[::-1] and orientation >= _TURNED_SIDE:
            return orientation
        raise ListError(
            f"the list of boxes is of a picture of {listed[0]}x{listed[1]}, and this one has {size[0]}x{size[1]}"
        )
    if orientation < _TURNED_SIDE:
        return 1
    # A box beyond a side of the displayed picture, that lies inside the stored one.
    ends = records["box"][:, 2:].max(axis=0)
    is_inside = bool((ends <= size).all())
    return orientation if not is_inside and bool((ends <= size[::-1]).all()) else 1


def _measure_turns(landmarks: Float64) -> Any:
    """Measure by how many degrees clockwise faces lie in the picture, in quarters, from the line of their eyes."""
    across = np.nan_to_num(landmarks[:, 1] - landmarks[:, 0])
    return np.rint(np.degrees(np.arctan2(across[:, 1], across[:, 0])) / 90).astype(np.int64) % 4 * 90


def _plan_searches(row: int, faces: Faces, view: DecodedView, data: memoryview | None) -> list[_Search]:
    """Plan where the faces of an image without landmarks are searched."""
    missing = np.flatnonzero(np.isnan(faces.landmarks[:, 0, 0])).tolist()
    if not missing:
        return []
    smallest = float((faces.boxes[missing, 2:] - faces.boxes[missing, :2]).min())
    scale = min(1.0, _SEARCHED_SIDE / smallest)
    if data is not None and view.frame.scale < scale:
        view = decode_larger(bytes(data), scale, view)
    return [_Search(row, face, view, 0, 0) for face in missing]


def _cut_crop(search: _Search, box: Float32) -> UInt8Image:
    """Cut the surroundings of a box out of an image, and note where they begin."""
    pixels = search.view.pixels
    corners = search.view.frame.from_full(box.reshape(2, 2).astype(np.float64))
    margin = _MARGIN * (corners[1] - corners[0])
    # Huge boxes are brought into the picture before they become integers.
    limits = np.array([pixels.shape[1], pixels.shape[0]])
    left, top = np.floor(np.clip(corners[0] - margin, 0, limits)).astype(int).tolist()
    right, bottom = np.ceil(np.clip(corners[1] + margin, 0, limits)).astype(int).tolist()
    search.left = left
    search.top = top
    return np.ascontiguousarray(pixels[top:bottom, left:right])


def _to_full_size(faces: Faces, search: _Search) -> Faces:
    """Map the faces of a crop to the full-size image."""
    start = np.array([search.left, search.top], np.float32)
    to_full = search.view.frame.to_full
    boxes = to_full(faces.boxes.reshape(-1, 2, 2) + start).reshape(-1, 4)
    return Faces(boxes, to_full(faces.landmarks + start), faces.scores, get_turns(faces))


def _match_face(faces: Faces, box: Float64) -> Faces | None:
    """Find the face that overlaps a box most; None if none does enough."""
    if not len(faces.scores):
        return None
    overlaps = measure_overlaps(faces.boxes.astype(np.float64), box)
    best = int(overlaps.argmax())
    if overlaps[best] < _MIN_OVERLAP:
        return None
    kept = slice(best, best + 1)
    return Faces(faces.boxes[kept], faces.landmarks[kept], faces.scores[kept], get_turns(faces)[kept])


def measure_overlaps(boxes: Float64, box: Float64) -> Float64:
    """Measure how boxes (n, 4) overlap with one (4,), as intersection over union, (n,)."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    common = sides.clip(0).prod(axis=1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod() - common
    return np.asarray(common / np.maximum(area, 1e-9), np.float64)


def place_landmarks(box: Float64) -> Float32:
    """Place the landmarks of an upright face into a box (4,), as RetinaFace's boxes lie to them; (5, 2)."""
    corners = np.array(BOX_112)
    shares = (np.array(ARCFACE_112) - corners[0]) / (corners[1] - corners[0])
    return (box[:2] + shares * (box[2:] - box[:2])).astype(np.float32)
