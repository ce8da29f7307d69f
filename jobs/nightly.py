"""The command `facepipe nightly`."""

import shlex
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Optional

import typer

from facepipe.errors import ConfigError
from jobs.console import ExitCode, exit_on_error, fail, print_result, print_seconds
from jobs.examples import write_example_config
from jobs.job_command import finish_job, format_counts, print_steps, record_job
from jobs.night_setup import print_next_steps, write_night_config
from jobs.options import Check, DryRun, HelpSettings, JobSettings, Json, Quiet, YesErase, build_job_config
from jobs.progress import ProgressReporter, format_failed, show_embedding


def nightly(
    config: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="CONFIG.toml", help="TOML file, such as jobs/nightly.toml. With --init: photos.", show_default=False
        ),
    ] = None,
    gallery: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="GALLERY", help="Only with --init: folder of the gallery.", show_default=False),
    ] = None,
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
    check: Check = False,
    quiet: Quiet = False,
    as_json: Json = False,
    settings: JobSettings = None,
    help_settings: HelpSettings = False,
    init: Annotated[
        bool,
        typer.Option(
            "--init",
            help="A short config for PHOTOS and GALLERY, as a new file here; without them the example with all keys.",
        ),
    ] = False,
) -> None:
    """Bring a gallery up to date, as every night.

    The steps are embed, index, assign to clusters, erase, find copies, and compact. Every step resumes where it
    stopped, so run a night again if it failed. A second night on the same gallery is refused.

    The exit code is 1 if a source cannot be listed, if more images would go than night.missing_at_most and
    night.retention_at_most allow, or if the clock is wrong. All other steps run in that case as well. The exit code is
    3 if more images failed than night.max_failed allows.

    `facepipe nightly --init PHOTOS GALLERY` writes nightly.toml, and prints lines for cron and systemd. --check tries
    the models, opens the gallery, lists the sources, and compares disk and memory with what the night needs. Nothing is
    embedded; the exit code is 1 if anything is wrong.

    For example:

        facepipe nightly --init photos/ gallery/

        facepipe nightly nightly.toml --check

        facepipe nightly nightly.toml --dry-run

        facepipe nightly nightly.toml --json
    """
    with exit_on_error("finished work is kept; the next night resumes"):
        if init:
            _write_config(config, gallery)
            return
        if config is None or gallery is not None:
            raise ConfigError("give one CONFIG.toml; `facepipe nightly --init PHOTOS GALLERY` writes one")
        # Imports are inside the command, so that other commands do not wait for them.
        from pipelines.nightly import NightConfirmation, run
        from pipelines.nightly.config import NightlyConfig

        chosen = build_job_config(NightlyConfig, config, settings)
        if check:
            _check(chosen, quiet=quiet, as_json=as_json)
            return
        with record_job(chosen.gallery, "nightly", dry_run=dry_run):
            with ProgressReporter("nightly", quiet=quiet) as progress:
                confirmation = NightConfirmation(tuple(yes_erase or ()), yes_clock.date() if yes_clock else None)
                summary = run(
                    chosen,
                    dry_run=dry_run,
                    confirmation=confirmation,
                    on_progress=progress.show_step,
                    on_embed=lambda embedded: show_embedding(progress, embedded),
                )
            finish_job(
                summary,
                as_json=as_json,
                print_text=lambda: _print_summary(summary),
                inputs=f"{summary.images} images",
                limit="night.max_failed",
            )


def _write_config(photos: str | None, gallery: str | None) -> None:
    """Write a config for photos and a gallery, or the example with all keys."""
    if photos is None:
        write_example_config("nightly")
        return
    if gallery is None:
        raise ConfigError(f"--init needs a gallery as well: facepipe nightly --init {photos} GALLERY")
    print_next_steps(write_night_config(photos, gallery))


def _check(config: Any, *, quiet: bool, as_json: bool) -> None:
    """Check a night, print a line per check, and fail if a check does."""
    from pipelines.nightly.check import check_night

    with ProgressReporter("nightly", quiet=quiet) as progress:
        results = check_night(config, progress.show_step)
    failed = [result for result in results if result.problem]

    def print_text() -> None:
        for result in results:
            print(f"{'FAILED' if result.problem else 'ok    '}  {result.what}: {result.problem or result.detail}")

    print_result({"checks": [asdict(result) for result in results]}, as_json=as_json, print_text=print_text)
    if failed:
        problems = "; ".join(f"{result.what}: {result.problem}" for result in failed)
        fail(f"{len(failed)} of {len(results)} checks failed: {problems}", ExitCode.FAILED)


def _print_summary(summary: Any) -> None:
    title = "would do" if summary.dry_run else "did"
    state = "new" if summary.version < 0 else f"version {summary.version}"
    print_steps(f"nightly {title}: {summary.gallery} ({state})", summary.steps, _format_figures)
    for problem in summary.problems:
        print(f"note: {problem}")
    print_seconds(summary.seconds)
    if not summary.dry_run:
        for line in _format_ending(summary):
            print(line)


def _format_ending(summary: Any) -> list[str]:
    """Format how a night ended: what came in, was added and failed, where the result lies, and what to do next."""
    from facepipe.gallery.commits.parts import MAX_EXAMPLES

    embeddings = [figures for figures in summary.steps.values() if "listed" in figures]
    name = shlex.quote(summary.gallery)
    listed = sum(figures["listed"] for figures in embeddings)
    lines = [f"in: {listed:,} images listed, {summary.images:,} of them read"]
    lines.append(f"added: {sum(figures['faces'] for figures in embeddings):,} faces")
    if summary.failed:
        examples = [example for figures in embeddings for example in figures["failed_examples"]]
        failed = format_failed(summary.failed, examples[:MAX_EXAMPLES])
        lines.append(f"failed: {failed}; `facepipe info {name} --failed` names all")
    lines.append(f"gallery: {summary.gallery}, version {summary.version}")
    lines.append(f"next: facepipe info {name}")
    return lines


def _format_figures(figures: dict[str, Any]) -> str:
    """Format the counts of a step; one that has nothing to do says so."""
    return format_counts(figures) or "nothing"
