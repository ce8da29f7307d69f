"""The job that searches a batch of queries: `python -m jobs.bulk_search CONFIG.toml`."""

import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated, Any

import typer

from facepipe.config import build, parse_settings, read_toml
from jobs.console import OVER_BUDGET, emit, fail, failures, say, table
from jobs.options import Json, Settings

_LINE_SECONDS = 5.0
app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def bulk_search(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A TOML file, such as jobs/bulk_search.toml.", show_default=False)
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be searched, and do nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
    settings: Settings = None,
) -> None:
    """Find the nearest faces of every query, and say who it is.

    Run it again after it died: it goes on from its last finished block. Exit code 3 if more queries were of no use than
    bulk.max_failed allows.

    Example:

        python -m jobs.bulk_search bulk_search.toml --dry-run

        python -m jobs.bulk_search bulk_search.toml --set bulk.fpir=0.001 --json
    """
    with failures():
        from pipelines.bulk_search import BulkSearchConfig, run
        from pipelines.runtime.run_record import recorded

        chosen = build(BulkSearchConfig, read_toml(config), parse_settings(settings or []))
        with nullcontext() if dry_run or not chosen.gallery else recorded(chosen.gallery, "bulk_search"):
            tell = say("bulk_search", quiet)
            summary = run(chosen, dry_run=dry_run, progress=tell, searched=_Rate(tell))
            emit(asdict(summary), as_json, lambda: _show(summary))
            if summary.over_budget:
                fail(
                    f"{summary.failed} of {summary.queries} queries were of no use, more than bulk.max_failed allows",
                    OVER_BUDGET,
                )


class _Rate:
    """A line every few seconds."""

    def __init__(self, tell: Any):
        self._tell, self._last = tell, time.monotonic()

    def __call__(self, summary: Any) -> None:
        if time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            self._tell(f"{summary.queries} queries, {summary.queries / max(1e-9, summary.seconds):.0f}/s")


def _show(summary: Any) -> None:
    title = "would search" if summary.dry_run else "searched"
    rows = [(step, _figures(found)) for step, found in summary.steps.items()]
    table(f"bulk_search {title}: {summary.gallery} -> {summary.output}", ("step", ""), rows)


def _figures(found: dict[str, Any]) -> str:
    """The figures of a step that are not zero."""
    shown = {name: n for name, n in found.items() if isinstance(n, int | float) and n and name != "seconds"}
    return ", ".join(f"{name.replace('_', ' ')} {n:g}" if n is not True else name for name, n in shown.items())


if __name__ == "__main__":
    app()
