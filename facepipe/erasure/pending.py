"""An erasure that has begun, kept until it is complete, so that a crash cannot stop it.

Two files: what is to be erased, written once, and the receipt so far, rewritten after every step.
"""

import io
import json
import re
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from facepipe import storage
from facepipe.erasure.receipt import Receipt
from facepipe.erasure.selection import SelectedImages
from facepipe.errors import GalleryError
from facepipe.gallery.suppressed import get_erased_folder, write_erased_file
from facepipe.storage.atomic import UNFINISHED

# Ids of erasures. They become names of files, and may come from a file that anybody wrote.
_ID = re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}")
_UNFINISHED_FILE = re.compile(rf"{_ID.pattern}\.[a-z]+{re.escape(UNFINISHED)}")
_PENDING = ".pending"
_PROGRESS = ".state"
# The arrays of SelectedImages, by the type they have there.
_TYPES = {
    "uris": pa.string(),
    "contents": pa.string(),
    "names": pa.string(),
    "faces": pa.int64(),
    "marks": pa.uint64(),
}
_ROWS = pa.schema([("kind", pa.string()), ("value", pa.string())])


def write_pending(gallery: str, receipt: Receipt, selected: SelectedImages) -> None:
    """Write down what is to be erased. The file holds names, so it is deleted when the erasure is complete."""
    # All values go into one table as texts; the kind tells the arrays apart.
    parts = []
    for name in _TYPES:
        values = getattr(selected, name).cast(pa.string())
        parts.append(pa.table([pa.repeat(name, len(values)), values], schema=_ROWS))
    head = {"receipt": receipt.to_dict(), "version": selected.version, "rows": selected.rows}
    sink = io.BytesIO()
    # The receipt so far, and the version of the table, go into the file's metadata.
    pq.write_table(pa.concat_tables(parts).replace_schema_metadata({"erasure": json.dumps(head)}), sink)
    write_erased_file(gallery, receipt.id + _PENDING, sink.getvalue())


def save_progress(gallery: str, receipt: Receipt) -> None:
    """Save the receipt so far: a crash must not lose which files held erased data."""
    progress = replace(receipt, hashes={})  # `write_pending` has written them
    write_erased_file(gallery, receipt.id + _PROGRESS, json.dumps(progress.to_dict()).encode())


def read_unfinished(gallery: str) -> list[tuple[Receipt, SelectedImages]]:
    """Read the erasures that began and are not complete, oldest first.

    Raises:
        GalleryError: a file is damaged.
    """
    files = storage.list_files(get_erased_folder(gallery))
    paths = sorted(file.url for file in files if file.url.endswith(_PENDING))
    return [_read_pending(path) for path in paths]


def _read_pending(path: str) -> tuple[Receipt, SelectedImages]:
    try:
        table = pq.read_table(pa.BufferReader(storage.read(path.encode())))
        # Give each array its type again.
        head = json.loads(table.schema.metadata[b"erasure"])
        values = {
            name: table.filter(pc.equal(table["kind"], name))["value"].combine_chunks().cast(kind)
            for name, kind in _TYPES.items()
        }
        selected = SelectedImages(version=head["version"], rows=head["rows"], **values)
        receipt = TypeAdapter(Receipt).validate_python(head["receipt"])
        return _read_progress(path.removesuffix(_PENDING) + _PROGRESS, receipt), selected
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise GalleryError(
            f"{path!r}, which lists what an unfinished erasure deletes, is damaged: delete it, and erase again"
        ) from error


def _read_progress(path: str, first_receipt: Receipt) -> Receipt:
    """Read the receipt so far; the first one if no step was completed or the file is damaged."""
    if not any(file.url == path for file in storage.list_files(path.rpartition("/")[0])):
        return first_receipt
    try:
        receipt = TypeAdapter(Receipt).validate_json(storage.read(path.encode()))
    except ValidationError:  # the steps it tells of are simply repeated
        return first_receipt
    # The progress was saved without the hashes, which the first receipt has.
    return replace(receipt, hashes=first_receipt.hashes)


def delete_pending(gallery: str, receipt: Receipt) -> None:
    """Delete the files of an erasure that is complete."""
    base = storage.join(get_erased_folder(gallery), receipt.id)
    # The names go first. Without them the rest says nothing, and after a crash no erasure seems complete that is not.
    for path in (base + _PENDING, base + _PROGRESS):
        storage.delete(path)
    # Files that a run was writing when it was killed may hold names too.
    for name in list(storage.list_names(get_erased_folder(gallery))):
        if _UNFINISHED_FILE.fullmatch(name):
            storage.delete(storage.join(get_erased_folder(gallery), name))
    if not storage.is_remote(gallery):
        storage.sync_folder(get_erased_folder(gallery))
