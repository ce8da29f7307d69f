"""A dataset of Lance, which LanceDB opens as a table."""

import os
from collections.abc import Iterator

import pyarrow as pa

from facepipe.exports.faces import ExportedFaces
from facepipe.extras import require_module

_ROWS_PER_FILE = 1_000_000


def write_lance(faces: ExportedFaces, folder: str) -> None:
    """Write `faces.lance`: the columns of the gallery, with the vector as a list of a fixed length.

    Raises:
        MissingPackageError: pylance is not installed.
    """
    require_module("lance", "Lance's format")
    import lance

    schema = pa.schema(
        [
            pa.field("face_id", pa.int64(), nullable=False),
            ("image_id", pa.string()),
            ("uri", pa.string()),
            ("source", pa.string()),
            ("identity", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("box", pa.list_(pa.float32(), 4)),
            ("landmarks", pa.list_(pa.float32())),
            ("det_score", pa.float32()),
            ("vector", pa.list_(pa.float32(), faces.dim)),
        ]
    )

    def list_batches() -> Iterator[pa.RecordBatch]:
        for batch in faces:
            columns = [
                batch["embedding" if field.name == "vector" else field.name].cast(field.type) for field in schema
            ]
            yield pa.record_batch(columns, schema=schema)

    reader = pa.RecordBatchReader.from_batches(schema, list_batches())
    lance.write_dataset(reader, os.path.join(folder, "faces.lance"), max_rows_per_file=_ROWS_PER_FILE)
