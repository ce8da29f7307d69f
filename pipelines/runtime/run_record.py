"""recorded: a run leaves its record in the gallery and two events in the log, however it ends."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar, cast

from facepipe import storage
from facepipe.errors import ConfigError, FacepipeError
from facepipe.observe import logs, metrics, runs
from facepipe.observe.runs import RunRecord, State

DONE, FAILED, USAGE, OVER_BUDGET, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

P = ParamSpec("P")
R = TypeVar("R")

_LABEL = re.compile(r"[A-Za-z0-9_+-]{1,64}")
_SETTINGS = frozenset(("version", "table_version", "workers", "nprobe", "rescore"))  # of a summary, but no counts
_SINGULAR = {"statuses": "status", "pairs": "pair", "decisions": "decision"}


class Run:
    """A run that is going on. What it counts goes into its record; names of files and persons must not."""

    def __init__(self, gallery: str, record: RunRecord):
        self.gallery, self.record = gallery, record
        self._summary: Any = None

    @property
    def id(self) -> str:
        """`YYYYmmddTHHMMSS-xxxxxx`."""
        return self.record.run

    @property
    def phases(self) -> dict[str, float]:
        """Wall clock in seconds by phase; what a `Phases` may be given to fill."""
        return self.record.seconds

    def count(self, name: str, value: int = 1, **labels: str) -> None:
        """Add to a counter: `count("status", 3, status="ok")` is counters["status.ok"]. Labels are words of ours."""
        key = ".".join([name, *(_label(text) for text in labels.values())])
        self.record.counters[key] = self.record.counters.get(key, 0) + int(value)

    def seconds(self, phase: str, value: float) -> None:
        """Add wall clock to a phase."""
        self.phases[phase] = round(self.phases.get(phase, 0.0) + value, 3)

    def versions(self, before: int | None = None, after: int | None = None) -> None:
        """Versions of the table; None leaves what is known."""
        self.record.version_before = self.record.version_before if before is None else before
        self.record.version_after = self.record.version_after if after is None else after

    def counted(self, counts: Mapping[str, int]) -> None:
        """What the gallery holds now (`Gallery.counts()`): metrics then need not count it again."""
        for status, images in counts.items():
            if status not in ("images", "faces"):
                self.record.counters[f"gallery.{_label(status)}"] = int(images)

    def follow(self, summary: Any) -> None:
        """Take the figures of a pipeline's summary (a dataclass) when the run ends, however it ends."""
        self._summary = summary

    def save(self) -> bool:
        """Write the record as it stands; False where that failed, or where there is no gallery (yet) to write to."""
        try:
            if not _there(self.gallery):
                return False
            runs.write(self.gallery, self.record)
        except Exception as error:  # the run's own work counts: nothing that only informs may end it
            logs.event("run.unrecorded", logging.DEBUG, error=error)
            return False
        return True

    def end(self, state: State, exit_code: int, error: BaseException | None = None) -> None:
        """Close the record: written, logged, and old ones pruned."""
        record = self.record
        try:
            if self._summary is not None:
                self._take({part.name: getattr(self._summary, part.name) for part in fields(self._summary)})
        except Exception as taken:  # must not hide what ended the run
            logs.event("run.unfigured", logging.WARNING, error=taken)
        record.state, record.exit_code, record.ended = state, exit_code, runs.now()
        record.error = type(error).__name__ if error is not None and state == "failed" else None
        saved = self.save()
        level = logging.INFO if state == "done" else logging.WARNING if state != "failed" else logging.ERROR
        figures: dict[str, Any] = {"state": state, "exit_code": exit_code, "duration": round(record.duration or 0.0, 3)}
        figures |= {"counters": record.counters, "seconds": record.seconds, "stage_seconds": record.stage_seconds}
        logs.event("run.ended", level, **figures, error=record.error)
        self._tidy(saved)

    def _tidy(self, saved: bool) -> None:
        try:
            if saved:
                runs.prune(self.gallery)
            elif _there(self.gallery):
                logs.event("run.unrecorded", logging.WARNING, gallery=metrics.gallery_label(self.gallery))
        except Exception as error:
            logs.event("run.unpruned", logging.WARNING, error=error)

    def _take(self, figures: dict[str, Any]) -> None:
        """Numbers of a summary: whole ones are counters, those by name counters `name.key`, seconds are phases."""
        self.versions(after=figures.get("version") or None)
        for name, value in figures.items():
            if name == "seconds" and isinstance(value, dict):
                self.phases.update(value)
            elif name == "stage_seconds":
                self.record.stage_seconds |= {stage: round(spent, 3) for stage, spent in value.items()}
            elif isinstance(value, dict | Counter):
                for key, n in value.items():
                    if isinstance(n, int) and not isinstance(n, bool):
                        self.count(_SINGULAR.get(name, name), n, key=str(key))
            elif isinstance(value, int) and not isinstance(value, bool) and name not in _SETTINGS:
                self.count(name, value)


_current: ContextVar[Run | None] = ContextVar("pipelines.runtime.run_record", default=None)
_metrics_file: ContextVar[str | None] = ContextVar("pipelines.runtime.run_record.metrics_file", default=None)


def write_metrics_to(path: str | None) -> None:
    """Have every run from here on that is part of no other write its gallery's metrics to a file when it ends."""
    _metrics_file.set(path)


def current() -> Run | None:
    """The run that this code is part of."""
    return _current.get()


@contextmanager
def recorded(gallery: str, job: str, parent: str | None = None) -> Iterator[Run]:
    """Record what happens inside as a run of a job on a gallery.

    A run inside another is its child (`parent`); one of the same job on the same gallery is that very run, so that a
    command may wrap a pipeline that records itself, and add its exit code. Where there is no gallery, as after a
    mistyped path, nothing is written; a run that makes one calls `save` then. A record that cannot be written is a
    warning, never an error.
    """
    outer = _current.get()
    place = _place(gallery)
    if outer and (outer.record.job, _place(outer.gallery)) == (job, place):
        yield outer
        return
    record = RunRecord(runs.new_run_id(), job, parent or (outer.id if outer else None), runs.now())
    run = Run(place, record)
    with logs.bind(record.run, job):
        token = _current.set(run)
        run.save()
        logs.event("run.started", gallery=metrics.gallery_label(place), parent=record.parent, facepipe=record.facepipe)
        try:
            yield run
        except BaseException as error:
            run.end(*outcome(error), error)
            raise
        else:
            run.end("done", DONE)
        finally:
            _current.reset(token)
            path = _metrics_file.get()
            if path and outer is None:
                _write_metrics(path, place)


def _write_metrics(path: str, gallery: str) -> None:
    try:
        if _there(gallery):  # else the file goes on telling of what was
            metrics.write(path, metrics.text(gallery))
    except Exception as error:
        logs.event("run.unmeasured", logging.WARNING, error=error)


def records(job: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a pipeline's `run(config, gallery, ...) -> Summary`: every call is recorded, with the summary's figures.

    A run that wants its figures recorded where it fails as well calls `follow` when it has made its summary.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        taken = signature(function)

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with recorded(taken.bind(*args, **kwargs).arguments["gallery"], job) as record:
                summary = function(*args, **kwargs)
                record.follow(summary)
                return summary

        return run

    return decorate


def follow(summary: Any) -> None:
    """Have the run that this code is part of, if any, take a summary's figures when it ends, however it ends."""
    run = _current.get()
    if run:
        run.follow(summary)


def outcome(error: BaseException) -> tuple[State, int]:
    """(state, exit code) of a run that an exception ended; the codes are those of the command line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if type(error).__name__ == "Terminated":
        return "interrupted", TERMINATED
    if isinstance(error, ConfigError):
        return "failed", USAGE
    # typer.Exit has exit_code, SystemExit has code: a command that ends itself.
    code = getattr(error, "exit_code", getattr(error, "code", None)) if not isinstance(error, FacepipeError) else None
    if isinstance(error, SystemExit) and code is None:
        return "done", DONE
    states = {DONE: "done", OVER_BUDGET: "over_budget", INTERRUPTED: "interrupted", TERMINATED: "interrupted"}
    if isinstance(code, int):
        return cast(State, states.get(code, "failed")), code
    return "failed", FAILED


def _there(gallery: str) -> bool:
    """Whether there is a gallery: a folder that is none gets no record."""
    return storage.folder_exists(storage.join(gallery, "faces", "_delta_log"))


def _place(gallery: str) -> str:
    return storage.to_absolute(gallery).rstrip("/") or "/"


def _label(text: str) -> str:
    """A word; anything else may be a path or a message, which a record must not hold."""
    return text if _LABEL.fullmatch(text) else "other"
