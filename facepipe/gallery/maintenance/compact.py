"""Compaction: many small files of the table become few large ones; no row changes, and the index is not touched."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.rewrite import COMPACT, Action, make_remove_action, write_rows
from facepipe.gallery.table import Gallery
from facepipe.schema import conform


@dataclass(frozen=True)
class CompactConfig:
    """When files are joined, and what they become.

    target_bytes: of a file; files of less than half of it are joined
    fewest: small files from which it is worth a run
    keep_hours: files that left the table are deleted after this time, for those who still read an older version
    """

    target_bytes: int = 128 << 20
    fewest: int = 32
    keep_hours: float = 24.0


def plan_compaction(gallery: Gallery, config: CompactConfig, everything: bool = False) -> list[list[dict[str, Any]]]:
    """Groups of files to be joined, each of about the target size; none where there are too few small files."""
    small = [file for file in gallery.files() if file["size_bytes"] < config.target_bytes / 2]
    if len(small) < (2 if everything else config.fewest):
        return []
    return list(_groups(sorted(small, key=lambda file: (file["min.uri"] or "", file["path"])), config.target_bytes))


def _groups(files: list[dict[str, Any]], target: int) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for file in files:
        if group and size + file["size_bytes"] > target:
            yield group
            group, size = [], 0
        group.append(file)
        size += file["size_bytes"]
    if len(group) > 1:
        yield group


def compact_files(gallery: Gallery, groups: list[list[dict[str, Any]]], commit: Committer) -> int:
    """Join the groups, a transaction each, so that a crash loses one at most; how many files there are less."""
    for group in groups:
        commit.commit_actions(lambda group=group: _joined(gallery, group), {"job": "compact"})  # type: ignore[misc]
    return sum(len(group) - 1 for group in groups)


def _joined(gallery: Gallery, group: list[dict[str, Any]]) -> list[Action]:
    now = {file["path"] for file in Gallery(gallery.path).files()}
    if not all(file["path"] in now for file in group):
        return []  # another commit took one of them: the next run sees what there is
    rows = pa.concat_tables([_rows(gallery, file["path"]) for file in group]).sort_by("uri")
    action, _ = write_rows(gallery, rows, COMPACT, data_change=False)
    return [*(make_remove_action(file["path"], data_change=False) for file in group), action]


def _rows(gallery: Gallery, path: str) -> pa.Table:
    place = storage.join(gallery.faces_folder, path)
    try:
        with storage.open_seekable(place) as handle:
            return conform(pq.ParquetFile(handle).read())
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {place!r}: {str(error).splitlines()[0]}") from error
