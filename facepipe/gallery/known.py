"""What a gallery already holds, looked up at listing time, before any byte of an image is read."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe.gallery.failures import RetryRule
from facepipe.gallery.sources import SourceRows
from facepipe.gallery.suppressed import SuppressedHashes
from facepipe.gallery.table import Gallery
from facepipe.hashing import hash64, hash64_column, hash64_each, hash_each_in_process
from facepipe.schema import OK
from facepipe.sorted_lookup import is_in_sorted
from facepipe.sources.folder_times import FolderTimes
from facepipe.sources.number_ranges import NumberRanges
from facepipe.sources.screening import CHANGED, ERASED, NEW, REPEATED, SKIP, Screening, hash_labels
from facepipe.storage.hashtable import HashTable
from facepipe.types import Bool, UInt64

# States of an image in the table.
# They are the lowest bits of the last of the three values per image: fingerprint, content, label and state.
_IN_GALLERY = np.uint64(0)
_LISTED = np.uint64(1)
_OF_SOURCE = np.uint64(2)
_MISSING = np.uint64(3)  # of the source, and marked as missing
_STATE = np.uint64(3)

_COLUMNS = (
    "uri",
    "fingerprint",
    "image_id",
    "status",
    "source",
    "missing_since",
    "face_index",
    "identity",
    "former_uris",
    "failed_with",
)
_NO_CONTENT = hash64("")
_ROWS = 65536


class KnownImages:
    """A map from the uri of every image in a gallery to its fingerprint, content, label and state, as hashes in a file.

    It also remembers what was listed in this run. An image that is listed twice is embedded once, and afterwards the
    images that were not listed are known.

    Attributes:
        own_count: Number of images that the gallery holds of the listed source.
        source_count: Number of those that are not marked as missing.
        listed_count: Number of images that were listed in this run.
    """

    def __init__(
        self,
        gallery: Gallery | None,
        source: SourceRows | None = None,
        erased: SuppressedHashes | None = None,
        only: UInt64 | None = None,
        retry: RetryRule | None = None,
        folders: FolderTimes | None = None,
    ):
        """Read what a gallery holds.

        Args:
            gallery: the gallery; None for one that does not exist yet.
            source: tells which rows are of the source that is listed.
            erased: hashes of uris that must not come back.
            only: sorted hashes of uris: all other images are skipped, whatever the gallery knows of them.
            retry: decides which failed images are tried again; by default those that could not be read.
            folders: folders of the source that the listing may pass over. Their images are only counted.
        """
        self._retry = retry or RetryRule()
        self._table = HashTable(width=3)
        # First uris of moved images, and their contents: a new image of that uri and content would get their face ids.
        self._first_uris = HashTable(width=1)
        # Contents that an image of this listing may have been moved from.
        self._contents = HashTable()
        self._erased = erased or SuppressedHashes()
        self._only = only
        self._changes = source.list_changes() if source is not None else ()
        self.own_count = 0
        self.source_count = 0
        self._other_numbers = NumberRanges()
        self.listed_count = 0
        try:
            if gallery is not None:
                self._read(gallery, source, folders)
        except BaseException:
            self.close()
            raise

    @property
    def may_have_moved(self) -> bool:
        """Whether a listed image may be one that the gallery has under another uri, so that contents decide."""
        return bool(self.own_count or self._first_uris.count)

    def _read(self, gallery: Gallery, source: SourceRows | None, folders: FolderTimes | None) -> None:
        """Read the images of a gallery, and leave those out whose folders are passed over."""
        if folders is None or folders.is_empty:
            for images in _read_images(gallery, _COLUMNS):
                self._note_images(images, source)
                self._add(images, source)
            return
        self._count_by_folder(gallery, folders)
        for images in _read_images(gallery, _COLUMNS):
            self._note_images(images, source)
            # An image that is marked as missing is not in its folder.
            is_passed = folders.is_passed(folders.find(images["uri"])) & ~_is_missing(images)
            self._add(images.filter(pa.array(~is_passed)), source)

    def _count_by_folder(self, gallery: Gallery, folders: FolderTimes) -> None:
        """Count the images of folders whose time is the same, and decide which of these are passed over."""
        # Few images are not ok, so those that are tried again are found quickly.
        for images in _read_images(gallery, ("uri", "status", "failed_with", "face_index"), ds.field("status") != OK):
            folders.refuse(folders.find(images["uri"])[self._retry.find(images)])
        for images in _read_images(gallery, ("uri", "missing_since", "face_index")):
            folders.count(folders.find(images["uri"])[~_is_missing(images)])
        folders.settle()

    def _note_images(self, images: pa.Table, source: SourceRows | None) -> None:
        """Count images, and note what has to be known of all of them."""
        is_of_source = np.zeros(images.num_rows, bool) if source is None else source.contains(images)
        self.own_count += int(is_of_source.sum())
        self.source_count += int((is_of_source & ~_is_missing(images)).sum())
        other_labels = images["identity"].filter(pa.array(~is_of_source))
        if len(other_labels):
            self._other_numbers.add(pc.unique(other_labels).to_pylist())
        moved = images.filter(pc.is_valid(images["former_uris"]))
        if moved.num_rows:
            first_uris = hash64_each(former[0] for former in moved["former_uris"].to_pylist())
            self._add_first_uris(first_uris, hash64_column(moved["image_id"]))

    def _add(self, images: pa.Table, source: SourceRows | None) -> None:
        if not images.num_rows:
            return
        is_of_source = np.zeros(images.num_rows, bool) if source is None else source.contains(images)
        # Images that are tried again, or were missing, are read again: their fingerprints never match.
        is_marked = _is_missing(images)
        is_retried = self._retry.find(images)
        marks = hash_each_in_process(pc.fill_null(images["fingerprint"], "").to_numpy(zero_copy_only=False))
        marks[is_retried | is_marked] = 0
        # An image that is tried again counts as one without content, so that the same bytes get new rows.
        contents = hash64_column(images["image_id"])
        contents[is_retried] = _NO_CONTENT
        labels = hash_labels(images["identity"].to_pylist())
        own_states = np.where(is_marked, _MISSING, _OF_SOURCE)
        states = np.where(is_of_source, own_states, _IN_GALLERY) | labels
        self._table.add(hash64_column(images["uri"]), np.stack([marks, contents, states], 1))

    def _add_first_uris(self, uris: UInt64, contents: UInt64) -> None:
        is_known, known = self._first_uris.get(uris)
        is_new = self._first_uris.add(uris, contents[:, None])
        # If several images had the same first uri, the table has room for one content only.
        self._contents.add(known[is_known, 0])
        self._contents.add(contents[~is_new])

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
        if self._only is not None:
            verdict = np.where(is_in_sorted(self._only, uris), verdict, SKIP)
        # Of images that occur several times in this batch, all but the first are repeated.
        is_first = np.zeros(len(uris), bool)
        is_first[np.unique(uris, return_index=True)[1]] = True
        verdict = np.where(is_first, verdict, REPEATED).astype(np.int8)
        self.listed_count += int((verdict != REPEATED).sum())
        self._note_contents(uris, known[:, 1], verdict)
        # Mark the whole batch as listed; the content stays what the gallery holds.
        self._table.add(uris, np.stack([fingerprints, known[:, 1], np.full(len(uris), _LISTED)], 1))
        return Screening(
            verdicts=verdict,
            contents=known[:, 1],
            labels=known[:, 2] & ~_STATE,
            is_own=(states == _OF_SOURCE) | (states == _MISSING),
            other_numbers=self._other_numbers,
        )

    def find_erased(self, uris: Sequence[str]) -> Bool:
        """Tell of listed images whether they must not come back under a uri that they had before the source moved.

        Args:
            uris: the uris that they have now, (n,).

        Returns:
            (n,).
        """
        is_erased = np.zeros(len(uris), bool)
        if len(self._erased):
            for change in self._changes:
                former = hash64_each([change.change_uri(uri) or "" for uri in uris])
                is_erased |= self._erased.contains(former)
        return is_erased

    def _note_contents(self, uris: UInt64, contents: UInt64, verdicts: npt.NDArray[np.int8]) -> None:
        """Note the contents that a changed file held so far: another file may hold them by now."""
        is_changed = verdicts == CHANGED
        if is_changed.any():
            self._contents.add(contents[is_changed])
        is_read = is_changed | (verdicts == NEW)
        if self._first_uris.count and is_read.any():
            is_taken, taken = self._first_uris.get(uris[is_read])
            self._contents.add(taken[is_taken, 0])

    def read_unlisted(self) -> Iterator[tuple[UInt64, UInt64, Bool]]:
        """Read the images of the source that were not listed; call it after the last item of a listing.

        Yields:
            Hashes of their uris (n,), hashes of their contents (n,), and whether they are marked as missing (n,).
        """
        # An image that was listed in this run has another state by now.
        for keys, values in self._table.read_rows():
            states = values[:, 2] & _STATE
            is_unlisted = (states == _OF_SOURCE) | (states == _MISSING)
            yield keys[is_unlisted], values[is_unlisted, 1], states[is_unlisted] == _MISSING

    def read_moved_contents(self, *, with_unlisted: bool) -> Iterator[UInt64]:
        """Yield hashes of the contents that a listed image may have been moved from; some may come twice.

        They are the contents of images whose files have changed, and of those that were not listed.

        Args:
            with_unlisted: whether images that were not listed count.
        """
        for keys, _ in self._contents.read_rows():
            yield keys[keys != _NO_CONTENT]
        if with_unlisted:
            for _, contents, _ in self.read_unlisted():
                yield contents[contents != _NO_CONTENT]

    def count_unlisted(self) -> tuple[int, int]:
        """Count the images of the source that were not listed: those that are not marked as missing, and all."""
        unmarked = 0
        total = 0
        for keys, _, is_marked in self.read_unlisted():
            unmarked += int((~is_marked).sum())
            total += len(keys)
        return unmarked, total

    def close(self) -> None:
        """Delete the temporary files."""
        for table in (self._table, self._first_uris, self._contents):
            table.close()


def _read_images(gallery: Gallery, columns: Sequence[str], where: ds.Expression | None = None) -> Iterator[pa.Table]:
    """Read the first row of each image, whose other rows repeat the same values.

    An image that is being erased is read as well: it must not be embedded beside its old rows.
    """
    for table in _join_batches(gallery.batches(columns, where, rows=_ROWS, with_hidden=True)):
        images = table.filter(pc.fill_null(pc.equal(table["face_index"], 0), True))
        if images.num_rows:
            yield images


def _is_missing(images: pa.Table) -> Bool:
    """Tell which images are marked as missing, (n,)."""
    return np.asarray(pc.is_valid(images["missing_since"]).to_numpy(zero_copy_only=False), bool)


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
