"""Where images come from: one small module per kind of source, and `open_source`, which picks one from the uri."""

import os
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from facepipe.errors import SourceError
from facepipe.sources.extensions import IMAGE_EXTENSIONS, get_extension, is_web_url
from facepipe.sources.folder import FolderSource
from facepipe.sources.glob import open_glob
from facepipe.sources.identity import IdentityRule
from facepipe.sources.item import Source, WorkItem
from facepipe.sources.list_file import ListSource
from facepipe.sources.object_store import ObjectStoreSource
from facepipe.sources.parquet import ParquetSource
from facepipe.storage import is_remote, may_exist

SourceKind = Literal["auto", "folder", "glob", "object_store", "parquet", "list"]
LIST_EXTENSIONS = ("txt", "csv", "tsv", "lst", "list")
_PARQUET_EXTENSIONS = ("parquet", "pq")
_SAMPLED_FILES = 1000  # of a folder, to see whether it holds Parquet files

__all__ = ["Source", "SourceConfig", "WorkItem", "open_source"]


@dataclass(frozen=True)
class SourceConfig:
    """Where the images are.

    Attributes:
        uri: A folder, a glob, an s3:// prefix, a .parquet file or folder, a .tar, or a list file.
        kind: How to read it; auto decides from the uri.
        identity: Where labels come from: folder, filename (left of the last `_`), label (of the list), none, or auto:
            the list's label, else the folder's name if images lie exactly one folder deep.
        name: Name of the corpus in the gallery's `source` column; by default the last part of the uri.
        root: Folder that a list's paths are relative to; by default the list's own, which they must not lead out of. If
            it is set, absolute paths, URLs and the targets of links must lie inside it too.
    """

    uri: str = ""
    kind: SourceKind = "auto"
    identity: IdentityRule = "auto"
    name: str | None = None
    root: str | None = None


def open_source(config: SourceConfig) -> Source:
    """Open the source that a config describes. Raises SourceError if there is nothing at its uri."""
    uri = config.uri
    if is_web_url(uri):
        raise SourceError(
            "facepipe reads no http(s) URLs: fetch the images first, or name a bucket (s3://, gs://, az://)"
        )
    kind = _detect_kind(uri) if config.kind == "auto" else config.kind
    # Only sources on a disk are looked up: a glob matches later, and a store is asked by its listing.
    if kind not in ("glob", "object_store") and not may_exist(uri):
        raise SourceError(f"no such file or folder: {uri!r}")
    match kind:
        case "list":
            return ListSource(uri, config.identity, config.name, config.root)
        case "parquet":
            return ParquetSource(uri, config.identity, config.name)
        case "object_store":
            return ObjectStoreSource(uri, config.identity, config.name)
        case "glob":
            return open_glob(uri, config.identity, config.name)
        case _:
            return FolderSource(uri, config.identity, config.name)


def _detect_kind(uri: str) -> SourceKind:
    """Detect the kind of a source from its uri and from what is there. Raises SourceError if there is nothing."""
    if not uri:
        raise SourceError("no source given")
    # The extension decides before the disk does, because a Parquet file may lie in a store.
    extension = get_extension(uri.rstrip("/"))
    if extension in _PARQUET_EXTENSIONS:
        return "parquet"
    if is_remote(uri):
        return "object_store"
    if os.path.isdir(uri):
        return "parquet" if _holds_parquet(uri) else "folder"
    if os.path.exists(uri):
        if extension in LIST_EXTENSIONS:
            return "list"
        if extension == "tar" or extension in IMAGE_EXTENSIONS:
            return "glob"
        raise SourceError(
            f"unsupported source {uri!r}: expected a folder, an image, a list ({', '.join(LIST_EXTENSIONS)}), "
            "a .parquet or a .tar file"
        )
    if any(character in uri for character in "*?["):
        return "glob"
    raise SourceError(f"no such file or folder: {uri!r}")


def _holds_parquet(folder: str) -> bool:
    """Tell whether a folder holds Parquet files at its top, and nothing else that could be a source."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in islice(entries, _SAMPLED_FILES)]
    # Hidden files and marks of writers, such as _SUCCESS, say nothing of the kind.
    extensions = {get_extension(name) for name in names if not name.startswith((".", "_"))}
    return bool(extensions) and extensions <= set(_PARQUET_EXTENSIONS)
