"""A worker whose GPU fails: the run is told, once; no image is to blame. No GPU is at hand: stages stand for it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from helpers import embed

from facepipe.errors import DeviceError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.parts import PartRecord
from facepipe.hashing import hash64
from facepipe.models.runtime.device import find_device_fault
from facepipe.schema import WORK_ITEM
from facepipe.sources.blocks import Block
from pipelines.embed import pipeline as embed_pipeline
from pipelines.runtime.crash_marks import CrashMarks, inherit_crash_marks
from pipelines.runtime.device_health import DeviceFaultError, DeviceHealth
from pipelines.runtime.plan import STAGES, WorkerGroup, WorkerPlan
from pipelines.runtime.runners import inline, local
from pipelines.runtime.worker import BlockWorker, WorkerJob

FAULT = "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


@dataclass(frozen=True)
class Faulty:
    """A stage on a device. GPUs of some numbers fail, at setup or at every call; images of some names make any fail.

    Its rows are those of failed images, which a gallery takes without faces.
    """

    message: str = FAULT
    kind: type[Exception] = RuntimeError
    sick: tuple[str, ...] = ("0", "1")
    fails_at: str = "call"
    fatal: tuple[str, ...] = ()
    status: str = "no_face"
    device: str = "cuda"
    needs: ClassVar = ()
    adds: ClassVar = ()

    def setup(self) -> None:
        if self.fails_at == "setup":
            self._use_device()

    def __call__(self, table: pa.Table) -> pa.Table:
        if self.fails_at == "call":
            self._use_device()
        if self.device != "cpu" and set(self.fatal) & set(table["uri"].to_pylist()):
            raise self.kind(self.message)
        from facepipe.gallery.commits.parts import make_status_rows

        return make_status_rows(table, self.status, self.device)

    def _use_device(self) -> None:
        if self.device != "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES", "0") in self.sick:
            raise self.kind(self.message)


def make_job(stage: Faulty, folder: Path, devices: int = 1) -> WorkerJob:
    (folder / "faces").mkdir(exist_ok=True)
    return WorkerJob(
        stages=(stage,),
        batch=4,
        writes=True,
        run="20260101T000000-abcdef",
        source="source",
        faces_folder=str(folder / "faces"),
        marks_folder=str(folder / "runs" / "20260101T000000-abcdef"),
        devices=devices,
    )


def make_block(number: int, uris: list[str], *, last: bool = True) -> Block:
    rows = [{"uri": uri, "path": b"x"} for uri in uris]
    return Block(number, pa.Table.from_pylist(rows, schema=WORK_ITEM), last=last)


def run_with_new_workers(job: WorkerJob, block: Block, *, most: int = 20) -> tuple[PartRecord, int]:
    """Run a block as a runner does: a new worker after each fault. Return the record and the number of faults."""
    for faults in range(most):
        try:
            worker = BlockWorker(job)
            worker.setup()
            record = worker(block)
            assert isinstance(record, PartRecord)
            return record, faults
        except DeviceFaultError:
            pass
    raise AssertionError("the workers come to no end")


def list_marks(folder: Path) -> list[str]:
    return sorted(mark.name for mark in folder.rglob("*-*") if mark.is_file())


@pytest.mark.parametrize("fails_at", ["setup", "call"])
def test_a_gpu_that_always_fails_stops_the_run_with_its_error(fails_at: str, tmp_path: Path) -> None:
    job = make_job(Faulty(fails_at=fails_at), tmp_path)
    block = make_block(7, [str(n) for n in range(20)])
    with pytest.raises(DeviceError, match=FAULT) as error:
        run_with_new_workers(job, block, most=5)  # as few for 20 images as for 4,096
    assert "CUDA_VISIBLE_DEVICES=" in str(error.value)
    assert list((tmp_path / "faces").iterdir()) == []
    # No later run takes an image for a suspect.
    runs = str(tmp_path / "runs")
    inherit_crash_marks(runs, "20260102T000000-abcdef")
    assert set(CrashMarks(f"{runs}/20260102T000000-abcdef/Faulty").suspects.values()) <= {0}


def test_broken_files_between_faults_are_no_success(tmp_path: Path) -> None:
    """Images that never reach the GPU say nothing about it."""

    @dataclass(frozen=True)
    class Files(Faulty):
        def __call__(self, table: pa.Table) -> pa.Table:
            if all(int(uri) % 2 for uri in table["uri"].to_pylist()):
                from facepipe.gallery.commits.parts import make_status_rows

                return make_status_rows(table, "decode_error", "broken")
            return super().__call__(table)

    with pytest.raises(DeviceError):
        run_with_new_workers(make_job(Files(), tmp_path), make_block(0, [str(n) for n in range(30)]))


def test_an_image_at_which_a_sound_gpu_fails_is_crashed_alone(tmp_path: Path) -> None:
    job = make_job(Faulty(sick=(), fatal=("3", "4")), tmp_path)
    record, faults = run_with_new_workers(job, make_block(0, [str(n) for n in range(9)]))
    assert faults == 3
    assert record.statuses == {"no_face": 7, "crashed": 2}


def test_another_gpu_tries_the_image_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(Faulty(sick=("0",)), tmp_path, devices=2)
    block = make_block(0, ["a", "b"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for _ in range(2):
        worker = BlockWorker(job)
        worker.setup()
        with pytest.raises(DeviceFaultError):
            worker(block)
    assert f"image-{hash64('a'):016x}" in list_marks(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    record, faults = run_with_new_workers(job, block)
    assert (record.statuses, faults) == ({"no_face": 2}, 0)


@pytest.mark.parametrize(
    ("error", "is_fault"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_MAPPING_ERROR"), True),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False),
        (OutOfMemoryError("CUDA out of memory"), False),
        (KeyError("pixels"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
    ids=str,
)
def test_only_what_the_device_says_is_its_fault(error: Exception, is_fault: bool) -> None:
    assert (find_device_fault(error) is not None) is is_fault
    wrapped = ValueError("the graph does not take chips")
    wrapped.__cause__ = error
    assert (find_device_fault(wrapped) is error) is is_fault


@pytest.mark.parametrize("kind", [OutOfMemoryError, KeyError])
def test_other_errors_end_no_worker(kind: type[Exception], tmp_path: Path) -> None:
    stage = Faulty(sick=(), fatal=("2",), kind=kind, message="too much")
    record, faults = run_with_new_workers(make_job(stage, tmp_path), make_block(0, ["1", "2", "3"]))
    assert (record.statuses, faults) == ({"no_face": 2, "crashed": 1}, 0)
    # If alone all of them fail, the images are not to blame.
    with pytest.raises(kind):
        run_with_new_workers(make_job(Faulty(kind=kind, message="too much"), tmp_path), make_block(1, ["1", "2", "3"]))


def test_the_process_of_a_notebook_is_never_ended(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=FAULT):
        list(inline.run(lambda: [make_block(0, ["a"])], make_job(Faulty(), tmp_path)))


@pytest.mark.slow
def test_a_pool_of_processes_stops_with_the_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = make_job(Faulty(fails_at="setup"), tmp_path, devices=2)
    with pytest.raises(DeviceError, match=FAULT):
        list(local.run(lambda: [make_block(0, ["a", "b"])], job, WorkerGroup(STAGES, 2, 1, 1)))
    assert FAULT in capfd.readouterr().err
    assert list((tmp_path / "faces").iterdir()) == []


def test_a_sick_gpu_among_sound_ones_is_left_out(tmp_path: Path) -> None:
    job = make_job(Faulty(sick=("1",)), tmp_path, devices=2)

    def list_blocks() -> Iterator[Block]:
        for number in range(6):
            yield make_block(number, [f"{number}-{n}" for n in range(3)], last=number == 5)

    records = list(local.run(list_blocks, job, WorkerGroup(STAGES, 2, 1, 1)))
    assert sorted(record.block for record in records) == list(range(6))
    assert sum(record.statuses["no_face"] for record in records) == 18


def test_a_gpu_waits_to_hear_of_the_others(tmp_path: Path) -> None:
    first = DeviceHealth(str(tmp_path), "first", devices=2)
    second = DeviceHealth(str(tmp_path), "second", devices=2)
    for _ in range(3):
        first.add_failure(RuntimeError(FAULT))
    assert DeviceHealth(str(tmp_path), "first", devices=2).is_failing
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            second.add_success()

    first.require_other(wait)
    assert len(waits) == 3
    for _ in range(3):
        second.add_failure(RuntimeError(FAULT))
    with pytest.raises(DeviceError):
        first.require_other(wait)
    assert len(waits) == 3
    # One that never tells does not keep the run waiting for ever.
    (tmp_path / "alone").mkdir()
    alone = DeviceHealth(str(tmp_path / "alone"), "alone", devices=8, wait_seconds=0)
    with pytest.raises(DeviceError):
        alone.require_other()


def test_a_gallery_of_a_failed_run_marks_nothing(
    drawings: Path, tmp_path: Path, fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command on one GPU that fails, then on CPUs."""

    def build_stages(self: Any, group: WorkerGroup) -> tuple[Any, ...]:
        return (*original(self, group)[:2], Faulty())

    original = embed_pipeline.EmbedConfig.build_stages
    monkeypatch.setattr(embed_pipeline.EmbedConfig, "build_stages", build_stages)
    monkeypatch.setattr(embed_pipeline, "make_plan", lambda *_: WorkerPlan((WorkerGroup(STAGES, 1, 1, 1),)))
    for _ in range(3):
        with pytest.raises(DeviceError, match=FAULT):
            embed(drawings, tmp_path / "g", fakes, runner="inline")
    monkeypatch.undo()
    summary = embed(drawings, tmp_path / "g", fakes, runner="inline")
    assert (summary.statuses.get("crashed", 0), summary.skipped) == (0, 0)
    assert Gallery(str(tmp_path / "g")).counts().get("crashed", 0) == 0
