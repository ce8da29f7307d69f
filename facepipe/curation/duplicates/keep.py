"""Decide what happens to every image: keep it, or drop it for a named image that is kept."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.curation.duplicates.groups import ImageGroups
from facepipe.curation.duplicates.images import RankedImages
from facepipe.curation.duplicates.rule import EXACT, KINDS, NEAR, Keep
from facepipe.types import Int64

KEEP = "keep"
DROP = "drop"
_ROWS = 65536


def build_image_decisions(images: RankedImages, groups: ImageGroups, keep: Keep) -> pa.Table:
    """Build one row per image, by uri: uri, side, image_id, decision, group, kind, kept_uri, kept_side, reason.

    Of one gallery every image that has a better copy is dropped. Of two galleries the images of side 0 (say, a training
    set) that side 1 (its test set) holds as well are dropped, and nothing else.
    """
    # An image is dropped if another one is kept for it.
    is_dropped = groups.kept != np.arange(len(images))
    kept = images.table.select(["uri", "side"]).take(pa.array(groups.kept, mask=~is_dropped))
    columns = {name: images.table[name] for name in ("uri", "side", "image_id")}
    columns |= {
        "decision": pa.array(np.where(is_dropped, DROP, KEEP), pa.string()),
        "group": pa.array(groups.group, mask=groups.group < 0),
        "kind": pa.array(np.array(KINDS, object)[groups.kind], pa.string(), mask=~is_dropped),
        "kept_uri": kept["uri"],
        "kept_side": kept["side"],
        "reason": _build_reasons(images, groups, np.flatnonzero(is_dropped), keep),
    }
    return pa.table(columns).sort_by([("uri", "ascending"), ("side", "ascending")])


def _build_reasons(images: RankedImages, groups: ImageGroups, dropped: Int64, keep: Keep) -> pa.ChunkedArray:
    """Say which copy is kept and what it has over each image; null for kept images."""
    parts = []
    # In blocks, because rows as dictionaries take much memory.
    for at in range(0, len(dropped), _ROWS):
        reasons = list(_iterate_reasons(images, groups, dropped[at : at + _ROWS], keep))
        parts.append(pa.array(reasons, pa.string()))
    # Spread the reasons of dropped images over the rows of all.
    row = np.zeros(len(images), np.int64)
    row[dropped] = np.arange(len(dropped))
    is_kept = np.ones(len(images), bool)
    is_kept[dropped] = False
    return pa.chunked_array(parts, pa.string()).take(pa.array(row, mask=is_kept))


def _iterate_reasons(images: RankedImages, groups: ImageGroups, dropped: Int64, keep: Keep) -> Iterator[str]:
    figures = images.table.select(["uri", "width", "height", "pixels", "file_size", "sharpness"])
    copies = figures.take(pa.array(dropped)).to_pylist()
    kept_images = figures.take(pa.array(groups.kept[dropped])).to_pylist()
    kinds = groups.kind[dropped].tolist()
    mirrored = groups.is_mirrored[dropped].tolist()
    turned = groups.is_turned[dropped].tolist()
    for kind, is_mirrored, is_turned, copy, kept in zip(kinds, mirrored, turned, copies, kept_images, strict=True):
        yield _explain(KINDS[kind], copy, kept, keep, is_mirrored=is_mirrored, is_turned=is_turned)


def _explain(
    kind: str, copy: dict[str, Any], kept: dict[str, Any], keep: Keep, *, is_mirrored: bool, is_turned: bool
) -> str:
    """Explain why an image is dropped, by the first figure in which the kept one is better."""
    if kind != NEAR:
        return f"same {'bytes' if kind == EXACT else 'shot'} as {kept['uri']}"
    noun = "mirrored copy" if is_mirrored else "copy"
    if is_turned:
        noun = f"turned {noun}"
    sharpness = copy["sharpness"] or 0
    if keep == "sharpest" and sharpness < (kept["sharpness"] or 0):
        return f"less sharp {noun} of {kept['uri']}: {sharpness:.1f} against {kept['sharpness']:.1f}"
    size = f"{copy['width']}x{copy['height']}"
    kept_size = f"{kept['width']}x{kept['height']}"
    if size != kept_size:
        smaller = "smaller " if copy["pixels"] < kept["pixels"] else ""
        return f"{smaller}{noun} of {kept['uri']}: {size} against {kept_size}"
    file_size = copy["file_size"] or 0
    if file_size < (kept["file_size"] or 0):
        return f"{noun} of {kept['uri']} in fewer bytes: {file_size} against {kept['file_size']}"
    return f"{noun} of {kept['uri']}"
