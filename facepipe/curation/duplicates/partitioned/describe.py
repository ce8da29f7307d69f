"""The first step: describe the images of a range of uris."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates.hashes import is_telling
from facepipe.curation.duplicates.images import RANK_COLUMNS, RankedImages, rank_images
from facepipe.curation.duplicates.pairs import (
    compute_shapes,
)
from facepipe.curation.duplicates.partitioned.tables import CONTENTS, IMAGES, RANKED, CopySearch
from facepipe.hashing import hash64_column
from facepipe.storage.partitions import (
    Tables,
    TableTask,
)
from facepipe.types import Bool, Int64, UInt64

_IMAGE_ID_BYTES = 32  # of a hash of the content; other texts are hashed one by one
_WEIGHTS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], np.uint64)


def describe_images(task: TableTask, search: CopySearch) -> Tables:
    """Describe the images of a range of uris. They are numbered from 0 in the order of uris, and of one uri by side.

    Returns:
        images: one row per image, in that order. numbers: image of each row of the faces. ranked: what images are
        compared and ranked by. contents: hashes of their bytes.
    """
    faces = task.tables["faces"]
    images = rank_images(faces, search.rule.keep, search.decided, search.side_count)
    by_name = np.argsort(images.uri_position)
    content, is_known = hash_contents(images.take(["image_id"], by_name)["image_id"])
    number = np.arange(len(images))
    return {
        "images": images.take(IMAGES.names, by_name),
        "numbers": pa.table({"number": images.uri_position[images.of_face]}),
        "contents": pa.table({"content": content, "number": number}, CONTENTS).filter(pa.array(is_known)),
        "ranked": _describe_hashes(images, by_name),
    }


def _describe_hashes(images: RankedImages, by_name: Int64) -> pa.Table:
    """Describe the images, in the order of their names, whose hashes can be compared."""
    hashes = images.get_numbers("image_hash")
    shape = compute_shapes(images.get_numbers("width"), images.get_numbers("height"))
    is_usable = (images.has_hash & is_telling(hashes))[by_name]
    at = by_name[is_usable]
    sizes = images.add_pixels(at, ["side", "sharpness", "ingested_at"])
    columns: dict[str, Any] = {
        "hash": hashes[at],
        "number": np.flatnonzero(is_usable),
        "has_face": images.face_counts[at] > 0,
        "shape": shape[at],
        "standing": images.standing[at],
    }
    columns |= {name: sizes[name] for name in RANK_COLUMNS if name in sizes.column_names}
    return pa.table({name: columns[name] for name in RANKED.names}).cast(RANKED)


def hash_contents(image_ids: pa.ChunkedArray) -> tuple[UInt64, Bool]:
    """Hash the ids of contents (n,), and say which are known (n,). Equal ids have equal hashes."""
    column = image_ids.combine_chunks().cast(pa.string())
    is_known = np.asarray(column.is_valid())
    hashes = np.zeros(len(column), np.uint64)
    is_usual = np.asarray(pc.fill_null(pc.equal(pc.binary_length(column), _IMAGE_ID_BYTES), False))
    usual = column.filter(pa.array(is_usual))
    if len(usual):
        # All texts are of one length: their bytes are a matrix.
        begin = usual.offset * _IMAGE_ID_BYTES
        data = np.frombuffer(usual.buffers()[2], np.uint8)[begin : begin + len(usual) * _IMAGE_ID_BYTES]
        words = data.reshape(-1, _IMAGE_ID_BYTES).copy().view(np.uint64)
        hashes[is_usual] = ((words ^ (words >> np.uint64(29))) * _WEIGHTS).sum(axis=1, dtype=np.uint64)
    others = is_known & ~is_usual
    if others.any():
        hashes[others] = hash64_column(column.filter(pa.array(others)))
    return hashes, is_known
