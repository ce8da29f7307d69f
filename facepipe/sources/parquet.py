"""Parquet in: rows that name images (`uri`) or hold them (`bytes`), with an optional `identity`."""

import os
import posixpath
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.errors import SourceError, StorageError
from facepipe.sources.extensions import is_web_url
from facepipe.sources.identity import IdentityRule, make_identity_rule
from facepipe.sources.item import WorkItem, escape_name, make_broken_item, make_file_uri, make_member_uri
from facepipe.sources.labels import LABEL_COLUMNS, format_labels
from facepipe.storage import (
    get_entry,
    get_local_fingerprint,
    has_credentials,
    is_remote,
    is_special_file,
    is_special_mode,
    list_prefix,
    open_seekable,
)
from facepipe.storage.redact import redact

URI_COLUMNS = ("uri", "path", "file", "image_path", "image", "url")
BYTES_COLUMNS = ("bytes", "image", "jpg", "content")
_BATCH_ROWS = 8192
_MAX_REASON = 200  # characters


class ParquetSource:
    """Rows of a Parquet file, or of every `.parquet` file in a folder or under a prefix.

    With a bytes column the item is (file, row number): workers read the bytes, the lister never does. A uri column
    then only names the row. Relative uris are relative to the Parquet file's folder, and do not lead out of it.

    Attributes:
        path: Path or URL of the file or folder.
        name: Name of the source.
        ignored: Always 0: every row is an item.
    """

    def __init__(self, path: str, identity: IdentityRule = "auto", name: str | None = None):
        self.path = path
        self.name = name or os.path.basename(path.rstrip("/"))
        self.ignored = 0
        self._identify = make_identity_rule(identity)

    def __iter__(self) -> Iterator[WorkItem]:
        self.ignored = 0
        for path in walk_parquet_files(self.path):
            try:
                if is_special_file(path):
                    raise StorageError("not a regular file")
                with open_seekable(path) as file:
                    yield from self._list_rows(path, pq.ParquetFile(file))
            except (StorageError, OSError, ValueError) as error:
                # pyarrow's errors are ValueErrors and OSErrors. A SourceError passes, because it concerns every file.
                yield make_broken_item(path, f"parquet cannot be read to its end: {get_first_line(error)}")

    def _list_rows(self, path: str, file: pq.ParquetFile) -> Iterator[WorkItem]:
        """Yield one item per row of a file."""
        # Pick the columns by their names.
        names = file.schema_arrow.names
        bytes_column = find_bytes_column(file.schema_arrow)
        uri_column = _pick_column(names, URI_COLUMNS)
        identity_column = _pick_column(names, LABEL_COLUMNS)
        if uri_column is None and bytes_column is None:
            raise SourceError(
                f"{path} has neither a uri column ({', '.join(URI_COLUMNS)}) nor a bytes column "
                f"({', '.join(BYTES_COLUMNS)}); its columns are {', '.join(names)}"
            )
        # Once per file, and not once per row.
        fingerprint = get_entry(path).fingerprint
        container = make_file_uri(path)
        encoded_path = os.fsencode(path)
        folder = os.path.dirname(path)
        # Rows are counted over all batches, because workers find an image by its row.
        row = 0
        columns = [name for name in (uri_column, identity_column) if name]
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            uris = batch.column(uri_column).to_pylist() if uri_column else [None] * batch.num_rows
            labels = format_labels(batch.column(identity_column)) if identity_column else [None] * batch.num_rows
            for name, label in zip(uris, labels, strict=True):
                text = None if name is None else str(name)
                identity = self._identify(text or "", label)
                if bytes_column:
                    # The row number tells apart rows with the same name, such as 1.jpg of two people.
                    uri = make_member_uri(container, str(row) if text is None else f"{row}/{text}")
                    yield WorkItem(uri, encoded_path, row, None, f"{fingerprint}@{row}", identity)
                elif not text:
                    yield make_broken_item(path, "the row names no image", str(row))._replace(identity=identity)
                else:
                    yield make_named_item(text, folder, identity)
                row += 1


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
    if is_web_url(name) or (is_remote(name) and has_credentials(name)):
        reason = "not read: http(s) URLs" if is_web_url(name) else "the URL holds credentials"
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


def walk_parquet_files(path: str) -> Iterator[str]:
    """Yield the Parquet files at a path: the file itself, or those of a folder or prefix."""
    if is_remote(path):
        yield from (entry.url for entry in list_prefix(path) if entry.url.endswith(".parquet"))
    elif os.path.isdir(path):
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith(("_", ".")))
            yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith((".parquet", ".pq")))
    else:
        yield path


def list_parquet_files(path: str) -> list[str]:
    """List the .parquet files at a path or below a folder, sorted; empty if the first file is of another kind.

    A folder or prefix of images is not walked: the kind of its first file decides.
    """
    files = []
    for name in _walk_files(path):
        if not name.endswith((".parquet", ".pq")):
            break
        files.append(name)
    return sorted(files)


def _walk_files(path: str) -> Iterator[str]:
    if is_remote(path):
        yield from (entry.url for entry in list_prefix(path))
    elif os.path.isfile(path):
        yield path
    else:
        for folder, _, names in os.walk(path):
            yield from (os.path.join(folder, name) for name in names if not name.startswith((".", "_")))


def find_bytes_column(schema: pa.Schema) -> str | None:
    """Find the column with encoded images: binary, or a struct with a binary field `bytes` (Hugging Face)."""

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return next((name for name in BYTES_COLUMNS if name in schema.names and holds_bytes(schema.field(name).type)), None)


def _pick_column(names: list[str], candidates: tuple[str, ...]) -> str | None:
    return next((name for name in candidates if name in names), None)
