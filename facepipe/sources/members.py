"""Images in containers that a list names, as `train.rec#12`: each container is listed once, in its own order."""

import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from urllib.parse import unquote_to_bytes

import numpy as np

from facepipe.hashing import hash64, hash64_each
from facepipe.sorted_lookup import find_sorted
from facepipe.sources.containers.base64_table import Base64Table
from facepipe.sources.containers.lmdb_file import LmdbReader
from facepipe.sources.containers.record_io import RecordReader
from facepipe.sources.containers.verification_set import list_verification_images
from facepipe.sources.containers.zip_archive import ZipReader
from facepipe.sources.extensions import CONTAINER_PATTERN, get_extension
from facepipe.sources.item import WorkItem, make_broken_item, make_file_uri
from facepipe.sources.parquet import ParquetSource
from facepipe.sources.selection import Selection
from facepipe.sources.tar import TarReader

_MEMBER = re.compile(rf"(.*?\.(?:{CONTAINER_PATTERN}))#(.*)", re.IGNORECASE | re.DOTALL)
_BLOCK_ITEMS = 8192  # looked up at a time


def split_member(name: str) -> tuple[str, str] | None:
    """Split a path or uri into that of a container and the member's name; None if it names no member."""
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2]) if match else None


def list_container(path: str) -> Iterator[WorkItem]:
    """List all images of a container, without labels.

    Args:
        path: local path or URL.
    """
    selection = Selection(system_folders=True)
    match get_extension(path):
        case "tar" | "tar.gz" | "tgz":
            return TarReader(_identify_nobody, selection=selection).list_items(path)
        case "zip":
            return ZipReader(_identify_nobody, selection=selection).list_items(path)
        case "mdb":
            return LmdbReader(_identify_nobody, selection=selection).list_items(path)
        case "rec":
            return RecordReader(_identify_nobody).list_items(path)
        case "bin":
            return list_verification_images(path)
        case "tsv":
            return iter(Base64Table(path, "none", None, selection))
        case _:
            return iter(ParquetSource(path, "none"))


def _identify_nobody(path: str, label: object) -> None:
    return None


@dataclass
class _Requested:
    """The members of one container that a list names.

    Attributes:
        hashes: Hash of each uri.
        identities: Label of each.
    """

    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    identities: list[str | None] = field(default_factory=list)


class MemberRequests:
    """The members that a list names, some twenty bytes each."""

    def __init__(self) -> None:
        self._containers: dict[bytes, _Requested] = {}
        self._shared: dict[str | None, str | None] = {}  # equal labels are kept once

    def add(self, path: bytes, member: str, identity: str | None) -> None:
        """Add a member.

        Args:
            path: path or URL of the container.
            member: name of the member, as in the uri of a gallery.
            identity: label.
        """
        requested = self._containers.setdefault(path, _Requested())
        requested.hashes.append(hash64(f"{make_file_uri(path)}#{member}"))
        requested.identities.append(self._shared.setdefault(identity, identity))

    def list_items(self) -> Iterator[WorkItem]:
        """Yield the items of all members, container by container. What is not there becomes an item that says so."""
        for path, requested in self._containers.items():
            hashes = np.frombuffer(requested.hashes, np.uint64)
            order = np.argsort(hashes, kind="stable")
            ordered = hashes[order]
            is_found = np.zeros(len(ordered), bool)
            items = list_container(os.fsdecode(path))
            while block := list(islice(items, _BLOCK_ITEMS)):
                # What cannot be listed at all is a row, whether it was named or not.
                yield from (item for item in block if item.listing_error is not None)
                at = find_sorted(ordered, hash64_each([item.uri for item in block]))
                for item, position in zip(block, at.tolist(), strict=True):
                    if position >= 0 and item.listing_error is None:
                        is_found[position] = True
                        yield item._replace(identity=requested.identities[order[position]])
            # Of a member that is named twice the first one counts.
            is_first = np.diff(ordered, prepend=ordered[:1] - np.uint64(1)) != 0
            missing = int((is_first & ~is_found).sum())
            if missing:
                yield make_broken_item(path, f"{missing} images that the list names are not in it", "missing")


def locate_container(uri: str) -> bytes:
    """Return the path of a file or container from its uri, without the `#` and the name of a member."""
    return unquote_to_bytes(uri.removeprefix("file://")) if uri.startswith("file://") else os.fsencode(uri)
