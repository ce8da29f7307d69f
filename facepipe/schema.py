"""The columns that parts of facepipe exchange: work items in, rows of the gallery out."""

import pyarrow as pa

OK = "ok"
NO_FACE = "no_face"
READ_ERROR = "read_error"
DECODE_ERROR = "decode_error"
TOO_LARGE = "too_large"
CRASHED = "crashed"
STATUSES = (OK, NO_FACE, READ_ERROR, DECODE_ERROR, TOO_LARGE, CRASHED)

# These five are never stored: the rows that the gallery has of the image stay as they are.
UNCHANGED = "unchanged"  # the image could not be read this time
TOUCHED = "touched"  # the same bytes under a new fingerprint
ERASED = "erased"  # the same bytes as an image that was erased, and must not come back
REPLACED = "replaced"  # its tar or Parquet file was replaced after it was listed, so nothing is known of the image
MOVED = "moved"  # the same bytes as an image that had another uri, whose rows it gets
NEVER_STORED = (UNCHANGED, TOUCHED, ERASED, REPLACED, MOVED)

# Of these images it is not known whether they hold a face.
FAILED = (READ_ERROR, DECODE_ERROR, TOO_LARGE, CRASHED, REPLACED)
# Statuses of images that were read, and of which no face can be had.
DAMAGED = (DECODE_ERROR, TOO_LARGE, CRASHED)

DEFAULT_DIM = 128
"""Length of the default embedder's vectors, and what is recommended."""
MIN_DIM = 64
MAX_DIM = 1024

UNKNOWN_URI = ""
"""Stands in `former_uris` for a uri that held an image instead of a name, as older versions made them."""

WORK_ITEM = pa.schema(
    [
        ("uri", pa.string()),  # name of the image in the gallery
        ("path", pa.binary()),  # where its bytes are: a local path as bytes (names need not be UTF-8) or a URL
        ("offset", pa.int64()),  # first byte, or first row in a Parquet file; null: the whole file
        ("length", pa.int64()),  # bytes; null with an offset: one Parquet row
        ("fingerprint", pa.string()),  # size and mtime, or etag: changes when the file may have changed
        ("identity", pa.string()),
        ("listing_error", pa.string()),  # why the lister already knows that this cannot be read
        ("previous", pa.uint64()),  # hash of the content that the gallery has for this uri; null: it has none
    ]
)

FACES = pa.schema(
    [
        ("face_id", pa.int64()),
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("source", pa.string()),
        ("fingerprint", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image_hash", pa.int64()),
        ("face_index", pa.int16()),
        ("identity", pa.string()),
        ("box", pa.list_(pa.float32())),
        ("landmarks", pa.list_(pa.float32())),
        ("det_score", pa.float32()),
        ("face_px", pa.float32()),
        ("sharpness", pa.float32()),
        ("yaw", pa.float32()),
        ("roll", pa.float32()),
        ("embedding", pa.list_(pa.float32())),
        ("embedding_norm", pa.float32()),
        ("thumb", pa.binary()),
        ("ingested_at", pa.timestamp("us", "UTC")),
        ("missing_since", pa.timestamp("us", "UTC")),
        ("former_uris", pa.list_(pa.string())),  # uris that a moved image had before, oldest first
        ("turn", pa.int16()),  # degrees clockwise by which the face lies in the image
        ("visible", pa.float32()),  # share of the face inside the picture
        ("face_quality", pa.float32()),
        ("failed_with", pa.string()),  # decoder, limits or settings that failed the image; another one is tried again
    ]
)

# Added after the first galleries were made. Files written before have neither values nor statistics of these columns.
LATER = ("image_hash", "missing_since", "former_uris", "turn", "visible", "face_quality", "failed_with")


def conform(table: pa.Table, schema: pa.Schema = FACES) -> pa.Table:
    """Return the table with exactly the schema's columns, in its order; absent columns become nulls."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
