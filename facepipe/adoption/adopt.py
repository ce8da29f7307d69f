"""Encodings as rows of a gallery: what is held already, or was erased, is left out; photos keep their rows."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.adoption.rows import SCHEME, EncodedImage, find_refusals, group_images, measure_vectors
from facepipe.arrow import to_float_lists, to_vectors
from facepipe.gallery.table import Gallery
from facepipe.hashing import compute_face_id, hash64
from facepipe.schema import OK
from facepipe.storage.hashtable import HashTable
from facepipe.types import Bool, Float32, Float64, UInt64

_ADOPTED, _EMBEDDED, _LISTED = (np.uint64(n) for n in range(3))
_EXAMPLES = 5


@dataclass
class AdoptionTally:
    """What became of the rows. adopted: new; replaced: of these, rows of images that were held with other encodings;
    skipped: held already, be it by an earlier adoption or by their photo; repeated: twice in the file; refused: by
    reason, the first five as `FILE row N: why`; norms: least, greatest and sum of the adopted vectors' norms.
    """

    listed: int = 0
    adopted: int = 0
    replaced: int = 0
    skipped: int = 0
    repeated: int = 0
    erased: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    norms: tuple[float, float, float] = (float("inf"), 0.0, 0.0)

    def refuse(self, table: pa.Table, n: int, reason: str, why: str) -> None:
        """Count row n of a table as refused for a reason."""
        self.refused[reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{table['file'][n]} row {table['row'][n]}: {why}")

    def add_norms(self, norms: Float64) -> None:
        """Take the norms of vectors that were adopted."""
        if len(norms):
            low, high, total = self.norms
            self.norms = min(low, float(norms.min())), max(high, float(norms.max())), total + float(norms.sum())


class Adoption:
    """Turns tables of encodings into rows, given what a gallery holds and what was erased from it.

    Encodings never take the place of a photo that was embedded; those of an earlier adoption they replace where they
    differ. `close` when done.
    """

    def __init__(self, gallery: Gallery, source: str, erased: tuple[UInt64, UInt64]):
        self.tally = AdoptionTally()
        self._source = source
        self._erased = erased
        self._held = HashTable(width=2)
        try:
            for batch in gallery.batches(["uri", "fingerprint", "face_index"], rows=65536):
                self._hold(batch.filter(pc.fill_null(pc.equal(batch["face_index"], 0), True)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the temporary file back."""
        self._held.close()

    def _hold(self, images: pa.RecordBatch) -> None:
        marks = [mark or "" for mark in images["fingerprint"].to_pylist()]
        kinds = [_ADOPTED if mark.startswith(SCHEME) else _EMBEDDED for mark in marks]
        values = np.array([[hash64(mark), kind] for mark, kind in zip(marks, kinds, strict=True)], np.uint64)
        if len(values):
            self._held.add(np.array([hash64(uri) for uri in images["uri"].to_pylist()], np.uint64), values)

    def __call__(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """(rows for the gallery, their images as work items) of a table of ENCODINGS that holds whole images."""
        self.tally.listed += table.num_rows
        raw, norms = measure_vectors(table)
        sound = self._sound(table, raw, norms)
        chosen, previous = self._screened(list(group_images(table, raw, sound, self._source)), table)
        return make_rows(table, raw, norms, chosen), pa.table({"uri": uris_of(chosen), "previous": previous})

    def _sound(self, table: pa.Table, raw: Float32, norms: Float64) -> Bool:
        whys = find_refusals(table, raw, norms)
        for n, (reason, why) in whys.items():
            self.tally.refuse(table, n, reason, why)
        sound = np.ones(table.num_rows, bool)
        sound[list(whys)] = False
        return sound

    def _screened(self, found: list[EncodedImage], table: pa.Table) -> tuple[list[EncodedImage], pa.Array]:
        """The images that become rows, and the marks of those that they replace (null where they are new)."""
        keys = np.array([hash64(image.uri) for image in found], np.uint64)
        marks = np.array([hash64(image.fingerprint) for image in found], np.uint64)
        present, held = self._held.get(keys)
        gone = self._gone(keys, found)
        kept, previous = [], []
        seen = {int(keys[n]): int(held[n, 0]) for n in np.flatnonzero(present & (held[:, 1] == _LISTED))}
        for n, image in enumerate(found):
            key, mark = int(keys[n]), int(marks[n])
            if gone[n]:
                self.tally.erased += len(image.at)
            elif key in seen:
                self._again(image, seen[key] == mark, table)
            elif present[n] and (held[n, 1] == _EMBEDDED or held[n, 0] == marks[n]):
                self.tally.skipped += len(image.at)
            else:
                self.tally.adopted += len(image.at)
                self.tally.replaced += len(image.at) if present[n] else 0
                kept.append(image)
                previous.append(int(held[n, 0]) if present[n] else None)
            seen.setdefault(key, mark)
        listed = np.array([[mark, _LISTED] for mark in seen.values()], np.uint64).reshape(-1, 2)
        self._held.add(np.array(list(seen), np.uint64), listed)
        return kept, pa.array(previous, pa.uint64())

    def _again(self, image: EncodedImage, same: bool, table: pa.Table) -> None:
        """Count an image whose name came before in the same file."""
        if same:
            self.tally.repeated += len(image.at)
            return
        why = f"{image.uri} came before with other encodings: put the rows of one image next to each other"
        for n in image.at:
            self.tally.refuse(table, int(n), "scattered", why)

    def _gone(self, keys: UInt64, found: list[EncodedImage]) -> Bool:
        uris, contents = self._erased
        digests = np.array([hash64(image.content) for image in found], np.uint64)
        return np.asarray(np.isin(keys, uris) | np.isin(digests, contents))


def make_rows(table: pa.Table, raw: Float32, norms: Float64, chosen: list[EncodedImage]) -> pa.Table:
    """The gallery's rows of the chosen images, all columns but those that a block shares."""
    at = np.concatenate([np.empty(0, np.int64), *(image.at for image in chosen)])
    each = [(image, n) for image in chosen for n in range(len(image.at))]
    taken = table.select(["identity", "box"]).take(pa.array(at))
    columns = {
        "face_id": pa.array([compute_face_id(image.uri, image.content, n) for image, n in each], pa.int64()),
        "image_id": pa.array([image.content for image, _ in each], pa.string()),
        "uri": pa.array([image.uri for image, _ in each], pa.string()),
        "fingerprint": pa.array([image.fingerprint for image, _ in each], pa.string()),
        "status": pa.array([OK] * len(each), pa.string()),
        "face_index": pa.array([n for _, n in each], pa.int16()),
        "identity": taken["identity"],
        "box": taken["box"],
        "face_px": compute_face_px(taken["box"]),
        "embedding": to_float_lists((raw[at] / norms[at, None]).astype(np.float32)),
        "embedding_norm": pa.array(norms[at], pa.float32()),
    }
    return pa.table(columns)


def compute_face_px(boxes: pa.ChunkedArray) -> pa.Array:
    """Of each box, in pixels; null where there is none."""
    given = boxes.is_valid().to_numpy()
    sides = np.zeros(len(given), np.float32)
    corners = to_vectors(boxes.drop_null(), 4)
    sides[given] = (corners[:, 2:] - corners[:, :2]).min(axis=1, initial=np.inf)
    return pa.array(sides, pa.float32(), mask=~given)


def uris_of(chosen: list[EncodedImage]) -> pa.Array:
    """What the images are called."""
    return pa.array([image.uri for image in chosen], pa.string())
