"""Decisions as a file that `facepipe apply` takes again without loss: JSON lines, CSV or Parquet."""

import csv
import json
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from facepipe import storage
from facepipe.decisions.files import FORMAT, HEADER
from facepipe.decisions.schema import SCHEMA, conform_rows
from facepipe.decisions.table import DecisionTable
from facepipe.decisions.undo import drop_repeated
from facepipe.errors import ConfigError, StorageError
from facepipe.gallery.table import Gallery
from facepipe.storage.outputs import write_output
from facepipe.text import protect_cell

COLUMNS = tuple(name for name in SCHEMA.names if name != "added_at")
"""The columns of an export: all but the time at which a row came into this gallery."""

_BATCH_ROWS = 8192
_LISTS = ("box", "other_box")
_IDS = ("face_id", "other_face_id")
_ENDINGS = (".jsonl", ".csv", ".parquet")


def export_decisions(gallery: Gallery, path: str) -> int:
    """Write all decisions to a file, those that were taken back and the undos included.

    Args:
        gallery: the gallery.
        path: path or URL that ends with .jsonl, .csv or .parquet. An older export there is replaced.

    Returns:
        The number of rows.

    Raises:
        ConfigError: the name has another ending, or there is a file that is no export.
        StorageError: the file cannot be written.
    """
    if not path.lower().endswith(_ENDINGS):
        raise ConfigError(f"cannot export to {path!r}: end the name with {', '.join(_ENDINGS)}")
    _require_own_export(path)
    table = DecisionTable(gallery.path)
    rows = drop_repeated(conform_rows(table.read())).sort_by("decision_id").select(COLUMNS)
    with write_output(path, "file") as unfinished:
        if path.lower().endswith(".parquet"):
            pq.write_table(rows, unfinished, compression="zstd")
        elif path.lower().endswith(".csv"):
            with open(unfinished, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                writer.writerows(_to_cells(row) for row in _iterate_rows(rows))
        else:
            with open(unfinished, "w", encoding="utf-8") as file:
                file.write(json.dumps({HEADER: FORMAT, "gallery": gallery.id, "table_version": gallery.version}) + "\n")
                file.writelines(f"{json.dumps(to_json(row), ensure_ascii=False)}\n" for row in _iterate_rows(rows))
    return int(rows.num_rows)


def _iterate_rows(rows: Any) -> Iterator[dict[str, Any]]:
    for batch in rows.to_batches(_BATCH_ROWS):
        yield from batch.to_pylist()


def to_json(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table as the JSON lines file has it: ids are texts, and what is null is left out."""
    values = {name: value for name, value in row.items() if value is not None}
    for name in _IDS:
        if name in values:
            values[name] = str(values[name])
    for name in ("decided_at", "added_at"):
        if name in values:
            values[name] = values[name].isoformat().replace("+00:00", "Z")
    if "decided_at" in values:
        values["when"] = values.pop("decided_at")
    return values


def _to_cells(row: dict[str, Any]) -> list[str]:
    values = to_json(row)
    values["decided_at"] = values.get("when")
    cells = []
    for name in COLUMNS:
        value = values.get(name)
        if value is None:
            cells.append("")
        else:
            cells.append(json.dumps(value) if name in _LISTS else protect_cell(str(value)))
    return cells


def _require_own_export(path: str) -> None:
    """Require of a path that it is free, or holds an export of ours."""
    if not storage.file_exists(path):
        return
    start = b""
    with storage.open_seekable(path) as file:
        start = file.read(4096)
        is_own = start.startswith((b'{"' + HEADER.encode(), ",".join(COLUMNS).encode()))
        if start.startswith(b"PAR1"):
            file.seek(0)
            try:
                is_own = pq.read_schema(file).names == list(COLUMNS)
            except (OSError, ValueError) as error:
                raise StorageError(f"cannot read {path!r}: {storage.describe_error(error)}") from error
    if start and not is_own:
        raise ConfigError(f"{path!r} exists and is no export of decisions: choose another name")
