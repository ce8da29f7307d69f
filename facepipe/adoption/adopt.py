"""Turn encodings into rows of a gallery, unless the gallery holds the image already or it was erased."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.adoption.rows import SCHEME, EncodedImage, find_refusals, group_images, measure_vectors
from facepipe.arrow import to_float_lists, to_vectors
from facepipe.gallery.suppressed import SuppressedHashes
from facepipe.gallery.table import Gallery
from facepipe.hashing import compute_face_id, hash64
from facepipe.schema import OK
from facepipe.storage.hashtable import HashTable
from facepipe.types import Bool, Float32, Float64, UInt64

# States of an image in the table.
_ADOPTED = np.uint64(0)
_EMBEDDED = np.uint64(1)
_LISTED = np.uint64(2)

# Refused rows that are shown in full.
_MAX_EXAMPLES = 5
# Rows per batch while the gallery is read.
_ROWS = 65536


@dataclass
class AdoptionTally:
    """What became of the rows.

    Attributes:
        listed: Rows read.
        adopted: New rows.
        replaced: Those among the adopted of images that had other encodings before.
        skipped: Rows that the gallery has already, from an earlier adoption or from the photo.
        repeated: Rows that are twice in the file.
        erased: Rows of erased images.
        refused: Refused rows by reason.
        examples: The first five refused rows, as `FILE row N: why`.
        norm_least: Least norm of the adopted vectors.
        norm_most: Greatest norm of the adopted vectors.
        norm_sum: Sum of the norms of the adopted vectors.
    """

    listed: int = 0
    adopted: int = 0
    replaced: int = 0
    skipped: int = 0
    repeated: int = 0
    erased: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    norm_least: float = float("inf")
    norm_most: float = 0.0
    norm_sum: float = 0.0

    def refuse(self, table: pa.Table, n: int, reason: str, explanation: str) -> None:
        """Count row n of a table as refused for a reason."""
        self.refused[reason] += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(f"{table['file'][n]} row {table['row'][n]}: {explanation}")

    def add_norms(self, norms: Float64) -> None:
        """Add the norms of vectors that were adopted."""
        if len(norms):
            self.norm_least = min(self.norm_least, float(norms.min()))
            self.norm_most = max(self.norm_most, float(norms.max()))
            self.norm_sum += float(norms.sum())


class Adoption:
    """Turns tables of encodings into rows. Call `close` when done.

    Encodings never replace the rows of a photo that was embedded. They replace those of an earlier adoption if they
    differ.

    Attributes:
        tally: What became of the rows so far.
    """

    def __init__(
        self, gallery: Gallery, source: str, *, erased_uris: SuppressedHashes, erased_contents: SuppressedHashes
    ):
        """Read what a gallery holds.

        Args:
            gallery: the gallery to adopt into.
            source: name of the corpus.
            erased_uris: hashes of uris that must not come back.
            erased_contents: hashes of image ids that must not come back.
        """
        self.tally = AdoptionTally()
        self._dim = gallery.dim
        self._source = source
        self._erased_uris = erased_uris
        self._erased_contents = erased_contents
        # Per image: the hash of its fingerprint, and its state.
        self._known = HashTable(width=2)
        try:
            for batch in gallery.batches(["uri", "fingerprint", "face_index"], rows=_ROWS, with_hidden=True):
                # One row per image is enough: all its rows have the same fingerprint.
                self._add_known(batch.filter(pc.fill_null(pc.equal(batch["face_index"], 0), True)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Delete the temporary file."""
        self._known.close()

    def _add_known(self, images: pa.RecordBatch) -> None:
        marks = [mark or "" for mark in images["fingerprint"].to_pylist()]
        # The fingerprint says whether the image's vectors were adopted or come from its photo.
        states = [_ADOPTED if mark.startswith(SCHEME) else _EMBEDDED for mark in marks]
        values = np.array([[hash64(mark), state] for mark, state in zip(marks, states, strict=True)], np.uint64)
        if len(values):
            self._known.add(np.array([hash64(uri) for uri in images["uri"].to_pylist()], np.uint64), values)

    def adopt_table(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Turn encodings into rows.

        Args:
            table: of the schema ENCODINGS; all rows of an image are in it.

        Returns:
            Rows for the gallery, and their images as work items.
        """
        self.tally.listed += table.num_rows
        # Refuse single rows first; what is left of an image is adopted as a whole.
        raw, norms = measure_vectors(table, self._dim)
        is_sound = self._refuse_rows(table, raw, norms)
        images, previous = self._screen_images(list(group_images(table, raw, is_sound, self._source)), table)
        uris = pa.array([image.uri for image in images], pa.string())
        return make_rows(table, raw, norms, images), pa.table({"uri": uris, "previous": previous})

    def _refuse_rows(self, table: pa.Table, raw: Float32, norms: Float64) -> Bool:
        """Count the rows that cannot be adopted; tell which can, (n,)."""
        refusals = find_refusals(table, raw, norms)
        for n, (reason, explanation) in refusals.items():
            self.tally.refuse(table, n, reason, explanation)
        is_sound = np.ones(table.num_rows, bool)
        is_sound[list(refusals)] = False
        return is_sound

    def _screen_images(self, images: list[EncodedImage], table: pa.Table) -> tuple[list[EncodedImage], pa.Array]:
        """Return the images that become rows, and the marks of those that they replace (null if they are new)."""
        keys = np.array([hash64(image.uri) for image in images], np.uint64)
        marks = np.array([hash64(image.fingerprint) for image in images], np.uint64)
        is_known, known = self._known.get(keys)
        is_erased = self._find_erased(keys, images)
        adopted = []
        previous = []
        # Marks of the images that came before in the same file, by key.
        seen = {int(keys[n]): int(known[n, 0]) for n in np.flatnonzero(is_known & (known[:, 1] == _LISTED))}
        # Sort each image into erased, repeated, skipped or adopted; the tally counts rows.
        for n, image in enumerate(images):
            key = int(keys[n])
            mark = int(marks[n])
            if is_erased[n]:
                self.tally.erased += len(image.at)
            elif key in seen:
                self._count_repeated(image, table, is_same=seen[key] == mark)
            elif is_known[n] and (known[n, 1] == _EMBEDDED or known[n, 0] == marks[n]):
                self.tally.skipped += len(image.at)
            else:
                self.tally.adopted += len(image.at)
                self.tally.replaced += len(image.at) if is_known[n] else 0
                adopted.append(image)
                previous.append(int(known[n, 0]) if is_known[n] else None)
            # The first occurrence decides, so later ones are compared with its mark.
            seen.setdefault(key, mark)
        # The table keeps the marks for the following batches of the same file.
        listed = np.array([[mark, _LISTED] for mark in seen.values()], np.uint64).reshape(-1, 2)
        self._known.add(np.array(list(seen), np.uint64), listed)
        return adopted, pa.array(previous, pa.uint64())

    def _count_repeated(self, image: EncodedImage, table: pa.Table, *, is_same: bool) -> None:
        """Count an image whose name came before in the same file."""
        if is_same:
            self.tally.repeated += len(image.at)
            return
        explanation = f"{image.uri} came before with other encodings: put the rows of one image next to each other"
        for n in image.at:
            self.tally.refuse(table, int(n), "scattered", explanation)

    def _find_erased(self, keys: UInt64, images: list[EncodedImage]) -> Bool:
        content_hashes = np.array([hash64(image.content) for image in images], np.uint64)
        return self._erased_uris.contains(keys) | self._erased_contents.contains(content_hashes)


def make_rows(table: pa.Table, raw: Float32, norms: Float64, images: list[EncodedImage]) -> pa.Table:
    """Make the gallery's rows of images: all columns except those that a block shares.

    Args:
        table: encodings.
        raw: their vectors, (n, dim).
        norms: the norms of these, (n,).
        images: the images that become rows.
    """
    # Positions of the rows in the table, image after image; `faces` runs beside them.
    at = np.concatenate([np.empty(0, np.int64), *(image.at for image in images)])
    faces = [(image, n) for image in images for n in range(len(image.at))]
    labels = table.select(["identity", "box"]).take(pa.array(at))
    columns = {
        "face_id": pa.array([compute_face_id(image.uri, image.content, n) for image, n in faces], pa.int64()),
        "image_id": pa.array([image.content for image, _ in faces], pa.string()),
        "uri": pa.array([image.uri for image, _ in faces], pa.string()),
        "fingerprint": pa.array([image.fingerprint for image, _ in faces], pa.string()),
        "status": pa.array([OK] * len(faces), pa.string()),
        "face_index": pa.array([n for _, n in faces], pa.int16()),
        "identity": labels["identity"],
        "box": labels["box"],
        "face_px": compute_face_px(labels["box"]),
        # The gallery holds unit vectors; the length of the raw one goes into a column of its own.
        "embedding": to_float_lists((raw[at] / norms[at, None]).astype(np.float32)),
        "embedding_norm": pa.array(norms[at], pa.float32()),
    }
    return pa.table(columns)


def compute_face_px(boxes: pa.ChunkedArray) -> pa.Array:
    """Compute the shorter side of each box in pixels; null for a row without a box."""
    has_box = boxes.is_valid().to_numpy()
    sides = np.zeros(len(has_box), np.float32)
    corners = to_vectors(boxes.drop_null(), 4)
    # `initial` gives the minimum a value if there are no boxes at all.
    sides[has_box] = (corners[:, 2:] - corners[:, :2]).min(axis=1, initial=np.inf)
    return pa.array(sides, pa.float32(), mask=~has_box)
