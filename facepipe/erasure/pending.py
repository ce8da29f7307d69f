"""An erasure that has begun: what it is to take out, kept until all of it is gone, so that a crash cannot stop it.

Two files: what is to go, written once, and the receipt as far as it is known, written anew after every step.
"""

import io
import json
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

_ENDING, _STATE = ".pending", ".state"
_KINDS = {
    **dict.fromkeys(("uris", "contents", "names"), pa.string()),
    "faces": pa.int64(),
    "marks": pa.uint64(),
}
_ROWS = pa.schema([("kind", pa.string()), ("value", pa.string())])


def write_pending(gallery: str, receipt: Receipt, chosen: SelectedImages) -> None:
    """Write down what is to go. The file holds names: it is deleted when the erasure is done."""
    kinds = {name: getattr(chosen, name).cast(pa.string()) for name in _KINDS}
    parts = [pa.table([pa.repeat(kind, len(values)), values], schema=_ROWS) for kind, values in kinds.items()]
    head = {"receipt": receipt.to_dict(), "version": chosen.version, "rows": chosen.rows}
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(parts).replace_schema_metadata({"erasure": json.dumps(head)}), sink)
    write_erased_file(gallery, receipt.id + _ENDING, sink.getvalue())


def save_progress(gallery: str, receipt: Receipt) -> None:
    """What the receipt says by now: a crash must not lose which files held what went."""
    known = replace(receipt, hashes={})  # as `begin` wrote them
    write_erased_file(gallery, receipt.id + _STATE, json.dumps(known.to_dict()).encode())


def read_unfinished(gallery: str) -> list[tuple[Receipt, SelectedImages]]:
    """Erasures that began and did not end, oldest first."""
    paths = sorted(f.url for f in storage.list_files(get_erased_folder(gallery)) if f.url.endswith(_ENDING))
    return [_read_pending(path) for path in paths]


def _read_pending(path: str) -> tuple[Receipt, SelectedImages]:
    try:
        table = pq.read_table(pa.BufferReader(storage.read(path.encode())))
        head = json.loads(table.schema.metadata[b"erasure"])
        values = {
            name: table.filter(pc.equal(table["kind"], name))["value"].combine_chunks().cast(kind)
            for name, kind in _KINDS.items()
        }
        chosen = SelectedImages(version=head["version"], rows=head["rows"], **values)
        found = TypeAdapter(Receipt).validate_python(head["receipt"])
        return _read_progress(path.removesuffix(_ENDING) + _STATE, found), chosen
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise GalleryError(
            f"{path!r}, which says what an unfinished erasure is to take out, is damaged: delete it, and erase again"
        ) from error


def _read_progress(path: str, begun: Receipt) -> Receipt:
    if not any(found.url == path for found in storage.list_files(path.rpartition("/")[0])):
        return begun
    try:
        found = TypeAdapter(Receipt).validate_json(storage.read(path.encode()))
    except ValidationError:  # of what is done again anyway
        return begun
    return replace(found, hashes=begun.hashes)


def delete_pending(gallery: str, receipt: Receipt) -> None:
    """Everything is gone: forget what it was called."""
    base = storage.join(get_erased_folder(gallery), receipt.id)
    # First the names: without them the rest says nothing, and no crash leaves an erasure that seems to have ended.
    for name in (base + _ENDING, base + _STATE):
        storage.delete(name)
    for found in list(storage.list_files(get_erased_folder(gallery))):
        if found.url.endswith(UNFINISHED):
            storage.delete(found.url)
