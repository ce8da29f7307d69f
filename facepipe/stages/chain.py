"""A chain of stages: checked before any worker starts, run in batches, timed."""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from facepipe.errors import ConfigError


class Stage(Protocol):
    """A frozen dataclass that is its own config; it names the columns it needs and adds."""

    needs: ClassVar[tuple[str, ...]]
    adds: ClassVar[tuple[str, ...]]

    def setup(self) -> None:
        """Load what the stage works with, once per worker."""

    def __call__(self, table: pa.Table) -> pa.Table: ...


class Chain:
    """Stages one after the other, `batch` rows at a time, so that memory does not grow with the table."""

    def __init__(self, stages: Sequence[Any], batch: int = 16):
        self.stages: tuple[Any, ...] = tuple(stages)
        self.batch = batch
        self.seconds: dict[str, float] = defaultdict(float)

    def setup(self) -> None:
        """Set every stage up."""
        for stage in self.stages:
            stage.setup()

    def __call__(self, table: pa.Table) -> pa.Table:
        parts = [self._run(table.slice(at, self.batch)) for at in range(0, table.num_rows, self.batch)]
        return pa.concat_tables(parts) if parts else self._run(table)

    def _run(self, table: pa.Table) -> pa.Table:
        for stage in self.stages:
            began = time.perf_counter()
            table = stage(table)
            self.seconds[type(stage).__name__.lower()] += time.perf_counter() - began
        return table


def check_chain(stages: Iterable[Any], columns: Iterable[str]) -> None:
    """Raise ConfigError where a stage needs a column that neither the input nor a stage before it has."""
    have = set(columns)
    for stage in stages:
        missing = [name for name in stage.needs if name not in have]
        if missing:
            raise ConfigError(
                f"the stage {type(stage).__name__} needs {', '.join(missing)}, which no stage before it adds"
            )
        have |= set(stage.adds)
