"""Chip sets: aligned faces as JPEGs in Arrow files, any of which is one slice of a memory-mapped file.

`set.json` is written last: a folder without it is no chip set. What is held in memory is what is used of the index.
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

_TEXTS = 1 << 18
SET, INDEX, IDENTITIES = "set.json", "index.arrow", "identities.arrow"
CHIPS = pa.schema(
    [
        ("face_id", pa.int64()),  # a hash of the uri, the image's content and which of its faces it is
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
    """What `set.json` says.

    fingerprint: of all that the set depends on; asked: of what the config says alone, whatever has come to the data
    size: (width, height) of a chip; figures: what became of the images, counted; origin: where they are from
    """

    fingerprint: str
    embedder: str
    size: tuple[int, int]
    chips: int
    identities: int
    figures: dict[str, int] = field(default_factory=dict)
    asked: str = ""
    origin: dict[str, Any] = field(default_factory=dict)


def get_shard_name(number: int) -> str:
    """The file of a shard."""
    return f"chips-{number:05d}.arrow"


class ChipSet:
    """Labelled chips, by rising label and face id.

        chips = ChipSet.open("train.chips")
        chips.labels[row], chips.identities[label], chips.uris[row]
        chips.chip(row)                     # (h, w, 3) uint8 RGB

    labels (n,) int64: codes from 0 without gaps; faces (n,) int64: face ids. Chips may be read by several threads, and
    a set may be pickled: it opens its files where it arrives.
    """

    def __init__(self, folder: str, view: "_RowView | None" = None):
        self.folder = os.path.abspath(folder)
        info = read_set_info(self.folder)
        if info is None:
            raise SourceError(f"no chip set at {self.folder!r} (no {SET} in it): training makes one of its `data`")
        self.info = info
        index = _map_table(os.path.join(self.folder, INDEX))
        self._index = _IndexColumns(*(_get_column(index, name) for name in INDEX_ROWS.names))
        self._shards = _MappedShards(self.folder)
        self._view = view
        names = _map_table(os.path.join(self.folder, IDENTITIES))["identity"].combine_chunks()
        self._names = names if view is None else names.take(pa.array(view.names))

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "ChipSet":
        """Raises SourceError where there is no whole chip set."""
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
        return self._index.label if self._view is None else self._view.labels

    @property
    def face_ids(self) -> Int64:
        return self._index.face_id if self._view is None else self._index.face_id[self._view.rows]

    @cached_property
    def identities(self) -> list[str]:
        """Names of the labels."""
        return cast(list[str], self._names.to_pylist())

    @property
    def uris(self) -> "UriSequence":
        """Where each face's image is; read from the files as they are asked for."""
        return UriSequence(self)

    def read_jpeg(self, row: int) -> memoryview:
        """The JPEG of a chip, as a view of its file."""
        at, index = self._to_set_row(row), self._index
        data = self._shards.read_bytes(int(index.shard[at]), int(index.at[at]), int(index.length[at]))
        if len(data) != index.length[at]:
            raise StorageError(f"the chips in {self.folder!r} were cut short: delete the folder, and it is made again")
        return data

    def load_chip(self, row: int) -> UInt8Image:
        """A chip (h, w, 3) uint8 RGB. Raises StorageError where the file is damaged."""
        pixels = cv2.imdecode(np.frombuffer(self.read_jpeg(row), np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is None or pixels.shape != (self.size[1], self.size[0], 3):
            raise StorageError(f"chip {row} of {self.folder!r} is damaged: delete the folder, and it is made again")
        return np.asarray(pixels, np.uint8)

    def load_chips(self, rows: Int64) -> UInt8Image:
        """Chips (n, h, w, 3) of rows (n,)."""
        chips = [self.load_chip(int(row)) for row in rows]
        return np.stack(chips) if chips else np.empty((0, self.size[1], self.size[0], 3), np.uint8)

    def select(self, rows: Int64) -> "ChipSet":
        """A view on some rows; labels are coded anew, in the same order, without gaps. It holds 16 bytes a row."""
        rows = np.asarray(rows, np.int64)
        labels = self.labels[rows]
        used = np.zeros(len(self._names), bool)
        used[labels] = True
        chosen, codes = np.flatnonzero(used), np.cumsum(used) - 1
        if self._view is not None:
            rows, chosen = self._view.rows[rows], self._view.names[chosen]
        return ChipSet(self.folder, _RowView(rows, codes[labels], chosen))

    def read_uris(self, rows: Int64) -> list[str]:
        """Where the faces of some rows are; each shard is looked into once."""
        at = rows if self._view is None else self._view.rows[rows]
        shards, places = self._index.shard[at], self._index.row[at]
        found = np.empty(len(rows), object)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            found[here] = self._shards.map_uris(int(shard)).take(pa.array(places[here])).to_pylist()
        return cast(list[str], found.tolist())

    def _to_set_row(self, row: int) -> int:
        return int(row if self._view is None else self._view.rows[row])


@dataclass(frozen=True)
class _RowView:
    """Rows of the whole set, their labels, and which of its names these stand for."""

    rows: Int64
    labels: Int64
    names: Int64


@dataclass(frozen=True)
class _IndexColumns:
    """Columns of INDEX_ROWS, as views of the mapped file."""

    label: Int64
    face_id: Int64
    at: Int64
    length: Int32
    shard: Int32
    row: Int32


class UriSequence(Sequence[str]):
    """The uris of a chip set; none is held."""

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
        for at in range(0, len(self), _TEXTS):
            yield from self[at : at + _TEXTS]


class _MappedShards:
    """The files of a chip set, mapped when they are first used."""

    def __init__(self, folder: str):
        self._folder = folder
        self._maps: dict[int, memoryview] = {}
        self._uris: dict[int, pa.ChunkedArray] = {}

    def read_bytes(self, shard: int, at: int, length: int) -> memoryview:
        view = self._maps.get(shard)
        if view is None:
            try:
                view = np.memmap(os.path.join(self._folder, get_shard_name(shard)), np.uint8, "r").data
            except (OSError, ValueError) as error:
                raise StorageError(f"cannot read the chips in {self._folder!r}: {describe_error(error)}") from error
            self._maps[shard] = view
        return view[at : at + length]

    def map_uris(self, shard: int) -> pa.ChunkedArray:
        if shard not in self._uris:
            self._uris[shard] = _map_table(os.path.join(self._folder, get_shard_name(shard)))["uri"]
        return self._uris[shard]


def read_set_info(folder: str) -> ChipSetInfo | None:
    """What a folder's set.json says; None where there is none, or none that can be read."""
    try:
        with open(os.path.join(folder, SET), encoding="utf-8") as file:
            fields = json.load(file)
        return ChipSetInfo(**{**fields, "size": tuple(fields["size"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def iterate_batches(path: str) -> Iterator[tuple[pa.RecordBatch, Int64]]:
    """(record batch, byte offsets (n + 1,) of its chips in the file) of a shard; nothing is copied."""
    with pa.memory_map(path) as file:
        whole = file.read_buffer()
    with pa.ipc.open_file(whole) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            chips = batch["chip"]
            _, offsets, data = chips.buffers()
            ends = np.frombuffer(offsets, np.int64)[chips.offset : chips.offset + len(chips) + 1]
            yield batch, ends + (data.address - whole.address if data is not None else 0)


def _map_table(path: str) -> pa.Table:
    try:
        with pa.memory_map(path) as file:
            return pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path!r}: {describe_error(error)}") from error


def _get_column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    column = table[name]
    if column.num_chunks == 1:
        return cast(npt.NDArray[Any], column.chunk(0).to_numpy())
    return cast(npt.NDArray[Any], column.to_numpy())
