"""GPUs that fail, on Ray. The nodes say that they have GPUs; the stages fail as a library does if one is broken."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from ray_nodes import Cluster, cluster, connect

from facepipe.errors import DeviceError
from facepipe.gallery.commits.parts import PartRecord
from facepipe.schema import WORK_ITEM
from facepipe.sources.blocks import Block
from pipelines.runtime.crash_marks import CrashMarks, inherit_crash_marks
from pipelines.runtime.plan import STAGES, WorkerGroup, WorkerPlan
from pipelines.runtime.runners import ray as ray_runner
from pipelines.runtime.worker import WorkerJob

pytestmark = pytest.mark.slow

FAULT = "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"
RUN = "20260101T000000-abcdef"
PLAN = WorkerPlan((WorkerGroup(STAGES, 2, 1, 1),))  # two workers, a CPU and a GPU each


@pytest.fixture(scope="module")
def node() -> Iterator[Cluster]:
    with cluster((3,), gpus=2) as made:
        yield made
    assert not made.processes()


@pytest.fixture
def connected(node: Cluster) -> Iterator[Cluster]:
    with connect(node):
        yield node


def make_stage(sick: tuple[str, ...]) -> Any:
    """Make a stage on a GPU that fails on the GPUs of some numbers. Its class travels to the workers with its code."""

    @dataclass(frozen=True)
    class Faulty:
        sick: tuple[str, ...]
        message: str
        device: str = "cuda"
        needs: ClassVar = ()
        adds: ClassVar = ()

        def setup(self) -> None:
            pass

        def __call__(self, table: pa.Table) -> pa.Table:
            import os
            import time

            from facepipe.gallery.commits.parts import make_status_rows

            number = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
            if self.device != "cpu" and number in self.sick:
                raise RuntimeError(self.message)
            time.sleep(0.05)  # so that one worker does not take all blocks
            return make_status_rows(table, "no_face", f"{self.device} {number}")

    return Faulty(sick, FAULT)


def run(stage: Any, folder: Path, images: int = 4) -> list[PartRecord]:
    """Run a stage on 12 blocks."""
    (folder / "faces").mkdir(exist_ok=True)
    marks = str(folder / "runs" / RUN)
    job = WorkerJob((stage,), 16, True, RUN, "source", str(folder / "faces"), marks, devices=2)
    listed = [
        Block(n, pa.Table.from_pylist([{"uri": f"{n}-{k}", "path": b"x"} for k in range(images)], schema=WORK_ITEM))
        for n in range(12)
    ]
    return list(ray_runner.run(lambda: iter(listed), [job], PLAN))


def test_gpus_that_always_fail_end_the_run_with_their_error(connected: Cluster, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=FAULT):
        run(make_stage(("0", "1")), tmp_path, images=200)
    assert list((tmp_path / "faces").iterdir()) == []
    # No later run takes an image for a suspect.
    runs = str(tmp_path / "runs")
    inherit_crash_marks(runs, "20260102T000000-abcdef")
    assert set(CrashMarks(f"{runs}/20260102T000000-abcdef/Faulty").suspects.values()) <= {0}


def test_one_gpu_that_fails_is_left_out(connected: Cluster, tmp_path: Path) -> None:
    records = run(make_stage(("1",)), tmp_path)
    assert sum(record.images for record in records) == 48
    assert sum(record.statuses["no_face"] for record in records) == 48
