"""What other parts of facepipe read of the decisions: the active ones, and which faces they mean now."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.decisions.resolve import FaceKeys, find_faces
from facepipe.decisions.schema import (
    DIFFERENT_FROM,
    IGNORE,
    IS,
    IS_NOT,
    KEEP,
    NOT_A_FACE,
    SAME_AS,
    SCHEMA,
    UNDO,
)
from facepipe.decisions.table import DecisionTable
from facepipe.decisions.undo import drop_repeated, find_active
from facepipe.gallery.hidden import HiddenImages, HiddenWatch
from facepipe.gallery.table import Gallery
from facepipe.sorted_lookup import is_in_sorted
from facepipe.types import Bool, Int64


@dataclass(frozen=True)
class NamedFaces:
    """Faces, each with a person.

    Attributes:
        face_id: (n,) ids.
        person: names, n texts.
    """

    face_id: Int64
    person: pa.Array


@dataclass(frozen=True)
class Decisions:
    """The active decisions of a gallery: those that nobody has taken back.

    The order of rows is that of their ids, and so the same whatever the order in which they came in.

    Attributes:
        rows: the decisions, n rows with the columns of `facepipe.decisions.schema.SCHEMA`. Their face ids are those of
            the time at which they were made.
        face_id: (n,) ids of the faces that they mean in the gallery now; -1 if the gallery has no such face.
        other_face_id: (n,) the same of the other faces, -1 as well if there is none.
        version: version of the table of decisions; -1 if there is none. Two equal versions hold the same decisions.
    """

    rows: pa.Table
    face_id: Int64
    other_face_id: Int64
    version: int

    def __len__(self) -> int:
        return len(self.face_id)

    @cached_property
    def _kinds(self) -> pa.Array:
        return pa.array(self.rows["decision"].to_pylist(), pa.string())

    def mark(self, kind: str) -> Bool:
        """Mark the decisions (n,) of a kind whose faces the gallery holds."""
        is_kind = np.asarray(pc.equal(self._kinds, kind).to_numpy(zero_copy_only=False), bool)
        has_faces = self.face_id >= 0
        if kind in (SAME_AS, DIFFERENT_FROM):
            has_faces = has_faces & (self.other_face_id >= 0)
        return is_kind & has_faces

    @cached_property
    def confirmed(self) -> NamedFaces:
        """Faces that are a person (`is`); a face comes once per name that it was given."""
        return self._name(IS)

    @cached_property
    def rejected(self) -> NamedFaces:
        """Faces that are not a person (`is_not`)."""
        return self._name(IS_NOT)

    @cached_property
    def same_pairs(self) -> Int64:
        """Pairs of face ids that are one person, (m, 2)."""
        return self._pair(SAME_AS)

    @cached_property
    def different_pairs(self) -> Int64:
        """Pairs of face ids that are two persons, (m, 2)."""
        return self._pair(DIFFERENT_FROM)

    @cached_property
    def not_faces(self) -> Int64:
        """Sorted ids of what is not a face."""
        return np.unique(self.face_id[self.mark(NOT_A_FACE)])

    @cached_property
    def ignored(self) -> Int64:
        """Sorted ids of faces to leave out (`ignore`). Those that are not faces are apart, in `not_faces`."""
        return np.unique(self.face_id[self.mark(IGNORE)])

    @cached_property
    def kept(self) -> Int64:
        """Sorted ids of faces that are right as they are (`keep`)."""
        return np.unique(self.face_id[self.mark(KEEP)])

    def _name(self, kind: str) -> NamedFaces:
        at = np.flatnonzero(self.mark(kind))
        persons = self.rows["person"].take(pa.array(at))
        return NamedFaces(self.face_id[at], pa.array(persons.to_pylist(), pa.string()))

    def _pair(self, kind: str) -> Int64:
        at = np.flatnonzero(self.mark(kind))
        return np.stack([self.face_id[at], self.other_face_id[at]], axis=1)


def read_decisions(gallery: Gallery | str) -> Decisions:
    """Read the active decisions, and find the faces that they mean.

    Memory grows with the decisions, not with the gallery. A gallery without decisions costs one look. Decisions about
    images that are being erased are left out.

    Args:
        gallery: the gallery, or its path or URL.

    Raises:
        GalleryError: there is no gallery, or the table of decisions is damaged.
        StorageError: the gallery cannot be read.
    """
    path = gallery.path if isinstance(gallery, Gallery) else gallery
    table = DecisionTable(path)
    rows = read_active_rows(table)
    nothing = np.empty(0, np.int64)
    if not rows.num_rows:
        return Decisions(rows, nothing, nothing, table.version)
    opened = gallery if isinstance(gallery, Gallery) else Gallery(gallery)
    # Both faces are looked for at once, because each look reads a column of the whole gallery.
    faces = FaceKeys.from_rows(rows)
    others = FaceKeys.from_rows(rows, "other_")
    both = FaceKeys(
        np.concatenate([faces.face_id, others.face_id]),
        pa.concat_arrays([faces.image_id, others.image_id]),
        np.concatenate([faces.box, others.box]),
    )
    found = find_faces(opened, both).face_id
    return Decisions(rows, found[: len(faces)], found[len(faces) :], table.version)


def read_active_rows(table: DecisionTable) -> pa.Table:
    """Read the rows of decisions that nobody has taken back, without undos, sorted by id."""
    if not table.exists:
        return SCHEMA.empty_table()
    rows = drop_repeated(table.read())
    is_decision = pc.not_equal(rows["decision"], UNDO)
    active = rows.filter(pc.and_(pa.array(find_active(rows)), is_decision))
    return drop_hidden(active, HiddenWatch(table.gallery).read()).sort_by("decision_id")


def drop_hidden(rows: pa.Table, hidden: HiddenImages) -> pa.Table:
    """Drop decisions about faces of images that are being erased."""
    if not hidden:
        return rows
    is_hidden = np.zeros(rows.num_rows, bool)
    for prefix in ("", "other_"):
        is_hidden |= is_in_sorted(hidden.faces, FaceKeys.from_rows(rows, prefix).face_id)
    return rows.filter(pa.array(~is_hidden))
