"""What a disk or an object store must be able to do, so that two runs at once cannot undo each other's work.

Both are seen, and not assumed: some stores accept conditions and ignore them, and some file systems do so with locks.
"""

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facepipe.errors import StorageError
from facepipe.storage.atomic import open_for_writing
from facepipe.storage.client import open_bucket
from facepipe.storage.conditional import GUARD, ConflictError, create, write_if
from facepipe.storage.error_text import describe_error
from facepipe.storage.files import delete
from facepipe.storage.urls import is_remote, join, split_url

# Name of the object that is written to see whether a store compares tags.
_PROBE = ".probe-"
# Client of each bucket whose store was seen to compare tags. Another endpoint has another client.
_proven: dict[str, Any] = {}

# Options by which a network file system keeps locks to the machine that takes them.
_LOCAL_LOCKS = {
    "nfs": {"nolock", "local_lock=flock", "local_lock=all"},
    "nfs4": {"nolock", "local_lock=flock", "local_lock=all"},
    "lustre": {"localflock"},
    "gfs2": {"localflocks"},
    "ocfs2": {"localflocks"},
    "cifs": {"nobrl"},
    "smb3": {"nobrl"},
}
# Programs that show a bucket or another machine as a folder: they keep locks to themselves, or do not replace a file in
# one step.
_UNSAFE_MOUNTS = re.compile(r"sshfs|s3fs|mountpoint-s3|mount-s3|gcsfuse|goofys|geesefs|rclone|blobfuse|ossfs|curlftpfs")
_ESCAPE = re.compile(r"\\([0-7]{3})")


def require_safe_writes(path: str) -> None:
    """Require that of several writers at once who replace a file under a condition, only one can succeed.

    Args:
        path: local path or URL of the file or object that is replaced by `conditional.write_if`. The folder of a local
            one must be there.

    Raises:
        StorageError: the store ignores conditions, or the file system ignores locks or keeps them to this machine.
    """
    if is_remote(path):
        _require_conditions(path.rpartition("/")[0])
    else:
        _require_locks(path)


def check_place(folder: str) -> None:
    """Require of a gallery's place all that writing to it needs. Nothing is left there.

    Args:
        folder: path or URL. If a local folder does not exist yet, the nearest one above it is checked.

    Raises:
        StorageError: the place must not hold a gallery, or cannot be written to.
    """
    if is_remote(folder):
        _require_conditions(folder)
        return
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    path = os.path.join(folder, _PROBE + secrets.token_hex(8))
    try:
        _require_locks(path)
        create(path, b"")
    finally:
        for name in (path, path + GUARD):
            with suppress(OSError):
                os.unlink(name)


# ---- object stores


def _require_conditions(prefix: str) -> None:
    """Write a small object to see that the store compares tags, once per bucket and process."""
    bucket = split_url(prefix)[0]
    client = open_bucket(bucket)
    if _proven.get(bucket) is client:
        return
    path = join(prefix, _PROBE + secrets.token_hex(8))
    try:
        _probe_conditions(path)
    finally:
        with suppress(StorageError):  # a bucket that lets nobody delete: what was seen above matters more
            delete(path)
    _proven[bucket] = client


def _probe_conditions(path: str) -> None:
    """Write an object four times: two writes must succeed, and two must be refused."""
    tag = write_if(path, b"first", None)
    _require_conflict(path, b"second", None, "If-None-Match")
    write_if(path, b"third", tag)
    _require_conflict(path, b"fourth", tag, "If-Match")


def _require_conflict(path: str, data: bytes, tag: str | None, header: str) -> None:
    """Write under a condition that does not hold; raise StorageError if the store writes all the same."""
    try:
        write_if(path, data, tag)
    except ConflictError:
        return
    raise StorageError(
        f"the object store of {split_url(path)[0]} ignores {header}, so two runs could overwrite each other's work: "
        "use a store, or a version of it, with conditional writes (docs/operations.md)"
    )


# ---- disks


@dataclass(frozen=True)
class _Mount:
    """A mounted file system: where it is, its kind, what it shows, and its options."""

    point: str
    kind: str
    source: str
    options: frozenset[str]


def _require_locks(path: str) -> None:
    """Require that a lock beside a local file keeps others out, on this machine and on others."""
    mounts = _read_mounts()
    problem = find_mount_problem(os.path.realpath(path), mounts)
    try:
        problem = problem or _find_lock_problem(path + GUARD)
    except OSError as error:
        raise StorageError(f"cannot lock {path + GUARD!r}: {describe_error(error)}") from error
    if problem:
        raise StorageError(
            f"the file system of {os.path.dirname(path)!r} {problem}, so two runs could overwrite each other's work "
            "(docs/operations.md)"
        )


def _find_lock_problem(path: str) -> str:
    """Lock a file twice: the second lock must be refused."""
    with open(open_for_writing(path), "w") as first, open(open_for_writing(path), "w") as second:
        for file in (first, second):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # refused, also if another run holds it: this lock works
                return ""
    return "takes locks and ignores them"


def find_mount_problem(path: str, mounts: str) -> str:
    """Say why the file system of a path must not hold what several machines write; empty if nothing is known.

    Args:
        path: absolute path without links.
        mounts: content of /proc/self/mountinfo.
    """
    # The innermost mount holds the path; of several at one point the last one hides the others.
    mount = _Mount("", "", "", frozenset())
    for candidate in _parse_mounts(mounts):
        inside = f"{path}/".startswith(f"{candidate.point.rstrip('/')}/")
        if inside and len(candidate.point) >= len(mount.point):
            mount = candidate
    wrong = sorted(mount.options & _LOCAL_LOCKS.get(mount.kind, set()))
    if wrong:
        return f"is {mount.kind} mounted with {wrong[0]}, which keeps locks from other machines: mount it without"
    if mount.kind.startswith("fuse") and _UNSAFE_MOUNTS.search(f"{mount.kind} {mount.source}"):
        return f"is {mount.kind} ({mount.source}), which keeps locks from other machines: name the store's own URL"
    return ""


def _parse_mounts(text: str) -> Iterator[_Mount]:
    for line in text.splitlines():
        fields, separator, rest = line.partition(" - ")
        before = fields.split(" ")
        after = rest.split(" ")
        if not separator or len(before) < 6 or len(after) < 3:
            continue
        options = frozenset([*before[5].split(","), *after[2].split(",")])
        yield _Mount(_unescape(before[4]), after[0], _unescape(after[1]), options)


def _unescape(text: str) -> str:
    """Put back the blanks that the kernel writes as octal numbers."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def _read_mounts() -> str:
    """Read what is mounted; empty on a system that does not say."""
    with suppress(OSError):
        return Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    return ""
