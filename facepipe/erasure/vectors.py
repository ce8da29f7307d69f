"""Removing vectors from the index: first no search returns them, in the end no file holds them."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow.compute as pc

from facepipe import storage
from facepipe.erasure.selection import SelectedImages
from facepipe.errors import IndexDamagedError, IndexReplacedError
from facepipe.gallery.commits.log import find_last_equal_version, find_last_version_of_rows
from facepipe.index import manifest as manifests
from facepipe.index.centroids import choose_centroids, replace_centroids
from facepipe.index.manifest import Manifest, ShardEntry, Template
from facepipe.index.shard import Shard, merge_shards, move_shard, write_tombstones
from facepipe.index.template import open_template, replace_template
from facepipe.storage.lease import Lease
from facepipe.storage.store import Store
from facepipe.types import Int64

_LABEL_ROWS = 65536  # rows that are stored together in a shard's labels


@dataclass
class VectorRemoval:
    """What was removed from the index.

    Attributes:
        vectors: number of vectors.
        ids: their ids.
        before: files of the shards that held them, with the first 32 digits of their SHA-256.
        after: files of the shards that replaced them, likewise.
        dropped: names of damaged shards, which the index no longer has. The next `index` adds their faces again.
    """

    vectors: int = 0
    ids: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    def add_shard(self, entry: ShardEntry) -> None:
        """Note the files of a shard that holds traces of the images, or may hold some."""
        self.before |= {f"{entry.name}/{name}": file.sha256[:32] for name, file in entry.files.items()}


def hide_vectors(gallery: str, selected: SelectedImages, lease: Lease) -> VectorRemoval:
    """Tombstone everything that shards hold of the images, so that no search returns it.

    Shards may hold more than the table does: faces of earlier contents of an image. These have tombstones already, or
    none yet if the index is behind the table. The image's uri identifies them. A damaged shard leaves the index,
    because nothing tells what it holds. A damaged manifest is withdrawn.

    Args:
        gallery: folder or URL of the gallery.
        selected: the images to erase.
        lease: of the index.
    """
    try:
        # The tag makes publishing fail if the index has changed since.
        manifest, tag = manifests.load_tagged(gallery)
    except IndexDamagedError:
        manifests.withdraw(gallery, lease)
        return VectorRemoval(dropped=[manifests.NAME])
    store = manifests.open_index_store(gallery)
    # An index that is behind the table may hold faces that the table no longer knows.
    is_behind = manifest.table_version != selected.version
    removal = VectorRemoval()
    shards = []
    for entry in manifest.shards:
        try:
            shard = Shard(store, entry)
            ids, has_other_traces = _find_ids(shard, selected, all_rows=is_behind)
        except IndexDamagedError:
            removal.dropped.append(entry.name)
            removal.add_shard(entry)
            continue
        if len(ids) or has_other_traces:
            # A shard with any trace has to be rewritten later, so its files go into the receipt.
            removal.vectors += len(ids)
            removal.ids = np.union1d(removal.ids, ids)
            removal.add_shard(entry)
        tombstones = np.union1d(shard.tombstones, ids)
        is_changed = len(tombstones) != len(shard.tombstones)
        shards.append(write_tombstones(store, entry, tombstones) if is_changed else entry)
    # Shards that are kept for searches that began before are needed no longer if they hold anything.
    replaced = tuple(old for old in manifest.replaced if not _has_traces(store, old.entry, selected, removal))
    # Publish once for all shards: a reader sees all tombstones or none.
    draft = replace(manifest, shards=tuple(shards), replaced=replaced)
    if removal.dropped:
        draft = replace(draft, table_version=manifests.INCOMPLETE)
    if draft != manifest:
        manifests.publish(gallery, draft, tag, lease, known=manifest)
    return removal


def _has_traces(store: Store, entry: ShardEntry, selected: SelectedImages, removal: VectorRemoval) -> bool:
    """Tell whether a shard that is no longer part of the index holds anything of the images, or cannot be read."""
    if any(name.startswith(f"{entry.name}/") for name in removal.before):
        return True
    try:
        shard = Shard(store, entry)
        ids, has_other_traces = _find_ids(shard, selected, all_rows=True)
    except (IndexDamagedError, IndexReplacedError):
        return True
    is_tombstoned = np.isin(selected.faces.to_numpy(), shard.tombstones).any()
    return bool(len(ids) or has_other_traces or is_tombstoned)


def find_indexed_ids(gallery: str, selected: SelectedImages) -> Int64:
    """Find all faces that the index holds of some images. Nothing is written, so no lease is needed.

    Args:
        gallery: folder or URL of the gallery.
        selected: the images.

    Returns:
        Sorted face ids, also of earlier contents of the images.
    """
    parts = [np.empty(0, np.int64)]
    try:
        manifest = manifests.load(gallery)
    except IndexDamagedError:
        return parts[0]  # no search opens it
    store = manifests.open_index_store(gallery)
    is_behind = manifest.table_version != selected.version
    for entry in manifest.shards:
        # A damaged shard must not stop the request. It leaves the index when the erasure gets to it.
        with suppress(IndexDamagedError, IndexReplacedError):
            parts.append(_find_ids(Shard(store, entry), selected, all_rows=is_behind)[0])
    return np.unique(np.concatenate(parts))


def _find_ids(shard: Shard, selected: SelectedImages, *, all_rows: bool) -> tuple[Int64, bool]:
    """Find the face ids that a shard holds of some images.

    Args:
        shard: the shard.
        selected: the images.
        all_rows: look at the labels of all rows, and not only of the tombstoned ones.

    Returns:
        The sorted ids, and whether other tombstoned faces of the shard have the labels of the images.
    """
    ids = selected.faces.to_numpy()
    # Faces that the table knows are found by their ids.
    parts = [ids[shard.find_rows(ids)[0]]] if len(ids) else [ids]
    # Older contents of the images are found by their labels, which are read for rows that may be such.
    rows = np.arange(len(shard.ids)) if all_rows else np.sort(shard.find_rows(shard.tombstones)[1])
    ids_by_row = shard.read_ids_by_row() if len(rows) else ids
    has_other_traces = False
    for start in range(0, len(rows), _LABEL_ROWS):
        batch = rows[start : start + _LABEL_ROWS]
        labels = shard.read_labels(batch)
        is_selected = pc.is_in(labels["uri"], selected.uris).to_numpy()
        # What an image was called before it was moved may be the name of another one, unless the face is deleted.
        had_name = pc.is_in(labels["uri"], selected.former_uris).to_numpy()
        is_selected |= had_name & np.isin(ids_by_row[batch], shard.tombstones)
        parts.append(ids_by_row[batch[is_selected]])
        # Tombstoned faces of other images may have the labels too.
        has_name = pc.is_in(labels["identity"], selected.names).to_numpy() if len(selected.names) else is_selected
        others = ids_by_row[batch[has_name & ~is_selected]]
        has_other_traces |= bool(np.isin(others, shard.tombstones).any())
    return np.unique(np.concatenate(parts)), has_other_traces


def remove_vectors(
    gallery: str,
    removal: VectorRemoval,
    *,
    version_before: int,
    version_after: int,
    lease: Lease,
    before_publishing: Callable[[], None] = lambda: None,
) -> None:
    """Rewrite the shards that hold hidden vectors, without their tombstoned faces, and delete the old ones.

    If centroids rest on the erased faces, the template and all shards get others (facepipe.index.centroids).

    Args:
        gallery: folder or URL of the gallery.
        removal: what `hide_vectors` returned; the new files are added to it.
        version_before: version of the table before its rows were deleted. An index that answered for it answers for
            `version_after` now.
        version_after: version of the table after that.
        lease: of the index.
        before_publishing: called when the new files are known, before the index is published.
    """
    manifest, tag = manifests.load_tagged(gallery)
    store = manifests.open_index_store(gallery)
    # Shards that held erased vectors, by their names.
    names = {name.split("/")[0] for name in removal.before}
    template = _replace_template(store, manifest, removal.ids)
    shards = []
    for entry in manifest.shards:
        if template is None and entry.name not in names:
            shards.append(entry)
            continue
        try:
            if template is None:
                # Merging a single shard rewrites it without its tombstones; nothing comes back if no vector is left.
                rewritten = merge_shards(store, [entry])
            else:
                removal.add_shard(entry)
                rewritten = move_shard(store, entry, open_template(store, template))
        except IndexDamagedError:
            removal.dropped.append(entry.name)
            continue
        if rewritten is not None:
            shards.append(rewritten)
            removal.after |= {f"{rewritten.name}/{name}": file.sha256[:32] for name, file in rewritten.files.items()}
    # Publish the new shards, and only then delete the files of the old ones.
    before_publishing()
    table_version = _move_version(gallery, manifest.table_version, version_before, version_after)
    if removal.dropped:
        table_version = manifests.INCOMPLETE
    # Searches that began before cannot go on with what held erased faces: it is not kept for them.
    replaced = tuple(old for old in manifest.replaced if old.entry.name not in names and template is None)
    draft = replace(
        manifest,
        shards=tuple(shards),
        replaced=replaced,
        table_version=table_version,
        template=template or manifest.template,
    )
    if draft != manifest:
        manifests.publish(gallery, draft, tag, lease, known=manifest)
    manifests.sweep(gallery, lease)


def follow_rewrite(gallery: str, lease: Lease) -> None:
    """Have the index answer for the newest version of the table that has the same rows, if in other files.

    Else the next `index` would have to compare all faces, because the older version cannot be opened any more.

    Args:
        gallery: folder or URL of the gallery.
        lease: of the index.
    """
    if not manifests.exists(gallery):
        return
    try:
        manifest, tag = manifests.load_tagged(gallery)
    except IndexDamagedError:
        return  # no search opens it
    if manifest.table_version < 0:
        return
    table_version = find_last_version_of_rows(storage.join(gallery, "faces"), manifest.table_version)
    if table_version != manifest.table_version:
        manifests.publish(gallery, replace(manifest, table_version=table_version), tag, lease, known=manifest)


def _move_version(gallery: str, version: int, version_before: int, version_after: int) -> int:
    """Return the version that an index answers for after a change of the table that it has followed."""
    folder = storage.join(gallery, "faces")
    # Entries that change no file may lie between the versions, such as those that keep runs out that were asleep.
    if version >= 0 and find_last_equal_version(folder, version) >= version_before >= version:
        return find_last_equal_version(folder, version_after)
    return version


def _replace_template(store: Store, manifest: Manifest, gone: Int64) -> Template | None:
    """Write a template whose centroids do not rest on erased faces; None if those of the current one do not."""
    if not manifest.template.lists:
        return None
    try:
        index = open_template(store, manifest.template)
    except IndexDamagedError:
        return None  # the next `index` builds everything again
    shards = []
    for entry in manifest.shards:
        with suppress(IndexDamagedError):  # such a shard leaves the index
            shard = Shard(store, entry)
            shard.open_index()
            shards.append(shard)
    centroids = choose_centroids(index, shards, gone)
    if centroids is None:
        return None
    replace_centroids(index, centroids)
    return replace_template(store, manifest.template, index)
