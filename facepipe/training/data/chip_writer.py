"""Writing a chip set: shards as chips come, the index at the end. A shard's name says that it is whole."""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facepipe import storage
from facepipe.errors import SourceError, StorageError
from facepipe.hashing import hash64
from facepipe.storage.atomic import publish_file, replace_file
from facepipe.training.data.chip_set import (
    CHIPS,
    IDENTITIES,
    INDEX,
    INDEX_ROWS,
    SET,
    ChipSetInfo,
    get_shard_name,
    iterate_batches,
)
from facepipe.types import Int64, UInt64

_SHARD_BYTES = 512 << 20
_BATCH = 1024
_UNFINISHED = ".partial"
_NOBODY, _EXCLUDED = -1, -2


class ChipShardWriter:
    """Appends chips (CHIPS) to shards of some 512 MiB; goes on behind those that are whole."""

    def __init__(self, folder: str, shard_bytes: int = _SHARD_BYTES):
        self._folder, self._most = folder, shard_bytes
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(folder):
            if name.startswith("chips-") and name.endswith(_UNFINISHED):
                os.unlink(os.path.join(folder, name))
        self._number, self._held = len(list_shards(folder)), 0
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def add(self, chips: pa.Table) -> None:
        """Write chips; a shard that is full is closed."""
        try:
            for batch in chips.cast(CHIPS).combine_chunks().to_batches(_BATCH):
                if self._writer is None:
                    self._writer = pa.ipc.new_file(self._path + _UNFINISHED, CHIPS)
                self._writer.write_batch(batch)
                self._held += batch.nbytes
                if self._held >= self._most:
                    self.close()
        except OSError as error:
            raise StorageError(f"cannot write {self._path!r}: {storage.describe_error(error)}") from error

    def close(self) -> None:
        """Finish the shard in hand: on disk first, then under its name."""
        if self._writer is None:
            return
        self._writer.close()
        publish_file(self._path + _UNFINISHED, self._path, sync=True)
        self._writer, self._held, self._number = None, 0, self._number + 1

    @property
    def _path(self) -> str:
        return os.path.join(self._folder, get_shard_name(self._number))


def list_shards(folder: str) -> list[str]:
    """The whole shards of a folder, in order."""
    found = list[str]()
    while os.path.exists(path := os.path.join(folder, get_shard_name(len(found)))):
        found.append(path)
    return found


def read_face_ids(folder: str) -> Int64:
    """Face ids (n,) that whole shards hold, ascending."""
    ids = [batch["face_id"].to_numpy() for path in list_shards(folder) for batch, _ in iterate_batches(path)]
    return np.unique(np.concatenate(ids)) if ids else np.empty(0, np.int64)


def read_uri_hashes(folder: str) -> UInt64:
    """Hashes (n,) of the uris of which whole shards hold a chip."""
    texts = (batch["uri"].to_pylist() for path in list_shards(folder) for batch, _ in iterate_batches(path))
    return np.fromiter((hash64(uri) for part in texts for uri in part), np.uint64)


@dataclass(frozen=True)
class ChipFilter:
    """Which chips of the shards belong to the set.

    excluded_images: ids of contents that must not be in it
    excluded_names: normalised names (normalise_name) of identities that must not
    needs_identity: chips without an identity are left out; else they stand under the name ""
    """

    min_images: int = 1
    max_images: int | None = None
    excluded_images: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    excluded_names: frozenset[str] = frozenset()
    needs_identity: bool = True


def normalise_name(name: str) -> str:
    """A name as names are compared: without case, `_` for a space."""
    return name.replace("_", " ").strip().lower()


def write_index(folder: str, info: ChipSetInfo, keep: ChipFilter) -> ChipSetInfo:
    """Choose among the chips of the shards, order them by name and face id, and make the folder a chip set.

    The order does not depend on which worker was first. The info that is returned, and written, has its numbers of
    chips and identities filled in and what was left out, by reason, among its figures. Raises SourceError where fewer
    than 2 identities (labelled) or no chip at all would be left.
    """
    names: dict[str, int] = {}
    figures = Counter[str]()
    columns = _collect_columns(folder, keep, names, figures)
    ordered = sorted(names)
    rank = np.empty(len(names), np.int64)
    rank[[names[name] for name in ordered]] = np.arange(len(names))
    columns["label"] = rank[columns["label"]]
    _reorder(columns, np.lexsort((columns["face_id"], columns["label"])))
    _reorder(columns, _select_rows(columns, keep, figures))
    used, columns["label"] = np.unique(columns["label"], return_inverse=True)
    if len(used) < (2 if keep.needs_identity else 1):
        raise SourceError(_describe_shortage(len(columns["label"]), len(used), {**info.figures, **figures}))
    _write_table(os.path.join(folder, INDEX), pa.table(columns).select(INDEX_ROWS.names).cast(INDEX_ROWS))
    texts = pa.array(ordered, pa.string()).take(pa.array(used))
    _write_table(os.path.join(folder, IDENTITIES), pa.table({"identity": texts}))
    merged = {**info.figures, **{name: count for name, count in figures.items() if count}}
    done = replace(info, chips=len(columns["label"]), identities=len(used), figures=merged)
    _write_json(os.path.join(folder, SET), asdict(done))
    return done


def _collect_columns(
    folder: str, keep: ChipFilter, names: dict[str, int], figures: Counter[str]
) -> dict[str, npt.NDArray[Any]]:
    """Columns of the chips that may be in the set; `names` gets the identities' numbers."""
    parts: list[tuple[npt.NDArray[Any], ...]] = [tuple(np.empty(0, np.int64) for _ in INDEX_ROWS)]
    for number, path in enumerate(list_shards(folder)):
        start = 0
        for batch, at in iterate_batches(path):
            label = _number_identities(batch["identity"], keep, names)
            out = pc.is_in(batch["image_id"], value_set=keep.excluded_images).to_numpy(zero_copy_only=False)
            figures["left_out: without identity"] += int((label == _NOBODY).sum())
            figures["left_out: excluded identity"] += int((label == _EXCLUDED).sum())
            figures["left_out: image of an excluded gallery"] += int((out & (label >= 0)).sum())
            rows = np.flatnonzero((label >= 0) & ~out)
            ids = batch["face_id"].to_numpy()[rows]
            place = np.full(len(rows), number, np.int32)
            size = np.diff(at).astype(np.int32)[rows]
            parts.append((label[rows], ids, at[rows], size, place, (start + rows).astype(np.int32)))
            start += batch.num_rows
    return dict(zip(INDEX_ROWS.names, (np.concatenate(c) for c in zip(*parts, strict=True)), strict=True))


def _number_identities(column: pa.Array, keep: ChipFilter, names: dict[str, int]) -> Int64:
    """Numbers (n,) of a batch's identities; _NOBODY where there is none, _EXCLUDED where it is not to be there."""
    if not keep.needs_identity:
        column = column.fill_null("")
    coded = column.dictionary_encode()
    numbers = [
        _EXCLUDED
        if keep.excluded_names and normalise_name(name) in keep.excluded_names
        else names.setdefault(name, len(names))
        for name in coded.dictionary.to_pylist()
    ]
    codes = coded.indices.fill_null(len(numbers)).to_numpy()
    return np.array([*numbers, _NOBODY], np.int64)[codes]


def _select_rows(columns: dict[str, npt.NDArray[Any]], keep: ChipFilter, figures: Counter[str]) -> Int64:
    """Rows of ordered columns to keep: each face once, identities with enough images, and of these not too many.

    Face ids are hashes, so that the first of an identity are a random choice, and the same whatever else is there.
    """
    label, ids = columns["label"], columns["face_id"]
    rows = np.flatnonzero((np.diff(ids, prepend=ids[:1] - 1) != 0) | (np.diff(label, prepend=-1) != 0))
    counts = np.bincount(label[rows], minlength=1)
    few = counts[label[rows]] < keep.min_images
    figures["left_out: identity with too few images"] = int(few.sum())
    rows = rows[~few]
    if keep.max_images is not None:
        place = np.arange(len(rows)) - np.searchsorted(label[rows], label[rows])
        figures["left_out: more images than data.max_images"] = int((place >= keep.max_images).sum())
        rows = rows[place < keep.max_images]
    return rows


def _reorder(columns: dict[str, npt.NDArray[Any]], rows: Int64) -> None:
    for name in columns:
        columns[name] = columns[name][rows]


def _describe_shortage(chips: int, identities: int, figures: dict[str, int]) -> str:
    counted = ", ".join(f"{name} {count}" for name, count in figures.items() if count)
    return (
        f"{chips} chips of {identities} identities are left, too few to train on ({counted}): labels come from folder "
        "or list names (data.identity), and data.min_images and data.exclude take identities out"
    )


def _write_table(path: str, table: pa.Table) -> None:
    with replace_file(path, sync=True) as unfinished, pa.ipc.new_file(unfinished, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def _write_json(path: str, fields: dict[str, Any]) -> None:
    storage.replace(path, json.dumps(fields, indent=1).encode())
