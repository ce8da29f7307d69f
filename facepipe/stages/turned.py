"""Find faces that are upside down or on their side, and what is searched again for it.

The detector's own output gives such faces away (`facepipe.models.detectors.turns`). An image in which one is suspected
is turned and searched again. What is found there counts if it looks upright then, and its score is not lower than that
of the face it replaces. Upright faces score higher upright, so a false suspicion costs time and changes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from facepipe.models.detectors.turns import QUARTERS, TurnModel
from facepipe.models.protocols import Faces
from facepipe.types import Float32, Float64, Int64, UInt8Image

# Searches images by number; see `Detect.detect_faces`.
Search = Callable[[dict[int, UInt8Image]], dict[int, Faces]]
Points = TypeVar("Points", Float32, Float64)

# A face is suspected to be turned if that is more likely than this. Among faces of which most look upright it takes
# more: profiles look turned too.
SUSPECT_ABOVE = 0.5
_SUSPECT_AMONG_UPRIGHT = 0.8
# A face in a turned image counts if it is upright there with at least this probability.
_UPRIGHT_ABOVE = 0.5
# Images are searched at so many other turns at most.
_MAX_LOOKS = 2
# Faces of two searches are one if they overlap by more than this, as intersection over union.
_SAME_ABOVE = 0.3
# A face that only a turned image shows counts from this score on, beside others and alone: each search may find what
# is none.
_NEW_ABOVE = 0.9
_ALONE_ABOVE = 0.8


@dataclass
class _Suspicion:
    """What is known of an image that may hold turned faces.

    Attributes:
        faces: Its faces so far.
        suspects: Faces that are suspected to be turned.
        tried: Turns at which the image was searched.
    """

    faces: Faces
    suspects: Float64
    tried: set[int] = field(default_factory=lambda: {0})

    def choose_turn(self) -> int | None:
        """Choose the likeliest turn that was not tried yet; None if no face is suspected any more."""
        if not len(self.suspects):
            return None
        totals = self.suspects.sum(0)
        totals[list(self.tried)] = -1.0
        best = int(totals.argmax())
        return best if totals[best] > 0 else None


def find_turned_faces(
    detected: dict[int, Faces],
    weak: dict[int, Faces],
    pixels: dict[int, UInt8Image],
    model: TurnModel,
    search: Search,
) -> dict[int, Faces]:
    """Search images again, turned, in which faces seem to be turned.

    Args:
        detected: The faces of each image.
        weak: Candidates of images without a face, whose scores are too low for faces.
        pixels: The images.
        model: Tells how a face is turned.
        search: Searches turned images.

    Returns:
        The faces of the images that changed, with their turns, in the images' own frame.
    """
    pending = _suspect(detected, model, SUSPECT_ABOVE)
    # Candidates of an image without a face say which turn to try first, upright or not.
    pending |= _suspect(weak, model, -1.0)
    changed: dict[int, Faces] = {}
    for look in range(QUARTERS - 1):
        turns: dict[int, int] = {}
        for n, suspicion in pending.items():
            turn = suspicion.choose_turn()
            # Images without a face are searched at all turns, others at the two likeliest.
            if turn is not None and (look < _MAX_LOOKS or n in weak):
                turns[n] = turn
        if not turns:
            break
        found = search({n: turn_pixels(pixels[n], turn) for n, turn in turns.items()})
        for n, turn in turns.items():
            suspicion = pending[n]
            suspicion.tried.add(turn)
            before = _NO_FACES if n in weak and n not in changed else suspicion.faces
            merged = _merge(before, found[n], turn, model, pixels[n].shape[:2])
            if merged is not before:
                changed[n] = merged
            suspicion.faces = merged
            # In an image without a face, one face is enough. Elsewhere those count that nothing replaced.
            if n in weak:
                suspicion.suspects = suspicion.suspects[: 0 if len(merged.scores) else None]
            else:
                suspicion.suspects = _find_suspects(merged, model, SUSPECT_ABOVE)
    return changed


def _suspect(detected: dict[int, Faces], model: TurnModel, limit: float) -> dict[int, _Suspicion]:
    """Find the images with suspects. All faces of all images are judged in one call."""
    numbers = [n for n, faces in detected.items() if len(faces.scores)]
    if not numbers:
        return {}
    boxes = np.concatenate([detected[n].boxes for n in numbers])
    landmarks = np.concatenate([detected[n].landmarks for n in numbers])
    probabilities = model.predict(boxes, landmarks)
    is_suspect = 1 - probabilities[:, 0] > limit
    if not is_suspect.any():
        return {}
    owners = np.repeat(numbers, [len(detected[n].scores) for n in numbers])
    # Where most faces look upright, keep the clear suspects.
    for n in np.unique(owners[is_suspect]).tolist():
        of_image = owners == n
        if is_suspect[of_image].mean() < 0.5:
            is_suspect[of_image] &= 1 - probabilities[of_image, 0] > _SUSPECT_AMONG_UPRIGHT
    return {
        int(n): _Suspicion(detected[n], probabilities[is_suspect & (owners == n)])
        for n in np.unique(owners[is_suspect])
    }


def _find_suspects(faces: Faces, model: TurnModel, limit: float) -> Float64:
    """Return the probabilities of the turns, (m, 4), of the faces that are suspected and not yet found turned."""
    if not len(faces.scores):
        return np.empty((0, QUARTERS))
    probabilities = model.predict(faces.boxes, faces.landmarks)
    is_suspect = (1 - probabilities[:, 0] > limit) & (get_turns(faces) == 0)
    return probabilities[is_suspect]


def _merge(faces: Faces, found: Faces, turn: int, model: TurnModel, shape: tuple[int, int]) -> Faces:
    """Merge the faces of an image with those that were found in the turned image.

    Args:
        faces: Faces of the image.
        found: Faces in pixels of the turned image.
        turn: Quarters clockwise by which the faces lie in the image.
        model: Tells how a face is turned.
        shape: Height and width of the image.

    Returns:
        The same object if nothing changed.
    """
    if not len(found.scores):
        return faces
    is_upright = model.predict(found.boxes, found.landmarks)[:, 0] >= _UPRIGHT_ABOVE
    boxes = turn_boxes_back(found.boxes, turn, shape)
    landmarks = turn_points_back(found.landmarks, turn, shape)
    overlaps = measure_overlaps(boxes, faces.boxes)
    keep = np.ones(len(faces.scores), bool)
    added = []
    for k in np.flatnonzero(is_upright).tolist():
        rivals = np.flatnonzero((overlaps[k] > _SAME_ABOVE) & keep)
        score = float(found.scores[k])
        if len(rivals):
            if score < float(faces.scores[rivals].max()):
                continue
            keep[rivals] = False
        elif score < (_NEW_ABOVE if len(faces.scores) else _ALONE_ABOVE):
            continue
        added.append(k)
    if not added:
        return faces
    turns = np.concatenate([get_turns(faces)[keep], np.full(len(added), 90 * turn, np.int64)])
    scores = np.concatenate([faces.scores[keep], found.scores[added]])
    order = np.argsort(-scores, kind="stable")
    return Faces(
        np.concatenate([faces.boxes[keep], boxes[added]])[order],
        np.concatenate([faces.landmarks[keep], landmarks[added]])[order],
        scores[order],
        turns[order],
    )


def get_turns(faces: Faces) -> Int64:
    """Return the turns of faces in degrees, (n,): 0 if a search looked at no other turn."""
    return np.zeros(len(faces.scores), np.int64) if faces.turns is None else faces.turns


def turn_pixels(pixels: UInt8Image, quarters: int) -> UInt8Image:
    """Turn an image so that faces that lie by so many quarters clockwise become upright."""
    return np.ascontiguousarray(np.rot90(pixels, quarters))


def turn_points_back(points: Points, quarters: int, shape: tuple[int, int]) -> Points:
    """Map points (..., 2) of an image that `turn_pixels` made to the image, whose height and width are `shape`."""
    height, width = shape
    x = points[..., 0]
    y = points[..., 1]
    match quarters % QUARTERS:
        case 1:
            return np.stack([width - 1 - y, x], -1)
        case 2:
            return np.stack([width - 1 - x, height - 1 - y], -1)
        case 3:
            return np.stack([y, height - 1 - x], -1)
        case _:
            return points


def turn_points(points: Points, quarters: int, shape: tuple[int, int]) -> Points:
    """Map points (..., 2) of an image, whose height and width are `shape`, to the one that `turn_pixels` makes."""
    height, width = shape
    turned_shape = (width, height) if quarters % 2 else shape
    return turn_points_back(points, -quarters % QUARTERS, turned_shape)


def turn_boxes_back(boxes: Points, quarters: int, shape: tuple[int, int]) -> Points:
    """Map boxes (n, 4) as `turn_points_back` maps points."""
    return _order_corners(turn_points_back(boxes.reshape(-1, 2, 2), quarters, shape))


def turn_boxes(boxes: Points, quarters: int, shape: tuple[int, int]) -> Points:
    """Map boxes (n, 4) as `turn_points` maps points."""
    return _order_corners(turn_points(boxes.reshape(-1, 2, 2), quarters, shape))


def _order_corners(corners: Points) -> Points:
    """Make boxes (n, 4) of two opposite corners each, (n, 2, 2)."""
    return np.concatenate([corners.min(1), corners.max(1)], 1)


def measure_overlaps(boxes: Float32, others: Float32) -> Float64:
    """Measure the intersection over union of boxes (n, 4) and others (m, 4), (n, m)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    overlap = np.clip(high - low, 0, None).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None] + (others[:, 2:] - others[:, :2]).prod(1)[None]
    return np.asarray(overlap / np.maximum(area - overlap, 1e-9), np.float64)


_NO_FACES = Faces(np.empty((0, 4), np.float32), np.empty((0, 5, 2), np.float32), np.empty(0, np.float32))
