"""Keep the sums of each cluster with a report, and a mark of which version of the gallery is in them.

With them new faces are placed and lost faces are taken out without reading the vectors of the rest. The sums of a
cluster of one face are that face's vector: the file is biometric data like the table.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from zipfile import BadZipFile

import numpy as np

from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.cohort import Cohort
from facepipe.errors import IndexingError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import ReadMark
from facepipe.index import manifest as manifests
from facepipe.index.rows import read_unit_vectors
from facepipe.index.search import Index
from facepipe.sorted_lookup import find_sorted
from facepipe.storage import replace_file
from facepipe.types import Float32, Int64

SUMS = "sums.npz"
MARK = "mark.json"
_ROWS = 65536
_NO_IDS = np.empty(0, np.int64)
_UNREACHABLE = np.float32(1e3)  # the crowd of a cluster without faces: no face is near it


@dataclass(frozen=True)
class ClusterSums:
    """The sums of a report's clusters.

    Attributes:
        clusters: Row n is cluster n. A cluster that lost all faces has size 0.
        mark: Which version of the gallery is in the sums.
        stale: Clusters whose sums are of other faces than the report's tables list, because faces were erased.
    """

    clusters: Clusters
    mark: ReadMark
    stale: Int64 = field(default_factory=lambda: _NO_IDS)

    def save(self, folder: str) -> None:
        """Write the sums and the mark into a report's folder."""
        _write_sums(self.clusters, folder)
        self.mark.save(os.path.join(folder, MARK))

    @classmethod
    def load(cls, folder: str, face_counts: Int64) -> "ClusterSums | None":
        """Load the sums of a report.

        Args:
            folder: the report's folder.
            face_counts: faces of each cluster by the report's tables, (k,).

        Returns:
            None if there are none, or if they do not belong to the tables.
        """
        mark = ReadMark.load(os.path.join(folder, MARK))
        clusters = _read_sums(folder)
        if mark is None or clusters is None or len(face_counts) > len(clusters):
            return None
        # Clusters behind the last one of the tables have lost all faces.
        counts = np.pad(face_counts, (0, len(clusters) - len(face_counts)))
        aligned = _align_sums(clusters, counts)
        if aligned is None:
            return None
        return cls(aligned, mark, np.flatnonzero(counts != aligned.size))


def clear_stale_sums(folder: str, face_counts: Int64) -> None:
    """Clear the sums of clusters that lost faces; the next `cluster --assign` computes them again.

    Without this the sums would tell who was erased, as the difference from the remaining faces. Sums that cannot be
    used are deleted.

    Args:
        folder: the report's folder.
        face_counts: faces of each cluster by the report's tables, (k,), without the erased ones.
    """
    sums = ClusterSums.load(folder, face_counts)
    if sums is None:
        for name in (SUMS, MARK):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
        return
    _clear(sums.clusters, sums.stale)
    _write_sums(sums.clusters, folder)


def _clear(clusters: Clusters, numbers: Int64) -> None:
    clusters.sums[numbers] = 0
    clusters.crowd[numbers] = 0
    clusters.size[numbers] = 0


def _write_sums(clusters: Clusters, folder: str) -> None:
    with replace_file(os.path.join(folder, SUMS)) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, sums=clusters.sums, crowd=clusters.crowd, size=clusters.size)


def _read_sums(folder: str) -> Clusters | None:
    """Read the file of sums; None if it is missing or damaged."""
    try:
        with np.load(os.path.join(folder, SUMS)) as file:
            clusters = Clusters(file["sums"], file["crowd"], file["size"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    # A damaged file may still load: check the shapes.
    is_sound = clusters.sums.ndim == 2 and clusters.crowd.shape == clusters.size.shape
    return clusters if is_sound else None


def _align_sums(clusters: Clusters, counts: Int64) -> Clusters | None:
    """Give every cluster a row of sums again: `erase` deletes rows that are the vector of an erased face.

    Returns:
        None if the rows that are there cannot be told apart.
    """
    if len(clusters.sums) == len(clusters):
        return clusters
    # A row is gone if its cluster had a single face and has none in the tables.
    has_row = ~((clusters.size == 1) & (counts == 0))
    if int(has_row.sum()) != len(clusters.sums):
        return None
    sums = np.zeros((len(clusters), clusters.sums.shape[1]), np.float32)
    sums[has_row] = clusters.sums
    return replace(clusters, sums=sums)


def make_empty_clusters(count: int, dim: int) -> Clusters:
    """Make clusters without faces, whose sums have `dim` numbers."""
    sums = np.zeros((count, dim), np.float32)
    return Clusters(sums, np.zeros(count, np.float32), np.zeros(count, np.int64))


def add_faces(clusters: Clusters, at: Int64, vectors: Float32, density: Float32) -> None:
    """Add faces to clusters, in place.

    Args:
        clusters: k clusters.
        at: cluster of each face, (n,).
        vectors: vectors of the faces, (n, dim).
        density: densities of the faces, (n,).
    """
    # This form adds up repeated positions; indexed addition would keep one of them.
    np.add.at(clusters.sums, at, vectors)
    np.add.at(clusters.crowd, at, density)
    clusters.size[:] += np.bincount(at, minlength=len(clusters))


def extend_clusters(clusters: Clusters, count: int) -> Clusters:
    """Copy clusters, with empty ones at the end so that there are `count`."""
    empty = make_empty_clusters(count - len(clusters), clusters.sums.shape[1])
    return Clusters(
        np.concatenate([clusters.sums, empty.sums]),
        np.concatenate([clusters.crowd, empty.crowd]),
        np.concatenate([clusters.size, empty.size]),
    )


def mask_empty(clusters: Clusters) -> Clusters:
    """Make empty clusters unreachable: no face is similar to them."""
    return replace(clusters, crowd=np.where(clusters.size > 0, clusters.crowd, _UNREACHABLE))


def recompute_clusters(
    clusters: Clusters, numbers: Int64, member_ids: Int64, member_clusters: Int64, gallery: Gallery, cohort: Cohort
) -> Clusters:
    """Copy clusters, with the sums of some of them computed from their members.

    Args:
        clusters: k clusters.
        numbers: clusters to compute, (m,).
        member_ids: ids of all faces in these clusters, (n,).
        member_clusters: cluster of each of these faces, (n,).
        gallery: gallery to read vectors from.
        cohort: cohort that densities are computed with.
    """
    copy = Clusters(clusters.sums.copy(), clusters.crowd.copy(), clusters.size.copy())
    # Begin at zero, and add the members a block at a time.
    _clear(copy, numbers)
    reader = _VectorReader(gallery, member_ids)
    for at in range(0, len(member_ids), _ROWS):
        vectors = reader.read(member_ids[at : at + _ROWS])
        add_faces(copy, member_clusters[at : at + _ROWS], vectors, cohort.compute_density(vectors))
    return copy


class _VectorReader:
    """Vectors by face id: from the search index, and those that it does not hold from one pass over the table."""

    def __init__(self, gallery: Gallery, ids: Int64):
        self._index = _open_index(gallery)
        # Vectors that the index lacks are read in one pass over the table.
        missing = ids if self._index is None else _find_missing(self._index, ids)
        self._ids = np.sort(missing)
        self._dim = gallery.dim
        self._vectors = np.zeros((len(missing), self._dim), np.float32)
        if len(missing):
            self._scan(gallery)

    def read(self, ids: Int64) -> Float32:
        """Read the vectors (n, dim) of faces (n,)."""
        vectors = np.zeros((len(ids), self._dim), np.float32)
        if self._index is not None:
            vectors = self._index.get_vectors(ids)
        at = find_sorted(self._ids, ids)
        vectors[at >= 0] = self._vectors[at[at >= 0]]
        return vectors

    def _scan(self, gallery: Gallery) -> None:
        for batch in gallery.batches(["face_id", "embedding"], rows=_ROWS):
            faces = batch.filter(batch["face_id"].is_valid())
            at = find_sorted(self._ids, faces["face_id"].to_numpy())
            if (at >= 0).any():
                vectors, is_unit = read_unit_vectors(faces["embedding"], self._dim)
                chosen = is_unit & (at >= 0)
                self._vectors[at[chosen]] = vectors[chosen]


def _find_missing(index: Index, ids: Int64) -> Int64:
    """Find the ids that the index has no vector of."""
    missing = [ids[:0]]
    for at in range(0, len(ids), _ROWS):
        part = ids[at : at + _ROWS]
        missing.append(part[~index.get_vectors(part).any(axis=1)])
    return np.concatenate(missing)


def _open_index(gallery: Gallery) -> Index | None:
    """Open the gallery's index; None if there is none, or one of another model."""
    try:
        index = Index(gallery.path, with_ignored=True)
        index.freeze()
    except IndexingError:
        return None
    return index if index.manifest.contract == manifests.dump_contract(gallery) else None
