"""Run on Ray Data: images stream out of one listing task, pass through named operators, and records come back.

A row of the dataset is an image. In a plan with one group of workers, one operator runs all stages, and only work items
travel. In one with two, ReadDecode on CPUs hands decoded images to Faces, in tables of a few ten MiB, and write_parts
gathers rows of faces until they fill a part. Ray retries the images of a lost actor forever; the crash marks in the
gallery keep one image from causing that again and again.

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
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa

from facepipe.errors import ConfigError, FacepipeError, SourceError, StorageError, WorkerError
from facepipe.gallery.commits.parts import PartRecord
from facepipe.hashing import hash64
from facepipe.index.placement import NodeRoom
from facepipe.schema import conform
from facepipe.sources.blocks import Block
from facepipe.storage import file_exists, is_remote
from pipelines.runtime import ray_metrics
from pipelines.runtime.device_health import DeviceFaultError
from pipelines.runtime.image_rows import (
    FACE_ROWS,
    StagedRows,
    pack_rows,
    slice_items,
    to_blocks,
    to_item_rows,
    unpack_rows,
)
from pipelines.runtime.plan import Resources, WorkerGroup, WorkerPlan
from pipelines.runtime.runners import ray_blocks
from pipelines.runtime.worker import DEVICE_FAULT_CODE, BlockWorker, StagedImages, WorkerJob, write_block

_LOCAL_OBJECT_STORE = 512 << 20  # bytes
_FINGERPRINT_BYTES = 8  # per block
_MAX_NAMED = 5  # nodes in a message
_ID_DIGITS = 8  # of a node
_START_TRIES = 3  # to start Ray on this machine: it gives its own processes 30 seconds, too few if the cores are busy
_START_TIMED_OUT = "timed out during startup"  # in the message of that error, which has no class of its own
_INIT_RETRIES = 1  # of the constructor of an actor, in the same process


def start() -> Resources:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray on this machine.

    Returns:
        CPUs and GPUs of the cluster, as it is now.
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
    cpus_elsewhere = sum(int(node.get("CPU", 0)) for node in _list_nodes() if node.get("GPU", 0) == 0)
    return Resources(int(cluster.get("CPU", 1)), int(cluster.get("GPU", 0)), cpus_per_gpu, cpus_elsewhere)


def _initialise() -> None:
    """Initialise Ray without its output, and keep this process's handler of SIGTERM."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # After the loss of a node Ray prints a page for each result that nobody waits for any more.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # A local start gets a small object store: only blocks of work items travel through it.
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        options |= {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE}
    handler = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _start_patiently(options)
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler ends the process at once.
        signal.signal(signal.SIGTERM, handler)


def _start_patiently(options: dict[str, Any]) -> None:
    """Start Ray or connect to it, and try again if its processes took too long to start."""
    import ray

    for attempt in range(1, _START_TRIES + 1):
        try:
            ray.init(**options)
            return
        except Exception as error:
            if _START_TIMED_OUT not in str(error) or attempt == _START_TRIES:
                raise
            # What has started ends, so that the next try begins anew.
            ray.shutdown()


def stop() -> None:
    """Disconnect from the cluster. If `start` started Ray, this ends it."""
    import ray

    ray.shutdown()


def run(
    blocks: Callable[[], Iterable[Block]],
    jobs: list[WorkerJob],
    plan: WorkerPlan,
    on_end: Callable[[Any], None] = lambda data: None,
) -> Iterator[PartRecord]:
    """Yield the records of blocks as they are finished.

    Args:
        blocks: lists the blocks; it is called on this node.
        jobs: what the workers of each group run.
        plan: groups of workers.
        on_end: called with the dataset when all records have come, for its figures.

    Raises:
        FacepipeError: A worker raised it.
        WorkerError: Ray failed in another way, or a node does not see the folder that workers write to.
    """
    import ray.data
    from ray.exceptions import RayError

    # A worker that wrote a part into a folder of its own node would lose it.
    require_visible(jobs[0].faces_folder, "the folder that workers write to")
    # The listing runs in one task on this node, without a CPU of its own, so that it can start at once.
    driver_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="facepipe-") as folder:
        warnings.simplefilter("ignore", DeprecationWarning)
        _configure_ray_data(plan)
        listing = _create_datasource(blocks, os.path.join(folder, "listed"))
        data = ray.data.read_datasource(listing, override_num_blocks=1, num_cpus=0, label_selector=driver_node)
        data = _add_operators(data, jobs, plan)
        try:
            for row in data.iter_rows():
                yield PartRecord.from_json(row["record"])
        except RayError as error:
            raise _find_cause(error) or WorkerError(f"Ray failed: {get_last_line(error)}") from error
        on_end(data)


def _add_operators(data: Any, jobs: list[WorkerJob], plan: WorkerPlan) -> Any:
    """Add the operators of a plan to the dataset of the listing: one, or three if its groups are two."""
    import ray.data

    if len(plan.groups) == 1:
        return _add_pool(data, ReadDecodeFacesWrite, jobs[0], plan.groups[0])
    decode_job, faces_job = jobs
    data = _add_pool(data, ReadDecode, decode_job, plan.groups[0])
    data = _add_pool(data, Faces, faces_job, plan.groups[1])
    # What waits for a part is small, and so is the work on it: it needs no CPU of its own.
    return data.map_batches(
        write_parts,
        fn_args=(faces_job,),
        # Small parts, so that finished work is committed soon.
        batch_size=max(64, plan.largest_block // 4),
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=max(1, plan.workers // 4)),
        num_cpus=0,
    )


def _add_pool(data: Any, operator: type, job: WorkerJob, group: WorkerGroup) -> Any:
    """Add a pool of actors that grows and shrinks with the work and with the nodes."""
    import ray.data

    pool = ray.data.ActorPoolStrategy(
        min_size=min(group.min_workers, group.workers), initial_size=group.workers, max_size=group.max_workers
    )
    # Whole blocks, as they were cut. `map_batches` wants a number of rows where there are GPUs, in versions of Ray that
    # have the other method too.
    map_batches = getattr(data, "map_batches_internal", data.map_batches)
    return map_batches(
        operator,
        fn_constructor_args=(job,),
        batch_size=None,
        batch_format="pyarrow",
        compute=pool,
        num_cpus=group.cpus,
        num_gpus=group.gpus or None,
    )


def measure_operators(data: Any) -> dict[str, dict[str, int]]:
    """Measure what each operator of a finished dataset put out.

    Returns:
        By the operator's name, if this version of Ray tells: `rows`, which are images and a few reports, or records of
        parts; and `bytes`.
    """
    try:
        from ray.data._internal.stats import DatasetStatsSummary
    except ImportError:  # no public part of Ray
        return {}

    def walk(summary: DatasetStatsSummary) -> Iterator[Any]:
        for parent in summary.parents:
            yield from walk(parent)
        yield from summary.operators_stats

    figures = {}
    for operator in walk(data.get_stats_summary()):
        figures[operator.operator_name] = {
            "rows": int(operator.output_num_rows.sum) if operator.output_num_rows else 0,
            "bytes": int(operator.output_size_bytes.sum) if operator.output_size_bytes else 0,
        }
    return figures


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
    function: Callable[..., Any],
    items: Iterable[Any],
    cpus: float,
    gpus: float = 0,
    *,
    prepare: Callable[[Any], Any] = lambda item: item,
    shared: Any = None,
) -> Iterator[tuple[Any, Any]]:
    """Run a function on items, each in a Ray task. A few more tasks are submitted than can run at a time.

    Args:
        function: function of an item.
        items: the items.
        cpus: CPUs per task. It is limited to what a node has, because Ray would wait forever for a larger node.
        gpus: GPUs per task.
        prepare: makes what the function gets of an item, here and when the task is submitted.
        shared: a second argument of the function, the same for all items. It is sent to each node once.

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
    shared_arguments = [] if shared is None else [ray.put(shared)]
    submitted: dict[Any, Any] = {}
    while True:
        # Submit tasks up to the limit, then wait for one of them to finish.
        for item in islice(waiting, max_submitted - len(submitted)):
            submitted[remote.remote(prepare(item), *shared_arguments)] = item
        if not submitted:
            return
        for reference in ray.wait(list(submitted))[0]:
            try:
                yield submitted.pop(reference), ray.get(reference)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, FacepipeError) else error from None
            except RayError as error:
                # Its worker or node failed, and so did those of the retries.
                raise WorkerError(f"Ray failed: {get_last_line(error)}") from error


def list_rooms() -> list[NodeRoom]:
    """List the nodes that have CPUs, and what they have for shards of an index."""
    import ray

    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
    rooms = []
    for node in nodes:
        resources = node["Resources"]
        if resources.get("CPU", 0) >= 1:
            rooms.append(NodeRoom(node["NodeID"], int(resources.get("memory", 0)), int(resources["CPU"])))
    return rooms


def require_visible(path: str, what: str) -> None:
    """Require that all nodes with CPUs see a file or folder, if this process sees it.

    Args:
        path: path of a file or folder, or URL of an object.
        what: what it is part of, for the message.

    Raises:
        WorkerError: a node does not see it.
    """
    blind = find_blind_nodes(path) if _exists(path) else {}
    if blind:
        nodes = ", ".join(list(blind)[:_MAX_NAMED])
        raise WorkerError(
            f"{len(blind)} of {len(list_rooms())} nodes of Ray do not see {what} ({nodes}): "
            f"{next(iter(blind.values()))}. Mount its folder under the same path on all nodes, put it into an object "
            "store that all of them may read, or set run.runner=inline"
        )


def find_blind_nodes(path: str) -> dict[str, str]:
    """Find the nodes with CPUs that do not see a file or folder. This process looks for itself.

    Args:
        path: path of a file or folder, or URL of an object.

    Returns:
        By the node's address and id, why it does not see it.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    own_node = ray.get_runtime_context().get_node_id()
    looks = {}
    for node in (room.node for room in list_rooms() if room.node != own_node):
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        looks[node] = ray.remote(num_cpus=0, scheduling_strategy=strategy)(_look_for).remote(path)
    blind = {}
    for node, look in looks.items():
        try:
            reason = ray.get(look)
        except RayTaskError:
            raise
        except RayError:
            continue  # the node was lost meanwhile: it gets no task
        if reason:
            blind[f"{addresses[node]} {node[:_ID_DIGITS]}"] = reason
    return blind


def _look_for(path: str) -> str:
    """Say why this node does not see a path; nothing if it does."""
    try:
        return "" if _exists(path) else f"there is no {path!r}"
    except StorageError as error:
        return str(error)


def _exists(path: str) -> bool:
    return file_exists(path) if is_remote(path) else os.path.exists(path)


def _list_nodes() -> list[dict[str, float]]:
    """List the resources of each node that is up."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _configure_ray_data(plan: WorkerPlan) -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # An error of facepipe arrives as it is, and not as the text of another one.
    context.raise_original_map_exception = True
    ray_blocks.keep_blocks(context)
    # A constructor may fail while a predecessor still holds the GPU, or a storage is slow. It is tried again, and then
    # another actor is, on another node if there is one. An error of facepipe is reported at once instead.
    nodes = max(1, len(_list_nodes()))
    context.actor_init_retry_on_errors = True
    context.actor_init_max_retries = _INIT_RETRIES
    context.max_consecutive_actor_init_deaths = 2 * nodes


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
            yield to_item_rows(block)

    class Listing(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(read_rows, metadata)]

    return Listing()


class _Operator:
    """A BlockWorker in a Ray actor."""

    def __init__(self, job: WorkerJob):
        """Load the models.

        An error of facepipe, such as a file that is missing, is kept for the first call: Ray would try again.
        """
        self._job = job
        self._worker = BlockWorker(job)
        self._error: FacepipeError | None = None
        try:
            with _end_after_device_fault():
                self._worker.setup()
        except FacepipeError as error:
            self._error = error

    def _require_setup(self) -> None:
        if self._error is not None:
            raise self._error


class ReadDecodeFacesWrite(_Operator):
    """All stages in one operator: work items in, records of parts out."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Run the stages on images, and write a part."""
        self._require_setup()
        block, reports = to_blocks(table)
        with _end_after_device_fault():
            record = self._worker(block)
        return _to_record_row(replace(record, reports=reports))


class ReadDecode(_Operator):
    """The first stages, on CPUs: work items in, decoded images out, in tables that are bounded in bytes."""

    def __init__(self, job: WorkerJob):
        """Set the stages up."""
        super().__init__(job)
        self._schema = self._worker.describe_rows()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield the images of a table with their pixels."""
        self._require_setup()
        block, _ = to_blocks(table)
        if block.items.num_rows == 0:
            yield pack_rows(StagedRows(table, None), self._schema)
            return
        # Join pieces as long as they fit into the budget.
        pending: list[StagedImages] = []
        for piece in self._worker.run_stages(block):
            if pending and _count_bytes([*pending, piece]) > self._job.batch_bytes:
                yield self._pack(table, pending)
                pending = []
            pending.append(piece)
        yield self._pack(table, pending)

    def _pack(self, table: pa.Table, pieces: list[StagedImages]) -> pa.Table:
        """Pack the rows of pieces that follow each other."""
        items = slice_items(table, pieces[0].start, sum(piece.count for piece in pieces))
        rows = pa.concat_tables([conform(piece.rows, self._schema) for piece in pieces])
        return pack_rows(StagedRows(items, rows, self._worker.take_figures()), self._schema)


class Faces(_Operator):
    """Detection, alignment and embedding: decoded images in, rows of faces out."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Find and embed the faces of images."""
        self._require_setup()
        staged = unpack_rows(table)
        block, _ = to_blocks(staged.items)
        with _end_after_device_fault():
            pieces = [piece.rows for piece in self._worker.run_stages(replace(block, rows=staged.rows))]
        rows = pa.concat_tables(pieces, promote_options="default") if pieces else None
        figures = staged.figures.add(self._worker.take_figures())
        return pack_rows(StagedRows(staged.items, rows, figures), FACE_ROWS)


@contextmanager
def _end_after_device_fault() -> Iterator[None]:
    """End this process if its GPU fails. Ray starts the actor again, and gives its images to another one."""
    try:
        yield
    except DeviceFaultError:
        os._exit(DEVICE_FAULT_CODE)


def write_parts(table: pa.Table, job: WorkerJob) -> pa.Table:
    """Write rows of faces as a part: the last operator of a plan with several."""
    staged = unpack_rows(table)
    block, reports = to_blocks(staged.items)
    return _to_record_row(replace(write_block(job, block, staged.rows, staged.figures), reports=reports))


def _to_record_row(record: PartRecord) -> pa.Table:
    """Convert a record to a row of the last dataset."""
    ray_metrics.count_block(record)
    return pa.table({"record": [record.to_json()], "images": [record.images], "bytes": [record.size]})


def _count_bytes(pieces: list[StagedImages]) -> int:
    return sum(piece.rows.nbytes for piece in pieces)


def get_last_line(error: BaseException) -> str:
    """Return the last line of an error's text, or its type if it has no text."""
    # The text of these errors is a traceback; its last line says what happened.
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
