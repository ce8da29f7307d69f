"""Write files anew that hold deleted rows, so that these are no longer on disk.

A file is due if many of its rows are deleted, or if the first of them was deleted a while ago. How long ago differs
from file to file: else all files of a table, in which one night has changed rows, would be due in one later night.
"""

import hashlib
import time
from dataclasses import dataclass
from typing import Any

from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.rewrite import COMPACT, Action, make_remove_action, read_rows, write_rows
from facepipe.gallery.maintenance.compact import split_files
from facepipe.gallery.table import Gallery

# A file is due if more of its rows are deleted.
_PURGED_SHARE = 0.1
# A file is due after this part of the days at the earliest, and after that one at the latest. The rest of the days is
# for nights that are left out, and for readers that still have the old file open.
_EARLIEST = 0.5
_LATEST = 0.9
# Bytes that one commit writes anew, so that a crash loses no more.
_PURGED_BYTES = 1 << 30
_MS_PER_DAY = 86_400_000


def find_due_files(gallery: Gallery, days: float, *, everything: bool = False) -> list[dict[str, Any]]:
    """Find the files that hold deleted rows and are due to be written anew, as `Gallery.files` describes them.

    Args:
        gallery: the gallery.
        days: days after which deleted rows must be gone from the table's files.
        everything: whether all files that hold deleted rows are due.
    """
    if not gallery.deleted_rows:
        return []
    now_ms = time.time() * 1000
    due = []
    for file in gallery.files():
        deleted = file["num_records"] - file["rows"]
        if not deleted:
            continue
        age_days = (now_ms - file["modification_time"]) / _MS_PER_DAY
        is_old = age_days >= days * _spread(file["path"])
        if everything or is_old or deleted > _PURGED_SHARE * file["num_records"]:
            due.append(file)
    return sorted(due, key=lambda file: (file["min.uri"] or "", file["path"]))


def _spread(path: str) -> float:
    """Compute after which part of the days a file is due, from its name."""
    digest = hashlib.blake2b(path.encode(), digest_size=4).digest()
    return _EARLIEST + (_LATEST - _EARLIEST) * int.from_bytes(digest) / (1 << 32)


def purge_files(gallery: Gallery, files: list[dict[str, Any]], commit: Committer) -> int:
    """Write files anew without their deleted rows, in several transactions.

    Args:
        gallery: the gallery.
        files: the files, as `Gallery.files` describes them.
        commit: commits the changes.

    Returns:
        How many files were replaced.
    """
    purged = 0
    for group in split_files(files, _PURGED_BYTES):
        purge = _PurgeGroup(gallery.path, [file["path"] for file in group])
        commit.commit_actions(purge, {"job": "compact"})
        purged += purge.files
    return purged


@dataclass
class _PurgeGroup:
    """Makes the actions that replace some files.

    Attributes:
        gallery: path or URL of the gallery.
        paths: paths of the files.
        files: how many of them the last call has replaced.
    """

    gallery: str
    paths: list[str]
    files: int = 0

    def __call__(self) -> list[Action]:
        gallery = Gallery(self.gallery)
        # An erasure, which runs beside, may have written some of them anew.
        present = set(gallery.list_paths())
        paths = [path for path in self.paths if path in present and path in gallery.deleted_rows]
        actions: list[Action] = []
        for path in paths:
            rows = read_rows(gallery, path)
            actions.append(make_remove_action(path, data_change=False))
            if rows.num_rows:
                actions.append(write_rows(gallery, rows, COMPACT, data_change=False)[0])
        self.files = len(paths)
        return actions
