"""facepipe train"""

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from facepipe.config import parse_settings, read_toml
from jobs.console import emit, failures, say, table
from jobs.options import Json, Settings

_LINE_SECONDS = 5.0
_KEPT = "what is done is kept, and the same command goes on from there"


def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A TOML file, such as jobs/train.toml.", show_default=False)
    ],
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin again, without the checkpoints that run.output holds.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
    settings: Settings = None,
) -> None:
    """Train an embedder, or with a section `detection` a detector, and leave a model that facepipe can use.

    Running it again goes on from the last checkpoint, to the same result as if it had never stopped. In run.output it
    leaves model.toml with its weights, report.html, metrics.jsonl, manifest.json (what it was trained on), and the
    checkpoints.

    Example:

        facepipe train train.toml

        facepipe train train.toml --set optim.lr=0.05 --set run.device=cuda --set run.workers=4

        facepipe embed photos/ gallery/ --set embed.model=runs/first/model.toml
    """
    with failures(_KEPT):
        from pipelines.train import run
        from pipelines.train.pipeline import read_config

        chosen = read_config(read_toml(config), parse_settings(settings or []))
        summary = run(chosen, fresh, _Progress(quiet), _Lines(quiet))
        emit(asdict(summary), as_json, lambda: _show(summary))


class _Lines:
    """A line every few seconds at most."""

    def __init__(self, quiet: bool):
        self._say, self._last = say("train", quiet), time.monotonic() - _LINE_SECONDS

    def __call__(self, line: str) -> None:
        if time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            self._say(line)


class _Progress:
    """Says where a run stands; what a validation found is said at once."""

    def __init__(self, quiet: bool):
        self._say, self._lines = say("train", quiet), _Lines(quiet)

    def __call__(self, progress: Any) -> None:
        (self._say if progress.scores else self._lines)(line(progress))


def line(progress: Any) -> str:
    """Where a run stands, in one line."""
    parts = [f"step {progress.step} of {progress.steps}", f"epoch {progress.epoch:.2f}", f"loss {progress.loss:.4f}"]
    parts += [f"lr {progress.lr:.3g}", f"{progress.speed:.1f} images/s"]
    parts += [f"score {progress.scores['score']:.4f}"] if progress.scores else []
    return ", ".join([*parts, f"{_time(progress.left)} left"])


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _show(summary: Any) -> None:
    rows: list[tuple[str, object]] = [(name, f"{count:,}") for name, count in summary.data.items()]
    rows += [("steps", f"{summary.step:,} of {summary.steps:,}"), ("epochs", f"{summary.epochs:.2f}")]
    rows += [("went on from step", f"{summary.resumed:,}")] if summary.resumed else []
    rows += [("loss", f"{summary.loss:.4f}"), ("the model is of step", f"{summary.best:,}")]
    rows += [(name, f"{value:.4f}") for name, value in summary.scores.items()]
    table(f"train -> {summary.output} ({summary.end})", ("", ""), rows)
    for note in summary.notes:
        print(note)
    print(f"{summary.images_per_second:.1f} images/s, {summary.seconds:.1f} s; model {summary.model}")
