"""Pools of workers on Ray: they grow onto a node that joins late, and survive constructors that fail."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray_nodes import Cluster, cluster, connect

from facepipe.errors import ModelError, WorkerError
from facepipe.gallery.commits.parts import PartRecord
from facepipe.schema import NO_FACE, WORK_ITEM
from facepipe.sources.blocks import Block, compute_digest
from pipelines.runtime.plan import STAGES, WorkerGroup, WorkerPlan
from pipelines.runtime.runners import ray as ray_runner
from pipelines.runtime.worker import WorkerJob

pytestmark = pytest.mark.slow

LIMIT = 200
PLAN = WorkerPlan((WorkerGroup(STAGES, 1, 1),))


@pytest.fixture(scope="module")
def one_node() -> Iterator[Cluster]:
    with cluster((1,)) as made:
        yield made
    assert not made.processes()


@pytest.fixture
def connected(one_node: Cluster) -> Iterator[Cluster]:
    """Connect this process to a cluster of one node."""
    with connect(one_node):
        yield one_node


def make_stage(folder: Path, on_setup: Callable[[Path], None], on_call: Callable[[Path], None]) -> Any:
    """Make a stage of a local class, which travels with its code to workers that cannot import this module."""

    class Stage:
        needs = ()
        adds = ()

        def setup(self) -> None:
            on_setup(folder)

        def __call__(self, table: pa.Table) -> pa.Table:
            from facepipe.gallery.commits.parts import make_status_rows

            on_call(folder)
            return make_status_rows(table, NO_FACE, "")

    return Stage()


def run(stage: Any, folder: Path, plan: WorkerPlan = PLAN, blocks: int = 12) -> list[PartRecord]:
    """Run a stage on blocks of two images."""
    (folder / "faces").mkdir(exist_ok=True)
    job = WorkerJob((stage,), 16, True, "run", "source", str(folder / "faces"), str(folder / "marks"))
    listed = [
        Block(n, pa.Table.from_pylist([{"uri": f"{n}-{k}", "path": b"x"} for k in range(2)], schema=WORK_ITEM))
        for n in range(blocks)
    ]
    return list(ray_runner.run(lambda: iter(listed), [job], plan))


def wait_for(happens: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIMIT
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_pool_grows_onto_a_node_that_joins_late(connected: Cluster, tmp_path: Path) -> None:
    def note_and_wait(folder: Path) -> None:
        import time

        import ray

        (folder / f"node-{ray.get_runtime_context().get_node_id()}").touch()
        while not (folder / "go").exists():
            time.sleep(0.05)

    stage = make_stage(tmp_path, lambda folder: None, note_and_wait)
    records: list[PartRecord] = []
    thread = threading.Thread(target=lambda: records.extend(run(stage, tmp_path)), daemon=True)
    thread.start()
    late = None
    try:
        wait_for(lambda: len(list(tmp_path.glob("node-*"))) == 1)
        late = connected.add(1)
        wait_for(lambda: len(list(tmp_path.glob("node-*"))) == 2)
    finally:
        (tmp_path / "go").touch()
        thread.join(LIMIT)
        if late is not None:
            late.kill()
    assert sum(record.images for record in records) == 24
    expected = [f"{n}-{k}" for n in range(12) for k in range(2)]
    assert sum(record.digest for record in records) % (1 << 64) == compute_digest(pa.array(expected))


def test_a_constructor_that_fails_is_tried_again(connected: Cluster, tmp_path: Path) -> None:
    def fail_three_times(folder: Path) -> None:
        names = sum(name.startswith("setup") for name in os.listdir(folder))
        (folder / f"setup-{names}").touch()
        if names < 3:
            raise RuntimeError("CUDA error: out of memory")

    records = run(make_stage(tmp_path, fail_three_times, lambda folder: None), tmp_path, blocks=3)
    assert sum(record.images for record in records) == 6
    assert len(list(tmp_path.glob("setup-*"))) == 4


def test_a_constructor_that_always_fails_ends_the_run(connected: Cluster, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("a broken driver")

    with pytest.raises(WorkerError, match="a broken driver"):
        run(make_stage(tmp_path, fail, lambda folder: None), tmp_path, blocks=3)


def test_an_error_of_facepipe_is_reported_at_once(connected: Cluster, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        names = sum(name.startswith("setup") for name in os.listdir(folder))
        (folder / f"setup-{names}").touch()
        raise ModelError("no such file: model.onnx")

    with pytest.raises(ModelError, match=r"no such file: model\.onnx"):
        run(make_stage(tmp_path, fail, lambda folder: None), tmp_path, blocks=3)
    assert len(list(tmp_path.glob("setup-*"))) == 1
