"""Bring the lines of an image together: landmarks to their boxes, in an order that does not depend on the lists'."""

import numpy as np

from facepipe.given.records import Kind, Records, has_box, has_points, split_line_number
from facepipe.imaging.alignment import ARCFACE_112
from facepipe.models.detectors.aligned import BOX_112
from facepipe.types import Bool, Float32, Float64, Int64

# Left and right are exchanged: eyes and corners of the mouth.
_MIRRORED = (1, 0, 2, 4, 3)


def finish_records(records: Records, mirrored: list[int]) -> tuple[Records, int]:
    """Finish the records of whole images.

    Args:
        records: in any order, (n,).
        mirrored: numbers of lists whose left and right are those of the person.

    Returns:
        The records in order of their keys, those of an image by falling score and size, and how many were repeated. An
        image without a usable face has one record that says so.
    """
    if mirrored:
        lists = np.array([split_line_number(line)[0] for line in records["line"].tolist()], np.int64)
        is_mirrored = np.isin(lists, mirrored)
        points = records["points"][is_mirrored].reshape(-1, 5, 2)
        records["points"][is_mirrored] = points[:, _MIRRORED].reshape(-1, 10)
    records = records[np.lexsort((records["line"], records["key"]))]
    records = _attach_points(records)
    lonely = (records["kind"] == Kind.FACE) & ~has_box(records)
    records["box"][lonely] = derive_boxes(records["points"][lonely].reshape(-1, 5, 2))
    _share_sizes(records)
    records = records[_sort_faces(records)]
    is_same = _find_repeated(records)
    is_dropped = is_same | _find_needless_marks(records)
    return records[~is_dropped], int((is_same & (records["kind"] == Kind.FACE)).sum())


def derive_boxes(landmarks: Float32) -> Float32:
    """Derive the boxes that RetinaFace finds from five landmarks.

    Args:
        landmarks: (n, 5, 2).

    Returns:
        x1 y1 x2 y2, (n, 4).
    """
    # The similarity from the template to the landmarks, as one complex factor and a shift per face.
    template = np.array(ARCFACE_112) @ (1, 1j)
    points = landmarks.astype(np.float64) @ (1, 1j)
    centred = template - template.mean()
    factor = (points @ centred.conj() - points.mean(1) * centred.conj().sum()) / np.vdot(centred, centred).real
    shift = points.mean(1) - factor * template.mean()
    corners: Float64 = np.array(BOX_112)
    centre = factor * (corners.mean(0) @ (1, 1j)) + shift
    width, height = corners[1] - corners[0]
    # A face that lies on its side has its width and height exchanged.
    is_upright = np.abs(factor.real) >= np.abs(factor.imag)
    half_width = np.abs(factor) * np.where(is_upright, width, height) / 2
    half_height = np.abs(factor) * np.where(is_upright, height, width) / 2
    sides = (centre.real - half_width, centre.imag - half_height, centre.real + half_width, centre.imag + half_height)
    return np.stack(sides, axis=1).astype(np.float32)


def _attach_points(records: Records) -> Records:
    """Join lines of landmarks without a box to boxes without landmarks of the same image."""
    is_face = records["kind"] == Kind.FACE
    with_box = has_box(records)
    with_points = has_points(records)
    only_points = is_face & with_points & ~with_box
    only_box = is_face & with_box & ~with_points
    if not only_points.any() or not only_box.any():
        return records
    is_used = np.zeros(len(records), bool)
    starts = np.flatnonzero(np.concatenate([[True], np.diff(records["key"]) != 0]))
    ends = np.append(starts[1:], len(records))
    # Images that have both kinds of lines.
    counts = np.add.reduceat(only_points, starts) * np.add.reduceat(only_box, starts)
    for start, end in zip(starts[counts > 0].tolist(), ends[counts > 0].tolist(), strict=True):
        boxes = start + np.flatnonzero(only_box[start:end])
        points = start + np.flatnonzero(only_points[start:end])
        for box, point in _match_points(records, boxes, points):
            records["points"][box] = records["points"][point]
            if np.isnan(records["score"][box]):
                records["score"][box] = records["score"][point]
            is_used[point] = True
    return records[~is_used]


def _match_points(records: Records, boxes: Int64, points: Int64) -> list[tuple[int, int]]:
    """Match boxes with landmarks whose mean lies in them, the nearest to a box's centre first."""
    means = records["points"][points].reshape(-1, 5, 2).mean(axis=1)
    corners = records["box"][boxes].reshape(-1, 2, 2)
    sides = corners[:, 1] - corners[:, 0]
    # Distance from the centre in halves of the box's sides: up to one is inside.
    distances = np.abs((means[None] - corners.mean(axis=1)[:, None]) / (sides[:, None] / 2)).max(axis=2)
    pairs: list[tuple[int, int]] = []
    for flat in np.argsort(distances, axis=None, kind="stable").tolist():
        row, column = divmod(flat, len(points))
        if distances[row, column] > 1:
            break
        box = int(boxes[row])
        point = int(points[column])
        if all(box != other and point != taken for other, taken in pairs):
            pairs.append((box, point))
    return pairs


def _share_sizes(records: Records) -> None:
    """Give all records of an image the size that any of them has."""
    if len(records) and records["size"].any():
        starts = np.flatnonzero(np.concatenate([[True], np.diff(records["key"]) != 0]))
        largest = np.maximum.reduceat(records["size"], starts, axis=0)
        lengths = np.diff(np.append(starts, len(records)))
        records["size"] = np.repeat(largest, lengths, axis=0)


def _sort_faces(records: Records) -> Int64:
    """Sort by image, then by falling score and area, then by all that tells two faces apart."""
    area = (records["box"][:, 2:].astype(np.float64) - records["box"][:, :2]).prod(axis=1)
    columns = [
        records["label"],
        *np.nan_to_num(records["points"], nan=-np.inf).T[::-1],
        *np.nan_to_num(records["box"], nan=-np.inf).T[::-1],
        -np.nan_to_num(area),
        -np.nan_to_num(records["score"], nan=-np.inf),
        records["kind"],
        records["key"],
    ]
    return np.asarray(np.lexsort(columns), np.int64)


def _find_repeated(records: Records) -> Bool:
    """Find the records that say the same as the one before."""
    is_same = np.zeros(len(records), bool)
    if len(records) > 1:
        names = ("key", "kind", "box", "points", "score", "label")
        later = np.ones(len(records) - 1, bool)
        for name in names:
            column = records[name].reshape(len(records), -1)
            equal = (column[1:] == column[:-1]) | ((column[1:] != column[1:]) & (column[:-1] != column[:-1]))
            later &= equal.all(axis=1)
        is_same[1:] = later
    return is_same


def _find_needless_marks(records: Records) -> Bool:
    """Find the records without a face of images that have one, and all but the last of several."""
    is_mark = records["kind"] != Kind.FACE
    keys = records["key"]
    first = np.searchsorted(keys, keys)
    # Faces come first among the records of an image, and of marks the unusable ones come last.
    is_followed = np.append(keys[1:] == keys[:-1], False) if len(keys) else np.zeros(0, bool)
    return np.asarray(is_mark & ((records["kind"][first] == Kind.FACE) | is_followed))
