"""Repeat erasures by their receipts: in a gallery that was restored from a backup, or in another copy of it.

A receipt names nobody. But every row can be hashed as the receipt does, and the row's image is erased again if the
receipt has the hash. Images of the receipt that the gallery does not hold are not known by name. Their hashes are kept,
so that a later embed does not bring them in.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe import storage
from facepipe.erasure.receipt import Receipt, ReceiptHashes, load_receipt
from facepipe.erasure.selection import SelectedImages, select_uris
from facepipe.errors import ConfigError, StorageError
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.erasure_key import require_key
from facepipe.hashing import hash64_column
from facepipe.index import manifest as manifests
from facepipe.index.shard import Shard
from facepipe.types import Bool, UInt64

_BATCH_ROWS = 65536
_ENDING = ".json"
_SECOND = timedelta(seconds=1)
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)
# Receipts become names of files, and anybody may have written one.
_ID = re.compile(r"[0-9A-Za-z-]{1,64}")


def read_receipts(paths: Iterable[str]) -> list[Receipt]:
    """Read receipts, each once.

    Args:
        paths: files, and folders such as the `erased` of a gallery.

    Raises:
        ConfigError: a file is not a receipt or was altered, a folder has none, or a key that is needed is not set.
    """
    receipts: dict[str, Receipt] = {}
    for path in paths:
        for file in _list_files(path):
            receipt = load_receipt(file)
            contradictions = receipt.find_contradictions()
            if receipt.mac and not receipt.is_signature_right():
                contradictions.append("its signature is not right")
            if not _ID.fullmatch(receipt.id) or _read_time(receipt) is None:
                contradictions.append("its id or its time is not one")
            if contradictions:
                raise ConfigError(f"the receipt {file!r} was altered: {contradictions[0]}")
            receipts[receipt.id] = receipt
    if not receipts:
        raise ConfigError("say which erasures to repeat: --receipt RECEIPT.json, or a folder of receipts")
    return list(receipts.values())


def _read_time(receipt: Receipt) -> datetime | None:
    """Read when the erasure began; None if the receipt does not say it."""
    try:
        time = datetime.fromisoformat(receipt.at)
    except ValueError:
        return None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _list_files(path: str) -> list[str]:
    is_folder = not path.endswith(_ENDING) if storage.is_remote(path) else os.path.isdir(path)
    if not is_folder:
        return [path]
    folder = path.rstrip("/") + "/"
    names = [entry.url.removeprefix(folder) for entry in storage.list_files(folder.rstrip("/"))]
    files = sorted(storage.join(path, name) for name in names if name.endswith(_ENDING) and "/" not in name)
    if not files:
        raise ConfigError(f"{path!r} is neither a receipt nor a folder of receipts")
    return files


@dataclass
class RepeatedErasure:
    """What is to be erased again.

    Attributes:
        receipts: the receipts that are repeated.
        selected: their images in this gallery.
        is_suppressed: whether the images are kept out afterwards.
        unknown: images of the receipts that this gallery does not hold.
    """

    receipts: list[Receipt]
    selected: SelectedImages
    is_suppressed: bool
    unknown: int


def select_repeated(gallery: Gallery, receipts: Sequence[Receipt]) -> list[RepeatedErasure]:
    """Find the images of receipts in a gallery, in one scan of its table.

    Memory grows with what is found and with the receipts, not with the gallery.

    Args:
        gallery: the gallery.
        receipts: the receipts.

    Returns:
        One erasure for images that are kept out, and one for those that may return.

    Raises:
        ConfigError: a receipt needs a key that is not set.
        StorageError: the gallery cannot be read.
    """
    searches = [_ReceiptSearch(receipt) for receipt in receipts]
    try:
        for batch in gallery.batches(["uri", "image_id", "face_id", "ingested_at"], rows=_BATCH_ROWS):
            _search_rows(pa.Table.from_batches([batch]), searches)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read the table of {gallery.path!r}: {str(error).splitlines()[0]}") from error
    _search_index(gallery, searches)
    erasures = []
    taken = pa.array([], pa.string())
    for is_suppressed in (True, False):
        group = [search for search in searches if search.receipt.suppressed == is_suppressed]
        if not group:
            continue
        uris = pa.array(sorted(set().union(*(search.uris for search in group))), pa.string())
        uris = uris.filter(pc.invert(pc.is_in(uris, taken)))
        taken = uris
        contents = pa.array(sorted(set().union(*(search.contents for search in group))), pa.string())
        erasures.append(
            RepeatedErasure(
                receipts=[search.receipt for search in group],
                selected=select_uris(gallery, uris, contents),
                is_suppressed=is_suppressed,
                unknown=sum(len(search.list_unknown("uris")) for search in group),
            )
        )
    return erasures


def keep_out(gallery: str, receipts: Iterable[Receipt], selected: SelectedImages) -> list[Receipt]:
    """Keep those images of receipts out of a gallery that it does not hold, and whose names nobody knows.

    Args:
        gallery: folder or URL of the gallery.
        receipts: the receipts.
        selected: what the gallery holds of them: that is kept out under its names.

    Returns:
        The receipts for which that cannot be done, because an older version wrote them.
    """
    left = []
    for receipt in receipts:
        if suppressed.has_list(gallery, receipt.id):
            continue  # the gallery has made it, or a copy of its lists is here
        search = _ReceiptSearch(receipt)
        search.note("uris", selected.uris)
        search.note("images", selected.contents)
        uris = search.list_unknown("uris")
        contents = search.list_unknown("images")
        if not len(uris) and not len(contents):
            continue
        if not search.hashes.can_hash_again:
            left.append(receipt)
            continue
        secret = b""
        if receipt.key:
            secret = suppressed.derive_secret(require_key(receipt.key, f"the receipt {receipt.id}"))
        suppressed.suppress_receipt(gallery, receipt.id, receipt.salt, secret, uris, contents)
    return left


@dataclass
class _ReceiptSearch:
    """A receipt, and what has been found of it.

    Attributes:
        receipt: the receipt.
        uris: uris of images to erase.
        contents: their image ids, if the receipt keeps these out.
    """

    receipt: Receipt
    uris: set[str] = field(default_factory=set)
    contents: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.hashes = ReceiptHashes(self.receipt)
        self._known: dict[str, list[UInt64]] = {"uris": [], "images": []}

    def find(self, kind: str, texts: "_Texts") -> Bool:
        """Tell for each text whether the receipt has it, (n,)."""
        hashes = self.hashes.hash_texts(texts.values, texts.hashes if self.hashes.can_hash_again else None)
        mask = self.hashes.contains(kind, hashes)
        if kind in self._known and mask.any():
            self._known[kind].append(np.unique(hashes[mask]))
        return mask

    def note(self, kind: str, values: pa.Array) -> None:
        """Note values that are known by name."""
        self.find(kind, _Texts(values))

    def list_unknown(self, kind: str) -> UInt64:
        """List the hashes of the receipt for which nothing was found."""
        known = np.concatenate([np.empty(0, np.uint64), *self._known[kind]])
        return np.setdiff1d(self.hashes.get_hashes(kind), known)


class _Texts:
    """Distinct texts of a column, with their hashes, which all receipts share."""

    def __init__(self, column: pa.Array):
        self.column = pc.unique(column).drop_null()
        self.values: list[str] = self.column.to_pylist()
        self.hashes = hash64_column(self.column)


def _search_rows(rows: pa.Table, searches: Iterable[_ReceiptSearch]) -> None:
    """Look for the images of receipts among rows with uri, image_id, face_id and ingested_at."""
    uris = _Texts(rows["uri"].combine_chunks())
    contents = _Texts(rows["image_id"].combine_chunks())
    for search in searches:
        matching = uris.column.filter(pa.array(search.find("uris", uris)))
        is_meant = pc.is_in(rows["uri"], matching)
        if not search.receipt.suppressed and len(matching):
            is_meant = pc.and_(is_meant, _has_erased_face(rows, search))
        # Exact copies under other names, if the receipt means contents.
        erased_contents = contents.column.filter(pa.array(search.find("images", contents)))
        is_meant = pc.or_(is_meant, pc.fill_null(pc.is_in(rows["image_id"], erased_contents), False))
        # Images that may return can have come in again since.
        if not search.receipt.suppressed:
            is_meant = pc.and_(is_meant, _is_old(rows, search.receipt))
        search.uris.update(pc.unique(rows["uri"].filter(is_meant)).to_pylist())
        search.contents.update(erased_contents.to_pylist())


def _has_erased_face(rows: pa.Table, search: _ReceiptSearch) -> pa.Array:
    """Mark rows that have a face of the receipt, or none: under the same name another picture may have come in."""
    faces = rows["face_id"].combine_chunks()
    texts = _Texts(faces.cast(pa.string()))
    erased_faces = texts.column.filter(pa.array(search.find("faces", texts)))
    return pc.or_(pc.is_null(faces), pc.fill_null(pc.is_in(faces.cast(pa.string()), erased_faces), False))


def _is_old(rows: pa.Table, receipt: Receipt) -> pa.ChunkedArray:
    """Mark rows that were there when the erasure began."""
    # The receipt has whole seconds.
    cutoff = pa.scalar((_read_time(receipt) or _NEVER) + _SECOND, rows["ingested_at"].type)
    return pc.fill_null(pc.less_equal(rows["ingested_at"], cutoff), True)


def _search_index(gallery: Gallery, searches: Sequence[_ReceiptSearch]) -> None:
    """Look for images that only the index holds: it may have been restored from another time than the table."""
    if not manifests.exists(gallery.path):
        return
    manifest = manifests.load(gallery.path)
    if manifest.table_version == gallery.version:
        return
    kept_out = [search for search in searches if search.receipt.suppressed]
    for labels in _iterate_labels(gallery, manifest):
        uris = _Texts(labels)
        for search in kept_out:
            search.uris.update(uris.column.filter(pa.array(search.find("uris", uris))).to_pylist())


def _iterate_labels(gallery: Gallery, manifest: manifests.Manifest) -> Iterator[pa.Array]:
    """Yield the uris of all faces of the index."""
    store = manifests.open_index_store(gallery.path)
    for entry in manifest.shards:
        shard = Shard(store, entry)
        for at in range(0, len(shard.ids), _BATCH_ROWS):
            rows = np.arange(at, min(at + _BATCH_ROWS, len(shard.ids)))
            yield shard.read_labels(rows)["uri"].combine_chunks()
