"""Read annotations in COCO's JSON: images, boxes of their faces, and five keypoints if there are so many."""

import math
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from facepipe.errors import SourceError
from facepipe.given.batch import NO_POINTS, ListedFace, RecordBatch
from facepipe.given.json_stream import JsonStreamError, iterate_elements
from facepipe.given.records import Kind, Records
from facepipe.hashing import hash64
from facepipe.sorted_lookup import find_sorted
from facepipe.sources.labels import LABEL_COLUMNS, format_label
from facepipe.storage import describe_error

_POINTS = 5
_FACE_CATEGORY = "face"
_MAX_SIDE = 1 << 31
_LISTS = ("images", "annotations", "categories")


class _Images:
    """The images of a file: hashed ids, hashes of names and sizes, some 24 bytes each."""

    def __init__(self) -> None:
        self._ids: array[int] = array("Q")
        self._records: list[Records] = []

    def add(self, number: int) -> None:
        """Add the hashed id of the next image."""
        self._ids.append(number)

    def add_records(self, records: Records) -> None:
        """Add the records of the images whose ids were added."""
        self._records.append(records[["key", "size"]].copy())

    def sort(self) -> None:
        """Sort the images for `find`."""
        ids = np.frombuffer(self._ids, np.uint64)
        order = np.argsort(ids, kind="stable")
        self._ordered = ids[order]
        self._sorted = np.concatenate(self._records)[order] if self._records else None

    def resolve(self, records: Records) -> Records:
        """Put the names and sizes of images in place of their ids. Records of unknown images are left out."""
        at = find_sorted(self._ordered, records["key"])
        known = records[at >= 0]
        if self._sorted is not None:
            known["key"] = self._sorted["key"][at[at >= 0]]
            known["size"] = self._sorted["size"][at[at >= 0]]
        return known


def read_coco(path: str, batch: RecordBatch) -> Iterator[Records]:
    """Read annotations, and yield what they say of images in batches.

    Annotations of crowds are counted. If there is a category `face`, only its annotations count. An image without any
    has no face. The file is read twice, because its lists may come in any order.

    Raises:
        SourceError: The file is no such JSON, or has several categories of which none is `face`.
    """
    images = _Images()
    categories: dict[int, str] = {}
    seen = set()
    try:
        for number, (key, value) in enumerate(_iterate_objects(path), 1):
            seen.add(key)
            if key == "categories":
                categories[_hash_id(value.get("id"))] = str(value.get("name", ""))
            elif key == "images" and batch.add(str(value.get("file_name") or ""), number, _describe_image(value)):
                images.add(_hash_id(value.get("id")))
                if batch.is_full:
                    yield _take_images(batch, images)
        if "images" not in seen:
            raise SourceError(f"the list of boxes {path!r} is JSON without images, so not of COCO's kind")
        yield _take_images(batch, images)
        images.sort()
        category = _choose_category(categories, path)
        yield from _read_annotations(path, batch, images, category)
    except OSError as error:
        raise SourceError(f"cannot read the list of boxes {path!r}: {describe_error(error)}") from error
    except JsonStreamError as error:
        raise SourceError(f"the list of boxes {path!r} is no JSON of COCO, or is damaged: {error}") from error


def _iterate_objects(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the elements of the three lists."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for key, value in iterate_elements(file):
            if key in _LISTS:
                if not isinstance(value, Mapping):
                    raise JsonStreamError(f"an element of {key!r} is no object")
                yield key, value


def _take_images(batch: RecordBatch, images: _Images) -> Records:
    records = batch.take()
    images.add_records(records)
    return records


def _describe_image(value: Mapping[str, Any]) -> ListedFace:
    sides = (value.get("width"), value.get("height"))
    has_size = all(type(side) is int and 0 < side < _MAX_SIDE for side in sides)
    return ListedFace(Kind.EMPTY, size=sides if has_size else (0, 0))  # type: ignore[arg-type]


def _choose_category(categories: dict[int, str], path: str) -> int | None:
    """Choose the category whose annotations are faces; None for any."""
    faces = [number for number, name in categories.items() if name.strip().lower() == _FACE_CATEGORY]
    if len(faces) == 1:
        return faces[0]
    if len(categories) <= 1:
        return None
    names = ", ".join(repr(name) for name in list(categories.values())[:5])
    raise SourceError(
        f"the list of boxes {path!r} has {len(categories)} categories ({names}), and none is 'face': it is not known "
        "which boxes are faces. Leave the others out, or rename one to face"
    )


def _read_annotations(path: str, batch: RecordBatch, images: _Images, category: int | None) -> Iterator[Records]:
    number = 0
    for key, value in _iterate_objects(path):
        if key != "annotations":
            continue
        number += 1
        if category is not None and _hash_id(value.get("category_id")) != category:
            batch.add_other()
            continue
        if value.get("iscrowd") in (1, True):
            batch.add_crowd()
            continue
        try:
            face = _read_face(value, batch)
        except (TypeError, ValueError, OverflowError) as error:
            face = ListedFace(Kind.UNUSABLE, problem=str(error))
        batch.add_by_key(_hash_id(value.get("image_id")), number, face)
        if batch.is_full:
            yield _resolve(batch, images)
    yield _resolve(batch, images)


def _resolve(batch: RecordBatch, images: _Images) -> Records:
    """Take the annotations of a batch, and count those of images that the file does not have."""
    records = batch.take()
    known = images.resolve(records)
    batch.add_unusable(np.setdiff1d(records["line"], known["line"]).tolist(), "its image is not in the list of images")
    return known


def _read_face(value: Mapping[str, Any], batch: RecordBatch) -> ListedFace:
    """Read the numbers of an annotation. Raises ValueError or TypeError for what is no number."""
    left, top, width, height = _read_numbers(value.get("bbox"), 4)
    score = value.get("score")
    return ListedFace(
        box=(left, top, left + width, top + height),
        points=_read_points(value.get("keypoints")),
        score=math.nan if score is None else _read_numbers([score], 1)[0],
        label=batch.encode_label(_find_label(value)),
    )


def _read_points(keypoints: Any) -> tuple[float, ...]:
    """Read five keypoints of x, y and visibility. Other numbers of them, or hidden ones, are no landmarks."""
    if not isinstance(keypoints, list) or len(keypoints) != 3 * _POINTS:
        return NO_POINTS
    numbers = _read_numbers(keypoints, 3 * _POINTS)
    if not all(numbers[2::3]):
        return NO_POINTS
    return tuple(number for point in range(_POINTS) for number in numbers[3 * point : 3 * point + 2])


def _read_numbers(values: Any, count: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{count} numbers expected")
    numbers = tuple(float(value) for value in values)
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(f"a coordinate of {number}")
    return numbers


def _find_label(value: Mapping[str, Any]) -> str | None:
    """Find the label of an annotation, in its own fields or among its attributes."""
    attributes = value.get("attributes")
    for fields in (value, attributes if isinstance(attributes, Mapping) else {}):
        column = next((name for name in LABEL_COLUMNS if name in fields), None)
        if column is not None:
            return format_label(fields[column])
    return None


def _hash_id(value: Any) -> int:
    """Hash an id of COCO, a number or a text."""
    return hash64(f"{type(value).__name__}:{value}")
