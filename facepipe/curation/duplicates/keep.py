"""What happens to every image: kept, or dropped for a named image that is kept."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.curation.duplicates.groups import Grouping
from facepipe.curation.duplicates.images import Images
from facepipe.curation.duplicates.rule import EXACT, KINDS, NEAR, Keep
from facepipe.types import Int64

KEEP, DROP = "keep", "drop"
_CHUNK = 65536


def decisions(images: Images, grouping: Grouping, keep: Keep) -> pa.Table:
    """One row an image, by uri: uri, side, image_id, decision, group, kind, kept_uri, kept_side, reason.

    Of one gallery every image that has a better copy is dropped. Of two the images of side 0 (say, a training set) that
    side 1 (its test set) holds as well are dropped, and nothing else.
    """
    dropped = grouping.kept != np.arange(len(images))
    stays = images.table.select(["uri", "side"]).take(pa.array(grouping.kept, mask=~dropped))
    columns = {
        **{name: images.table[name] for name in ("uri", "side", "image_id")},
        "decision": pa.array(np.where(dropped, DROP, KEEP), pa.string()),
        "group": pa.array(grouping.group, mask=grouping.group < 0),
        "kind": pa.array(np.array(KINDS, object)[grouping.kind], pa.string(), mask=~dropped),
        "kept_uri": stays["uri"],
        "kept_side": stays["side"],
        "reason": _reasons(images, grouping, np.flatnonzero(dropped), keep),
    }
    return pa.table(columns).sort_by([("uri", "ascending"), ("side", "ascending")])


def _reasons(images: Images, grouping: Grouping, dropped: Int64, keep: Keep) -> pa.ChunkedArray:
    """(images,) what a reader checks first: which copy stays, and what it has over this one; null for the kept."""
    chunks = (dropped[at : at + _CHUNK] for at in range(0, len(dropped), _CHUNK))
    parts = [pa.array(list(_chunk(images, grouping, chunk, keep)), pa.string()) for chunk in chunks]
    place = np.zeros(len(images), np.int64)
    place[dropped] = np.arange(len(dropped))
    kept = np.ones(len(images), bool)
    kept[dropped] = False
    return pa.chunked_array(parts, pa.string()).take(pa.array(place, mask=kept))


def _chunk(images: Images, grouping: Grouping, rows: Int64, keep: Keep) -> Iterator[str]:
    figures = images.table.select(["uri", "width", "height", "pixels", "file_size", "sharpness"])
    these, those = (figures.take(pa.array(r)).to_pylist() for r in (rows, grouping.kept[rows]))
    kinds, turned = grouping.kind[rows].tolist(), grouping.mirrored[rows].tolist()
    for kind, mirrored, this, kept in zip(kinds, turned, these, those, strict=True):
        yield _reason(KINDS[kind], mirrored, (this, kept), keep)


def _reason(kind: str, mirrored: bool, pair: tuple[dict[str, Any], dict[str, Any]], keep: Keep) -> str:
    this, kept = pair
    if kind != NEAR:
        return f"same {'bytes' if kind == EXACT else 'shot'} as {kept['uri']}"
    copy = "mirrored copy" if mirrored else "copy"
    if keep == "sharpest" and (this["sharpness"] or 0) < (kept["sharpness"] or 0):
        return f"less sharp {copy} of {kept['uri']}: {this['sharpness'] or 0:.1f} against {kept['sharpness']:.1f}"
    size, kept_size = (f"{image['width']}x{image['height']}" for image in pair)
    if size != kept_size:
        smaller = "smaller " if this["pixels"] < kept["pixels"] else ""
        return f"{smaller}{copy} of {kept['uri']}: {size} against {kept_size}"
    if (this["file_size"] or 0) < (kept["file_size"] or 0):
        return f"{copy} of {kept['uri']} in fewer bytes: {this['file_size'] or 0} against {kept['file_size']}"
    return f"{copy} of {kept['uri']}"
