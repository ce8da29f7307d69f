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
IDENTITY_COLUMNS = ("identity", "label", "identity_id", "person")
_BATCH_ROWS = 8192


class ParquetSource:
    """Rows of a Parquet file, or of every `.parquet` file in a folder or under a prefix.

    With a bytes column the item is (file, row number): workers read the bytes, the lister never does. A uri column
    then only names the row. Relative uris are relative to the Parquet file's folder, and do not lead out of it.
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
                    yield from self._rows(path, pq.ParquetFile(file))
            except (StorageError, OSError, ValueError) as error:
                # pyarrow's errors are ValueErrors and OSErrors; SourceError passes, since it concerns every file.
                yield make_broken_item(path, f"parquet cannot be read to its end: {get_first_line(error)}")

    def _rows(self, path: str, file: pq.ParquetFile) -> Iterator[WorkItem]:
        names = file.schema_arrow.names
        content = find_bytes_column(file.schema_arrow)
        by_name, by_label = (_pick(names, columns) for columns in (URI_COLUMNS, IDENTITY_COLUMNS))
        if by_name is None and content is None:
            raise SourceError(
                f"{path} has neither a uri column ({', '.join(URI_COLUMNS)}) nor a bytes column "
                f"({', '.join(BYTES_COLUMNS)}); its columns are {', '.join(names)}"
            )
        mark = get_entry(path).fingerprint
        container, place, folder = (
            make_file_uri(path),
            os.fsencode(path),
            os.path.dirname(path),
        )  # once, not a million times
        row = 0
        columns = [name for name in (by_name, by_label) if name]
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            uris = batch.column(by_name).to_pylist() if by_name else [None] * batch.num_rows
            labels = batch.column(by_label).to_pylist() if by_label else [None] * batch.num_rows
            for name, label in zip(uris, labels, strict=True):
                text = None if name is None else str(name)
                identity = self._identify(text or "", None if label is None else str(label))
                if content:
                    # The row number keeps rows apart that carry one name, such as 1.jpg of two people.
                    uri = make_member_uri(container, str(row) if text is None else f"{row}/{text}")
                    yield WorkItem(uri, place, row, None, f"{mark}@{row}", identity)
                elif not text:
                    yield make_broken_item(path, "the row names no image", str(row))._replace(identity=identity)
                else:
                    yield make_named_item(text, folder, identity)
                row += 1


def make_named_item(name: str, root: str, identity: str | None, confined: bool = False) -> WorkItem:
    """An item for an image that a list names; an absent one becomes a row with status read_error later.

    A relative name that leads out of the root is a row that says so. Where the root is `confined`, because the user
    named it, that goes for absolute paths, URLs and symbolic links as well.
    """
    if name.startswith("file://"):
        name = os.fsdecode(unquote_to_bytes(os.fsencode(name.removeprefix("file://"))))
    if is_web_url(name) or (is_remote(name) and has_credentials(name)):
        scheme, _, rest = name.partition("?")[0].partition("://")  # what is behind the ? may be a signature
        host, slash, key = rest.partition("/")
        bare = f"{scheme}://{host.rpartition('@')[2]}{slash}{key}"
        why = "not read: http(s) URLs" if is_web_url(name) else "the URL holds credentials"
        return make_broken_item(bare, why)._replace(identity=identity)
    if is_remote(name) or os.path.isabs(name):
        path, relative = name, False
    else:
        path, relative = f"{root or '.'}/{name}", True
    if not is_remote(path):
        path = os.path.abspath(path)  # without `..`, so that what is opened is what the uri says
    if (relative or confined) and not _inside(path, root or ".", confined):
        return make_broken_item(path, f"outside of the root {escape_name(root or '.')}")._replace(identity=identity)
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


def _inside(path: str, root: str, real: bool) -> bool:
    """Whether a path or URL lies below a root; `real`: when symbolic links are followed too."""
    if is_remote(root) or is_remote(path):
        scheme, _, rest = path.partition("://")
        return f"{scheme}://{posixpath.normpath(rest)}".startswith(root.rstrip("/") + "/")
    pairs = [(path, os.path.abspath(root))]
    if real:
        with suppress(OSError, ValueError):  # a name that no file can have: reading it will say so
            pairs.append((os.path.realpath(path), os.path.realpath(root)))
    return all(f"{place}/".startswith(f"{base.rstrip('/')}/") for place, base in pairs)


def get_first_line(error: BaseException) -> str:
    """The first line of an error's message, fit for a column."""
    lines = redact(str(error)).splitlines() or [type(error).__name__]
    return lines[0][:200].encode("utf-8", "replace").decode("utf-8")


def walk_parquet_files(path: str) -> Iterator[str]:
    """The Parquet files at a path: the file itself, or those of a folder or prefix."""
    if is_remote(path):
        yield from (e.url for e in list_prefix(path) if e.url.endswith(".parquet"))
    elif os.path.isdir(path):
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith(("_", ".")))
            yield from (os.path.join(folder, n) for n in sorted(names) if n.endswith((".parquet", ".pq")))
    else:
        yield path


def find_bytes_column(schema: pa.Schema) -> str | None:
    """The column that holds encoded images: binary, or a struct with a binary field `bytes` (Hugging Face)."""

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return next((name for name in BYTES_COLUMNS if name in schema.names and holds_bytes(schema.field(name).type)), None)


def _pick(names: list[str], candidates: tuple[str, ...]) -> str | None:
    return next((name for name in candidates if name in names), None)


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
