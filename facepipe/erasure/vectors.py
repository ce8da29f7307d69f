"""Vectors out of the index: no search returns them from the first step on, no file holds them after the last."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow.compute as pc

from facepipe.erasure.selection import SelectedImages
from facepipe.index import manifest as manifests
from facepipe.index.manifest import Manifest
from facepipe.index.shard import Shard, merge_shards, write_tombstones
from facepipe.types import Int64

_ROWS = 65536  # as many as lie together in a shard's labels


@dataclass
class VectorRemoval:
    """What was done: vectors that went, and the digests of the shards' files before and after."""

    vectors: int = 0
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)


def hide_vectors(gallery: str, chosen: SelectedImages, check: Callable[[], None]) -> VectorRemoval:
    """Bury all that shards hold of the images, so that no search returns it. Needs the index's lease: `check`.

    Shards may hold more than the table: faces of earlier contents of an image, dead already or, where the index is
    behind the table, not yet. They are told by the image's uri.
    """
    found, tag = manifests.load_tagged(gallery)
    store, removed, shards = manifests.open_index_store(gallery), VectorRemoval(), []
    for entry in found.shards:
        shard = Shard(store, entry)
        here, remains = _find_ids(shard, chosen, whole=found.table_version != chosen.version)
        if len(here) or remains:
            removed.vectors += len(here)
            removed.before |= {f"{entry.name}/{name}": file.sha256[:32] for name, file in entry.files.items()}
        dead = np.union1d(shard.tombstones, here)
        shards.append(write_tombstones(store, entry, dead) if len(dead) != len(shard.tombstones) else entry)
    if tuple(shards) != found.shards:
        check()
        manifests.publish(gallery, replace(found, shards=tuple(shards)), tag)
    return removed


def _find_ids(shard: Shard, chosen: SelectedImages, whole: bool) -> tuple[Int64, bool]:
    """(sorted ids in a shard that are the images', whether others of its dead bear their labels).

    whole: look at the labels of all rows and not of the dead only.
    """
    ids = chosen.faces.to_numpy()
    parts = [ids[shard.find_rows(ids)[0]]] if len(ids) else [ids]
    rows = np.arange(len(shard.ids)) if whole else np.sort(shard.find_rows(shard.tombstones)[1])
    by_row = shard.read_ids_by_row() if len(rows) else ids
    remains = False
    for at in range(0, len(rows), _ROWS):
        some = rows[at : at + _ROWS]
        labels = shard.read_labels(some)
        mine = pc.is_in(labels["uri"], chosen.uris).to_numpy()
        parts.append(by_row[some[mine]])
        named = pc.is_in(labels["identity"], chosen.names).to_numpy() if len(chosen.names) else mine
        remains |= bool(np.isin(by_row[some[named & ~mine]], shard.tombstones).any())
    return np.unique(np.concatenate(parts)), remains


def remove_vectors(gallery: str, removed: VectorRemoval, versions: tuple[int, int], check: Callable[[], None]) -> None:
    """Write the shards that hold what was hidden anew, without their dead, and delete the old ones.

    versions: of the table, before and after its rows went; an index that answered for the first answers for the second.
    """
    found, tag = manifests.load_tagged(gallery)
    store = manifests.open_index_store(gallery)
    concerned, shards = {name.split("/")[0] for name in removed.before}, []
    for entry in found.shards:
        if entry.name not in concerned:
            shards.append(entry)
            continue
        made = merge_shards(store, [entry])
        if made is not None:
            shards.append(made)
            removed.after |= {f"{made.name}/{name}": file.sha256[:32] for name, file in made.files.items()}
    check()
    draft = replace(found, shards=tuple(shards), table_version=_choose_version(found, versions))
    if draft != found:
        manifests.publish(gallery, draft, tag)
    manifests.sweep(gallery, draft)


def _choose_version(found: Manifest, versions: tuple[int, int]) -> int:
    return versions[1] if found.table_version == versions[0] else found.table_version
