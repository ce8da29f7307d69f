"""Locks on local files, which keep a second run out only if the file system has them.

That is seen, and not assumed: some file systems take locks and ignore them, or keep them to the machine that took them.
"""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from facepipe.errors import StorageError

GUARD = ".guard"
"""Ending of the file beside a local file that its writers lock."""

PROBE = ".probe-"
"""With what the names of files begin that are made to see what a place can do, and deleted at once."""

# Devices whose locks were seen to keep others out.
_proven: set[int] = set()

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


@dataclass(frozen=True)
class _Mount:
    """A mounted file system: where it is, its kind, what it shows, and its options."""

    point: str
    kind: str
    source: str
    options: frozenset[str]


def require_locks(folder: str) -> None:
    """Require that locks on files of a local folder keep others out, on this machine and on others.

    That is looked at once per disk and process. Nothing is left in the folder.

    Raises:
        StorageError: the file system ignores locks, or keeps them to this machine.
        OSError: no file can be made in the folder.
    """
    device = os.stat(folder).st_dev
    if device in _proven:
        return
    problem = find_mount_problem(os.path.realpath(folder), _read_mounts()) or _find_lock_problem(folder)
    if problem:
        raise StorageError(
            f"the file system of {folder!r} {problem}, so two runs could overwrite each other's work "
            "(docs/operations.md)"
        )
    _proven.add(device)


def _find_lock_problem(folder: str) -> str:
    """Lock a new file twice: the second lock must be refused."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=PROBE) as first, open(first.name, "r+b") as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
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
