"""The command `facepipe nightly`."""

from datetime import datetime
from typing import Annotated, Any, Optional

import typer

from jobs.console import exit_on_error, print_seconds
from jobs.job_command import finish_job, format_counts, print_steps, record_job
from jobs.options import DryRun, HelpSettings, Init, Json, Quiet, Settings, YesErase, build_job_config
from jobs.progress import ProgressReporter, show_embedding


def nightly(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG.toml", help="TOML file, such as jobs/nightly.toml.", show_default=False)
    ],
    yes_erase: YesErase = None,
    yes_clock: Annotated[
        Optional[datetime],  # noqa: UP045
        typer.Option(
            "--yes-clock",
            metavar="DATE",
            formats=["%Y-%m-%d"],
            help="Date of this machine's clock (UTC), if it is right although the gallery holds later times.",
        ),
    ] = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
    settings: Settings = None,
    help_settings: HelpSettings = False,
    init: Init = False,
) -> None:
    """Bring a gallery up to date, as every night.

    The steps are embed, index, assign to clusters, erase, find copies, and compact. Every step resumes where it
    stopped, so run a night again if it failed. A second night on the same gallery is refused.

    The exit code is 1 if a source cannot be listed, if more images would go than night.missing_at_most and
    night.retention_at_most allow, or if the clock is wrong. All other steps run in that case as well. The exit code is
    3 if more images failed than night.max_failed allows.

    For example:

        facepipe nightly nightly.toml --dry-run

        facepipe nightly nightly.toml --json
    """
    with exit_on_error("finished work is kept; the next night resumes"):
        # Imports are inside the command, so that other commands do not wait for them.
        from pipelines.nightly import NightConfirmation, run
        from pipelines.nightly.config import NightlyConfig

        chosen = build_job_config(NightlyConfig, config, settings)
        with record_job(chosen.gallery, "nightly", dry_run=dry_run):
            with ProgressReporter("nightly", quiet=quiet) as progress:
                confirmation = NightConfirmation(tuple(yes_erase or ()), yes_clock.date() if yes_clock else None)
                summary = run(
                    chosen,
                    dry_run=dry_run,
                    confirmation=confirmation,
                    on_progress=progress.log,
                    on_embed=lambda embedded: show_embedding(progress, embedded),
                )
            finish_job(
                summary,
                as_json=as_json,
                print_text=lambda: _print_summary(summary),
                inputs=f"{summary.images} images",
                limit="night.max_failed",
            )


def _print_summary(summary: Any) -> None:
    title = "would do" if summary.dry_run else "did"
    print_steps(f"nightly {title}: {summary.gallery} (version {summary.version})", summary.steps, format_counts)
    for problem in summary.problems:
        print(f"note: {problem}")
    print_seconds(summary.seconds)
