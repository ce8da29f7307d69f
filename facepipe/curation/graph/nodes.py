"""The graph's nodes: every face's id and vector in files, sorted by id: nothing depends on the table's order."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.index.rows import SkippedRows, read_face_rows
from facepipe.schema import EMBEDDING_DIM
from facepipe.storage import describe_error
from facepipe.types import Float32, Int64

_IDS, _SIDES, _VECTORS = "ids.npy", "sides.npy", "vectors.npy"
_HASHED = 65536  # rows hashed at a time


@dataclass(frozen=True)
class Nodes:
    """n faces: ids (n,) int64 rising, sides (n,) int8 (which gallery), vectors (n, 128) float32 of unit norm.

    The same face can be in two galleries under one id; it is then two nodes, told apart by their side.
    """

    ids: Int64
    sides: npt.NDArray[np.int8]
    vectors: Float32

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: Int64, side: int = 0) -> Int64:
        """Positions (m,) of face ids (m,) of one gallery; -1 for those that are no nodes."""
        if not len(self.ids):
            return np.full(len(ids), -1, np.int64)
        at = np.searchsorted(self.ids, ids)
        for _ in range(2):  # an id stands at most twice, once a side
            here = np.minimum(at, len(self.ids) - 1)
            hit = (self.ids[here] == ids) & (self.sides[here] == side)
            at = np.where(hit, at, at + 1)
        back = np.minimum(at, len(self.ids) - 1)
        return np.where((self.ids[back] == ids) & (self.sides[back] == side), back, -1)


def collect(galleries: Sequence[Gallery], folder: str) -> Nodes:
    """Write the nodes of galleries to files; two passes over the tables, 17 bytes of memory a face."""
    keys = [_keys(gallery) for gallery in galleries]
    ids = np.concatenate([*keys, np.empty(0, np.int64)])
    sides = np.repeat(np.arange(len(keys), dtype=np.int8), [len(k) for k in keys])
    order = np.lexsort((sides, ids))
    try:
        np.save(os.path.join(folder, _IDS), ids[order])
        np.save(os.path.join(folder, _SIDES), sides[order])
        shape = (len(ids), EMBEDDING_DIM)
        path = os.path.join(folder, _VECTORS)
        vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        at = 0
        for gallery in galleries:
            for rows in read_face_rows(gallery.faces_folder, _paths(gallery)):
                vectors[rank[at : at + len(rows)]] = rows.vectors
                at += len(rows)
        vectors.flush()
    except OSError as error:
        raise StorageError(f"cannot write {folder!r}: {describe_error(error)}") from error
    return open_nodes(folder)


def open_nodes(folder: str) -> Nodes:
    """Nodes written before; the vectors are mapped, not read."""
    try:
        ids, sides = (np.load(os.path.join(folder, name)) for name in (_IDS, _SIDES))
        vectors = np.load(os.path.join(folder, _VECTORS), mmap_mode="r" if len(ids) else None)
    except (OSError, ValueError, EOFError) as error:
        raise StorageError(f"cannot read the nodes in {folder!r}: {error}") from error
    return Nodes(ids, sides, vectors)


def representatives(vectors: Float32) -> Int64:
    """(n,) position of the first vector that is equal in every bit: copies would crowd out all other neighbours."""
    weights = np.random.default_rng(0).integers(1, 1 << 63, EMBEDDING_DIM, dtype=np.uint64) | np.uint64(1)
    hashes = np.empty(len(vectors), np.uint64)
    for at in range(0, len(vectors), _HASHED):
        bits = np.ascontiguousarray(vectors[at : at + _HASHED]).view(np.uint32).astype(np.uint64)
        hashes[at : at + _HASHED] = (bits * weights).sum(axis=1, dtype=np.uint64)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    found = first[inverse].astype(np.int64)
    moved = np.flatnonzero(found != np.arange(len(found)))
    for at in range(0, len(moved), _HASHED):  # a hash can collide: bits decide
        part = moved[at : at + _HASHED]
        same = (vectors[part] == vectors[found[part]]).all(axis=1)
        found[part[~same]] = part[~same]
    return found


def _keys(gallery: Gallery) -> Int64:
    skipped = SkippedRows()
    parts = [rows.ids for rows in read_face_rows(gallery.faces_folder, _paths(gallery), skipped=skipped)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _paths(gallery: Gallery) -> list[str]:
    return sorted(file["path"] for file in gallery.files())
