"""Images whose files were good and are damaged now: the gallery keeps the faces that it has of them.

A disk that fails, or a mount that returns noise, damages every file of a corpus at once. Rows that say so must not take
the place of the faces, which nothing else may hold any more. The failures are counted all the same, and the files are
read again in each run until they are sound, or are good and other pictures.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.gallery.commits.parts import PartRecord, replace_part
from facepipe.gallery.table import Gallery
from facepipe.schema import CRASHED, conform

_ROWS = 65536


def keep_good_rows(gallery: Gallery, records: Sequence[PartRecord]) -> list[PartRecord]:
    """Take the rows of damaged images out of parts that are not committed yet, if the table has faces of the images.

    Args:
        gallery: the gallery in its newest version.
        records: the records of finished blocks.

    Returns:
        The records to commit instead.
    """
    damaged = {uri for record in records for uri in record.damaged}
    if not damaged:
        return list(records)
    # Images of which the table has no face lose nothing.
    has_face = ds.field("uri").isin(pa.array(sorted(damaged), pa.string())) & ds.field("face_id").is_valid()
    good: set[str] = set()
    for batch in gallery.batches(["uri"], has_face, rows=_ROWS, with_hidden=True):
        good.update(batch["uri"].to_pylist())
    return [_keep(gallery, record, good & set(record.damaged)) for record in records]


def _keep(gallery: Gallery, record: PartRecord, kept: set[str]) -> PartRecord:
    if not kept or record.path is None:
        return record
    with storage.open_seekable(storage.join(gallery.faces_folder, record.path)) as file:
        rows = conform(pq.ParquetFile(file).read())
    is_kept = pc.is_in(rows["uri"], pa.array(sorted(kept), pa.string()))
    # An image that ends its worker is not tried again in each run: its old rows get the new fingerprint.
    crashed = rows.filter(pc.and_(is_kept, pc.equal(rows["status"], CRASHED))).select(["uri", "fingerprint"])
    touched = {**record.touched, **dict(zip(*(column.to_pylist() for column in crashed.columns), strict=True))}
    fewer = replace_part(record, rows.filter(pa.array(~np.asarray(is_kept))), gallery.faces_folder)
    replaced = [uri for uri in record.replaced if uri not in kept]
    return replace(fewer, replaced=replaced, touched=touched)
