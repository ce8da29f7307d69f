"""List the faces of a gallery as work: boxes and landmarks travel with the images, so that no detector runs."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.decisions.gallery import DecidedGallery
from facepipe.schema import WORK_ITEM
from facepipe.sorted_lookup import is_in_sorted
from facepipe.sources.blocks import Block, BlockSize
from facepipe.sources.relocate import ImageLocator
from facepipe.stages.chips import GIVEN_COLUMNS
from facepipe.training.data.selection import (
    FACES_FILE,
    LABELS_FILE,
    NAMES_FILE,
    ROWS,
    find_image_starts,
    iterate_whole_images,
)
from facepipe.types import Int64

_COLUMNS = ("face_id", "image_id", "uri", "fingerprint", "box", "landmarks", "det_score", "turn")


@dataclass(frozen=True)
class GalleryListing:
    """Blocks of the selected faces without a chip yet. Each worker machine may call it and lists again.

    Attributes:
        gallery: path of the gallery.
        version: version to read.
        folder: folder that `select_faces` wrote the selection to.
        known: file of the ids of faces that have a chip, ascending (.npy).
        size: number of images per block.
    """

    gallery: str
    version: int
    folder: str
    known: str
    size: BlockSize

    def __call__(self) -> Iterator[Block]:
        """List the faces in blocks of images."""
        # The selection: face ids (n,), ascending; the code of each face's name (n,); and the names by code.
        selected = np.load(os.path.join(self.folder, FACES_FILE), mmap_mode="r")
        codes = np.load(os.path.join(self.folder, LABELS_FILE), mmap_mode="r")
        with pa.memory_map(os.path.join(self.folder, NAMES_FILE)) as file:
            names = pa.ipc.open_file(file).read_all()["name"].combine_chunks()
        known = np.load(self.known, mmap_mode="r")
        number = 0
        places = ImageLocator()
        # An upper bound of the images to come, which decides how large blocks are.
        remaining = len(selected) - len(known)
        batches = DecidedGallery(self.gallery, self.version).batches(_COLUMNS, "landmarks is not null", ROWS)
        for faces in iterate_whole_images(batches):
            # Keep the selected faces, with their names.
            ids = faces["face_id"].to_numpy()
            is_wanted = is_in_sorted(selected, ids) & ~is_in_sorted(known, ids)
            wanted = faces.filter(pa.array(is_wanted))
            labels = codes[np.searchsorted(selected, ids[is_wanted])]
            wanted = wanted.append_column("name", names.take(pa.array(labels)))
            # Cut them into blocks of whole images.
            starts = find_image_starts(wanted["uri"]) if wanted.num_rows else np.empty(0, np.int64)
            starts = np.append(starts, wanted.num_rows).astype(np.int64)
            while len(starts) > 1:
                images = min(self.size(remaining), len(starts) - 1)
                rows = wanted.slice(int(starts[0]), int(starts[images] - starts[0]))
                yield _build_block(number, rows, starts[: images + 1] - starts[0], places)
                number += 1
                starts = starts[images:]
                remaining -= images
        # An empty block tells that the listing is complete.
        yield Block(number, WORK_ITEM.empty_table(), last=True)


def _build_block(number: int, rows: pa.Table, starts: Int64, places: ImageLocator) -> Block:
    """Build a block of images with their known faces.

    Args:
        number: number of the block.
        rows: faces, ordered by image.
        starts: row of each image's first face, and the number of rows, (images + 1,).
        places: finds the images' files.
    """
    # One work item per image.
    rows = rows.combine_chunks()
    first = pa.array(starts[:-1])
    uris = rows["uri"].take(first).to_pylist()
    fingerprints = rows["fingerprint"].take(first).to_pylist()
    items = [places.locate_image(uri, fingerprint) for uri, fingerprint in zip(uris, fingerprints, strict=True)]
    columns = [*zip(*items, strict=True), [None] * len(items)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, WORK_ITEM, strict=True)]
    table = pa.table(arrays, schema=WORK_ITEM)
    # The faces of each image, as lists.
    known_faces = {
        "given_image": rows["image_id"].take(first),
        "given_faces": _build_lists(rows["face_id"], starts, 1),
        "given_identities": _build_lists(rows["name"], starts, 1),
        "given_boxes": _build_lists(_flatten(rows["box"]), starts, 4),
        "given_points": _build_lists(_flatten(rows["landmarks"]), starts, 10),
        "given_scores": _build_lists(rows["det_score"], starts, 1),
        # Rows written before faces had turns are upright.
        "given_turns": _build_lists(pc.fill_null(rows["turn"], 0).cast(pa.float32()), starts, 1),
    }
    item_columns = {name: table[name] for name in WORK_ITEM.names}
    face_columns = {name: known_faces[name] for name in GIVEN_COLUMNS.names}
    return Block(number, table, pa.table({**item_columns, **face_columns}))


def _flatten(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten() if column.num_chunks != 1 else column.chunk(0).flatten()


def _build_lists(values: Any, starts: Int64, width: int) -> pa.ListArray:
    """Build one list per image from flat values, `width` per face."""
    # A column of a table may come in chunks; a list array needs one flat array.
    flat = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    flat = flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat
    return pa.ListArray.from_arrays(pa.array((starts * width).astype(np.int32)), flat)
