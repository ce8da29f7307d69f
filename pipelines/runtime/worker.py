"""What runs on a worker: a chain of stages over one block of images, and the part that it writes to the gallery."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.arrow import set_columns
from facepipe.errors import AccountingError, FacepipeError
from facepipe.gallery.commits.parts import PartRecord, add_shared_columns, make_status_rows, write_part
from facepipe.gallery.failures import describe_failures
from facepipe.models.runtime.device import find_device_fault
from facepipe.schema import CRASHED, NO_FACE, OK, WORK_ITEM
from facepipe.sources.blocks import Block, compute_digest
from facepipe.stages import Chain
from facepipe.stages.chain import DEFAULT_BATCH_BYTES
from facepipe.stages.read import hash_content
from facepipe.storage.redact import redact
from facepipe.types import Int64
from pipelines.runtime.crash_marks import CrashMarks
from pipelines.runtime.device_health import DeviceFaultError, DeviceHealth, name_device

DEVICE_FAULT_CODE = 70
"""Exit code of a worker whose GPU failed."""


@dataclass(frozen=True)
class WorkerJob:
    """Everything that a worker needs to know. It is small, and can be pickled.

    Attributes:
        stages: stages that the worker runs
        batch: images per batch of the chain
        writes: whether these are the last stages, so that their rows become a part in `faces_folder`
        run: id of the run
        source: name of the source
        faces_folder: folder of the gallery's table
        marks_folder: folder of the run's crash marks
        ahead: number of stages that work ahead of a device, as in `Chain`
        parallel: number of batches on which the other stages work at a time, as in `Chain`
        batch_bytes: bytes that a stage puts out per batch of the chain, at most
        failed_with: what images are tried with, in short form, by the status of those that fail
        devices: number of GPUs of the run
    """

    stages: tuple[Any, ...]
    batch: int
    writes: bool
    run: str
    source: str
    faces_folder: str
    marks_folder: str
    ahead: int = 0
    parallel: int = 1
    batch_bytes: int = DEFAULT_BATCH_BYTES
    failed_with: Mapping[str, str] = field(default_factory=dict)
    devices: int = 0

    @property
    def device(self) -> str:
        """The GPU that the stages name; empty if they run on CPUs alone."""
        devices = (str(getattr(stage, "device", "cpu")) for stage in self.stages)
        return next((device for device in devices if device.startswith("cuda")), "")


@dataclass(frozen=True)
class StageFigures:
    """What the stages of a worker did.

    Attributes:
        seconds: time per stage
        bytes: bytes that each stage put out
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)

    def add(self, other: "StageFigures") -> "StageFigures":
        """Add the figures of other stages, or of the same ones."""
        seconds = Counter(self.seconds)
        seconds.update(other.seconds)
        sizes = Counter(self.bytes)
        sizes.update(other.bytes)
        return StageFigures(seconds, sizes)


@dataclass(frozen=True)
class StagedImages:
    """Images of a block, and what the stages of a worker made of them.

    Attributes:
        start: position of the first image in the block
        count: number of images
        rows: output of the stages; one image may have several rows, which follow each other
    """

    start: int
    count: int
    rows: pa.Table


class BlockWorker:
    """Run a job's stages on blocks.

    One bad image does not cost the others: after a crash, the images of a block run one by one.
    """

    def __init__(self, job: WorkerJob):
        self.job = job
        self._chain = Chain(job.stages, job.batch, job.ahead, job.parallel, job.batch_bytes)
        stage_names = "-".join(type(stage).__name__ for stage in job.stages)
        marks_folder = f"{job.marks_folder}/{stage_names}"
        self._crash_marks = CrashMarks(marks_folder)
        self._health: DeviceHealth | None = None
        if job.device:
            self._health = DeviceHealth(marks_folder, name_device(job.device), max(1, job.devices))

    def setup(self) -> None:
        """Load the models, and try them on a first batch if they run on a GPU.

        Raises:
            DeviceError: The GPU keeps failing, and no other one works.
            DeviceFaultError: The GPU fails. The process must end, and a new one tries again.
        """
        if self._health is not None and self._health.is_failing:
            self._leave_device_out(self._health)
        with self._watch_device():
            self._chain.setup()

    def _leave_device_out(self, health: DeviceHealth) -> None:
        """Run on CPUs instead of a GPU that keeps failing, if other GPUs work."""
        health.require_other()
        print(f"facepipe worker: {health.name} keeps failing and is left out", file=sys.stderr, flush=True)
        self._health = None
        stages = [replace(stage, device="cpu") if hasattr(stage, "device") else stage for stage in self.job.stages]
        self._chain = Chain(stages, self.job.batch, self.job.ahead, self.job.parallel, self.job.batch_bytes)

    @contextmanager
    def _watch_device(self, uri: str | None = None) -> Iterator[None]:
        """Count it if the GPU fails inside the `with` block, and end the work.

        Args:
            uri: the image in work, if it is alone.
        """
        try:
            yield
        except Exception as error:
            fault = find_device_fault(error) if self._health is not None else None
            if fault is None or self._health is None:
                raise
            self._health.add_failure(fault)
            # The mark of the image says that it was the GPU, so that no other GPU passes the image over.
            if uri is not None:
                self._crash_marks.blame_device(uri, self._health.name)
            text = redact(f"{type(fault).__name__}: {fault}")[:300]
            print(f"facepipe worker: {self._health.name}: {text}", file=sys.stderr, flush=True)
            raise DeviceFaultError(text) from error

    def _note_success(self, rows: pa.Table) -> None:
        """Note that the GPU works, if the rows of finished images show that it had anything to do."""
        if self._health is None:
            return
        if "status" not in rows.column_names or pc.any(pc.is_in(rows["status"], pa.array([OK, NO_FACE]))).as_py():
            self._health.add_success()

    def __call__(self, block: Block) -> PartRecord:
        """Run the stages on a block, and write a part.

        Raises:
            AccountingError: The stages lost or added an image.
            DeviceFaultError: The GPU failed. The process must end; its crash marks say what was in work.
        """
        # An empty block only carries its counts.
        tables = [staged.rows for staged in self.run_stages(block)]
        rows = pa.concat_tables(tables, promote_options="default") if tables else None
        return write_block(self.job, block, rows, self.take_figures())

    def take_figures(self) -> StageFigures:
        """Return the figures of the stages since the last call."""
        figures = StageFigures(dict(self._chain.seconds), dict(self._chain.bytes))
        self._chain.clear_figures()
        return figures

    def run_stages(self, block: Block) -> Iterator[StagedImages]:
        """Run the stages on a block, and yield its images in order, in pieces that are bounded in bytes.

        The block is marked as in work until the last piece has been taken.
        """
        if block.items.num_rows == 0:
            return
        # A block that crashed a worker before is run image by image.
        with self._crash_marks.mark_block(block.items["uri"].to_pylist()) as has_crashed:
            if has_crashed:
                yield from self._run_one_by_one(block, 0)
            else:
                yield from self._run_block(block)

    def _run_block(self, block: Block) -> Iterator[StagedImages]:
        """Run the stages on a whole block; if one fails, on the images that are left one by one."""
        finished = 0
        try:
            with self._watch_device():
                for rows in self._chain.iterate(block.items if block.rows is None else block.rows):
                    self._note_success(rows)
                    count = count_images(rows)
                    yield StagedImages(finished, count, rows)
                    finished += count
        except (FacepipeError, DeviceFaultError):
            raise
        except Exception:
            yield from self._run_one_by_one(block, finished)

    def _run_one_by_one(self, block: Block, start: int) -> Iterator[StagedImages]:
        """Run the stages on each image alone, from a position of the block on.

        An image that ends the worker, or fails in a way that no stage expects, becomes a row with status `crashed`.
        """
        failures: list[Exception] = []
        uris = block.items["uri"].to_pylist()
        device = self._health.name if self._health is not None else ""
        # Each image has a mark of its own, so that one that ends the process is known to its successor.
        for n in range(start, len(uris)):
            with self._crash_marks.mark_image(uris[n], device) as has_crashed:
                if has_crashed:
                    rows = self._make_crashed_rows(block.items.slice(n, 1), "the worker died twice on this image")
                else:
                    try:
                        with self._watch_device(uris[n]):
                            rows = self._chain(_select_image(block, n, uris[n]))
                        self._note_success(rows)
                    except (FacepipeError, DeviceFaultError):
                        raise
                    except Exception as error:
                        failures.append(error)
                        reason = f"{type(error).__name__}: {redact(str(error))[:160]}"
                        rows = self._make_crashed_rows(block.items.slice(n, 1), reason)
                yield StagedImages(n, 1, rows)
        if len(failures) == len(uris) > 1:
            # If every image fails, the images are not the cause.
            raise failures[0]

    def _make_crashed_rows(self, item: pa.Table, reason: str) -> pa.Table:
        """Make the row of an image that crashed a worker or a stage."""
        if self.job.writes:
            return make_status_rows(item, CRASHED, reason)
        # Later stages need the columns of these ones: let them make the row of an image that cannot be read.
        columns = {"listing_error": pa.array([reason], pa.string()), "previous": pa.nulls(1, pa.uint64())}
        rows = self._chain(set_columns(item, columns))
        return set_columns(rows, {"status": pa.array([CRASHED], pa.string())})

    def describe_rows(self) -> pa.Schema:
        """Return the schema of the rows that the stages make of work items."""
        item = pa.Table.from_pylist([{"uri": "", "path": b"", "listing_error": "none"}], schema=WORK_ITEM)
        schema = self._chain(item).schema
        self._chain.clear_figures()
        return schema


def count_images(rows: pa.Table) -> int:
    """Count the images in rows of stages, in which the rows of an image follow each other."""
    return len(find_image_starts(rows["uri"]))


def find_image_starts(uris: pa.ChunkedArray) -> Int64:
    """Find the positions at which the rows of another image begin, from the uri of each row."""
    values = uris.combine_chunks()
    if len(values) == 0:
        return np.empty(0, np.int64)
    is_other = pc.not_equal(values[1:], values[:-1]).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.flatnonzero(is_other) + 1]).astype(np.int64)


def write_block(job: WorkerJob, block: Block, rows: pa.Table | None, figures: StageFigures) -> PartRecord:
    """Write what the stages made of a block as a part.

    Args:
        job: the job of the workers.
        block: the block.
        rows: its rows; None if it has no images.
        figures: figures of the stages.

    Returns:
        The record, which counts the block.

    Raises:
        AccountingError: The stages lost or added an image.
    """
    # `write_part` completes the record with what the rows say.
    record = PartRecord(
        block.number,
        skipped=block.skipped,
        repeated=block.repeated,
        ignored=block.ignored,
        erased=block.erased,
        last=block.last,
        notes=list(block.notes),
        handed_out=block.handed_out if block.last else 0,
        handed_out_digest=block.digest if block.last else 0,
        seconds=dict(figures.seconds),
        stage_bytes=dict(figures.bytes),
    )
    if rows is not None:
        table = add_shared_columns(rows, job.source)
        table = _add_failures(table, block.items, record, job.failed_with)
        record.digest = compute_digest(rows["uri"].take(pa.array(find_image_starts(rows["uri"]))))
        write_part(table, block.items, job.faces_folder, job.run, record)
        if record.images != block.items.num_rows:
            raise AccountingError(f"block {block.number}: {block.items.num_rows} images in, {record.images} out")
    if block.relabelled is not None:
        record.relabelled = _select_labels(block.relabelled, block.items, record)
    return record


def _add_failures(table: pa.Table, items: pa.Table, record: PartRecord, failed_with: Mapping[str, str]) -> pa.Table:
    """Add what failed images were tried with, and count those that were tried again."""
    retried = items.filter(pc.equal(items["previous"], pa.scalar(hash_content(None), pa.uint64())))["uri"]
    record.retried = len(retried)
    is_retried = pc.is_in(table["uri"], retried.combine_chunks()).to_numpy(zero_copy_only=False)
    return set_columns(table, {"failed_with": describe_failures(table["status"], is_retried, failed_with)})


def _select_labels(relabelled: pa.Table, items: pa.Table, record: PartRecord) -> dict[str, str | None]:
    """Select the new labels that hold for rows of the gallery, by uri.

    An image that was read brings its label with its new rows. Otherwise a label holds if the content is the same. If an
    image could not be read, its content may be another one, unless the gallery has none of it either.
    """
    labels = dict(zip(*(column.to_pylist() for column in relabelled.columns), strict=True))
    for uri, previous in zip(items["uri"].to_pylist(), items["previous"].to_pylist(), strict=True):
        if labels.get(uri) is not None and uri not in record.touched and previous != hash_content(None):
            del labels[uri]
    for uri in record.replaced:
        labels.pop(uri, None)
    return labels


def _select_image(block: Block, n: int, uri: str) -> pa.Table:
    """Select the rows of the n-th image. Earlier stages may have made several rows of it."""
    if block.rows is None:
        return block.items.slice(n, 1)
    return block.rows.filter(pc.equal(block.rows["uri"], uri))
