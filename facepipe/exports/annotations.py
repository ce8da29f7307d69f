"""Lists and annotations of boxes: a CSV file, COCO's JSON, and the JSON of FiftyOne's detections."""

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from facepipe.exports.faces import ExportedFaces
from facepipe.sources.members import split_member
from facepipe.storage import is_remote
from facepipe.text import protect_cell

_POINTS = ("left_eye", "right_eye", "nose", "left_mouth_corner", "right_mouth_corner")  # as seen in the image
_COLUMNS = ["face_id", "uri", "identity", "source", "width", "height", "box", "landmarks", "det_score"]
_VISIBLE = 2  # COCO's mark of a point that is labelled and visible


def write_list(faces: ExportedFaces, folder: str) -> None:
    """Write `faces.csv`, a line per face: the image's path, its label, the face's id, box and score."""
    with open(os.path.join(folder, "faces.csv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "identity", "face_id", "x1", "y1", "x2", "y2", "det_score"])
        for row in _iterate_rows(faces):
            label = protect_cell(row["identity"] or "")
            writer.writerow([protect_cell(row["uri"]), label, row["face_id"], *row["box"], row["det_score"]])


@dataclass(frozen=True)
class _Image:
    """An image with its faces.

    Attributes:
        number: Its number, from 1.
        uri: Its uri.
        faces: Rows of its faces.
    """

    number: int
    uri: str
    faces: list[dict[str, Any]]


def write_coco(faces: ExportedFaces, folder: str) -> None:
    """Write `annotations.json`: an image per photo, an annotation with five keypoints per face, the category `face`."""
    category = {"id": 1, "name": "face", "supercategory": "person", "keypoints": _POINTS, "skeleton": []}
    # The images stand before the annotations, which wait in a file meanwhile.
    with (
        open(os.path.join(folder, "annotations.json"), "w", encoding="utf-8") as file,
        tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder) as waiting,
    ):
        file.write('{"info":{"description":"faces of a gallery of facepipe"},"licenses":[],\n')
        file.write(f'"categories":{json.dumps([category])},\n"images":[\n')
        number = 0
        for image in _iterate_images(faces):
            first = image.faces[0]
            described = {
                "id": image.number,
                "file_name": image.uri,
                "width": first["width"],
                "height": first["height"],
            }
            file.write(f"{_comma(image.number)}{json.dumps(described, ensure_ascii=False)}")
            for face in image.faces:
                number += 1
                annotation = _describe_annotation(face, number, image.number)
                waiting.write(f"{_comma(number)}{json.dumps(annotation, ensure_ascii=False)}")
        file.write('],\n"annotations":[\n')
        waiting.seek(0)
        shutil.copyfileobj(waiting, file)
        file.write("]}\n")


def _describe_annotation(face: dict[str, Any], number: int, image: int) -> dict[str, Any]:
    left, top, right, bottom = face["box"]
    points = face["landmarks"] or []
    keypoints: list[float] = []
    for x, y in zip(points[::2], points[1::2], strict=True):
        keypoints += [x, y, _VISIBLE]
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "bbox": [left, top, right - left, bottom - top],
        "area": (right - left) * (bottom - top),
        "iscrowd": 0,
        "keypoints": keypoints or [0.0] * (3 * len(_POINTS)),
        "num_keypoints": len(keypoints) // 3,
        "score": face["det_score"],
        # Numbers of 63 bits are no numbers to every reader of JSON.
        "attributes": {"face_id": str(face["face_id"]), "identity": face["identity"], "source": face["source"]},
    }


def write_fiftyone(faces: ExportedFaces, folder: str) -> None:
    """Write `data.json` and `labels.json`, as FiftyOne's FiftyOneImageDetectionDataset is read.

    A key of both is the number of an image. Its value is the path in the first, and the detections in the second: boxes
    relative to the image. FiftyOne reads files only, so that images in containers are in `left_out.txt` instead.
    """
    with (
        open(os.path.join(folder, "data.json"), "w", encoding="utf-8") as data,
        open(os.path.join(folder, "labels.json"), "w", encoding="utf-8") as labels,
        open(os.path.join(folder, "left_out.txt"), "w", encoding="utf-8") as left_out,
    ):
        data.write("{")
        labels.write('{"classes":["face"],"labels":{')
        count = 0
        for image in _iterate_images(faces):
            if not image.faces[0]["width"] or (split_member(image.uri) is not None and not is_remote(image.uri)):
                left_out.write(f"{image.uri}\n")
                continue
            count += 1
            detections = [_describe_detection(face) for face in image.faces]
            data.write(f"{_comma(count)}{json.dumps(str(count))}:{json.dumps(image.uri, ensure_ascii=False)}")
            labels.write(f"{_comma(count)}{json.dumps(str(count))}:{json.dumps(detections, ensure_ascii=False)}")
        data.write("}\n")
        labels.write("}}\n")


def _describe_detection(face: dict[str, Any]) -> dict[str, Any]:
    left, top, right, bottom = face["box"]
    width = face["width"]
    height = face["height"]
    return {
        "label": "face",
        "bounding_box": [left / width, top / height, (right - left) / width, (bottom - top) / height],
        "confidence": face["det_score"],
        "attributes": {"face_id": str(face["face_id"]), "identity": face["identity"], "source": face["source"]},
    }


def _comma(number: int) -> str:
    return ",\n" if number > 1 else ""


def _iterate_rows(faces: ExportedFaces) -> Iterator[dict[str, Any]]:
    for batch in faces:
        yield from batch.select(_COLUMNS).to_pylist()


def _iterate_images(faces: ExportedFaces) -> Iterator[_Image]:
    """Yield images with their faces, which lie side by side in the table."""
    number = 0
    rows: list[dict[str, Any]] = []
    for row in _iterate_rows(faces):
        if rows and row["uri"] != rows[0]["uri"]:
            number += 1
            yield _Image(number, rows[0]["uri"], rows)
            rows = []
        rows.append(row)
    if rows:
        yield _Image(number + 1, rows[0]["uri"], rows)
