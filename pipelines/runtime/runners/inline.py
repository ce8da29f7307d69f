"""Run everything in this process: for tests, notebooks and debugging."""

from collections.abc import Callable, Iterable, Iterator

from facepipe.errors import DeviceError
from facepipe.gallery.commits.parts import PartRecord
from facepipe.sources.blocks import Block
from pipelines.runtime.device_health import DeviceFaultError
from pipelines.runtime.worker import BlockWorker, WorkerJob


def run(blocks: Callable[[], Iterable[Block]], job: WorkerJob) -> Iterator[PartRecord]:
    """Yield the records of the blocks, in order.

    Raises:
        DeviceError: A GPU failed. Only a new process could try again.
    """
    # Load the models before the listing starts, so that a model that cannot be used is reported first.
    worker = BlockWorker(job)
    try:
        worker.setup()
        for block in blocks():
            record = worker(block)
            assert isinstance(record, PartRecord)
            yield record
    except DeviceFaultError as fault:
        raise DeviceError(f"the GPU fails: {fault}. No image was marked") from fault
