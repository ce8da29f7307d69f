"""Selecting what to erase: whole images that meet one or several conditions."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe.errors import ConfigError, StorageError
from facepipe.gallery.near_names import describe_near, find_near_images, find_near_labels, find_near_sources
from facepipe.gallery.table import Gallery
from facepipe.hashing import hash64
from facepipe.schema import FACES
from facepipe.sources.item import escape_name, make_file_uri
from facepipe.sources.labels import format_label, list_label_forms
from facepipe.sources.place import match_places
from facepipe.text import escape_undecodable
from facepipe.types import Float32, UInt64

# An image id: the first 32 hex digits of a hash.
_DIGEST = re.compile(r"[0-9a-f]{32}")
_BATCH_ROWS = 65536
# A hundred years; much larger ages overflow dates.
_MAX_AGE_DAYS = 36500.0


@dataclass(frozen=True)
class Selection:
    """Conditions on images. All that are set must hold, and at least one must be set.

    An image is erased with all its faces, because it could not be embedded again with some of them only. An image that
    is selected for what it shows (`images`, `identities`, `ids`) is erased with its exact copies under other names.

    Attributes:
        images: uris, or image ids (32 hex digits).
        identities: labels.
        source: name of a corpus.
        below: folders, prefixes or files: only images in one of them.
        uri: a glob pattern (* ? [abc] [!abc]), in which * also matches slashes.
        older_than_days: minimum age in days since the image was embedded.
        ids: face ids or image ids.
        missing: only images that their source no longer lists.
        confirmed: ids of faces that people say are one of `identities`, whatever their label.
    """

    images: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    source: str | None = None
    below: tuple[str, ...] = ()
    uri: str | None = None
    older_than_days: float | None = None
    ids: tuple[str, ...] = ()
    missing: bool = False
    confirmed: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the conditions for JSON."""
        values = asdict(self)
        # An older facepipe, which may be running, does not know it.
        if not self.confirmed:
            del values["confirmed"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Selection":
        """Make a selection from what `to_dict` returned, also if it has been JSON since."""
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**settings)

    def list_conditions(self) -> list[str]:
        """List the names of the conditions that are set. Their values may be personal data."""
        # Confirmed faces are no condition of their own.
        names = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        return [name for name in names if name != "confirmed"]

    @property
    def is_personal(self) -> bool:
        """Whether images are selected for what they show, rather than for their place or age."""
        return bool(self.images or self.identities or self.ids)

    @property
    def means_later_images(self) -> bool:
        """Whether images that come in after the erasure was recorded can be meant.

        Not by their age: if they look old, the clock of the machine that embedded them is wrong. Nor because a listing
        has missed them since: nobody has seen their number.
        """
        return self.older_than_days is None and not self.missing

    def build_filter(self, now: datetime, *, has_exact_text: bool = True) -> ds.Expression:
        """Build a filter on the table.

        Args:
            now: the time from which ages are counted.
            has_exact_text: whether all labels of the table are in normal form. If not, every label is normalised and
                compared, which reads the whole column.

        Raises:
            ConfigError: no condition is set, or one has an invalid value.
        """
        conditions = list(self._build_conditions(now, has_exact_text=has_exact_text))
        if not conditions:
            raise ConfigError(
                "say what to erase: --image, --identity, --source, --uri, --older-than, --ids or --missing"
            )
        # All conditions must hold.
        combined = conditions[0]
        for condition in conditions[1:]:
            combined = combined & condition
        return combined

    def _build_conditions(self, now: datetime, *, has_exact_text: bool) -> Iterator[ds.Expression]:
        if self.images:
            # Each condition that is set becomes one expression.
            yield _match_images(self.images)
        if self.identities:
            has_label = _match_labels(self.identities, has_exact_text=has_exact_text)
            is_confirmed = ds.field("face_id").isin(pa.array(self.confirmed, pa.int64()))
            yield has_label | is_confirmed if self.confirmed else has_label
        if self.source is not None:
            yield ds.field("source") == pa.scalar(escape_undecodable(self.source), pa.string())
        if self.below:
            yield match_places(self.below)
        if self.older_than_days is not None:
            if not 0 <= self.older_than_days <= _MAX_AGE_DAYS:
                raise ConfigError(f"invalid age {self.older_than_days:g}: give 0 to {_MAX_AGE_DAYS:g} days")
            latest = pa.scalar(now - timedelta(days=self.older_than_days), pa.timestamp("us", "UTC"))
            yield ds.field("ingested_at") < latest
        if self.ids:
            yield _match_ids(self.ids)
        if self.missing:
            yield ds.field("missing_since").is_valid()
        if self.uri is not None:
            yield pc.match_substring_regex(ds.field("uri"), f"(?s)^{translate_glob(_escape_glob(self.uri))}$")


def read_time() -> datetime:
    """Read the time from which ages are counted."""
    return datetime.now(UTC)


def translate_glob(pattern: str) -> str:
    """Translate a glob pattern to RE2's syntax; `fnmatch.translate` writes groups that RE2 does not know."""
    # Translate wildcard by wildcard, and sets in brackets as a whole.
    parts = []
    position = 0
    while position < len(pattern):
        character = pattern[position]
        position += 1
        # A bracket closes at the next ], unless that is its first character.
        end = -1
        if character == "[":
            is_negated = pattern[position : position + 1] == "!"
            end = pattern.find("]", position + 1 + is_negated)
        if end >= 0:
            parts.append(_translate_brackets(pattern[position:end]))
            position = end + 1
        else:
            parts.append({"*": ".*", "?": "."}.get(character) or _escape_character(character))
    return "".join(parts)


def _translate_brackets(inside: str) -> str:
    """Translate what stands between brackets: characters and ranges; a ! in front negates them."""
    is_negated = inside[0] == "!"
    inside = inside.removeprefix("!")
    parts = []
    position = 0
    # Take a range of three characters, or one character, at a time.
    while position < len(inside):
        low = inside[position]
        is_range = inside[position + 1 : position + 2] == "-" and position + 2 < len(inside)
        if not is_range:
            parts.append(_escape_character(low))
            position += 1
            continue
        high = inside[position + 2]
        # A range that runs backwards is empty and matches nothing.
        if low <= high:
            parts.append(f"{_escape_character(low)}-{_escape_character(high)}")
        position += 3
    if not parts:  # only empty ranges
        return "." if is_negated else r"[^\x{0}-\x{10ffff}]"
    return f"[{'^' if is_negated else ''}{''.join(parts)}]"


def _escape_character(character: str) -> str:
    # Every character that might have a meaning is written as its code.
    return character if character.isalnum() else rf"\x{{{ord(character):x}}}"


def _escape_glob(pattern: str) -> str:
    """Return a pattern for the uris of files whose paths are not UTF-8; any other pattern stays as it is."""
    if pattern == escape_undecodable(pattern):
        return pattern
    return "file://" + quote(os.fsencode(pattern), safe="/*?[]!-")


def _match_images(values: tuple[str, ...]) -> ds.Expression:
    """Build a filter on values that are uris, or image ids if they look like one."""
    # A value that looks like a digest may be the name of a file as well.
    digests = [value for value in values if _DIGEST.fullmatch(value)]
    uris = [uri for value in values for uri in _list_uris(value)]
    by_digest = ds.field("image_id").isin(pa.array(digests, pa.string()))
    return by_digest | ds.field("uri").isin(pa.array(uris, pa.string()))


def _list_uris(text: str) -> Iterator[str]:
    """Yield the uris that a text may mean: itself, or those of a file or a member whose name is not UTF-8."""
    if text == escape_undecodable(text):
        yield text
        return
    yield make_file_uri(text)
    for mark in re.finditer("#", text):
        yield f"{make_file_uri(text[: mark.start()])}#{escape_name(text[mark.end() :])}"


def _match_labels(labels: tuple[str, ...], *, has_exact_text: bool) -> ds.Expression:
    """Build a filter on labels, in whatever form they are written."""
    forms = [form for label in labels for form in list_label_forms(label)]
    is_any_form = ds.field("identity").isin(pa.array(forms, pa.string()))
    if has_exact_text:
        return is_any_form
    normal = pa.array([list_label_forms(label)[0] for label in labels], pa.string())
    return is_any_form | pc.utf8_normalize(ds.field("identity"), "NFC").isin(normal)


def _match_ids(values: tuple[str, ...]) -> ds.Expression:
    """Build a filter on face ids and image ids."""
    # Refuse what cannot be an id: it would select nothing without a word.
    invalid = [value for value in values if not (value.isdecimal() or _DIGEST.fullmatch(value))]
    if invalid:
        raise ConfigError(f"{invalid[0]!r} is neither a face id nor an image id (32 hex digits)")
    images = [value for value in values if _DIGEST.fullmatch(value)]
    # Larger numbers fit no column, so no face can have them.
    faces = [int(value) for value in values if value.isdecimal() and int(value) < 1 << 63]
    by_face = ds.field("face_id").isin(pa.array(faces, pa.int64()))
    return by_face | ds.field("image_id").isin(pa.array(images, pa.string()))


@dataclass(frozen=True)
class SelectedImages:
    """The images that a selection means in a version of the table.

    Attributes:
        version: the version of the table.
        uris: uris of the images.
        contents: image ids that must stay out under any name.
        faces: ids of all their faces.
        names: their labels.
        marks: marks of the vectors, uint64 (`compute_marks`).
        rows: number of rows.
        former_uris: uris that the images had before they were moved; other images may have them now.
        copies: number of images that were not selected themselves, but are exact copies of those that were.
        others: number of faces that were not meant: other faces in the photos of a person. 0 unless people or faces
            were selected.
    """

    version: int
    uris: pa.Array
    contents: pa.Array
    faces: pa.Array
    names: pa.Array
    marks: pa.Array
    rows: int
    former_uris: pa.Array
    copies: int = 0
    others: int = 0

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.uris)


def select_images(gallery: Gallery, selection: Selection, now: datetime | None = None) -> SelectedImages:
    """Find the images that a selection means, and all their rows. Images that are being erased already are left out.

    Memory grows with what is selected, not with the gallery.

    Args:
        gallery: the gallery.
        selection: the conditions.
        now: the time from which ages are counted; the current time by default.

    Raises:
        ConfigError: the selection is empty or invalid.
        StorageError: the table cannot be read.
    """
    condition = selection.build_filter(now or read_time(), has_exact_text=gallery.has_exact_text)
    meant = _MeantFaces(selection)
    selected = _map_errors(
        gallery, lambda: _select_images(gallery, condition, meant, is_personal=selection.is_personal)
    )
    return replace(selected, others=meant.count_others())


def select_again(
    gallery: Gallery, selection: Selection | None, now: datetime | None, old: SelectedImages
) -> SelectedImages:
    """Find the images of a recorded erasure in a newer version of the table.

    Args:
        gallery: the gallery.
        selection: the conditions; None if they are not known.
        now: the time from which ages are counted: when the erasure was recorded.
        old: what was selected before. Nothing of it is left out, even if the table no longer holds it.
    """
    condition = ds.field("uri").isin(old.uris) | ds.field("image_id").isin(old.contents)
    if selection is not None and selection.means_later_images:
        condition |= selection.build_filter(now or read_time(), has_exact_text=gallery.has_exact_text)
    is_personal = selection is not None and selection.is_personal
    new = _map_errors(gallery, lambda: _select_images(gallery, condition, is_personal=is_personal, with_hidden=True))
    return unite_images(old, new)


def select_uris(gallery: Gallery, uris: pa.Array, contents: pa.Array) -> SelectedImages:
    """Describe images that are known by their uris.

    Args:
        gallery: the gallery.
        uris: uris of the images. The table may lack some of them.
        contents: image ids that must stay out under any name.
    """
    return _map_errors(gallery, lambda: _describe_images(gallery, uris, contents, with_hidden=False))


def unite_images(old: SelectedImages, new: SelectedImages) -> SelectedImages:
    """Unite two selections of images, of which the newer one knows the table better."""
    arrays = {
        name: pc.unique(pa.concat_arrays([getattr(old, name), getattr(new, name)]))
        for name in ("uris", "contents", "faces", "names", "marks", "former_uris")
    }
    return SelectedImages(version=new.version, rows=max(old.rows, new.rows), **arrays)


def select_rows(rows: pa.Table, *, is_personal: bool) -> SelectedImages:
    """Describe images by rows that are not in the table and will not be.

    Args:
        rows: all rows of the images, with the columns face_id, image_id, uri, identity and embedding.
        is_personal: whether exact copies are meant as well.
    """

    def collect(column: str) -> pa.Array:
        return pc.unique(rows[column].combine_chunks()).drop_null()

    return SelectedImages(
        version=-1,
        uris=collect("uri"),
        contents=collect("image_id") if is_personal else pa.array([], pa.string()),
        faces=collect("face_id"),
        names=collect("identity"),
        marks=pa.array(np.unique(_compute_row_marks(rows["embedding"]))),
        rows=0,
        former_uris=pa.array([], pa.string()),
    )


class _MeantFaces:
    """Counts the faces of selected photos that were not meant themselves.

    A label counts for one face of each photo, because a source labels photos. Of an exact copy one face is meant too.
    """

    def __init__(self, selection: Selection):
        self._chosen = _list_face_ids(selection.ids) | set(selection.confirmed)
        self._labels = {form for label in selection.identities for form in list_label_forms(label)}
        self._meant: set[int] = set()
        self._photos: set[int] = set()
        self._faces = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Count rows of selected photos."""
        if not (self._chosen or self._labels):
            return
        for row in batch.select(["uri", "identity", "face_id"]).to_pylist():
            if row["face_id"] is None:
                continue
            self._faces += 1
            self._photos.add(hash64(row["uri"]))
            if row["face_id"] in self._chosen:
                self._meant.add(row["face_id"])
            elif row["identity"] in self._labels:
                self._meant.add(hash64(row["uri"], row["identity"]))

    def count_others(self) -> int:
        """Count the faces that were not meant. Each photo was selected for one face at least."""
        return self._faces - max(len(self._meant), len(self._photos))


def _list_face_ids(ids: tuple[str, ...]) -> set[int]:
    """List those of some ids that are ids of faces."""
    return {int(value) for value in ids if value.isdecimal() and int(value) < 1 << 63}


def _map_errors(gallery: Gallery, select: Callable[[], SelectedImages]) -> SelectedImages:
    try:
        return select()
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read the table of {gallery.path!r}: {str(error).splitlines()[0]}") from error


def _select_images(
    gallery: Gallery,
    condition: ds.Expression,
    meant: _MeantFaces | None = None,
    *,
    is_personal: bool,
    with_hidden: bool = False,
) -> SelectedImages:
    def read(column: str, where: ds.Expression) -> pa.Array:
        batches = gallery.batches([column], where, rows=_BATCH_ROWS, with_hidden=with_hidden)
        return _collect_unique(batches, column, FACES.field(column).type)

    uris = read("uri", condition)
    selected_count = len(uris)
    contents = pa.array([], pa.string())
    # Add exact copies under other names.
    if is_personal and len(uris):
        contents = read("image_id", ds.field("uri").isin(uris)).drop_null()
        copies = read("uri", ds.field("image_id").isin(contents))
        uris = pc.unique(pa.concat_arrays([uris, copies]))
    described = _describe_images(gallery, uris, contents, meant, with_hidden=with_hidden)
    return replace(described, copies=len(uris) - selected_count)


def _describe_images(
    gallery: Gallery, uris: pa.Array, contents: pa.Array, meant: _MeantFaces | None = None, *, with_hidden: bool
) -> SelectedImages:
    """Collect what all rows of some images hold, and count the faces that were not meant."""
    faces = [pa.array([], pa.int64())]
    marks = [np.empty(0, np.uint64)]
    names: set[str] = set()
    former_uris = [pa.array([], pa.string())]
    rows = 0
    if len(uris):
        columns = ["face_id", "identity", "embedding", "former_uris", *(["uri"] if meant else [])]
        is_selected = ds.field("uri").isin(uris)
        for batch in gallery.batches(columns, is_selected, rows=_BATCH_ROWS, with_hidden=with_hidden):
            rows += batch.num_rows
            if meant:
                meant.add(batch)
            faces.append(batch["face_id"].drop_null())
            names.update(name for name in batch["identity"].to_pylist() if name)
            former_uris.append(pc.unique(batch["former_uris"].flatten()))
            marks.append(_compute_row_marks(batch["embedding"]))
    return SelectedImages(
        version=gallery.version,
        uris=uris,
        contents=contents,
        faces=pa.concat_arrays(faces),
        names=pa.array(sorted(names), pa.string()),
        marks=pa.array(np.concatenate(marks)),
        rows=rows,
        former_uris=pc.unique(pa.concat_arrays(former_uris)),
    )


def compute_marks(vectors: Float32) -> UInt64:
    """Compute marks of vectors: their first two numbers as 64 bits.

    Equal vectors have equal marks; others hardly ever do.

    Args:
        vectors: (n, d), d >= 2.

    Returns:
        (n,) uint64.
    """
    return np.ascontiguousarray(vectors[:, :2], "<f4").view("<u8")[:, 0]


def _compute_row_marks(column: pa.Array | pa.ChunkedArray) -> UInt64:
    """Compute marks of the lists of numbers in a column, which may be of any length; none for a null."""
    embeddings = column.drop_null()
    firsts = [pc.list_element(embeddings, place).to_numpy(zero_copy_only=False) for place in (0, 1)]
    return compute_marks(np.stack(firsts, axis=1)) if len(embeddings) else np.empty(0, np.uint64)


def _collect_unique(batches: Iterator[pa.RecordBatch], name: str, kind: pa.DataType) -> pa.Array:
    """Collect the distinct values of a column."""
    parts = [pc.unique(batch[name]).cast(kind) for batch in batches]
    return pc.unique(pa.concat_arrays([pa.array([], kind), *parts]))


def read_ids(path: str) -> tuple[str, ...]:
    """Read face ids and image ids from a text file, one per line.

    Raises:
        ConfigError: if the file cannot be read as UTF-8, or holds no id.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            ids = tuple(line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the ids in {path!r}: {error}") from error
    if not ids:
        raise ConfigError(f"{path!r} holds no id: write one face id or image id per line")
    return ids


def explain_unmatched(gallery: Gallery, selection: Selection, *, is_empty: bool) -> list[str]:
    """Explain which names in a selection match nothing on their own, with the nearest names that the gallery holds.

    Args:
        gallery: the gallery.
        selection: the conditions.
        is_empty: whether no image meets all of them.

    Returns:
        A sentence per name that matches nothing. Of a selection that is empty although each name matches something, or
        that has no names, one sentence; none if it is a rule by age or by what is missing, of which nothing may be due.
    """
    sentences = []
    for label in _list_unmatched_labels(gallery, selection.identities, is_empty=is_empty):
        near = describe_near(find_near_labels(gallery, format_label(label) or label))
        sentences.append(f"no image has the identity {label!r}{near}")
    for image in _list_unmatched_images(gallery, selection.images, is_empty=is_empty):
        near = describe_near([] if _DIGEST.fullmatch(image) else find_near_images(gallery, image))
        sentences.append(f"there is no image {image!r}{near}")
    unmatched_ids = _list_unmatched_ids(gallery, selection.ids, is_empty=is_empty)
    sentences += [f"there is no face or image with the id {value!r}" for value in unmatched_ids]
    if not is_empty:
        return sentences
    source = selection.source
    if source is not None and not _has_match(gallery, Selection(source=source)):
        near = describe_near(find_near_sources(gallery, source))
        sentences.append(f"there is no source {source!r}{near}")
    if selection.uri is not None and not _has_match(gallery, Selection(uri=selection.uri)):
        near = describe_near(find_near_images(gallery, selection.uri))
        sentences.append(f"no uri matches {selection.uri!r}{near}")
    # A rule is run every night, and on most nights nothing is due.
    is_rule = selection.older_than_days is not None or selection.missing
    if not sentences and not is_rule:
        conditions = " and ".join(name.replace("_", " ") for name in selection.list_conditions())
        sentences.append(f"no image meets the conditions: {conditions}")
    return sentences


def _has_match(gallery: Gallery, selection: Selection) -> bool:
    """Tell whether a selection without an age means any image."""
    condition = selection.build_filter(read_time(), has_exact_text=gallery.has_exact_text)
    return any(batch.num_rows for batch in gallery.batches(["uri"], condition))


def _list_unmatched_labels(gallery: Gallery, labels: tuple[str, ...], *, is_empty: bool) -> list[str]:
    # If images are selected by one name, that name matches.
    if not labels or (len(labels) == 1 and not is_empty):
        return []
    condition = _match_labels(labels, has_exact_text=gallery.has_exact_text)
    present = _collect_unique(gallery.batches(["identity"], condition), "identity", pa.string()).to_pylist()
    # An older table may hold any form of a label.
    matched = {form for label in present for form in [label, *list_label_forms(label)]}
    return [label for label in labels if matched.isdisjoint(list_label_forms(label))]


def _list_unmatched_images(gallery: Gallery, images: tuple[str, ...], *, is_empty: bool) -> list[str]:
    if not images or (len(images) == 1 and not is_empty):
        return []
    matched: set[str] = set()
    for batch in gallery.batches(["uri", "image_id"], _match_images(images)):
        matched.update(batch["uri"].to_pylist(), batch["image_id"].drop_null().to_pylist())
    return [image for image in images if matched.isdisjoint([image, *_list_uris(image)])]


def _list_unmatched_ids(gallery: Gallery, ids: tuple[str, ...], *, is_empty: bool) -> list[str]:
    if not ids or (len(ids) == 1 and not is_empty):
        return []
    matched: set[str] = set()
    for batch in gallery.batches(["face_id", "image_id"], _match_ids(ids)):
        matched.update(map(str, batch["face_id"].drop_null().to_pylist()), batch["image_id"].drop_null().to_pylist())
    return [value for value in ids if (str(int(value)) if value.isdecimal() else value) not in matched]
