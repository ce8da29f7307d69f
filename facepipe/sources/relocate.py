"""From the uri that a gallery holds back to the work item: where the image's bytes are now."""

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from facepipe.sources.item import WorkItem
from facepipe.sources.parquet import ParquetSource
from facepipe.sources.tar import list_tar_items

_MEMBER = re.compile(r"(.*?\.(tar|parquet|pq))#.*", re.IGNORECASE | re.DOTALL)


class ImageLocator:
    """Finds images again; of tar and Parquet files the listing of the last one is held.

    An image that its container no longer holds gets an item that says so, and with it a status when it is read.
    """

    def __init__(self) -> None:
        self._container, self._members = "", dict[str, WorkItem]()

    def locate_image(self, uri: str, fingerprint: str | None = None) -> WorkItem:
        """Where the image is; its label is left out. fingerprint: of a file, what it was when it was listed."""
        found = _MEMBER.fullmatch(uri) if not uri.startswith("file://") or "#" in uri else None
        if found is None:
            return WorkItem(uri, _path(uri), fingerprint=fingerprint)
        container, kind = found[1], found[2].lower()
        if container != self._container:
            items = _tar(container) if kind == "tar" else iter(ParquetSource(os.fsdecode(_path(container)), "none"))
            self._container, self._members = container, {item.uri: item for item in items}
        gone = WorkItem(uri, _path(container), listing_error="no longer in its container")
        return self._members.get(uri, gone)._replace(identity=None)


def _tar(container: str) -> Iterator[WorkItem]:
    return list_tar_items(os.fsdecode(_path(container)), lambda path, label: None)


def _path(uri: str) -> bytes:
    return unquote_to_bytes(uri.removeprefix("file://")) if uri.startswith("file://") else os.fsencode(uri)
