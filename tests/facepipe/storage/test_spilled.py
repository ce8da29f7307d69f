"""Tables in temporary files: what is taken and sorted equals what Arrow does in memory, whatever the batches."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.errors import StorageError
from facepipe.storage import spilled
from facepipe.storage.spilled import sort_rows, spill_batches, take_rows

SCHEMA = pa.schema([("uri", pa.string()), ("side", pa.int8())])
WORDS = st.lists(st.tuples(st.none() | st.sampled_from(["a", "b", "ä", "", "z" * 40]), st.none() | st.integers(0, 1)))


def make_table(rows: list[tuple[str | None, int | None]], batch_rows: int) -> pa.Table:
    table = pa.Table.from_pylist([{"uri": uri, "side": side} for uri, side in rows], SCHEMA)
    return spill_batches(SCHEMA, table.to_batches(max_chunksize=batch_rows))


@settings(deadline=None)
@given(WORDS, st.integers(1, 5), st.data())
def test_rows_of_a_mapped_table(
    rows: list[tuple[str | None, int | None]], batch_rows: int, data: st.DataObject
) -> None:
    table = make_table(rows, batch_rows)
    assert table.to_pylist() == [{"uri": uri, "side": side} for uri, side in rows]
    at = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1))) if rows else [], np.int64)
    missing = np.array(data.draw(st.lists(st.booleans(), min_size=len(at), max_size=len(at))), bool)
    expected = table.combine_chunks().take(pa.array(at, mask=missing))
    assert take_rows(table, at, missing).equals(expected)
    assert take_rows(table, at).num_rows == len(at)


@settings(deadline=None)
@given(WORDS, st.integers(1, 5), st.integers(1, 3))
def test_the_order_of_rows_and_where_equal_ones_begin(
    rows: list[tuple[str | None, int | None]], batch_rows: int, block: int
) -> None:
    table = make_table(rows, batch_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spilled, "SPILLED_ROWS", block)
        order, is_new = sort_rows(table)
    keys = [("uri", "ascending"), ("side", "ascending")]
    sorted_rows = table.combine_chunks().take(pc.sort_indices(table, sort_keys=keys)).to_pylist()
    assert table.combine_chunks().take(pa.array(order)).to_pylist() == sorted_rows
    assert is_new.tolist() == [n == 0 or row != sorted_rows[n - 1] for n, row in enumerate(sorted_rows)]


def test_the_file_has_no_name_and_a_folder_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert make_table([("a", 0)], 1).num_rows == 1
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="TMPDIR"):
        make_table([("a", 0)], 1)
