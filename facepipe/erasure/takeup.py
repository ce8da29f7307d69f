"""Take up erase requests in a job that is running: see `facepipe.erasure.requests` for the whole.

Every job looks at the list of requests. One that commits to the table also takes their images out of what it commits.
"""

import contextvars
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.erasure import pending
from facepipe.erasure.limits import count_rows, is_beyond
from facepipe.erasure.purges import choose_due, do_purges, list_purges
from facepipe.erasure.requests import extend_request, record_request
from facepipe.erasure.selection import SelectedImages, select_images, select_rows
from facepipe.erasure.steps import Advance, HeldLeases, advance_erasures, is_advancing
from facepipe.errors import FacepipeError, GalleryBusyError, StorageError
from facepipe.gallery import Gallery, hidden, suppressed
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord, replace_part
from facepipe.gallery.maintenance.vacuum import find_unreferenced
from facepipe.hashing import hash64_column
from facepipe.observe.logs import log_event
from facepipe.schema import conform
from facepipe.storage.lease import Lease
from facepipe.types import Bool

_POLL_SECONDS = 1.0
_MAX_POLL_SECONDS = 10.0
# The command that recorded a request may do what the job holds no lease for. The job does so if the command does not.
_GRACE_SECONDS = 10.0
# How long an erasure stays open because finished blocks, which are committed soon, hold its images.
_BLOCK_SECONDS = 60.0
# How long the thread of a job that fails is waited for.
_STOP_SECONDS = 20.0
# Images that are taken out of finished blocks get receipts of their own: one for this time, if many are.
_FOLLOW_UP_SECONDS = 600.0
# How often hidden rows are looked for whose time is over.
_PURGE_SECONDS = 600.0

Item = TypeVar("Item")


def take_up_requests(gallery: str, held: HeldLeases) -> None:
    """Do what can be done of erase requests at the end of a job. A failure is logged, and does not make the job fail.

    Args:
        gallery: folder or URL of the gallery.
        held: the leases that the job holds.
    """
    try:
        if not is_advancing() and hidden.list_requests(gallery):
            _log_doubts(advance_erasures(gallery, held))
    except (FacepipeError, OSError) as error:
        log_event("erasure.postponed", logging.WARNING, error=error)


def _log_doubts(advance: Advance) -> bool:
    for _ in advance.doubts:
        log_event("erasure.limited", logging.WARNING)
    return advance.is_complete


def _get_unique(rows: pa.Table, column: str) -> pa.Array:
    return pc.unique(rows[column].combine_chunks()).drop_null()


class _StandingRequest:
    """A request from its first sight to the end of the run: no image that it means is committed."""

    def __init__(self, gallery: str, erasure: pending.PendingErasure):
        self.selection = erasure.selection
        self.requested = erasure.requested or datetime.now(UTC)
        self.is_suppressed = erasure.receipt.suppressed
        self.is_personal = erasure.selection is not None and erasure.selection.is_personal
        self.seen_at = time.monotonic()
        self.receipt = erasure.receipt
        self.follow_up: pending.PendingErasure | None = None
        self._share = erasure.share
        self._erased_rows = erasure.selected.rows
        # A receipt that is repeated may have images that the table lacks.
        self._repeated_uris, self._repeated_contents = suppressed.read_receipt_lists(gallery, erasure.receipt.repeats)
        self._uris = erasure.selected.uris
        self._contents = erasure.selected.contents
        self._dropped: list[pa.Table] = []

    def mark_rows(self, rows: pa.Table) -> Bool:
        """Mark all rows of images that the request means, (n,).

        Args:
            rows: rows of a finished block, with the columns of the conditions.
        """
        mask = self._match_conditions(rows) | _is_in(rows["uri"], self._uris)
        if self._repeated_uris.size:
            mask |= self._repeated_uris.contains(hash64_column(rows["uri"]))
        if self._repeated_contents.size:
            mask |= self._repeated_contents.contains(hash64_column(rows["image_id"]))
        count = -1
        while mask.sum() != count:
            count = mask.sum()
            # All rows of these images. A block holds whole images.
            selected = rows.filter(pa.array(mask))
            mask |= _is_in(rows["uri"], _get_unique(selected, "uri"))
            # Exact copies under other names, of images of earlier blocks as well.
            if self.is_personal:
                self._contents = pc.unique(pa.concat_arrays([self._contents, _get_unique(selected, "image_id")]))
                mask |= _is_in(rows["image_id"], self._contents)
        return mask

    def _match_conditions(self, rows: pa.Table) -> Bool:
        mask = np.zeros(rows.num_rows, bool)
        if self.selection is not None and self.selection.means_later_images:
            # Number the rows, so that the filter, which returns rows, tells which they are.
            numbered = ds.dataset(rows.append_column("row", pa.array(np.arange(rows.num_rows))))
            matching = numbered.to_table(columns=["row"], filter=self.selection.build_filter(self.requested))
            mask[matching["row"].to_numpy()] = True
        return mask

    def drop(self, rows: pa.Table) -> None:
        """Note rows that are taken out of a block."""
        self._dropped.append(rows.select(_DROPPED_COLUMNS))

    def select_in_table(self, gallery: str) -> None:
        """Record what the run has brought in another way, such as a label that has changed at the source."""
        if self.selection is None or not self.selection.means_later_images:
            return
        table = Gallery(gallery)
        selected = select_images(table, self.selection, self.requested)
        if not selected.images:
            return
        if self._is_beyond(table, self._erased_rows + selected.rows):
            # Labels that changed by mistake at the source must not cost the gallery.
            log_event("erasure.limited", logging.WARNING)
            return
        self._record(table, selected)

    def record_dropped(self, gallery: str) -> None:
        """Record what was taken out as an erasure of its own: a follow-up, which has a receipt and finds exact copies.

        A run that is killed afterwards does not bring the images in when it is repeated.
        """
        if not self._dropped:
            return
        selected = select_rows(pa.concat_tables(self._dropped), is_personal=self.is_personal)
        self._erased_rows += sum(rows.num_rows for rows in self._dropped)
        self._dropped = []
        # Images that are taken out beyond the limit come in with the next run: nothing else would bring them back.
        if self.is_suppressed and self._is_beyond(Gallery(gallery), self._erased_rows):
            log_event("erasure.limited", logging.WARNING)
            self.is_suppressed = False
            self.follow_up = None
        if self.follow_up is not None:
            extend_request(gallery, self.follow_up, selected)
            return
        self.follow_up = self._record(Gallery(gallery), selected)

    def _is_beyond(self, table: Gallery, rows: int) -> bool:
        return is_beyond(rows, count_rows(table) + rows, self._share)

    def _record(self, table: Gallery, selected: SelectedImages) -> pending.PendingErasure:
        return record_request(
            table,
            self.selection,
            selected,
            requested=self.requested,
            may_return=not self.is_suppressed,
            continues=self.receipt,
        )


_CONDITION_COLUMNS = ["face_id", "image_id", "uri", "source", "identity", "ingested_at", "missing_since"]
_DROPPED_COLUMNS = ["face_id", "image_id", "uri", "identity", "embedding"]


def _is_in(column: pa.ChunkedArray, values: pa.Array) -> Bool:
    return np.asarray(pc.fill_null(pc.is_in(column, values), False).to_numpy(zero_copy_only=False), bool)


class RequestTaker:
    """Takes up erase requests in a run that holds the gallery's lease and commits to its table.

        with RequestTaker(committer, lease) as taker:
            for record in taker.follow(records):     # starts with the first one
                ...

    A failed attempt is logged and repeated; it does not end the run.

    Attributes:
        committer: Commits for the run.
    """

    def __init__(self, committer: Committer, lease: Lease):
        self.committer = committer
        self._gallery = committer.gallery.path
        self._lease = lease
        self._standing: dict[str, _StandingRequest] = {}
        self._last_follow_up = time.monotonic()
        self._last_purge = time.monotonic()
        self._wants_commit = False
        self._stop = threading.Event()
        # The thread logs as part of this run.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._watch,), name="erasure", daemon=True)
        self._is_started = False

    def __enter__(self) -> "RequestTaker":
        self.committer.screen = self._screen
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # No commit of the thread may come after the run's lease is released.
        self._stop.set()
        if self._is_started:
            self._thread.join(None if error is None else _STOP_SECONDS)
        if error is None:
            self._attempt(is_last=True)
            self._delete_leftovers()
        self.committer.close()

    def start(self) -> None:
        """Begin to look for requests. What the run reads of older versions of the table has been read by now."""
        if not self._is_started:
            self._is_started = True
            self._thread.start()

    def follow(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items of an iterator, and begin to look for requests with the first one."""
        try:
            for item in items:
                self.start()
                yield item
        finally:
            getattr(items, "close", lambda: None)()

    @property
    def wants_commit(self) -> bool:
        """Whether finished blocks should be committed soon, because they may hold erased images."""
        return self._wants_commit

    def _watch(self) -> None:
        """Look for requests again and again; less often if one cannot be completed."""
        pause = _POLL_SECONDS
        while not self._stop.wait(pause):
            is_complete = self._attempt()
            pause = _POLL_SECONDS if is_complete else min(_MAX_POLL_SECONDS, 1.5 * pause)

    def _attempt(self, *, is_last: bool = False) -> bool:
        """Do what can be done now, and return whether no request is left."""
        try:
            self._purge()
            return self._take_up(is_last=is_last)
        except (FacepipeError, OSError) as error:
            log_event("erasure.postponed", logging.WARNING, error=error)
            return False

    def _purge(self) -> None:
        """Remove hidden rows whose time is over: a run may hold the gallery's lease for weeks."""
        if time.monotonic() - self._last_purge < _PURGE_SECONDS:
            return
        self._last_purge = time.monotonic()
        due = choose_due(list_purges(self._gallery), margin=False)
        with suppress(GalleryBusyError):
            do_purges(self._gallery, due, self._lease, self.committer)

    def _take_up(self, *, is_last: bool) -> bool:
        requests = hidden.list_requests(self._gallery)
        if is_last:
            for request in list(self._standing.values()):
                request.select_in_table(self._gallery)
        elif not requests:
            return True
        self._find_standing(requests)
        self._close_follow_ups(is_last=is_last)
        newest = max((request.seen_at for request in list(self._standing.values())), default=0.0)
        age = time.monotonic() - newest
        held = HeldLeases(
            gallery=self._lease,
            committer=self.committer,
            awaits_blocks=not is_last and age < _BLOCK_SECONDS,
        )
        is_left_to_command = not is_last and age < _GRACE_SECONDS
        parts = (pending.ROWS,) if is_left_to_command else pending.PARTS
        return _log_doubts(
            advance_erasures(self._gallery, held, parts=parts, skipped=self._get_open_follow_ups()),
        )

    def _close_follow_ups(self, *, is_last: bool) -> None:
        """Let follow-ups be done: at once if they may have copies in the table, else after some minutes."""
        is_due = is_last or time.monotonic() - self._last_follow_up > _FOLLOW_UP_SECONDS
        # Not while blocks are screened, which adds to what is recorded.
        with self.committer.exclude_commits():
            for request in list(self._standing.values()):
                if is_due or request.is_personal:
                    request.follow_up = None
        if is_due:
            self._last_follow_up = time.monotonic()

    def _get_open_follow_ups(self) -> frozenset[str]:
        with self.committer.exclude_commits():
            follow_ups = (request.follow_up for request in list(self._standing.values()))
            return frozenset(follow_up.id for follow_up in follow_ups if follow_up is not None)

    def _find_standing(self, requests: tuple[str, ...]) -> None:
        """Note requests that are new. From here on their images are taken out of finished blocks."""
        for request in requests:
            if request in self._standing:
                continue
            erasure = pending.read_erasure(self._gallery, request)
            # Follow-ups are parts of requests that are noted already.
            if erasure is None or erasure.receipt.continues in self._standing:
                continue
            # Blocks that are being committed have not been screened, so the rows are looked for after that.
            with self.committer.exclude_commits():
                self._standing.setdefault(request, _StandingRequest(self._gallery, erasure))
            self._wants_commit = True

    def _delete_leftovers(self) -> None:
        """Delete blocks that were written and never came back: they may hold what must not be there."""
        if not self._standing:
            return
        with self.committer.exclude_commits():
            names = [entry.url for entry in find_unreferenced(Gallery(self._gallery))]
            own = [name for name in names if os.path.basename(name).startswith(self.committer.part_prefix)]
            storage.delete_many(own, before_batch=self._lease.check)

    def _screen(self, records: list[PartRecord]) -> list[PartRecord]:
        """Take erased images out of finished blocks."""
        self._find_standing(hidden.list_requests(self._gallery))
        self._wants_commit = False
        if not self._standing:
            return records
        screened = [self._screen_record(record) if record.path else record for record in records]
        for request in list(self._standing.values()):
            request.record_dropped(self._gallery)
        return screened

    def _screen_record(self, record: PartRecord) -> PartRecord:
        assert record.path is not None
        path = storage.join(self.committer.gallery.faces_folder, record.path)
        try:
            with storage.open_seekable(path) as handle:
                part = pq.ParquetFile(handle)
                rows = _read_condition_columns(part)
                masks = [(request, request.mark_rows(rows)) for request in list(self._standing.values())]
                hits = [(request, mask) for request, mask in masks if mask.any()]
                if not hits:
                    return record
                whole = conform(part.read())
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"cannot read {path!r}: {storage.describe_error(error)}") from error
        is_kept = np.ones(whole.num_rows, bool)
        for request, mask in hits:
            request.drop(whole.filter(pa.array(mask)))
            is_kept &= ~mask
        # Older rows of these images go with the erasure itself.
        return replace_part(record, whole.filter(pa.array(is_kept)), self.committer.gallery.faces_folder)


def _read_condition_columns(part: pq.ParquetFile) -> pa.Table:
    """Read the columns that conditions look at; those that a part lacks are null."""
    names = [name for name in _CONDITION_COLUMNS if name in part.schema_arrow.names]
    return conform(part.read(names)).select(_CONDITION_COLUMNS)
