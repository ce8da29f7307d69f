"""One finished block as one Parquet file in the table's folder: content-addressed, invisible until it is committed."""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.hashing import compute_image_id
from facepipe.schema import DAMAGED, FACES, FAILED, MOVED, NEVER_STORED, OK, REPLACED, TOUCHED, conform

# Line separators that JSON allows in a text.
_SEPARATORS = "\x85\u2028\u2029"
# The second half of the SHA-256 is left out: 128 bits are enough for a checksum in a name.
_NAME = re.compile(r"part-[^/]*-([0-9a-f]{32})\.parquet")
_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_NAME_OF_OTHERS = re.compile(rf"part-\d+-{_UUID}(?:[-.][\w.]+)?\.parquet")
# Pages of at least so many bytes, looked at after so many rows: some sixty thumbnails.
_PAGE_BYTES = 131_072
_PAGE_ROWS = 32
_DIGEST_END = f"{'0' * 32}.parquet"

MOVED_COLUMNS = ["uri", "image_id", "fingerprint", "identity"]
"""What is known of an image that was read and not embedded."""

MAX_EXAMPLES = 3
"""Failed images that a run names. `facepipe info --failed` names all."""


@dataclass
class PartRecord:
    """What a worker reports of one finished block: everything the driver needs to commit it and to account for it.

    Attributes:
        block: Number of the block.
        images: Images in it.
        digest: Digest of their uris, as the rows tell it (`sources.blocks.compute_digest`).
        faces: Rows with an embedding.
        rows: Rows of the part.
        statuses: Images by status, those that are never stored (`touched` ...) included.
        path: Name of the part's file; None if the block left no row.
        size: Bytes of the file.
        stats: Statistics of the file for the log, as JSON.
        replaced: Uris whose older rows have to go.
        damaged: Those among them that could be read and not decoded.
        touched: New fingerprints by uri.
        relabelled: New labels by uri; null for none.
        moved: Images that may have moved: their new values of the columns MOVED_COLUMNS, column by column.
        unread: Uris of images whose container was replaced, so that they have to be listed again.
        seconds: Seconds per stage.
        retried: Images that had failed before and were tried again.
        skipped: Images that were in the gallery already.
        repeated: Images that were listed before in this run.
        ignored: Files that are not images.
        erased: Images that must not come back.
        last: Whether this is the last block.
        handed_out: In the last block, images that the listing handed out.
        handed_out_digest: In the last block, the digest of their uris.
        reports: Numbers of the listing's blocks whose counts this record holds; None: `block` alone.
        notes: Sentences on the listing for the user.
        stage_bytes: Bytes that each stage put out.
        failed_examples: Uri, status and reason of a few images that failed, for the user.
        error: Why the block failed.
    """

    block: int
    images: int = 0
    digest: int = 0
    faces: int = 0
    rows: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    path: str | None = None
    size: int = 0
    stats: str = ""
    replaced: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    touched: dict[str, str | None] = field(default_factory=dict)
    relabelled: dict[str, str | None] = field(default_factory=dict)
    moved: dict[str, list[str | None]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    retried: int = 0
    skipped: int = 0
    repeated: int = 0
    ignored: int = 0
    erased: int = 0
    last: bool = False
    handed_out: int = 0
    handed_out_digest: int = 0
    reports: list[int] | None = None
    notes: list[str] = field(default_factory=list)
    stage_bytes: dict[str, int] = field(default_factory=dict)
    failed_examples: list[tuple[str, str, str]] = field(default_factory=list)
    error: str | None = None

    def to_json(self) -> str:
        """Encode the record for transport between processes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "PartRecord":
        """Decode a record."""
        values = json.loads(text)
        values["failed_examples"] = [(uri, status, reason) for uri, status, reason in values.get("failed_examples", [])]
        return cls(**values)


def write_part(table: pa.Table, items: pa.Table, folder: str, prefix: str, record: PartRecord) -> PartRecord:
    """Write the rows of a finished block as a part, and fill in its record.

    The file's name ends in the first 32 hex digits of its SHA-256, so that `verify` can tell whether it is still what
    was written.

    Args:
        table: the output of the stages.
        items: the block's work items, which say which images replace older rows.
        folder: folder of the table.
        prefix: first part of the file's name, such as the run's id.
        record: the record to fill in.

    Returns:
        The record.
    """
    # The columns first: a filter of all columns would copy every vector.
    first_rows = table.select(["status", *MOVED_COLUMNS]).filter(pc.fill_null(pc.equal(table["face_index"], 0), True))
    # Count images by status, before rows that are never stored are dropped.
    record.images = first_rows.num_rows
    record.failed_examples = _list_failed(table)
    record.statuses = dict(Counter(first_rows["status"].to_pylist()))
    touched = first_rows.filter(pc.equal(first_rows["status"], TOUCHED))
    record.touched = dict(zip(touched["uri"].to_pylist(), touched["fingerprint"].to_pylist(), strict=True))
    if MOVED in record.statuses:
        moved = first_rows.filter(pc.equal(first_rows["status"], MOVED))
        record.moved = moved.select(MOVED_COLUMNS).to_pydict()
    record.unread = first_rows.filter(pc.equal(first_rows["status"], REPLACED))["uri"].to_pylist()
    if not set(NEVER_STORED).isdisjoint(record.statuses):
        table = table.filter(pc.invert(pc.is_in(table["status"], pa.array(NEVER_STORED))))
    record.rows = table.num_rows
    record.faces = table.num_rows - table["face_id"].null_count
    # Of the images that were known, those that still have rows replace their older ones.
    known_uris = items.filter(pc.is_valid(items["previous"]))["uri"].to_pylist()
    record.replaced = sorted(set(known_uris) & set(table["uri"].to_pylist())) if known_uris else []
    is_damaged = pc.is_in(first_rows["status"], pa.array(DAMAGED))
    record.damaged = sorted(set(known_uris) & set(first_rows.filter(is_damaged)["uri"].to_pylist()))
    # The name holds the content's hash, so it is encoded before it is named.
    if table.num_rows:
        rows = conform(table)
        data = encode_parquet(rows)
        digest = hashlib.sha256(data).hexdigest()[:32]
        record.path = f"part-{prefix}-{record.block:06d}-{digest}.parquet"
        record.size = len(data)
        record.stats = compute_statistics(rows)
        storage.write(storage.join(folder, record.path), data)
    return record


def _list_failed(table: pa.Table) -> list[tuple[str, str, str]]:
    """List uri, status and reason of the first images that failed: a few, for the user."""
    if "error" not in table.column_names:  # encodings that are adopted
        return []
    failed = table.select(["uri", "status", "error"]).filter(pc.is_in(table["status"], pa.array(FAILED)))
    first = failed.slice(0, MAX_EXAMPLES).to_pylist()
    return [(row["uri"], row["status"], row["error"] or "") for row in first]


def replace_part(record: PartRecord, rows: pa.Table, folder: str) -> PartRecord:
    """Replace a part that is not committed yet by one with fewer rows, and delete the old one.

    Args:
        record: the record of the part.
        rows: the rows that are left.
        folder: folder of the table.

    Returns:
        The record of the new part; its path is None if no row is left.
    """
    assert record.path is not None
    fewer = replace(record, rows=rows.num_rows, faces=rows.num_rows - rows["face_id"].null_count)
    fewer.path = None
    fewer.size = 0
    fewer.stats = ""
    if rows.num_rows:
        data = encode_parquet(rows)
        # The name stays the same but for the digest at its end.
        fewer.path = f"{record.path[: -len(_DIGEST_END)]}{compute_image_id(data)}.parquet"
        fewer.size = len(data)
        fewer.stats = compute_statistics(rows)
        storage.write(storage.join(folder, fewer.path), data)
    if fewer.path != record.path:
        storage.delete(storage.join(folder, record.path))
    return fewer


def encode_parquet(table: pa.Table) -> bytes:
    """Encode a conforming table as Parquet.

    It is compressed with zstd, vectors are byte-stream-split, and columns in which every value differs get no
    dictionary. Pages are small, so that a report reads few thumbnails besides those that it shows.
    """
    sink = io.BytesIO()  # unlike Arrow's own buffer its bytes need no copy
    float_columns = [f"{name}.list.element" for name in ("embedding", "box", "landmarks")]
    # Columns in which values repeat: every face of an image has its uri and its id.
    dictionary_columns = ["source", "status", "error", "identity", "fingerprint", "image_id", "uri", "failed_with"]
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=dictionary_columns,
        column_encoding=dict.fromkeys(float_columns, "BYTE_STREAM_SPLIT"),
        # The smallest and the largest thumbnail of every page would be a tenth of them.
        write_statistics=[name for name in table.column_names if name != "thumb"],
        data_page_size=_PAGE_BYTES,
        write_batch_size=_PAGE_ROWS,
    )
    return sink.getvalue()


def compute_statistics(table: pa.Table, known_nulls: Mapping[str, int] | None = None) -> str:
    """Compute Delta's statistics of a file as JSON: row count, and per column its nulls and, if it has one, its range.

    Every column has an entry, because readers take a column without one for a column without nulls, and then filter
    wrongly.

    Args:
        table: the rows; a column that it lacks counts as nulls.
        known_nulls: number of nulls of columns that the table lacks, because they need not be read for it.
    """
    minima = {}
    maxima = {}
    null_counts = {}
    for name in FACES.names:
        column = table[name] if name in table.column_names else pa.nulls(table.num_rows)
        null_counts[name] = (known_nulls or {}).get(name, column.null_count)
        # Vectors and bytes get no range: no filter compares them.
        if has_range(column.type) and column.null_count < len(column):
            limits = pc.min_max(column).as_py()
            minima[name] = to_json_value(limits["min"])
            maxima[name] = to_json_value(limits["max"])
    return encode_statistics(
        {"numRecords": table.num_rows, "minValues": minima, "maxValues": maxima, "nullCount": null_counts}
    )


def encode_statistics(statistics: Mapping[str, Any]) -> str:
    """Encode the statistics of a file as JSON."""
    # Characters are written as they are: Arrow's reader of the log joins the two halves of an escaped one wrongly.
    text = json.dumps(statistics, ensure_ascii=False)
    # Some tools take these for the end of a line of the log.
    for separator in _SEPARATORS:
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text


def has_range(kind: pa.DataType) -> bool:
    """Tell whether the log holds the range of a column of a type."""
    return not pa.types.is_nested(kind) and not pa.types.is_binary(kind)


def to_json_value(value: Any) -> Any:
    """Convert a value of a column to one that JSON can hold in the log."""
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return value


def is_part(name: str) -> bool:
    """Tell whether a file in the table's folder is one that a writer of the table gives such a name.

    Parts of facepipe carry a digest, those of other Delta writers a UUID. Any other Parquet file is of somebody else.
    """
    return bool(_NAME.fullmatch(name) or _NAME_OF_OTHERS.fullmatch(name))


def parse_digest(path: str) -> str | None:
    """Parse the digest in the name of a part; None for a file that something else wrote."""
    match = _NAME.fullmatch(path)
    return match[1] if match else None


def add_shared_columns(table: pa.Table, source: str) -> pa.Table:
    """Add the columns that all rows of a block share: the name of the source, and the time of ingestion."""
    count = table.num_rows
    now = pa.scalar(datetime.now(UTC), pa.timestamp("us", "UTC"))
    table = table.append_column("source", pa.array([source] * count, pa.string()))
    return table.append_column("ingested_at", pa.repeat(now, count))


def make_status_rows(items: pa.Table, status: str, error: str) -> pa.Table:
    """Make rows for images that went through no stage, such as one that crashed its worker."""
    count = items.num_rows
    assert status != OK
    columns: dict[str, Any] = {name: items[name] for name in ("uri", "fingerprint", "identity")}
    columns["status"] = pa.array([status] * count)
    columns["error"] = pa.array([error] * count)
    # Columns that all rows of a block share are added later.
    own_columns = pa.schema([field for field in FACES if field.name not in ("source", "ingested_at")])
    return conform(pa.table(columns), own_columns)
