"""New uris for rows that are in the table: an image keeps its rows when it moves."""

import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from facepipe.schema import FACES, UNKNOWN_URI

# Older versions made uris of Parquet rows from the image itself.
_HOLDS_IMAGE = re.compile(r"#\d+/(?:\{'bytes': |b['\"])")
_MAX_URI = 8192  # characters


def rename_rows(rows: pa.Table, uris: pa.Array | pa.ChunkedArray, source: str) -> pa.Table:
    """Give rows new uris and a source, and keep the old uris in `former_uris`.

    Args:
        rows: rows of the table, n of them.
        uris: their new uris, (n,); null for rows that stay as they are. An equal uri only changes the source.
        source: name of the source of the renamed rows.
    """
    is_renamed = pc.is_valid(uris)
    old_uris = rows["uri"].to_pylist()
    former_uris = [
        former if new is None or new == old else _add_former(former, old, new)
        for old, new, former in zip(old_uris, uris.to_pylist(), rows["former_uris"].to_pylist(), strict=True)
    ]
    rows = set_column(rows, "uri", pc.coalesce(uris, rows["uri"]))
    rows = set_column(rows, "source", pc.if_else(is_renamed, source, rows["source"]))
    return set_column(rows, "former_uris", former_uris)


def set_column(rows: pa.Table, name: str, values: Sequence[object] | pa.Array | pa.ChunkedArray) -> pa.Table:
    """Set a column in its place, so that the schema stays the same."""
    n = FACES.get_field_index(name)
    if not isinstance(values, pa.Array | pa.ChunkedArray):
        values = pa.array(values, FACES.field(n).type)
    return rows.set_column(n, FACES.field(n), values)


def _add_former(former: list[str] | None, old: str, new: str) -> list[str]:
    """Add a uri to those that an image had. The first one stays first, because the face ids are made from it."""
    if len(old) > _MAX_URI or _HOLDS_IMAGE.search(old):
        old = UNKNOWN_URI
    names = [*(former or []), old]
    # An image may come back to an earlier uri.
    later = [name for name in dict.fromkeys(names[1:]) if name not in (names[0], new)]
    return [names[0], *later]
