"""Blocks of work that cut chips of a gallery's faces: boxes and landmarks travel with the images, no detector runs."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.gallery import Gallery
from facepipe.schema import WORK_ITEM
from facepipe.sorted_lookup import is_in_sorted
from facepipe.sources.blocks import Block, BlockSize
from facepipe.sources.relocate import Places
from facepipe.stages.chips import GIVEN
from facepipe.training.data.selection import (
    FACES_FILE,
    LABELS_FILE,
    NAMES_FILE,
    ROWS,
    find_image_starts,
    iterate_whole_images,
)
from facepipe.types import Int64

_WORK = ("face_id", "image_id", "uri", "fingerprint", "box", "landmarks", "det_score")


@dataclass(frozen=True)
class GalleryListing:
    """Blocks of the wanted faces that are not yet held; made afresh wherever it is called.

    folder: where `choose` wrote what is wanted; held: a file of face ids (.npy), ascending
    """

    gallery: str
    version: int
    folder: str
    held: str
    size: BlockSize

    def __call__(self) -> Iterator[Block]:
        wanted, codes = (np.load(os.path.join(self.folder, name), mmap_mode="r") for name in (FACES_FILE, LABELS_FILE))
        with pa.memory_map(os.path.join(self.folder, NAMES_FILE)) as file:
            names = pa.ipc.open_file(file).read_all()["name"].combine_chunks()
        held = np.load(self.held, mmap_mode="r")
        number, places = 0, Places()
        left = len(wanted) - len(held)
        for faces in iterate_whole_images(
            Gallery(self.gallery, self.version).batches(_WORK, "landmarks is not null", ROWS)
        ):
            ids = faces["face_id"].to_numpy()
            mine = is_in_sorted(wanted, ids) & ~is_in_sorted(held, ids)
            chosen = faces.filter(pa.array(mine))
            labels = codes[np.searchsorted(wanted, ids[mine])]
            chosen = chosen.append_column("name", names.take(pa.array(labels)))
            starts = np.append(find_image_starts(chosen["uri"]) if chosen.num_rows else [], chosen.num_rows).astype(
                np.int64
            )
            while len(starts) > 1:
                n = min(self.size(left), len(starts) - 1)
                rows = chosen.slice(int(starts[0]), int(starts[n] - starts[0]))
                yield _build_block(number, rows, starts[: n + 1] - starts[0], places)
                number, starts, left = number + 1, starts[n:], left - n
        yield Block(number, WORK_ITEM.empty_table(), last=True)


def _build_block(number: int, rows: pa.Table, starts: Int64, places: Places) -> Block:
    """rows: wanted faces; starts (images + 1,): where each image's begin."""
    rows = rows.combine_chunks()
    first = pa.array(starts[:-1])
    uris, marks = (rows[name].take(first).to_pylist() for name in ("uri", "fingerprint"))
    items = [places.item(uri, mark) for uri, mark in zip(uris, marks, strict=True)]
    columns = [*zip(*items, strict=True), [None] * len(items)]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, WORK_ITEM, strict=True)], schema=WORK_ITEM)
    given = {
        "given_image": rows["image_id"].take(first),
        "given_faces": _build_lists(rows["face_id"], starts, 1),
        "given_identities": _build_lists(rows["name"], starts, 1),
        "given_boxes": _build_lists(_flatten(rows["box"]), starts, 4),
        "given_points": _build_lists(_flatten(rows["landmarks"]), starts, 10),
        "given_scores": _build_lists(rows["det_score"], starts, 1),
    }
    whole = pa.table({**{name: table[name] for name in WORK_ITEM.names}, **{n: given[n] for n in GIVEN.names}})
    return Block(number, table, whole)


def _flatten(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten() if column.num_chunks != 1 else column.chunk(0).flatten()


def _build_lists(values: Any, starts: Int64, width: int) -> pa.ListArray:
    flat = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    flat = flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat
    return pa.ListArray.from_arrays(pa.array((starts * width).astype(np.int32)), flat)
