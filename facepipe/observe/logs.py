"""Structured logs: events with fields, as JSON lines or text on stderr. No name, path or label unless asked.

    log = logs.get(__name__)
    logs.event("index.published", vectors=12, shards=2)
    log.warning("lock.waited", extra={"seconds": 3.5})

What may stand in a line is listed here; every other text is replaced by a keyed hash, so that equal values can still be
told from different ones. The key is FACEPIPE_LOG_KEY, or drawn anew by each process.
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

from facepipe.storage.redact import redact

__all__ = ["bind", "complain", "configure", "event", "get", "install_excepthook", "is_json", "redact"]

Format = Literal["text", "json"]

ROOT = "facepipe"
_MOST_CAUSES, _MOST_FRAMES = 4, 12
# Fields whose text is shown if it is a word, as names of states and classes are. All numbers are shown.
WORDS = frozenset(
    (
        *("state", "phase", "stage", "status", "action", "error", "causes", "runner", "format", "command", "algorithm"),
        *("factory", "facepipe", "job", "run", "parent"),
    )
)
# Mappings of words to numbers. Keys of any other mapping may be identities.
TALLIES = frozenset(("counters", "seconds", "stage_seconds", "statuses", "phases"))
# Numbers that stand for one face or image.
IDENTIFIERS = frozenset(("face_id", "face_ids", "image_id", "image_hash", "id", "ids"))
_WORD = re.compile(r"[A-Za-z_][\w.,+-]{0,63}|\d{8}T\d{6}-[0-9a-f]{6}|\d+(\.\d+)*\w{0,8}")
_EVENT = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*")
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "fields"}
_KEY = (os.environ.get("FACEPIPE_LOG_KEY") or secrets.token_hex(16)).encode()[:64]

_bound: ContextVar[Mapping[str, str]] = ContextVar("facepipe.observe.logs", default={})  # noqa: B039  never written to


def get(name: str = ROOT) -> logging.Logger:
    """The logger of a module: `facepipe`, or one below it."""
    return logging.getLogger(name if name == ROOT or name.startswith(ROOT + ".") else f"{ROOT}.{name}")


def event(name: str, level: int = logging.INFO, /, **fields: Any) -> None:
    """Log an event, a dotted lower-case name, with fields."""
    get().log(level, name, extra={"fields": fields}, stacklevel=2)


@contextmanager
def bind(run: str, job: str) -> Iterator[None]:
    """Events inside carry the run and the job."""
    token = _bound.set({"run": run, "job": job})
    try:
        yield
    finally:
        _bound.reset(token)


_SAID = ("run.started", "run.ended")  # events that people read of in a command's own words


def configure(
    format: Format = "text",  # noqa: A002
    level: str | int | None = None,
    show_names: bool = False,
    stream: TextIO | None = None,
) -> None:
    """Send facepipe's events to stderr (or `stream`), and nowhere else; a second call replaces the first.

    level: INFO for JSON and WARNING for text by default, since people have the progress bar. show_names: fields and
    messages as they are; credentials are hidden even then.
    """
    logger = get()
    handler: logging.Handler = _Stderr() if stream is None else logging.StreamHandler(stream)
    chosen = level if level is not None else (logging.INFO if format == "json" else logging.WARNING)
    handler.setFormatter(JsonFormatter(show_names) if format == "json" else TextFormatter(show_names))
    handler.addFilter(_with_context)
    if format == "text":
        handler.addFilter(lambda record: record.getMessage() not in _SAID)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(chosen.upper() if isinstance(chosen, str) else chosen)
    logger.propagate = False


def is_json() -> bool:
    """Whether events are written as JSON lines: then stderr should hold nothing else."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in get().handlers)


def complain(message: str, exit_code: int, error: BaseException | None = None) -> None:
    """Say on stderr why a command ends: as text for people, in JSON as an event without the message unless asked."""
    if is_json():
        event("command.failed", logging.ERROR, exit_code=exit_code, error=error, message=message)
    else:
        sys.stderr.write(f"facepipe: {redact(message)}\n")


def install_excepthook() -> None:
    """Uncaught exceptions, of threads as well, without credentials: a traceback, or in JSON one event."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        elif is_json():
            get().error("uncaught", exc_info=(kind, error, trace))
        else:
            sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    def thread_hook(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
            hook(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook, threading.excepthook = hook, thread_hook


class _Stderr(logging.Handler):
    """Writes to what sys.stderr is at the time: tests and progress bars replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, logger, run, job, event, and the fields."""

    def __init__(self, show_names: bool = False):
        super().__init__()
        self._show = show_names

    def format(self, record: logging.LogRecord) -> str:
        ts = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {"ts": ts, "level": record.levelname.lower(), "logger": record.name}
        line |= {name: getattr(record, name, None) for name in ("run", "job")} | {"event": _event(record)}
        fields = {f"{k}_" if k in line else k: v for k, v in _shown(record, self._show).items()}
        return json.dumps(line | fields, default=str)


class TextFormatter(logging.Formatter):
    """`facepipe: warning: event key=value ...`"""

    def __init__(self, show_names: bool = False):
        super().__init__()
        self._show = show_names

    def format(self, record: logging.LogRecord) -> str:
        fields = [f"{name}={value}" for name, value in _shown(record, self._show).items()]
        return " ".join([f"facepipe: {record.levelname.lower()}: {_event(record)}", *fields])


def _with_context(record: logging.LogRecord) -> bool:
    record.__dict__.update(_bound.get())
    return True


def _event(record: logging.LogRecord) -> str:
    """The event's name; a free message may hold anything, so it is none."""
    return record.msg if isinstance(record.msg, str) and _EVENT.fullmatch(record.msg) else "message"


def _shown(record: logging.LogRecord, show_names: bool) -> dict[str, Any]:
    """The fields as they may be shown; free messages and those of exceptions only if names may."""
    fields = {name: value for name, value in vars(record).items() if name not in _STANDARD | {"run", "job"}}
    fields |= getattr(record, "fields", {})
    places: dict[str, Any] = {}  # in our code: shown as they are
    if _event(record) == "message":
        fields["message"] = record.getMessage()
        places["at"] = f"{record.module}:{record.lineno}"
    if record.exc_info and record.exc_info[1] is not None:
        fields |= _exception(record.exc_info[1])
        places["stack"] = _stack(record.exc_info[1])
    if show_names:
        return {name: _legible(value) for name, value in fields.items()} | places
    fields.pop("message", None)
    return {_name(name): _clean(name, value) for name, value in fields.items()} | places


def _exception(error: BaseException) -> dict[str, Any]:
    """Its class, those of its causes, and its message."""
    causes, cause = list[str](), error.__cause__ or error.__context__
    while cause is not None and len(causes) < _MOST_CAUSES:
        causes.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return {"error": type(error).__name__, "causes": ",".join(causes) or None, "message": str(error)}


def _stack(error: BaseException) -> list[str]:
    """Where it was raised, innermost last: code, no values."""
    frames = traceback.extract_tb(error.__traceback__)[-_MOST_FRAMES:]
    return [f"{'/'.join(frame.filename.split(os.sep)[-3:])}:{frame.lineno} {frame.name}" for frame in frames]


def _name(name: str) -> str:
    return name if _WORD.fullmatch(name) else hashed(name)


def _clean(name: str, value: Any) -> Any:
    """A field's value with nothing in it that names a file or a person."""
    if isinstance(value, BaseException):
        return type(value).__name__
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return hashed(value) if name in IDENTIFIERS else value
    if name in TALLIES and isinstance(value, Mapping):
        numbers = {str(key): n for key, n in value.items() if isinstance(n, int | float)}
        return {(key if _WORD.fullmatch(key) else hashed(key)): n for key, n in numbers.items()}
    if name == "gallery" and isinstance(value, str):
        return redact(value)
    if name in WORDS and isinstance(value, str) and _WORD.fullmatch(value):
        return redact(value)
    return hashed(value)


def _legible(value: Any) -> Any:
    """A value as it is, without credentials."""
    if isinstance(value, BaseException):
        return redact(f"{type(value).__name__}: {value}")
    if isinstance(value, Mapping):
        return {redact(str(key)): _legible(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float) else redact(str(value))


def hashed(value: Any) -> str:
    """Stands for a value that must not be shown; equal for equal values under the same key."""
    return "h:" + blake2b(repr(value).encode("utf-8", "replace"), key=_KEY, digest_size=6).hexdigest()
