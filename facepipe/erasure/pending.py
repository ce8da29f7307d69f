"""An erasure that is recorded, kept until it is complete, so that neither a crash nor a running job can stop it.

`ID.pending` says what is to be erased, and by which conditions it was selected. Files of progress say what has been
done to the rows, the index, the reports and old files. Each is written only by the holder of the lease of that part,
so that several runs can work on one erasure. `ID.indexed` lists faces that only the index holds.
"""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from facepipe import storage
from facepipe.erasure.receipt import RECEIPT, Receipt
from facepipe.erasure.selection import SelectedImages, Selection
from facepipe.errors import GalleryBusyError, StorageError
from facepipe.gallery import hidden
from facepipe.gallery.hidden import INDEXED, PENDING, make_damage_error, parse_pending, select_values
from facepipe.gallery.suppressed import get_erased_folder, write_erased_file
from facepipe.storage import conditional
from facepipe.storage.atomic import UNFINISHED
from facepipe.types import Int64

# Parts of an erasure, each under the lease of one folder.
ROWS = "rows"
INDEX = "index"
REPORTS = "reports"
DECISIONS = "decisions"
PARTS = (ROWS, INDEX, REPORTS, DECISIONS)
# Comes when these are done, under the gallery's lease.
FILES = "files"

_PROGRESS = ".state"
_GUARD = ".guard"
# What an erasure has beside its pending file while it is not complete.
_OWNED_FILE = re.compile(
    rf"(\d{{8}}T\d{{6}}-[0-9a-f]{{6}})"
    rf"(?:(?:\.[a-z]+)?{re.escape(_PROGRESS)}|{re.escape(INDEXED)}|\.[a-z.]+{re.escape(UNFINISHED)})"
)
# What each part writes into the receipt.
_FIELDS = {
    ROWS: ("version_before", "version_after", "files_before", "files_after"),
    INDEX: ("vectors", "index_before", "index_after"),
    REPORTS: ("reports", "foreign"),
    DECISIONS: ("decisions",),
    FILES: ("files_deleted", "log_files_deleted"),
}
# The arrays of SelectedImages, by the type they have there.
_TYPES = {
    hidden.URIS: pa.string(),
    "contents": pa.string(),
    "names": pa.string(),
    hidden.FACES: pa.int64(),
    "marks": pa.uint64(),
    "former_uris": pa.string(),
}
_ROWS = pa.schema([("kind", pa.string()), ("value", pa.string())])


@dataclass
class PendingErasure:
    """An erasure that is not complete.

    Attributes:
        receipt: the receipt so far.
        selected: the images.
        selection: the conditions; None if an older facepipe began the erasure.
        requested: when it was recorded.
        share: largest share of the table's rows that the erasure may come to, with images that come in later.
        purge_days: days that deleted rows may stay on disk, hidden from all readers; 0 if they go at once.
        indexed: ids that only the index holds: faces of earlier contents of the images.
        done: the parts that are done.
    """

    receipt: Receipt
    selected: SelectedImages
    selection: Selection | None = None
    requested: datetime | None = None
    share: float = 1.0
    purge_days: float = 0.0
    indexed: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    done: set[str] = field(default_factory=set)

    @property
    def id(self) -> str:
        """The id of the erasure and of its receipt."""
        return self.receipt.id


def write_pending(gallery: str, erasure: PendingErasure, *, must_exist: bool = False) -> None:
    """Write down what is to be erased, and have readers leave it out.

    The file holds names, so it is deleted when the erasure is complete. Once it is written, only the holder of the
    gallery's lease writes it again.

    Args:
        gallery: folder or URL of the gallery.
        erasure: what is to be erased.
        must_exist: the file is written again. It must not come back if another run has completed the erasure.

    Raises:
        GalleryBusyError: another run has completed the erasure.
    """
    # All values go into one table as texts; the kind tells the arrays apart.
    selected = erasure.selected
    parts = []
    for name in _TYPES:
        values = getattr(selected, name).cast(pa.string())
        parts.append(pa.table([pa.repeat(name, len(values)), values], schema=_ROWS))
    head: dict[str, Any] = {
        "receipt": replace(erasure.receipt, hashes={}).to_dict(),
        "version": selected.version,
        "rows": selected.rows,
        "share": erasure.share,
        "purge_days": erasure.purge_days,
    }
    if erasure.selection is not None and erasure.requested is not None:
        head["selection"] = erasure.selection.to_dict()
        head["requested"] = erasure.requested.isoformat()
    sink = io.BytesIO()
    # The receipt so far, and the version of the table, go into the file's metadata.
    pq.write_table(pa.concat_tables(parts).replace_schema_metadata({"erasure": json.dumps(head)}), sink)
    with _hold_guard(gallery):
        if must_exist and not is_pending(gallery, erasure.id):
            raise GalleryBusyError(f"another run has completed the erasure {erasure.id} meanwhile")
        write_erased_file(gallery, erasure.id + PENDING, sink.getvalue())
    hidden.add_request(gallery, erasure.id)


def write_indexed(gallery: str, erasure: PendingErasure, faces: Int64) -> None:
    """Add faces that only the index holds, and have readers leave them out."""
    erasure.indexed = np.union1d(erasure.indexed, faces)
    if _write_beside_pending(gallery, erasure.id, INDEXED, erasure.indexed.astype("<i8").tobytes()):
        hidden.add_request(gallery, erasure.id)


def save_progress(gallery: str, receipt: Receipt, part: str, *, is_done: bool = False) -> None:
    """Save what a part has done: a crash must not lose which files held erased data.

    The caller holds the lease of the part. If another run has completed the erasure meanwhile, nothing is saved.
    """
    progress = {"done": is_done, "receipt": {name: getattr(receipt, name) for name in _FIELDS[part]}}
    _write_beside_pending(gallery, receipt.id, f".{part}{_PROGRESS}", json.dumps(progress).encode())


def _write_beside_pending(gallery: str, request: str, ending: str, data: bytes) -> bool:
    """Write a file of an erasure, and return whether it was written: not if the erasure is complete."""
    with _hold_guard(gallery):
        if not is_pending(gallery, request):
            return False
        write_erased_file(gallery, request + ending, data)
        return True


def update_progress(gallery: str, erasure: PendingErasure) -> bool:
    """Read what other runs have done to an erasure meanwhile.

    Returns:
        False if it is complete: another run has finished it.
    """
    names = _list_names(gallery)
    if erasure.id + PENDING not in names:
        return False
    for part in _FIELDS:
        if f"{erasure.id}.{part}{_PROGRESS}" in names:
            _add_progress(gallery, erasure, part)
    indexed = conditional.read_tagged(_get_path(gallery, erasure.id + INDEXED))
    if indexed is not None:
        erasure.indexed = np.frombuffer(indexed[0], "<i8").astype(np.int64)
    return True


def _add_progress(gallery: str, erasure: PendingErasure, part: str) -> None:
    content = conditional.read_tagged(_get_path(gallery, f"{erasure.id}.{part}{_PROGRESS}"))
    if content is None:
        return  # completed by another run just now
    try:
        progress = json.loads(content[0])
        values = {name: progress["receipt"][name] for name in _FIELDS[part]}
        # Validation finds values of another type.
        checked = RECEIPT.validate_python(erasure.receipt.to_dict() | values)
    except (ValueError, TypeError, KeyError):
        return  # damaged: the steps it tells of are simply repeated
    for name in _FIELDS[part]:
        setattr(erasure.receipt, name, getattr(checked, name))
    if progress["done"]:
        erasure.done.add(part)


def read_unfinished(gallery: str) -> list[PendingErasure]:
    """Read the erasures that are recorded and not complete, oldest first.

    Raises:
        GalleryError: a file is damaged.
    """
    names = sorted(name for name in _list_names(gallery) if name.endswith(PENDING))
    erasures = (_read_pending(gallery, name) for name in names)
    return [erasure for erasure in erasures if erasure is not None]


def read_erasure(gallery: str, request: str) -> PendingErasure | None:
    """Read one erasure; None if it is complete."""
    if request + PENDING not in _list_names(gallery):
        return None
    return _read_pending(gallery, request + PENDING)


def _read_pending(gallery: str, name: str) -> PendingErasure | None:
    path = _get_path(gallery, name)
    content = conditional.read_tagged(path)
    if content is None:
        return None  # completed by another run just now
    try:
        table = parse_pending(content[0], path)
        # Give each array its type again.
        head = json.loads(table.schema.metadata[b"erasure"])
        values = {kind: select_values(table, kind).cast(type_) for kind, type_ in _TYPES.items()}
        selected = SelectedImages(version=head["version"], rows=head["rows"], **values)
        erasure = PendingErasure(RECEIPT.validate_python(head["receipt"]), selected)
        erasure.share = float(head.get("share", 1.0))  # an older facepipe knew no limit
        erasure.purge_days = float(head.get("purge_days", 0.0))
        # The id becomes the name of files, and anybody may have written this one.
        if erasure.id != name.removesuffix(PENDING):
            raise ValueError("an id that is not the file's")
        if head.get("selection") is not None:
            erasure.selection = Selection.from_dict(head["selection"])
            erasure.requested = datetime.fromisoformat(head["requested"])
        _add_old_progress(gallery, erasure)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise make_damage_error(path) from error
    return erasure if update_progress(gallery, erasure) else None


def _add_old_progress(gallery: str, erasure: PendingErasure) -> None:
    """Read the one file of progress that an older facepipe wrote."""
    name = erasure.id + _PROGRESS
    if name not in _list_names(gallery):
        return
    try:
        receipt = RECEIPT.validate_json(storage.read(_get_path(gallery, name)))
    except ValidationError:  # the steps it tells of are simply repeated
        return
    erasure.receipt = replace(receipt, hashes={})


def restore_list(gallery: str) -> None:
    """Have readers look at all pending files.

    The list of them lacks one if a crash came in between, if an older facepipe wrote it, or if the list was deleted.
    """
    listed = hidden.list_requests(gallery)
    for name in sorted(_list_names(gallery)):
        if name.endswith(PENDING) and name.removesuffix(PENDING) not in listed:
            hidden.add_request(gallery, name.removesuffix(PENDING))


def delete_leftovers(gallery: str) -> None:
    """Delete what killed runs have left of erasures that are complete: progress, lists of faces, unfinished files."""
    if not _list_leftovers(gallery):
        return
    with _hold_guard(gallery):
        for name, request in _list_leftovers(gallery):
            # In a store a listing takes a while, and an erasure may have been recorded since it began.
            if not is_pending(gallery, request):
                storage.delete(_get_path(gallery, name))


def _list_leftovers(gallery: str) -> list[tuple[str, str]]:
    """List files of erasures without a pending file, and their erasures. That is their first file, and goes first."""
    names = _list_names(gallery)
    matches = [match for match in map(_OWNED_FILE.fullmatch, sorted(names)) if match]
    return [(match[0], match[1]) for match in matches if match[1] + PENDING not in names]


def is_pending(gallery: str, request: str) -> bool:
    """Tell whether an erasure is recorded and not complete."""
    return request + PENDING in _list_names(gallery)


def delete_pending(gallery: str, receipt: Receipt) -> None:
    """Delete the files of an erasure that is complete."""
    # Readers stop looking at the names first. Without them the rest says nothing, and after a crash no erasure seems
    # complete that is not.
    # Galleries that are open know the rows that are still on disk, and do not know that they are deleted.
    hidden.remove_request(gallery, receipt.id, oldest_readable=receipt.version_after if receipt.purge_due else 0)
    with _hold_guard(gallery):
        storage.delete(_get_path(gallery, receipt.id + PENDING))
    # Files that a process was writing when it was killed may hold names too. Nobody writes them any more: the first
    # file of an erasure is written under the guard, and the others while it is pending.
    delete_leftovers(gallery)
    if not storage.is_remote(gallery):
        storage.sync_folder(get_erased_folder(gallery))


@contextmanager
def _hold_guard(gallery: str) -> Iterator[None]:
    """Let only one process at a time write or clean up files of names. An object store has no unfinished files."""
    if storage.is_remote(gallery):
        yield
        return
    path = _get_path(gallery, _GUARD)
    storage.make_parent_folder(path)
    try:
        with open(path, "a") as guard:
            conditional.lock_guard(guard, path)
            yield
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {storage.describe_error(error)}") from error


def _get_path(gallery: str, name: str) -> str:
    return storage.join(get_erased_folder(gallery), name)


def _list_names(gallery: str) -> set[str]:
    folder = get_erased_folder(gallery).rstrip("/") + "/"
    return {entry.url.removeprefix(folder) for entry in storage.list_files(folder.rstrip("/"))}
