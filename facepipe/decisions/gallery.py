"""A gallery as people have decided: its identities are those that count, and what people ignore may be left out."""

import os
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.dataset as ds

from facepipe.decisions.persons import DecidedFaces, read_decided_faces
from facepipe.decisions.resolve import to_ids
from facepipe.gallery.table import Gallery, check_columns

_FACE_ID = "face_id"
_IDENTITY = "identity"


class DecidedGallery(Gallery):
    """A gallery whose rows have the identities that count.

    A row has the name that people have confirmed, else the source's label. It has none if people have said that the
    face is not this person, or that they ignore it. Filters compare with the labels of the source. The decisions are
    those of the moment at which the gallery was opened.

        gallery = DecidedGallery("G")
        frame = gallery.to_pandas(["uri", "identity"])

    Attributes:
        decided: What people have decided.
    """

    def __init__(self, path: str | os.PathLike[str], version: int | None = None, *, drop_ignored: bool = False) -> None:
        """Open a gallery.

        Args:
            path: path or URL.
            version: version of the table to read; the newest by default.
            drop_ignored: leave out the rows of faces that people ignore, or that are no faces.

        Raises:
            GalleryError: there is no gallery, it cannot be read, or decisions contradict each other.
        """
        super().__init__(path, version)
        self._drops_ignored = drop_ignored
        self.decided: DecidedFaces = read_decided_faces(Gallery(path, version))

    def batches(
        self,
        columns: Sequence[str] | None = None,
        where: "str | ds.Expression | None" = None,
        rows: int = 8192,
        *,
        with_hidden: bool = False,
        with_deleted: bool = False,
    ) -> Iterator[pa.RecordBatch]:
        """Stream rows as record batches, as `Gallery.batches` does."""
        names = check_columns(columns)
        read = super().batches(
            self._add_face_id(names), where, rows, with_hidden=with_hidden, with_deleted=with_deleted
        )
        for batch in read:
            # One batch in, at most one out.
            decided = self._apply(pa.Table.from_batches([batch])).select(names).combine_chunks()
            yield from decided.to_batches()

    def read_chosen_rows(
        self, key: str, values: pa.Array, columns: Sequence[str], *, file_column: str | None = None
    ) -> Iterator[pa.Table]:
        """Read the rows whose key is among some values, as `Gallery.read_chosen_rows` does."""
        names = check_columns(columns)
        read = super().read_chosen_rows(key, values, self._add_face_id(names), file_column=file_column)
        for part in read:
            decided = self._apply(part).select([*names, *([file_column] if file_column else [])])
            if decided.num_rows:
                yield decided

    def _add_face_id(self, names: list[str]) -> list[str]:
        return [*names, *({_FACE_ID} - set(names))] if self.decided else names

    def _apply(self, rows: pa.Table) -> pa.Table:
        """Put in the identities that count, and drop the rows of faces that are ignored."""
        if not self.decided:
            return rows
        ids = to_ids(rows[_FACE_ID])
        if _IDENTITY in rows.column_names:
            at = rows.schema.get_field_index(_IDENTITY)
            rows = rows.set_column(at, rows.schema.field(at), self.decided.name_faces(ids, rows[_IDENTITY]))
        if self._drops_ignored:
            rows = rows.filter(pa.array(~self.decided.is_ignored(ids)))
        return rows
