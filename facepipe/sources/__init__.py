"""Where images come from: one small module each, and `open_source`, which picks one from what the user wrote."""

import os
from dataclasses import dataclass
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

__all__ = ["Source", "SourceConfig", "WorkItem", "open_source"]


@dataclass(frozen=True)
class SourceConfig:
    """Where the images are.

    uri: a folder, a glob, an s3:// prefix, a .parquet file or folder, a .tar, or a list file
    kind: how to read it; auto decides from the uri
    identity: auto (a label of the list, else the folder's name where images lie exactly one folder deep),
        folder, filename (left of the last `_`), label, none
    name: name of the corpus in the gallery's `source` column; by default the last part of the uri
    root: folder that a list's paths are relative to, by default the list's own, which they do not lead out of; where it
        is set, absolute paths, URLs and the targets of links must lie inside it too
    """

    uri: str = ""
    kind: SourceKind = "auto"
    identity: IdentityRule = "auto"
    name: str | None = None
    root: str | None = None


def open_source(config: SourceConfig) -> Source:
    """The source a config describes. Raises SourceError where there is nothing at its uri."""
    uri = config.uri
    if is_web_url(uri):
        raise SourceError(
            "facepipe reads no http(s) URLs: fetch the images first, or name a bucket (s3://, gs://, az://)"
        )
    kind = _kind_of(uri) if config.kind == "auto" else config.kind
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


def _kind_of(uri: str) -> SourceKind:
    if not uri:
        raise SourceError("no source given")
    kind = get_extension(uri.rstrip("/"))
    if kind in ("parquet", "pq"):
        return "parquet"
    if is_remote(uri):
        return "object_store"
    if os.path.isdir(uri):
        return "parquet" if _holds_parquet(uri) else "folder"
    if kind in LIST_EXTENSIONS and os.path.exists(uri):
        return "list"
    if os.path.exists(uri):
        return "glob" if kind in ("tar", *IMAGE_EXTENSIONS) else _refuse(uri)
    if any(c in uri for c in "*?["):
        return "glob"
    raise SourceError(f"no such file or folder: {uri!r}")


def _holds_parquet(folder: str) -> bool:
    """A Parquet folder holds Parquet files at its top and nothing else that could be a source."""
    with os.scandir(folder) as entries:
        kinds = {
            get_extension(e.name)
            for e, _ in zip(entries, range(1000), strict=False)
            if not e.name.startswith((".", "_"))
        }
    return bool(kinds) and kinds <= {"parquet", "pq"}


def _refuse(uri: str) -> SourceKind:
    raise SourceError(
        f"{uri!r} is no folder, and its extension is neither an image's nor that of a list "
        f"({', '.join(LIST_EXTENSIONS)}), a .parquet or a .tar file"
    )
