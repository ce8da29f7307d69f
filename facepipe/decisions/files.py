"""Files of decisions: JSON lines, CSV and Parquet, read row by row. A bad row is named, and the others are read.

Of a file's content only a batch of rows or one line is held at a time. CSV files may also be the list `relabel.csv`
that `facepipe clean` writes, and Parquet files its `decisions.parquet`.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.decisions.clean_lists import is_clean_list, read_clean_row
from facepipe.decisions.rows import PROPOSED, WrittenRow
from facepipe.errors import ConfigError, StorageError
from facepipe.text import restore_cell

HEADER = "facepipe_decisions"
"""Name of the first value of a header line; the value is the version of the format."""
FORMAT = 1
COLUMNS = (*(name for name in PROPOSED.names if name != "place"), "when", "path", "other_path")
"""Names that a row may have."""

_MAX_LINE = 1 << 20
_BATCH_ROWS = 8192
_MAX_SOURCE = 1000
# What numbers mean that JSON does not know.
_NO_NUMBERS = {"NaN", "Infinity", "-Infinity"}
_PARQUET = b"PAR1"
_BOM = b"\xef\xbb\xbf"


def iterate_file(path: str, at_least: float | None = None) -> Iterator[WrittenRow]:
    """Iterate over the rows of a file of decisions, whose kind its content says.

    Args:
        path: path or URL.
        at_least: of a list that `facepipe clean` made, only rows of at least this probability.

    Raises:
        ConfigError: it is not a file of decisions.
        StorageError: it cannot be read.
    """
    name = os.path.basename(path.rstrip("/"))
    try:
        with storage.open_seekable(path) as file:
            start = file.read(_MAX_LINE).removeprefix(_BOM).lstrip()
            file.seek(0)
            if start.startswith(_PARQUET):
                yield from _iterate_parquet(file, path, name, at_least)
            elif start.startswith(b"{"):
                yield from _iterate_json_lines(file, name)
            elif start.startswith(b"["):
                raise ConfigError(f"{path!r} is a JSON list: write one object per line, as `jq -c '.[]'` does")
            elif start or not path.lower().endswith((".jsonl", ".json", ".ndjson")):
                yield from _iterate_csv(file, path, name, at_least)
    except OSError as error:
        raise StorageError(f"cannot read {path!r}: {storage.describe_error(error)}") from error


def _iterate_lines(file: BinaryIO) -> Iterator[tuple[int, str | None, str]]:
    """Iterate over lines: number, text, and why there is no text. A line that is too long is passed over in pieces."""
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        is_long = len(line) == _MAX_LINE and not line.endswith(b"\n")
        while is_long and (more := file.readline(_MAX_LINE)) and not more.endswith(b"\n"):
            pass
        if is_long:
            yield number, None, f"the line is longer than {_MAX_LINE} bytes"
            continue
        try:
            yield number, (line.removeprefix(_BOM) if number == 1 else line).decode(), ""
        except UnicodeDecodeError:
            yield number, None, "the line is not UTF-8"


# ---- JSON lines


def _iterate_json_lines(file: BinaryIO, name: str) -> Iterator[WrittenRow]:
    for number, line, reason in _iterate_lines(file):
        place = f"{name}:{number}"
        if line is None:
            yield WrittenRow(place, None, name, reason)
            continue
        if not line.strip():
            continue
        try:
            values = json.loads(line, parse_constant=_refuse_constant)
        except RecursionError:
            yield WrittenRow(place, None, name, "the line is nested too deeply")
            continue
        except ValueError as error:
            yield WrittenRow(place, None, name, f"the line is not JSON: {error}")
            continue
        if isinstance(values, dict) and HEADER in values:
            if values[HEADER] != FORMAT:
                version = str(values[HEADER])[:20]
                yield WrittenRow(place, None, name, f"a file of format {version!r}, which a newer facepipe reads")
                return
            continue
        yield _make_row(place, values, name)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _make_row(place: str, values: Any, name: str) -> WrittenRow:
    """Make a row; the source that an export names stays."""
    if isinstance(values, Mapping) and (values.get("source") or values.get("decision_id")):
        own = values.get("source")
        name = own if isinstance(own, str) and len(own) < _MAX_SOURCE else ""
    return WrittenRow(place, values, name)


# ---- CSV


def _iterate_csv(file: BinaryIO, path: str, name: str, at_least: float | None) -> Iterator[WrittenRow]:
    numbered = _iterate_lines(file)
    first = next(numbered, (1, "", ""))
    header_line = first[1] or ""
    # European spreadsheets write semicolons.
    delimiter = max(",;\t", key=header_line.count)
    header = [cell.strip().lower() for cell in next(csv.reader([header_line], delimiter=delimiter), [])]
    is_clean = "decision" not in header and is_clean_list(header)
    if "decision" not in header and not is_clean:
        raise ConfigError(
            f"{path!r} is no list of decisions: it has no column `decision` ({', '.join(header)[:200] or 'none'}). "
            "facepipe reads JSON lines, CSV and Parquet with the columns of docs/reports.md, and relabel.csv"
        )
    unreadable: list[tuple[int, str]] = []
    line_number = [first[0]]

    def iterate_texts() -> Iterator[str]:
        for number, line, reason in numbered:
            line_number[0] = number
            if line is None:
                unreadable.append((number, reason))
            else:
                yield line

    reader = csv.reader(iterate_texts(), delimiter=delimiter)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield WrittenRow(f"{name}:{line_number[0]}", None, name, f"the rest of the file is not CSV: {error}")
            return
        for number, reason in unreadable:
            yield WrittenRow(f"{name}:{number}", None, name, reason)
        unreadable.clear()
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield from _read_cells(
                f"{name}:{line_number[0]}", header, cells, name, at_least if is_clean else None, is_clean
            )


def _read_cells(
    place: str, header: list[str], cells: list[str], name: str, at_least: float | None, is_clean: bool
) -> Iterator[WrittenRow]:
    if len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
        yield WrittenRow(place, None, name, f"{len(cells)} cells, and the header has {len(header)}")
        return
    # A spreadsheet's formulas were made text when the list was written.
    values: dict[str, Any] = {key: restore_cell(cell) for key, cell in zip(header, cells, strict=False)}
    if not is_clean:
        yield _make_row(place, values, name)
        return
    row = read_clean_row({"decision": "relabel", **values}, at_least)
    if isinstance(row, str):
        yield WrittenRow(place, None, name, row)
    elif row is not None:
        yield WrittenRow(place, row, name)


# ---- Parquet


def _iterate_parquet(file: BinaryIO, path: str, name: str, at_least: float | None) -> Iterator[WrittenRow]:
    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        is_clean = "decision_id" not in names and is_clean_list(names)
        if "decision" not in names and not is_clean:
            raise ConfigError(
                f"{path!r} is no table of decisions: it has no column `decision` ({', '.join(names)[:200]})"
            )
        number = 0
        columns = names if is_clean else [column for column in names if column in COLUMNS]
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=columns):
            for values in batch.to_pylist():
                number += 1
                place = f"{name}, row {number}"
                row = read_clean_row(values, at_least) if is_clean else values
                if isinstance(row, str):
                    yield WrittenRow(place, None, name, row)
                elif row is not None:
                    yield _make_row(place, row, name)
    except (pa.ArrowException, ValueError) as error:
        raise StorageError(f"cannot read {path!r}: {storage.describe_error(error)}") from error
