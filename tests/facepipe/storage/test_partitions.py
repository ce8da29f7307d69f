"""Tables in partitions: every row is in the partition of its key, in the order in which it came."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.errors import StorageError
from facepipe.storage import partitions
from facepipe.storage.partitions import (
    PartitionedTable,
    TableTask,
    count_partitions,
    find_ranges,
    list_tasks,
    run_tables_here,
    sample_bounds,
    spread_keys,
)

SCHEMA = pa.schema([("key", pa.int64()), ("name", pa.string())])
ROWS = st.lists(st.tuples(st.integers(-(1 << 63), (1 << 63) - 1), st.none() | st.text(max_size=3)), max_size=30)


def make_table(rows: list[tuple[int, str | None]]) -> pa.Table:
    return pa.Table.from_pylist([{"key": key, "name": name} for key, name in rows], SCHEMA)


@settings(deadline=None)
@given(st.lists(ROWS, max_size=4), st.integers(1, 9))
def test_rows_go_where_their_keys_say(parts: list[list[tuple[int, str | None]]], count: int) -> None:
    partitioned = PartitionedTable(SCHEMA, count)
    for n, rows in enumerate(parts):
        keys = np.array([key for key, _ in rows], np.int64)
        partitioned.append(make_table(rows), spread_keys(keys, count))
        # It may be read between two appends.
        partitioned.read(n % count)
    rows = [row for part in parts for row in part]
    home = spread_keys(np.array([key for key, _ in rows], np.int64), count)
    for number, table in enumerate(partitioned):
        expected = [{"key": key, "name": name} for (key, name), at in zip(rows, home, strict=True) if at == number]
        assert table.to_pylist() == expected
        assert partitioned.rows[number] == len(expected)
    # A step sees each partition that has rows once.
    found = dict(run_tables_here(lambda task, _: dict(task.tables), list_tasks(own=partitioned), None))
    assert sorted(found) == sorted(set(home.tolist()))


def test_keys_that_follow_each_other_are_spread_evenly() -> None:
    counts = np.bincount(spread_keys(np.arange(100_000), 7), minlength=7)
    assert counts.min() > 0.95 * counts.mean()


@settings(deadline=None)
@given(st.lists(st.text(alphabet="aäb/\U0001f600", max_size=4)), st.integers(1, 6))
def test_ranges_follow_the_order_of_texts(texts: list[str], count: int) -> None:
    values = pa.array(texts, pa.string())
    ranges = find_ranges(sample_bounds(values, count), values)
    assert ranges.max(initial=0) < count
    pairs = sorted(zip([text.encode() for text in texts], ranges.tolist(), strict=True))
    assert [at for _, at in pairs] == sorted(ranges.tolist())
    assert len(dict(pairs)) == len(set(pairs))


def test_partitions_follow_the_rows() -> None:
    rows = partitions.ROWS_PER_PARTITION
    assert [count_partitions(n) for n in (0, 1, rows, rows + 1, 10**9)] == [1, 1, 1, 2, 512]


def test_the_file_has_no_name_and_a_folder_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    partitioned = PartitionedTable(SCHEMA, 2)
    before = set(os.listdir("/proc/self/fd"))
    partitioned.add(1, make_table([(1, "a")]))
    assert partitioned.read(1).num_rows == 1
    assert os.listdir(tmp_path) == []
    table = partitioned.read(1)
    del partitioned
    # What was read stays. The file is closed with the last of it.
    assert table.to_pylist() == [{"key": 1, "name": "a"}]
    del table
    assert set(os.listdir("/proc/self/fd")) <= before
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(StorageError, match="Set TMPDIR"):
        PartitionedTable(SCHEMA, 1).add(0, make_table([(1, "a")]))


def test_a_task_has_the_tables_of_its_partition() -> None:
    left = PartitionedTable(SCHEMA, 3)
    right = PartitionedTable(SCHEMA, 3)
    left.add(1, make_table([(1, "a")]))
    right.add(2, make_table([(2, "b")]))
    tasks = list(list_tasks(left=left, right=right))
    assert [task.number for task in tasks] == [1, 2]
    assert isinstance(tasks[0], TableTask)
    assert [task.tables["left"].num_rows for task in tasks] == [1, 0]
