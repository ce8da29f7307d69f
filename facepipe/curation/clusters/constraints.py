"""Read what a gallery says about persons: faces of one photo differ, and faces with one label may be the same."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.graph.nodes import Nodes
from facepipe.curation.space import find_space_scale
from facepipe.gallery import Gallery
from facepipe.storage.partitions import PartitionedTable, count_partitions, spread_keys
from facepipe.types import Bool, Float32, Int64, UInt64

_MAX_GAP = 500  # faces of its photo that a face is kept apart from: pairs grow with the square
_ROWS = 65536
_HASHED_ROWS = 8192
_PHOTOS = pa.schema([("key", pa.uint64()), ("node", pa.int64())])
_PAIRS = 65536  # whose distances are computed at a time
# Two faces of one photo that are nearer than this are one person's: in a mirror, a collage, or a photo of a photo.
# In the space of dlib's network copies of a face are up to 0.2 apart, shrunk and compressed ones too, and strangers
# 0.24 and more.
_TWIN_DISTANCE = 0.2


def find_same_photo_pairs(gallery: Gallery, nodes: Nodes) -> Int64:
    """Find the pairs of nodes (m, 2) in one photo, which are two persons unless they are as near as copies."""
    # Faces of one photo are in one partition.
    photos = PartitionedTable(_PHOTOS, count_partitions(len(nodes)))
    for at, batch in _iterate_nodes(gallery, nodes, "uri", side=0):
        keys = hash_uris(batch["uri"])
        photos.append(pa.table([keys, at], schema=_PHOTOS), spread_keys(keys, photos.count))
    pairs = [pair_equal_keys(table["key"].to_numpy(), table["node"].to_numpy()) for table in photos]
    return drop_twins(_sort_pairs(np.concatenate(pairs)), nodes.vectors, find_space_scale(gallery))


def hash_uris(uris: pa.Array | pa.ChunkedArray) -> UInt64:
    """Hash uris (n,): hashes take less memory. Some thousand are objects at a time."""
    hashes = np.empty(len(uris), np.uint64)
    for at in range(0, len(uris), _HASHED_ROWS):
        texts = uris.slice(at, _HASHED_ROWS).to_numpy(zero_copy_only=False)
        hashes[at : at + _HASHED_ROWS] = pd.util.hash_array(texts)
    return hashes


def drop_twins(pairs: Int64, vectors: Float32, scale: float = 1.0) -> Int64:
    """Drop the pairs (m, 2) of vectors that are as near as copies: they are one person's.

    Args:
        pairs: positions of vectors.
        vectors: unit vectors, (n, dim).
        scale: how many times farther apart copies are in this space than in that of dlib's network.
    """
    is_apart = np.ones(len(pairs), bool)
    for at in range(0, len(pairs), _PAIRS):
        part = pairs[at : at + _PAIRS]
        is_apart[at : at + _PAIRS] = ~are_twins(vectors[part[:, 0]], vectors[part[:, 1]], scale)
    return pairs[is_apart]


def are_twins(vectors: Float32, others: Float32, scale: float = 1.0) -> Bool:
    """Tell whether unit vectors (n, d) are as near to others (n, d) as copies of one face, (n,)."""
    return np.asarray(np.linalg.norm(vectors - others, axis=1) < _TWIN_DISTANCE * scale, bool)


def pair_equal_keys(keys: npt.NDArray[Any], numbers: Int64) -> Int64:
    """Pair numbers that have equal keys, each with up to 499 that follow it.

    Args:
        keys: a key per number, (n,).
        numbers: different numbers, (n,).

    Returns:
        The pairs, (m, 2), the smaller number first, sorted.
    """
    order = np.lexsort((numbers, keys))
    keys = keys[order]
    numbers = numbers[order]
    pairs = [np.empty((0, 2), np.int64)]
    # Compare each number with the one that follows at a growing gap.
    for gap in range(1, _MAX_GAP):
        first = np.flatnonzero(keys[gap:] == keys[:-gap])
        if not first.size:
            break
        pairs.append(np.stack([numbers[first], numbers[first + gap]], axis=1))
    return _sort_pairs(np.concatenate(pairs))


def _sort_pairs(pairs: Int64) -> Int64:
    """Sort pairs (m, 2)."""
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def read_labels(gallery: Gallery, nodes: Nodes, *, side: int = 0) -> tuple[Int64, pa.Array]:
    """Read the identity labels of nodes.

    Args:
        gallery: the gallery.
        nodes: n nodes.
        side: position of the gallery among those of the nodes.

    Returns:
        The number of each node's identity (n,), -1 without one, and the names of the identities, sorted.
    """
    numbers = np.full(len(nodes), -1, np.int64)
    names: dict[str, int] = {}
    for at, batch in _iterate_nodes(gallery, nodes, "identity", side=side):
        identities = batch["identity"].cast(pa.string())
        # An empty label counts as none.
        coded = pc.if_else(pc.equal(identities, ""), None, identities).dictionary_encode()
        codes = [names.setdefault(name, len(names)) for name in coded.dictionary.to_pylist()]
        codes.append(-1)  # of null
        numbers[at] = np.array(codes, np.int64)[coded.indices.fill_null(len(codes) - 1).to_numpy()]
    # Number the identities by name instead of by first appearance.
    ranked = sorted(names)
    rank = np.empty(len(names) + 1, np.int64)
    rank[[names[name] for name in ranked]] = np.arange(len(names))
    rank[-1] = -1
    return rank[numbers], pa.array(ranked, pa.string())


def _iterate_nodes(gallery: Gallery, nodes: Nodes, column: str, *, side: int) -> Iterator[tuple[Int64, pa.RecordBatch]]:
    """Iterate over the gallery's faces that are nodes: their positions (n,) and a batch of the column."""
    for batch in gallery.batches(["face_id", column], rows=_ROWS):
        faces = batch.filter(batch["face_id"].is_valid())
        at = nodes.find(faces["face_id"].to_numpy(), side)
        is_node = at >= 0
        if not is_node.all():
            faces = faces.filter(pa.array(is_node))
            at = at[is_node]
        if len(at):
            yield at, faces
