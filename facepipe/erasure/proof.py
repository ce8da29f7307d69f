"""Whether anything of an erasure is left: rows, files beside the table, vectors, and whatever reports hold."""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.erasure import pending
from facepipe.erasure.lists import create_line_reader, iterate_csv_rows
from facepipe.erasure.receipt import Receipt
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.vacuum import find_unreferenced
from facepipe.hashing import hash64
from facepipe.index import manifest as manifests
from facepipe.index.shard import Shard
from facepipe.reports.html import iterate_groups
from facepipe.storage.store import open_store

_AT_ONCE = 65536


class _ReceiptHashes:
    """The hashes of a receipt, and whether a value is among them."""

    def __init__(self, receipt: Receipt):
        self._salt = receipt.salt
        self._hashes = {
            kind: np.array(sorted(int(h, 16) for h in hs), np.uint64) for kind, hs in receipt.hashes.items()
        }

    def count_matches(self, values: Iterable[str], *kinds: str) -> int:
        """How many of the values are hashed in the receipt under one of the kinds."""
        rest, count = iter(values), 0
        while some := list(islice(rest, _AT_ONCE)):
            hashes = np.array([hash64(self._salt, value) for value in some], np.uint64)
            count += sum(int(np.isin(hashes, self._hashes.get(kind, hashes[:0])).sum()) for kind in kinds)
        return count

    def count_in_column(self, field: pa.Field, column: pa.Array) -> int:
        """How many different values of a column are; columns of other types hold none."""
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            return self.count_matches(pc.unique(column).drop_null().to_pylist(), "uris", "images")
        if pa.types.is_int64(field.type):
            return self.count_matches(map(str, pc.unique(column).drop_null().to_pylist()), "faces")
        return 0


def check_erased(gallery: Gallery, receipt: Receipt) -> list[str]:
    """Problems: what is left of what the receipt says is gone. Reads the whole gallery, a batch at a time."""
    asked = _ReceiptHashes(receipt)
    problems = [*_check_rows(gallery, asked), *_check_files(gallery, receipt, asked), *_check_log(gallery, asked)]
    problems += [*_check_vectors(gallery, asked), *_check_reports(gallery, asked)]
    if any(left.id == receipt.id for left, _ in pending.read_unfinished(gallery.path)):
        problems.append("the erasure is not finished: `facepipe erase` goes on with it")
    return problems


def _check_rows(gallery: Gallery, asked: _ReceiptHashes) -> Iterator[str]:
    found = {"uri": 0, "image_id": 0, "face_id": 0}
    try:
        for batch in gallery.batches(list(found)):
            found["uri"] += asked.count_matches(batch["uri"].to_pylist(), "uris")
            found["image_id"] += asked.count_matches(batch["image_id"].drop_null().to_pylist(), "images")
            found["face_id"] += asked.count_matches(map(str, batch["face_id"].drop_null().to_pylist()), "faces")
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read the table of {gallery.path!r}: {str(error).splitlines()[0]}") from error
    yield from (f"the table: {count} rows by {column}" for column, count in found.items() if count)


def _check_files(gallery: Gallery, receipt: Receipt, asked: _ReceiptHashes) -> Iterator[str]:
    """Older files of the table hold what left it; those that never came into it may."""
    for left in find_unreferenced(gallery):
        name = os.path.basename(left.url)
        if name in receipt.files_before or _count_mentions(left.url, asked):
            yield f"faces/{name}: no part of the table, and holds erased rows"
    yield from (f"faces/{file['path']}: was to go" for file in gallery.files() if file["path"] in receipt.files_before)


def _check_log(gallery: Gallery, asked: _ReceiptHashes) -> Iterator[str]:
    """The log quotes the smallest and the largest uri and identity of every file."""
    for found in storage.list_files(storage.join(gallery.faces_folder, "_delta_log")):
        quoted = (
            json.loads(stats or "{}").get(end, {}).get(column)
            for stats in _read_statistics(found.url)
            for end in ("minValues", "maxValues")
            for column in ("uri", "image_id")
        )
        if asked.count_matches((value for value in quoted if value), "uris", "images"):
            yield f"{os.path.basename(found.url)} of the log quotes it"


def _read_statistics(path: str) -> Iterator[str | None]:
    if path.endswith(".json"):
        for line in storage.read(path.encode()).splitlines():
            yield (json.loads(line).get("add") or {}).get("stats")
    elif path.endswith(".parquet"):
        with storage.open_seekable(path) as file:
            added = pq.read_table(file, columns=["add"])["add"].to_pylist()
        yield from (add.get("stats") for add in added if add)


def _check_vectors(gallery: Gallery, asked: _ReceiptHashes) -> Iterator[str]:
    base = storage.join(gallery.path, manifests.FOLDER).rstrip("/") + "/"
    named: set[str] = set()
    if manifests.exists(gallery.path):
        store = manifests.open_index_store(gallery.path)
        found = manifests.load(gallery.path)
        for entry in found.shards:
            shard = Shard(store, entry)
            count = asked.count_matches(map(str, shard.ids.tolist()), "faces")
            # Vectors of what an image was before it changed have other ids.
            count = count or sum(
                asked.count_matches(pc.unique(rows.uris).to_pylist(), "uris") for rows in shard.read_live_rows()
            )
            if count:
                yield f"index/{entry.name}: {count} vectors"
        named = {name.split("/")[0] for name, _ in manifests.list_files(found)}
    others = {file.url.removeprefix(base).split("/")[0] for file in storage.list_files(base)} - named
    yield from (
        f"index/{name}: no part of the index" for name in sorted(others) if name.startswith(("shard-", "dead-"))
    )


def _check_reports(gallery: Gallery, asked: _ReceiptHashes) -> Iterator[str]:
    base = storage.join(gallery.path, "reports").rstrip("/") + "/"
    names = {found.url.removeprefix(base).split("/")[0] for found in storage.list_files(base)}
    for name in sorted(names):
        store = open_store(gallery.path, f"reports/{name}")
        store.pull()
        folder = store.folder
        for found in storage.list_files(folder) if os.path.isdir(folder) else ():
            count = _count_mentions(found.url, asked)
            if count:
                yield f"reports/{name}/{os.path.relpath(found.url, folder)}: {count} mentions"


def _count_mentions(path: str, asked: _ReceiptHashes) -> int:
    if path.endswith(".parquet"):
        with storage.open_seekable(path) as handle, pq.ParquetFile(handle) as file:
            return sum(
                asked.count_in_column(field, column)
                for batch in file.iter_batches()
                for field, column in zip(batch.schema, batch.columns, strict=True)
            )
    if path.endswith((".txt", ".csv", ".html")):
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as text:
            return asked.count_matches(_iterate_texts(path, text), "uris", "images", "faces")
    if os.path.basename(path) == "ids.npy":
        return asked.count_matches(map(str, np.load(path).tolist()), "faces")
    return 0


def _iterate_texts(path: str, lines: Iterable[str]) -> Iterator[str]:
    if path.endswith(".csv"):
        yield from (cell for _, row in iterate_csv_rows(lines) for cell in row)
    elif path.endswith(".html"):
        yield from (face["uri"] for group in iterate_groups(path) for face in group["faces"])
    else:
        told = create_line_reader(path)
        yield from (text for line in lines for text in told(line))
