"""Which clusters a new face may belong to, by the search index: those of the faces that are nearest to it.

What a face is compared with then grows with the new faces, and not with their number times that of all clusters.
"""

import numpy as np

from facepipe.curation.clusters.assign import Near
from facepipe.curation.clusters.ledger import Ledger
from facepipe.errors import IndexingError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import Mark
from facepipe.index import manifest as manifests
from facepipe.index.search import Index
from facepipe.types import Float32

_NEAREST = 128  # faces: of 10,000 among a million 27 miss the cluster that comparing all gives them
_FEWEST = 8  # of them in clusters: else the new ones crowd the old out, and the face is compared with all clusters
_CHEAP = 1_000_000_000  # products that take some seconds: up to there everything is compared


def usable_index(gallery: Gallery, mark: Mark, products: int) -> Index | None:
    """The gallery's index, where it pays and holds all faces that had a cluster at the mark."""
    if products <= _CHEAP:
        return None
    try:
        index = Index(gallery.path)
    except IndexingError:
        return None
    current = index.manifest.contract == manifests.dump_contract(gallery) and mark.gallery == gallery.id
    return index if current and mark.version <= index.manifest.table_version <= gallery.version else None


def nearby(index: Index, vectors: Float32, ledger: Ledger) -> Near:
    """The clusters to compare new faces (n, 128) with; some 2 kB of memory a face."""
    hits = index.search(vectors, _NEAREST).ids
    ids, place = np.unique(hits, return_inverse=True)
    of = ledger.locate(ids)[place.reshape(hits.shape)]
    face, column = np.nonzero(of >= 0)
    pairs = np.unique(np.stack([face, of[face, column]], axis=1), axis=0)
    return Near(pairs[:, 0], pairs[:, 1], (of >= 0).sum(axis=1) < _FEWEST)
