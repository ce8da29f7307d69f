"""What runs on a worker: a chain of stages over one block of images, and the part that it writes to the gallery."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from facepipe.arrow import set_columns
from facepipe.errors import AccountingError, FacepipeError
from facepipe.gallery.commits.parts import PartRecord, add_shared_columns, make_status_rows, write_part
from facepipe.gallery.failures import describe_failures
from facepipe.models.runtime.device import find_device_fault
from facepipe.schema import CRASHED, NO_FACE, OK
from facepipe.sources.blocks import Block
from facepipe.stages import Chain
from facepipe.stages.read import hash_content
from facepipe.storage.redact import redact
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
    failed_with: Mapping[str, str] = field(default_factory=dict)
    devices: int = 0

    @property
    def device(self) -> str:
        """The GPU that the stages name; empty if they run on CPUs alone."""
        devices = (str(getattr(stage, "device", "cpu")) for stage in self.stages)
        return next((device for device in devices if device.startswith("cuda")), "")


class BlockWorker:
    """Run a job's stages on blocks.

    One bad image does not cost the others: after a crash, the images of a block run one by one.
    """

    def __init__(self, job: WorkerJob):
        self.job = job
        self._chain = Chain(job.stages, job.batch, job.ahead, job.parallel)
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
        self._chain = Chain(stages, self.job.batch, self.job.ahead, self.job.parallel)

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

    def __call__(self, block: Block) -> Block | PartRecord:
        """Run the stages on a block.

        Returns:
            The record of a written part; or, if this worker does not write, the block with the rows of its stages.

        Raises:
            AccountingError: The stages lost or added an image.
            DeviceFaultError: The GPU failed. The process must end; its crash marks say what was in work.
        """
        # A block that crashed a worker before is run image by image. An empty block only carries its counts.
        self._chain.seconds.clear()
        rows = None
        if block.items.num_rows > 0:
            uris = block.items["uri"].to_pylist()
            with self._crash_marks.mark_block(block.number, uris) as has_crashed:
                rows = self._run_one_by_one(block) if has_crashed else self._run_block(block)
        if not self.job.writes:
            return replace(block, rows=rows)
        # The record counts the block. `write_part` completes it with what the rows say.
        record = PartRecord(
            block.number,
            skipped=block.skipped,
            repeated=block.repeated,
            ignored=block.ignored,
            erased=block.erased,
            last=block.last,
            notes=list(block.notes),
            seconds=dict(self._chain.seconds),
        )
        if rows is not None:
            table = add_shared_columns(rows, self.job.source)
            table = self._add_failures(table, block.items, record)
            write_part(table, block.items, self.job.faces_folder, self.job.run, record)
            if record.images != block.items.num_rows:
                raise AccountingError(f"block {block.number}: {block.items.num_rows} images in, {record.images} out")
        if block.relabelled is not None:
            record.relabelled = _select_labels(block.relabelled, block.items, record)
        return record

    def _add_failures(self, table: pa.Table, items: pa.Table, record: PartRecord) -> pa.Table:
        """Add what failed images were tried with, and count those that were tried again."""
        retried = items.filter(pc.equal(items["previous"], pa.scalar(hash_content(None), pa.uint64())))["uri"]
        record.retried = len(retried)
        is_retried = pc.is_in(table["uri"], retried.combine_chunks()).to_numpy(zero_copy_only=False)
        failures = describe_failures(table["status"], is_retried, self.job.failed_with)
        return set_columns(table, {"failed_with": failures})

    def _run_block(self, block: Block) -> pa.Table:
        """Run the stages on a whole block; if one fails, on its images one by one."""
        try:
            with self._watch_device():
                rows = self._chain(block.items if block.rows is None else block.rows)
        except (FacepipeError, DeviceFaultError):
            raise
        except Exception:
            return self._run_one_by_one(block)
        self._note_success(rows)
        return rows

    def _run_one_by_one(self, block: Block) -> pa.Table:
        """Run the stages on each image alone.

        An image that kills the worker, or fails in a way that no stage expects, becomes a row with status `crashed`.
        """
        parts: list[pa.Table] = []
        failures: list[Exception] = []
        # Each image has a mark of its own, so that one that ends the process is known to its successor.
        for n, uri in enumerate(block.items["uri"].to_pylist()):
            item = block.items.slice(n, 1)
            device = self._health.name if self._health is not None else ""
            with self._crash_marks.mark_image(uri, device) as has_crashed:
                if has_crashed:
                    parts.append(make_status_rows(item, CRASHED, "the worker died twice on this image"))
                    continue
                try:
                    with self._watch_device(uri):
                        rows = self._chain(_select_image(block, n, uri))
                    self._note_success(rows)
                    parts.append(rows)
                except (FacepipeError, DeviceFaultError):
                    raise
                except Exception as error:
                    failures.append(error)
                    reason = f"{type(error).__name__}: {redact(str(error))[:160]}"
                    parts.append(make_status_rows(item, CRASHED, reason))
        if len(failures) == len(parts) > 1:
            # If every image fails, the images are not the cause.
            raise failures[0]
        return pa.concat_tables(parts, promote_options="default")


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
