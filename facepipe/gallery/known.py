"""What the gallery already holds, asked at listing time, before any byte of an image is read."""

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from facepipe.gallery.table import Gallery
from facepipe.hashing import hash64
from facepipe.hashtable import HashTable
from facepipe.schema import READ_ERROR
from facepipe.work.blocks import CHANGED, NEW, REPEATED, SKIP

Hashes = npt.NDArray[np.uint64]
_LISTED = np.uint64(1)
_HELD = np.uint64(0)


class KnownImages:
    """uri -> (fingerprint, content) of every image in a gallery, as hashes in a file-backed table: 24 bytes an image.

    Also remembers what was listed in this run, so that an image listed twice is embedded once.
    """

    def __init__(self, gallery: Gallery | None):
        self._table = HashTable(width=3)
        if gallery is not None:
            self._fill(gallery)

    def _fill(self, gallery: Gallery) -> None:
        for batch in gallery.batches(["uri", "fingerprint", "image_id", "status", "face_index"], rows=65536):
            batch = batch.filter(pc.fill_null(pc.equal(batch["face_index"], 0), True))
            columns = (batch[name].to_pylist() for name in ("uri", "fingerprint", "image_id", "status"))
            rows = [
                # What could not be read is tried again: its fingerprint never matches.
                (hash64(uri), hash64(mark) if mark and status != READ_ERROR else 0, hash64(image or ""), int(_HELD))
                for uri, mark, image, status in zip(*columns, strict=True)
            ]
            if rows:
                hashes = np.array(rows, np.uint64)
                self._table.add(hashes[:, 0], hashes[:, 1:])

    def screen(self, uris: Hashes, fingerprints: Hashes) -> tuple[npt.NDArray[np.int8], Hashes]:
        """(verdict, content hash held) for each listed image.

        REPEATED: listed before in this run. SKIP: held with the same fingerprint. CHANGED: held, but the file may have
        changed or was never read. NEW: not held. An image without fingerprint is CHANGED when held: only its content
        can tell.
        """
        found, held = self._table.get(uris)
        repeated = found & (held[:, 2] == _LISTED)
        same = found & (held[:, 0] == fingerprints) & (fingerprints != 0)
        verdict = np.where(repeated, REPEATED, np.where(same, SKIP, np.where(found, CHANGED, NEW)))
        first = np.zeros(len(uris), bool)
        first[np.unique(uris, return_index=True)[1]] = True
        verdict = np.where(first, verdict, REPEATED).astype(np.int8)
        listed = np.stack([fingerprints, held[:, 1], np.full(len(uris), _LISTED)], 1)
        self._table.add(uris, listed)
        return verdict, held[:, 1]

    def close(self) -> None:
        """Give the temporary file back."""
        self._table.close()
