"""The command `facepipe clean-dataset`."""

from typing import Annotated, Any

import typer

from jobs.console import exit_on_error
from jobs.job_command import finish_job, format_counts, print_steps, record_job, run_old_spelling
from jobs.options import DryRun, HelpSettings, Init, JobSettings, Json, Quiet, build_job_config
from jobs.progress import ProgressReporter, show_embedding


def clean_dataset(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG.toml", help="TOML file, such as jobs/clean_dataset.toml.", show_default=False),
    ],
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
    settings: JobSettings = None,
    help_settings: HelpSettings = False,
    init: Init = False,
) -> None:
    """Clean the labels of a face dataset for training.

    The steps are embed, dedup and clean, which lists the images fit for training. Run it again to resume, or when the
    dataset has grown: embedded images are kept. The exit code is 3 if more images failed than dataset.max_failed
    allows.

    For example:

        facepipe clean-dataset clean_dataset.toml --dry-run

        facepipe clean-dataset clean_dataset.toml --set clean.relabels=true
    """
    with exit_on_error():
        from pipelines.clean_dataset import CleanDatasetConfig, run

        # Record the job around its steps, so that their runs name it as their parent.
        chosen = build_job_config(CleanDatasetConfig, config, settings)
        with record_job(chosen.gallery, "clean_dataset", dry_run=dry_run):
            with ProgressReporter("clean-dataset", quiet=quiet) as progress:
                summary = run(
                    chosen,
                    dry_run=dry_run,
                    on_progress=progress.show_step,
                    on_embed=lambda embedded: show_embedding(progress, embedded),
                )
            finish_job(
                summary,
                as_json=as_json,
                print_text=lambda: _print_summary(summary),
                inputs=f"{summary.images} images",
                limit="dataset.max_failed",
            )


def _print_summary(summary: Any) -> None:
    title = "would embed" if summary.dry_run else "did"
    print_steps(f"clean-dataset {title}: {summary.gallery}", summary.steps, _format_figures)
    if summary.lists:
        print(f"lists: {summary.lists}/clean.csv, clean.txt, msceleb.txt, relabel.csv; report.html beside them")


def _format_figures(figures: dict[str, Any]) -> str:
    """Format the counts of a step, and its decisions on labels."""
    return format_counts({**figures, **figures.get("decisions", {})})


if __name__ == "__main__":
    run_old_spelling(clean_dataset, "python -m jobs.clean_dataset", "facepipe clean-dataset")
