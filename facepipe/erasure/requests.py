"""Erase requests: an erasure is recorded and hidden at once, and done by whoever may write to the gallery.

An erasure must not wait for a job that holds the gallery's lease for weeks. So it has two halves.

**Record** (this module) needs no lease. It selects the images, writes `erased/ID.pending`, writes the hashes that keep
the images out, and adds the request to `erased/hidden.list`. Readers look at that list before each read: a gallery,
an export and a search leave the images out from then on, also if they were opened before. If the index is behind the
table, it may hold faces of earlier contents under other ids; `find_indexed_faces` adds them in a second step.

**Do** (`facepipe.erasure.steps`) has four parts, each under the lease of its folder: rows, index, reports and
decisions. The command that recorded the request does every part whose lease is free. A running job does the part whose
lease it holds, and the others if their leases are free (`facepipe.erasure.takeup`):

- embed, adopt and compact look for requests every second, in a thread of their own. They delete the rows in a commit
  of their own, between two commits of their work. From the first sight of a request to the end of the run, the images
  that it means are taken out of finished blocks before these are committed. So the result is the same as if the
  erasure had come after the run. That also holds if the table had none of the images when it was recorded.
- index and the reports do their part at their end, under the lease that they have held all the time. What they have
  written may hold the images, because they read an older version of the table. Until then readers leave them out.
- nightly finishes requests between its steps.

Old files are deleted last, when all parts are done. So a job that reads an older version of the table and holds
the lease of the index or the reports keeps its files until its end. Then the receipt is written, and the request is
taken off the list. Everything can be repeated: after a crash at any point the next job or erase resumes.

A job waits for a lease that an erasure holds, instead of failing.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

import facepipe
from facepipe.decisions.erase import find_former_ids
from facepipe.erasure import pending
from facepipe.erasure.pending import PendingErasure
from facepipe.erasure.receipt import Receipt
from facepipe.erasure.selection import SelectedImages, Selection, unite_images
from facepipe.erasure.steps import set_counts
from facepipe.erasure.vectors import find_indexed_ids
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.erasure_key import read_key
from facepipe.index import manifest as manifests
from facepipe.observe.runs import new_run_id
from facepipe.types import Int64


def record_request(
    gallery: Gallery,
    selection: Selection | None,
    selected: SelectedImages,
    *,
    requested: datetime,
    may_return: bool = False,
    continues: Receipt | None = None,
    repeats: Sequence[str] = (),
    share: float = 1.0,
    purge_days: float = 0.0,
) -> PendingErasure:
    """Record an erasure. When this returns, no reader returns the images any more.

    Args:
        gallery: the gallery.
        selection: the conditions; None if only what is selected is meant.
        selected: what they mean now.
        requested: the time from which ages are counted.
        may_return: let a later `embed` take the images in again.
        continues: receipt of an erasure of which this one is a later part.
        repeats: ids of the erasures that this one repeats.
        share: largest share of the table's rows that it may come to, with images that come in later.
        purge_days: days that deleted rows may stay on disk, hidden from all readers.
    """
    if continues is not None:
        chosen_by = continues.chosen_by
    elif selection is not None:
        chosen_by = selection.list_conditions()
    else:
        chosen_by = ["receipts"]
    receipt = Receipt(
        id=new_run_id(),
        gallery=gallery.id,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        chosen_by=chosen_by,
        facepipe=facepipe.__version__,
        version_before=selected.version,
        suppressed=not may_return,
        continues=continues.id if continues else "",
        repeats=list(continues.repeats if continues else repeats),
        key=continues.key if continues else _get_key_fingerprint(),
    )
    set_counts(receipt, selected)
    erasure = PendingErasure(receipt, selected, selection, requested, share, purge_days)
    _write_request(gallery.path, erasure)
    return erasure


def _get_key_fingerprint() -> str:
    key = read_key()
    return key.fingerprint if key is not None else ""


def extend_request(gallery: str, erasure: PendingErasure, selected: SelectedImages) -> None:
    """Add images to an erasure that nobody works on yet."""
    erasure.selected = unite_images(erasure.selected, selected)
    set_counts(erasure.receipt, erasure.selected)
    _write_request(gallery, erasure)


def _write_request(gallery: str, erasure: PendingErasure) -> None:
    # The pending file first: after a crash from here on the next erase does the rest.
    pending.write_pending(gallery, erasure)
    if erasure.receipt.suppressed:
        selected = erasure.selected
        suppressed.suppress_images(gallery, erasure.id, selected.uris.to_pylist(), selected.contents.to_pylist())


def find_indexed_faces(gallery: str, erasure: PendingErasure) -> Int64:
    """Find faces of a request's images that only the index or decisions know, and have readers leave them out.

    If the index answers for the table, it has none. Else the labels of all its faces are read. Decisions know faces
    under the ids that they had before their images were embedded anew.

    Returns:
        Their ids.
    """
    parts = [find_former_ids(Gallery(gallery), erasure.selected.uris)]
    if manifests.exists(gallery):
        parts.append(find_indexed_ids(gallery, erasure.selected))
    faces = np.setdiff1d(np.concatenate(parts), erasure.selected.faces.to_numpy())
    if len(faces):
        pending.write_indexed(gallery, erasure, faces)
    return faces
