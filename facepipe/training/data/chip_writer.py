"""Write a chip set: shards while chips arrive, the index at the end. A shard gets its name when it is complete."""

import json
import os
import re
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
from facepipe.sources.labels import normalise_name
from facepipe.storage.atomic import publish_file, replace_file
from facepipe.training.data.chip_set import (
    CHIPS,
    IDENTITIES,
    INDEX,
    INDEX_ROWS,
    SET,
    SHARD_NAME,
    ChipSetInfo,
    get_shard_name,
    iterate_batches,
)
from facepipe.types import Int64, UInt64

# Size at which a shard is closed, and chips per batch of the file.
_SHARD_BYTES = 512 << 20
_BATCH = 1024
UNFINISHED_SHARD = ".partial"
"""Ending of a shard that is not complete."""
_UNFINISHED_NAME = re.compile(SHARD_NAME + re.escape(UNFINISHED_SHARD))
# Labels of chips that do not belong to the set.
_WITHOUT_IDENTITY = -1
_EXCLUDED = -2

Columns = dict[str, npt.NDArray[Any]]


class ChipShardWriter:
    """Appends chips (CHIPS) to shards of about 512 MiB, after the complete shards of an interrupted run."""

    def __init__(self, folder: str, shard_bytes: int = _SHARD_BYTES):
        self._folder = folder
        self._max_bytes = shard_bytes
        os.makedirs(folder, exist_ok=True)
        # Delete what an interrupted run left unfinished, and go on after its last complete shard.
        for name in os.listdir(folder):
            if _UNFINISHED_NAME.fullmatch(name):
                os.unlink(os.path.join(folder, name))
        self._number = len(list_shards(folder))
        self._bytes = 0
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def add(self, chips: pa.Table) -> None:
        """Write chips, and close the shard if it is full.

        Raises:
            StorageError: The shard cannot be written.
        """
        try:
            for batch in chips.cast(CHIPS).combine_chunks().to_batches(_BATCH):
                if self._writer is None:
                    self._writer = pa.ipc.new_file(self._path + UNFINISHED_SHARD, CHIPS)
                self._writer.write_batch(batch)
                self._bytes += batch.nbytes
                if self._bytes >= self._max_bytes:
                    self.close()
        except OSError as error:
            raise StorageError(f"cannot write {self._path!r}: {storage.describe_error(error)}") from error

    def close(self) -> None:
        """Finish the current shard: sync it to disk, then give it its name."""
        if self._writer is None:
            return
        self._writer.close()
        publish_file(self._path + UNFINISHED_SHARD, self._path, sync=True)
        self._writer = None
        self._bytes = 0
        self._number += 1

    @property
    def _path(self) -> str:
        return os.path.join(self._folder, get_shard_name(self._number))


def list_shards(folder: str) -> list[str]:
    """List the complete shards of a folder, in order."""
    paths: list[str] = []
    while True:
        path = os.path.join(folder, get_shard_name(len(paths)))
        if not os.path.exists(path):
            return paths
        paths.append(path)


def read_face_ids(folder: str) -> Int64:
    """Read the face ids in complete shards, (n,), ascending."""
    ids = [batch["face_id"].to_numpy() for path in list_shards(folder) for batch, _ in iterate_batches(path)]
    return np.unique(np.concatenate(ids)) if ids else np.empty(0, np.int64)


def read_uri_hashes(folder: str) -> UInt64:
    """Read the hashes of the uris with a chip in complete shards, (n,)."""
    texts = (batch["uri"].to_pylist() for path in list_shards(folder) for batch, _ in iterate_batches(path))
    return np.fromiter((hash64(uri) for part in texts for uri in part), np.uint64)


@dataclass(frozen=True)
class ChipFilter:
    """Which chips of the shards belong to the set.

    Attributes:
        min_images: minimum number of images per identity.
        max_images: maximum number of images per identity.
        excluded_images: content hashes of images that must not be in the set.
        excluded_names: normalised names (`normalise_name`) of identities that must not be in the set.
        needs_identity: leave out chips without an identity; otherwise their identity is "".
    """

    min_images: int = 1
    max_images: int | None = None
    excluded_images: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    excluded_names: frozenset[str] = frozenset()
    needs_identity: bool = True


def write_index(folder: str, info: ChipSetInfo, chip_filter: ChipFilter) -> ChipSetInfo:
    """Choose among the chips of the shards, order them by name and face id, and make the folder a chip set.

    The order does not depend on which worker finished first.

    Args:
        folder: folder of the shards.
        info: what to write to set.json, without counts.
        chip_filter: which chips belong to the set.

    Returns:
        The info that was written: with the numbers of chips and identities, and with the chips that were left out, by
        reason, among its figures.

    Raises:
        SourceError: Fewer than 2 identities would be left, or no chip if identities are not needed.
    """
    numbers: dict[str, int] = {}
    figures = Counter[str]()
    columns = _collect_columns(folder, chip_filter, numbers, figures)
    # Number the identities in the order of their names, and sort the chips by identity and face id.
    names = sorted(numbers)
    rank = np.empty(len(numbers), np.int64)
    rank[[numbers[name] for name in names]] = np.arange(len(numbers))
    columns["label"] = rank[columns["label"]]
    _reorder(columns, np.lexsort((columns["face_id"], columns["label"])))
    _reorder(columns, _select_rows(columns, chip_filter, figures))
    # Number the identities that are left without gaps.
    used, columns["label"] = np.unique(columns["label"], return_inverse=True)
    chips = len(columns["label"])
    if len(used) < (2 if chip_filter.needs_identity else 1):
        raise SourceError(_describe_shortage(chips, len(used), {**info.figures, **figures}))
    # Write set.json last, because it makes the folder a chip set.
    _write_table(os.path.join(folder, INDEX), pa.table(columns).select(INDEX_ROWS.names).cast(INDEX_ROWS))
    used_names = pa.array(names, pa.string()).take(pa.array(used))
    _write_table(os.path.join(folder, IDENTITIES), pa.table({"identity": used_names}))
    all_figures = {**info.figures, **{name: count for name, count in figures.items() if count}}
    written = replace(info, chips=chips, identities=len(used), figures=all_figures)
    _write_json(os.path.join(folder, SET), asdict(written))
    return written


def _collect_columns(folder: str, chip_filter: ChipFilter, numbers: dict[str, int], figures: Counter[str]) -> Columns:
    """Collect the index columns of the chips that may be in the set.

    Args:
        folder: folder of the shards.
        chip_filter: which chips belong to the set.
        numbers: gets the number of each identity's name.
        figures: gets the counts of chips that are left out.
    """
    parts: list[tuple[npt.NDArray[Any], ...]] = [tuple(np.empty(0, np.int64) for _ in INDEX_ROWS)]
    # Read shard by shard; `start` is the row in the shard at which a batch begins.
    for number, path in enumerate(list_shards(folder)):
        start = 0
        for batch, offsets in iterate_batches(path):
            label = _number_identities(batch["identity"], chip_filter, numbers)
            # Count chips by why they are left out; an image of an excluded gallery counts if it has a label.
            is_excluded = pc.is_in(batch["image_id"], value_set=chip_filter.excluded_images)
            is_excluded = is_excluded.to_numpy(zero_copy_only=False)
            figures["left_out: without identity"] += int((label == _WITHOUT_IDENTITY).sum())
            figures["left_out: excluded identity"] += int((label == _EXCLUDED).sum())
            figures["left_out: image of an excluded gallery"] += int((is_excluded & (label >= 0)).sum())
            rows = np.flatnonzero((label >= 0) & ~is_excluded)
            ids = batch["face_id"].to_numpy()[rows]
            lengths = np.diff(offsets).astype(np.int32)[rows]
            shard = np.full(len(rows), number, np.int32)
            # In the order of INDEX_ROWS.
            parts.append((label[rows], ids, offsets[rows], lengths, shard, (start + rows).astype(np.int32)))
            start += batch.num_rows
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return dict(zip(INDEX_ROWS.names, columns, strict=True))


def _number_identities(column: pa.Array, chip_filter: ChipFilter, numbers: dict[str, int]) -> Int64:
    """Assign numbers to the identities of a batch, (n,); _WITHOUT_IDENTITY and _EXCLUDED for chips left out."""
    if not chip_filter.needs_identity:
        column = column.fill_null("")
    # Normalise and number each distinct name once, and not once per chip.
    coded = column.dictionary_encode()
    codes = [
        _EXCLUDED
        if chip_filter.excluded_names and normalise_name(name) in chip_filter.excluded_names
        else numbers.setdefault(name, len(numbers))
        for name in coded.dictionary.to_pylist()
    ]
    # The place behind the last code stands for chips without a name.
    indices = coded.indices.fill_null(len(codes)).to_numpy()
    return np.array([*codes, _WITHOUT_IDENTITY], np.int64)[indices]


def _select_rows(columns: Columns, chip_filter: ChipFilter, figures: Counter[str]) -> Int64:
    """Select rows of ordered columns: each face once, and the identities and images within the limits.

    Face ids are hashes, so the first images of an identity are a random choice, and the same whatever else is there.
    """
    label = columns["label"]
    ids = columns["face_id"]
    # A face that is in several shards comes once: equal ids are neighbours after sorting.
    is_new_face = (np.diff(ids, prepend=ids[:1] - 1) != 0) | (np.diff(label, prepend=-1) != 0)
    rows = np.flatnonzero(is_new_face)
    # Leave out identities with too few images.
    counts = np.bincount(label[rows], minlength=1)
    has_few = counts[label[rows]] < chip_filter.min_images
    figures["left_out: identity with too few images"] = int(has_few.sum())
    rows = rows[~has_few]
    if chip_filter.max_images is not None:
        # Position of each row among those of its label, which are consecutive.
        position = np.arange(len(rows)) - np.searchsorted(label[rows], label[rows])
        figures["left_out: more images than data.max_images"] = int((position >= chip_filter.max_images).sum())
        rows = rows[position < chip_filter.max_images]
    return rows


def _reorder(columns: Columns, rows: Int64) -> None:
    for name in columns:
        columns[name] = columns[name][rows]


def _describe_shortage(chips: int, identities: int, figures: dict[str, int]) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in figures.items() if count)
    return (
        f"{chips} chips of {identities} identities are left, too few to train on ({counts}). Labels come from lists, "
        "or from folders that are people: data.identity=folder takes every folder. data.min_images and data.exclude "
        "leave identities out"
    )


def _write_table(path: str, table: pa.Table) -> None:
    with replace_file(path, sync=True) as unfinished, pa.ipc.new_file(unfinished, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def _write_json(path: str, fields: dict[str, Any]) -> None:
    storage.replace(path, json.dumps(fields, indent=1).encode())
