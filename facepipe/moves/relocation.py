"""A source that is at another place: mounted elsewhere, renamed, or copied to another disk and deleted on the first.

It is recognised by the images that the gallery knows. They are gone from their old place, and lie at the new one under
the same paths below it, with the same content. Its rows then get their new uris, and no image is embedded again.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe import storage
from facepipe.errors import SourceError, StorageError
from facepipe.gallery.changes import PartialGallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.renaming import rename_rows
from facepipe.gallery.commits.rewrite import Rewrite, rewrite_files
from facepipe.gallery.hidden import HiddenWatch
from facepipe.gallery.sources import GallerySource, SourceRegister
from facepipe.gallery.table import Gallery
from facepipe.hashing import hash64_column
from facepipe.schema import WORK_ITEM
from facepipe.sources import SourceConfig, SourcePlace, WorkItem, open_source
from facepipe.sources.paths import PathChange, split_uri
from facepipe.sources.place import is_below, is_same_folder, match_places
from facepipe.sources.relocate import ImageLocator
from facepipe.stages import Read
from facepipe.storage.hashtable import HashTable

# Images of a source that are looked for at its new place, and files of the table that they are taken from.
_SAMPLED_ROWS = 64
_SAMPLED_FILES = 8
# Images of a new listing that are looked for in the gallery, and how many are listed to choose them from.
_SAMPLED_ITEMS = 64
_LISTED_ITEMS = 4096
# Images whose content is compared.
_COMPARED_IMAGES = 8
# Share of the sampled images that may still be at the old place, and share that must be at the new one.
_MAX_STAYED = 0.1
_MIN_FOUND = 0.5


@dataclass(frozen=True)
class Relocation:
    """A source that is at another place than before.

    Attributes:
        source: The source as the gallery knows it.
        old_root: Where it was.
        change: How the paths of its images change; None if they lie in other folders below it, so that only their
            content can tell.
    """

    source: GallerySource
    old_root: str
    change: PathChange | None


def find_relocation(
    gallery: Gallery, register: SourceRegister, place: SourcePlace, config: SourceConfig
) -> Relocation | None:
    """Find out whether a source that is new to a gallery is one that it knows from another place.

    Only sources that are gone from their old place are considered. If both places hold images, they are two sources.

    Args:
        gallery: the gallery.
        register: its sources.
        place: place of the source.
        config: the source.

    Returns:
        The relocation; None if the source is new.
    """
    gone = [source for source in _list_candidates(gallery, register) if _is_gone(source)]
    # A source of the same name first.
    gone.sort(key=lambda source: source.name not in (config.name, place.name))
    has_left = []
    for source in gone:
        rows = _sample_rows(gallery, source)
        stayed = sum(_exists(split_uri(uri)[0]) for uri in rows["uri"].to_pylist())
        if not rows.num_rows or stayed > _MAX_STAYED * rows.num_rows:
            # The images are where they were. Of a list, only the list itself may be elsewhere.
            has_left += [source] if source.is_open and source.root else []
            continue
        change = _infer_change(rows, place)
        if change is not None and _is_same_content(rows, change):
            return Relocation(source, source.root or change.old, change)
        has_left.append(source)
    return _find_by_content(gallery, has_left, config) if has_left else None


def find_older_spelling(gallery: Gallery, register: SourceRegister, place: SourcePlace) -> str | None:
    """Find by which path a gallery without a register knows a source, if a link leads to it by another one."""
    if storage.is_remote(place.root) or place.is_open:
        return None
    for source in _list_candidates(gallery, register):
        if source.root:
            continue
        for uri in _sample_rows(gallery, source)["uri"].to_pylist():
            path, _ = split_uri(uri)
            parts = path.split("/")
            # The longest part of the path that leads to the file below the folder as well.
            for start in range(1, len(parts)):
                head = "/".join(parts[:start]) or "/"
                tail = "/".join(parts[start:])
                is_found = head != place.folder and os.path.exists(os.path.join(place.folder, tail))
                if is_found and is_same_folder(head, place.folder):
                    return head + place.root[len(place.folder) :]
    return None


def relocate_rows(gallery: Gallery, relocation: Relocation, source: GallerySource, commit: Committer) -> int:
    """Give the rows of a relocated source their new uris and its name, in one commit.

    Args:
        gallery: the gallery.
        relocation: where the source was.
        source: the source as it is known from now on.
        commit: commits the change.

    Returns:
        Number of images.
    """
    change = relocation.change
    old_name = relocation.source.name
    root = change.old if change else relocation.old_root
    if change is None and old_name == source.name:
        return 0  # content decides, image by image, and the name stays
    taken = _read_taken_uris(gallery, change)
    # Rows whose erasure is recorded stay where the erasure finds them.
    hidden = HiddenWatch(gallery.path).read().uris
    count = 0

    def find_rows(rows: pa.Table) -> Any:
        is_own = pa.array(is_below(rows["uri"], root)) if root else pa.array([True] * rows.num_rows)
        is_own = pc.and_not(is_own, pc.is_in(rows["uri"], hidden))
        return pc.and_(pc.fill_null(pc.equal(rows["source"], old_name), False), is_own)

    def change_rows(rows: pa.Table, mask: Any) -> pa.Table:
        nonlocal count
        uris = rows["uri"] if change is None else change.change_uris(rows["uri"])
        # A uri that another image has already is given to no second one.
        if taken.count:
            is_taken = pa.array(taken.get(hash64_column(uris))[0])
            mask = pc.and_not(mask, is_taken)
        first_rows = pc.and_(mask, pc.fill_null(pc.equal(rows["face_index"], 0), True))
        count += pc.sum(first_rows).as_py() or 0
        return rename_rows(rows, pc.if_else(mask, uris, pa.scalar(None, pa.string())), source.name)

    def may_hold_source(file: dict[str, Any]) -> bool:
        return (file.get("min.source") or "") <= old_name <= (file.get("max.source") or old_name)

    def make_actions() -> list[Any]:
        nonlocal count
        count = 0
        rewrite = Rewrite(("uri", "source", "face_index"), find_rows, change_rows, may_hold_source)
        return list(rewrite_files(Gallery(gallery.path), rewrite))

    try:
        commit.commit_actions(make_actions, {"job": "relocate"})
    finally:
        taken.close()
    return count


def describe_relocation(relocation: Relocation, place: SourcePlace, count: int) -> str:
    """Describe a relocation for the user."""
    if relocation.change is None:
        return f"{place.root} is the source that was at {relocation.old_root}: moved images are told by their content"
    return f"{place.root} is the source that was at {relocation.old_root}: {count} images have new uris, none is read"


def make_relocated_source(relocation: Relocation, source: GallerySource) -> GallerySource:
    """Make the source as it is known from now on: it keeps its history."""
    old = relocation.source
    formers = dict.fromkeys([relocation.change.old if relocation.change else relocation.old_root, *old.former_roots])
    return replace(source, former_roots=tuple(filter(None, formers)), is_strict=old.is_strict, listings=old.listings)


def _list_candidates(gallery: Gallery, register: SourceRegister) -> Iterator[GallerySource]:
    """List the sources of a gallery: those of its register, and names that only its rows have, without a root."""
    yield from register.sources
    known = {source.name for source in register.sources}
    names = {file.get(bound) for file in gallery.files() for bound in ("min.source", "max.source")}
    for name in sorted(name for name in names - known if name):
        yield GallerySource(name, "")


def _is_gone(source: GallerySource) -> bool:
    """Tell whether a source is not at its place any more; True if its place is not known."""
    if not source.root:
        return True
    if _is_absent(source.root):
        return True
    uri = storage.join(source.root, source.glob) if source.glob else source.root
    try:
        return not open_source(SourceConfig(uri)).has_items()
    except SourceError:
        return True
    except StorageError:
        return False  # nobody knows: a store does not answer


def _is_absent(root: str) -> bool:
    """Tell whether a path on a disk certainly leads nowhere."""
    if storage.is_remote(root):
        return False
    try:
        os.stat(root)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _sample_rows(gallery: Gallery, source: GallerySource) -> pa.Table:
    """Sample rows with a content over the files of a source."""
    schema = pa.schema([("uri", pa.string()), ("image_id", pa.string())])
    files = [
        file["path"]
        for file in sorted(gallery.files(), key=lambda file: (file.get("min.uri") or "", file["path"]))
        if (file.get("min.source") or "") <= source.name <= (file.get("max.source") or source.name)
    ]
    files = files[:: max(1, -(-len(files) // _SAMPLED_FILES))]
    where = (ds.field("source") == source.name) & ds.field("image_id").is_valid()
    if source.root and source.is_strict:
        where &= match_places([source.root])
    parts = [schema.empty_table()]
    for path in files:
        batches = PartialGallery(gallery, [path]).batches(["uri", "image_id", "face_index"], where)
        rows = pa.Table.from_batches(list(batches), pa.schema([*schema, ("face_index", pa.int16())]))
        rows = rows.filter(pc.fill_null(pc.equal(rows["face_index"], 0), True)).select(schema.names)
        step = max(1, -(-rows.num_rows * len(files) // _SAMPLED_ROWS))
        parts.append(rows.take(list(range(0, rows.num_rows, step))))
    return pa.concat_tables(parts)


def _infer_change(rows: pa.Table, place: SourcePlace) -> PathChange | None:
    """Infer from sampled images how their paths have changed; None if most of them are not at the new place."""
    votes: Counter[PathChange] = Counter()
    for uri in rows["uri"].to_pylist():
        path, member = split_uri(uri)
        change = _find_change(path, member, place, likely=list(votes))
        if change is not None:
            votes[change] += 1
    if not votes:
        return None
    change, count = votes.most_common(1)[0]
    return change if count >= max(1, _MIN_FOUND * rows.num_rows) else None


def _find_change(path: str, member: str, place: SourcePlace, likely: list[PathChange]) -> PathChange | None:
    """Find where a file is below a new place; the longest part of its path that leads to a file counts."""
    if member and place.root.lower().endswith((".parquet", ".pq")):
        return PathChange(path, place.root)
    for change in likely:
        changed = change.change_uri(path)
        if changed is not None and _exists(split_uri(changed)[0]):
            return change
    _, separator, rest = path.rpartition("://")
    parts = [part for part in rest.split("/") if part]
    for start in range(1 if separator else 0, len(parts)):
        tail = "/".join(parts[start:])
        if _exists(storage.join(place.folder, tail)):
            head = path[: len(path) - len(tail)].rstrip("/")
            return PathChange(head or "/", place.folder)
    return None


def _is_same_content(rows: pa.Table, change: PathChange) -> bool:
    """Tell whether images at the new place are those that the gallery knows, by the content of a few."""
    locator = ImageLocator()
    pairs = [(change.change_uri(row["uri"]), row["image_id"]) for row in rows.to_pylist()]
    present = [(uri, image) for uri, image in pairs if uri is not None and _exists(split_uri(uri)[0])]
    chosen = present[:: max(1, -(-len(present) // _COMPARED_IMAGES))]
    items = [locator.locate_image(uri) for uri, _ in chosen]
    same = sum(read == image for read, (_, image) in zip(_read_image_ids(items), chosen, strict=True))
    return same >= max(1, _MIN_FOUND * len(chosen))


def _find_by_content(gallery: Gallery, candidates: list[GallerySource], config: SourceConfig) -> Relocation | None:
    """Find the source whose images a new listing names or holds, wherever they were."""
    try:
        listed = list(islice(iter(open_source(config)), _LISTED_ITEMS))
    except SourceError:
        return None  # whoever embeds it says why
    # Rows of a Parquet file are read from its beginning, so the first ones cost least.
    is_table = bool(listed) and listed[0].offset is not None and listed[0].length is None
    step = 1 if is_table else max(1, len(listed) // _SAMPLED_ITEMS)
    items = [item for item in listed[::step] if item.listing_error is None][:_SAMPLED_ITEMS]
    image_ids = [image for image in _read_image_ids(items) if image is not None]
    if not image_ids:
        return None
    names = [source.name for source in candidates]
    where = ds.field("image_id").isin(pa.array(sorted(set(image_ids)))) & ds.field("source").isin(pa.array(names))
    listed_uris = {item.uri for item in items}
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for batch in gallery.batches(["uri", "image_id", "source"], where):
        for row in batch.to_pylist():
            # An image that is still at its old place is a copy, unless the new listing names it there.
            if row["uri"] in listed_uris or not _exists(split_uri(row["uri"])[0]):
                found[row["source"]][row["image_id"]] = row["uri"]
    for source in candidates:
        if len(found[source.name]) >= max(1, _MIN_FOUND * len(set(image_ids))):
            root = source.root or _find_common_folder(list(found[source.name].values()))
            return Relocation(source, root, None)
    return None


def _find_common_folder(uris: list[str]) -> str:
    folders = [os.path.dirname(split_uri(uri)[0]) for uri in uris]
    try:
        return os.path.commonpath(folders)
    except ValueError:  # paths and URLs, or several buckets
        return ""


def _read_image_ids(items: list[WorkItem]) -> list[str | None]:
    """Read images, and return the hashes of their contents; None for one that cannot be read."""
    if not items:
        return []
    columns = [*zip(*items, strict=True), [None] * len(items)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, WORK_ITEM, strict=True)]
    return list(Read()(pa.table(arrays, WORK_ITEM))["image_id"].to_pylist())


def _read_taken_uris(gallery: Gallery, change: PathChange | None) -> HashTable:
    """Read the hashes of the uris that images at the new place have already."""
    taken = HashTable()
    try:
        if change is not None:
            for batch in gallery.batches(["uri"], match_places([change.new])):
                taken.add(hash64_column(batch["uri"]))
    except BaseException:
        taken.close()
        raise
    return taken


def _exists(path: str) -> bool:
    try:
        return storage.file_exists(path)
    except (StorageError, ValueError):
        return False
