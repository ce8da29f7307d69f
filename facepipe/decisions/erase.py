"""Deleting a person's decisions: rows about erased faces, rows that name an erased person, and the table's history."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.decisions.read import read_decisions
from facepipe.decisions.resolve import FaceKeys, to_ids
from facepipe.decisions.schema import IS, SCHEMA
from facepipe.decisions.table import DecisionTable, DecisionWriter, hold_decisions
from facepipe.gallery.maintenance.vacuum import delete_older_log
from facepipe.gallery.table import Gallery
from facepipe.sorted_lookup import is_in_sorted
from facepipe.sources.labels import format_label
from facepipe.storage.lease import ERASURE
from facepipe.types import Bool, Int64

_FREE_TEXTS = ("why", "who", "source")
_WORD = re.compile(r"\w+")
# The longest name or path in a free text that is looked for, in words.
_MAX_WORDS = 16


@dataclass(frozen=True)
class ErasedPerson:
    """What no decision may tell any more.

    Attributes:
        faces: sorted ids of the erased faces.
        contents: image ids that must not come back under any name.
        texts: uris and image ids, which free texts may quote.
        names: labels of the erased images that no other image has.
        meant_names: names by which the images were chosen: the person is erased, and not only some photos.
    """

    faces: Int64
    contents: frozenset[str]
    texts: frozenset[str]
    names: frozenset[str]
    meant_names: frozenset[str]


def scrub_decisions(
    gallery: str, erased: ErasedPerson, before_commit: Callable[[int], None] = lambda count: None
) -> int:
    """Delete the rows that tell of erased faces or persons, old files that held them, and the table's older log.

    In rows that stay, free texts that mention what is erased become null. It can be repeated: what is left is done.

    Args:
        gallery: path or URL of the gallery.
        erased: what is erased.
        before_commit: called with the number of rows before they go, because nobody could tell afterwards.

    Returns:
        The number of rows that were deleted.

    Raises:
        GalleryBusyError: another writer holds the table for minutes.
        StorageError: the table cannot be read or written.
    """
    if not DecisionTable(gallery).exists:
        return 0
    with hold_decisions(gallery, ERASURE) as writer:
        removed = _rewrite(writer, erased, before_commit)
        # Files that a writer left when it was killed may hold rows as well.
        writer.delete_unreferenced()
        delete_older_log(writer.table.folder, writer.lease)
    return removed


def _rewrite(writer: DecisionWriter, erased: ErasedPerson, before_commit: Callable[[int], None]) -> int:
    """Write the files anew that hold erased rows."""
    names = _choose_names(writer.table, erased)
    texts = erased.texts | names
    removed = 0
    old_paths = []
    kept_rows = [SCHEMA.empty_table()]
    for file in writer.table.files:
        rows = writer.table.read_file(file.path)
        is_erased = _mark_erased(rows, erased, names)
        kept = _clear_texts(rows.filter(pa.array(~is_erased)), texts)
        if is_erased.any() or not kept.equals(rows):
            old_paths.append(file.path)
            kept_rows.append(kept)
            removed += int(is_erased.sum())
    before_commit(removed)
    if old_paths:
        writer.commit(pa.concat_tables(kept_rows), old_paths, "DELETE")
    return removed


def _choose_names(table: DecisionTable, erased: ErasedPerson) -> frozenset[str]:
    """Choose the names that go. One that was not meant stays while people say it of a face that stays."""
    if not erased.names - erased.meant_names:
        return erased.meant_names
    in_use: set[str] = set()
    for file in table.files:
        rows = table.read_file(file.path)
        is_named = np.asarray(pc.equal(rows["decision"], IS).to_numpy(), bool)
        stays = rows.filter(pa.array(is_named & ~_mark_faces(rows, erased)))
        in_use.update(stays["person"].drop_null().to_pylist())
    return erased.meant_names | (erased.names - in_use)


def _mark_faces(rows: pa.Table, erased: ErasedPerson) -> Bool:
    """Mark rows (n,) about erased faces or images."""
    mask = np.zeros(rows.num_rows, bool)
    contents = pa.array(sorted(erased.contents), pa.string())
    for prefix in ("", "other_"):
        mask |= is_in_sorted(erased.faces, to_ids(rows[f"{prefix}face_id"]))
        mask |= np.asarray(pc.is_in(rows[f"{prefix}image_id"], value_set=contents).to_numpy(), bool)
    return mask


def _mark_erased(rows: pa.Table, erased: ErasedPerson, names: frozenset[str]) -> Bool:
    mask = _mark_faces(rows, erased)
    values = pa.array(sorted(names), pa.string())
    for column in ("person", "other_person"):
        mask |= np.asarray(pc.is_in(rows[column], value_set=values).to_numpy(), bool)
    return mask


def _clear_texts(rows: pa.Table, texts: frozenset[str]) -> pa.Table:
    """Empty free texts that mention one of some texts, word by word."""
    plain = frozenset(map(_trim, texts)) - {""}
    for name in _FREE_TEXTS:
        distinct = pc.unique(rows[name]).drop_null()
        telling = [text for text in distinct.to_pylist() if _mentions(text, plain)]
        if telling:
            is_telling = pc.is_in(rows[name], value_set=pa.array(telling, pa.string()))
            at = rows.column_names.index(name)
            rows = rows.set_column(at, rows.schema.field(name), pc.if_else(is_telling, None, rows[name]))
    return rows


def _trim(text: str) -> str:
    """Strip what is no letter or digit from the ends, in lower case."""
    return re.sub(r"^\W+|\W+$", "", text).lower()


def _mentions(text: str, texts: frozenset[str]) -> bool:
    lower = text.lower()
    spans = [match.span() for match in _WORD.finditer(lower)]
    for at, (start, _) in enumerate(spans):
        for _, end in spans[at : at + _MAX_WORDS]:
            if lower[start:end] in texts:
                return True
    return False


def find_former_ids(gallery: Gallery, uris: pa.Array) -> Int64:
    """Find ids under which decisions know faces of images, and the gallery does not: images were embedded anew.

    Args:
        gallery: the gallery, which still holds the images.
        uris: uris of the images.

    Returns:
        Sorted face ids. Those of an image that lies at other uris as well are not among them.
    """
    table = DecisionTable(gallery.path)
    rows = table.read() if table.exists else SCHEMA.empty_table()
    ids = []
    for prefix in ("", "other_"):
        keys = FaceKeys.from_rows(rows, prefix)
        contents = pc.unique(keys.image_id.drop_null())
        if not len(contents):
            continue
        faces = _read_all_faces(gallery, contents)
        is_erased = pc.is_in(faces["uri"], value_set=uris)
        staying = pc.unique(faces["image_id"].filter(pc.invert(is_erased)))
        going = pc.unique(faces["image_id"].filter(is_erased))
        only_going = going.filter(pc.invert(pc.is_in(going, value_set=staying)))
        is_former = np.asarray(pc.is_in(keys.image_id, value_set=only_going).to_numpy(zero_copy_only=False), bool)
        ids.append(keys.face_id[is_former])
    return np.unique(np.concatenate(ids)) if ids else np.empty(0, np.int64)


def _read_all_faces(gallery: Gallery, contents: pa.Array) -> pa.Table:
    """Read image_id and uri of all faces of images, those that are being erased included."""
    condition = pc.field("image_id").isin(contents)
    batches = list(gallery.batches(["image_id", "uri"], condition, with_hidden=True))
    return pa.Table.from_batches(batches, pa.schema([("image_id", pa.string()), ("uri", pa.string())]))


def find_lost_names(gallery: str, faces: Int64) -> frozenset[str]:
    """Find the names that people gave to some faces and to no others.

    Args:
        gallery: path or URL of the gallery.
        faces: sorted ids of the faces.
    """
    table = DecisionTable(gallery)
    if not table.exists:
        return frozenset()
    lost: set[str] = set()
    in_use: set[str] = set()
    for file in table.files:
        rows = table.read_file(file.path)
        rows = rows.filter(pc.equal(rows["decision"], IS))
        is_lost = is_in_sorted(faces, to_ids(rows["face_id"]))
        lost.update(rows["person"].filter(pa.array(is_lost)).to_pylist())
        in_use.update(rows["person"].filter(pa.array(~is_lost)).to_pylist())
    return frozenset(name for name in lost - in_use if name is not None)


def find_confirmed_faces(gallery: Gallery, names: Iterable[str]) -> Int64:
    """Find the faces that people say are one of some persons, whatever the label: sorted ids."""
    wanted = sorted({label for label in map(format_label, names) if label is not None})
    if not wanted or not DecisionTable(gallery.path).exists:
        return np.empty(0, np.int64)
    confirmed = read_decisions(gallery).confirmed
    is_wanted = np.asarray(pc.is_in(confirmed.person, value_set=pa.array(wanted)).to_numpy(zero_copy_only=False), bool)
    return np.unique(confirmed.face_id[is_wanted])


def scrub_names(gallery: Gallery, names: Iterable[str]) -> int:
    """Delete the decisions that name persons of whom the gallery has no image.

    Args:
        gallery: the gallery.
        names: names of the persons; those that are the label of an image are left alone.

    Returns:
        The number of rows that were deleted.
    """
    if not DecisionTable(gallery.path).exists:
        return 0
    wanted = {label for label in map(format_label, names) if label is not None}
    has_name = pc.field("identity").isin(pa.array(sorted(wanted), pa.string()))
    for batch in gallery.batches(["identity"], has_name):
        wanted -= set(batch["identity"].to_pylist())
    if not wanted:
        return 0
    nothing: frozenset[str] = frozenset()
    person = ErasedPerson(np.empty(0, np.int64), nothing, nothing, nothing, frozenset(wanted))
    return scrub_decisions(gallery.path, person)
