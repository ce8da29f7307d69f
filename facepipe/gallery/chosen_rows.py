"""Read some rows of a gallery's files: a column finds them, and of the thumbnails only their pages are read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from facepipe.gallery.deletion_vectors import RowChoice
from facepipe.gallery.parquet_pages import UnsupportedPageError, read_byte_values
from facepipe.schema import FACES
from facepipe.types import Int64

_THUMB = "thumb"


@dataclass(frozen=True)
class ChosenRows:
    """Rows of a file.

    Attributes:
        path: path of the file below the table's folder.
        rows: the rows.
    """

    path: str
    rows: pa.Table


def iterate_chosen_rows(
    dataset: ds.Dataset, key: str, values: pa.Array, columns: Sequence[str], choices: Mapping[str, RowChoice]
) -> Iterator[ChosenRows]:
    """Iterate over the rows whose key is among some values, file by file.

    Args:
        dataset: the files of a gallery.
        key: name of the column that is compared. It is read in full.
        values: of the wanted rows.
        columns: names of the columns to return.
        choices: which rows count of files that are not read in full, by path.
    """
    for fragment in dataset.get_fragments(filter=ds.field(key).isin(values)):
        with fragment.filesystem.open_input_file(fragment.path) as file:
            parquet = pq.ParquetFile(file)
            choice = choices.get(fragment.path)
            first = 0
            for group in range(parquet.metadata.num_row_groups):
                keys = parquet.read_row_group(group, columns=[key])[key].cast(values.type)
                is_wanted = pc.is_in(keys, values).to_numpy()
                if choice is not None:
                    is_wanted = is_wanted & choice.mask(first, len(keys))
                first += len(keys)
                rows = np.flatnonzero(is_wanted)
                if len(rows):
                    yield ChosenRows(fragment.path, _read_group_rows(file, parquet, group, rows, columns))


def read_numbered_rows(file: pa.NativeFile, numbers: Int64, columns: Sequence[str]) -> pa.Table:
    """Read the rows of a file that have some numbers.

    Args:
        file: the Parquet file.
        numbers: rising numbers, (n,).
        columns: names of the columns to return; one that the file lacks is null.
    """
    parquet = pq.ParquetFile(file)
    parts = [pa.schema([FACES.field(name) for name in columns]).empty_table()]
    first = 0
    for group in range(parquet.metadata.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        rows = numbers[(numbers >= first) & (numbers < first + count)] - first
        first += count
        if len(rows):
            parts.append(_read_group_rows(file, parquet, group, rows, columns))
    return pa.concat_tables(parts)


def _read_group_rows(
    file: pa.NativeFile, parquet: pq.ParquetFile, group: int, rows: Int64, columns: Sequence[str]
) -> pa.Table:
    """Read some rows of a row group."""
    present = parquet.schema_arrow.names
    others = [name for name in columns if name != _THUMB and name in present]
    # Without a column Arrow forgets the number of rows.
    table = parquet.read_row_group(group, columns=others or present[:1]).take(pa.array(rows))
    arrays = {}
    for name in columns:
        kind = FACES.field(name).type
        if name == _THUMB and name in present:
            arrays[name] = pa.array(_read_thumbs(file, parquet, group, rows), kind)
        elif name in present:
            arrays[name] = table[name].cast(kind)
        else:
            arrays[name] = pa.nulls(len(rows), kind)
    return pa.table(arrays)


def _read_thumbs(file: pa.NativeFile, parquet: pq.ParquetFile, group: int, rows: Int64) -> list[bytes | None]:
    metadata = parquet.metadata.row_group(group)
    chunks = [metadata.column(number) for number in range(metadata.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == _THUMB)
    try:
        return read_byte_values(file, chunk, rows)
    except UnsupportedPageError:
        # Another program has written it. Arrow reads all of the chunk.
        column = parquet.read_row_group(group, columns=[_THUMB])[_THUMB]
        thumbs: list[bytes | None] = column.take(pa.array(rows)).to_pylist()
        return thumbs
