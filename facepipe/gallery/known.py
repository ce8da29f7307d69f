"""What the gallery already holds, asked at listing time, before any byte of an image is read."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.gallery.table import Gallery
from facepipe.hashing import hash64
from facepipe.hashtable import HashTable
from facepipe.schema import READ_ERROR
from facepipe.work.blocks import CHANGED, ERASED, NEW, REPEATED, SKIP

Hashes = npt.NDArray[np.uint64]
_HELD, _LISTED, _OF_SOURCE = (np.uint64(n) for n in range(3))
_COLUMNS = ("uri", "fingerprint", "image_id", "status", "source", "missing_since", "face_index")


class KnownImages:
    """uri -> (fingerprint, content, state) of every image in a gallery, as hashes in a file-backed table.

    Also remembers what was listed in this run, so that an image listed twice is embedded once, and what was not.
    source: name of the corpus that is listed; erased: sorted hashes of uris that must not come back.
    """

    def __init__(self, gallery: Gallery | None, source: str | None = None, erased: Hashes | None = None):
        self._table = HashTable(width=3)
        self._erased = np.empty(0, np.uint64) if erased is None else erased
        self.of_source = 0
        try:
            for batch in gallery.batches(_COLUMNS, rows=65536) if gallery is not None else ():
                self._add(batch.filter(pc.fill_null(pc.equal(batch["face_index"], 0), True)), source)
        except BaseException:
            self.close()
            raise

    def _add(self, images: pa.RecordBatch, source: str | None) -> None:
        if not images.num_rows:
            return
        # What could not be read is tried again, and so is what was missing: their fingerprints never match.
        again = pc.or_(pc.equal(images["status"], READ_ERROR), pc.is_valid(images["missing_since"])).to_pylist()
        mine = pc.fill_null(pc.equal(images["source"], source or ""), False).to_numpy(zero_copy_only=False)
        uris, marks, contents = (images[name].to_pylist() for name in ("uri", "fingerprint", "image_id"))
        marks_ = [0 if retry or not mark else hash64(mark) for mark, retry in zip(marks, again, strict=True)]
        values = np.array([marks_, [hash64(content or "") for content in contents]], np.uint64)
        states = np.where(mine, _OF_SOURCE, _HELD)
        self._table.add(np.array([hash64(uri) for uri in uris], np.uint64), np.vstack([values, states]).T.copy())
        self.of_source += int(mine.sum())

    def screen(self, uris: Hashes, fingerprints: Hashes) -> tuple[npt.NDArray[np.int8], Hashes]:
        """(verdict, content hash held) for each listed image.

        REPEATED: listed before in this run. SKIP: held with the same fingerprint. CHANGED: held, but the file may have
        changed or was never read. NEW: not held. ERASED: not to come back. An image without fingerprint is CHANGED
        when held: only its content can tell.
        """
        found, held = self._table.get(uris)
        repeated = found & (held[:, 2] == _LISTED)
        same = found & (held[:, 0] == fingerprints) & (fingerprints != 0)
        verdict = np.where(repeated, REPEATED, np.where(same, SKIP, np.where(found, CHANGED, NEW)))
        if self._erased.size:
            at = np.minimum(np.searchsorted(self._erased, uris), self._erased.size - 1)
            verdict = np.where(~repeated & (self._erased[at] == uris), ERASED, verdict)
        first = np.zeros(len(uris), bool)
        first[np.unique(uris, return_index=True)[1]] = True
        verdict = np.where(first, verdict, REPEATED).astype(np.int8)
        listed = np.stack([fingerprints, held[:, 1], np.full(len(uris), _LISTED)], 1)
        self._table.add(uris, listed)
        return verdict, held[:, 1]

    def missing(self, most: int) -> tuple[int, Hashes]:
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
