"""Commits: parts become visible, all at once and exactly once; older rows of changed images go in the same step."""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import Transaction

from facepipe import storage
from facepipe.errors import GalleryBusyError, StorageError
from facepipe.gallery.commits.parts import PartRecord
from facepipe.gallery.commits.rewrite import Action, Rewrite, make_add_action, plan_rewrite_of_uris, rewrite_files
from facepipe.gallery.table import Gallery, open_table
from facepipe.schema import FACES
from facepipe.storage.lease import Lease

_NOTE = "facepipe"
_TRIES = 5


class Committer:
    """Commits a run's work to a gallery, transaction after transaction.

    A commit takes exactly the next version of the table or fails: of two writers one wins. Where a transaction of
    another run has come in between, the run has lost its lease without knowing it, and ends with GalleryBusyError.
    """

    def __init__(self, gallery: Gallery, run: str, lease: Lease | None = None):
        self.gallery, self.run = gallery, run
        self.commits = 0
        self._lease = lease
        # What the caller read: a commit of another run since then, however late it came in, must not be overlooked.
        self._seen = gallery.version
        with _reported(gallery.path):
            self._table = open_table(gallery.faces_folder)

    def __call__(self, records: list[PartRecord], metadata: dict[str, Any]) -> None:
        """Make the records' parts visible, with the run's figures so far in the log."""
        parts = [record for record in records if record.path]
        touched = {uri: mark for record in records for uri, mark in record.touched.items() if mark}
        replaced = {uri for record in parts for uri in record.replaced}
        if not parts and not touched:
            return

        def actions() -> list[Action]:
            found: list[Action] = [make_add_action(r.path, r.size, r.stats) for r in parts if r.path]
            if replaced:
                found += rewrite_files(Gallery(self.gallery.path), _without(replaced, touched))
            elif touched:
                found += rewrite_files(Gallery(self.gallery.path), _marked(touched))
            return found

        self.commit_actions(actions, metadata)

    def commit_actions(self, make: Callable[[], list[Action]], metadata: dict[str, Any]) -> None:
        """Commit what `make` gives for the table as it is now; nothing where it gives nothing.

        SIGTERM and Ctrl-C wait until it is done: what is finished is committed, not done again by the next run.
        """
        with _undisturbed():
            for _ in range(_TRIES):
                self._catch_up()
                actions = make()
                if not actions:
                    return
                if self._lease:
                    self._lease.check()
                if self._landed(actions, self._number() + 1, metadata):
                    self.commits += 1
                    return
        raise GalleryBusyError(f"others keep writing to {self.gallery.path!r}: {_TRIES} commits were overtaken")

    def _landed(self, actions: list[Action], number: int, metadata: dict[str, Any]) -> bool:
        """Commit as the next version; False where another commit took it."""
        properties = CommitProperties(
            custom_metadata={_NOTE: json.dumps({"run": self.run, "commit": number, **metadata})},
            app_transactions=[Transaction(self.run, number)],
            max_commit_retries=0,
        )
        try:
            self._table.create_write_transaction(actions, "append", self._table.schema(), commit_properties=properties)
        except (CommitFailedError, DeltaError, OSError) as error:
            with _reported(self.gallery.path):
                self._table.update_incremental()
            # A commit whose answer was lost is tried again by the client, and then refused.
            if self._number() >= number:
                return True
            if isinstance(error, CommitFailedError):
                return False
            raise StorageError(f"cannot commit to {self.gallery.path!r}: {storage.describe_error(error)}") from error
        return True

    def _number(self) -> int:
        """Of this run's last commit in the table; the table knows it also where an interruption kept it from us."""
        with _reported(self.gallery.path):
            return self._table.transaction_version(self.run) or 0

    def _catch_up(self) -> None:
        with _reported(self.gallery.path):
            self._table.update_incremental()
            passed = self._table.version() - self._seen
            entries = self._table.history(passed) if passed > 0 else []
        for entry in entries:
            if _NOTE in entry and json.loads(entry[_NOTE])["run"] != self.run:
                raise GalleryBusyError(
                    f"another run has written to {self.gallery.path!r} since this one began, and this one's lease is "
                    "lost; what it committed is kept: run the same command again"
                )
        self._seen = self._table.version()


def _without(replaced: set[str], touched: dict[str, str]) -> Rewrite:
    """The replaced uris' rows go; the touched ones' get their new fingerprints on the way."""
    gone = pa.array(sorted(replaced), pa.string())

    def change(rows: pa.Table, mask: pa.BooleanArray) -> pa.Table:
        return _with_fingerprints(rows.filter(pc.invert(pc.is_in(rows["uri"], gone))), touched)

    # A file that holds only touched rows is said to change data as well: readers lose nothing by it.
    return plan_rewrite_of_uris(replaced | touched.keys(), change)


def _marked(touched: dict[str, str]) -> Rewrite:
    return plan_rewrite_of_uris(touched.keys(), lambda rows, mask: _with_fingerprints(rows, touched), data_change=False)


def _with_fingerprints(rows: pa.Table, touched: dict[str, str]) -> pa.Table:
    """Rows with new fingerprints; what was touched is there, and so is no longer missing."""
    if not touched:
        return rows
    uris = rows["uri"].to_pylist()
    marks = [touched.get(uri, mark) for uri, mark in zip(uris, rows["fingerprint"].to_pylist(), strict=True)]
    since = [None if uri in touched else at for uri, at in zip(uris, rows["missing_since"].to_pylist(), strict=True)]
    for name, values in (("fingerprint", marks), ("missing_since", since)):
        n = FACES.get_field_index(name)
        rows = rows.set_column(n, FACES.field(n), pa.array(values, FACES.field(n).type))
    return rows


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put the first SIGTERM or Ctrl-C off to the end of what is done inside; a second one is not put off."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        handler = before[signum]
        if len(caught) > 1 and callable(handler):
            handler(signum, frame)

    found: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in found.items() if handler is not None}  # None: not Python's
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if len(caught) == 1:
            signal.raise_signal(caught[0])


@contextmanager
def _reported(path: str) -> Iterator[None]:
    try:
        yield
    except (DeltaError, OSError) as error:
        raise StorageError(f"the table of {path!r} cannot be read: {storage.describe_error(error)}") from error
