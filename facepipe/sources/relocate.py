"""From the uri in a gallery back to the work item: where the image's bytes are now."""

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from facepipe.sources.containers.record_io import RecordReader
from facepipe.sources.containers.verification_set import list_verification_images
from facepipe.sources.containers.zip_archive import ZipReader
from facepipe.sources.extensions import CONTAINER_PATTERN
from facepipe.sources.item import WorkItem
from facepipe.sources.parquet import ParquetSource
from facepipe.sources.selection import Selection
from facepipe.sources.tar import TarReader

# The uri of a member: the container, its extension, and # before the name.
_MEMBER = re.compile(rf"(.*?\.({CONTAINER_PATTERN}))#.*", re.IGNORECASE | re.DOTALL)


class ImageLocator:
    """Locates images by their uris. The listing of the last tar or Parquet file is kept.

    An image that is no longer in its container gets an item that says so, and with it a status when it is read.
    """

    def __init__(self) -> None:
        self._container = ""
        self._members: dict[str, WorkItem] = {}

    def locate_image(self, uri: str, fingerprint: str | None = None) -> WorkItem:
        """Locate an image; its item has no label.

        Args:
            uri: the uri of the image.
            fingerprint: the fingerprint of its file when it was listed.
        """
        # A file:// URL without # names a file whose path only looks like a member.
        match = _MEMBER.fullmatch(uri) if not uri.startswith("file://") or "#" in uri else None
        if match is None:
            return WorkItem(uri, _to_path(uri), fingerprint=fingerprint)
        container = match[1]
        # Neighbouring uris are mostly of the same container, so the last listing is kept.
        if container != self._container:
            items = _list_container(container, match[2].lower())
            self._members = {item.uri: item for item in items}
            self._container = container
        missing = WorkItem(uri, _to_path(container), listing_error="no longer in its container")
        return self._members.get(uri, missing)._replace(identity=None)


def _list_container(container: str, extension: str) -> Iterator[WorkItem]:
    path = os.fsdecode(_to_path(container))
    selection = Selection(system_folders=True)
    match extension:
        case "tar":
            return TarReader(_identify_nobody, selection=selection).list_items(path)
        case "zip":
            return ZipReader(_identify_nobody, selection=selection).list_items(path)
        case "rec":
            return RecordReader(_identify_nobody).list_items(path)
        case "bin":
            return list_verification_images(path)
        case _:
            return iter(ParquetSource(path, "none"))


def _identify_nobody(path: str, label: object) -> None:
    return None


def _to_path(uri: str) -> bytes:
    return unquote_to_bytes(uri.removeprefix("file://")) if uri.startswith("file://") else os.fsencode(uri)
