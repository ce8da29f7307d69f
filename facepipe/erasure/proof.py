"""Checking an erasure: whether rows, files beside the table, vectors or reports still hold anything."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.decisions.table import FOLDER as DECISIONS_FOLDER
from facepipe.erasure import pending
from facepipe.erasure.chain import read_chain
from facepipe.erasure.foreign import iterate_words
from facepipe.erasure.lists import create_line_reader, iterate_csv_rows
from facepipe.erasure.purges import list_purges
from facepipe.erasure.receipt import Receipt, ReceiptHashes, get_receipt_path, parse_receipt
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.rewrite import read_rows
from facepipe.gallery.erasure_key import read_key
from facepipe.gallery.maintenance.vacuum import find_foreign, find_unreferenced, list_log
from facepipe.index import manifest as manifests
from facepipe.index.centroids import count_thin_lists, read_centroids
from facepipe.index.manifest import Manifest
from facepipe.index.shard import Shard
from facepipe.index.template import open_template
from facepipe.reports.html import iterate_groups
from facepipe.storage import conditional
from facepipe.storage.inside import is_link
from facepipe.storage.lease import LEASE_FILE
from facepipe.storage.store import Store, open_store
from facepipe.storage.uploads import Upload, UploadsUnknownError, list_uploads
from facepipe.text import restore_cell

# Values that are hashed at a time.
_BATCH_VALUES = 65536


class _MentionCounter:
    """Counts values that a receipt has."""

    def __init__(self, receipt: Receipt) -> None:
        self._hashes = ReceiptHashes(receipt)

    def count_matches(self, values: Iterable[str], *kinds: str) -> int:
        """Count the values whose hash is in the receipt under one of the kinds."""
        remaining = iter(values)
        count = 0
        # Hash a batch under the receipt's salt, and look the hashes up in the sorted arrays.
        while batch := list(islice(remaining, _BATCH_VALUES)):
            hashes = self._hashes.hash_texts(batch)
            # A kind that the receipt lacks matches nothing.
            for kind in kinds:
                count += int(self._hashes.contains(kind, hashes).sum())
        return count

    def count_in_column(self, field: pa.Field, column: pa.Array) -> int:
        """Count the distinct texts or ids of a column whose hash is in the receipt."""
        # Texts may be uris or image ids, and whole numbers face ids.
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            return self.count_matches(pc.unique(column).drop_null().to_pylist(), "uris", "images")
        if pa.types.is_int64(field.type):
            return self.count_matches(map(str, pc.unique(column).drop_null().to_pylist()), "faces")
        return 0


def check_receipt(gallery: Gallery, receipt: Receipt, *, of_other_gallery: bool = False) -> list[str]:
    """Check whether a receipt is what an erasure of a gallery wrote.

    Args:
        gallery: the gallery.
        receipt: the receipt.
        of_other_gallery: accept the receipt of another gallery, whose chain cannot be looked at.

    Returns:
        Problems; empty if nothing speaks against it.

    Raises:
        ConfigError: the receipt was made with a key that is not set.
    """
    name = f"the receipt {receipt.id}"
    problems = [f"{name} was altered: {line}" for line in receipt.find_contradictions()]
    if receipt.mac and not problems and not receipt.is_signature_right():
        problems.append(f"{name} was altered: its signature is not right")
    if of_other_gallery:
        return problems
    if receipt.gallery != gallery.id:
        problems.append(
            f"{name} is of another gallery: of the table {receipt.gallery}, and {gallery.path!r} has the table "
            f"{gallery.id}"
        )
        return problems
    # The gallery's own copy is what later receipts vouch for.
    own = conditional.read_tagged(get_receipt_path(gallery.path, receipt.id))
    if own is not None and parse_receipt(own[0], receipt.id) != receipt:
        problems.append(f"{name} was altered: erased/{receipt.id}.json in the gallery says something else")
    chain = read_chain(gallery.path)
    problems += [line for line in chain.problems if f"/{receipt.id}." in line]
    if read_key() is not None and not receipt.mac and receipt.id not in chain.signed:
        problems.append(f"{name} is not signed, and no signed receipt of the gallery vouches for it")
    return problems


@dataclass(frozen=True)
class ErasureProof:
    """What is left of an erasure.

    Attributes:
        problems: What is left and should not be, or speaks against the receipt.
        hidden: What is left on the disk, hidden from all readers, and not yet due to be purged.
        due: By when it has to be purged, UTC, ISO 8601; empty if nothing is hidden.
    """

    problems: list[str]
    hidden: list[str]
    due: str = ""

    @property
    def state(self) -> str:
        """One word: `gone`, `hidden` (its purge is not due yet) or `left`."""
        if self.problems:
            return "left"
        return "hidden" if self.hidden else "gone"


def check_erased(gallery: Gallery, receipt: Receipt, *, of_other_gallery: bool = False) -> list[str]:
    """Look for anything that is left of what a receipt lists as deleted, hidden rows included. See `prove_erasure`.

    Returns:
        Problems; empty if nothing is left.
    """
    proof = prove_erasure(gallery, receipt, of_other_gallery=of_other_gallery)
    return [*proof.problems, *proof.hidden]


def prove_erasure(gallery: Gallery, receipt: Receipt, *, of_other_gallery: bool = False) -> ErasureProof:
    """Look for anything that is left of what a receipt lists as deleted.

    This reads the whole gallery, one batch at a time.

    Args:
        gallery: the gallery.
        receipt: the receipt. If it was altered, nothing is looked for.
        of_other_gallery: look for what another gallery has erased.

    Raises:
        StorageError: something cannot be read.
        ConfigError: the receipt was made with a key that is not set.
    """
    problems = check_receipt(gallery, receipt, of_other_gallery=of_other_gallery)
    if problems:
        return ErasureProof(problems, [])
    # Each check reads another place that held the data.
    hashes = _MentionCounter(receipt)
    problems = [
        *_check_rows(gallery, hashes),
        *_check_other_files(gallery, hashes),
        *_check_vectors(gallery, hashes),
        *_check_reports(gallery, hashes),
        *_check_decisions(gallery, hashes),
        *_check_uploads(gallery, receipt),
    ]
    on_disk = [
        *_check_deleted_rows(gallery, hashes),
        *_check_files(gallery, receipt, hashes),
        *_check_log(gallery, hashes),
    ]
    # Places may be clean by now although steps are left.
    if pending.is_pending(gallery.path, receipt.id):
        problems.append("the erasure is not complete: run `facepipe erase` to resume it")
    purge = next((purge for purge in list_purges(gallery.path) if purge.id == receipt.id), None)
    is_in_time = purge is not None and receipt.purge_due and not purge.is_overdue()
    if on_disk and is_in_time:
        return ErasureProof(problems, on_disk, receipt.purge_due)
    if on_disk and receipt.purge_due:
        problems.append(f"the erasure {receipt.id}: hidden rows had to leave the disk by {receipt.purge_due}")
    return ErasureProof([*problems, *on_disk], [])


def check_folder(folder: str, receipt: Receipt) -> list[str]:
    """Look for what a receipt lists as deleted in any folder: exports, copied lists, answers of a search, chips.

    Uris, image ids and face ids are found in tables, arrays and texts of any kind. Links are not followed.

    Args:
        folder: local folder or URL.
        receipt: the receipt.

    Returns:
        Problems; empty if nothing is found.

    Raises:
        StorageError: something cannot be read.
    """
    if not storage.folder_exists(folder):
        raise StorageError(f"no folder at {folder!r}")
    hashes = _MentionCounter(receipt)
    problems = []
    for file in storage.list_files(folder):
        count = 0 if is_link(file.url) else _count_anywhere(file.url, hashes)
        if count:
            problems.append(f"{file.url}: {count} mentions")
    return problems


def _check_rows(gallery: Gallery, hashes: _MentionCounter) -> Iterator[str]:
    counts = {"uri": 0, "image_id": 0, "face_id": 0}
    try:
        # Count matches per column: a row may be found by one of them only.
        for batch in gallery.batches(list(counts), with_hidden=True):
            counts["uri"] += hashes.count_matches(batch["uri"].to_pylist(), "uris")
            counts["image_id"] += hashes.count_matches(batch["image_id"].drop_null().to_pylist(), "images")
            counts["face_id"] += hashes.count_matches(map(str, batch["face_id"].drop_null().to_pylist()), "faces")
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read the table of {gallery.path!r}: {str(error).splitlines()[0]}") from error
    for column, count in counts.items():
        if count:
            yield f"the table: {count} rows by {column}"


def _check_deleted_rows(gallery: Gallery, hashes: _MentionCounter) -> Iterator[str]:
    """Check rows that files hold and the table does not."""
    for path, numbers in gallery.deleted_rows.items():
        rows = read_rows(gallery, path, ["uri", "image_id", "face_id"], with_deleted=True).take(pa.array(numbers))
        count = max(
            hashes.count_matches(rows["uri"].to_pylist(), "uris"),
            hashes.count_matches(rows["image_id"].drop_null().to_pylist(), "images"),
            hashes.count_matches(map(str, rows["face_id"].drop_null().to_pylist()), "faces"),
        )
        if count:
            yield f"faces/{path}: {count} deleted rows"


def _check_files(gallery: Gallery, receipt: Receipt, hashes: _MentionCounter) -> Iterator[str]:
    """Check the table's files, and files beside it: older ones hold what left it, and uncommitted ones may."""
    for file in find_unreferenced(gallery):
        # A file that the receipt names held erased rows; others are searched.
        name = os.path.basename(file.url)
        if name in receipt.files_before or _count_anywhere(file.url, hashes):
            yield f"faces/{name}: not part of the table, and holds erased rows"
    for part in gallery.files():
        if part["path"] in receipt.files_before:
            yield f"faces/{part['path']}: should be deleted"


def _check_other_files(gallery: Gallery, hashes: _MentionCounter) -> Iterator[str]:
    """Check files that no purge concerns."""
    for file in find_foreign(gallery):
        if _count_anywhere(file.url, hashes):
            yield f"faces/{os.path.basename(file.url)}: facepipe did not write it, and it holds erased rows"
    marks = gallery.marks_file
    if marks is not None and _count_anywhere(storage.join(gallery.faces_folder, marks), hashes):
        yield f"faces/{marks}: marks of erased images"


def _check_log(gallery: Gallery, hashes: _MentionCounter) -> Iterator[str]:
    """Check the table's log, which quotes the smallest and the largest uri and image id of every file."""
    for file in list_log(gallery):
        # Collect both bounds of both columns from every file that the entry adds.
        quotes: list[str | None] = []
        for text in _read_statistics(file.url):
            statistics = json.loads(text or "{}")
            for bound in ("minValues", "maxValues"):
                quotes.extend(statistics.get(bound, {}).get(column) for column in ("uri", "image_id"))
        if hashes.count_matches((quote for quote in quotes if quote), "uris", "images"):
            yield f"{os.path.basename(file.url)} of the log quotes it"


def _read_statistics(path: str) -> Iterator[str | None]:
    """Read the statistics of all files that a log entry or a checkpoint adds."""
    # An entry has one action per line; a checkpoint has them in a column.
    if path.endswith(".json"):
        for line in storage.read(path).splitlines():
            yield (json.loads(line).get("add") or {}).get("stats")
    elif path.endswith(".parquet"):
        with storage.open_seekable(path) as file:
            added = pq.read_table(file, columns=["add"])["add"].to_pylist()
        for add in added:
            if add:
                yield add.get("stats")


def _check_vectors(gallery: Gallery, hashes: _MentionCounter) -> Iterator[str]:
    base = storage.join(gallery.path, manifests.FOLDER).rstrip("/") + "/"
    listed: set[str] = set()
    # Shards of the index.
    if manifests.exists(gallery.path):
        store = manifests.open_index_store(gallery.path)
        manifest = manifests.load(gallery.path)
        # Shards that are kept for searches that began before count as well.
        for entry in (*manifest.shards, *(old.entry for old in manifest.replaced)):
            shard = Shard(store, entry)
            count = hashes.count_matches(map(str, shard.ids.tolist()), "faces")
            if not count:
                # Vectors of an image's earlier contents have other ids, but the same uri.
                for rows in shard.read_live_rows():
                    count += hashes.count_matches(pc.unique(rows.uris).to_pylist(), "uris")
            if count:
                yield f"index/{entry.name}: {count} vectors"
        yield from _check_centroids(store, manifest)
        listed = manifests.list_names_in_use(manifest)
    # Files that the manifest does not list.
    unlisted = {file.url.removeprefix(base).split("/")[0] for file in storage.list_files(base)} - listed
    for name in sorted(unlisted):
        if name.startswith(("shard-", "dead-")):
            yield f"index/{name}: not part of the index"


def _check_uploads(gallery: Gallery, receipt: Receipt) -> Iterator[str]:
    """Check for uploads of before the erasure that never ended. What their parts hold cannot be read."""
    recorded = datetime.fromisoformat(receipt.at).timestamp()
    uploads: list[Upload] = []
    with suppress(UploadsUnknownError):
        uploads = list_uploads(gallery.path)
    for upload in uploads:
        if upload.began < recorded or upload.is_abandoned:
            yield f"{upload.url}: an upload of it never ended, and its parts may hold erased data"


def _check_centroids(store: Store, manifest: Manifest) -> Iterator[str]:
    """Check what the centroids rest on: one that was made of a single face is a copy of it."""
    if not manifest.template.lists:
        return
    template = open_template(store, manifest.template)
    shards = [Shard(store, entry) for entry in manifest.shards]
    count = count_thin_lists(template, shards)
    if count:
        yield (
            f"index/{manifest.template.name}: {count} centroids rest on hardly any face that is left, and may be the "
            "likeness of one that was erased: `facepipe index GALLERY --retrain` computes them again"
        )
    centroids = read_centroids(template)
    for shard in shards:
        if not np.array_equal(read_centroids(shard.open_index()), centroids):
            yield f"index/{shard.entry.name}: has other centroids than {manifest.template.name}"


def _check_reports(gallery: Gallery, hashes: _MentionCounter) -> Iterator[str]:
    base = storage.join(gallery.path, "reports").rstrip("/") + "/"
    # Each folder is one report; those in an object store are copied here first.
    names = {file.url.removeprefix(base).split("/")[0] for file in storage.list_files(base)}
    for name in sorted(names):
        if is_link(storage.join(base, name)):
            continue  # what it leads to is not in the gallery
        # Files beside the reports are of somebody else.
        path = storage.join(base, name)
        if not storage.is_remote(path) and os.path.isfile(path):
            count = 0 if name.startswith(LEASE_FILE) else _count_anywhere(path, hashes)
            if count:
                yield f"reports/{name}: {count} mentions"
            continue
        store = open_store(gallery.path, f"reports/{name}")
        store.pull()
        if not os.path.isdir(store.folder):
            continue
        for file in storage.list_files(store.folder):
            count = 0 if is_link(file.url) else _count_anywhere(file.url, hashes)
            if count:
                yield f"reports/{name}/{os.path.relpath(file.url, store.folder)}: {count} mentions"


def _check_decisions(gallery: Gallery, hashes: _MentionCounter) -> Iterator[str]:
    """Check the table of decisions: its files, also those that it no longer names, and its log."""
    base = storage.join(gallery.path, DECISIONS_FOLDER).rstrip("/") + "/"
    for file in storage.list_files(base):
        name = file.url.removeprefix(base)
        count = 0 if is_link(file.url) or name.startswith(LEASE_FILE) else _count_anywhere(file.url, hashes)
        if count:
            yield f"{DECISIONS_FOLDER}/{name}: {count} mentions"


def _count_anywhere(path: str, hashes: _MentionCounter) -> int:
    """Count erased uris and ids in a file that may be of somebody else, and of another kind than its name says."""
    count = 0
    try:
        count = _count_mentions(path, hashes)
    except OSError as error:
        # Arrow raises errors without a number for damaged files.
        if error.errno is not None:
            raise StorageError(f"cannot read {path!r}: {storage.describe_error(error)}") from error
    except (pa.ArrowException, ValueError, KeyError, TypeError, EOFError, csv.Error):
        pass
    # A text of somebody else may name an image anywhere in it.
    return count or _count_words(path, hashes)


def _count_words(path: str, hashes: _MentionCounter) -> int:
    """Count erased uris and ids among the words of a file of any kind."""
    with storage.open_seekable(path) as file:
        words = (word for chunk in iterate_words(file) for word in chunk)
        return hashes.count_matches(words, "uris", "images", "faces")


def _count_mentions(path: str, hashes: _MentionCounter) -> int:
    """Count erased uris and ids in a file; files of unknown kinds count as none."""
    # The ending tells how a file is read.
    if path.endswith(".parquet"):
        count = 0
        with storage.open_seekable(path) as handle, pq.ParquetFile(handle) as file:
            for batch in file.iter_batches():
                for field, column in zip(batch.schema, batch.columns, strict=True):
                    count += hashes.count_in_column(field, column)
        return count
    if path.endswith((".txt", ".csv", ".html")):
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as lines:
            return hashes.count_matches(_iterate_texts(path, lines), "uris", "images", "faces")
    if path.endswith(".arrow"):
        return _count_in_arrow(path, hashes)
    if path.endswith(".npy") and not storage.is_remote(path):
        ids = np.load(path, mmap_mode="r")
        return hashes.count_matches(map(str, ids.tolist()), "faces") if ids.dtype == np.int64 and ids.ndim == 1 else 0
    return 0


def _count_in_arrow(path: str, hashes: _MentionCounter) -> int:
    """Count erased uris and ids in an Arrow file, such as one of training chips."""
    count = 0
    with storage.open_seekable(path) as handle, pa.ipc.open_file(handle) as file:
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)
            for field, column in zip(batch.schema, batch.columns, strict=True):
                count += hashes.count_in_column(field, column)
    return count


def _iterate_texts(path: str, lines: Iterable[str]) -> Iterator[str]:
    """Iterate over the texts of a list or a page that may be a uri or an id."""
    if path.endswith(".csv"):
        for _, row in iterate_csv_rows(lines):
            yield from map(restore_cell, row)
    elif path.endswith(".html"):
        for group in iterate_groups(path):
            for face in group["faces"]:
                yield face["uri"]
    else:
        read_line = create_line_reader(path)
        for line in lines:
            yield from read_line(line)
