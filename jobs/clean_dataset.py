"""The job that cleans a face dataset: `python -m jobs.clean_dataset CONFIG.toml`."""

from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated, Any

import typer

from facepipe.config import build, parse_settings, read_toml
from jobs.console import OVER_BUDGET, emit, fail, failures, say, table
from jobs.options import Json, Settings
from jobs.progress import EmbedProgress

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def clean_dataset(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A TOML file, such as jobs/clean_dataset.toml.", show_default=False)
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be embedded, and do nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
    settings: Settings = None,
) -> None:
    """Embed a face dataset, find its copies, judge its labels, and leave lists of what is fit for training.

    Run it again after it died, or when the dataset has grown: what is embedded stays. Exit code 3 if more images failed
    than dataset.max_failed allows.

    Example:

        python -m jobs.clean_dataset clean_dataset.toml --dry-run

        python -m jobs.clean_dataset clean_dataset.toml --set clean.relabels=true
    """
    with failures():
        from pipelines.clean_dataset import CleanDatasetConfig, run
        from pipelines.runtime.run_record import recorded

        chosen = build(CleanDatasetConfig, read_toml(config), parse_settings(settings or []))
        with nullcontext() if dry_run or not chosen.gallery else recorded(chosen.gallery, "clean_dataset"):
            with EmbedProgress(quiet) as bar:
                summary = run(chosen, dry_run=dry_run, progress=say("clean_dataset", quiet), embedded=bar)
            emit(asdict(summary), as_json, lambda: _show(summary))
            if summary.over_budget:
                fail(
                    f"{summary.failed} of {summary.images} images failed, more than dataset.max_failed allows",
                    OVER_BUDGET,
                )


def _show(summary: Any) -> None:
    title = "would embed" if summary.dry_run else "did"
    rows = [(step, _figures(found)) for step, found in summary.steps.items()]
    table(f"clean_dataset {title}: {summary.gallery}", ("step", ""), rows)
    if summary.lists:
        print(f"lists: {summary.lists}/clean.csv, clean.txt, msceleb.txt, relabel.csv; report.html beside them")


def _figures(found: dict[str, Any]) -> str:
    """The counts of a step that are not zero, and the decisions on labels."""
    counts = {name: n for name, n in {**found, **found.get("decisions", {})}.items() if type(n) is int and n}
    return ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in counts.items() if name != "version")


if __name__ == "__main__":
    app()
