"""How far an index is behind its gallery's table, for warnings. Searches do not return what it lacks."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from facepipe.errors import FacepipeError, IndexingError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.log import find_last_equal_version
from facepipe.gallery.table import compare_files
from facepipe.index.manifest import INCOMPLETE, Manifest, exists, load, open_index_store
from facepipe.index.update import find_changes
from facepipe.storage import is_remote
from facepipe.storage.store import Store

# Faces in changed files up to which ids and labels are compared. Beyond, and in object stores, counts have to do.
_MAX_COMPARED = 200_000


@dataclass(frozen=True)
class IndexLag:
    """What an index lacks.

    Attributes:
        faces: faces in the table.
        lacking: faces that are new or have another label than in the index.
        removed: faces of the index that the table no longer holds, or holds with another label.
        is_exact: whether ids were compared. If not, new faces may hide behind as many that were removed.
    """

    faces: int
    lacking: int = 0
    removed: int = 0
    is_exact: bool = True

    @property
    def is_complete(self) -> bool:
        """Whether the index holds all faces of the table, as far as is known, and no others."""
        return not self.lacking and not self.removed

    def describe(self, gallery: str) -> str:
        """Describe what the index lacks and what to type, for people; empty if it is complete."""
        if self.is_complete:
            return ""
        if self.lacking:
            text = f"the index lacks {self.lacking} of {self.faces} faces of the gallery"
        else:
            text = f"the index holds {self.removed} faces that the gallery has no more"
        return f"{text}: run `facepipe index {gallery}`"


def measure_lag(gallery: Gallery, manifest: Manifest, store: Store, *, in_full: bool = False) -> IndexLag:
    """Measure how far an index is behind its table.

    Args:
        gallery: the gallery.
        manifest: of the index.
        store: of the index.
        in_full: compare ids however many there are; by default only if they are few and on this machine.
    """
    version = manifest.table_version
    faces = gallery.count_totals().faces
    # Versions that differ in no file, as after a change of a property, are one.
    if version != INCOMPLETE and find_last_equal_version(gallery.faces_folder, version) >= gallery.version:
        return IndexLag(faces)
    by_count = IndexLag(faces, max(0, faces - manifest.live), max(0, manifest.live - faces), is_exact=False)
    if not in_full and (is_remote(gallery.path) or _count_changed(gallery, version) > _MAX_COMPARED):
        return by_count
    try:
        changes = find_changes(gallery, manifest, store)
        changes.close()
    except FacepipeError:  # a shard is damaged, which a search says itself
        return by_count
    return IndexLag(faces, changes.added, changes.removed)


def describe_state(gallery: Gallery) -> dict[str, Any] | None:
    """Describe the index in a few figures, for people; None if there is none."""
    if not exists(gallery.path):
        return None
    try:
        manifest = load(gallery.path)
    except IndexingError as error:
        return {"problem": str(error)}
    lag = measure_lag(gallery, manifest, open_index_store(gallery.path))
    return {
        "faces": manifest.live,
        "lacks faces": lag.lacking,
        "deleted, still in shards": manifest.deleted,
        "shards": len(manifest.shards),
        "factory": manifest.template.factory,
        "lists visited, candidates re-scored": f"{manifest.nprobe}, {manifest.rescore}",
        "table version": manifest.table_version,
        "up to date": lag.is_complete,
        "bytes": manifest.total_bytes,
    }


def describe_gaps(gallery: Gallery) -> list[str]:
    """Describe what searches of a gallery cannot find, with every id compared; empty if its index is complete."""
    if not exists(gallery.path):
        faces = gallery.count_totals().faces
        return [f"there is no index of the {faces} faces: run `facepipe index {gallery.path}`"] if faces else []
    try:
        manifest = load(gallery.path)
    except IndexingError as error:
        return [str(error)]
    lag = measure_lag(gallery, manifest, open_index_store(gallery.path), in_full=True)
    return [] if lag.is_complete else [lag.describe(gallery.path)]


def _count_changed(gallery: Gallery, version: int) -> int:
    """Count the faces in files that only one of two versions has; very many if the older one cannot be opened."""
    try:
        old_gallery = Gallery(gallery.path, version)
        differences = compare_files(old_gallery, gallery)
    except FacepipeError:
        return _MAX_COMPARED + 1
    count = sum(map(len, differences.deleted.values()))
    for files, paths in ((old_gallery.read_sizes(), differences.removed), (gallery.read_sizes(), differences.added)):
        is_chosen = pc.is_in(files["path"], value_set=pa.array(paths, pa.string()))
        count += pc.sum(files["faces"].filter(is_chosen)).as_py() or 0
    return count
