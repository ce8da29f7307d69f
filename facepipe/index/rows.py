"""Vectors of a gallery's files on their way into an index: streamed, checked, in the table's order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.arrow import read_embeddings
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.deletion_vectors import RowChoice
from facepipe.storage.hashtable import HashTable
from facepipe.types import Bool, Float32, Int64

_BATCH_ROWS = 16384
# Largest difference of a usable vector's norm from 1.
_NORM_TOLERANCE = 1e-2
_MAX_SAMPLED_FILES = 4096
_NOTHING_DELETED: Mapping[str, Int64] = {}


@dataclass(frozen=True)
class FaceRows:
    """Faces of a table.

    Attributes:
        ids: Face ids (n,).
        vectors: Vectors (n, dim) of unit norm.
        uris: URIs of the images, Arrow strings.
        identities: Identities, Arrow strings.
    """

    ids: Int64
    vectors: Float32
    uris: pa.Array
    identities: pa.Array

    def __len__(self) -> int:
        return len(self.ids)

    def filter(self, mask: Bool) -> "FaceRows":
        """Return the rows whose mask is true."""
        if mask.all():
            return self
        selected = pa.array(mask)
        return FaceRows(
            self.ids[mask], self.vectors[mask], self.uris.filter(selected), self.identities.filter(selected)
        )


@dataclass
class SkippedRows:
    """Rows that cannot be searched.

    Attributes:
        unusable: Vectors with NaN or infinity, of another norm than 1, or of another dimension.
    """

    unusable: int = 0


def read_face_rows(
    folder: str,
    files: Sequence[str],
    dim: int,
    only: HashTable | None = None,
    skipped: SkippedRows | None = None,
    *,
    deleted: Mapping[str, Int64] = _NOTHING_DELETED,
) -> Iterator[FaceRows]:
    """Read the faces of table files, a batch at a time.

    Args:
        folder: of the table.
        files: paths below the folder.
        dim: numbers per embedding.
        only: ids to keep; by default all.
        skipped: counts the rows that cannot be searched.
        deleted: rows that are left out, by path (`Gallery.deleted_rows`).
    """
    skipped = skipped or SkippedRows()
    for path in files:
        choice = RowChoice(deleted[path]) if path in deleted else None
        for batch in _read_batches(folder, path, ["face_id", "embedding", "uri", "identity"], choice):
            rows = _to_face_rows(batch, dim, skipped)
            if only is not None and len(rows):
                rows = rows.filter(only.get(rows.ids.astype(np.uint64))[0])
            if len(rows):
                yield rows


def read_face_ids(
    folder: str, path: str, *, deleted: Mapping[str, Int64] = _NOTHING_DELETED, only: Int64 | None = None
) -> Iterator[pa.RecordBatch]:
    """Read face_id, identity and uri of the faces in a table file, a batch at a time.

    Args:
        folder: of the table.
        path: of the file, below the folder.
        deleted: rows that are left out, by path (`Gallery.deleted_rows`).
        only: numbers of the rows to read, rising, (n,); by default all others.
    """
    choice = RowChoice(deleted[path]) if path in deleted else None
    if only is not None:
        choice = RowChoice(only, is_kept=True)
    return _read_batches(folder, path, ["face_id", "identity", "uri"], choice)


def _read_batches(folder: str, path: str, columns: list[str], choice: RowChoice | None) -> Iterator[pa.RecordBatch]:
    """Read columns of the rows that have a face."""
    full_path = storage.join(folder, path)
    try:
        with storage.open_seekable(full_path) as handle:
            batches = pq.ParquetFile(handle).iter_batches(_BATCH_ROWS, columns=columns)
            for batch in batches if choice is None else choice.filter_batches(batches):
                faces = batch.filter(batch["face_id"].is_valid()) if batch["face_id"].null_count else batch
                if faces.num_rows:
                    yield faces
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {full_path!r}: {str(error).splitlines()[0]}") from error


def _to_face_rows(batch: pa.RecordBatch, dim: int, skipped: SkippedRows) -> FaceRows:
    vectors, usable = read_unit_vectors(batch["embedding"], dim)
    skipped.unusable += int((~usable).sum())
    identities = batch["identity"].cast(pa.string())
    rows = FaceRows(batch["face_id"].to_numpy(), vectors, batch["uri"].cast(pa.string()), identities)
    return rows.filter(usable)


def read_unit_vectors(column: Any, dim: int) -> tuple[Float32, Bool]:
    """Read a column of embeddings of `dim` numbers.

    Returns:
        Vectors (n, dim), and whether (n,) each is finite and of unit norm.
    """
    vectors, complete = read_embeddings(column, dim)
    squared_norms = np.einsum("nd,nd->n", vectors, vectors)
    # The comparison is false for NaN and infinity.
    return vectors, complete & (np.abs(squared_norms - 1) < 2 * _NORM_TOLERANCE)


def sample_vectors(gallery: Gallery, count: int, seed: int) -> Float32:
    """Draw a seeded sample of about `count` vectors (n, dim) over all files of the table.

    Of a table with more than 4,096 files that many are drawn first, each with a chance in proportion to its rows.
    """
    files = sorted(gallery.files(), key=lambda file: file["path"])
    paths = [file["path"] for file in files]
    weights = np.array([file["num_records"] for file in files], np.float64)
    rng = np.random.default_rng(seed)
    # Draw files first, so that a table of many small files is not opened in full.
    if len(paths) > _MAX_SAMPLED_FILES:
        chosen = np.sort(rng.choice(len(paths), _MAX_SAMPLED_FILES, replace=False, p=weights / weights.sum()))
        paths = [paths[n] for n in chosen]
        weights = weights[chosen]
    dim = gallery.dim
    sample = np.empty((count, dim), np.float32)
    # 2 % more than needed, since the number drawn varies.
    share = min(1.0, 1.02 * count / max(1.0, weights.sum()))
    size = 0
    for path in paths:
        for rows in read_face_rows(gallery.faces_folder, [path], dim, deleted=gallery.deleted_rows):
            picked = rows.vectors if share >= 1 else rows.vectors[rng.random(len(rows)) < share]
            picked = picked[: count - size]
            sample[size : size + len(picked)] = picked
            size += len(picked)
    return sample[:size]
