"""Batches are bounded in bytes: a few large images fill one, however many rows it might have."""

import os
import weakref
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pyarrow as pa
import pytest

from facepipe.schema import WORK_ITEM
from facepipe.sources import SourceConfig, open_source
from facepipe.stages import Chain, Decode, Read


class Keep:
    """A stage that notes its input: rows and bytes of pixels."""

    needs: ClassVar = ()
    adds: ClassVar = ()

    def __init__(self) -> None:
        self.tables: list[tuple[int, int]] = []

    def setup(self) -> None:
        pass

    def __call__(self, table: pa.Table) -> pa.Table:
        self.tables.append((table.num_rows, table["pixels"].nbytes))
        return table.select(["uri", "status"])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNGs of 3 MB decoded and some kB encoded, JPEGs that are reduced, and files that are no images."""
    folder = tmp_path_factory.mktemp("large")
    image = np.full((1000, 1000, 3), 90, np.uint8)
    for n in range(12):
        cv2.imwrite(str(folder / f"{n:02d}.png"), image)
    cv2.imwrite(str(folder / "large.jpg"), np.full((4000, 4000, 3), 90, np.uint8))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def list_items(folder: Path) -> pa.Table:
    items = [[*item, None] for item in open_source(SourceConfig(str(folder)))]
    columns = zip(*items, strict=True)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, WORK_ITEM, strict=True)], schema=WORK_ITEM)


@pytest.mark.parametrize(("budget", "most_rows"), [(3_000_000, 1), (7_000_000, 2), (10_000_000, 3)])
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_batch_holds_no_more_pixels_than_its_budget(budget: int, most_rows: int, ahead: int, large: Path) -> None:
    keep = Keep()
    items = list_items(large)
    result = Chain((Read(), Decode(), keep), batch=256, ahead=ahead, batch_bytes=budget)(items)
    assert result["uri"].to_pylist() == items["uri"].to_pylist()
    # Beside the pixels a column has some bytes of offsets.
    assert max(size for _, size in keep.tables) <= budget + 1000
    with_pngs = [rows for rows, size in keep.tables if size >= 3_000_000]
    assert max(with_pngs) <= most_rows + 2, "beside those whose pixels count for little or nothing"
    assert sum(rows for rows, _ in keep.tables) == items.num_rows


def test_a_batch_is_whole_if_it_fits(large: Path) -> None:
    keep = Keep()
    Chain((Read(), Decode(), keep), batch=256, batch_bytes=1 << 30)(list_items(large))
    assert [rows for rows, _ in keep.tables] == [15]


def test_the_estimate_is_what_decoding_gives(large: Path) -> None:
    table = Read()(list_items(large))
    decoded = Decode()(table)
    is_ok = [status == "ok" for status in decoded["status"].to_pylist()]
    sizes = [len(value.as_py()) for value in decoded["pixels"] if value.is_valid]
    assert is_ok.count(True) == 13
    assert [size for size, ok in zip(Decode().estimate_bytes(table), is_ok, strict=True) if ok] == sizes


def test_files_are_read_within_the_budget_too(tmp_path: Path) -> None:
    for n in range(10):
        (tmp_path / f"{n}.png").write_bytes(os.urandom(100_000))
    chain = Chain((Read(),), batch=256, batch_bytes=250_000)
    tables = list(chain.iterate(list_items(tmp_path)))
    assert [table.num_rows for table in tables] == [2] * 5
    assert chain.bytes["read"] >= 1_000_000


@pytest.mark.parametrize("parallel", [1, 3])
def test_few_tables_are_alive_at_a_time(parallel: int, large: Path) -> None:
    """Of a hundred tables, those in work and the ones that wait for them."""
    alive: set[int] = set()
    most = 0

    class Watch(Decode):
        def __call__(self, table: pa.Table) -> pa.Table:
            nonlocal most
            result = super().__call__(table)
            number = id(result)
            alive.add(number)
            weakref.finalize(result, alive.discard, number)
            most = max(most, len(alive))
            return result

    items = pa.concat_tables([list_items(large)] * 3)
    Chain((Read(), Watch(), Keep()), batch=1, ahead=2, parallel=parallel)(items)
    # One is queued, one waits to be, one is being made, and the others are in work or have just been.
    assert most <= 4 + parallel
