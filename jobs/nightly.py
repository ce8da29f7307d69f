"""facepipe nightly"""

from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated, Any

import typer

from facepipe.config import build, parse_settings, read_toml
from jobs.console import FAILED, OVER_BUDGET, emit, fail, failures, say, table
from jobs.options import Json, Settings
from jobs.progress import EmbedProgress


def nightly(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A TOML file, such as jobs/nightly.toml.", show_default=False)
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
    settings: Settings = None,
) -> None:
    """Bring a gallery up to date: embed, index, clusters, what is to be erased, copies, compaction.

    Every step goes on from where it was, so a night that died is run again. A second one beside it is refused. Exit
    code 1 where a source is not there or misses more images than night.missing_at_most allows, though all else was
    done; 3 if more images failed than night.max_failed allows.

    Example:

        facepipe nightly nightly.toml --dry-run

        facepipe nightly nightly.toml --json
    """
    with failures("what was finished is kept; the next night goes on from there"):
        from pipelines.nightly import run
        from pipelines.nightly.config import NightlyConfig
        from pipelines.runtime.run_record import recorded

        chosen = build(NightlyConfig, read_toml(config), parse_settings(settings or []))
        # A dry run leaves nothing, no record either; the record of a night has the exit code.
        with nullcontext() if dry_run or not chosen.gallery else recorded(chosen.gallery, "nightly"):
            with EmbedProgress(quiet) as bar:
                summary = run(chosen, dry_run=dry_run, progress=say("nightly", quiet), embedded=bar)
            emit(asdict(summary), as_json, lambda: _show(summary))
            if summary.failures:
                fail("; ".join(summary.failures), FAILED)
            if summary.over_budget:
                fail(
                    f"{summary.failed} of {summary.images} images failed, more than night.max_failed allows",
                    OVER_BUDGET,
                )


def _show(summary: Any) -> None:
    title = "would do" if summary.dry_run else "did"
    rows = [(step, _figures(found)) for step, found in summary.steps.items()]
    table(f"nightly {title}: {summary.gallery} (version {summary.version})", ("step", ""), rows)
    for problem in summary.problems:
        print(f"note: {problem}")
    if summary.seconds:
        print(", ".join(f"{step} {seconds:.1f} s" for step, seconds in summary.seconds.items()))


def _figures(found: dict[str, Any]) -> str:
    """The counts of a step that are not zero."""
    counts = {name: value for name, value in found.items() if isinstance(value, int) and value and name != "version"}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.items() if value is not True)
