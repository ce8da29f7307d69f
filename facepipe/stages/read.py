"""Read: from work items to bytes and content hashes."""

import os
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.arrow import pack_arrays, set_columns
from facepipe.errors import ConfigError, MissingPackageError, StorageError
from facepipe.hashing import compute_image_id, hash64
from facepipe.schema import OK, READ_ERROR, REPLACED, TOO_LARGE, TOUCHED, UNCHANGED
from facepipe.sources.containers.gzip_stream import MemberReader, is_packed_tar
from facepipe.sources.containers.unpack import unpack_member
from facepipe.sources.parquet import find_bytes_column, get_first_line
from facepipe.stages.ranges import Container, RangeReader

# Rows of a Parquet file in memory at a time.
_BATCH_ROWS = 16
# What an item whose size is not known before it is read counts for.
_UNKNOWN_BYTES = 1 << 20
_MAX_DIGITS = 19


class ReadResult(NamedTuple):
    """What reading a work item gives.

    Attributes:
        data: bytes of the image, or None
        status: as in the gallery
        error: reason, if the item could not be read
    """

    data: bytes | None
    status: str
    error: str | None = None


class ParquetCursor:
    """A cursor over the bytes column of a Parquet file. It reads ascending rows without starting again.

    Attributes:
        path: path or URL of the file.
        fingerprint: fingerprint of the file that was opened; another one may have its name by now.
    """

    def __init__(self, path: bytes):
        self.path = path
        self._handle = storage.open_seekable(path)
        self.fingerprint = storage.get_open_fingerprint(self._handle)
        # The file is closed too if it turns out to be damaged.
        weakref.finalize(self, self._handle.close)
        self._file = pq.ParquetFile(self._handle)
        self._column = find_bytes_column(self._file.schema_arrow)
        self._seek(0)

    def _seek(self, row: int) -> None:
        """Go to the start of the row group that holds a row. The batch in memory is empty then."""
        group = min(self._find_group(row), max(0, self._file.num_row_groups - 1))
        # Number of the first row of the group; `_start` and `_values` always describe the batch in memory.
        self._start = sum(self._file.metadata.row_group(earlier).num_rows for earlier in range(group))
        groups = list(range(group, self._file.num_row_groups))
        self._batches = self._file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[self._column])
        self._values: pa.Array = pa.array([], pa.binary())

    def read(self, rows: list[int]) -> dict[int, bytes]:
        """Read rows of the file.

        Args:
            rows: ascending row numbers.

        Returns:
            Bytes by row number. Rows without bytes, or beyond the end of the file, are left out.
        """
        # Start again if the rows lie behind, or if whole row groups can be skipped.
        if rows[0] < self._start or self._find_group(rows[0]) > self._find_group(self._start + len(self._values)):
            self._seek(rows[0])
        data: dict[int, bytes] = {}
        requested = set(rows)
        while True:
            end = self._start + len(self._values)
            for row in requested.intersection(range(self._start, end)):
                if self._values[row - self._start].is_valid:
                    data[row] = self._values[row - self._start].as_py()
            # The batch is kept: the next requested rows may begin inside it.
            if rows[-1] < end:
                return data
            batch = next(self._batches, None)
            if batch is None:
                return data
            # Images may be a struct of bytes and path, or plain bytes.
            column = batch.column(0)
            self._start = end
            self._values = column.field("bytes") if pa.types.is_struct(column.type) else column

    def _find_group(self, row: int) -> int:
        """Find the row group of a row; for rows beyond the end, return the number of groups."""
        end = 0
        for group in range(self._file.num_row_groups):
            end += self._file.metadata.row_group(group).num_rows
            if row < end:
                return group
        return self._file.num_row_groups

    def require_unchanged(self) -> None:
        """Raise ReplacedError if the open file was written in its place."""
        if storage.get_open_fingerprint(self._handle) != self.fingerprint:
            raise storage.ReplacedError("the file was written while it was read")

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


@dataclass(frozen=True)
class Read:
    """Read files, byte ranges (members of tar files), rows of Parquet files, and objects.

    Attributes:
        max_bytes: maximum size of an image; larger ones become `too_large` without being read
        threads: parallel reads from an object store; local files are read one after the other, and members of a tar in
            ranges of up to 32 MiB
    """

    max_bytes: int = 256 << 20
    threads: int = 16

    needs: ClassVar = ("path", "offset", "length", "fingerprint", "listing_error", "previous")
    adds: ClassVar = ("bytes", "image_id", "status", "error")

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, "read")

    @cached_property
    def _cursors(self) -> dict[bytes, ParquetCursor]:
        return {}

    @cached_property
    def _packed_tars(self) -> MemberReader:
        return MemberReader()

    @cached_property
    def _ranges(self) -> RangeReader:
        return RangeReader(self._pool)

    def setup(self) -> None:
        """Do nothing: there is nothing to load."""

    def prepare(self, table: pa.Table) -> None:
        """Plan how to read the members of archives among work items that will be read in batches."""
        members: dict[Container, list[tuple[int, int]]] = defaultdict(list)
        columns = (table[name].to_pylist() for name in ("path", "offset", "length", "fingerprint", "listing_error"))
        for path, offset, length, fingerprint, listing_error in zip(*columns, strict=True):
            is_member = offset is not None and length is not None and length <= self.max_bytes
            if is_member and not listing_error and not is_packed_tar(path):
                members[Container(path, get_container_fingerprint(fingerprint))].append((offset, length))
        # A single member is read by itself.
        self._ranges.plan({container: places for container, places in members.items() if len(places) > 1})

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace the columns of work items by bytes, content hashes and statuses."""
        items = table.select(list(self.needs)).to_pylist()
        # Rows of Parquet files are read file by file, everything else item by item.
        results_by_row = self._read_parquet_rows(items)
        results_by_row |= self._read_packed_members(items)
        results_by_row |= self._read_planned_members(items)
        pending = [row for row in range(len(items)) if row not in results_by_row]
        is_parallel = len(pending) > 1 and any(storage.is_remote(items[row]["path"]) for row in pending)
        run_map = self._pool.map if is_parallel else map
        read_items = list(run_map(self._read_item, [items[row] for row in pending]))
        results_by_row |= dict(zip(pending, read_items, strict=True))
        results = [_skip_unchanged(results_by_row[row], item["previous"]) for row, item in enumerate(items)]
        # Images that are skipped or failed have neither a hash nor bytes.
        image_ids = [None if result.data is None else compute_image_id(result.data) for result in results]
        columns = {
            "bytes": pack_arrays([result.data if result.status == OK else None for result in results]),
            "image_id": pa.array(image_ids, pa.string()),
            "status": pa.array([result.status for result in results], pa.string()),
            "error": pa.array([result.error for result in results], pa.string()),
        }
        # The fingerprint goes on into the gallery.
        return set_columns(table, columns, drop=[name for name in self.needs if name != "fingerprint"])

    def estimate_bytes(self, table: pa.Table) -> list[int]:
        """Estimate how many bytes each item has; 0 for those too large to be read."""
        sizes = []
        for length, fingerprint, offset in zip(
            *(table[name].to_pylist() for name in ("length", "fingerprint", "offset")), strict=True
        ):
            # The fingerprint of a file begins with its size, that of a container's member with the container's.
            size = length
            if size is None and offset is None and fingerprint:
                text = fingerprint.partition("-")[0]
                size = int(text) if text.isdecimal() and len(text) < _MAX_DIGITS else None
            size = _UNKNOWN_BYTES if size is None else size
            sizes.append(size if size <= self.max_bytes else 0)
        return sizes

    def _read_item(self, item: dict[str, Any]) -> ReadResult:
        """Read a file, a range of it, or an object."""
        if item["listing_error"]:
            return ReadResult(None, READ_ERROR, item["listing_error"])
        # A member's place is known in the tar that was listed only. A file of its own may be newer than its listing.
        expected = None if item["offset"] is None else get_container_fingerprint(item["fingerprint"])
        try:
            data = storage.read(item["path"], item["offset"], item["length"], self.max_bytes, expected)
            if item["offset"] is not None:
                data = unpack_member(os.fsdecode(item["path"]), data, self.max_bytes)
            return ReadResult(data, OK)
        except storage.TooLargeError as error:
            return ReadResult(None, TOO_LARGE, str(error))
        except storage.ReplacedError as error:
            return ReadResult(None, REPLACED, str(error))
        except (StorageError, ConfigError, MissingPackageError) as error:
            # A list of files may hold a URL without a bucket, or of a store whose client is not installed.
            return ReadResult(None, READ_ERROR, str(error))

    def _read_packed_members(self, items: list[dict[str, Any]]) -> dict[int, ReadResult]:
        """Read the items that are members of packed tars, tar by tar and in the order of their places.

        Returns:
            Results by the item's position in `items`.
        """
        places = [
            (item["path"], item["offset"], position)
            for position, item in enumerate(items)
            if item["offset"] is not None and not item["listing_error"] and is_packed_tar(item["path"])
        ]
        results: dict[int, ReadResult] = {}
        for path, offset, position in sorted(places):
            length = items[position]["length"]
            fingerprint = get_container_fingerprint(items[position]["fingerprint"])
            try:
                data = self._packed_tars.read(path, offset, length, self.max_bytes, fingerprint)
                results[position] = ReadResult(data, OK)
            except storage.TooLargeError as error:
                results[position] = ReadResult(None, TOO_LARGE, str(error))
            except storage.ReplacedError as error:
                results[position] = ReadResult(None, REPLACED, str(error))
            except (StorageError, ConfigError, MissingPackageError) as error:
                results[position] = ReadResult(None, READ_ERROR, str(error))
        return results

    def _read_planned_members(self, items: list[dict[str, Any]]) -> dict[int, ReadResult]:
        """Read the items that are members of archives, and whose ranges are planned.

        Returns:
            Results by the item's position in `items`.
        """
        results: dict[int, ReadResult] = {}
        for position, item in enumerate(items):
            if item["offset"] is None or item["length"] is None or item["listing_error"]:
                continue
            if is_packed_tar(item["path"]):
                continue
            container = Container(item["path"], get_container_fingerprint(item["fingerprint"]))
            try:
                data = self._ranges.read(container, item["offset"], item["length"])
                if data is None:
                    continue
                data = unpack_member(os.fsdecode(item["path"]), data, self.max_bytes)
                results[position] = ReadResult(data, OK)
            except storage.TooLargeError as error:
                results[position] = ReadResult(None, TOO_LARGE, str(error))
            except storage.ReplacedError as error:
                results[position] = ReadResult(None, REPLACED, str(error))
            except StorageError as error:
                results[position] = ReadResult(None, READ_ERROR, str(error))
        return results

    def _read_parquet_rows(self, items: list[dict[str, Any]]) -> dict[int, ReadResult]:
        """Read the items that are rows of Parquet files, file by file.

        Returns:
            Results by the item's position in `items`.
        """
        # A row of a Parquet file has its number in `offset` and no `length`.
        positions_by_file: dict[tuple[bytes, str | None], dict[int, int]] = defaultdict(dict)
        for position, item in enumerate(items):
            if item["offset"] is not None and item["length"] is None and not item["listing_error"]:
                file = (item["path"], get_container_fingerprint(item["fingerprint"]))
                positions_by_file[file][item["offset"]] = position
        results: dict[int, ReadResult] = {}
        # Read each file's rows in ascending order; a damaged file fails its own rows only.
        for (path, fingerprint), positions in positions_by_file.items():
            try:
                cursor = self._open_cursor(path, fingerprint)
                data = cursor.read(sorted(positions))
                cursor.require_unchanged()
                for row, position in positions.items():
                    results[position] = self._check_size(data.get(row))
            except storage.ReplacedError as error:
                results |= dict.fromkeys(positions.values(), ReadResult(None, REPLACED, str(error)))
            except (StorageError, OSError, ValueError) as error:
                results |= dict.fromkeys(positions.values(), ReadResult(None, READ_ERROR, get_first_line(error)))
        return results

    def _open_cursor(self, path: bytes, fingerprint: str | None) -> ParquetCursor:
        """Return the cursor of the file that was listed. One cursor at a time is kept open.

        Args:
            path: path or URL of the file.
            fingerprint: its fingerprint when it was listed; None for any.

        Raises:
            ReplacedError: the file has another fingerprint, so that its rows may be other images.
        """
        # A file that was replaced and listed again needs a new cursor.
        cursor = self._cursors.get(path)
        if cursor is None or fingerprint not in (None, cursor.fingerprint):
            while self._cursors:
                _, open_cursor = self._cursors.popitem()
                open_cursor.close()
            cursor = ParquetCursor(path)
            self._cursors[path] = cursor
        if fingerprint not in (None, cursor.fingerprint):
            raise storage.ReplacedError("the file was replaced after it was listed")
        return cursor

    def _check_size(self, data: bytes | None) -> ReadResult:
        if data is None:
            return ReadResult(None, READ_ERROR, "the row holds no bytes")
        if len(data) > self.max_bytes:
            return ReadResult(None, TOO_LARGE, f"{len(data)} bytes, the limit is {self.max_bytes}")
        return ReadResult(data, OK)


def get_container_fingerprint(fingerprint: str | None) -> str | None:
    """Get the fingerprint of the tar or Parquet file from that of an image in it; None if it is not known."""
    return fingerprint.rpartition("@")[0] or None if fingerprint else None


def hash_content(image: str | None) -> int:
    """Hash an image id for comparison with a work item's `previous`; None: the image could not be read."""
    return hash64(image or "")


def _skip_unchanged(result: ReadResult, previous: int | None) -> ReadResult:
    """Skip unchanged files, and keep existing rows of files that are temporarily unreadable.

    A file that was touched but holds the same bytes needs no new row. If a known file cannot be read, the gallery keeps
    its rows, and the next run tries again. So it does with an image whose container was replaced, known or not.
    """
    if previous is None:
        return result
    if result.status == READ_ERROR:
        return ReadResult(None, UNCHANGED)
    if result.status == OK and result.data is not None and hash_content(compute_image_id(result.data)) == previous:
        return ReadResult(None, TOUCHED)
    return result
