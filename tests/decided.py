"""A gallery of drawings to decide about, and rows of decisions."""

from pathlib import Path
from typing import Any

import cv2
from conftest import draw
from helpers import embed

from facepipe.gallery import Gallery

FAKES = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}, "run": {"runner": "inline"}}
Row = dict[str, Any]


def make_gallery(root: Path, images: int = 20) -> Path:
    """Embed drawings with 0 to 2 faces each from `root/source` into `root/gallery`, and return its path."""
    (root / "source").mkdir()
    for n in range(images):
        cv2.imwrite(str(root / "source" / f"p{n:03d}.png"), draw(n))
    embed(root / "source", root / "gallery", FAKES)
    return root / "gallery"


def list_faces(gallery: Gallery) -> list[Row]:
    """List the faces of a gallery by image and ordinal."""
    table = gallery.to_arrow(["face_id", "image_id", "box", "uri", "face_index"], "face_id is not null")
    rows: list[Row] = table.sort_by([("uri", "ascending"), ("face_index", "ascending")]).to_pylist()
    return rows


def list_ids(gallery: Gallery) -> list[int]:
    """List the face ids in the same order."""
    return [face["face_id"] for face in list_faces(gallery)]


def is_person(face: int, person: str, **more: Any) -> Row:
    """Make a row that says who a face is."""
    return {"decision": "is", "face_id": str(face), "person": person, **more}


def pair(kind: str, face: int, other: int, **more: Any) -> Row:
    """Make a row about two faces."""
    return {"decision": kind, "face_id": str(face), "other_face_id": str(other), **more}
