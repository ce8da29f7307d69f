"""How commands print and how they fail: results on stdout, messages on stderr, one exit code per kind of end."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from facepipe.errors import ConfigError, FacepipeError
from facepipe.observe import logs

_MAX_PATH = 4096
# What an interruption leaves behind, as messages say it.
# What the system says if a disk, or somebody's share of it, is full.
_FULL_DISK = ("no space left on device", "disk quota exceeded")
RESUME_HINT = "finished work is kept; run the same command again to resume"
REPORT_HINT = "the report is unchanged; run the same command again to resume from the last finished step"


# Columns of a table that is written to a file or a pipe: as many as its widest row needs.
_PIPE_WIDTH = 100_000


class ExitCode(IntEnum):
    """The exit codes of a command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    OVER_BUDGET = 3
    INTERRUPTED = 130
    TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM, raised in the main thread so that it can commit and clean up."""


@contextmanager
def exit_on_error(hint: str = RESUME_HINT) -> Iterator[None]:
    """Turn expected errors and interruptions into a message and an exit code.

    Any other exception is a bug, and passes with its traceback.

    Args:
        hint: what an interruption leaves behind, and what to do next.
    """
    # Raise SIGTERM as an exception, so that `finally` blocks run, and restore the handler for callers.
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except ConfigError as error:
        fail(str(error), ExitCode.USAGE, error)
    except FacepipeError as error:
        message = str(error)
        if any(words in message.lower() for words in _FULL_DISK):
            message = f"{message}. Free some space; {hint}"
        fail(message, ExitCode.FAILED, error)
    except UnicodeEncodeError as error:
        # Libraries that write files take no other paths.
        if len(error.object) > _MAX_PATH:
            raise
        fail(f"{error.object!r} is not UTF-8: choose a name that is", ExitCode.USAGE)
    except KeyboardInterrupt:
        fail(f"interrupted; {hint}", ExitCode.INTERRUPTED)
    except Terminated:
        fail(f"terminated; {hint}", ExitCode.TERMINATED)
    except BrokenPipeError:
        # The reader of stdout has ended. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(int(ExitCode.FAILED)) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise_terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def fail(message: str, code: ExitCode, error: FacepipeError | None = None) -> NoReturn:
    """Print a message on stderr and exit with a code.

    Args:
        message: why the command ends.
        code: the exit code.
        error: the exception behind it, which JSON logs name.
    """
    logs.report_failure(message, int(code), error)
    raise typer.Exit(int(code))


def make_line_printer(job: str, *, quiet: bool = False) -> Callable[[str], None]:
    """Return a function that prints a line of progress on stderr.

    It prints nothing if stderr holds JSON lines, because the log events of the runs say the same.

    Args:
        job: name of the command, which begins each line.
        quiet: print nothing.
    """

    def print_line(line: str) -> None:
        if not (quiet or logs.is_json()):
            print(f"{job}: {line}", file=sys.stderr, flush=True)

    return print_line


def print_result(result: dict[str, Any], *, as_json: bool, print_text: Callable[[], None]) -> None:
    """Print a result on stdout, as JSON for programs or as text for people.

    Args:
        result: what `--json` prints.
        as_json: whether `--json` is set.
        print_text: prints the same for people.
    """
    if as_json:
        print(json.dumps(result, indent=2, default=str))
    else:
        print_text()


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table on stdout, below its title.

    Brackets are printed as they are: rich would take some for markup. Only a terminal has a width that lines must keep.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    table = Table()
    # Long words such as paths are folded, not cut.
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    # A title may be a path: it stays on one line, so that it can be copied.
    print(title)
    console.print(table)


def print_seconds(seconds: dict[str, float]) -> None:
    """Print the wall clock of each phase on one line; nothing if there is none."""
    if seconds:
        print(", ".join(f"{phase} {spent:.1f} s" for phase, spent in seconds.items()))
