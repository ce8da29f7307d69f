"""Images that were read and not embedded, because the gallery has their content: they get the rows that it has.

Which image was moved where is known at the end of a run only. Then all files have been read, so that it is known which
uris have given up their content: those that the source no longer lists, and those whose files hold another image now.
The rows of such a uri go to a new uri with the same content. If more new uris hold a content than uris have given it
up, the others are copies: they get copies of the rows, with face ids of their own.
"""

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.errors import StorageError
from facepipe.gallery.commits.parts import MOVED_COLUMNS, PartRecord
from facepipe.gallery.commits.renaming import rename_rows, set_column
from facepipe.gallery.commits.rewrite import Action, Rewrite, read_rows, rewrite_files, write_new_rows
from facepipe.gallery.commits.unlisted import ListingFigures, load_unlisted
from facepipe.gallery.hidden import HiddenWatch
from facepipe.gallery.sources import SourceRows
from facepipe.gallery.table import Gallery
from facepipe.hashing import compute_face_id, hash64_column, hash64_each
from facepipe.schema import FACES
from facepipe.sorted_lookup import find_sorted
from facepipe.storage import describe_error
from facepipe.storage.hashtable import HashTable
from facepipe.types import Bool, Int64, UInt64

_SCHEMA = pa.schema([(name, pa.string()) for name in MOVED_COLUMNS])
# Replaced images whose commit waits for the moved ones at most: what waits is lost if the run is killed.
_MAX_WAITING = 20_000
# Rows of copies per file.
_COPIED_ROWS = 20_000
# Columns that tell what becomes of a row.
_KEY_COLUMNS = ("uri", "image_id", "source", "missing_since", "face_index")


@dataclass
class MoveCounts:
    """What became of the images.

    Attributes:
        moved: Images that got the rows of a uri that has given them up.
        copied: Images that got a copy of rows.
        copied_rows: Rows of these copies.
        copied_faces: Faces of these copies.
        vanished: Those among the moved whose old uri was not listed and not marked as missing.
        unresolved: Uris of images whose content the gallery has no more: they have to be embedded.
    """

    moved: int = 0
    copied: int = 0
    copied_rows: int = 0
    copied_faces: int = 0
    vanished: int = 0
    unresolved: list[str] = field(default_factory=list)


class MovedImages:
    """Collects the images that may have moved, and gives them their rows at the end. Use it as a context manager.

    Records with replaced images wait until then, because their older rows may be those of a moved image.
    """

    def __init__(self, gallery: Gallery, rows: SourceRows, run: str):
        """Make an empty collection.

        Args:
            gallery: the gallery.
            rows: which rows are of the source.
            run: id of the run, for the names of files.
        """
        self._gallery = gallery
        self._rows = rows
        self._run = run
        self._file: IO[bytes] | None = None
        self._writer: Any = None
        self._waiting: list[PartRecord] = []
        self._waiting_count = 0
        self._waits = True

    def __enter__(self) -> "MovedImages":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, record: PartRecord, *, may_move: bool) -> list[PartRecord]:
        """Take from a record what waits for the end of the run, and return the records that can be committed now.

        Args:
            record: a finished block.
            may_move: whether an image of this run may have moved.
        """
        if record.moved:
            self._write(record.moved)
        if not (may_move and record.replaced and self._waits):
            return [record]
        # Only the part waits.
        self._waiting.append(replace(record, touched={}, relabelled={}))
        self._waiting_count += len(record.replaced)
        released = [replace(record, path=None, replaced=[])]
        # So many replaced images are not worth the wait. Those that were moved after all are embedded again.
        if self._waiting_count > _MAX_WAITING:
            self._waits = False
            released += self.take_waiting()
        return released

    @property
    def is_empty(self) -> bool:
        """Whether no image may have moved."""
        return self._file is None

    def take_waiting(self) -> list[PartRecord]:
        """Return the records that wait, and forget them."""
        waiting = self._waiting
        self._waiting = []
        return waiting

    def _write(self, moved: dict[str, list[str | None]]) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="facepipe-")  # noqa: SIM115  closed by __exit__
                self._writer = pa.ipc.new_file(self._file, _SCHEMA)
            self._writer.write_table(pa.table(moved, schema=_SCHEMA))
        except OSError as error:
            folder = tempfile.gettempdir()
            raise StorageError(f"cannot keep moved images in {folder!r} (TMPDIR): {describe_error(error)}") from error

    def resolve(
        self,
        folder: str,
        figures: ListingFigures,
        commit: Callable[[list[PartRecord], Callable[[], list[Action]]], None],
    ) -> MoveCounts:
        """Give all moved images their rows, in one commit with the records that wait; there must be any.

        Args:
            folder: folder of the run that holds what the listing found out.
            figures: figures of the listing.
            commit: commits the parts of records together with actions that it has made.

        Returns:
            What became of the images.
        """
        assert self._file is not None
        waiting = self.take_waiting()
        self._writer.close()
        self._file.flush()
        # The file is mapped into memory: what is not looked at takes none. It has no name, and goes with the process.
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        items = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped))).read_all()
        with closing(load_unlisted(folder, figures)) as unlisted, closing(HashTable()) as displaced:
            for batch in items.to_batches():
                displaced.add(hash64_column(batch["uri"]))
            displaced.add(hash64_each(uri for record in waiting for uri in record.replaced))
            resolver = _Resolver(self._gallery, self._rows, items, unlisted, displaced, self._run)
            resolver.gives_labels = figures.gives_labels
            # The resolver deletes the older rows of replaced images, unless they are those of a moved one.
            commit([replace(record, replaced=[]) for record in waiting], resolver.make_actions)
            return resolver.counts


class _Resolver:
    """Decides which rows go to which image, and makes the actions of it.

    Attributes:
        counts: What became of the images, after the actions were made.
        gives_labels: Whether an image without a label has none by the source's word.
    """

    def __init__(
        self,
        gallery: Gallery,
        rows: SourceRows,
        items: pa.Table,
        unlisted: HashTable,
        displaced: HashTable,
        run: str,
    ):
        self.counts = MoveCounts()
        self.gives_labels = True
        self._gallery = gallery
        self._rows = rows
        self._items = items
        self._unlisted = unlisted
        self._displaced = displaced
        self._run = run
        # Items in groups of one content: `_order` lists them group by group, `_starts` is where each group begins.
        contents = hash64_column(items["image_id"])
        order = np.argsort(contents, kind="stable")
        self._contents, self._starts = np.unique(contents[order], return_index=True)
        self._order = self._sort_groups(order)
        self._hidden = pa.array([], pa.string())
        # How many items of each group have their rows.
        self._given = np.zeros(len(self._contents), np.int64)

    def _sort_groups(self, order: Int64) -> Int64:
        """Order the items of one content by uri, so that the result does not depend on who read them first."""
        ends = np.append(self._starts[1:], len(order))
        for group in np.flatnonzero(ends - self._starts > 1).tolist():
            part = order[self._starts[group] : ends[group]]
            uris = self._items["uri"].take(pa.array(part))
            order[self._starts[group] : ends[group]] = part[pc.sort_indices(uris).to_numpy()]
        return order

    def make_actions(self) -> list[Action]:
        """Make the actions that give the items their rows. It may be called again for a newer table."""
        self.counts = MoveCounts()
        self._given[:] = 0
        gallery = Gallery(self._gallery.path)
        # Rows whose erasure is recorded go to nobody.
        self._hidden = HiddenWatch(gallery.path).read().uris
        rewrite = Rewrite(_KEY_COLUMNS, self._find_rows, self._change_rows)
        actions = list(rewrite_files(gallery, rewrite))
        sizes = np.diff(np.append(self._starts, len(self._order)))
        left = np.flatnonzero(self._given < sizes)
        if len(left):
            actions += self._copy_rows(gallery, left, sizes)
        return actions

    # ---- rows that are given up

    def _find_rows(self, rows: pa.Table) -> Any:
        """Find the rows of uris that have given up their content."""
        uris = hash64_column(rows["uri"])
        is_displaced = self._displaced.get(uris)[0]
        is_vanished = self._unlisted.get(uris)[0] & self._rows.contains(rows)
        is_wanted = find_sorted(self._contents, hash64_column(rows["image_id"])) >= 0
        is_hidden = pc.is_in(rows["uri"], self._hidden).to_numpy(zero_copy_only=False)
        return pa.array(is_displaced | (is_vanished & is_wanted & ~is_hidden))

    def _change_rows(self, rows: pa.Table, mask: Any) -> pa.Table:
        """Give rows to the items that hold their content now, and delete those that nobody wants."""
        is_hidden = pc.is_in(rows["uri"], self._hidden).to_numpy(zero_copy_only=False)
        item_numbers = self._assign_items(rows, np.asarray(mask) & ~is_hidden)
        is_moved = item_numbers >= 0
        uris = hash64_column(rows["uri"])
        is_deleted = self._displaced.get(uris)[0] & ~is_moved
        if is_moved.any():
            rows = self._give_rows(rows, item_numbers)
        return rows.filter(pa.array(~is_deleted))

    def _assign_items(self, rows: pa.Table, is_free: Bool) -> Int64:
        """Choose the item that each row goes to, (n,); -1 for none."""
        numbers = np.full(rows.num_rows, -1, np.int64)
        groups = find_sorted(self._contents, hash64_column(rows["image_id"]))
        uris = rows["uri"].to_pylist()
        marks = rows["missing_since"].to_pylist()
        chosen: dict[str, int] = {}
        ends = np.append(self._starts[1:], len(self._order))
        # By uri: the rows of an image go to the same item, and equal images to items in order.
        candidates = np.flatnonzero(is_free & (groups >= 0)).tolist()
        for n in sorted(candidates, key=lambda n: uris[n]):
            group = int(groups[n])
            if uris[n] not in chosen:
                at = int(self._starts[group] + self._given[group])
                if at >= ends[group]:
                    continue
                chosen[uris[n]] = int(self._order[at])
                self._given[group] += 1
                self.counts.moved += 1
                is_vanished = bool(self._unlisted.get(hash64_each([uris[n]]))[0][0])
                self.counts.vanished += is_vanished and marks[n] is None
            numbers[n] = chosen[uris[n]]
        return numbers

    def _give_rows(self, rows: pa.Table, item_numbers: Int64) -> pa.Table:
        """Give rows the values of items: uri, fingerprint, label and source."""
        is_moved = pa.array(item_numbers >= 0)
        items = self._items.take(pa.array(item_numbers, mask=item_numbers < 0))
        rows = rename_rows(rows, items["uri"].combine_chunks(), self._rows.source.name)
        fingerprints = pc.if_else(is_moved, items["fingerprint"], rows["fingerprint"])
        rows = set_column(rows, "fingerprint", fingerprints)
        rows = set_column(rows, "identity", self._choose_labels(items["identity"], rows["identity"], is_moved))
        # A file that is there is not missing.
        absent = pa.scalar(None, FACES.field("missing_since").type)
        return set_column(rows, "missing_since", pc.if_else(is_moved, absent, rows["missing_since"]))

    def _choose_labels(self, labels: Any, old_labels: Any, is_given: Any) -> Any:
        """Choose the labels of moved rows: what the source says now, if it says anything of labels."""
        if not self.gives_labels:
            labels = pc.coalesce(labels, old_labels)
        return pc.if_else(is_given, labels, old_labels)

    # ---- copies

    def _copy_rows(self, gallery: Gallery, groups: Int64, sizes: Int64) -> Iterator[Action]:
        """Write copies of rows for the items that are left, and yield the actions that add them."""
        wanted = self._contents[groups]
        pending: list[pa.Table] = []
        copied = np.zeros(len(groups), bool)
        number = 0
        with closing(HashTable()) as used_ids:
            for rows in _read_images(gallery, wanted, ["image_id", "face_id"]):
                used_ids.add(rows["face_id"].drop_null().to_numpy().astype(np.uint64))
            for images in _read_images(gallery, wanted):
                rows = images.filter(pc.invert(pc.is_in(images["uri"], self._hidden)))
                # One image of each content is the pattern of its copies.
                for content, part in _split_by_content(rows, wanted):
                    if not copied[content]:
                        pending += self._make_copies(part, int(groups[content]), sizes, used_ids)
                    copied[content] = True
                if sum(table.num_rows for table in pending) >= _COPIED_ROWS:
                    yield self._write_copies(gallery, pending, number)
                    pending = []
                    number += 1
        if pending:
            yield self._write_copies(gallery, pending, number)
        for group in groups[~copied].tolist():
            start = self._starts[group]
            left = self._order[start + self._given[group] : start + sizes[group]]
            self.counts.unresolved += self._items["uri"].take(pa.array(left)).to_pylist()

    def _make_copies(self, rows: pa.Table, group: int, sizes: Int64, used_ids: HashTable) -> Iterator[pa.Table]:
        """Make the rows of the items of a content that are left, from the rows of an image with this content."""
        pattern = rows.filter(pc.equal(rows["uri"], rows["uri"][0]))
        start = self._starts[group]
        for number in self._order[start + self._given[group] : start + sizes[group]].tolist():
            item = {name: self._items[name][number].as_py() for name in MOVED_COLUMNS}
            copy = _copy_image(pattern, item, self._rows.source.name, used_ids)
            used_ids.add(copy["face_id"].drop_null().to_numpy().astype(np.uint64))
            if not self.gives_labels and item["identity"] is None:
                copy = set_column(copy, "identity", pattern["identity"])
            self.counts.copied += 1
            self.counts.copied_rows += copy.num_rows
            self.counts.copied_faces += copy.num_rows - copy["face_id"].null_count
            yield copy

    def _write_copies(self, gallery: Gallery, tables: list[pa.Table], number: int) -> Action:
        rows = pa.concat_tables(tables)
        return write_new_rows(gallery, rows, f"{self._run}-copies-{number:06d}")


def _read_images(gallery: Gallery, contents: UInt64, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield the rows, file by file, of all images with one of some contents (sorted hashes)."""
    for file in sorted(gallery.files(), key=lambda file: (file["min.uri"] or "", file["path"])):
        rows = read_rows(gallery, file["path"], ("image_id",))
        is_wanted = find_sorted(contents, hash64_column(rows["image_id"])) >= 0
        if is_wanted.any():
            yield read_rows(gallery, file["path"], columns).filter(pa.array(is_wanted))


def _split_by_content(rows: pa.Table, contents: UInt64) -> Iterable[tuple[int, pa.Table]]:
    """Yield (position of a content, its rows)."""
    positions = find_sorted(contents, hash64_column(rows["image_id"]))
    for position in np.unique(positions).tolist():
        yield position, rows.filter(pa.array(positions == position))


def _copy_image(pattern: pa.Table, item: dict[str, Any], source: str, used_ids: HashTable) -> pa.Table:
    """Make the rows of an image from those of another one with the same content.

    Args:
        pattern: rows of the other image.
        item: values of MOVED_COLUMNS.
        source: name of the source.
        used_ids: face ids of all images with this content.
    """
    count = pattern.num_rows
    ordinals = pattern["face_index"].to_pylist()
    # The image may have the uri that another one had before it was moved, and must not get that one's ids.
    first_uri = item["uri"]
    number = 1
    face_ids = _compute_ids(first_uri, item, ordinals)
    while used_ids.get(face_ids.drop_null().to_numpy().astype(np.uint64))[0].any():
        number += 1
        first_uri = f"{item['uri']}@{number}"
        face_ids = _compute_ids(first_uri, item, ordinals)
    former = None if first_uri == item["uri"] else [first_uri]
    values: dict[str, Sequence[object] | pa.Array] = {
        "face_id": face_ids,
        "uri": [item["uri"]] * count,
        "source": [source] * count,
        "fingerprint": [item["fingerprint"]] * count,
        "identity": [item["identity"]] * count,
        "ingested_at": [datetime.now(UTC)] * count,
        "missing_since": [None] * count,
        "former_uris": [former] * count,
    }
    for name, column in values.items():
        pattern = set_column(pattern, name, column)
    return pattern


def _compute_ids(uri: str, item: dict[str, Any], ordinals: list[int | None]) -> pa.Array:
    """Compute the face ids of an image's rows; null for the row of an image without a face."""
    ids = [None if ordinal is None else compute_face_id(uri, item["image_id"], ordinal) for ordinal in ordinals]
    return pa.array(ids, pa.int64())
