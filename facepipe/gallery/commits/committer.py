"""Commits: parts become visible all at once and exactly once, and older rows of changed images go in the same step."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pyarrow as pa
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction, RemoveAction

from facepipe import storage
from facepipe.errors import GalleryBusyError, StorageError
from facepipe.gallery.commits import log
from facepipe.gallery.commits.damaged import keep_good_rows
from facepipe.gallery.commits.parts import PartRecord
from facepipe.gallery.commits.rewrite import (
    Action,
    DeleteRows,
    MarkImages,
    PlainTable,
    make_add_action,
    read_rows,
    rewrite_files,
)
from facepipe.gallery.commits.row_changes import RowChanges
from facepipe.gallery.deletion_vectors import Descriptor, RowChoice, decode_rows, encode_rows
from facepipe.gallery.marks import NO_MARKS, TRANSACTION, Marks, format_name, read_marks, write_marks
from facepipe.gallery.table import FENCE, Gallery, reopen_table
from facepipe.storage.conditional import ConflictError
from facepipe.storage.lease import Lease

_METADATA_KEY = "facepipe"
_LEASE_KEY = "lease"  # in the metadata: the lease under which a commit was made
_MAX_ATTEMPTS = 5


class Committer:
    """Commits a run's work to a gallery, transaction after transaction.

    A commit takes exactly the next version of the table or fails: of two writers one wins. If a transaction of another
    run has come in between, this run has lost its lease without knowing, and ends with GalleryBusyError.

    Threads of a run may share it: they commit one after the other.

    Attributes:
        gallery: The gallery that is written to.
        run: Id of the run.
        commits: Number of commits so far.
        screen: Returns the records to commit instead of those of finished blocks, for images that must not get in.
    """

    def __init__(self, gallery: Gallery, run: str, lease: Lease | None = None):
        self.gallery = gallery
        self.run = run
        self.commits = 0
        self.screen: Callable[[list[PartRecord]], list[PartRecord]] = lambda records: records
        self._lease = lease
        self._lock = threading.RLock()
        self._is_closed = False
        # The marks that were read last, and their number.
        self._marks: Marks = NO_MARKS
        self._marks_number = 0
        # How far the log is known. It is followed entry by entry: to open a table of very many files takes seconds. It
        # begins with what the caller read, so that a commit of another run since then is not overlooked.
        self._version = gallery.version
        self._numbers = _read_numbers(gallery, (run, TRANSACTION))
        gallery.require_writable()
        # Whether files may have deletion vectors. An entry must name the one that a file has.
        self._has_vectors = gallery.has_deletion_vectors
        # What this run takes for committed must not be lost, even if a run that was killed has written it.
        log.sync_log(gallery.faces_folder)

    @property
    def part_prefix(self) -> str:
        """With what the names of the run's parts begin."""
        return f"part-{self.run}-"

    def __call__(
        self,
        records: list[PartRecord],
        metadata: dict[str, Any],
        make_more: Callable[[], list[Action]] | None = None,
    ) -> None:
        """Make the parts of records visible.

        Args:
            records: finished blocks; those without a part may bring new fingerprints.
            metadata: the run's figures so far, for the log.
            make_more: makes further actions of the same commit, which concern other files than the records change.
        """
        with self.exclude_commits():
            self._commit_records(self.screen(records), metadata, make_more)

    def _commit_records(
        self, finished: list[PartRecord], metadata: dict[str, Any], make_more: Callable[[], list[Action]] | None
    ) -> None:
        has_damaged = any(record.damaged for record in finished)
        records = keep_good_rows(Gallery(self.gallery.path), finished) if has_damaged else finished
        # Collect new files, new fingerprints, new labels, and images whose older rows have to go.
        parts = [record for record in records if record.path]
        changes = RowChanges(
            replaced={uri for record in parts for uri in record.replaced},
            touched={uri: mark for record in records for uri, mark in record.touched.items() if mark},
            relabelled={uri: label for record in records for uri, label in record.relabelled.items()},
        )

        if not parts and changes.is_empty and make_more is None:
            return

        # Rows to be replaced are looked up in the newest version, which an overtaken commit has changed.
        def make_actions() -> list[Action]:
            actions: list[Action] = [
                make_add_action(part.path, part.size, part.stats) for part in parts if part.path is not None
            ]
            if not changes.is_empty:
                actions += rewrite_files(Gallery(self.gallery.path), changes.plan_rewrite())
            return [*actions, *(make_more() if make_more else [])]

        self.commit_actions(make_actions, metadata)

    def commit_actions(
        self,
        make_actions: Callable[[], list[Action]],
        metadata: dict[str, Any],
        properties: Mapping[str, str] | None = None,
    ) -> None:
        """Commit actions on the table; nothing if there are none.

        SIGTERM and Ctrl-C wait until it is done, so that the next run does not repeat what is finished.

        Args:
            make_actions: makes the actions for the table as it is now. It is called again if another commit is faster.
            metadata: the run's figures so far, for the log.
            properties: properties of the table that the same commit sets.
        """
        with self.exclude_commits(), _delay_signals():
            # Each attempt plans against the newest version, because the last one may have been overtaken.
            for _ in range(_MAX_ATTEMPTS):
                self._check_new_commits()
                actions = make_actions()
                if not actions:
                    return
                if self._commit_next(actions, metadata, properties):
                    return
        raise GalleryBusyError(f"others keep writing to {self.gallery.path!r}: {_MAX_ATTEMPTS} commits were overtaken")

    def drop_deletion_vectors(self) -> None:
        """Let the table have deletion vectors no more, so that every reader of Delta reads it, if no file has one."""
        with self.exclude_commits(), _delay_signals():
            self._check_new_commits()
            folder = self.gallery.faces_folder
            if self._has_vectors and not log.read_deletion_vectors(folder, self._version):
                self._commit_next([PlainTable()], {"job": FENCE})

    @contextmanager
    def exclude_commits(self) -> Iterator[None]:
        """Keep the run's other threads from committing inside the block, and so from having uncommitted rewrites.

        Raises:
            GalleryBusyError: the run has ended.
        """
        with self._lock:
            if self._is_closed:
                raise GalleryBusyError(f"the run that wrote to {self.gallery.path!r} has ended")
            yield

    def close(self) -> None:
        """Refuse commits from now on. A commit of another thread that is going on is waited for."""
        with self._lock:
            self._is_closed = True

    def commit_fence(self) -> None:
        """Make sure that no other run's commit which is already under way is accepted any more.

        A commit takes the next version or fails. So after an empty commit of this run, a run that was paused just
        before its own commit fails.
        """
        with self.exclude_commits(), _delay_signals():
            for _ in range(_MAX_ATTEMPTS):
                self._check_new_commits()
                if self._commit_next([], {"job": FENCE}):
                    return
        raise GalleryBusyError(f"others keep writing to {self.gallery.path!r}: {_MAX_ATTEMPTS} commits were overtaken")

    def _commit_next(
        self, actions: list[Action], metadata: dict[str, Any], properties: Mapping[str, str] | None = None
    ) -> bool:
        """Commit if the lease is still held; False if another commit was faster."""
        if self._lease:
            self._lease.renew()
            metadata = {**metadata, _LEASE_KEY: self._lease.id}
        if not self._try_commit(actions, self._numbers[self.run] + 1, metadata, properties):
            return False
        self.commits += 1
        if self._lease:
            self._lease.settle()
        return True

    def _try_commit(
        self,
        actions: list[Action],
        number: int,
        metadata: dict[str, Any],
        properties: Mapping[str, str] | None = None,
    ) -> bool:
        """Commit as the next version; False if another commit took it."""
        folder = self.gallery.faces_folder
        version = self._version + 1
        # The transaction's number tells after a lost answer whether the commit is in the table.
        vectors = self._read_vectors(actions)
        entry = [*self._encode_actions(actions, properties or {}, vectors), log.encode_transaction(self.run, number)]
        info = {_METADATA_KEY: json.dumps({"run": self.run, "commit": number, **metadata})}
        old_marks, new_marks = self._change_marks(actions, vectors)
        if new_marks != old_marks:
            entry.append(log.encode_transaction(TRANSACTION, new_marks))
            if old_marks:
                info[log.OUTDATED] = format_name(old_marks)
        try:
            log.write_entry(folder, version, "WRITE", entry, **info)
        except ConflictError:
            return False
        except StorageError as error:
            # A store may have taken the entry, and its answer is lost.
            if not (storage.is_remote(folder) and self._is_committed(number)):
                raise StorageError(f"cannot commit to {self.gallery.path!r}: {error}") from error
        self._require_accepted(version, number)
        self._version = version
        self._has_vectors |= any(isinstance(action, DeleteRows) for action in actions)
        self._has_vectors &= not any(isinstance(action, PlainTable) for action in actions)
        self._numbers[self.run] = number
        self._numbers[TRANSACTION] = new_marks
        if log.is_checkpoint_due(version):
            log.write_checkpoint(folder, self._lease)
            with _map_errors(self.gallery.path):
                reopen_table(folder).cleanup_metadata()
        return True

    def _read_vectors(self, actions: list[Action]) -> dict[str, Descriptor]:
        """Read the deletion vectors that files have now, if actions concern files."""
        if not self._has_vectors or all(isinstance(action, MarkImages) for action in actions):
            return {}
        return log.read_deletion_vectors(self.gallery.faces_folder, self._version)

    def _encode_actions(
        self, actions: list[Action], properties: Mapping[str, str], vectors: Mapping[str, Descriptor]
    ) -> list[log.JsonAction]:
        """Encode what an entry changes: properties of the table, and its files."""
        folder = self.gallery.faces_folder
        deletions = [action for action in actions if isinstance(action, DeleteRows)]
        encoded: list[log.JsonAction] = []
        if deletions and not self._has_vectors:
            encoded += log.make_vector_actions(reopen_table(folder), properties)
        elif any(isinstance(action, PlainTable) for action in actions):
            encoded += log.make_plain_actions(reopen_table(folder))
        elif properties:
            encoded.append(log.make_property_action(reopen_table(folder), properties))
        # A file leaves the table only if the deletion vector is named that it has.
        for action in actions:
            if isinstance(action, AddAction | RemoveAction):
                encoded.append(log.encode_action(action, vectors.get(action.path)))
            elif isinstance(action, DeleteRows):
                old = RemoveAction(action.path, action.data_change, int(time.time() * 1000))
                new = AddAction(action.path, action.size, {}, action.since_ms, action.data_change, action.stats)
                encoded.append(log.encode_action(old, vectors.get(action.path)))
                encoded.append(log.encode_action(new, encode_rows(action.rows)))
        return encoded

    def _change_marks(self, actions: list[Action], vectors: Mapping[str, Descriptor]) -> tuple[int, int]:
        """Write the marks that the table has after some actions. Returns the number of the old ones and of the new."""
        old = self._numbers[TRANSACTION]
        added = [action.images for action in actions if isinstance(action, MarkImages)]
        removed = [action.path for action in actions if isinstance(action, RemoveAction)]
        deleted = [action.uris for action in actions if isinstance(action, DeleteRows)]
        if not added and not (old and (removed or deleted)):
            return old, old
        if old != self._marks_number:
            self._marks = read_marks(self.gallery.faces_folder, old)
            self._marks_number = old
        # Rows that are written anew hold what their marks say, and rows that are gone need none.
        marks = self._marks
        if deleted:
            marks = marks.drop(pa.concat_arrays(deleted))
        for path in removed:
            if not len(marks):
                break
            uris = read_rows(self.gallery, path, ["uri"], with_deleted=True)["uri"]
            # Images whose rows were deleted from the file may have rows, and marks, elsewhere.
            if path in vectors:
                uris = uris.filter(pa.array(RowChoice(decode_rows(vectors[path])).mask(0, len(uris))))
            marks = marks.drop(uris)
        if added:
            marks = marks.add(pa.concat_tables(added))
        if marks is not self._marks:
            self._marks_number = write_marks(self.gallery.faces_folder, marks)
            self._marks = marks
        return old, self._marks_number

    def _require_accepted(self, version: int, number: int) -> None:
        """Raise GalleryBusyError if the table has gone on without the entry that was just written.

        An erasure deletes the older log. If this run was paused before it wrote its entry, the name of the entry may
        have been used and be free again. Readers pass such an entry over.
        """
        folder = self.gallery.faces_folder
        if log.has_later_version(folder, version):
            with _map_errors(self.gallery.path):
                accepted = reopen_table(folder).transaction_version(self.run) or 0
            if accepted < number:
                raise self._make_busy_error()

    def _make_busy_error(self) -> GalleryBusyError:
        return GalleryBusyError(
            f"another run has written to {self.gallery.path!r} since this one began, and this one's lease is lost; "
            "what it committed is kept: run the same command again"
        )

    def _is_committed(self, number: int) -> bool:
        return any(
            action["txn"]["appId"] == self.run and action["txn"]["version"] >= number
            for entry in log.read_entries(self.gallery.faces_folder, self._version)
            for action in entry
            if "txn" in action
        )

    def _check_new_commits(self) -> None:
        """Follow the log to its end. Raises GalleryBusyError if another run has committed to it."""
        for info in self._read_new_commits():
            # Only this run, its lease, and commits without a run may have written since.
            if _METADATA_KEY in info and not self._is_own(json.loads(info[_METADATA_KEY])):
                raise self._make_busy_error()

    def _read_new_commits(self) -> list[dict[str, Any]]:
        """Follow the log to its end, and return what the new entries say of themselves."""
        folder = self.gallery.faces_folder
        infos = []
        for entry in log.read_entries(folder, self._version):
            self._version += 1
            for action in entry:
                if "commitInfo" in action:
                    infos.append(action["commitInfo"])
                elif "txn" in action and action["txn"]["appId"] in self._numbers:
                    self._numbers[action["txn"]["appId"]] = int(action["txn"]["version"])
                elif "protocol" in action:
                    newest = Gallery(self.gallery.path)
                    newest.require_writable()
                    self._has_vectors = newest.has_deletion_vectors
        if log.has_later_version(folder, self._version):
            # Entries in between were deleted, and a checkpoint stands for them.
            with _map_errors(self.gallery.path):
                table = reopen_table(folder)
                infos += table.history(max(1, table.version() - self._version))
                self._version = table.version()
                self._has_vectors = log.has_deletion_vectors(table)
                self._numbers = {name: int(table.transaction_version(name) or 0) for name in self._numbers}
        return infos

    def _is_own(self, metadata: dict[str, Any]) -> bool:
        """Tell whether a commit was made by this run, or under its lease."""
        is_under_lease = self._lease is not None and metadata.get(_LEASE_KEY) == self._lease.id
        return metadata["run"] == self.run or is_under_lease


def _read_numbers(gallery: Gallery, names: tuple[str, ...]) -> dict[str, int]:
    """Read the numbers of the last transactions of some names."""
    try:
        return {name: gallery.get_transaction(name) for name in names}
    except DeltaError:  # the log was cleaned since the gallery was opened
        with _map_errors(gallery.path):
            table = reopen_table(gallery.faces_folder)
            return {name: int(table.transaction_version(name) or 0) for name in names}


def fence_commits(gallery: str, lease: Lease) -> None:
    """Make sure that no commit is accepted of a run that held the lease before.

    Such a run may be paused just before its commit, and would then name files that are deleted by now. An empty commit
    keeps it out. That is needed only if a run was killed or overtaken since the last commit.

    Args:
        gallery: path or URL.
        lease: of the gallery.

    Raises:
        GalleryBusyError: another run has taken the lease over.
    """
    if not lease.is_settled:
        Committer(Gallery(gallery), f"fence-{lease.id}", lease).commit_fence()


@contextmanager
def _delay_signals() -> Iterator[None]:
    """Delay the first SIGTERM or Ctrl-C to the end of the block; a second one takes effect at once."""
    # Signals reach only the main thread.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def note_signal(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        handler = handlers[signum]
        if len(received) > 1 and callable(handler):
            handler(signum, frame)

    current: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A handler that was not set from Python is None; it cannot be put back, so it stays.
    handlers = {number: handler for number, handler in current.items() if handler is not None}
    for number in handlers:
        signal.signal(number, note_signal)
    try:
        yield
    # Restore the handlers, and deliver the one signal that was delayed.
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if len(received) == 1:
            signal.raise_signal(received[0])


@contextmanager
def _map_errors(path: str) -> Iterator[None]:
    """Map errors of deltalake and of the file system to StorageError."""
    try:
        yield
    except (DeltaError, OSError) as error:
        raise StorageError(f"the table of {path!r} cannot be read: {storage.describe_error(error)}") from error
