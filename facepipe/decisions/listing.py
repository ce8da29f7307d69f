"""Decisions as people look at them: newest first, with their state; and how many there are."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.decisions.export import to_json
from facepipe.decisions.read import drop_hidden
from facepipe.decisions.schema import UNDO
from facepipe.decisions.table import DecisionTable
from facepipe.decisions.undo import drop_repeated, find_active
from facepipe.errors import GalleryError
from facepipe.gallery.hidden import HiddenWatch
from facepipe.gallery.table import Gallery
from facepipe.sources.labels import format_label

ACTIVE = "active"
UNDONE = "undone"


@dataclass
class Listing:
    """Decisions of a gallery.

    Attributes:
        rows: decisions, newest first, as `facepipe.decisions.export.to_json` returns them, with their `state`.
        total: how many there are, of those that were asked for.
        counts: active decisions by kind.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def shown(self) -> int:
        """How many decisions `rows` holds."""
        return len(self.rows)


def list_decisions(
    gallery: str, *, everything: bool = False, person: str | None = None, most: int | None = None
) -> Listing:
    """List decisions, newest first.

    Args:
        gallery: path or URL of the gallery.
        everything: also those that were taken back, and the undos.
        person: only those that name a person.
        most: largest number of rows.
    """
    table = DecisionTable(Gallery(gallery).path)
    if not table.exists:
        return Listing()
    rows = drop_hidden(drop_repeated(table.read()), HiddenWatch(table.gallery).read())
    rows = rows.append_column("is_active", pa.array(find_active(rows)))
    counts = _count_active(rows)
    if not everything:
        rows = rows.filter(pc.and_(rows["is_active"], pc.not_equal(rows["decision"], UNDO)))
    if person is not None:
        rows = rows.filter(pc.fill_null(pc.equal(rows["person"], format_label(person) or ""), False))
    # By the time at which it was decided, or else came in.
    time = pc.coalesce(rows["decided_at"], rows["added_at"])
    ordered = rows.append_column("time", time).sort_by([("time", "descending"), ("decision_id", "ascending")])
    shown = ordered if most is None else ordered.slice(0, most)
    listed = []
    for row in shown.drop_columns(["time"]).to_pylist():
        state = ACTIVE if row.pop("is_active") else UNDONE
        listed.append(to_json(row) | {"state": state})
    return Listing(listed, rows.num_rows, counts)


def _count_active(rows: pa.Table) -> dict[str, int]:
    is_shown = np.asarray(pc.and_(rows["is_active"], pc.not_equal(rows["decision"], UNDO)).to_numpy(), bool)
    counts = Counter(rows["decision"].filter(pa.array(is_shown)).to_pylist())
    return dict(sorted(counts.items()))


def describe_decisions(gallery: str) -> dict[str, Any]:
    """Describe the decisions of a gallery for `info`; empty if there are none, and an error if they are damaged."""
    try:
        table = DecisionTable(gallery)
        if not table.exists:
            return {}
        counts = list_decisions(gallery, most=0).counts
    except GalleryError as error:
        return {"error": str(error)}
    return {**counts, "rows": table.rows, "files": len(table.files), "version": table.version}
