"""What is to be erased: whole images, chosen by one or several conditions that must all hold."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe.arrow import to_vectors
from facepipe.errors import ConfigError, StorageError
from facepipe.gallery.table import Gallery
from facepipe.schema import EMBEDDING_DIM
from facepipe.types import Float32, UInt64

_DIGEST = re.compile(r"[0-9a-f]{32}")
_ROWS = 65536
_OLDEST = 36500.0  # days


@dataclass(frozen=True)
class Selection:
    """Conditions on images; those that are given must all hold, and one at least must be given.

    images: uris, or image ids (32 hex digits); identities: labels; source: name of a corpus; uri: a glob pattern (* ?
    [abc] [!abc]), in which * stands for slashes as well; older_than_days: since the image was embedded; ids: face ids
    or image ids; missing: only images that their source lists no more.
    An image goes with all its faces: it could not come back with some of them only. One chosen by what it is or whom it
    shows (images, identities, ids) goes with its exact copies under other names.
    """

    images: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    source: str | None = None
    uri: str | None = None
    older_than_days: float | None = None
    ids: tuple[str, ...] = ()
    missing: bool = False

    def list_conditions(self) -> list[str]:
        """Names of the conditions that are given; their values may be personal data."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]

    @property
    def is_personal(self) -> bool:
        """Whether images are meant for what they show, and not for where they lie or how old they are."""
        return bool(self.images or self.identities or self.ids)

    def build_filter(self, now: datetime) -> ds.Expression:
        """As a filter on the table, `now` being the time that ages are counted from."""
        try:
            found = list(self._build_conditions(now))
        except UnicodeEncodeError as error:
            raise ConfigError(f"{error.object!r} is no UTF-8 text, and so no label or uri of a gallery") from error
        if not found:
            raise ConfigError(
                "say what to erase: --image, --identity, --source, --uri, --older-than, --ids or --missing"
            )
        whole = found[0]
        for part in found[1:]:
            whole = whole & part
        return whole

    def _build_conditions(self, now: datetime) -> Iterator[ds.Expression]:
        if self.images:
            yield _match_any("image_id", "uri", self.images)
        if self.identities:
            yield ds.field("identity").isin(pa.array(self.identities, pa.string()))
        if self.source is not None:
            yield ds.field("source") == pa.scalar(self.source, pa.string())
        if self.older_than_days is not None:
            if not 0 <= self.older_than_days <= _OLDEST:
                raise ConfigError(f"an age of {self.older_than_days:g} days: give 0 to {_OLDEST:g}")
            before = pa.scalar(now - timedelta(days=self.older_than_days), pa.timestamp("us", "UTC"))
            yield ds.field("ingested_at") < before
        if self.ids:
            yield _match_ids(self.ids)
        if self.missing:
            yield ds.field("missing_since").is_valid()
        if self.uri is not None:
            self.uri.encode()
            yield pc.match_substring_regex(ds.field("uri"), f"(?s)^{translate_glob(self.uri)}$")


def translate_glob(pattern: str) -> str:
    """A glob pattern in RE2's syntax; `fnmatch.translate` writes groups that RE2 does not know."""
    out, at = [], 0
    while at < len(pattern):
        sign, at = pattern[at], at + 1
        ends = pattern.find("]", at + 1 + (pattern[at : at + 1] == "!")) if sign == "[" else -1
        if ends >= 0:
            out.append(_translate_brackets(pattern[at:ends]))
            at = ends + 1
        else:
            out.append({"*": ".*", "?": "."}.get(sign) or _escape_character(sign))
    return "".join(out)


def _translate_brackets(inside: str) -> str:
    """What stands between brackets: characters and ranges; a ! before them for all others."""
    others, inside = inside[0] == "!", inside.removeprefix("!")
    parts, at = [], 0
    while at < len(inside):
        low, high = inside[at], inside[at + 2] if inside[at + 1 : at + 2] == "-" and at + 2 < len(inside) else ""
        at += 3 if high else 1
        if not high or low <= high:
            parts.append(f"{_escape_character(low)}-{_escape_character(high)}" if high else _escape_character(low))
    if not parts:  # of empty ranges only
        return "." if others else r"[^\x{0}-\x{10ffff}]"
    return f"[{'^' if others else ''}{''.join(parts)}]"


def _escape_character(sign: str) -> str:
    return rf"\x{{{ord(sign):x}}}" if not sign.isalnum() else sign


def _match_any(digests: str, names: str, values: tuple[str, ...]) -> ds.Expression:
    hexes = [value for value in values if _DIGEST.fullmatch(value)]
    return ds.field(digests).isin(pa.array(hexes, pa.string())) | ds.field(names).isin(pa.array(values, pa.string()))


def _match_ids(values: tuple[str, ...]) -> ds.Expression:
    wrong = [value for value in values if not (value.isdecimal() or _DIGEST.fullmatch(value))]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is neither a face id nor an image id (32 hex digits)")
    images = [value for value in values if _DIGEST.fullmatch(value)]
    faces = [int(value) for value in values if value.isdecimal() and int(value) < 1 << 63]
    by_face = ds.field("face_id").isin(pa.array(faces, pa.int64()))
    return by_face | ds.field("image_id").isin(pa.array(images, pa.string()))


@dataclass(frozen=True)
class SelectedImages:
    """The images that a selection means in a version of the table.

    contents: image ids that must not come back under any name; faces: ids of all their faces; names: their labels;
    marks: uint64 `compute_marks` their vectors.
    """

    version: int
    uris: pa.Array
    contents: pa.Array
    faces: pa.Array
    names: pa.Array
    marks: pa.Array
    rows: int

    @property
    def images(self) -> int:
        """How many."""
        return len(self.uris)


def select_images(gallery: Gallery, selection: Selection, now: datetime | None = None) -> SelectedImages:
    """Find the images, and then all rows of them. Memory grows with what is erased, not with the gallery."""
    try:
        return _select_images(gallery, selection.build_filter(now or datetime.now(UTC)), selection.is_personal)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read the table of {gallery.path!r}: {str(error).splitlines()[0]}") from error


def _select_images(gallery: Gallery, where: ds.Expression, personal: bool) -> SelectedImages:
    uris = _collect_unique(gallery.batches(["uri"], where, rows=_ROWS), "uri", pa.string())
    if not len(uris):
        nothing = pa.array([], pa.string())
        return SelectedImages(
            gallery.version, uris, nothing, pa.array([], pa.int64()), nothing, pa.array([], pa.uint64()), 0
        )
    contents = pa.array([], pa.string())
    if personal:
        of_these = gallery.batches(["image_id"], ds.field("uri").isin(uris), rows=_ROWS)
        contents = _collect_unique(of_these, "image_id", pa.string()).drop_null()
        copies = _collect_unique(
            gallery.batches(["uri"], ds.field("image_id").isin(contents), rows=_ROWS), "uri", pa.string()
        )
        uris = pc.unique(pa.concat_arrays([uris, copies]))
    faces, marks, names, rows = [pa.array([], pa.int64())], [np.empty(0, np.uint64)], set[str](), 0
    for batch in gallery.batches(["face_id", "identity", "embedding"], ds.field("uri").isin(uris), rows=_ROWS):
        rows += batch.num_rows
        faces.append(batch["face_id"].drop_null())
        names.update(name for name in batch["identity"].to_pylist() if name)
        marks.append(compute_marks(to_vectors(pa.chunked_array([batch["embedding"].drop_null()]), EMBEDDING_DIM)))
    labels = pa.array(sorted(names), pa.string())
    return SelectedImages(
        gallery.version, uris, contents, pa.concat_arrays(faces), labels, pa.array(np.concatenate(marks)), rows
    )


def compute_marks(values: Float32) -> UInt64:
    """(n,) the first two numbers of vectors (n, d) as 64 bits: equal for equal vectors, and hardly ever for others."""
    return np.ascontiguousarray(values[:, :2], "<f4").view("<u8")[:, 0]


def _collect_unique(batches: Iterator[pa.RecordBatch], name: str, kind: pa.DataType) -> pa.Array:
    return pc.unique(pa.concat_arrays([pa.array([], kind), *(pc.unique(batch[name]).cast(kind) for batch in batches)]))


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
