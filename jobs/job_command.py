"""What the commands share that run a job from one TOML file: nightly, clean-dataset and bulk-search."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NoReturn

import typer

from jobs.console import ExitCode, fail, print_result, print_table


@contextmanager
def record_job(gallery: str, name: str, *, dry_run: bool) -> Iterator[None]:
    """Record the job in its gallery, with the exit code it ends with. A dry run leaves no record.

    Args:
        gallery: folder of the gallery; without one nothing is recorded.
        name: name of the job in the record.
        dry_run: whether the job writes nothing.
    """
    from pipelines.runtime.run_record import record_run

    if dry_run or not gallery:
        yield
        return
    with record_run(gallery, name):
        yield


def finish_job(summary: Any, *, as_json: bool, print_text: Callable[[], None], inputs: str, limit: str) -> None:
    """Print the summary of a job and exit with the code that its figures call for.

    Args:
        summary: the job's `JobSummary`.
        as_json: whether `--json` is set.
        print_text: prints the summary for people.
        inputs: how many inputs of which kind there were, such as `12 images`.
        limit: the setting that says how many may fail.
    """
    print_result(asdict(summary), as_json=as_json, print_text=print_text)
    # Failures of steps weigh more than a share of failed inputs, so their exit code comes first.
    failures = getattr(summary, "failures", [])
    if failures:
        fail("; ".join(failures), ExitCode.FAILED)
    if summary.over_budget:
        fail(f"{summary.failed} of {inputs} failed, more than {limit} allows", ExitCode.OVER_BUDGET)


def print_steps(title: str, steps: dict[str, dict[str, Any]], format_figures: Callable[[dict[str, Any]], str]) -> None:
    """Print a table with one row per step.

    Args:
        title: title of the table.
        steps: the figures of each step, by its name.
        format_figures: formats the figures of a step as one line.
    """
    print_table(title, ("step", ""), [(step, format_figures(figures)) for step, figures in steps.items()])


# Numbers of a step that say how it worked, and not what it did.
HIDDEN_FIGURES = frozenset(["version", "table_version", "workers", "nprobe", "rescore", "bytes", "total", "seconds"])
# What the counts of an embedding are called for people, in this order.
_EMBED_WORDS = {
    "listed": "listed",
    "images": "read",
    "skipped": "known",
    "erased": "erased earlier",
    "repeated": "listed twice",
    "ignored": "other files",
}


def format_counts(figures: dict[str, Any]) -> str:
    """Format the counts of a step that are not zero; versions and settings are not counts."""
    # The exact type leaves out booleans, which are integers too.
    counts = {
        name: value for name, value in figures.items() if type(value) is int and value and name not in HIDDEN_FIGURES
    }
    if "listed" in figures:
        words = {word: counts.pop(name) for name, word in _EMBED_WORDS.items() if name in counts}
        counts = words | counts
    return ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items())


def run_old_spelling(command: Callable[..., None], old: str, new: str) -> NoReturn:
    """Run a command under its old spelling, with a warning. The next version drops the old spelling.

    Args:
        command: function of the command.
        old: the old spelling, such as `python -m jobs.bulk_search`.
        new: the command that replaces it, such as `facepipe bulk-search`.
    """
    print(f"warning: `{old}` is deprecated: use `{new}`", file=sys.stderr)
    # Parse the arguments as the new command does, under its name.
    app = typer.Typer(
        pretty_exceptions_enable=False, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.command(name=new.rpartition(" ")[2])(command)
    app()
    raise AssertionError("app() exits")
