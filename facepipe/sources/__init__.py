"""Where images come from: one small module per kind of source, and `open_source`, which picks one from the uri."""

import os
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal

from pydantic import Field

from facepipe.errors import SourceError
from facepipe.sources.containers.base64_table import Base64Table, is_base64_table
from facepipe.sources.expand import Expander
from facepipe.sources.extensions import (
    ARCHIVE_EXTENSIONS,
    IMAGE_EXTENSIONS,
    VERIFICATION_EXTENSION,
    get_extension,
    is_web_url,
)
from facepipe.sources.folder import FolderSource
from facepipe.sources.glob import open_glob
from facepipe.sources.identity import IdentityRule
from facepipe.sources.item import Listing, Source, WorkItem
from facepipe.sources.labelled import LabelledSource
from facepipe.sources.labels import format_label
from facepipe.sources.list_file import ListSource
from facepipe.sources.object_store import ObjectStoreSource
from facepipe.sources.parquet import ParquetSource, names_images_elsewhere
from facepipe.sources.place import SourcePlace, place_folder, place_glob, place_list, place_parquet, place_prefix
from facepipe.sources.selection import Selection
from facepipe.storage import is_remote, may_exist
from facepipe.text import escape_undecodable

SourceKind = Literal["auto", "folder", "glob", "object_store", "parquet", "list"]
BoxesFrame = Literal["auto", "displayed", "stored"]
UnlistedBoxes = Literal["detect", "none"]
LIST_EXTENSIONS = ("txt", "csv", "tsv", "lst", "list", "jsonl")
_TABLE_EXTENSIONS = ("parquet", "pq", "arrow")
# What lies beside the tables of a dataset of Hugging Face: in a clone, and in what `save_to_disk` writes.
_DATASET_FILES = frozenset({"README.md", "LICENSE", "LICENSE.txt", "dataset_infos.json", "labels.csv"})
_SAVED_DATASET_FILES = frozenset({"dataset_info.json", "state.json", "dataset_dict.json"})
_SAMPLED_FILES = 1000  # of a folder, to see whether it holds Parquet files
_MAX_PARTITIONS = 8  # levels of folders such as year=2024 above the files

__all__ = ["Source", "SourceConfig", "SourcePlace", "WorkItem", "locate_source", "open_source"]


@dataclass(frozen=True)
class SourceConfig:
    """Where the images are.

    Attributes:
        uri: A folder, a glob, an s3:// prefix, a .parquet or .arrow file or a folder of them, a list file, a .tar,
            .tar.gz, .zip, .rec, .mdb or .bin.
        kind: How to read it; auto decides from the uri.
        identity: Where labels come from: folder, filename (left of the last `_`), label (of the list), none, or auto:
            the label in a list, a table or beside the image, else the folder's name if images lie exactly one folder
            deep and the folders are people (not train and test, dates, shards, or a single one).
        label_column: Column of a list or a table that holds the label, by its name; in a list without a header by its
            number from 1. By default the first known one, such as identity, label or person.
        label_prefix: Put before each label, so that number 7 of this source is not number 7 of another; "" if both
            number the same people.
        include: Patterns of what is listed; everything by default. A pattern without `/` is compared with the name of
            each folder and file, one with `/` with the path below the source: `*.jpg`, `2019`, `scans/**/front.png`.
        exclude: Patterns of what is not listed.
        name: Name of the corpus in the gallery's `source` column; by default the last part of the uri, and more of it
            if another source of the gallery has that name.
        root: Folder that a list's paths are relative to; by default the list's own, which they must not lead out of. If
            it is set, absolute paths, URLs and the targets of links must lie inside it too.
        boxes: Lists of the faces of images, which no detector then searches: CSV of boxes or landmarks, or COCO's JSON.
        boxes_frame: Frame of their coordinates: displayed (EXIF applied), stored, or auto (stored if the size that the
            list gives, or a box outside of the picture, says so).
        boxes_unlisted: Images that no list names: detect (find their faces), or none (a row without a face).
        full_listing_every: Listings of a folder on a disk among which one looks at every file. The others pass over
            folders whose modification time is the same, and do not see a file that was written in its place.
    """

    uri: str = ""
    kind: SourceKind = "auto"
    identity: IdentityRule = "auto"
    label_column: str | int | None = None
    label_prefix: str | None = None
    include: str | tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    name: str | None = None
    root: str | None = None
    boxes: str | tuple[str, ...] = ()
    boxes_frame: BoxesFrame = "auto"
    boxes_unlisted: UnlistedBoxes = "detect"
    full_listing_every: Annotated[int, Field(ge=1)] = 1

    @property
    def lists_of_faces(self) -> tuple[str, ...]:
        """The lists that `boxes` names."""
        return _to_patterns(self.boxes)


def open_source(config: SourceConfig) -> LabelledSource:
    """Open the source that a config describes. Raises SourceError if there is nothing at its uri."""
    # `--set source.label_column=2` is a number, and a single pattern may stand without a list.
    label_column = None if config.label_column is None else str(config.label_column)
    prefix = None if config.label_prefix is None else format_label(config.label_prefix) or ""
    listing = _open_listing(config, label_column)
    listing.name = escape_undecodable(listing.name)
    return LabelledSource(listing, config.identity, prefix)


def _open_listing(config: SourceConfig, label_column: str | None) -> Listing:
    """Open what lists the images of a source."""
    uri = config.uri
    if is_web_url(uri):
        raise SourceError(
            "facepipe reads no http(s) URLs: fetch the images first, or name a bucket (s3://, gs://, az://)"
        )
    kind = _detect_kind(uri) if config.kind == "auto" else config.kind
    # Only sources on a disk are looked up: a glob matches later, and a store is asked by its listing.
    if kind not in ("glob", "object_store") and not may_exist(uri):
        raise SourceError(f"no such file or folder: {uri!r}")

    def make_selection(named: tuple[str, ...] = ()) -> Selection:
        return Selection(_to_patterns(config.include), _to_patterns(config.exclude), named)

    def make_expander(named: tuple[str, ...] = ()) -> Expander:
        takes_verification_sets = kind == "glob"
        selection = make_selection(named)
        return Expander(config.identity, label_column, selection, takes_verification_sets=takes_verification_sets)

    match kind:
        case "list" if is_base64_table(uri):
            return Base64Table(uri, config.identity, config.name, make_selection())
        case "list":
            return ListSource(
                uri,
                config.identity,
                config.name,
                config.root,
                label_column=label_column,
                selection=make_selection(),
            )
        case "parquet":
            return ParquetSource(
                uri, config.identity, config.name, label_column=label_column, selection=make_selection()
            )
        case "object_store":
            return ObjectStoreSource(uri, make_expander(), config.name)
        case "glob":
            return open_glob(uri, make_expander, config.name)
        case _:
            return FolderSource(uri, make_expander(), config.name)


def _to_patterns(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return what may stand without a list as one."""
    return (patterns,) if isinstance(patterns, str) else patterns


def locate_source(config: SourceConfig) -> SourcePlace:
    """Locate the source that a config describes, whether it is there or not."""
    uri = config.uri
    try:
        kind = _detect_kind(uri) if config.kind == "auto" else config.kind
    except SourceError:
        # Nothing is there now. What it was is told from its name.
        kind = "list" if get_extension(uri) in LIST_EXTENSIONS else "folder"
    match kind:
        case "list":
            return place_list(uri, config.root)
        case "parquet":
            return place_parquet(uri, is_open=names_images_elsewhere(uri))
        case "object_store":
            return place_prefix(uri)
        case "glob":
            return place_glob(uri)
        case _:
            return place_folder(uri)


def _detect_kind(uri: str) -> SourceKind:
    """Detect the kind of a source from its uri and from what is there. Raises SourceError if there is nothing."""
    if not uri:
        raise SourceError("no source given")
    # The extension decides before the disk does, because a Parquet file may lie in a store.
    extension = get_extension(uri.rstrip("/"))
    if extension in _TABLE_EXTENSIONS:
        return "parquet"
    if is_remote(uri):
        return "object_store"
    if os.path.isdir(uri):
        return "parquet" if _holds_tables(uri) else "folder"
    if os.path.exists(uri):
        if extension in LIST_EXTENSIONS:
            return "list"
        if extension in (*ARCHIVE_EXTENSIONS, VERIFICATION_EXTENSION) or extension in IMAGE_EXTENSIONS:
            return "glob"
        raise SourceError(
            f"unsupported source {uri!r}: expected a folder, an image, a list ({', '.join(LIST_EXTENSIONS)}), "
            "a .parquet, .tar, .tar.gz, .zip, .rec, .mdb or .bin file"
        )
    if any(character in uri for character in "*?["):
        return "glob"
    raise SourceError(f"no such file or folder: {uri!r}")


def _holds_tables(folder: str, level: int = 0) -> bool:
    """Tell whether a folder holds Parquet or Arrow files, and nothing else that could be a source.

    They may lie below folders such as `identity=ann`, which are columns, and in the folders of a dataset of Hugging
    Face.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in islice(entries, _SAMPLED_FILES)]
    # Hidden files and marks of writers, such as _SUCCESS, say nothing of the kind.
    names = [name for name in names if not name.startswith((".", "_"))]
    if names and level < _MAX_PARTITIONS and all("=" in name for name in names):
        folders = [path for path in (os.path.join(folder, name) for name in names) if os.path.isdir(path)]
        return bool(folders) and _holds_tables(folders[0], level + 1)
    is_dataset = bool(_SAVED_DATASET_FILES.intersection(names)) or "README.md" in names or names == ["data"]
    if is_dataset and level < _MAX_PARTITIONS:
        names = [name for name in names if name not in _DATASET_FILES | _SAVED_DATASET_FILES]
        folders = [path for path in (os.path.join(folder, name) for name in names) if os.path.isdir(path)]
        if folders and len(folders) == len(names):
            return all(_holds_tables(path, level + 1) for path in folders)
    extensions = {get_extension(name) for name in names}
    return bool(extensions) and extensions <= set(_TABLE_EXTENSIONS)
