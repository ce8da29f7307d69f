"""What runs on a worker: a chain of stages over one block of images, and the part that it writes to the gallery."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from facepipe.arrow import set_columns
from facepipe.errors import AccountingError, FacepipeError
from facepipe.gallery.commits.parts import PartRecord, add_shared_columns, make_status_rows, write_part
from facepipe.gallery.failures import describe_failures
from facepipe.schema import CRASHED
from facepipe.sources.blocks import Block
from facepipe.stages import Chain
from facepipe.stages.read import hash_content
from facepipe.storage.redact import redact
from pipelines.runtime.crash_marks import CrashMarks

_DEVICE_FAULT = 70  # exit code of a worker that ends itself


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
        failed_with: what images are tried with, in short form, by the status of those that fail
    """

    stages: tuple[Any, ...]
    batch: int
    writes: bool
    run: str
    source: str
    faces_folder: str
    marks_folder: str
    ahead: int = 0
    failed_with: Mapping[str, str] = field(default_factory=dict)


class BlockWorker:
    """Run a job's stages on blocks.

    One bad image does not cost the others: after a crash, the images of a block run one by one.
    """

    def __init__(self, job: WorkerJob):
        self.job = job
        self._chain = Chain(job.stages, job.batch, job.ahead)
        stage_names = "-".join(type(stage).__name__ for stage in job.stages)
        self._crash_marks = CrashMarks(f"{job.marks_folder}/{stage_names}")

    def setup(self) -> None:
        """Load the models."""
        self._chain.setup()

    def __call__(self, block: Block) -> Block | PartRecord:
        """Run the stages on a block.

        Returns:
            The record of a written part; or, if this worker does not write, the block with the rows of its stages.

        Raises:
            AccountingError: The stages lost or added an image.
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
            return self._chain(block.items if block.rows is None else block.rows)
        except FacepipeError:
            raise
        except Exception as error:
            self._exit_after_device_fault(error)
            return self._run_one_by_one(block)

    def _exit_after_device_fault(self, error: Exception) -> None:
        """End the process if a device failed, so that a new one tries again: every later call would fail too.

        The crash marks stay, and tell the new process what was being worked on.
        """
        # Running out of memory is no fault of the device: the images are tried one by one instead.
        uses_gpu = any(str(getattr(stage, "device", "cpu")).startswith("cuda") for stage in self.job.stages)
        if uses_gpu and type(error).__name__ != "OutOfMemoryError":
            print(f"facepipe worker: {type(error).__name__}: {redact(str(error))[:300]}", file=sys.stderr, flush=True)
            os._exit(_DEVICE_FAULT)

    def _run_one_by_one(self, block: Block) -> pa.Table:
        """Run the stages on each image alone.

        An image that kills the worker, or fails in a way that no stage expects, becomes a row with status `crashed`.
        """
        parts: list[pa.Table] = []
        failures: list[Exception] = []
        # Each image has a mark of its own, so that one that ends the process is known to its successor.
        for n, uri in enumerate(block.items["uri"].to_pylist()):
            item = block.items.slice(n, 1)
            with self._crash_marks.mark_image(uri) as has_crashed:
                if has_crashed:
                    parts.append(make_status_rows(item, CRASHED, "the worker died twice on this image"))
                    continue
                try:
                    parts.append(self._chain(_select_image(block, n, uri)))
                except FacepipeError:
                    raise
                except Exception as error:
                    self._exit_after_device_fault(error)
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
