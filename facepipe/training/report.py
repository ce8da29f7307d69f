"""The training report: one HTML file of curves, figures and the whole config, without scripts or outside assets."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from facepipe.reports.model import Figure, Table
from facepipe.storage import write
from facepipe.storage.redact import redact
from facepipe.training import curves
from facepipe.training.curves import CurveChart
from facepipe.training.trainer.loop import Outcome
from facepipe.training.trainer.metrics_log import TrainingProgress

_ENDS = {"done": "all steps done", "stopped": "stopped early", "interrupted": "interrupted"}


def write_report(path: str, entries: Sequence[TrainingProgress], outcome: Outcome, about: dict[str, Any]) -> None:
    """Write the report of a run.

    entries: its metrics; about: title, subtitle, notes, data (counts by name) and config (nested settings)
    Raises StorageError where the file cannot be written.
    """
    style = files("facepipe.reports").joinpath("report.css").read_text(encoding="utf-8")
    template = files("facepipe.training").joinpath("report.html.j2").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sides = {"left": curves.LEFT, "right": curves.RIGHT, "top": curves.TOP, "bottom": curves.BOTTOM}
    page = environment.from_string(template).render(
        title=about["title"],
        subtitle=about["subtitle"],
        notes=about.get("notes", ()),
        figures=_build_figures(entries, outcome),
        charts=build_charts(entries, outcome),
        tables=_build_tables(about),
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        width=curves.WIDTH,
        height=curves.HEIGHT,
        **sides,
    )
    write(path, page.encode())


def _build_figures(entries: Sequence[TrainingProgress], outcome: Outcome) -> list[Figure]:
    found = [Figure("steps", f"{outcome.step:,}", f"of {outcome.steps:,}, {_ENDS[outcome.end]}")]
    if entries:
        final = entries[-1]
        found += [Figure("epochs", f"{final.epoch:.2f}"), Figure("loss", f"{final.loss:.4f}", "at the end")]
        found.append(Figure("images a second", f"{_get_median_speed(entries):,.0f}", "median, validation left aside"))
    if outcome.history.scores:
        found.append(Figure("best score", f"{outcome.history.best:.4f}", f"at step {outcome.history.step:,}"))
    return [*found, Figure("time", _format_duration(outcome.seconds))]


def _get_median_speed(entries: Sequence[TrainingProgress]) -> float:
    speeds = sorted(entry.speed for entry in entries)
    return speeds[len(speeds) // 2]


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def build_charts(entries: Sequence[TrainingProgress], outcome: Outcome) -> list[CurveChart]:
    """Loss, learning rate, scores, figures of the loss, and throughput, as far as there are any."""
    best = (outcome.history.step, "best") if outcome.history.scores else None
    scored = [entry for entry in entries if entry.scores]
    shown = [name for name in ("score", "accuracy", "auc") if any(name in entry.scores for entry in scored)]
    found = [curves.build_curve_chart("Loss", {"loss": [(e.step, e.loss) for e in entries]}, best)]
    found += (
        [curves.build_curve_chart("Score", {n: [(e.step, e.scores[n]) for e in scored] for n in shown}, best)]
        if shown
        else []
    )
    found.append(curves.build_curve_chart("Learning rate", {"rate": [(e.step, e.lr) for e in entries]}))
    found.append(curves.build_curve_chart("Throughput", {"images a second": [(e.step, e.speed) for e in entries]}))
    names = sorted({name for entry in entries for name in entry.figures})
    of = {name: [(e.step, e.figures[name]) for e in entries if name in e.figures] for name in names}
    return found + [curves.build_curve_chart(f"Of the loss: {name}", {name: points}) for name, points in of.items()]


def _build_tables(about: dict[str, Any]) -> list[Table]:
    data = tuple(
        (name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in about["data"].items()
    )
    tables = [Table("Data", ("", "count"), data)]
    if about.get("scores"):
        rows = tuple((name, f"{value:.5f}") for name, value in about["scores"].items())
        tables.append(Table("Validation of the result", ("figure", "value"), rows))
    for section, values in about["config"].items():
        rows = tuple((key, redact(str(value))) for key, value in _flatten(values))
        tables.append(Table(f"[{section}]", ("key", "value"), rows))
    return tables


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = list[tuple[str, Any]]()
    for key, value in values.items():
        found += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found
