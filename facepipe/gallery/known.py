"""What the gallery already holds, asked at listing time, before any byte of an image is read."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.gallery.table import Gallery
from facepipe.hashing import hash64_column, hash_each_in_process
from facepipe.schema import READ_ERROR
from facepipe.sorted_lookup import is_in_sorted
from facepipe.sources.blocks import CHANGED, ERASED, NEW, REPEATED, SKIP
from facepipe.storage.hashtable import HashTable
from facepipe.types import UInt64

_HELD, _LISTED, _OF_SOURCE = (np.uint64(n) for n in range(3))
_COLUMNS = ("uri", "fingerprint", "image_id", "status", "source", "missing_since", "face_index")
_ROWS = 65536


class KnownImages:
    """uri -> (fingerprint, content, state) of every image in a gallery, as hashes in a file-backed table.

    Also remembers what was listed in this run, so that an image listed twice is embedded once, and what was not.
    source: name of the corpus that is listed; erased: sorted hashes of uris that must not come back.
    """

    def __init__(self, gallery: Gallery | None, source: str | None = None, erased: UInt64 | None = None):
        self._table = HashTable(width=3)
        self._erased = np.empty(0, np.uint64) if erased is None else erased
        self.source_count = 0
        try:
            for table in _gathered(gallery.batches(_COLUMNS, rows=_ROWS)) if gallery is not None else ():
                self._add(table.filter(pc.fill_null(pc.equal(table["face_index"], 0), True)), source)
        except BaseException:
            self.close()
            raise

    def _add(self, images: pa.Table, source: str | None) -> None:
        if not images.num_rows:
            return
        # What could not be read is tried again, and so is what was missing: their fingerprints never match.
        unread = pc.fill_null(pc.equal(images["status"], READ_ERROR), False)
        again = pc.or_(unread, pc.is_valid(images["missing_since"])).to_numpy(zero_copy_only=False)
        mine = pc.fill_null(pc.equal(images["source"], source or ""), False).to_numpy(zero_copy_only=False)
        marks = hash_each_in_process(pc.fill_null(images["fingerprint"], "").to_numpy(zero_copy_only=False))
        marks[again] = 0
        states = np.where(mine, _OF_SOURCE, _HELD)
        self._table.add(hash64_column(images["uri"]), np.stack([marks, hash64_column(images["image_id"]), states], 1))
        self.source_count += int(mine.sum())

    def screen(self, uris: UInt64, fingerprints: UInt64) -> tuple[npt.NDArray[np.int8], UInt64]:
        """(verdict, content hash held) for each listed image.

        REPEATED: listed before in this run. SKIP: held with the same fingerprint. CHANGED: held, but the file may have
        changed or was never read. NEW: not held. ERASED: not to come back. An image without fingerprint is CHANGED
        when held: only its content can tell. fingerprints: `hash_each_in_process`, 0 where there is none.
        """
        found, held = self._table.get(uris)
        repeated = found & (held[:, 2] == _LISTED)
        same = found & (held[:, 0] == fingerprints) & (fingerprints != 0)
        verdict = np.where(repeated, REPEATED, np.where(same, SKIP, np.where(found, CHANGED, NEW)))
        verdict = np.where(~repeated & is_in_sorted(self._erased, uris), ERASED, verdict)
        first = np.zeros(len(uris), bool)
        first[np.unique(uris, return_index=True)[1]] = True
        verdict = np.where(first, verdict, REPEATED).astype(np.int8)
        listed = np.stack([fingerprints, held[:, 1], np.full(len(uris), _LISTED)], 1)
        self._table.add(uris, listed)
        return verdict, held[:, 1]

    def find_missing(self, most: int) -> tuple[int, UInt64]:
        """(how many, hashes of the uris) of the source's images that were not listed; no hashes where more than `most`.

        For after the last item of a listing.
        """
        count, parts = 0, [np.empty(0, np.uint64)]
        for keys, values in self._table.rows():
            gone = keys[values[:, 2] == _OF_SOURCE]
            count += len(gone)
            if count <= most:
                parts.append(gone)
        return count, np.concatenate(parts if count <= most else parts[:1])

    def close(self) -> None:
        """Give the temporary file back."""
        self._table.close()


def _gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Batches as tables of some length: a file that a worker wrote gives one of a few hundred rows."""
    held, rows = list[pa.RecordBatch](), 0
    for batch in batches:
        held.append(batch)
        rows += batch.num_rows
        if rows >= _ROWS:
            yield pa.Table.from_batches(held)
            held, rows = [], 0
    if held:
        yield pa.Table.from_batches(held)
