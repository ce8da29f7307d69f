"""Compaction: join many small files of the table to few large ones, and fold marks into rows.

What this package reads of the table stays the same, and the index is not touched.

Files of different sources are not joined, so that a source can be erased without writing rows of others anew. Files of
a source with a retention are joined in the order of their times: what falls due is then in few files, and most of them
go as a whole.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from deltalake.transaction import AddAction

from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.rewrite import (
    COMPACT,
    MOST_MARKS,
    Action,
    Rewrite,
    make_remove_action,
    plan_rewrite_of_uris,
    read_rows,
    rewrite_files,
    write_rows,
)
from facepipe.gallery.table import Gallery

# Marks are folded into the rows if they concern more than this share of them. The table is then written anew once in as
# many nights as it takes to mark that many, instead of every night.
_FOLDED_SHARE = 0.02
# Marks are folded into files of about this size per commit, so that a crash loses no more.
_FOLDED_BYTES = 1 << 30
# Sources that are kept apart at most.
_MOST_SOURCES = 256

FileGroup = list[dict[str, Any]]
"""Files, as `Gallery.files` describes them, that are joined to one."""


@dataclass(frozen=True)
class CompactConfig:
    """When files are joined, and to what.

    Attributes:
        target_bytes: Size of a joined file; files of less than half of it are joined.
        fewest: Small files from which a run is worth its cost.
        keep_hours: Hours after which files that left the table are deleted; readers of an older version have so long.
        purge_days: Days after which rows that were replaced or relabelled are gone from the disk, if compaction is run
            every day.
    """

    target_bytes: int = 128 << 20
    fewest: int = 32
    keep_hours: float = 24.0
    purge_days: float = 30.0


def plan_compaction(
    gallery: Gallery, config: CompactConfig, everything: bool = False, dated: Collection[str] = ()
) -> list[FileGroup]:
    """Group the files to be joined, each group of about the target size.

    Args:
        gallery: the gallery.
        config: sizes and counts.
        everything: join from two small files on.
        dated: names of sources with a retention.

    Returns:
        The groups; none if there are too few small files.
    """
    # Files of half the target or more are left: joining them would write much for little.
    small = [file for file in gallery.files() if file["size_bytes"] < config.target_bytes / 2]
    by_source = _split_by_source(small)
    # One small file per source may be left over, whatever is joined.
    surplus = len(small) - len(by_source)
    if surplus < (1 if everything else max(1, config.fewest - 1)):
        return []
    groups: list[FileGroup] = []
    for source, files in by_source.items():
        key = _get_time_key if source in dated else _get_uri_key
        groups += _group_files(sorted(files, key=key), config.target_bytes)
    return groups


def _split_by_source(files: FileGroup) -> dict[str, FileGroup]:
    """Split files by the source of all their rows. Files of several or unknown sources are a part of their own.

    Of very many sources all are one part: each would leave a small file.
    """
    parts: dict[str, FileGroup] = {}
    for file in files:
        source: str | None = file.get("min.source")
        is_one = source == file.get("max.source")
        parts.setdefault(source if source and is_one else "", []).append(file)
    return parts if len(parts) <= _MOST_SOURCES else {"": files}


def _get_uri_key(file: dict[str, Any]) -> tuple[str, str]:
    # Neighbours by uri make a joined file with a narrow range of uris, which filters can skip.
    return file["min.uri"] or "", file["path"]


def _get_time_key(file: dict[str, Any]) -> tuple[str, str]:
    return str(file.get("min.ingested_at") or ""), file["path"]


def _group_files(files: FileGroup, target_bytes: int) -> Iterator[FileGroup]:
    # A group of one file would be written anew for nothing.
    yield from (group for group in split_files(files, target_bytes) if len(group) > 1)


def split_files(files: FileGroup, target_bytes: int) -> Iterator[FileGroup]:
    """Split files into groups of consecutive ones, of about a size."""
    group: FileGroup = []
    size = 0
    for file in files:
        if group and size + file["size_bytes"] > target_bytes:
            yield group
            group = []
            size = 0
        group.append(file)
        size += file["size_bytes"]
    if group:
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
    current = Gallery(gallery.path)
    paths = set(current.list_paths())
    if not all(file["path"] in paths for file in group):
        return []  # another commit removed one of them: the next run starts from what is there
    rows = pa.concat_tables([read_rows(current, file["path"]) for file in group]).sort_by("uri")
    action, _ = write_rows(current, rows, COMPACT, data_change=False)
    return [*(make_remove_action(file["path"], data_change=False) for file in group), action]


def fold_marks(gallery: Gallery, commit: Committer, everything: bool = False) -> int:
    """Fold marks into the rows that they belong to, if there are many. Other programs then see what the marks say.

    Args:
        gallery: the gallery.
        commit: commits the change, in several transactions.
        everything: fold them even if there are few.

    Returns:
        How many files were written anew.
    """
    if not needs_folding(gallery, everything=everything):
        return 0
    uris = gallery.marks.images["uri"]
    plan = plan_rewrite_of_uris(uris.to_pylist(), lambda rows, mask: rows, data_change=False)
    files = [file for file in gallery.files() if plan.may_match(file)]
    by_uri = sorted(files, key=lambda file: (file["min.uri"] or "", file["path"]))
    folded = 0
    for group in split_files(by_uri, _FOLDED_BYTES):
        fold = _FoldGroup(gallery.path, plan, frozenset(file["path"] for file in group))
        commit.commit_actions(fold, {"job": "compact"})
        folded += fold.files
    return folded


class _FoldGroup:
    """Makes the actions that fold marks into some files.

    Attributes:
        files: How many files the last call has written anew.
    """

    def __init__(self, gallery: str, plan: Rewrite, paths: frozenset[str]):
        self.files = 0
        self._gallery = gallery
        self._plan = replace(plan, may_match=lambda file: file["path"] in paths)

    def __call__(self) -> list[Action]:
        actions = list(rewrite_files(Gallery(self._gallery), self._plan))
        self.files = sum(isinstance(action, AddAction) for action in actions)
        return actions


def needs_folding(gallery: Gallery, *, everything: bool = False) -> bool:
    """Tell whether a gallery has so many marks that they are folded into its rows.

    Args:
        gallery: the gallery.
        everything: whether a few are enough.
    """
    count = len(gallery.marks)
    rows = gallery.count_totals().rows
    return count > 0 and (everything or count > _FOLDED_SHARE * rows or count > MOST_MARKS / 2)
