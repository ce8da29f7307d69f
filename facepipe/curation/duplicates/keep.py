"""Decide what happens to every image: keep it, or drop it for a named image that is kept."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.curation.duplicates.groups import ImageGroups
from facepipe.curation.duplicates.images import KEPT_BY_PEOPLE, RankedImages
from facepipe.curation.duplicates.rule import EXACT, KINDS, NEAR, Keep
from facepipe.storage.spilled import SPILLED_ROWS, spill_batches
from facepipe.types import Int64

KEEP = "keep"
DROP = "drop"
DECISION_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("side", pa.int8()),
        ("image_id", pa.string()),
        ("decision", pa.string()),
        ("group", pa.int64()),
        ("kind", pa.string()),
        ("kept_uri", pa.string()),
        ("kept_side", pa.int8()),
        ("reason", pa.string()),
    ]
)


def build_image_decisions(images: RankedImages, groups: ImageGroups, keep: Keep) -> pa.Table:
    """Build one row per image, by uri: uri, side, image_id, decision, group, kind, kept_uri, kept_side, reason.

    Of one gallery every image that has a better copy is dropped. Of two galleries the images of side 0 (say, a training
    set) that side 1 (its test set) holds as well are dropped, and nothing else.

    Returns:
        The rows, mapped from a temporary file.
    """
    by_uri = np.empty(len(images), np.int64)
    by_uri[images.uri_position] = np.arange(len(images))

    def build_batches() -> Iterator[pa.RecordBatch]:
        for at in range(0, len(by_uri), SPILLED_ROWS):
            yield from build_decision_rows(images, groups, by_uri[at : at + SPILLED_ROWS], keep).to_batches()

    return spill_batches(DECISION_SCHEMA, build_batches())


def build_decision_rows(images: RankedImages, groups: ImageGroups, numbers: Int64, keep: Keep) -> pa.Table:
    """Build the rows of some images (m,), as `build_image_decisions` does."""
    # An image is dropped if another one is kept for it, unless people keep it as well. What the other gallery holds is
    # dropped all the same: it may be a test set.
    own = images.take(["uri", "side", "image_id"], numbers)
    kept_numbers = groups.kept[numbers]
    is_of_one_side = images.side[numbers] == images.side[kept_numbers]
    is_kept_too = (images.standing[numbers] >= KEPT_BY_PEOPLE) & is_of_one_side
    is_dropped = (kept_numbers != numbers) & ~is_kept_too
    kept = images.take(["uri", "side"], groups.kept[numbers], ~is_dropped)
    group = groups.group[numbers]
    reasons = np.full(len(numbers), None, object)
    reasons[is_dropped] = list(_iterate_reasons(images, groups, numbers[is_dropped], keep))
    columns = {
        "uri": own["uri"],
        "side": own["side"],
        "image_id": own["image_id"],
        "decision": pa.array(np.where(is_dropped, DROP, KEEP), pa.string()),
        "group": pa.array(group, mask=group < 0),
        "kind": pa.array(np.array(KINDS, object)[groups.kind[numbers]], pa.string(), mask=~is_dropped),
        "kept_uri": kept["uri"],
        "kept_side": kept["side"],
        "reason": pa.array(reasons, pa.string()),
    }
    return pa.table(columns).cast(DECISION_SCHEMA).combine_chunks()


def _iterate_reasons(images: RankedImages, groups: ImageGroups, dropped: Int64, keep: Keep) -> Iterator[str]:
    """Say which copy is kept and what it has over each dropped image (m,)."""
    if not len(dropped):
        return
    copies = images.add_pixels(dropped, ["uri", "sharpness"]).to_pylist()
    kept_images = images.add_pixels(groups.kept[dropped], ["uri", "sharpness"]).to_pylist()
    kinds = groups.kind[dropped].tolist()
    mirrored = groups.is_mirrored[dropped].tolist()
    turned = groups.is_turned[dropped].tolist()
    is_decided = (images.standing[groups.kept[dropped]] > images.standing[dropped]).tolist()
    for kind, is_mirrored, is_turned, copy, kept, is_kept_by_people in zip(
        kinds, mirrored, turned, copies, kept_images, is_decided, strict=True
    ):
        reason = _explain(KINDS[kind], copy, kept, keep, is_mirrored=is_mirrored, is_turned=is_turned)
        yield f"{reason}, which people have decided on" if is_kept_by_people else reason


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
