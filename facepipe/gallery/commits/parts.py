"""One finished block as one Parquet file in the table's folder: content-addressed, invisible until it is committed."""

import hashlib
import io
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.schema import FACES, NEVER_STORED, OK, TOUCHED, conform

_NAME = re.compile(r"part-.*-([0-9a-f]{32})\.parquet$")


@dataclass
class PartRecord:
    """What a worker says of one finished block; everything the driver needs to commit and to account for it.

    statuses: images by status, those that are never stored (`touched` …) included; faces: rows with an embedding;
    replaced: uris whose older rows must go; touched: new fingerprints by uri; path is None where the block left no row.
    """

    block: int
    images: int = 0
    faces: int = 0
    rows: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    path: str | None = None
    size: int = 0
    stats: str = ""
    replaced: list[str] = field(default_factory=list)
    touched: dict[str, str | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    repeated: int = 0
    ignored: int = 0
    erased: int = 0
    last: bool = False
    error: str | None = None

    def to_json(self) -> str:
        """For transport between processes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "PartRecord":
        return cls(**json.loads(text))


def write_part(table: pa.Table, items: pa.Table, folder: str, prefix: str, record: PartRecord) -> PartRecord:
    """Write the rows of a chain's output as a part below `folder` and fill in the record.

    `items` are the block's work items (they say which images replace older rows). The file's name ends in the first
    32 hex digits of its SHA-256, so that `verify` can tell whether it is still what was written.
    """
    first = table.select(["uri", "fingerprint", "status"]).filter(
        pc.fill_null(pc.equal(table["face_index"], 0), True)  # of all columns that would copy every vector
    )
    record.images = first.num_rows
    record.statuses = dict(Counter(first["status"].to_pylist()))
    again = first.filter(pc.equal(first["status"], TOUCHED))
    record.touched = dict(zip(again["uri"].to_pylist(), again["fingerprint"].to_pylist(), strict=True))
    if not set(NEVER_STORED).isdisjoint(record.statuses):
        table = table.filter(pc.invert(pc.is_in(table["status"], pa.array(NEVER_STORED))))
    record.rows, record.faces = table.num_rows, table.num_rows - table["face_id"].null_count
    known = items.filter(pc.is_valid(items["previous"]))["uri"].to_pylist()
    record.replaced = sorted(set(known) & set(table["uri"].to_pylist())) if known else []
    if table.num_rows:
        rows = conform(table)
        data = encode_parquet(rows)
        digest = hashlib.sha256(data).hexdigest()[:32]
        record.path, record.size = f"part-{prefix}-{record.block:06d}-{digest}.parquet", len(data)
        record.stats = compute_statistics(rows)
        storage.write(storage.join(folder, record.path), data)
    return record


def encode_parquet(table: pa.Table) -> bytes:
    """A conforming table as Parquet: zstd, vectors byte-stream-split, no dictionaries where every value differs."""
    sink = io.BytesIO()  # its bytes need no copy, unlike those of Arrow's own
    floats = [f"{name}.list.element" for name in ("embedding", "box", "landmarks")]
    repeated = ["source", "status", "error", "identity", "fingerprint", "image_id", "uri"]
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=repeated,
        column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
    )
    return sink.getvalue()


def compute_statistics(table: pa.Table) -> str:
    """Delta's per-file statistics: row count, and for every column its nulls and its range where it has one.

    Complete on purpose: readers take a column that is left out for one without nulls, and then filter wrongly.
    """
    low, high, nulls = {}, {}, {}
    for name in FACES.names:
        column = table[name] if name in table.column_names else pa.nulls(table.num_rows)
        nulls[name] = column.null_count
        if (
            not pa.types.is_nested(column.type)
            and not pa.types.is_binary(column.type)
            and column.null_count < len(column)
        ):
            ends = pc.min_max(column).as_py()
            low[name], high[name] = _plain(ends["min"]), _plain(ends["max"])
    return json.dumps({"numRecords": table.num_rows, "minValues": low, "maxValues": high, "nullCount": nulls})


def _plain(value: Any) -> Any:
    return value.isoformat(timespec="microseconds").replace("+00:00", "Z") if isinstance(value, datetime) else value


def parse_digest(path: str) -> str | None:
    """The digest that a part's name carries; None for files that something else wrote (a compaction)."""
    found = _NAME.search(path)
    return found[1] if found else None


def add_shared_columns(table: pa.Table, source: str) -> pa.Table:
    """Add the columns that every row of a block shares."""
    n = table.num_rows
    now = pa.scalar(datetime.now(UTC), pa.timestamp("us", "UTC"))
    table = table.append_column("source", pa.array([source] * n, pa.string()))
    return table.append_column("ingested_at", pa.repeat(now, n))


def make_status_rows(items: pa.Table, status: str, error: str) -> pa.Table:
    """Rows for images that went through no stage, such as one that crashed its worker."""
    n = items.num_rows
    assert status != OK
    columns: dict[str, Any] = {name: items[name] for name in ("uri", "fingerprint", "identity")}
    columns |= {"status": pa.array([status] * n), "error": pa.array([error] * n)}
    return conform(pa.table(columns), pa.schema([f for f in FACES if f.name not in ("source", "ingested_at")]))
