"""WebDataset tar shards: members are found by walking the headers and read later by byte offset, never unpacked."""

import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from facepipe.errors import StorageError
from facepipe.hashing import hash64
from facepipe.sources.identity import Identify
from facepipe.sources.item import WorkItem, broken, file_uri, member_uri
from facepipe.sources.kinds import IMAGE_EXTENSIONS, extension, is_hidden
from facepipe.storage import entry, open_seekable

_LABEL_EXTENSIONS = ("cls", "json")
_LABEL_KEYS = ("identity", "label", "class")
_MAX_LABEL_BYTES = 1 << 20


def tar_items(path: str, identify: Identify) -> Iterator[WorkItem]:
    """Items of one tar; a header that cannot be read ends the shard with an item that says so.

    Labels come from `KEY.cls` or from `identity`, `label` or `class` in `KEY.json` beside `KEY.jpg` (WebDataset).
    A member's name that occurs twice gets `@offset` behind it: both are images, and neither hides the other.
    """
    try:
        shard = entry(path)
        with open_seekable(path) as file, tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            yield from _members(tar, file, file_uri(path), os.fsencode(path), shard.fingerprint, identify)
    except StorageError as error:
        yield broken(path, str(error))
    except (tarfile.TarError, EOFError, OSError) as error:
        yield broken(path, f"tar cannot be read to its end: {error}")


def _members(
    tar: tarfile.TarFile,
    file: BinaryIO,
    container: str,
    path: bytes,
    fingerprint: str,
    identify: Identify,
) -> Iterator[WorkItem]:
    seen: set[int] = set()
    key, label, waiting = "", None, list[tuple[str, WorkItem]]()
    while True:
        try:
            member = tar.next()
        except (tarfile.TarError, EOFError, OSError):
            yield from _labelled(waiting, label, identify)
            raise
        if member is None:
            yield from _labelled(waiting, label, identify)
            _check_end(tar, file)
            return
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has read
        if member.islnk() and extension(member.name) in IMAGE_EXTENSIONS:
            place = member_uri(container, f"{member.name}@{member.offset}")
            yield WorkItem(place, path, listing_error=f"a hard link to the member {member.linkname}")
        if not member.isfile():
            continue
        kind = extension(member.name)
        stem = member.name[: len(member.name) - len(kind) - 1]
        if stem != key:
            yield from _labelled(waiting, label, identify)
            key, label, waiting = stem, None, []
        if kind in _LABEL_EXTENSIONS:
            label = _read_label(file, member, kind) or label
        elif kind in IMAGE_EXTENSIONS and not is_hidden(member.name):
            name = member.name if _first(seen, member.name) else f"{member.name}@{member.offset_data}"
            mark = f"{fingerprint}@{member.offset_data}"
            item = WorkItem(member_uri(container, name), path, member.offset_data, member.size, mark)
            waiting.append((member.name, item))


def _check_end(tar: tarfile.TarFile, file: BinaryIO) -> None:
    """tarfile takes a damaged header for the end of the archive; the real end is a block of zeros and nothing after."""
    file.seek(tar.offset)
    block = file.read(512)
    if len(block) < 512 or any(block):
        raise tarfile.ReadError(f"bad header at byte {tar.offset}")
    while rest := file.read(1 << 16):
        if any(rest):
            raise tarfile.ReadError(f"more data behind the archive's end at byte {tar.offset}")


def _first(seen: set[int], name: str) -> bool:
    mark = hash64(name)
    new = mark not in seen
    seen.add(mark)
    return new


def _labelled(items: list[tuple[str, WorkItem]], label: str | None, identify: Identify) -> Iterator[WorkItem]:
    for name, item in items:
        yield item._replace(identity=identify(name, label))


def _read_label(file: BinaryIO, member: tarfile.TarInfo, kind: str) -> str | None:
    if member.size > _MAX_LABEL_BYTES:
        return None
    here = file.tell()
    file.seek(member.offset_data)
    text = bytes(file.read(member.size)).decode("utf-8", "replace").strip()
    file.seek(here)
    if kind == "cls":
        return text or None
    try:
        fields: Any = json.loads(text)
    except ValueError:
        return None
    found = [fields[key] for key in _LABEL_KEYS if isinstance(fields, dict) and fields.get(key) is not None]
    return str(found[0]) if found else None
