"""Run on Ray Data: blocks stream out of one listing task, pass through pools of actors, and records come back.

Only blocks of work items travel, and in a split plan the rows that the first group made of them. Ray retries the block
of a lost actor forever; the crash marks in the gallery keep one image from causing that again and again.

A node may fail. The blocks of its actors wait until the others have emptied the queue and made room, or until a new
node has come, and are processed then. The listing runs on the driver's node: if that fails, the run ends anyway.
"""

import logging
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pyarrow as pa

from facepipe.errors import ConfigError, DeviceError, FacepipeError, SourceError, WorkerError
from facepipe.gallery.commits.parts import PartRecord
from facepipe.hashing import hash64
from facepipe.sources.blocks import Block, decode_block, encode_block
from pipelines.runtime import ray_metrics
from pipelines.runtime.device_health import DeviceFaultError
from pipelines.runtime.plan import Resources, WorkerPlan
from pipelines.runtime.worker import DEVICE_FAULT_CODE, BlockWorker, WorkerJob

# A block as a row of a Ray dataset.
_ROW = pa.schema(
    [
        ("items", pa.binary()),
        ("rows", pa.large_binary()),
        ("number", pa.int64()),
        ("skipped", pa.int64()),
        ("repeated", pa.int64()),
        ("ignored", pa.int64()),
        ("erased", pa.int64()),
        ("last", pa.bool_()),
        ("relabelled", pa.binary()),
        ("notes", pa.list_(pa.string())),
    ]
)
_LOCAL_OBJECT_STORE = 512 << 20  # bytes
_FINGERPRINT_BYTES = 8  # per block


def start() -> Resources:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray on this machine.

    Returns:
        CPUs and GPUs of the cluster.
    """
    import ray

    # What these loggers report as errors is raised here too.
    for name in ("ray.data._internal", "ray.data.exceptions"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not ray.is_initialized():
        _initialise()
    # A worker fits on every node with a GPU if it requests no more CPUs per GPU than the node with the fewest has.
    cluster = ray.cluster_resources()
    gpu_nodes = [node for node in _list_nodes() if node.get("GPU", 0) >= 1]
    cpus_per_gpu = min((int(node.get("CPU", 0) // node["GPU"]) for node in gpu_nodes), default=None)
    return Resources(int(cluster.get("CPU", 1)), int(cluster.get("GPU", 0)), cpus_per_gpu)


def _initialise() -> None:
    """Initialise Ray without its output, and keep this process's handler of SIGTERM."""
    import ray

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # A local start gets a small object store: only blocks of work items travel through it.
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        options |= {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE}
    handler = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler ends the process at once.
        signal.signal(signal.SIGTERM, handler)


def stop() -> None:
    """Disconnect from the cluster. If `start` started Ray, this ends it."""
    import ray

    ray.shutdown()


def run(blocks: Callable[[], Iterable[Block]], jobs: list[WorkerJob], plan: WorkerPlan) -> Iterator[PartRecord]:
    """Yield the records of blocks as they are finished.

    Args:
        blocks: lists the blocks; it is called on this node.
        jobs: what the workers of each group run.
        plan: groups of workers.

    Raises:
        FacepipeError: A worker raised it.
        WorkerError: Ray failed in another way.
    """
    import ray.data
    from ray.exceptions import RayError

    # The listing runs in one task on this node, without a CPU of its own, so that it can start at once.
    driver_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="facepipe-") as folder:
        warnings.simplefilter("ignore", DeprecationWarning)
        _configure_ray_data()
        listing = _create_datasource(blocks, os.path.join(folder, "listed"))
        data = ray.data.read_datasource(listing, override_num_blocks=1, num_cpus=0, label_selector=driver_node)
        # Each group of workers is a pool of actors, and a row of its input is one block.
        for job, group in zip(jobs, plan.groups, strict=True):
            data = data.map_batches(
                _BlockActor,
                fn_constructor_args=(job,),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=group.workers),
                num_cpus=group.cpus,
                num_gpus=group.gpus or None,
            )
        try:
            for row in data.iter_rows():
                yield PartRecord.from_json(row["record"])
        except RayError as error:
            raise _find_cause(error) or WorkerError(f"Ray failed: {_get_last_line(error)}") from error


def _find_cause(error: BaseException) -> FacepipeError | None:
    """Find the error of facepipe that Ray wrapped in its own."""
    cause: Any = getattr(error, "cause", None)
    while cause is not None and not isinstance(cause, FacepipeError):
        cause = getattr(cause, "cause", None) or cause.__cause__
    return cause


def choose_device(requested: str, resources: Resources) -> str:
    """Choose the device of a task. A task on a GPU sees that GPU alone, as `cuda`.

    Args:
        requested: auto, cpu, cuda or cuda:N.
        resources: what Ray has.

    Raises:
        ConfigError: A GPU is requested, and Ray has none.
    """
    if requested not in ("auto", "cpu") and not resources.gpus:
        raise ConfigError(f"run.device={requested}, but Ray has no GPU: remove it, or set run.device=cpu")
    return "cuda" if requested != "cpu" and resources.gpus else "cpu"


def run_tasks(
    function: Callable[[Any], Any], items: Iterable[Any], cpus: float, gpus: float = 0
) -> Iterator[tuple[Any, Any]]:
    """Run a function on items, each in a Ray task. A few more tasks are submitted than can run at a time.

    Args:
        function: function of an item.
        items: the items.
        cpus: CPUs per task. It is limited to what a node has, because Ray would wait forever for a larger node.
        gpus: GPUs per task.

    Yields:
        Item and result, in the order in which tasks finish.

    Raises:
        FacepipeError: The function raised it.
        WorkerError: Ray failed in another way.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    # Limit the request to the largest node, and keep twice as many tasks submitted as can run.
    node_cpus = (node.get("CPU", 0) for node in _list_nodes() if node.get("GPU", 0) >= gpus)
    cpus = min(cpus, max(node_cpus, default=0) or cpus)
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(function)
    max_submitted = 2 * max(1, int(ray.cluster_resources().get("CPU", 1) // cpus))
    waiting = iter(items)
    submitted: dict[Any, Any] = {}
    while True:
        # Submit tasks up to the limit, then wait for one of them to finish.
        for item in islice(waiting, max_submitted - len(submitted)):
            submitted[remote.remote(item)] = item
        if not submitted:
            return
        for reference in ray.wait(list(submitted))[0]:
            try:
                yield submitted.pop(reference), ray.get(reference)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, FacepipeError) else error from None
            except RayError as error:
                # Its worker or node failed, and so did those of the retries.
                raise WorkerError(f"Ray failed: {_get_last_line(error)}") from error


def _list_nodes() -> list[dict[str, float]]:
    """List the resources of each node that is up."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _configure_ray_data() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    # One row is one block of work: without this Ray would gather rows until they fill 128 MiB.
    context.target_max_block_size = 1
    context.print_on_execution_start = False


class RepeatableListing:
    """Blocks that must be the same if they are listed again.

    If the listing's process fails, Ray lists from the start, and leaves out as many blocks as it has. If these were cut
    differently now, images would come twice or never.
    """

    def __init__(self, blocks: Callable[[], Iterable[Block]], journal: str):
        """Make a listing.

        Args:
            blocks: lists the blocks.
            journal: file for the fingerprint of every block.
        """
        self._blocks = blocks
        self._journal = journal

    def __call__(self) -> Iterator[Block]:
        """Yield the blocks.

        Raises:
            SourceError: A block differs from what was listed before.
        """
        with open(self._journal, "ab+", buffering=0) as file:
            file.seek(0)
            known = file.read()
            # The last fingerprint may be cut short.
            known = known[: len(known) // _FINGERPRINT_BYTES * _FINGERPRINT_BYTES]
            file.truncate(len(known))
            # Compare each block with the journal as far as that reaches, and append the fingerprints of the others.
            for n, block in enumerate(self._blocks()):
                fingerprint = _compute_fingerprint(block)
                start = n * _FINGERPRINT_BYTES
                if start >= len(known):
                    file.write(fingerprint)
                elif known[start : start + _FINGERPRINT_BYTES] != fingerprint:
                    raise SourceError(
                        "the source changed after the process that listed it had failed, so the listing cannot be "
                        "resumed. Committed work is kept: run the same command again"
                    )
                yield block


def _compute_fingerprint(block: Block) -> bytes:
    """Compute a hash of a block's images, and of whether it is the last."""
    return hash64(str(block.last), *block.items["uri"].to_pylist()).to_bytes(_FINGERPRINT_BYTES, "little")


def _create_datasource(blocks: Callable[[], Iterable[Block]], journal: str) -> Any:
    """Create a datasource with one read task, which streams the listing and pauses if workers are behind."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    # The task pauses at each yield until there is room, so that the listing stays only a few blocks ahead.
    def read_rows() -> Iterator[pa.Table]:
        for block in RepeatableListing(blocks, journal)():
            yield pa.Table.from_pylist([encode_block(block)], schema=_ROW)

    class Listing(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(read_rows, metadata)]

    return Listing()


class _BlockActor:
    """A BlockWorker in a Ray actor."""

    def __init__(self, job: WorkerJob):
        self._worker = BlockWorker(job)
        self._error: DeviceError | None = None
        try:
            with _end_after_device_fault():
                self._worker.setup()
        except DeviceError as error:
            # Ray would start an actor again whose constructor raises.
            self._error = error

    def __call__(self, table: pa.Table) -> pa.Table:
        if self._error is not None:
            raise self._error
        (row,) = table.to_pylist()
        with _end_after_device_fault():
            result = self._worker(decode_block(row))
        if isinstance(result, PartRecord):
            ray_metrics.count_block(result)
            return pa.table({"record": [result.to_json()]})
        return pa.Table.from_pylist([encode_block(result)], schema=_ROW)


@contextmanager
def _end_after_device_fault() -> Iterator[None]:
    """End this process if its GPU fails. Ray starts the actor again, and gives its block to another one."""
    try:
        yield
    except DeviceFaultError:
        os._exit(DEVICE_FAULT_CODE)


def _get_last_line(error: BaseException) -> str:
    """Return the last line of an error's text, or its type if it has no text."""
    # The text of these errors is a traceback; its last line says what happened.
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
