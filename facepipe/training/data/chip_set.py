"""Chip sets: aligned faces as JPEGs in Arrow files. Each JPEG is one slice of a memory-mapped file.

`set.json` is written last: a folder without it is not a chip set. Memory holds the used part of the index only.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast, overload

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from facepipe.errors import SourceError, StorageError
from facepipe.storage import describe_error
from facepipe.types import Int32, Int64, UInt8Image

SET = "set.json"
INDEX = "index.arrow"
IDENTITIES = "identities.arrow"
# Rows per read of uris, which bounds the memory of an iteration.
_URIS_PER_READ = 1 << 18
CHIPS = pa.schema(
    [
        ("face_id", pa.int64()),  # a hash of the uri, the image's content and the position of the face in the image
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("identity", pa.string()),
        ("chip", pa.large_binary()),  # JPEG
    ]
)
INDEX_ROWS = pa.schema(
    [
        ("label", pa.int64()),
        ("face_id", pa.int64()),
        ("at", pa.int64()),  # first byte of the JPEG in the shard's file
        ("length", pa.int32()),
        ("shard", pa.int32()),
        ("row", pa.int32()),  # in the shard
    ]
)


@dataclass(frozen=True)
class ChipSetInfo:
    """The content of `set.json`, which has these fields under these names.

    Attributes:
        fingerprint: hash of everything that the set depends on.
        embedder: embedder that the layout of chips is for.
        size: (width, height) of a chip.
        chips: number of chips.
        identities: number of identities.
        figures: what became of the images, counts by name.
        asked: hash of the config's part only, which does not change with the data.
        origin: where the images come from.
    """

    fingerprint: str
    embedder: str
    size: tuple[int, int]
    chips: int
    identities: int
    figures: dict[str, int] = field(default_factory=dict)
    asked: str = ""
    origin: dict[str, Any] = field(default_factory=dict)


# Pattern of the shards' names.
SHARD_NAME = r"chips-\d{5,}\.arrow"


def get_shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"chips-{number:05d}.arrow"


class ChipSet:
    """Labelled chips, ordered by label and face id.

        chips = ChipSet.open("train.chips")
        chips.labels[row], chips.identities[label], chips.uris[row]
        chips.load_chip(row)                # (h, w, 3) uint8 RGB

    Several threads may read chips. A set can be pickled: it opens its files again when it is unpickled.
    """

    def __init__(self, folder: str, view: "_RowView | None" = None):
        self.folder = os.path.abspath(folder)
        info = read_set_info(self.folder)
        if info is None:
            raise SourceError(f"no chip set at {self.folder!r} (no {SET} in it): training makes one from its `data`")
        # The index is a view of the mapped file; a selection of rows is kept beside it.
        self.info = info
        index = _map_table(os.path.join(self.folder, INDEX))
        self._index = _IndexColumns(**{name: _get_column(index, name) for name in INDEX_ROWS.names})
        self._shards = _MappedShards(self.folder)
        self._view = view
        names = _map_table(os.path.join(self.folder, IDENTITIES))["identity"].combine_chunks()
        self._names = names if view is None else names.take(pa.array(view.names))

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "ChipSet":
        """Open the chip set in a folder.

        Raises:
            SourceError: The folder does not hold a complete chip set.
        """
        return cls(os.fspath(folder))

    def __reduce__(self) -> tuple[Any, ...]:
        return ChipSet, (self.folder, self._view)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of a chip."""
        return self.info.size

    @property
    def labels(self) -> Int64:
        """Label of each row, from 0 without gaps, (n,)."""
        return self._index.label if self._view is None else self._view.labels

    @property
    def face_ids(self) -> Int64:
        """Face id of each row, (n,)."""
        return self._index.face_id if self._view is None else self._index.face_id[self._view.rows]

    @cached_property
    def identities(self) -> list[str]:
        """Names of the labels."""
        return cast(list[str], self._names.to_pylist())

    @property
    def uris(self) -> "UriSequence":
        """Uri of each row's image. They are read from the files on access."""
        return UriSequence(self)

    def read_jpeg(self, row: int) -> memoryview:
        """Read the JPEG of a chip, as a view of its file.

        Raises:
            StorageError: The file is too short or cannot be read.
        """
        index = self._index
        # The row of a view is converted to one of the whole set, which knows shard and byte range.
        set_row = self._to_set_row(row)
        length = int(index.length[set_row])
        data = self._shards.read_bytes(int(index.shard[set_row]), int(index.at[set_row]), length)
        if len(data) != length:
            raise StorageError(f"the chips in {self.folder!r} were cut short: delete the folder, and run again")
        return data

    def load_chip(self, row: int) -> UInt8Image:
        """Decode a chip, (h, w, 3) uint8 RGB.

        Raises:
            StorageError: The file is damaged.
        """
        pixels = cv2.imdecode(np.frombuffer(self.read_jpeg(row), np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is None or pixels.shape != (self.size[1], self.size[0], 3):
            raise StorageError(f"chip {row} of {self.folder!r} is damaged: delete the folder, and run again")
        return np.asarray(pixels, np.uint8)

    def load_chips(self, rows: Int64) -> UInt8Image:
        """Decode the chips of rows, (n, h, w, 3) uint8 RGB."""
        chips = [self.load_chip(int(row)) for row in rows]
        return np.stack(chips) if chips else np.empty((0, self.size[1], self.size[0], 3), np.uint8)

    def select(self, rows: Int64) -> "ChipSet":
        """Return a view of some rows. It takes 16 bytes per row.

        Labels are numbered again without gaps, in the same order.
        """
        rows = np.asarray(rows, np.int64)
        labels = self.labels[rows]
        # Mark the labels that are left, and give them new numbers in the old order.
        is_used = np.zeros(len(self._names), bool)
        is_used[labels] = True
        names = np.flatnonzero(is_used)
        codes = np.cumsum(is_used) - 1
        # A view of a view refers to the rows of the whole set.
        if self._view is not None:
            rows = self._view.rows[rows]
            names = self._view.names[names]
        return ChipSet(self.folder, _RowView(rows, codes[labels], names))

    def read_uris(self, rows: Int64) -> list[str]:
        """Read the uris of some rows' images. Each shard is read once."""
        # Read shard by shard, and put the uris back in the order of the rows.
        set_rows = rows if self._view is None else self._view.rows[rows]
        shards = self._index.shard[set_rows]
        shard_rows = self._index.row[set_rows]
        uris = np.empty(len(rows), object)
        for shard in np.unique(shards):
            positions = np.flatnonzero(shards == shard)
            uris[positions] = self._shards.map_uris(int(shard)).take(pa.array(shard_rows[positions])).to_pylist()
        return cast(list[str], uris.tolist())

    def _to_set_row(self, row: int) -> int:
        return int(row if self._view is None else self._view.rows[row])


@dataclass(frozen=True)
class _RowView:
    """A selection of rows of a set.

    Attributes:
        rows: rows of the whole set, (n,).
        labels: label of each row, (n,).
        names: number in the whole set of each label's name.
    """

    rows: Int64
    labels: Int64
    names: Int64


@dataclass(frozen=True)
class _IndexColumns:
    """The columns of INDEX_ROWS, as views of the mapped file."""

    label: Int64
    face_id: Int64
    at: Int64
    length: Int32
    shard: Int32
    row: Int32


class UriSequence(Sequence[str]):
    """The uris of a chip set. Nothing is kept in memory."""

    def __init__(self, chips: ChipSet):
        self._chips = chips

    def __len__(self) -> int:
        return len(self._chips)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return self._chips.read_uris(np.arange(*row.indices(len(self))))
        return self._chips.read_uris(np.array([row]))[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _URIS_PER_READ):
            yield from self[start : start + _URIS_PER_READ]


class _MappedShards:
    """The shards of a chip set, mapped at their first use."""

    def __init__(self, folder: str):
        self._folder = folder
        self._maps: dict[int, memoryview] = {}
        self._uris: dict[int, pa.ChunkedArray] = {}

    def read_bytes(self, shard: int, start: int, length: int) -> memoryview:
        """Return a slice of a shard's file."""
        view = self._maps.get(shard)
        if view is None:
            try:
                view = np.memmap(os.path.join(self._folder, get_shard_name(shard)), np.uint8, "r").data
            except (OSError, ValueError) as error:
                raise StorageError(f"cannot read the chips in {self._folder!r}: {describe_error(error)}") from error
            self._maps[shard] = view
        return view[start : start + length]

    def map_uris(self, shard: int) -> pa.ChunkedArray:
        """Return the uris of a shard."""
        if shard not in self._uris:
            self._uris[shard] = _map_table(os.path.join(self._folder, get_shard_name(shard)))["uri"]
        return self._uris[shard]


def read_set_info(folder: str) -> ChipSetInfo | None:
    """Read a folder's set.json, or return None if it does not exist or cannot be read."""
    try:
        with open(os.path.join(folder, SET), encoding="utf-8") as file:
            fields = json.load(file)
        return ChipSetInfo(**{**fields, "size": tuple(fields["size"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def iterate_batches(path: str) -> Iterator[tuple[pa.RecordBatch, Int64]]:
    """Yield the record batches of a shard, without copying.

    Yields:
        A record batch, and the byte offsets of its chips in the file, (n + 1,).
    """
    # Map the file as one buffer, so that addresses inside it become byte offsets.
    with pa.memory_map(path) as file:
        whole = file.read_buffer()
    with pa.ipc.open_file(whole) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            chips = batch["chip"]
            # The offsets of a slice begin at its first row; n chips have n + 1 offsets.
            _, offsets, data = chips.buffers()
            offsets = np.frombuffer(offsets, np.int64)[chips.offset : chips.offset + len(chips) + 1]
            # Offsets are relative to the data buffer, which lies somewhere in the file.
            yield batch, offsets + (data.address - whole.address if data is not None else 0)


def _map_table(path: str) -> pa.Table:
    try:
        with pa.memory_map(path) as file:
            return pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path!r}: {describe_error(error)}") from error


def _get_column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    column = table[name]
    # One chunk becomes a view; several have to be copied.
    if column.num_chunks == 1:
        return cast(npt.NDArray[Any], column.chunk(0).to_numpy())
    return cast(npt.NDArray[Any], column.to_numpy())
