"""The faces of a gallery as exports read them: in batches, without anyone who was erased."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.errors import GalleryError
from facepipe.gallery import Gallery, hidden, suppressed
from facepipe.hashing import hash64_each
from facepipe.types import Bool

_COLUMNS = (
    "face_id",
    "image_id",
    "uri",
    "source",
    "identity",
    "width",
    "height",
    "box",
    "landmarks",
    "det_score",
    "embedding",
)


class ExportedFaces:
    """The faces of a gallery, in the order of its files.

    Attributes:
        gallery: The gallery.
        dim: Length of an embedding.
        count: Number of faces so far.
    """

    def __init__(self, gallery: Gallery, where: str | None = None):
        """Prepare to read.

        Args:
            gallery: the gallery.
            where: a filter as text; all faces by default.
        """
        self.gallery = gallery
        self.dim = 0
        self.count = 0
        self._where = "face_id is not null" if where is None else f"face_id is not null and ({where})"
        self._erasures = _read_erasures(gallery.path)
        secret = suppressed.read_secret()
        self._erased_uris = suppressed.read_uris(gallery.path, secret)
        self._erased_contents = suppressed.read_contents(gallery.path, secret)
        self._find_dim()

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """Yield batches of the columns above; all embeddings have `dim` numbers."""
        self.count = 0
        for batch in self.gallery.batches(list(_COLUMNS), self._where):
            kept = batch.filter(pa.array(~self._find_erased(batch)))
            if kept.num_rows:
                self.count += kept.num_rows
                yield kept

    def require_no_new_erasure(self) -> None:
        """Raise GalleryError if somebody was erased since the reading began: what was written may hold them."""
        if _read_erasures(self.gallery.path) != self._erasures:
            raise GalleryError("somebody was erased while the export ran: run the same command again")

    def _find_dim(self) -> None:
        first = next(iter(self.gallery.batches(["embedding"], self._where, rows=1)), None)
        if first is None:
            raise GalleryError(f"no face of {self.gallery.path!r} meets the filter")
        self.dim = len(first["embedding"][0])

    def _find_erased(self, batch: pa.RecordBatch) -> Bool:
        """Find the faces of erased images. An older version of the table may hold them."""
        by_uri = self._erased_uris.contains(hash64_each(batch["uri"].to_pylist()))
        by_content = self._erased_contents.contains(hash64_each(batch["image_id"].to_pylist()))
        is_other_length = pc.not_equal(pc.list_value_length(batch["embedding"]), self.dim)
        if pc.any(is_other_length).as_py():
            raise GalleryError(f"embeddings of different lengths in {self.gallery.path!r}: run `facepipe verify`")
        return np.asarray(by_uri | by_content)


def _read_erasures(gallery: str) -> tuple[tuple[str, ...], frozenset[str]]:
    return hidden.list_requests(gallery), hidden.list_complete(gallery)


def to_texts(vectors: pa.Array) -> pa.Array:
    """Write vectors as `[0.1,-2.5e-07]`: as few digits as give the same float32 again.

    Args:
        vectors: lists of float32.
    """
    # Of a slice Arrow would cast what lies around it as well.
    whole = pa.concat_arrays([vectors])
    joined = pc.binary_join(whole.cast(pa.list_(pa.string())), ",")
    return pc.binary_join_element_wise("[", joined, "]", "")
