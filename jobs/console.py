"""How commands print and how they fail: results on stdout, messages on stderr, and the exit codes of the design."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from facepipe.errors import ConfigError, FacepipeError
from facepipe.observe import logs

DONE, FAILED, USAGE, OVER_BUDGET, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


_GOES_ON = "what was finished is kept, and the same command goes on from there"


class Terminated(BaseException):
    """SIGTERM, raised where the program stands so that it can commit and clean up."""


@contextmanager
def failures(interrupted: str = _GOES_ON) -> Iterator[None]:
    """Turn expected errors and interruptions into a message and an exit code; anything else is a bug and shows."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except ConfigError as error:
        fail(str(error), USAGE)
    except FacepipeError as error:
        fail(str(error), FAILED)
    except KeyboardInterrupt:
        fail(f"interrupted; {interrupted}", INTERRUPTED)
    except Terminated:
        fail(f"terminated; {interrupted}", TERMINATED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def fail(message: str, code: int) -> NoReturn:
    """Say why on stderr and leave."""
    logs.complain(message, code)
    raise typer.Exit(code)


def say(job: str, quiet: bool = False) -> Callable[[str], None]:
    """What tells of a job's progress: a line on stderr; nothing where that is for JSON, which has the runs' events."""

    def tell(line: str) -> None:
        if not (quiet or logs.is_json()):
            print(f"{job}: {line}", file=sys.stderr, flush=True)

    return tell


def emit(value: dict[str, Any], as_json: bool, text: Callable[[], None]) -> None:
    """Print a result for machines or for people."""
    if as_json:
        print(json.dumps(value, indent=2, default=str))
    else:
        text()


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table on stdout."""
    drawn = Table(title=title, title_justify="left")
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*map(str, row))
    Console().print(drawn)
