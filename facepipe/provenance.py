"""Who made a file, and when: for pages, reports and lists that people find weeks later."""

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime

import facepipe
from facepipe.storage.redact import redact

_MAX_CHARACTERS = 300
# Commands and options whose arguments can be names of people, or of their photos.
_NAMING_COMMANDS = ("erase", "export", "identify", "info", "search", "verify")
_NAMING_OPTIONS = ("--where", "--identity", "--image")
_command = ""


def set_command(words: Sequence[str]) -> None:
    """Set the command line of this process; without it, nothing is said of a command.

    Credentials are redacted. Of commands that can name people only the command itself is kept: the line is written into
    reports, and a report that an erasure has made anew must not hold the name of who was erased.
    """
    global _command
    names_people = any(word.partition("=")[0] in _NAMING_COMMANDS + _NAMING_OPTIONS for word in words)
    text = f"{shlex.join(words[:2])} …" if names_people else redact(shlex.join(words))
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
