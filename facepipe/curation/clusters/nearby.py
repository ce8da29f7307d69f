"""Find which clusters a new face may belong to through the search index: those of its nearest faces.

The number of comparisons then grows with the new faces, and not with their number times that of all clusters.
"""

import numpy as np

from facepipe.curation.clusters.assign import NearClusters
from facepipe.curation.clusters.assignments import AssignmentTable
from facepipe.errors import IndexingError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import ReadMark
from facepipe.index import manifest as manifests
from facepipe.index.search import Index
from facepipe.types import Float32

_NEIGHBOURS = 128  # faces: of 10,000 among a million 27 miss the cluster that a comparison with all gives them
# Neighbours in clusters below which a face is compared with all clusters: else new faces crowd the old ones out.
_MIN_IN_CLUSTERS = 8
_CHEAP_PRODUCTS = 1_000_000_000  # they take some seconds: up to there everything is compared


def open_usable_index(gallery: Gallery, mark: ReadMark, products: int) -> Index | None:
    """Open the gallery's index if it pays, and if it holds all faces that had a cluster at the mark.

    Args:
        gallery: the gallery.
        mark: mark of the clustering.
        products: number of comparisons without an index.
    """
    if products <= _CHEAP_PRODUCTS:
        return None
    try:
        index = Index(gallery.path, with_ignored=True)
        index.freeze()
    except IndexingError:
        return None
    # The index must be of this gallery's model, and at least as new as the clustering.
    if index.manifest.contract != manifests.dump_contract(gallery) or mark.gallery != gallery.id:
        return None
    return index if mark.version <= index.manifest.table_version <= gallery.version else None


def find_near_clusters(index: Index, vectors: Float32, assignments: AssignmentTable) -> NearClusters:
    """Find the clusters to compare new faces with. It takes some 2 kB of memory per face.

    Args:
        index: index that holds the faces of the clusters.
        vectors: vectors of the new faces, (n, dim).
        assignments: clusters of the old faces.
    """
    hits = index.search(vectors, _NEIGHBOURS).ids
    # Look up each neighbour once, then put the clusters back into the shape of the hits, (n, k).
    ids, at = np.unique(hits, return_inverse=True)
    clusters = assignments.find_clusters(ids)[at.reshape(hits.shape)]
    is_clustered = clusters >= 0
    face, column = np.nonzero(is_clustered)
    pairs = np.unique(np.stack([face, clusters[face, column]], axis=1), axis=0)
    return NearClusters(pairs[:, 0], pairs[:, 1], is_clustered.sum(axis=1) < _MIN_IN_CLUSTERS)
