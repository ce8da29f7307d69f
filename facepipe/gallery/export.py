"""A plain Parquet folder for everything that does not read Delta tables."""

import os
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.dataset as ds

from facepipe.errors import ConfigError, GalleryError, StorageError
from facepipe.gallery.contract import CONTRACT_PROPERTY
from facepipe.gallery.filters import list_texts
from facepipe.gallery.near_names import describe_near, find_near_images, find_near_labels, find_near_sources
from facepipe.gallery.table import Gallery, check_columns
from facepipe.schema import FACES
from facepipe.storage import describe_error, is_remote, list_prefix
from facepipe.storage.aliases import find_utf8_output
from facepipe.storage.table_access import open_arrow_filesystem

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
    if out.endswith(".csv"):
        raise ConfigError(
            f"{out!r} would be a folder of Parquet files: give a folder, and convert it with another program"
        )
    # Files of an earlier export would be read together with the new ones.
    if is_remote(out):
        is_taken = next(iter(list_prefix(out.rstrip("/") + "/")), None) is not None
    else:
        is_taken = os.path.exists(out) and (not os.path.isdir(out) or bool(os.listdir(out)))
    if is_taken:
        raise GalleryError(f"{out!r} exists and is not an empty folder")
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

    try:
        _write_parts(count_rows(), out, names, gallery)
    except OSError as error:
        raise StorageError(f"cannot write to {out!r}: {describe_error(error)}") from error
    return row_count


def _write_parts(batches: Iterator[pa.RecordBatch], out: str, names: list[str], gallery: Gallery) -> None:
    """Write batches as files of a folder, on a disk or in an object store."""
    filesystem = None
    folder = out
    if is_remote(out):
        filesystem = open_arrow_filesystem(out)
        if filesystem is None:
            raise ConfigError(f"cannot export to {out!r}: give a folder, or a URL that begins with s3:// or gs://")
        folder = "."
    else:
        folder = find_utf8_output(out)
    ds.write_dataset(
        batches,
        folder,
        filesystem=filesystem,
        create_dir=filesystem is None,
        schema=pa.schema([FACES.field(name) for name in names], {CONTRACT_PROPERTY: gallery.contract.to_json()}),
        format="parquet",
        basename_template="part-{i}.parquet",
        max_rows_per_file=_ROWS_PER_FILE,
        max_rows_per_group=_ROWS_PER_GROUP,
        file_options=ds.ParquetFileFormat().make_write_options(compression="zstd"),
        existing_data_behavior="overwrite_or_ignore",
    )


def _suggest_text(gallery: Gallery, where: str) -> str:
    """Name the nearest label, source or image to a text in a filter that nothing meets; empty if there is none."""
    find_near = {"identity": find_near_labels, "source": find_near_sources, "uri": find_near_images}
    for compared in list_texts(where):
        if compared.column in find_near:
            near = find_near[compared.column](gallery, compared.text)
            if near and compared.text not in near:
                return describe_near(near)
    return ""
