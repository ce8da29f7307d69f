"""What a gallery says for free: faces of one photo are different people, and faces with one label may be the same."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.graph.nodes import Nodes
from facepipe.gallery import Gallery
from facepipe.types import Int64

_MOST = 500  # a face is held apart from so many others of its photo: pairs grow with the square
_ROWS = 65536


def same_photo(gallery: Gallery, nodes: Nodes) -> Int64:
    """(m, 2) positions of nodes in one photo, which are two persons."""
    keys, faces = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for at, batch in _batches(gallery, nodes, "uri"):
        keys.append(pd.util.hash_array(batch["uri"].to_numpy(zero_copy_only=False)))
        faces.append(at)
    key, node = np.concatenate(keys), np.concatenate(faces)
    order = np.lexsort((node, key))
    key, node = key[order], node[order]
    pairs = [np.empty((0, 2), np.int64)]
    for gap in range(1, _MOST):
        together = np.flatnonzero(key[gap:] == key[:-gap])
        if not together.size:
            break
        pairs.append(np.stack([node[together], node[together + gap]], axis=1))
    return np.sort(np.concatenate(pairs), axis=1)


def labels(gallery: Gallery, nodes: Nodes, side: int = 0) -> tuple[Int64, pa.Array]:
    """(number of each node's identity (n,), -1 without one; the identities' names, sorted)."""
    numbers = np.full(len(nodes), -1, np.int64)
    names: dict[str, int] = {}
    for at, batch in _batches(gallery, nodes, "identity", side):
        named = batch["identity"].cast(pa.string())
        coded = pc.if_else(pc.equal(named, ""), None, named).dictionary_encode()
        known = np.array([names.setdefault(name, len(names)) for name in coded.dictionary.to_pylist()] + [-1], np.int64)
        numbers[at] = known[coded.indices.fill_null(len(known) - 1).to_numpy()]
    ranked = sorted(names)
    place = np.empty(len(names) + 1, np.int64)
    place[[names[name] for name in ranked]], place[-1] = np.arange(len(names)), -1
    return place[numbers], pa.array(ranked, pa.string())


def _batches(gallery: Gallery, nodes: Nodes, column: str, side: int = 0) -> Iterator[tuple[Int64, pa.RecordBatch]]:
    """(positions (n,), batch) of the gallery's faces that are nodes."""
    for batch in gallery.batches(["face_id", column], rows=_ROWS):
        faces = batch.filter(batch["face_id"].is_valid())
        at = nodes.find(faces["face_id"].to_numpy(), side)
        if (at < 0).any():
            faces, at = faces.filter(pa.array(at >= 0)), at[at >= 0]
        if len(at):
            yield at, faces
