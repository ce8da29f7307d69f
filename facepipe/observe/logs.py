"""Structured logs: events with fields, as JSON lines or text on stderr, without names, paths or labels.

    log = logs.get_logger(__name__)
    logs.log_event("index.published", vectors=12, shards=2)
    log.warning("lock.waited", extra={"seconds": 3.5})

This module lists what may stand in a line. Every other text is replaced by a keyed hash, so that equal values can still
be told from different ones. The key is FACEPIPE_LOG_KEY; without it each process draws its own.
"""

import json
import logging
import os
import re
import secrets
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from hashlib import blake2b
from types import TracebackType
from typing import Any, Literal, TextIO

from facepipe.errors import ConfigError, ModelError
from facepipe.storage.redact import redact

__all__ = [
    "bind_run",
    "configure_logs",
    "get_logger",
    "install_excepthook",
    "is_json",
    "log_event",
    "redact",
    "report_failure",
]

Format = Literal["text", "json"]

ROOT = "facepipe"
_MAX_CAUSES = 4
_MAX_FRAMES = 12
# Fields whose text is shown if it is a single word, such as the name of a state or a class. Numbers are always shown.
WORDS = frozenset(
    [
        "action",
        "algorithm",
        "causes",
        "command",
        "error",
        "facepipe",
        "factory",
        "format",
        "job",
        "parent",
        "phase",
        "run",
        "runner",
        "stage",
        "state",
        "status",
    ]
)
# Mappings from words to numbers. The keys of any other mapping may be identities.
TALLIES = frozenset(["counters", "phases", "seconds", "stage_seconds", "statuses"])
# Numbers that identify one face or image.
IDENTIFIERS = frozenset(["face_id", "face_ids", "id", "ids", "image_hash", "image_id"])
# What people read in place of the name of an event.
_SENTENCES = {
    "run.unrecorded": "could not save the record of this run; its results are not affected",
    "run.unpruned": "could not delete old records of runs; the results of this run are not affected",
    "run.unfigured": "could not count what this run did for its record; its results are not affected",
    "run.unmeasured": "could not write the file of metrics; the results of this run are not affected",
    "lineage.unsent": "could not send an OpenLineage event; the results of this run are not affected",
    "erasure.postponed": "an erasure that is recorded could not be completed yet; the next run tries again",
}
# Events that a command reports in its own words, so that text logs leave them out.
_REPORTED_EVENTS = ("run.started", "run.ended")
_WORD = re.compile(r"[A-Za-z_][\w.,+-]{0,63}|\d{8}T\d{6}-[0-9a-f]{6}|\d+(\.\d+)*\w{0,8}")
# Quoted text, and words with a slash or backslash in them, which may be paths or URLs.
_VALUE = re.compile(
    r"""(?P<quoted>(?<!\w)'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|[^\s'",;()]*[/\\](?:[^\s'",;()]*[^\s'",;():.])?"""
)
_EVENT = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*")
_STANDARD_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "fields"}
_KEY = (os.environ.get("FACEPIPE_LOG_KEY") or secrets.token_hex(16)).encode()[:64]

_context: ContextVar[Mapping[str, str]] = ContextVar("facepipe.observe.logs", default={})  # noqa: B039  never written to


def get_logger(name: str = ROOT) -> logging.Logger:
    """Return the logger of a module: `facepipe`, or one below it."""
    is_ours = name == ROOT or name.startswith(ROOT + ".")
    return logging.getLogger(name if is_ours else f"{ROOT}.{name}")


def log_event(name: str, level: int = logging.INFO, /, **fields: Any) -> None:
    """Log an event with fields.

    Args:
        name: a dotted lower-case name, such as `index.published`.
        level: level of the event.
        fields: values to log.
    """
    get_logger().log(level, name, extra={"fields": fields}, stacklevel=2)


@contextmanager
def bind_run(run: str, job: str) -> Iterator[None]:
    """Add the run and the job to all events inside."""
    token = _context.set({"run": run, "job": job})
    try:
        yield
    finally:
        _context.reset(token)


def configure_logs(
    format: Format = "text",  # noqa: A002
    level: str | int | None = None,
    show_names: bool = False,
    stream: TextIO | None = None,
) -> None:
    """Send facepipe's events to one stream and nowhere else; a second call replaces the first.

    Args:
        format: text for people, json for machines.
        level: lowest level that is logged. The default is INFO for JSON and WARNING for text, because people have the
            progress bar.
        show_names: show fields and messages as they are. Credentials stay hidden.
        stream: where to write; stderr by default.
    """
    logger = get_logger()
    handler: logging.Handler = _StderrHandler() if stream is None else logging.StreamHandler(stream)
    handler.addFilter(_add_context)
    if format == "json":
        handler.setFormatter(JsonFormatter(show_names))
        default_level = logging.INFO
    else:
        handler.setFormatter(TextFormatter(show_names))
        handler.addFilter(lambda record: record.getMessage() not in _REPORTED_EVENTS)
        default_level = logging.WARNING
    for old_handler in list(logger.handlers):
        logger.removeHandler(old_handler)
    logger.addHandler(handler)
    if level is None:
        level = default_level
    logger.setLevel(level.upper() if isinstance(level, str) else level)
    logger.propagate = False


def is_json() -> bool:
    """Tell whether events are written as JSON lines; then nothing else should go to stderr."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in get_logger().handlers)


def report_failure(message: str, exit_code: int, error: BaseException | None = None) -> None:
    """Write to stderr why a command ends.

    People get the message. JSON logs get an event with the message, in which values that may name an image or a person
    are hashed unless names may be shown.

    Args:
        message: why it ends. Values in it are quoted.
        exit_code: its exit code.
        error: the exception behind it, if there is one.
    """
    if is_json():
        # What a config or a model is called is the operator's own word, and what has to be looked for.
        shows_words = isinstance(error, ConfigError | ModelError)
        cause = hide_values(redact(message), shows_words=shows_words)
        log_event(
            "command.failed", logging.ERROR, exit_code=exit_code, error=error, message=message, cause=Shown(cause)
        )
    else:
        sys.stderr.write(f"facepipe: {redact(message)}\n")


class Shown(str):
    """A text that may stand in a line as it is: it names no image and nobody."""


def hide_values(message: str, *, shows_words: bool = False) -> str:
    """Replace what a message quotes, and paths and URLs in it, by hashes.

    Args:
        message: a message whose values are quoted.
        shows_words: leave quoted values as they are if they are no paths.
    """

    def hide(match: re.Match[str]) -> str:
        if match["quoted"] is None:
            return hash_value(match[0])
        value = match[0].strip("'\"")
        return match[0] if shows_words and "/" not in value else hash_value(value)

    return _VALUE.sub(hide, message)


def install_excepthook() -> None:
    """Report uncaught exceptions without credentials, in threads as well: a traceback, or one event in JSON."""

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        elif is_json():
            get_logger().error("uncaught", exc_info=(kind, error, trace))
        else:
            sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    def report_from_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
            report(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = report
    threading.excepthook = report_from_thread


class _StderrHandler(logging.Handler):
    """A handler that looks sys.stderr up for each event, because tests and progress bars replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class JsonFormatter(logging.Formatter):
    """Format an event as one JSON object per line: ts, level, logger, run, job, event, and the fields."""

    def __init__(self, show_names: bool = False) -> None:
        super().__init__()
        self._show_names = show_names

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        created = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "ts": created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "run": getattr(record, "run", None),
            "job": getattr(record, "job", None),
            "event": _get_event_name(record),
        }
        for name, value in _select_fields(record, self._show_names).items():
            # A field must not replace one of the line's own.
            line[f"{name}_" if name in line else name] = value
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Format an event as `facepipe: warning: what happened key=value ...`."""

    def __init__(self, show_names: bool = False) -> None:
        super().__init__()
        self._show_names = show_names

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = [f"{name}={value}" for name, value in _select_fields(record, self._show_names).items()]
        name = _get_event_name(record)
        return " ".join([f"facepipe: {record.levelname.lower()}: {_SENTENCES.get(name, name)}", *fields])


def _add_context(record: logging.LogRecord) -> bool:
    """Add the run and the job to a record."""
    record.__dict__.update(_context.get())
    return True


def _get_event_name(record: logging.LogRecord) -> str:
    """Return the event's name; a free message is called `message`, because it may hold anything."""
    if isinstance(record.msg, str) and _EVENT.fullmatch(record.msg):
        return record.msg
    return "message"


def _select_fields(record: logging.LogRecord, show_names: bool) -> dict[str, Any]:
    """Select the fields of a record and clean their values.

    Free messages and messages of exceptions are left out, unless names may be shown.
    """
    hidden = _STANDARD_FIELDS | {"run", "job"}
    # Libraries such as Ray add attributes of their own, which begin with an underscore.
    fields = {name: value for name, value in vars(record).items() if name not in hidden and not name.startswith("_")}
    fields |= getattr(record, "fields", {})
    # Places in our own code are shown as they are.
    places: dict[str, Any] = {}
    if _get_event_name(record) == "message":
        fields["message"] = record.getMessage()
        places["at"] = f"{record.module}:{record.lineno}"
    if record.exc_info and record.exc_info[1] is not None:
        fields |= _describe_exception(record.exc_info[1])
        places["stack"] = _format_stack(record.exc_info[1])
    if show_names:
        return {name: _redact_value(value) for name, value in fields.items()} | places
    fields.pop("message", None)
    return {_clean_name(name): _clean_value(name, value) for name, value in fields.items()} | places


def _describe_exception(error: BaseException) -> dict[str, Any]:
    """Return an exception's class, the classes of its causes, and its message."""
    causes: list[str] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and len(causes) < _MAX_CAUSES:
        causes.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return {"error": type(error).__name__, "causes": ",".join(causes) or None, "message": str(error)}


def _format_stack(error: BaseException) -> list[str]:
    """List the places in the code that an exception passed, innermost last, without values."""
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    return [f"{'/'.join(frame.filename.split(os.sep)[-3:])}:{frame.lineno} {frame.name}" for frame in frames]


def _clean_name(name: str) -> str:
    return name if _WORD.fullmatch(name) else hash_value(name)


def _clean_value(name: str, value: Any) -> Any:
    """Return a field's value, with everything hashed that may name a file or a person."""
    if isinstance(value, BaseException):
        return type(value).__name__
    if isinstance(value, Shown):
        return str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return hash_value(value) if name in IDENTIFIERS else value
    if name in TALLIES and isinstance(value, Mapping):
        return {_clean_name(str(key)): number for key, number in value.items() if isinstance(number, int | float)}
    if name == "gallery" and isinstance(value, str):
        return redact(value)
    if name in WORDS and isinstance(value, str) and _WORD.fullmatch(value):
        return redact(value)
    return hash_value(value)


def _redact_value(value: Any) -> Any:
    """Return a value as it is, without credentials."""
    if isinstance(value, BaseException):
        return redact(f"{type(value).__name__}: {value}")
    if isinstance(value, Mapping):
        return {redact(str(key)): _redact_value(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact(str(value))


def hash_value(value: Any) -> str:
    """Hash a value that must not be shown; equal values have equal hashes under the same key."""
    return "h:" + blake2b(repr(value).encode("utf-8", "replace"), key=_KEY, digest_size=6).hexdigest()
