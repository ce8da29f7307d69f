"""Vectors of a gallery's files on their way into an index: streamed, checked, in the table's order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.arrow import read_embeddings
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.schema import EMBEDDING_DIM
from facepipe.storage.hashtable import HashTable
from facepipe.types import Bool, Float32, Int64

_ROWS = 16384
_NORM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Rows:
    """n faces: ids (n,) int64, vectors (n, 128) float32 of unit norm, uri and identity as Arrow strings."""

    ids: Int64
    vectors: Float32
    uris: pa.Array
    identities: pa.Array

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, mask: Bool) -> "Rows":
        """The rows where the mask is true."""
        if mask.all():
            return self
        chosen = pa.array(mask)
        return Rows(self.ids[mask], self.vectors[mask], self.uris.filter(chosen), self.identities.filter(chosen))


@dataclass
class Skipped:
    """Rows that cannot be searched: vectors with NaN or infinity, of another norm than 1, or of another dimension."""

    unusable: int = 0


def face_rows(
    folder: str, files: Sequence[str], only: HashTable | None = None, skipped: Skipped | None = None
) -> Iterator[Rows]:
    """The faces of table files below `folder`, a batch at a time; `only` picks ids."""
    skipped = skipped or Skipped()
    for path in files:
        for batch in _batches(folder, path, ["face_id", "embedding", "uri", "identity"]):
            rows = _rows(batch, skipped)
            if only is not None and len(rows):
                rows = rows.take(only.get(rows.ids.astype(np.uint64))[0])
            if len(rows):
                yield rows


def face_ids(folder: str, path: str) -> Iterator[pa.RecordBatch]:
    """face_id and identity of the faces in a table file, a batch at a time."""
    return _batches(folder, path, ["face_id", "identity"])


def _batches(folder: str, path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    place = storage.join(folder, path)
    try:
        with storage.open_seekable(place) as handle:
            for batch in pq.ParquetFile(handle).iter_batches(_ROWS, columns=columns):
                faces = batch.filter(batch["face_id"].is_valid()) if batch["face_id"].null_count else batch
                if faces.num_rows:
                    yield faces
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {place!r}: {str(error).splitlines()[0]}") from error


def _rows(batch: pa.RecordBatch, skipped: Skipped) -> Rows:
    vectors, good = unit_vectors(batch["embedding"])
    skipped.unusable += int((~good).sum())
    identities = batch["identity"].cast(pa.string())
    rows = Rows(batch["face_id"].to_numpy(), vectors, batch["uri"].cast(pa.string()), identities)
    return rows.take(good)


def unit_vectors(column: Any) -> tuple[Float32, Bool]:
    """((n, 128) float32, (n,) whether the row is a finite vector of unit norm)."""
    vectors, good = read_embeddings(column)
    norms = np.einsum("nd,nd->n", vectors, vectors)
    return vectors, good & (np.abs(norms - 1) < 2 * _NORM_TOLERANCE)  # false where a number is NaN or infinite


def sample(gallery: Gallery, count: int, seed: int) -> Float32:
    """A seeded sample of about `count` vectors (n, 128), drawn over all files of the table.

    Of tables of more than 4,096 files that many are drawn first, each with a chance in proportion to its rows.
    """
    files = [(file["path"], file["num_records"]) for file in sorted(gallery.files(), key=lambda file: file["path"])]
    rng = np.random.default_rng(seed)
    weights = np.array([rows for _, rows in files], np.float64)
    if len(files) > _FILES_SAMPLED:
        chosen = rng.choice(len(files), _FILES_SAMPLED, replace=False, p=weights / weights.sum())
        files, weights = [files[n] for n in sorted(chosen)], weights[np.sort(chosen)]
    out = np.empty((count, EMBEDDING_DIM), np.float32)
    share, taken = min(1.0, 1.02 * count / max(1.0, weights.sum())), 0
    for path, _ in files:
        for rows in face_rows(gallery.faces_folder, [path]):
            picked = rows.vectors if share >= 1 else rows.vectors[rng.random(len(rows)) < share]
            picked = picked[: count - taken]
            out[taken : taken + len(picked)] = picked
            taken += len(picked)
    return out[:taken]


_FILES_SAMPLED = 4096
