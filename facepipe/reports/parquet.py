"""Tables of a report, streamed into Parquet."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.errors import StorageError
from facepipe.storage import describe_error

_ROWS = 131_072  # of a row group


def write_rows(path: str, schema: pa.Schema, tables: Iterator[pa.Table]) -> int:
    """Stream tables into a Parquet file, and return the number of rows.

    Raises:
        StorageError: the file cannot be written.
    """
    rows = 0
    try:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
                rows += table.num_rows
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}") from error
    return rows


def write_table(path: str, table: pa.Table) -> None:
    """Write a table. Rows are written a hundred thousand at a time, because the table may be mapped from a file."""
    parts = (table.slice(at, _ROWS) for at in range(0, table.num_rows, _ROWS))
    write_rows(path, table.schema, parts)
