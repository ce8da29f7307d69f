"""The graph's nodes: every face's id and vector in files, sorted by id, so that the table's order does not matter."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.index.rows import FaceRows, read_face_rows
from facepipe.storage import describe_error
from facepipe.storage.mapped import create_array
from facepipe.types import Float32, Int64

_IDS = "ids.npy"
_SIDES = "sides.npy"
_VECTORS = "vectors.npy"
_ROWS_PER_HASH = 8192  # hashed at a time


@dataclass(frozen=True)
class Nodes:
    """Faces, sorted by id and side.

    The same face can be in two galleries under one id. It is then two nodes, which their sides tell apart.

    Attributes:
        ids: Face ids (n,), rising.
        sides: Number (n,) of the gallery that holds the face.
        vectors: Unit vectors (n, dim).
    """

    ids: Int64
    sides: npt.NDArray[np.int8]
    vectors: Float32

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: Int64, side: int = 0) -> Int64:
        """Find the positions (m,) of face ids (m,) of one gallery; -1 for those that are not nodes."""
        if not len(self.ids):
            return np.full(len(ids), -1, np.int64)
        at = np.searchsorted(self.ids, ids)
        for _ in range(2):  # an id is there at most twice, once per side
            at = np.where(self._is_at(at, ids, side), at, at + 1)
        last = np.minimum(at, len(self.ids) - 1)
        return np.where(self._is_at(at, ids, side), last, -1)

    def _is_at(self, at: Int64, ids: Int64, side: int) -> npt.NDArray[np.bool_]:
        inside = np.minimum(at, len(self.ids) - 1)
        return np.asarray((self.ids[inside] == ids) & (self.sides[inside] == side))


def collect_nodes(galleries: Sequence[Gallery], folder: str) -> Nodes:
    """Write the nodes of galleries to files. Takes two passes over the tables, and 17 bytes of memory per face."""
    # The first pass reads the ids, which tell the position of every vector.
    ids_per_side = [_read_ids(gallery) for gallery in galleries]
    ids = np.concatenate([*ids_per_side, np.empty(0, np.int64)])
    sides = np.repeat(np.arange(len(galleries), dtype=np.int8), [len(part) for part in ids_per_side])
    order = np.lexsort((sides, ids))
    try:
        np.save(os.path.join(folder, _IDS), ids[order])
        np.save(os.path.join(folder, _SIDES), sides[order])
        vectors = create_array(os.path.join(folder, _VECTORS), np.float32, (len(ids), galleries[0].dim))
        # The vectors go straight to their sorted positions.
        position = np.empty(len(order), np.int64)
        position[order] = np.arange(len(order))
        at = 0
        for gallery in galleries:
            for rows in _read_faces(gallery):
                vectors[position[at : at + len(rows)]] = rows.vectors
                at += len(rows)
        vectors.flush()
    except OSError as error:
        raise StorageError(f"cannot write {folder!r}: {describe_error(error)}") from error
    return open_nodes(folder)


def open_nodes(folder: str) -> Nodes:
    """Open the nodes in a folder. Their files are mapped, not read."""
    try:
        ids = np.asarray(_open_array(folder, _IDS))
        sides = np.asarray(_open_array(folder, _SIDES))
        vectors = _open_array(folder, _VECTORS)
    except (OSError, ValueError, EOFError) as error:
        raise StorageError(f"cannot read the nodes in {folder!r}: {error}") from error
    return Nodes(ids, sides, vectors)


def _open_array(folder: str, name: str) -> np.ndarray[Any, Any]:
    """Map an array; one without elements is read, because an empty file cannot be mapped."""
    path = os.path.join(folder, name)
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:
        return np.asarray(np.load(path))


def find_representatives(vectors: Float32) -> Int64:
    """Find for each vector the first one that equals it in every bit, since copies would crowd out other neighbours.

    Args:
        vectors: (n, dim).

    Returns:
        Positions (n,); its own for a vector without an earlier copy.
    """
    # Hash the bits of a vector: a sum with random odd weights, modulo 2^64.
    weights = np.random.default_rng(0).integers(1, 1 << 63, vectors.shape[1], dtype=np.uint64) | np.uint64(1)
    hashes = np.empty(len(vectors), np.uint64)
    for at in range(0, len(vectors), _ROWS_PER_HASH):
        bits = np.ascontiguousarray(vectors[at : at + _ROWS_PER_HASH]).view(np.uint32).astype(np.uint64)
        hashes[at : at + _ROWS_PER_HASH] = (bits * weights).sum(axis=1, dtype=np.uint64)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    representatives = first[inverse].astype(np.int64)
    # A hash can collide: the bits decide.
    copies = np.flatnonzero(representatives != np.arange(len(representatives)))
    for at in range(0, len(copies), _ROWS_PER_HASH):
        part = copies[at : at + _ROWS_PER_HASH]
        is_equal = (vectors[part] == vectors[representatives[part]]).all(axis=1)
        representatives[part[~is_equal]] = part[~is_equal]
    return representatives


def _read_ids(gallery: Gallery) -> Int64:
    parts = [rows.ids for rows in _read_faces(gallery)]
    return np.concatenate([*parts, np.empty(0, np.int64)])


def _read_faces(gallery: Gallery) -> Iterator[FaceRows]:
    paths = sorted(gallery.list_paths())
    return read_face_rows(gallery.faces_folder, paths, gallery.dim, deleted=gallery.deleted_rows)
