"""Progress on stderr: a bar on a terminal, a line every few seconds otherwise."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jobs.console import say
from pipelines.embed import Summary

_LINE_SECONDS = 5.0


class EmbedProgress:
    """Shows a running Summary. The total is not known before the listing has ended, so there is a rate and no ETA
    until then.
    """

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._last = time.monotonic()

    def __enter__(self) -> "EmbedProgress":
        if self._console.is_terminal and not self._quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("embed", total=None, figures="starting")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, summary: Summary) -> None:
        text = figures(summary)
        if self._bar is not None:
            self._bar.update(self._task, figures=text)
        elif not self._quiet and time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            say("embed")(text)


def figures(summary: Summary) -> str:
    """One line of a running or finished run."""
    rate = summary.images / summary.seconds if summary.seconds else 0.0
    parts = [f"{summary.images} images", f"{summary.faces} faces", f"{rate:.1f} images/s"]
    parts += [f"{summary.failed} failed"] if summary.failed else []
    parts += [f"{summary.skipped} known"] if summary.skipped else []
    return ", ".join(parts)
