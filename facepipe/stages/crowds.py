"""Small faces in large pictures: which images to search again at a larger size, and how to add what is found."""

from dataclasses import dataclass

import numpy as np

from facepipe.imaging.geometry import bound_by_area
from facepipe.models.protocols import Faces
from facepipe.stages.turned import get_turns, measure_overlaps
from facepipe.stages.views import DecodedView, decode_larger

# A candidate is small below so many pixels of the detector's input, and found well from so many on.
_SMALL_SIDE = 24.0
_GOOD_SIDE = 28.0
# An input grows to this multiple at most: four times the sides take sixteen times as long.
_MAX_GROWTH = 4.0
# Growing by less is not worth a search.
_MIN_GROWTH = 1.3
# Faces of so many pixels of the usual input are not missed by the first search.
_MAX_ADDED_SIDE = 40.0
# A face that is found again is at least so much of the one that is known, as intersection over union.
_SAME_ABOVE = 0.2


def choose_larger_size(candidates: Faces, image_side: int, size: int, available_side: int) -> int | None:
    """Choose the size of a second search for small faces.

    Args:
        candidates: Faces and candidates of an image, in pixels of the image that was searched.
        image_side: Longer side of that image.
        size: Longer side of the detector's input.
        available_side: Longer side of the full-size image.

    Returns:
        The longer side of a larger input; None if the candidates are not small, or there are no more pixels.
    """
    if not len(candidates.scores) or available_side <= _MIN_GROWTH * size:
        return None
    scale = min(1.0, size / image_side)
    sides = (candidates.boxes[:, 2:] - candidates.boxes[:, :2]).min(1) * scale
    # One person in front of a crowd is not searched again: the crowd has to be the picture.
    if (sides < _SMALL_SIDE).mean() < 0.5:
        return None
    growth = min(_GOOD_SIDE / max(float(np.median(sides)), 1.0), _MAX_GROWTH)
    larger = min(round(growth * size), available_side)
    return larger if larger > _MIN_GROWTH * size else None


@dataclass(frozen=True)
class LargerSearch:
    """A second search of an image.

    Attributes:
        view: Pixels of the image that are large enough.
        size: Longer side of the detector's input.
        max_side: Longest side of a face that is added, in pixels of the full-size image.
    """

    view: DecodedView
    size: int
    max_side: float


def choose_larger_view(
    candidates: Faces, view: DecodedView, data: memoryview | None, full_size: tuple[int, int], size: int
) -> LargerSearch | None:
    """Choose whether to search an image again for small faces, and decode it again if that needs more pixels.

    Args:
        candidates: Faces and candidates, in pixels of the view.
        view: The pixels that were searched.
        data: The image file, if it is at hand.
        full_size: Width and height of the full-size image.
        size: Longer side of the detector's usual input.
    """
    height, width = view.pixels.shape[:2]
    size = bound_by_area(size, width, height)
    available = max(full_size) if data is not None else max(height, width)
    larger = choose_larger_size(candidates, max(height, width), size, available)
    if larger is None:
        return None
    # Input pixels per full-size pixel.
    scale = larger / max(full_size)
    if data is not None and view.frame.scale < scale:
        view = decode_larger(bytes(data), scale, view)
    return LargerSearch(view, larger, _MAX_ADDED_SIDE * max(full_size) / size)


def add_small_faces(faces: Faces, found: Faces, max_side: float) -> Faces:
    """Add the faces of a second search to those of the first, which stay as they are.

    Args:
        faces: Faces of the first search.
        found: Faces of the second search, in pixels of the same image.
        max_side: Longest side of a face that is added: the first search would have found larger ones.
    """
    sides = (found.boxes[:, 2:] - found.boxes[:, :2]).max(1, initial=0)
    is_new = sides <= max_side
    if len(faces.scores):
        is_new &= measure_overlaps(found.boxes, faces.boxes).max(1, initial=0) <= _SAME_ABOVE
    if not is_new.any():
        return faces
    scores = np.concatenate([faces.scores, found.scores[is_new]])
    order = np.argsort(-scores, kind="stable")
    return Faces(
        np.concatenate([faces.boxes, found.boxes[is_new]])[order],
        np.concatenate([faces.landmarks, found.landmarks[is_new]])[order],
        scores[order],
        np.concatenate([get_turns(faces), get_turns(found)[is_new]])[order],
    )
