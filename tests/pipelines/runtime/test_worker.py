"""A worker's behaviour where no GPU is at hand to fail."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest

from facepipe.hashing import hash64
from facepipe.schema import WORK_ITEM
from facepipe.sources.blocks import Block
from pipelines.runtime.worker import BlockWorker, WorkerJob


class Ended(BaseException):
    """Stands for the end of the process."""


@dataclass(frozen=True)
class Faulty:
    """A stage on a device that fails."""

    error: type[Exception]
    device: str = "cuda"
    needs: ClassVar = ()
    adds: ClassVar = ()

    def setup(self) -> None:
        pass

    def __call__(self, table: pa.Table) -> pa.Table:
        raise self.error("unspecified launch failure")


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


def worker(error: type[Exception], folder: Path) -> BlockWorker:
    return BlockWorker(WorkerJob((Faulty(error),), 4, False, "run", "source", str(folder), str(folder / "marks")))


def block(n: int) -> Block:
    return Block(7, pa.Table.from_pylist([{"uri": str(k), "path": b"x"} for k in range(n)], schema=WORK_ITEM))


def test_after_a_device_fault_the_process_ends_and_its_mark_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(code: int) -> None:
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended):
        worker(RuntimeError, tmp_path)(block(3))
    assert [mark.name for mark in (tmp_path / "marks").rglob("*-*")] == ["block-7"]
    with pytest.raises(Ended):
        worker(RuntimeError, tmp_path)(block(3))
    assert sorted(mark.name for mark in (tmp_path / "marks").rglob("*-*")) == ["block-7", f"image-{hash64('0'):016x}"]


def test_running_out_of_device_memory_is_no_fault(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError):
        worker(OutOfMemoryError, tmp_path)(block(3))  # alone they fail as well: not the images' fault
