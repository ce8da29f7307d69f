"""Where a clustering stands: each cluster's sums, and up to where the gallery is in them.

With them new faces are placed, and faces that went are taken out, without reading the vectors of the rest. The sums of
a cluster of one face are that face's vector: the file is biometric data like the table.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from zipfile import BadZipFile

import numpy as np

from facepipe.curation.graph.cohort import Cohort
from facepipe.curation.graph.linkage import Clusters
from facepipe.errors import IndexingError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import Mark
from facepipe.index import manifest as manifests
from facepipe.index.rows import read_unit_vectors
from facepipe.index.search import Index
from facepipe.schema import EMBEDDING_DIM
from facepipe.sorted_lookup import find_sorted
from facepipe.storage import replace_file
from facepipe.types import Float32, Int64

SUMS, MARK = "sums.npz", "mark.json"
_ROWS = 65536
_NOBODY = np.float32(1e3)  # the crowd of a cluster without faces: nobody is near it


@dataclass(frozen=True)
class Standing:
    """clusters: row n is cluster n; those that lost all faces have size 0. mark: which version of the gallery is in
    them."""

    clusters: Clusters
    mark: Mark

    def save(self, folder: str) -> None:
        """Write it into a report's folder."""
        _write(self.clusters, folder)
        self.mark.save(os.path.join(folder, MARK))

    @classmethod
    def load(cls, folder: str, faces: Int64) -> "tuple[Standing, Int64] | None":
        """(that of a report whose clusters have so many faces (k,) by its tables, the clusters whose sums are of others
        than these faces: somebody was erased). None where there is none, or one that does not belong to the tables."""
        mark, held = Mark.load(os.path.join(folder, MARK)), _read(folder)
        if mark is None or held is None or len(faces) > len(held):
            return None
        counts = np.pad(faces, (0, len(held) - len(faces)))
        aligned = _aligned(held, counts)
        return (cls(aligned, mark), np.flatnonzero(counts != aligned.size)) if aligned else None


def forget(folder: str, faces: Int64) -> None:
    """Take clusters that lost faces out of a report's sums; the next `cluster --assign` makes theirs anew.

    faces (k,): how many each cluster has by the tables, the erased no longer among them (`Ledger.counts`). Without
    this the sums tell who was erased, as the difference from those who are left.
    """
    found = Standing.load(folder, faces)
    if found is None:
        for name in (SUMS, MARK):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
        return
    held, stale = found[0].clusters, found[1]
    held.sums[stale], held.crowd[stale], held.size[stale] = 0, 0, 0
    _write(held, folder)


def _write(held: Clusters, folder: str) -> None:
    path = os.path.join(folder, SUMS)
    with replace_file(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, sums=held.sums, crowd=held.crowd, size=held.size)


def _read(folder: str) -> Clusters | None:
    try:
        with np.load(os.path.join(folder, SUMS)) as file:
            held = Clusters(file["sums"], file["crowd"], file["size"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return held if held.sums.shape[1:] == (EMBEDDING_DIM,) and held.crowd.shape == held.size.shape else None


def _aligned(held: Clusters, counts: Int64) -> Clusters | None:
    """With a row of sums for every cluster: `erase` deletes rows that are the vector of an erased face."""
    if len(held.sums) == len(held):
        return held
    left = ~((held.size == 1) & (counts == 0))
    if int(left.sum()) != len(held.sums):
        return None
    sums = np.zeros((len(held), EMBEDDING_DIM), np.float32)
    sums[left] = held.sums
    return replace(held, sums=sums)


def none(count: int) -> Clusters:
    """So many clusters without faces."""
    sums, crowd = np.zeros((count, EMBEDDING_DIM), np.float32), np.zeros(count, np.float32)
    return Clusters(sums, crowd, np.zeros(count, np.int64))


def add(clusters: Clusters, at: Int64, vectors: Float32, density: Float32) -> None:
    """Put faces (n, 128) of these densities (n,) into clusters (n,), in place."""
    np.add.at(clusters.sums, at, vectors)
    np.add.at(clusters.crowd, at, density)
    clusters.size[:] += np.bincount(at, minlength=len(clusters))


def grown(clusters: Clusters, count: int) -> Clusters:
    """A copy with room for `count` clusters."""
    more = none(count - len(clusters))
    return Clusters(*(np.concatenate([getattr(clusters, n), getattr(more, n)]) for n in ("sums", "crowd", "size")))


def peopled(clusters: Clusters) -> Clusters:
    """The clusters, those without faces out of everybody's reach."""
    return replace(clusters, crowd=np.where(clusters.size > 0, clusters.crowd, _NOBODY))


def recounted(
    clusters: Clusters, numbers: Int64, members: tuple[Int64, Int64], gallery: Gallery, cohort: Cohort
) -> Clusters:
    """A copy in which some clusters (m,) consist of these members: (ids (n,), cluster (n,)) and nobody else."""
    held = Clusters(clusters.sums.copy(), clusters.crowd.copy(), clusters.size.copy())
    held.sums[numbers], held.crowd[numbers], held.size[numbers] = 0, 0, 0
    ids, of = members
    source = _Vectors(gallery, ids)
    for at in range(0, len(ids), _ROWS):
        vectors = source(ids[at : at + _ROWS])
        add(held, of[at : at + _ROWS], vectors, cohort.density(vectors))
    return held


class _Vectors:
    """Vectors by face id: from the search index, and those that it does not hold from one pass over the table."""

    def __init__(self, gallery: Gallery, ids: Int64):
        self._index = _index(gallery)
        missing = ids if self._index is None else np.concatenate([ids[:0], *self._missing(self._index, ids)])
        self._ids = np.sort(missing)
        self._held = np.zeros((len(missing), EMBEDDING_DIM), np.float32)
        if len(missing):
            self._scan(gallery)

    def __call__(self, ids: Int64) -> Float32:
        """(n, 128)"""
        out = np.zeros((len(ids), EMBEDDING_DIM), np.float32) if self._index is None else self._index.get_vectors(ids)
        at = find_sorted(self._ids, ids)
        out[at >= 0] = self._held[at[at >= 0]]
        return out

    @staticmethod
    def _missing(index: Index, ids: Int64) -> list[Int64]:
        parts = (ids[at : at + _ROWS] for at in range(0, len(ids), _ROWS))
        return [part[~index.get_vectors(part).any(axis=1)] for part in parts]

    def _scan(self, gallery: Gallery) -> None:
        for batch in gallery.batches(["face_id", "embedding"], rows=_ROWS):
            faces = batch.filter(batch["face_id"].is_valid())
            at = find_sorted(self._ids, faces["face_id"].to_numpy())
            if (at >= 0).any():
                vectors, good = read_unit_vectors(faces["embedding"])
                chosen = good & (at >= 0)
                self._held[at[chosen]] = vectors[chosen]


def _index(gallery: Gallery) -> Index | None:
    try:
        index = Index(gallery.path)
    except IndexingError:
        return None
    return index if index.manifest.contract == manifests.dump_contract(gallery) else None
