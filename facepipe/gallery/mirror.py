"""Folders of a gallery in an object store, as files of this machine: fetched when needed, uploaded when made.

faiss and memory maps want files. For a gallery on a disk the folder is the gallery's own, and nothing is done here.
"""

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.gallery.lock import GUARD, NAME
from facepipe.hashing import hash64

_ORIGIN, _TAGS = ".origin", ".tags"
_PIECE = 64 << 20
PRIVATE = {_ORIGIN, _TAGS, NAME, GUARD}


def cache() -> str:
    """Where mirrors lie: FACEPIPE_CACHE, by default ~/.cache/facepipe."""
    return os.environ.get("FACEPIPE_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "facepipe")


def folder(gallery: str, name: str) -> str:
    """The folder `name` of a gallery on this machine: the gallery's own, or its mirror (made if there is none)."""
    if not storage.is_remote(gallery):
        return storage.join(gallery, name)
    held = os.path.join(cache(), f"{hash64(gallery.rstrip('/')):016x}")
    place = os.path.join(held, name)
    try:
        os.makedirs(cache(), mode=0o700, exist_ok=True)
        _private(held)
        os.makedirs(place, mode=0o700, exist_ok=True)
        Path(place, _ORIGIN).write_text(storage.join(gallery, name))
    except OSError as error:
        raise StorageError(
            f"cannot keep a copy of {gallery!r} in {place!r} (FACEPIPE_CACHE): {storage.reason(error)}"
        ) from error
    return place


def _private(folder: str) -> None:
    """Make a folder that nobody else can look into; one that somebody else made first is refused."""
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    info = os.lstat(folder)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise StorageError(f"{folder!r} is no folder of yours: have FACEPIPE_CACHE name a place that is")
    if info.st_mode & 0o077:
        os.chmod(folder, 0o700)


def _within(place: str, name: str) -> str:
    """The path of a mirror's file. Names come from a manifest that anyone may have written."""
    path = os.path.join(place, name)
    if not os.path.abspath(path).startswith(os.path.abspath(place) + os.sep):
        raise StorageError(f"{name!r} names no file of {origin(place) or place!r}")
    return path


def origin(place: str) -> str | None:
    """The prefix that a folder mirrors; None for a folder that is no mirror."""
    with suppress(OSError):
        return Path(place, _ORIGIN).read_text()
    return None


def fetch(place: str, name: str, size: int, sha256: str) -> None:
    """Fetch one file of a mirror, in pieces, if it is not there; what arrives damaged is refused."""
    remote, path = origin(place), _within(place, name)
    if remote is None or os.path.exists(path):
        return
    digest = hashlib.sha256()
    partial = f"{path}.{secrets.token_hex(4)}.part"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(partial, "wb") as file:
            for data in _pieces(storage.join(remote, name), size):
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != sha256:
            raise StorageError(f"{storage.join(remote, name)!r} is not what was written: its checksum differs")
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {storage.reason(error)}") from error
    finally:
        with suppress(OSError):
            os.unlink(partial)


def digest_there(place: str, name: str) -> tuple[int, str]:
    """(bytes, SHA-256) of a mirror's file as it is in the store."""
    remote = storage.join(origin(place) or place, name)
    size, digest = storage.entry(remote).size, hashlib.sha256()
    for data in _pieces(remote, size):
        digest.update(data)
    return size, digest.hexdigest()


def _pieces(path: str, size: int) -> Iterator[bytes]:
    for at in range(0, size, _PIECE):
        yield storage.read(path.encode(), at, min(_PIECE, size - at))


def upload(place: str, names: Iterable[str]) -> None:
    """Upload files of a mirror; files that are folders stand for all that is in them. Nothing to do for no mirror."""
    remote = origin(place)
    if remote is None:
        return
    for name in names:
        path = _within(place, name)
        inner = [f"{name}/{other}" for other in sorted(os.listdir(path))] if os.path.isdir(path) else None
        if inner is None:
            storage.write_file(storage.join(remote, name), path)
        else:
            upload(place, inner)


def pull(place: str) -> None:
    """Make a mirror what its prefix is: fetch what is new or has changed, delete what is gone."""
    remote = origin(place)
    if remote is None:
        return
    tags, held = _tags(place), {}
    for found in storage.list_prefix(remote.rstrip("/") + "/"):
        name = found.url.removeprefix(remote.rstrip("/") + "/")
        if name in PRIVATE or name.split("/")[0] in PRIVATE:
            continue
        path, held[name] = _within(place, name), found.fingerprint
        if tags.get(name) != found.fingerprint or not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).write_bytes(storage.read(found.url.encode()))
    for name in tags.keys() - held.keys():
        with suppress(OSError):
            os.unlink(_within(place, name))
    Path(place, _TAGS).write_text(json.dumps(held))


def push(place: str, last: str = "") -> None:
    """Make a prefix what its mirror is; the file `last` goes last, for readers that look for it first."""
    remote = origin(place)
    if remote is None:
        return
    names = sorted(_names(place), key=lambda name: (name == last, name))
    upload(place, names)
    kept = set(names)
    held = {}
    for found in list(storage.list_prefix(remote.rstrip("/") + "/")):
        name = found.url.removeprefix(remote.rstrip("/") + "/")
        if name in kept:
            held[name] = found.fingerprint
        elif name.split("/")[0] not in PRIVATE:
            storage.delete(found.url)
    Path(place, _TAGS).write_text(json.dumps(held))


def _names(place: str) -> list[str]:
    found = (os.path.relpath(entry.url, place) for entry in storage.files_in(place))
    return [name for name in found if name not in PRIVATE]


def _tags(place: str) -> dict[str, str]:
    with suppress(OSError, ValueError):
        tags: dict[str, str] = json.loads(Path(place, _TAGS).read_text())
        return tags
    return {}


def forget(gallery: str) -> None:
    """Delete this machine's copies of a gallery in an object store."""
    if storage.is_remote(gallery):
        shutil.rmtree(os.path.dirname(folder(gallery, "index")), ignore_errors=True)
