"""What a gallery already holds, looked up at listing time, before any byte of an image is read."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.gallery.suppressed import SuppressedHashes
from facepipe.gallery.table import Gallery
from facepipe.hashing import hash64_column, hash_each_in_process
from facepipe.schema import READ_ERROR
from facepipe.sources.number_ranges import NumberRanges
from facepipe.sources.screening import CHANGED, ERASED, NEW, REPEATED, SKIP, Screening, hash_labels
from facepipe.storage.hashtable import HashTable
from facepipe.types import UInt64

# States of an image in the table.
# They are the lowest bits of the last of the three values per image: fingerprint, content, label and state.
_IN_GALLERY = np.uint64(0)
_LISTED = np.uint64(1)
_OF_SOURCE = np.uint64(2)
_STATE = np.uint64(3)

_COLUMNS = ("uri", "fingerprint", "image_id", "status", "source", "missing_since", "face_index", "identity")
_ROWS = 65536


class KnownImages:
    """A map from the uri of every image in a gallery to its fingerprint, content, label and state, as hashes in a file.

    It also remembers what was listed in this run. An image that is listed twice is embedded once, and afterwards the
    images that were not listed are known.

    Attributes:
        source_count: Number of images that the gallery holds of the listed source.
    """

    def __init__(self, gallery: Gallery | None, source: str | None = None, erased: SuppressedHashes | None = None):
        """Read what a gallery holds.

        Args:
            gallery: the gallery; None for one that does not exist yet.
            source: name of the corpus that is listed.
            erased: hashes of uris that must not come back.
        """
        self._table = HashTable(width=3)
        self._erased = erased or SuppressedHashes()
        self.source_count = 0
        self._other_numbers = NumberRanges()
        # Only the first row of each image is kept: its other rows repeat the same values.
        # An image that is being erased is known: it must not be embedded beside its old rows.
        batches = gallery.batches(_COLUMNS, rows=_ROWS, with_hidden=True) if gallery is not None else ()
        try:
            for table in _join_batches(batches):
                self._add(table.filter(pc.fill_null(pc.equal(table["face_index"], 0), True)), source)
        except BaseException:
            self.close()
            raise

    def _add(self, images: pa.Table, source: str | None) -> None:
        if not images.num_rows:
            return
        is_of_source = pc.fill_null(pc.equal(images["source"], source or ""), False).to_numpy(zero_copy_only=False)
        # Images that could not be read, or were missing, are read again: their fingerprints never match.
        is_unread = pc.fill_null(pc.equal(images["status"], READ_ERROR), False)
        is_retried = pc.or_(is_unread, pc.is_valid(images["missing_since"])).to_numpy(zero_copy_only=False)
        marks = hash_each_in_process(pc.fill_null(images["fingerprint"], "").to_numpy(zero_copy_only=False))
        marks[is_retried] = 0
        labels = hash_labels(images["identity"].to_pylist())
        states = np.where(is_of_source, _OF_SOURCE, _IN_GALLERY) | labels
        self._table.add(hash64_column(images["uri"]), np.stack([marks, hash64_column(images["image_id"]), states], 1))
        self.source_count += int(is_of_source.sum())
        other_labels = images["identity"].filter(pa.array(~is_of_source))
        if len(other_labels):
            self._other_numbers.add(pc.unique(other_labels).to_pylist())

    def screen(self, uris: UInt64, fingerprints: UInt64) -> Screening:
        """Decide for listed images whether they have to be read.

        Args:
            uris: `hash64_each` of the uris, (n,).
            fingerprints: `hash_each_in_process` of the fingerprints, (n,), 0 for an image without one.

        Returns:
            What the gallery knows of the images. Verdicts are:

            REPEATED: listed before in this run. SKIP: in the gallery with the same fingerprint. CHANGED: in the
            gallery, but the file may have changed, was never read, or has no fingerprint: only its content can tell.
            NEW: not in the gallery. ERASED: must not come back.
        """
        # `known` has one row per image: fingerprint, content, label and state.
        is_known, known = self._table.get(uris)
        states = known[:, 2] & _STATE
        is_repeated = is_known & (states == _LISTED)
        is_same = is_known & (known[:, 0] == fingerprints) & (fingerprints != 0)
        verdict = np.where(is_repeated, REPEATED, np.where(is_same, SKIP, np.where(is_known, CHANGED, NEW)))
        verdict = np.where(~is_repeated & self._erased.contains(uris), ERASED, verdict)
        # Of images that occur several times in this batch, all but the first are repeated.
        is_first = np.zeros(len(uris), bool)
        is_first[np.unique(uris, return_index=True)[1]] = True
        verdict = np.where(is_first, verdict, REPEATED).astype(np.int8)
        # Mark the whole batch as listed; the content stays what the gallery holds.
        self._table.add(uris, np.stack([fingerprints, known[:, 1], np.full(len(uris), _LISTED)], 1))
        return Screening(
            verdicts=verdict,
            contents=known[:, 1],
            labels=known[:, 2] & ~_STATE,
            is_own=states == _OF_SOURCE,
            other_numbers=self._other_numbers,
        )

    def find_missing(self, most: int) -> tuple[int, UInt64]:
        """Find the source's images that were not listed; call it after the last item of a listing.

        Returns:
            How many are missing, and the hashes of their uris; no hashes if they are more than `most`.
        """
        count = 0
        parts = [np.empty(0, np.uint64)]
        # An image that was listed in this run has another state by now.
        for keys, values in self._table.read_rows():
            missing = keys[values[:, 2] & _STATE == _OF_SOURCE]
            count += len(missing)
            # Past the limit only the count goes on, and memory stays bounded.
            if count <= most:
                parts.append(missing)
        return count, np.concatenate(parts if count <= most else parts[:1])

    def close(self) -> None:
        """Delete the temporary file."""
        self._table.close()


def _join_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Join batches to tables of some length: a file that a worker wrote gives batches of a few hundred rows."""
    pending: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        pending.append(batch)
        rows += batch.num_rows
        if rows >= _ROWS:
            yield pa.Table.from_batches(pending)
            pending = []
            rows = 0
    if pending:
        yield pa.Table.from_batches(pending)
