"""A plain Parquet folder for everything that does not read Delta tables."""

import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.dataset as ds

from facepipe.errors import GalleryError
from facepipe.gallery.contract import CONTRACT_PROPERTY
from facepipe.gallery.table import Gallery, check_columns
from facepipe.schema import FACES

_ROWS_PER_FILE = 1_000_000


def export_parquet(gallery: Gallery, out: str, columns: Sequence[str] | None = None, where: str | None = None) -> int:
    """Write the chosen rows and columns as `part-N.parquet` files into a new or empty folder; the rows written."""
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise GalleryError(f"{out!r} exists and is not an empty folder")
    names = check_columns(columns)
    written = 0

    def counted() -> "pa.RecordBatch":
        nonlocal written
        for batch in gallery.batches(names, where):
            written += batch.num_rows
            yield batch

    ds.write_dataset(
        counted(),
        out,
        schema=pa.schema([FACES.field(name) for name in names], {CONTRACT_PROPERTY: gallery.contract.to_json()}),
        format="parquet",
        basename_template="part-{i}.parquet",
        max_rows_per_file=_ROWS_PER_FILE,
        max_rows_per_group=65536,
        file_options=ds.ParquetFileFormat().make_write_options(compression="zstd"),
        existing_data_behavior="overwrite_or_ignore",
    )
    return written
