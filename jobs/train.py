"""The command `facepipe train`."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from facepipe.config import parse_settings, read_toml
from jobs.console import exit_on_error, print_result, print_table
from jobs.options import HelpSettings, Init, JobSettings, Json, Quiet
from jobs.progress import ProgressReporter


def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG.toml", help="TOML file, such as jobs/train.toml.", show_default=False)
    ],
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start from scratch, without the checkpoints in run.output.")
    ] = False,
    angles: Annotated[
        str | None,
        typer.Option(
            "--angles",
            metavar="OUT.csv",
            help="After a training with class centres: list the faces near the main centre of their identity.",
        ),
    ] = None,
    max_angle: Annotated[
        float, typer.Option("--max-angle", min=0, max=180, help="Degrees above which --angles leaves a face out.")
    ] = 75.0,
    quiet: Quiet = False,
    as_json: Json = False,
    settings: JobSettings = None,
    help_settings: HelpSettings = False,
    init: Init = False,
) -> None:
    """Train an embedder or a detector.

    A config with a section `detection` trains a detector. Run it again to resume from the last checkpoint; the result
    is the same as without the interruption. The last lines compare the start weights with the training, on the
    validation and on each test set ([test]). The start stays the model if no validation is better. Writes model.toml
    with its weights, report.html, metrics.jsonl, manifest.json (what it was trained on) and checkpoints into
    run.output.

    For example:

        facepipe train train.toml

        facepipe train train.toml --set optim.lr=0.05 --set run.device=cuda --set run.workers=4

        facepipe train train.toml --set loss.name=subcenter-arcface --angles near.csv

        facepipe embed photos/ gallery/ --set embed.model=runs/first/model.toml
    """
    with exit_on_error():
        from pipelines.train import run
        from pipelines.train.pipeline import read_config

        chosen = read_config(read_toml(config), parse_settings(settings or []))
        if angles is not None:
            _list_angles(chosen, angles, max_angle, as_json=as_json)
            return
        with ProgressReporter("train", quiet=quiet, show_first=True) as progress:
            summary = run(
                chosen,
                fresh=fresh,
                on_progress=lambda step: _show_step(progress, step),
                log=progress.update,
            )
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_summary(summary))


def _list_angles(config: Any, path: str, max_angle: float, *, as_json: bool) -> None:
    """List the faces near the dominant centre of their class, and the others."""
    from facepipe.errors import ConfigError
    from pipelines.train.angles import write_angles
    from pipelines.train.config import TrainConfig

    if not isinstance(config, TrainConfig):
        raise ConfigError("--angles is for embedders: this config trains a detector")
    summary = write_angles(config, path, max_angle)

    def print_lines() -> None:
        print(f"{summary.kept:,} faces within {max_angle:g} degrees -> {summary.list}")
        print(f"{summary.dropped:,} faces beyond -> {summary.dropped_list}; median {summary.median:.1f} degrees")
        print(f"train on the first: --set data.list={summary.list} --set loss.name=arcface, with another run.output")

    print_result(asdict(summary), as_json=as_json, print_text=print_lines)


def _show_step(progress: ProgressReporter, step: Any) -> None:
    """Show where training stands; the scores of a validation are printed at once.

    Args:
        progress: where to show it.
        step: a `TrainingProgress` of the training.
    """
    line = format_step(step)
    # A bar is redrawn and would lose the scores, so they are printed as a line of their own.
    if step.scores:
        progress.log(line)
    progress.update(line, completed=step.step, total=step.steps)


def format_step(progress: Any) -> str:
    """Format where training stands as one line.

    Args:
        progress: a `TrainingProgress` of the training.
    """
    if not progress.step:
        return f"before the first of {progress.steps} steps, score {progress.scores['score']:.4f}"
    parts = [f"step {progress.step} of {progress.steps}", f"epoch {progress.epoch:.2f}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    parts += [f"lr {progress.lr:.3g}", f"{progress.speed:.1f} images/s"]
    if progress.scores:
        parts.append(f"score {progress.scores['score']:.4f}")
    parts.append(f"{_format_time(progress.seconds_left)} left")
    return ", ".join(parts)


def _format_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _print_summary(summary: Any) -> None:
    from facepipe.training.comparison import format_comparison

    # Counts of the data first, then the training, then the scores of the model.
    rows: list[tuple[str, object]] = [(name, f"{count:,}") for name, count in summary.data.items()]
    rows += [("steps", f"{summary.step:,} of {summary.steps:,}"), ("epochs", f"{summary.epochs:.2f}")]
    if summary.resumed:
        rows.append(("resumed from step", f"{summary.resumed:,}"))
    if summary.loss is not None:
        rows.append(("loss", f"{summary.loss:.4f}"))
    rows.append(("the model is from", "the start" if summary.keeps_start else f"step {summary.best:,}"))
    rows += [(name, f"{value:.4f}") for name, value in summary.scores.items()]
    print_table(f"train -> {summary.output} ({summary.end})", ("", ""), rows)
    for note in summary.notes:
        print(note)
    print(f"{summary.images_per_second:.1f} images/s, {summary.seconds:.1f} s; model {summary.model}")
    for comparison in summary.comparisons:
        print(format_comparison(comparison))
