"""Faces that are given by their image alone: the only face of an image is meant, or the one in the given box."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe import storage
from facepipe.decisions.resolve import MIN_OVERLAP, compute_overlaps, read_faces, to_boxes, to_ids
from facepipe.decisions.rows import Problems
from facepipe.gallery.table import Gallery


def fill_only_faces(gallery: Gallery, rows: pa.Table, prefix: str, problems: Problems) -> pa.Table:
    """Fill in the faces of rows that name an image and no face.

    Args:
        gallery: the gallery.
        rows: proposed rows.
        prefix: of the columns, empty or `other_`.
        problems: rows whose image has no face, or several, are added to it.

    Returns:
        The rows without those.
    """
    has_face = rows[f"{prefix}face_id"].is_valid().to_numpy()
    has_content = pc.and_(rows[f"{prefix}image_id"].is_valid(), rows[f"{prefix}box"].is_valid()).to_numpy()
    is_good = np.ones(rows.num_rows, bool)
    face_ids = to_ids(rows[f"{prefix}face_id"])
    boxes = to_boxes(rows[f"{prefix}box"])
    for key in ("image_id", "uri"):
        column = rows[f"{prefix}{key}"]
        wanted = np.flatnonzero(~has_face & ~has_content & (face_ids < 0) & column.is_valid().to_numpy() & is_good)
        if not len(wanted):
            continue
        names = column.take(pa.array(wanted)).to_pylist()
        images = _read_images(gallery, key, names)
        for at, name in zip(wanted.tolist(), names, strict=True):
            found = images.get(name) or images.get(storage.to_absolute(name)) or _Image()
            chosen, reason = found.choose(boxes[at], name)
            if chosen is None:
                is_good[at] = False
                problems.add(rows["place"][at].as_py(), reason)
            else:
                face_ids[at] = chosen
    place = rows.column_names.index(f"{prefix}face_id")
    filled = rows.set_column(place, rows.schema.field(place), pa.array(face_ids, mask=face_ids < 0))
    return filled.filter(pa.array(is_good))


class _Image:
    """The faces of one image. Copies under other names have the same faces, of which each counts once."""

    def __init__(self) -> None:
        self.faces: list[int] = []
        self.boxes: list[np.ndarray] = []

    def add(self, face_id: int, box: np.ndarray) -> None:
        if self.boxes:
            others = np.array(self.boxes)
            overlaps = compute_overlaps(np.repeat(box[None], len(others), axis=0), others)
            if overlaps.max() > 1 - 1e-6:
                return
        self.faces.append(face_id)
        self.boxes.append(box)

    def choose(self, box: np.ndarray, name: str) -> tuple[int | None, str]:
        """Choose the face; None, and why, if that cannot be said."""
        if not self.faces:
            return None, f"the gallery has no face of the image {name!r}"
        if not np.isnan(box[0]):
            overlaps = compute_overlaps(np.repeat(box[None], len(self.faces), axis=0), np.array(self.boxes))
            best = int(overlaps.argmax())
            if overlaps[best] >= MIN_OVERLAP:
                return self.faces[best], ""
            return None, f"no face of the image {name!r} lies at this box"
        if len(self.faces) > 1:
            shown = ", ".join(map(str, self.faces[:5]))
            return None, f"the image {name!r} has {len(self.faces)} faces: give the `face_id`, one of {shown}"
        return self.faces[0], ""


def _read_images(gallery: Gallery, key: str, names: list[str]) -> dict[str, _Image]:
    """Read the faces of images. A path from the working folder on is looked for as it is, and as a whole path."""
    wanted = set(names)
    if key == "uri":
        wanted |= {storage.to_absolute(name) for name in names}
    faces = read_faces(gallery, key, pa.array(sorted(wanted), pa.string()))
    images: dict[str, _Image] = {}
    boxes = to_boxes(faces["box"])
    ids = to_ids(faces["face_id"])
    texts = faces[key].to_pylist()
    for at in np.argsort(ids, kind="stable").tolist():
        images.setdefault(texts[at], _Image()).add(int(ids[at]), boxes[at])
    return images
