"""The command `facepipe bulk-search`."""

from typing import Annotated, Any

import typer

from jobs.console import exit_on_error
from jobs.job_command import HIDDEN_FIGURES, finish_job, print_steps, record_job, run_old_spelling
from jobs.options import DryRun, HelpSettings, Init, JobSettings, Json, Quiet, build_job_config
from jobs.progress import ProgressReporter, format_search_rate


def bulk_search(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG.toml", help="TOML file, such as jobs/bulk_search.toml.", show_default=False)
    ],
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
    settings: JobSettings = None,
    help_settings: HelpSettings = False,
    init: Init = False,
) -> None:
    """Search a batch of queries, and identify them.

    Run it again to resume from the last finished block. The exit code is 3 if more queries failed than bulk.max_failed
    allows.

    For example:

        facepipe bulk-search bulk_search.toml --dry-run

        facepipe bulk-search bulk_search.toml --set bulk.fpir=0.001 --json
    """
    with exit_on_error():
        from pipelines.bulk_search import BulkSearchConfig, run

        chosen = build_job_config(BulkSearchConfig, config, settings)
        with record_job(chosen.gallery, "bulk_search", dry_run=dry_run):
            with ProgressReporter("bulk-search", quiet=quiet) as progress:
                summary = run(
                    chosen,
                    dry_run=dry_run,
                    on_progress=progress.log,
                    on_search=lambda searched: progress.update(format_search_rate(searched)),
                )
            finish_job(
                summary,
                as_json=as_json,
                print_text=lambda: _print_summary(summary),
                inputs=f"{summary.queries} queries",
                limit="bulk.max_failed",
            )


def _print_summary(summary: Any) -> None:
    title = "would search" if summary.dry_run else "searched"
    print_steps(f"bulk-search {title}: {summary.gallery} -> {summary.output}", summary.steps, _format_figures)


def _format_figures(figures: dict[str, Any]) -> str:
    """Format the figures of a step that are not zero; of a flag only the name."""
    parts = []
    # Times and texts are left out, and so is what is zero.
    for name, value in figures.items():
        if not isinstance(value, int | float) or not value or name in HIDDEN_FIGURES:
            continue
        label = name.replace("_", " ")
        parts.append(label if value is True else f"{label} {value:g}")
    return ", ".join(parts)


if __name__ == "__main__":
    run_old_spelling(bulk_search, "python -m jobs.bulk_search", "facepipe bulk-search")
