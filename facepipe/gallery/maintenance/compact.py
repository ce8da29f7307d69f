"""Compaction: join many small files of the table to few large ones. No row changes, and the index is not touched."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.rewrite import COMPACT, Action, make_remove_action, read_rows, write_rows
from facepipe.gallery.table import Gallery

FileGroup = list[dict[str, Any]]
"""Files, as `Gallery.files` describes them, that are joined to one."""


@dataclass(frozen=True)
class CompactConfig:
    """When files are joined, and to what.

    Attributes:
        target_bytes: Size of a joined file; files of less than half of it are joined.
        fewest: Small files from which a run is worth its cost.
        keep_hours: Hours after which files that left the table are deleted; readers of an older version have so long.
    """

    target_bytes: int = 128 << 20
    fewest: int = 32
    keep_hours: float = 24.0


def plan_compaction(gallery: Gallery, config: CompactConfig, everything: bool = False) -> list[FileGroup]:
    """Group the files to be joined, each group of about the target size.

    Args:
        gallery: the gallery.
        config: sizes and counts.
        everything: join from two small files on.

    Returns:
        The groups; none if there are too few small files.
    """
    # Files of half the target or more are left: joining them would write much for little.
    small = [file for file in gallery.files() if file["size_bytes"] < config.target_bytes / 2]
    if len(small) < (2 if everything else config.fewest):
        return []
    # Neighbours by uri make a joined file with a narrow range of uris, which filters can skip.
    by_uri = sorted(small, key=lambda file: (file["min.uri"] or "", file["path"]))
    return list(_group_files(by_uri, config.target_bytes))


def _group_files(files: FileGroup, target_bytes: int) -> Iterator[FileGroup]:
    group: FileGroup = []
    size = 0
    for file in files:
        if group and size + file["size_bytes"] > target_bytes:
            yield group
            group = []
            size = 0
        group.append(file)
        size += file["size_bytes"]
    # A last group of one file would be written anew for nothing.
    if len(group) > 1:
        yield group


def compact_files(gallery: Gallery, groups: list[FileGroup], commit: Committer) -> int:
    """Join groups of files, one transaction each, so that a crash loses one at most.

    Returns:
        By how many files the table shrinks.
    """
    for group in groups:
        commit.commit_actions(lambda group=group: _join_group(gallery, group), {"job": "compact"})  # type: ignore[misc]
    return sum(len(group) - 1 for group in groups)


def _join_group(gallery: Gallery, group: FileGroup) -> list[Action]:
    """Write one file with the rows of a group; return the actions that replace the group by it."""
    paths = {file["path"] for file in Gallery(gallery.path).files()}
    if not all(file["path"] in paths for file in group):
        return []  # another commit removed one of them: the next run starts from what is there
    rows = pa.concat_tables([read_rows(gallery, file["path"]) for file in group]).sort_by("uri")
    action, _ = write_rows(gallery, rows, COMPACT, data_change=False)
    return [*(make_remove_action(file["path"], data_change=False) for file in group), action]
