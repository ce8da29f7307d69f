"""What runs on a worker: a chain of stages over one block, and the part that it leaves in the gallery."""

import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from facepipe.errors import AccountingError, FacepipeError
from facepipe.gallery.commits.parts import PartRecord, add_shared_columns, make_status_rows, write_part
from facepipe.schema import CRASHED
from facepipe.sources.blocks import Block
from facepipe.stages import Chain
from facepipe.storage.redact import redact
from pipelines.runtime.crash_marks import CrashMarks


@dataclass(frozen=True)
class WorkerJob:
    """Everything a worker needs to know; small, and picklable.

    stages: the ones this worker runs; writes: whether they are the chain's last, so that rows become a part in
    `faces_folder`; marks_folder: folder of the crash marks; source: name of the corpus; ahead: as in `Chain`.
    """

    stages: tuple[Any, ...]
    batch: int
    writes: bool
    run: str
    source: str
    faces_folder: str
    marks_folder: str
    ahead: int = 0


class BlockWorker:
    """Runs a job's stages on blocks. One bad image never costs the others: after a crash images go one by one."""

    def __init__(self, job: WorkerJob):
        self.job = job
        self._chain = Chain(job.stages, job.batch, job.ahead)
        self._attempts = CrashMarks(f"{job.marks_folder}/{'-'.join(type(s).__name__ for s in job.stages)}")

    def setup(self) -> None:
        """Load the models."""
        self._chain.setup()

    def __call__(self, block: Block) -> Block | PartRecord:
        """A record where this worker writes, else the block with the rows that its stages made."""
        self._chain.seconds.clear()
        if block.items.num_rows == 0:
            rows = None
        else:
            with self._attempts.mark_block(block.number, block.items["uri"].to_pylist()) as crashed:
                rows = self._one_by_one(block) if crashed else self._whole(block)
        if not self.job.writes:
            return replace(block, rows=rows)
        counts = {name: getattr(block, name) for name in ("skipped", "repeated", "ignored", "erased", "last")}
        record = PartRecord(block.number, **counts, seconds=dict(self._chain.seconds))
        if rows is not None:
            table = add_shared_columns(rows, self.job.source)
            write_part(table, block.items, self.job.faces_folder, self.job.run, record)
            if record.images != block.items.num_rows:
                raise AccountingError(f"block {block.number}: {block.items.num_rows} images in, {record.images} out")
        return record

    def _whole(self, block: Block) -> pa.Table:
        try:
            return self._chain(block.items if block.rows is None else block.rows)
        except FacepipeError:
            raise
        except Exception as error:
            self._distrust(error)
            return self._one_by_one(block)

    def _distrust(self, error: Exception) -> None:
        """After a device fault every later call fails as well: end the process, so that a fresh one tries again.

        The marks that stay behind tell it what was in hand.
        """
        on_gpu = any(str(getattr(stage, "device", "cpu")).startswith("cuda") for stage in self.job.stages)
        if on_gpu and type(error).__name__ != "OutOfMemoryError":
            print(f"facepipe worker: {type(error).__name__}: {redact(str(error))[:300]}", file=sys.stderr, flush=True)
            os._exit(70)

    def _one_by_one(self, block: Block) -> pa.Table:
        """Every image alone; one that kills the worker, or fails in a way no stage foresaw, becomes a row `crashed`."""
        table = block.items if block.rows is None else block.rows
        parts: list[pa.Table] = []
        failures: list[Exception] = []
        for n, uri in enumerate(block.items["uri"].to_pylist()):
            items = block.items.slice(n, 1)
            with self._attempts.mark_image(uri) as crashed:
                if crashed:
                    parts.append(make_status_rows(items, CRASHED, "the worker died twice on this image"))
                    continue
                try:
                    mine = table.slice(n, 1) if block.rows is None else table.filter(pc.equal(table["uri"], uri))
                    parts.append(self._chain(mine))
                except FacepipeError:
                    raise
                except Exception as error:
                    self._distrust(error)
                    failures.append(error)
                    reason = f"{type(error).__name__}: {redact(str(error))[:160]}"
                    parts.append(make_status_rows(items, CRASHED, reason))
        if len(failures) == len(parts) > 1:
            raise failures[0]  # not the images' fault
        return pa.concat_tables(parts, promote_options="default")
