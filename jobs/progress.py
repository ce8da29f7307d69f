"""Progress on stderr: a bar on a terminal, otherwise a line every few seconds."""

import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from facepipe.observe import logs
from jobs.console import make_line_printer

# Least time between two printed lines; a bar is not limited by it.
_INTERVAL_S = 5.0
# Least time between two events in JSON logs, which are kept for long.
_EVENT_INTERVAL_S = 60.0
# Characters of the columns of a bar.
_MIN_BAR = 8
_ELAPSED = len("0:00:00")


class ProgressReporter:
    """Show where a job stands.

    Updates are throttled: a bar redraws itself, and lines are printed a few seconds apart. Without a total there is no
    estimate of the time left, as for a listing that has not ended.
    """

    def __init__(
        self, job: str, *, quiet: bool = False, show_first: bool = False, clock: Callable[[], float] = time.monotonic
    ):
        """Prepare progress for one job.

        Args:
            job: name of the command, which begins each line.
            quiet: show nothing.
            show_first: print a line for the first update as well, instead of after the first interval.
            clock: returns the time in seconds; tests replace it.
        """
        self._job = job
        self._quiet = quiet or logs.is_json()
        self._clock = clock
        self._print_line = make_line_printer(job, quiet=quiet)
        self._bar: Progress | None = None
        # To print the first update at once, pretend that the last line is old enough.
        self._last_line = clock() - (_INTERVAL_S if show_first else 0.0)

    def __enter__(self) -> Self:
        # The bar goes to stderr and vanishes at its end, so that stdout holds the result alone.
        console = Console(stderr=True)
        if console.is_terminal and not self._quiet:
            # Names of sources may have brackets, which are no markup. Long figures are cut, not the rest.
            description = TextColumn("{task.description}", markup=False, table_column=_fix_width(len(self._job)))
            bar = BarColumn(None, table_column=Column(min_width=_MIN_BAR, ratio=1))
            figures = TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True))
            elapsed = TimeElapsedColumn(table_column=_fix_width(_ELAPSED))
            self._bar = Progress(description, bar, figures, elapsed, console=console, transient=True, expand=True)
            self._task = self._bar.add_task(self._job, total=None, figures="starting")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, figures: str, *, completed: float | None = None, total: float | None = None) -> None:
        """Show the current figures, at once on a bar, otherwise if the last line is old enough.

        JSON logs get the event `run.progress` once per minute.

        Args:
            figures: where the job stands, in a few words.
            completed: number of finished units.
            total: number of all units.
        """
        if self._bar is not None:
            self._bar.update(self._task, figures=figures, completed=completed, total=total)
        elif logs.is_json():
            if self._clock() - self._last_line >= _EVENT_INTERVAL_S:
                self._last_line = self._clock()
                logs.log_event("run.progress", command=self._job, completed=completed, total=total)
        elif self._clock() - self._last_line >= _INTERVAL_S:
            self._last_line = self._clock()
            self._print_line(figures)

    def log(self, line: str) -> None:
        """Print a line at once, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(f"{self._job}: {line}", markup=False, highlight=False, soft_wrap=True)
        else:
            self._print_line(line)

    def show_step(self, line: str) -> None:
        """Print what is done next, and show it on the bar in place of the figures of the step before."""
        if self._bar is not None:
            self._bar.tasks[0].total = None
            self._bar.update(self._task, figures=line, completed=0)
        self.log(line)


def _fix_width(width: int) -> Column:
    return Column(no_wrap=True, min_width=width, max_width=width)


def show_embedding(progress: ProgressReporter, summary: Any) -> None:
    """Show where a running `embed` stands.

    Args:
        progress: where to show it.
        summary: its `pipelines.embed.EmbedSummary`.
    """
    rate = format_embed_rate(summary)
    if not summary.total:
        progress.update(rate, completed=summary.listed)
        return
    line = f"{format_share(summary.listed, summary.total, summary.seconds)}: {rate}"
    progress.update(line, completed=summary.listed, total=summary.total)


def format_share(completed: int, total: int, seconds: float) -> str:
    """Format how much of a job is done, and the time left at the pace so far: `120 of 480 (25 %), 0:03:10 left`."""
    left = seconds / completed * max(0, total - completed) if completed else 0.0
    return f"{completed:,} of {total:,} ({completed / max(1, total):.0%}), {format_time(left)} left"


def format_time(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds: `0:03:10`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def format_embed_rate(summary: Any) -> str:
    """Format the figures of a running or finished `embed` as one line.

    Args:
        summary: a `pipelines.embed.EmbedSummary`.
    """
    rate = summary.images / summary.seconds if summary.seconds else 0.0
    parts = [f"{summary.images} images", f"{summary.faces} faces", f"{rate:.1f} images/s"]
    # Counts that are zero in most runs are shown only if there are any.
    if summary.failed:
        parts.append(f"{summary.failed} failed")
    if summary.skipped:
        parts.append(f"{summary.skipped} known")
    return ", ".join(parts)


def format_failed(count: int, examples: Iterable[tuple[str, str, str]]) -> str:
    """Format how many images failed, with a few of them: `2 images, such as photos/a.jpg (decode_error: empty file)`.

    Args:
        count: number of images that failed.
        examples: uri, status and reason of a few.
    """
    named = [f"{uri} ({status}: {reason})" if reason else f"{uri} ({status})" for uri, status, reason in examples]
    images = "1 image" if count == 1 else f"{count:,} images"
    return f"{images}, such as {', '.join(named)}" if named else images


def format_search_rate(summary: Any) -> str:
    """Format the figures of a running search as one line.

    Args:
        summary: a `pipelines.search.SearchSummary`.
    """
    rate = summary.queries / max(1e-9, summary.seconds)
    return f"{summary.queries} queries, {rate:.0f} queries/s"
