"""The metrics of a run: metrics.jsonl, one JSON object per line, and TensorBoard's curves.

Lines are in the order of steps, one per step. A run that resumes drops the lines after its checkpoint.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from facepipe.storage import replace_file

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_TAIL_BYTES = 16 << 10  # the last line is searched in so many bytes


@dataclass(frozen=True)
class TrainingProgress:
    """The progress of a run after a step. metrics.jsonl holds these fields under these names.

    Attributes:
        step: steps done; 0: the start weights, before any step.
        steps: steps of the whole training.
        epoch: epochs done.
        loss: mean loss over the steps since the last line; None at step 0.
        lr: learning rate of the step; at step 0, that of the first step.
        speed: images per second of all workers, without validation; 0 at step 0.
        seconds: time of all attempts together.
        figures: means of the loss's figures, by name.
        scores: scores of the validation at this step, by name; empty without one.
    """

    step: int
    steps: int
    epoch: float
    loss: float | None
    lr: float
    speed: float
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Estimated seconds until the end, at the pace so far."""
        return self.seconds / self.step * (self.steps - self.step) if self.step else 0.0


def read_metrics(output: str) -> list[TrainingProgress]:
    """Read all complete lines of a run's metrics."""
    try:
        with open(os.path.join(output, METRICS), encoding="utf-8") as file:
            lines = file.readlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        with suppress(ValueError, TypeError):
            entries.append(TrainingProgress(**json.loads(line)))
    return entries


def select_trained(entries: Iterable[TrainingProgress]) -> list[TrainingProgress]:
    """Select the lines that follow on training: all but that of step 0, which has scores and nothing else."""
    return [entry for entry in entries if entry.loss is not None]


def compute_median_speed(entries: Iterable[TrainingProgress]) -> float:
    """Compute the median throughput in images per second; 0 without a line that follows on training."""
    speeds = sorted(entry.speed for entry in select_trained(entries))
    return speeds[len(speeds) // 2] if speeds else 0.0


def read_last_metrics(output: str) -> TrainingProgress | None:
    """Read the newest complete line without reading the others, or None if there is none."""
    try:
        with open(os.path.join(output, METRICS), "rb") as file:
            # Read the end only; its first line may be cut, and is then skipped as unreadable.
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        with suppress(ValueError, TypeError):
            return TrainingProgress(**json.loads(line))
    return None


class MetricsLog:
    """Writer of a run's metrics.

    Args:
        output: folder of the run.
        step: step that the run resumes from; later lines of an earlier attempt are dropped.
        tensorboard: also write curves for TensorBoard.
    """

    def __init__(self, output: str, step: int, tensorboard: bool = False):
        # Drop lines after the step to resume from, since that part of the run is repeated.
        kept = [entry for entry in read_metrics(output) if entry.step <= step] if step else []
        path = Path(output) / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(str(path)) as unfinished:
            Path(unfinished).write_text("".join(_to_line(entry) for entry in kept), encoding="utf-8")
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  __exit__ closes it
        self._board = _open_tensorboard(os.path.join(output, TENSORBOARD), step) if tensorboard else None

    def write(self, entry: TrainingProgress) -> None:
        """Write a line."""
        self._file.write(_to_line(entry))
        if self._board is not None:
            # A tag has one meaning: the accuracy of the training is not that of the validation.
            for name, value in entry.scores.items():
                self._board.add_scalar(f"val/{name}", value, entry.step)
            # The start weights have scores and nothing else.
            if entry.loss is not None:
                trained = {"loss": entry.loss, "lr": entry.lr, "images_per_second": entry.speed, **entry.figures}
                for name, value in trained.items():
                    self._board.add_scalar(f"train/{name}", value, entry.step)
            self._board.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _to_line(entry: TrainingProgress) -> str:
    return json.dumps(asdict(entry)) + "\n"


def _open_tensorboard(folder: str, step: int) -> Any:
    from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

    return SummaryWriter(folder, purge_step=step + 1)
