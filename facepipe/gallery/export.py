"""A plain Parquet folder for everything that does not read Delta tables."""

import os
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.dataset as ds

from facepipe.errors import GalleryError
from facepipe.gallery.contract import CONTRACT_PROPERTY
from facepipe.gallery.filters import list_texts
from facepipe.gallery.near_names import describe_near, find_near_images, find_near_labels, find_near_sources
from facepipe.gallery.table import Gallery, check_columns
from facepipe.schema import FACES
from facepipe.storage.aliases import find_utf8_output

_ROWS_PER_FILE = 1_000_000
_ROWS_PER_GROUP = 65536


def export_parquet(gallery: Gallery, out: str, columns: Sequence[str] | None = None, where: str | None = None) -> int:
    """Export rows of a gallery as `part-N.parquet` files.

    Args:
        gallery: the gallery to read.
        out: a new or empty folder.
        columns: names of columns; all by default.
        where: a filter as text; all rows by default.

    Returns:
        The number of rows written.

    Raises:
        GalleryError: the folder holds something, or no row meets the filter. Nothing is written then.
    """
    # Files of an earlier export would be read together with the new ones.
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise GalleryError(f"{out!r} exists and is not an empty folder")
    out = find_utf8_output(out)
    names = check_columns(columns)
    if where is not None and not any(batch.num_rows for batch in gallery.batches(["uri"], where)):
        raise GalleryError(f"no row meets the filter {where!r}{_suggest_text(gallery, where)}")
    row_count = 0

    # Count rows while they are streamed to the writer.
    def count_rows() -> Iterator[pa.RecordBatch]:
        nonlocal row_count
        for batch in gallery.batches(names, where):
            row_count += batch.num_rows
            yield batch

    ds.write_dataset(
        count_rows(),
        out,
        schema=pa.schema([FACES.field(name) for name in names], {CONTRACT_PROPERTY: gallery.contract.to_json()}),
        format="parquet",
        basename_template="part-{i}.parquet",
        max_rows_per_file=_ROWS_PER_FILE,
        max_rows_per_group=_ROWS_PER_GROUP,
        file_options=ds.ParquetFileFormat().make_write_options(compression="zstd"),
        existing_data_behavior="overwrite_or_ignore",
    )
    return row_count


def _suggest_text(gallery: Gallery, where: str) -> str:
    """Name the nearest label, source or image to a text in a filter that nothing meets; empty if there is none."""
    find_near = {"identity": find_near_labels, "source": find_near_sources, "uri": find_near_images}
    for compared in list_texts(where):
        if compared.column in find_near:
            near = find_near[compared.column](gallery, compared.text)
            if near and compared.text not in near:
                return describe_near(near)
    return ""
