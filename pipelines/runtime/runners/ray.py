"""Ray Data: the listing streams out of one task that needs no CPU, blocks pass pools of actors, records come back.

Only blocks of work items travel (and, in a split plan, what the first group made of them). Ray retries a lost actor's
block for ever; the crash marks in the gallery see to it that one image cannot make use of that.

A node may die. Its actors' blocks wait until the others have emptied the queue and made room, or a new node has come,
and are done then. The listing runs on the driver's node, which the run does not outlive anyway.
"""

import logging
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from facepipe.errors import ConfigError, FacepipeError, SourceError, WorkerError
from facepipe.gallery.commits.parts import PartRecord
from facepipe.hashing import hash64
from facepipe.sources.blocks import Block, decode_block, encode_block
from pipelines.runtime import ray_metrics
from pipelines.runtime.plan import Resources, WorkerPlan
from pipelines.runtime.worker import BlockWorker, WorkerJob

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
    ]
)
_LOCAL_OBJECT_STORE = 512 << 20
_MARK = 8  # bytes that stand for a block


def start() -> Resources:
    """Connect to the cluster RAY_ADDRESS names, or start Ray on this machine; what it has."""
    import ray

    for name in ("ray.data._internal", "ray.data.exceptions"):  # what they report as errors is raised here as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not ray.is_initialized():
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
        if "RAY_ADDRESS" not in os.environ:
            options |= {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE}
        before = signal.getsignal(signal.SIGTERM)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**options)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own handler ends the process at once
    found = ray.cluster_resources()
    with_gpus = [node for node in _nodes() if node.get("GPU", 0) >= 1]
    beside = min((int(node.get("CPU", 0) // node["GPU"]) for node in with_gpus), default=None)
    return Resources(int(found.get("CPU", 1)), int(found.get("GPU", 0)), beside)


def stop() -> None:
    """Leave the cluster; ends it where `start` started it."""
    import ray

    ray.shutdown()


def run(blocks: Callable[[], Iterable[Block]], jobs: list[WorkerJob], plan: WorkerPlan) -> Iterator[PartRecord]:
    """Records of the blocks as they are finished; job n runs on the plan's group n."""
    import ray.data
    from ray.exceptions import RayError

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="facepipe-") as folder:
        warnings.simplefilter("ignore", DeprecationWarning)
        _configure()
        listing = _listing(blocks, os.path.join(folder, "listed"))
        data = ray.data.read_datasource(listing, override_num_blocks=1, num_cpus=0, label_selector=here)
        for job, group in zip(jobs, plan.groups, strict=True):
            data = data.map_batches(
                _Mapper,
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
            cause = getattr(error, "cause", None)
            while cause is not None and not isinstance(cause, FacepipeError):
                cause = getattr(cause, "cause", None) or cause.__cause__
            raise cause or WorkerError(f"Ray gave up: {_last_line(error)}") from error


def choose_device(asked: str, resources: Resources) -> str:
    """Where a task runs that asks for a GPU if Ray has one; it sees that one alone. Raises ConfigError where a GPU is
    asked for and Ray has none."""
    if asked not in ("auto", "cpu") and not resources.gpus:
        raise ConfigError(f"run.device is {asked}, and Ray has no GPU: leave it out, or set run.device=cpu")
    return "cuda" if asked != "cpu" and resources.gpus else "cpu"


def run_tasks(
    function: Callable[[Any], Any], items: Iterable[Any], cpus: float, gpus: float = 0
) -> Iterator[tuple[Any, Any]]:
    """(item, function(item)) as they are finished, each a task of its own; a few more are submitted than can run.

    cpus, gpus: of a task; no more CPUs than a node has, since Ray would wait for ever for one that has them.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    fitting = (node.get("CPU", 0) for node in _nodes() if node.get("GPU", 0) >= gpus)
    cpus = min(cpus, max(fitting, default=0) or cpus)
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(function)
    ahead = 2 * max(1, int(ray.cluster_resources().get("CPU", 1) // cpus))
    waiting, running = iter(items), dict[Any, Any]()
    while True:
        for item in islice(waiting, ahead - len(running)):
            running[remote.remote(item)] = item
        if not running:
            return
        for done in ray.wait(list(running))[0]:
            try:
                yield running.pop(done), ray.get(done)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, FacepipeError) else error from None
            except RayError as error:  # its worker or node died, and so did those that tried again
                raise WorkerError(f"Ray gave up: {_last_line(error)}") from error


def _nodes() -> list[dict[str, float]]:
    """What each node that is alive has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _configure() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    # One row is one block of work: without this Ray would gather rows until they fill 128 MiB.
    context.target_max_block_size = 1
    context.print_on_execution_start = False


class RepeatableListing:
    """Blocks that are what they were when they are listed again; SourceError where the source has changed since.

    Where the listing's process dies, Ray lists from the start and leaves out as many blocks as it has: were these cut
    elsewhere by now, images would come twice or never.

    journal: file that a fingerprint of every block goes to
    """

    def __init__(self, blocks: Callable[[], Iterable[Block]], journal: str):
        self._blocks, self._journal = blocks, journal

    def __call__(self) -> Iterator[Block]:
        with open(self._journal, "ab+", buffering=0) as file:
            file.seek(0)
            before = file.read()
            before = before[: len(before) // _MARK * _MARK]
            file.truncate(len(before))
            for n, block in enumerate(self._blocks()):
                mark = hash64(str(block.last), *block.items["uri"].to_pylist()).to_bytes(_MARK, "little")
                if n * _MARK >= len(before):
                    file.write(mark)
                elif before[n * _MARK : (n + 1) * _MARK] != mark:
                    raise SourceError(
                        "the source changed after the process that listed it had died, and the listing cannot be gone "
                        "on with; what was committed is kept: run the same command again"
                    )
                yield block


def _listing(blocks: Callable[[], Iterable[Block]], journal: str) -> Any:
    """A datasource with one read task, which streams the listing and is held back when workers are behind."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    def rows() -> Iterator[pa.Table]:
        for block in RepeatableListing(blocks, journal)():
            yield pa.Table.from_pylist([encode_block(block)], schema=_ROW)

    class Listing(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(rows, metadata)]

    return Listing()


class _Mapper:
    """A BlockWorker in a Ray actor."""

    def __init__(self, job: WorkerJob):
        self._worker = BlockWorker(job)
        self._worker.setup()

    def __call__(self, table: pa.Table) -> pa.Table:
        (row,) = table.to_pylist()
        result = self._worker(decode_block(row))
        if isinstance(result, PartRecord):
            ray_metrics.count_block(result)
            return pa.table({"record": [result.to_json()]})
        return pa.Table.from_pylist([encode_block(result)], schema=_ROW)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
