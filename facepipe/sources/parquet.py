"""Tables in: rows that name images (`uri`) or hold them (`bytes`), with an optional `identity`; Parquet or Arrow."""

import os
import posixpath
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.errors import SourceError, StorageError
from facepipe.hashing import hash64
from facepipe.sources.containers.arrow_stream import ArrowTable
from facepipe.sources.extensions import ARCHIVE_EXTENSIONS, IMAGE_EXTENSIONS, get_extension, is_foreign_url, is_web_url
from facepipe.sources.hugging_face import list_image_columns, read_class_names
from facepipe.sources.identity import Identify, IdentityRule, make_identity_rule, read_partitions
from facepipe.sources.item import WorkItem, escape_name, make_broken_item, make_file_uri, make_member_uri
from facepipe.sources.labels import find_label_column, format_label, format_labels
from facepipe.sources.selection import PassedOver, Selection
from facepipe.storage import (
    describe_error,
    get_local_fingerprint,
    get_open_fingerprint,
    has_credentials,
    is_remote,
    is_special_file,
    is_special_mode,
    list_prefix,
    open_seekable,
    raise_listing_error,
    to_absolute,
)
from facepipe.storage.redact import redact

URI_COLUMNS = ("uri", "path", "file", "image_path", "image", "url")
TABLE_ENDINGS = (".parquet", ".pq", ".arrow")
BYTES_COLUMNS = ("bytes", "image", "jpg", "content")
HOLDS_IMAGE = "it holds an image as text where the image's name should be: store images as binary"
_BATCH_ROWS = 8192
_MAX_REASON = 200  # characters
_MAX_NAME = 4096  # characters of a path
_MAX_SHORT_NAME = 1024  # characters of the name of a row
_KEPT_OF_NAME = 128
# What JPEG, PNG, GIF, WebP and BMP begin with, in base64.
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}=*\s*")


class ParquetSource:
    """Rows of a Parquet file, or of every `.parquet` file in a folder or under a prefix. Arrow files on a disk too.

    With a bytes column the item is (file, row number): workers read the bytes, the lister never does. A uri column, or
    the path beside the bytes (Hugging Face), then only names the row. Relative uris are relative to the Parquet file's
    folder, and do not lead out of it. Nothing that holds an image names one: a name is text, and short.

    Folders such as `identity=ann` are columns, as in Hive's layout. A column of classes gives their names.

    Attributes:
        path: Path or URL of the file or folder.
        name: Name of the source.
        has_labels: Whether there is a column of labels; None if no file was opened yet.
    """

    def __init__(
        self,
        path: str,
        identity: IdentityRule = "auto",
        name: str | None = None,
        *,
        label_column: str | None = None,
        selection: Selection | None = None,
    ):
        self.path = to_absolute(path)
        self.name = name or os.path.basename(path.rstrip("/"))
        self.has_labels: bool | None = None
        self._rule = identity
        self._label_column = label_column
        self._selection = selection or Selection()
        self._passed_over = PassedOver()
        self._label_note = ""

    @property
    def ignored(self) -> int:
        """Number of rows that source.include and source.exclude leave out. Every other row is an item."""
        return self._passed_over.total

    @property
    def other_folders(self) -> Collection[str]:
        """Folders beside the listed ones; none, because a list need not name all images of a folder."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the columns, and on what was left out."""
        return (*filter(None, [self._label_note]), *self._passed_over.describe())

    def __iter__(self) -> Iterator[WorkItem]:
        self._passed_over.clear()
        self._label_note = ""
        self.has_labels = None
        unlisted: list[OSError] = []
        for path in walk_parquet_files(self.path, unlisted.append):
            relative = path.removeprefix(self.path.rstrip("/") + "/")
            if reason := self._selection.reject_container(relative):
                self._passed_over.add(reason)
                continue
            try:
                if is_special_file(path):
                    raise StorageError("not a regular file")
                with open_seekable(path) as file:
                    # The fingerprint of the file that is open: another one may have its name before it is read.
                    fingerprint = get_open_fingerprint(file)
                    yield from self._list_rows(path, _open_table(path, file), fingerprint, relative)
            except (StorageError, OSError, ValueError) as error:
                # pyarrow's errors are ValueErrors and OSErrors. A SourceError passes, because it concerns every file.
                kind = "arrow" if get_extension(path) == "arrow" else "parquet"
                yield make_broken_item(path, f"{kind} cannot be read to its end: {get_first_line(error)}")
        # A folder that cannot be listed is a row: images in it must not count as gone.
        for problem in unlisted:
            yield make_broken_item(problem.filename, f"folder cannot be read: {describe_error(problem)}")

    def _list_rows(
        self, path: str, file: pq.ParquetFile | ArrowTable, fingerprint: str, relative: str
    ) -> Iterator[WorkItem]:
        """Yield one item per row of a file, whose path below the source's root is given for patterns."""
        # Pick the columns by their names.
        schema = file.schema_arrow
        bytes_column = find_bytes_column(schema)
        uri_column = find_name_column(schema, bytes_column)
        if uri_column is None and bytes_column is None:
            # A file meant to hold images, but with something else in their place, is damaged. Others may be sound.
            misused = [name for name in BYTES_COLUMNS if name in schema.names and _is_nested(schema.field(name).type)]
            if misused:
                raise ValueError(f"the column {misused[0]!r} is {schema.field(misused[0]).type}, which holds no image")
            raise SourceError(
                f"{path} has neither a uri column ({', '.join(URI_COLUMNS)}) nor a bytes column "
                f"({', '.join(BYTES_COLUMNS)}); its columns are {', '.join(schema.names)}"
            )
        labels = self._find_labels(path, schema)
        # Once per file, and not once per row.
        container = make_file_uri(path)
        encoded_path = os.fsencode(path)
        folder = os.path.dirname(path)
        # Rows are counted over all batches, because workers find an image by its row.
        row = 0
        columns = [name for name in (uri_column, labels.column) if name]
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            uris = _read_names(batch, uri_column) if uri_column else [None] * batch.num_rows
            # In Arrow an image is a range of bytes; in Parquet workers find it by its row.
            places: Sequence[tuple[int, int] | None] = [None] * batch.num_rows
            if isinstance(file, ArrowTable) and bytes_column:
                places = file.locate(batch, bytes_column)
            for name, label, place in zip(uris, labels.read(batch), places, strict=True):
                # What holds an image is no name.
                text = None if name is None else str(name)
                is_name = text is not None and not holds_image(text)
                short_name = text if text is not None and is_name else ""
                identity = labels.identify(short_name, label)
                reason = None
                if not self._selection.takes_all_files:
                    reason = self._selection.reject_file(short_name, relative)
                if reason is not None:
                    self._passed_over.add(reason)
                elif bytes_column:
                    # The row number tells apart rows with the same name, such as 1.jpg of two people.
                    uri = make_member_uri(container, f"{row}/{shorten_name(short_name)}" if is_name else str(row))
                    if isinstance(file, ArrowTable) and place is None:
                        yield WorkItem(uri, encoded_path, identity=identity, listing_error="the row holds no bytes")
                    else:
                        offset, length = place or (row, None)
                        yield WorkItem(uri, encoded_path, offset, length, f"{fingerprint}@{row}", identity)
                elif not text or not is_name:
                    problem = HOLDS_IMAGE if text else "the row names no image"
                    yield make_broken_item(path, problem, str(row))._replace(identity=identity)
                else:
                    yield make_named_item(text, folder, identity)
                row += 1

    def _find_labels(self, path: str, schema: pa.Schema) -> "_Labels":
        """Find where a file's labels are, and say so if there is no column of labels."""
        partitions = read_partitions(path)
        # A column in the file counts before a folder of the same name.
        columns = [*schema.names, *partitions]
        column = find_label_column(columns)
        if self._label_column is not None:
            by_name = {name.lower(): name for name in reversed(columns)}
            column = by_name.get(self._label_column.lower())
            if column is None:
                raise SourceError(f"{path} has no column {self._label_column!r}: its columns are {', '.join(columns)}")
        self.has_labels = column is not None or bool(self.has_labels)
        rule: IdentityRule = "label" if self._rule == "auto" else self._rule
        if column is None and rule == "label":
            problem = f"none of its columns {', '.join(columns)} is known to hold labels"
            if self._rule == "label":
                raise SourceError(f"{path} has no label: {problem}. Add --label-column NAME")
            self._label_note = self._label_note or (
                f"no image of {path} got a label: {problem}. Add --label-column NAME"
            )
        if column is None or column in schema.names:
            names = None if column is None else read_class_names(schema, column)
            return _Labels(make_identity_rule(rule), column, names)
        return _Labels(make_identity_rule(rule), None, None, format_label(partitions[column]))


@dataclass(frozen=True)
class _Labels:
    """Where the labels of a Parquet file are.

    Attributes:
        identify: Makes an identity from the name of an image and its label.
        column: The column of labels; None if there is none.
        class_names: Names of the classes whose numbers the column holds, if it does.
        constant: The label of every row, if there is no column.
    """

    identify: Identify
    column: str | None
    class_names: Sequence[str] | None = None
    constant: str | None = None

    def read(self, batch: pa.RecordBatch) -> Sequence[str | None]:
        """Read the labels of a batch."""
        if self.column is None:
            return [self.constant] * batch.num_rows
        return format_labels(batch.column(self.column), self.class_names)


def make_named_item(name: str, root: str, identity: str | None, confined: bool = False) -> WorkItem:
    """Make the item of an image that a list names. An absent image becomes a row with status read_error later.

    A relative name that leads out of the root is a row that says so.

    Args:
        name: local path or URL.
        root: folder or prefix that relative names are relative to.
        identity: label of the image.
        confined: absolute paths, URLs and symbolic links must not lead out of the root either, because the user named
            it.
    """
    # Bring the name into a local path or a URL, and refuse what must not be read.
    if name.startswith("file://"):
        name = os.fsdecode(unquote_to_bytes(os.fsencode(name.removeprefix("file://"))))
    if is_foreign_url(name) or (is_remote(name) and has_credentials(name)):
        scheme = "http(s)" if is_web_url(name) else name.partition("://")[0]
        reason = f"not read: {scheme} URLs" if is_foreign_url(name) else "the URL holds credentials"
        return make_broken_item(strip_url_secrets(name), reason)._replace(identity=identity)
    # Make the path absolute, and require that it lies inside the root.
    is_relative = not is_remote(name) and not os.path.isabs(name)
    path = f"{root or '.'}/{name}" if is_relative else name
    if not is_remote(path):
        path = os.path.abspath(path)  # without `..`, so that the file that is opened is the one the uri names
    if (is_relative or confined) and not _is_inside(path, root or ".", follow_links=confined):
        return make_broken_item(path, f"outside of the root {escape_name(root or '.')}")._replace(identity=identity)
    # A missing file gets no fingerprint: reading it later gives its row an error.
    fingerprint: str | None = None
    if not is_remote(path):
        try:
            info = os.stat(path)
        except (OSError, ValueError):
            pass
        else:
            if is_special_mode(info.st_mode):
                return make_broken_item(path, "not a regular file")._replace(identity=identity)
            fingerprint = get_local_fingerprint(info)
    return WorkItem(make_file_uri(path), os.fsencode(path), fingerprint=fingerprint, identity=identity)


def holds_image(text: str) -> bool:
    """Tell whether a text is an image itself, as a `data:` URL or in base64, or too long to name one."""
    if text.startswith("data:") or len(text) > _MAX_NAME:
        return True
    if "\t" in text:  # a line of a table that was not read as one
        return any(holds_image(field) for field in text.split("\t"))
    # No file name looks like this: base64 of an image's first bytes, and no dot in hundreds of characters.
    return text.startswith(_BASE64_STARTS) and _BASE64.fullmatch(text) is not None


def shorten_name(name: str) -> str:
    """Return a name that is no longer than the names of files may be; what is cut off becomes a hash."""
    if len(name) <= _MAX_SHORT_NAME:
        return name
    return f"{name[:_KEPT_OF_NAME]}~{hash64(name):016x}"


def strip_url_secrets(url: str) -> str:
    """Return a URL without the user before its host, and without its query, which may hold a signature."""
    scheme, _, rest = url.partition("?")[0].partition("://")
    host, slash, key = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{key}"


def _is_inside(path: str, root: str, *, follow_links: bool) -> bool:
    """Tell whether a path or URL lies below a root; with `follow_links`, also after symbolic links are followed."""
    if is_remote(root) or is_remote(path):
        scheme, _, rest = path.partition("://")
        return f"{scheme}://{posixpath.normpath(rest)}".startswith(root.rstrip("/") + "/")
    # Compare paths as they are written, and with links followed if the root confines them.
    pairs = [(path, os.path.abspath(root))]
    if follow_links:
        with suppress(OSError, ValueError):  # no file can have such a name: reading it will say so
            pairs.append((os.path.realpath(path), os.path.realpath(root)))
    return all(f"{inner}/".startswith(f"{outer.rstrip('/')}/") for inner, outer in pairs)


def get_first_line(error: BaseException) -> str:
    """Return the first line of an error's message, fit for a column."""
    lines = redact(str(error)).splitlines() or [type(error).__name__]
    return lines[0][:_MAX_REASON].encode("utf-8", "replace").decode("utf-8")


def walk_parquet_files(path: str, on_error: Callable[[OSError], object] = raise_listing_error) -> Iterator[str]:
    """Yield the Parquet files at a path: the file itself, or those of a folder or prefix.

    Args:
        path: local path or URL.
        on_error: called with the error of each local folder that cannot be listed; raises StorageError by default.
    """
    if is_remote(path):
        yield from (entry.url for entry in list_prefix(path) if entry.url.endswith(".parquet"))
    elif os.path.isdir(path):
        for folder, folders, names in os.walk(path, onerror=on_error):
            folders[:] = sorted(name for name in folders if not name.startswith(("_", ".")))
            yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith(TABLE_ENDINGS))
    else:
        yield path


@dataclass(frozen=True)
class ParquetListing:
    """The Parquet files at a path or below a folder.

    Attributes:
        files: Paths or URLs, sorted; empty if an image comes first.
        other: The first file among them that is not Parquet; None if there is none.
        other_count: Number of such files.
    """

    files: tuple[str, ...]
    other: str | None = None
    other_count: int = 0


def list_parquet_files(path: str) -> ParquetListing:
    """List the Parquet files at a path or below a folder.

    A folder or prefix of images is not walked: whether an image or a Parquet file comes first decides. Files whose
    names begin with a dot or an underscore are marks of writers and do not count.
    """
    files = []
    other: str | None = None
    other_count = 0
    for name in _walk_files(path):
        if name.endswith((".parquet", ".pq")):
            files.append(name)
            continue
        if not files and get_extension(name) in (*IMAGE_EXTENSIONS, *ARCHIVE_EXTENSIONS):
            return ParquetListing(())
        other = other or name
        other_count += 1
    return ParquetListing(tuple(sorted(files)), other, other_count)


def _walk_files(path: str) -> Iterator[str]:
    if is_remote(path):
        start = len(path.rstrip("/")) + 1
        for entry in list_prefix(path):
            if not _is_mark(entry.url[start:]):
                yield entry.url
    elif os.path.isfile(path):
        yield path
    else:
        # Sorted, because the first file decides.
        for folder, folders, names in os.walk(path, onerror=raise_listing_error):
            folders[:] = sorted(name for name in folders if not _is_mark(name))
            yield from (os.path.join(folder, name) for name in sorted(names) if not _is_mark(name))


def _is_mark(name: str) -> bool:
    """Tell whether a name, or a folder in it, begins with a dot or an underscore, as in `_temporary/0.parquet`."""
    return name.startswith((".", "_")) or "/." in name or "/_" in name


def _open_table(path: str, file: BinaryIO) -> pq.ParquetFile | ArrowTable:
    return ArrowTable(file) if get_extension(path) == "arrow" else pq.ParquetFile(file)


def names_images_elsewhere(path: str) -> bool:
    """Tell whether the rows of a Parquet source name images and hold none; False if it cannot be read."""
    try:
        for name in walk_parquet_files(path):
            with open_seekable(name) as file:
                return find_bytes_column(_open_table(name, file).schema_arrow) is None
    except (StorageError, OSError, ValueError):
        return False
    return False


def find_bytes_column(schema: pa.Schema) -> str | None:
    """Find the column with encoded images: binary, or a struct with a binary field `bytes` (Hugging Face).

    A column of another name than usual is taken if Hugging Face's own schema says that it holds images, or if it is the
    only struct of `bytes` and `path`.
    """
    usual = [name for name in BYTES_COLUMNS if name in schema.names and _holds_bytes(schema.field(name).type)]
    declared = [name for name in list_image_columns(schema) if _holds_bytes(schema.field(name).type)]
    structs = [
        field.name
        for field in schema
        if _holds_bytes(field.type) and pa.types.is_struct(field.type) and field.type.get_field_index("path") >= 0
    ]
    return next(iter([*usual, *declared, *(structs if len(structs) == 1 else [])]), None)


def has_images(schema: pa.Schema) -> bool:
    """Tell whether a file's columns hold or name images."""
    bytes_column = find_bytes_column(schema)
    return bytes_column is not None or find_name_column(schema, bytes_column) is not None


def find_name_column(schema: pa.Schema, bytes_column: str | None) -> str | None:
    """Find the column that names images; `column.path` for the path in a struct of bytes and path.

    Columns that hold bytes, lists or other structs name nothing.

    Args:
        schema: schema of the file.
        bytes_column: column with encoded images, if there is one.
    """
    for name in URI_COLUMNS:
        if name in schema.names and _is_scalar(schema.field(name).type):
            return name
    if bytes_column is not None:
        kind = schema.field(bytes_column).type
        if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 and _is_scalar(kind.field("path").type):
            return f"{bytes_column}.path"
    return None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_variable = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return bool(is_variable or pa.types.is_fixed_size_binary(kind))


def _is_nested(kind: pa.DataType) -> bool:
    return bool(pa.types.is_nested(kind))


def _is_scalar(kind: pa.DataType) -> bool:
    return not (_is_nested(kind) or _is_binary(kind))


def _read_names(batch: pa.RecordBatch, column: str) -> list[Any]:
    if column in batch.schema.names:
        return list(batch.column(column).to_pylist())
    # A null struct has no path either.
    parent, _, child = column.rpartition(".")
    return [None if value is None else value[child] for value in batch.column(parent).to_pylist()]
