"""Who made a file, and when: for pages, reports and lists that people find weeks later."""

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime

import facepipe
from facepipe.storage.redact import redact

_MAX_CHARACTERS = 300
_command = ""


def set_command(words: Sequence[str]) -> None:
    """Set the command line of this process, with credentials redacted; without it, nothing is said of a command."""
    global _command
    text = redact(shlex.join(words))
    _command = text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ..."


def get_command() -> str:
    """Return the command line of this process; empty if facepipe is used as a library."""
    return _command


def format_date() -> str:
    """Format the time now for people: date, hour and minute, UTC."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def describe_making() -> str:
    """Describe in one line when, by what and with which command something is made."""
    line = f"Made {format_date()} by facepipe {facepipe.__version__}"
    return f"{line}: {_command}" if _command else line
