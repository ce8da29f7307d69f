"""Files to load into Milvus, Qdrant and pgvector. Nothing is sent: the stores' own programs load them."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from facepipe.exports.faces import ExportedFaces, to_texts

_ROWS_PER_FILE = 500_000
# Qdrant's server takes requests of up to 32 MiB.
_REQUEST_BYTES = 16 << 20
# Types of fields in Milvus (`pymilvus.DataType`).
_INT64 = 5
_FLOAT = 10
_VARCHAR = 21
_FLOAT_VECTOR = 101
_MAX_TEXT = 65_535  # bytes of a text in Milvus
_PLAIN = ("face_id", "uri", "identity", "source", "det_score")


def write_milvus(faces: ExportedFaces, folder: str) -> None:
    """Write Parquet files for Milvus' bulk insert, and `schema.json`, the schema of their collection.

    Names and types of the columns are those of the schema: an INT64 primary key, texts, a FLOAT, and a FLOAT_VECTOR as
    a list of float32.
    """
    schema = pa.schema(
        [
            pa.field("face_id", pa.int64(), nullable=False),
            ("uri", pa.string()),
            ("identity", pa.string()),
            ("source", pa.string()),
            ("det_score", pa.float32()),
            ("embedding", pa.list_(pa.float32())),
        ]
    )
    for number, part in enumerate(_cut_parts(faces)):
        with pq.ParquetWriter(os.path.join(folder, f"faces-{number:05d}.parquet"), schema) as writer:
            for batch in part:
                columns = [batch[field.name] for field in schema]
                writer.write_batch(pa.record_batch(columns, schema=schema))
    _write_json(os.path.join(folder, "schema.json"), _describe_collection(faces.dim))


def _describe_collection(dim: int) -> dict[str, Any]:
    """Describe the collection as `pymilvus.CollectionSchema.construct_from_dict` takes it."""
    text = {"type": _VARCHAR, "description": "", "params": {"max_length": _MAX_TEXT}, "nullable": True}
    return {
        "auto_id": False,
        "description": "faces of a gallery of facepipe; vectors of length 1",
        "fields": [
            {"name": "face_id", "type": _INT64, "description": "", "params": {}, "is_primary": True, "auto_id": False},
            {"name": "uri", **text},
            {"name": "identity", **text},
            {"name": "source", **text},
            {"name": "det_score", "type": _FLOAT, "description": "", "params": {}, "nullable": True},
            {"name": "embedding", "type": _FLOAT_VECTOR, "description": "", "params": {"dim": dim}},
        ],
        "enable_dynamic_field": False,
    }


def write_qdrant(faces: ExportedFaces, folder: str) -> None:
    """Write the bodies of requests to Qdrant: `collection.json` for PUT /collections/NAME, then `points-*.json`.

    Each of these is a body of PUT /collections/NAME/points, of at most 16 MiB.
    """
    _write_json(os.path.join(folder, "collection.json"), {"vectors": {"size": faces.dim, "distance": "Cosine"}})
    number = 0
    points: list[str] = []
    size = 0
    for point in _format_points(faces):
        if points and size + len(point) > _REQUEST_BYTES:
            _write_points(folder, number, points)
            number += 1
            points = []
            size = 0
        points.append(point)
        size += len(point) + 1
    _write_points(folder, number, points)


def _format_points(faces: ExportedFaces) -> Iterator[str]:
    for batch in faces:
        vectors = to_texts(batch["embedding"]).to_pylist()
        rows = batch.select(list(_PLAIN)).to_pylist()
        for row, vector in zip(rows, vectors, strict=True):
            face_id = row.pop("face_id")
            payload = {name: value for name, value in row.items() if value is not None}
            yield f'{{"id":{face_id},"vector":{vector},"payload":{json.dumps(payload, ensure_ascii=False)}}}'


def _write_points(folder: str, number: int, points: list[str]) -> None:
    with open(os.path.join(folder, f"points-{number:06d}.json"), "w", encoding="utf-8") as file:
        file.write('{"points":[')
        file.write(",\n".join(points))
        file.write("]}\n")


def write_pgvector(faces: ExportedFaces, folder: str) -> None:
    """Write CSV files for PostgreSQL's COPY, and `load.sql`, which makes the table and loads them with psql."""
    schema = pa.schema([(name, _get_csv_type(name)) for name in (*_PLAIN, "embedding")])
    names = []
    for number, part in enumerate(_cut_parts(faces)):
        names.append(f"faces-{number:05d}.csv")
        with pa.csv.CSVWriter(os.path.join(folder, names[-1]), schema) as writer:
            for batch in part:
                columns = [*(batch[name] for name in _PLAIN), to_texts(batch["embedding"])]
                writer.write_batch(pa.record_batch(columns, schema=schema))
    with open(os.path.join(folder, "load.sql"), "w", encoding="utf-8") as file:
        file.write(_LOAD.format(dim=faces.dim))
        file.writelines(f"\\copy faces FROM '{name}' WITH (FORMAT csv, HEADER true)\n" for name in names)


_LOAD = """\
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE faces (
    face_id bigint PRIMARY KEY,
    uri text,
    identity text,
    source text,
    det_score real,
    embedding vector({dim})
);
"""


def _get_csv_type(name: str) -> pa.DataType:
    return {"face_id": pa.int64(), "det_score": pa.float32()}.get(name, pa.string())


def _cut_parts(faces: ExportedFaces) -> Iterator[Iterator[pa.RecordBatch]]:
    """Cut batches into parts for files. Each part is read to its end before the next one is asked for."""
    batches = iter(faces)
    first = next(batches, None)
    while first is not None:
        rest: list[pa.RecordBatch | None] = [None]
        yield _fill_part(first, batches, rest)
        first = rest[0]


def _fill_part(
    first: pa.RecordBatch, batches: Iterator[pa.RecordBatch], rest: list[pa.RecordBatch | None]
) -> Iterator[pa.RecordBatch]:
    rows = 0
    batch: pa.RecordBatch | None = first
    while batch is not None:
        rows += batch.num_rows
        yield batch
        batch = next(batches, None)
        if batch is not None and rows + batch.num_rows > _ROWS_PER_FILE:
            rest[0] = batch
            return


def _write_json(path: str, content: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
