"""What a run writes down as it goes: metrics.jsonl, one object a line, and TensorBoard's curves.

Lines are by step, in order, each step's once: what an earlier attempt wrote beyond the checkpoint is taken off.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from facepipe.storage import replace_file

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_TAIL = 16 << 10  # bytes that the last line is looked for in


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` of `steps` steps.

    loss: mean over the steps since the last line; speed: images a second of all workers, validation left aside
    seconds: of all attempts together; figures: of the loss; scores: of a validation at this step, if there was one
    """

    step: int
    steps: int
    epoch: float
    loss: float
    lr: float
    speed: float
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds that the rest will take at the pace so far."""
        return self.seconds / self.step * (self.steps - self.step) if self.step else 0.0


def read(output: str) -> list[Progress]:
    """All lines of a run's metrics; a last line that was cut off is left out."""
    try:
        with open(os.path.join(output, METRICS), encoding="utf-8") as file:
            lines = file.readlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError, TypeError):
            found.append(Progress(**json.loads(line)))
    return found


def last(output: str) -> Progress | None:
    """The newest whole line, without reading the others; None where there is none."""
    try:
        with open(os.path.join(output, METRICS), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        with suppress(ValueError, TypeError):
            return Progress(**json.loads(line))
    return None


class Journal:
    """Writes a run's metrics. step: that it goes on from; later lines of an earlier attempt are taken off."""

    def __init__(self, output: str, step: int, tensorboard: bool = False):
        kept = [entry for entry in read(output) if entry.step <= step] if step else []
        path = Path(output) / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(str(path)) as unfinished:
            Path(unfinished).write_text("".join(_line(entry) for entry in kept), encoding="utf-8")
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed by `close`
        self._board = _board(os.path.join(output, TENSORBOARD), step) if tensorboard else None

    def __call__(self, entry: Progress) -> None:
        """Write a line."""
        self._file.write(_line(entry))
        if self._board is not None:
            for name, value in {**_curves(entry), **entry.figures, **entry.scores}.items():
                self._board.add_scalar(name, value, entry.step)
            self._board.flush()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *ended: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _line(entry: Progress) -> str:
    return json.dumps(asdict(entry)) + "\n"


def _curves(entry: Progress) -> dict[str, float]:
    return {"loss": entry.loss, "lr": entry.lr, "images_per_second": entry.speed}


def _board(folder: str, step: int) -> Any:
    from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

    return SummaryWriter(folder, purge_step=step + 1)
