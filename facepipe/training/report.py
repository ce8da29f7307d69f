"""The report of a training: one HTML file with curves, figures and the whole config. It needs no scripts or assets."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from facepipe.reports.model import Figure, Mark, Table
from facepipe.storage import write
from facepipe.storage.redact import redact
from facepipe.training import curves
from facepipe.training.comparison import Comparison, format_comparison
from facepipe.training.curves import CurveChart, build_curve_chart
from facepipe.training.trainer import metrics_log
from facepipe.training.trainer.loop import Outcome
from facepipe.training.trainer.metrics_log import TrainingProgress

# Names of the ends of a run, and scores that get a chart.
_END_TEXTS = {"done": "all steps done", "stopped": "stopped early", "interrupted": "interrupted"}
_CHARTED_SCORES = ("score", "accuracy", "auc")


@dataclass(frozen=True)
class ReportTexts:
    """What a report says besides metrics and outcome.

    Attributes:
        title: title of the page.
        subtitle: line below the title.
        data: counts of the data, by name.
        config: all settings, nested by section.
        notes: remarks on the data and the scores.
        scores: scores of the resulting model, by name.
        comparisons: the validation and each test set, before and after.
    """

    title: str
    subtitle: str
    data: dict[str, Any]
    config: dict[str, Any]
    notes: Sequence[str] = ()
    scores: dict[str, float] = field(default_factory=dict)
    comparisons: Sequence[Comparison] = ()


def write_report(path: str, entries: Sequence[TrainingProgress], outcome: Outcome, texts: ReportTexts) -> None:
    """Write the report of a run.

    Args:
        path: HTML file to write.
        entries: metrics of the run.
        outcome: how the run ended.
        texts: everything else on the page.

    Raises:
        StorageError: The file cannot be written.
    """
    # The page holds its style, and its policy allows exactly that style.
    style = files("facepipe.reports").joinpath("report.css").read_text(encoding="utf-8")
    template = files("facepipe.training").joinpath("report.html.j2").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        title=texts.title,
        subtitle=texts.subtitle,
        notes=[*map(format_comparison, texts.comparisons), *texts.notes],
        figures=_build_figures(entries, outcome),
        charts=build_charts(entries, outcome),
        tables=_build_tables(texts),
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        width=curves.WIDTH,
        height=curves.HEIGHT,
        left=curves.LEFT,
        right=curves.RIGHT,
        top=curves.TOP,
        bottom=curves.BOTTOM,
    )
    write(path, page.encode())


def _build_figures(entries: Sequence[TrainingProgress], outcome: Outcome) -> list[Figure]:
    """Build the headline figures."""
    figures = [Figure("steps", f"{outcome.step:,}", f"of {outcome.steps:,}, {_END_TEXTS[outcome.end]}")]
    trained = metrics_log.select_trained(entries)
    if trained:
        last = trained[-1]
        figures.append(Figure("epochs", f"{last.epoch:.2f}"))
        figures.append(Figure("loss", f"{last.loss:.4f}", "at the end"))
        speed = metrics_log.compute_median_speed(entries)
        figures.append(Figure("images per second", f"{speed:,.0f}", "median, without validation"))
    history = outcome.history
    if history.start:
        figures.append(Figure("score of the start", f"{history.start['score']:.4f}", "before the first step"))
    if history.scores:
        figures.append(Figure("best score", f"{history.best:.4f}", f"at step {history.step:,}"))
    figures.append(Figure("time", _format_duration(outcome.seconds)))
    return figures


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def build_charts(entries: Sequence[TrainingProgress], outcome: Outcome) -> list[CurveChart]:
    """Build the charts of loss, scores, learning rate, throughput and each of the loss's figures.

    Charts without data are left out.
    """
    # The model is of this step, which is 0 if the start weights are kept.
    history = outcome.history
    label = "start, kept" if history.keeps_start else "best"
    best = Mark(history.model_step, label) if history.model_scores else None
    trained = metrics_log.select_trained(entries)
    losses = [(e.step, e.loss) for e in trained if e.loss is not None]
    charts = [build_curve_chart("Loss", {"loss": losses}, best)]
    scored = [entry for entry in entries if entry.scores]
    score_names = [name for name in _CHARTED_SCORES if any(name in entry.scores for entry in scored)]
    if score_names:
        score_curves = {name: [(e.step, e.scores[name]) for e in scored] for name in score_names}
        charts.append(build_curve_chart("Score", score_curves, best))
    charts.append(build_curve_chart("Learning rate", {"rate": [(e.step, e.lr) for e in trained]}))
    charts.append(build_curve_chart("Throughput", {"images per second": [(e.step, e.speed) for e in trained]}))
    for name in sorted({name for entry in trained for name in entry.figures}):
        points = [(e.step, e.figures[name]) for e in trained if name in e.figures]
        charts.append(build_curve_chart(f"Of the loss: {name}", {name: points}))
    return charts


def _build_tables(texts: ReportTexts) -> list[Table]:
    """Build the tables of the data, the scores and each section of the config."""
    counts = tuple((name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in texts.data.items())
    tables = [Table("Data", ("figure", "count"), counts)]
    if texts.comparisons:
        rows = tuple(
            (comparison.name, name, f"{before:.5f}", f"{comparison.after[name]:.5f}")
            for comparison in texts.comparisons
            for name, before in comparison.before.items()
            if name in comparison.after
        )
        tables.append(Table("Before and after", ("set", "figure", "start weights", "after training"), rows))
    if texts.scores:
        scores = tuple((name, f"{value:.5f}") for name, value in texts.scores.items())
        tables.append(Table("Validation of the result", ("figure", "value"), scores))
    sections = [(section, values) for section, values in texts.config.items() if isinstance(values, dict)]
    # A list of sections gets a table for each.
    lists = [(section, values) for section, values in texts.config.items() if not isinstance(values, dict)]
    sections += [(section, values) for section, several in lists for values in several]
    for section, values in sections:
        # Settings may hold URLs with credentials, so they are redacted.
        settings = tuple((key, redact(str(value))) for key, value in _flatten(values))
        tables.append(Table(f"[{section}]", ("key", "value"), settings))
    return tables


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, value))
    return pairs
