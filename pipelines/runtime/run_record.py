"""Recording runs: every run leaves a record in the gallery and two events in the log, however it ends."""

import logging
import re
import time
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
from facepipe.observe.lineage import LineageSender
from facepipe.observe.runs import RunRecord, State
from facepipe.storage.attempts import register_attempt
from facepipe.storage.lease import describe_process

# Exit codes of the command line.
DONE = 0
FAILED = 1
USAGE = 2
OVER_BUDGET = 3
INTERRUPTED = 130
TERMINATED = 143

P = ParamSpec("P")
R = TypeVar("R")

# Words that may be labels of counters: anything else may hold a path or a name.
_LABEL = re.compile(r"[A-Za-z0-9_+-]{1,64}")
# Whole numbers of a summary that are settings, not counts.
_SETTINGS = frozenset(("version", "table_version", "workers", "nprobe", "rescore"))
# Names of counters that are made from mappings of a summary.
_SINGULAR = {"statuses": "status", "pairs": "pair", "decisions": "decision"}


class PhaseTimer:
    """A timer of the phases of a run, which writes their seconds into a mapping."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._phase_start = time.monotonic()

    def end(self, phase: str) -> None:
        """End a phase, which began when the timer was made or the phase before ended."""
        now = time.monotonic()
        self._seconds[phase] = round(now - self._phase_start, 3)
        self._phase_start = now


class ActiveRun:
    """A run that is going on.

    What it counts goes into its record. Names of files and persons must not.
    """

    def __init__(self, gallery: str, record: RunRecord) -> None:
        self.gallery = gallery
        self.record = record
        self._summary: Any = None

    @property
    def id(self) -> str:
        """The run id, `YYYYmmddTHHMMSS-xxxxxx`."""
        return self.record.run

    @property
    def phases(self) -> dict[str, float]:
        """Wall clock in seconds by phase; a PhaseTimer may write into it."""
        return self.record.seconds

    def add_count(self, name: str, value: int = 1, **labels: str) -> None:
        """Add to a counter: `add_count("status", 3, status="ok")` adds to counters["status.ok"].

        Args:
            name: name of the counter.
            value: how much to add.
            labels: words that facepipe defines, such as a status.
        """
        key = ".".join([name, *(_clean_label(text) for text in labels.values())])
        self.record.counters[key] = self.record.counters.get(key, 0) + int(value)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Add wall clock to a phase."""
        self.phases[phase] = round(self.phases.get(phase, 0.0) + seconds, 3)

    def set_versions(self, before: int | None = None, after: int | None = None) -> None:
        """Set the versions of the table; None leaves a version as it is."""
        if before is not None:
            self.record.version_before = before
        if after is not None:
            self.record.version_after = after

    def set_gallery_counts(self, counts: Mapping[str, int]) -> None:
        """Store what the gallery holds now (`Gallery.counts()`), so that metrics need not count it again."""
        for status, images in counts.items():
            if status not in ("images", "faces"):
                self.record.counters[f"gallery.{_clean_label(status)}"] = int(images)

    def attach_summary(self, summary: Any) -> None:
        """Attach a pipeline's summary (a dataclass); its figures are recorded when the run ends, however it ends."""
        self._summary = summary

    def save(self) -> bool:
        """Write the record as it is; return False if that fails or if there is no gallery yet."""
        try:
            if not _has_gallery(self.gallery):
                return False
            runs.write_record(self.gallery, self.record)
        except Exception as error:  # a record only informs: it must not end the run
            logs.log_event("run.unrecorded", logging.DEBUG, error=error)
            return False
        return True

    def end(self, state: State, exit_code: int, error: BaseException | None = None) -> None:
        """Complete the record, write it, log it and prune old records."""
        record = self.record
        try:
            if self._summary is not None:
                figures = {part.name: getattr(self._summary, part.name) for part in fields(self._summary)}
                self._record_figures(figures)
        except Exception as summary_error:  # must not hide what ended the run
            logs.log_event("run.unfigured", logging.WARNING, error=summary_error)
        record.state = state
        record.exit_code = exit_code
        record.ended = runs.format_now()
        record.error = type(error).__name__ if error is not None and state == "failed" else None
        is_saved = self.save()
        self._log_end(state)
        self._prune_records(is_saved)

    def _log_end(self, state: State) -> None:
        """Log how the run ended, with its figures."""
        # Other states, such as interrupted, are logged as warnings.
        levels = {"done": logging.INFO, "failed": logging.ERROR}
        logs.log_event(
            "run.ended",
            levels.get(state, logging.WARNING),
            state=state,
            exit_code=self.record.exit_code,
            duration=round(self.record.duration or 0.0, 3),
            counters=self.record.counters,
            seconds=self.record.seconds,
            stage_seconds=self.record.stage_seconds,
            error=self.record.error,
        )

    def _prune_records(self, is_saved: bool) -> None:
        """Delete the oldest records, or warn that this run's could not be written."""
        try:
            if is_saved:
                runs.prune_records(self.gallery)
            elif _has_gallery(self.gallery):
                gallery = metrics.get_gallery_label(self.gallery)
                logs.log_event("run.unrecorded", logging.WARNING, gallery=gallery)
        except Exception as error:
            logs.log_event("run.unpruned", logging.WARNING, error=error)

    def _record_figures(self, figures: dict[str, Any]) -> None:
        """Record the numbers of a summary.

        Whole numbers become counters, mappings of them counters `name.key`, and `seconds` becomes phases.
        """
        self.set_versions(after=figures.get("version") or None)
        for name, value in figures.items():
            if name == "seconds" and isinstance(value, dict):
                self.phases.update(value)
            elif name == "stage_seconds":
                self.record.stage_seconds |= {stage: round(seconds, 3) for stage, seconds in value.items()}
            elif isinstance(value, dict | Counter):
                for key, count in value.items():
                    if _is_count(count):
                        self.add_count(_SINGULAR.get(name, name), count, key=str(key))
            elif _is_count(value) and name not in _SETTINGS:
                self.add_count(name, value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_current_run: ContextVar[ActiveRun | None] = ContextVar("pipelines.runtime.run_record", default=None)
_metrics_file: ContextVar[str | None] = ContextVar("pipelines.runtime.run_record.metrics_file", default=None)
_lineage: ContextVar[LineageSender | None] = ContextVar("pipelines.runtime.run_record.lineage", default=None)


def set_metrics_file(path: str | None) -> None:
    """Write the gallery's metrics to a file after every run that no other run started; None stops that."""
    _metrics_file.set(path)


def set_lineage_target(target: str | None) -> None:
    """Send OpenLineage events of every run to a URL or a file; None stops that.

    Raises:
        ConfigError: the target is neither a URL nor a file that can be written.
        MissingPackageError: the package for it is not installed.
    """
    _lineage.set(LineageSender(target) if target is not None else None)


def get_current_run() -> ActiveRun | None:
    """Return the run that this code is part of, if any."""
    return _current_run.get()


@contextmanager
def record_run(gallery: str, job: str, parent: str | None = None) -> Iterator[ActiveRun]:
    """Record what happens inside as a run of a job on a gallery.

    A run inside another names that one as its parent. A run of the same job on the same gallery is the outer run
    itself. So a command may wrap a pipeline that records itself, and add its exit code.

    If there is no gallery, as after a mistyped path, nothing is written. A run that creates the gallery calls `save`
    then. A record that cannot be written is a warning, never an error.

    Args:
        gallery: folder or URL of the gallery.
        job: name of the job.
        parent: id of the run that started this one; by default the run around this one.
    """
    # A run of the same job on the same gallery is the outer run, which ends the record itself.
    outer = _current_run.get()
    path = _normalise_path(gallery)
    if outer and outer.record.job == job and _normalise_path(outer.gallery) == path:
        yield outer
        return
    if parent is None and outer:
        parent = outer.id
    # The record is also written at the start, so that a run that is killed leaves one too.
    record = RunRecord(runs.new_run_id(), job, parent, runs.format_now(), process=describe_process())
    run = ActiveRun(path, record)
    # Later attempts of one job take the leases of earlier ones over. A folder that is no gallery gets no register.
    if _has_gallery(path):
        register_attempt(runs.get_runs_folder(path))
    with logs.bind_run(record.run, job):
        token = _current_run.set(run)
        run.save()
        label = metrics.get_gallery_label(path)
        logs.log_event("run.started", gallery=label, parent=record.parent, facepipe=record.facepipe)
        parent_job = outer.record.job if outer else None
        _send_lineage(run, parent_job)
        try:
            yield run
        except BaseException as error:
            state, exit_code = classify_end(error)
            run.end(state, exit_code, error)
            raise
        else:
            run.end("done", DONE)
        finally:
            _current_run.reset(token)
            _send_lineage(run, parent_job)
            # Only the outermost run writes metrics, after its record is complete.
            metrics_file = _metrics_file.get()
            if metrics_file and outer is None:
                _write_metrics(metrics_file, path)


def _send_lineage(run: ActiveRun, parent_job: str | None) -> None:
    sender = _lineage.get()
    if sender:
        sender.send(run.gallery, run.record, parent_job)


def _write_metrics(path: str, gallery: str) -> None:
    """Write a gallery's metrics; without a gallery the file stays as it is."""
    try:
        if _has_gallery(gallery):
            metrics.write_metrics(path, metrics.render_metrics(gallery))
    except Exception as error:
        logs.log_event("run.unmeasured", logging.WARNING, error=error)


def record_calls(job: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a pipeline's `run(config, gallery, ...) -> Summary`: every call is recorded, with its summary's figures.

    A pipeline calls `attach_summary` as soon as it has a summary, if its figures are to be recorded after a failure
    as well.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        # The signature finds the gallery among the arguments, whether it is passed by position or by name.
        parameters = signature(function)

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            gallery = parameters.bind(*args, **kwargs).arguments["gallery"]
            with record_run(gallery, job) as active_run:
                summary = function(*args, **kwargs)
                active_run.attach_summary(summary)
                return summary

        return run

    return decorate


def attach_summary(summary: Any) -> None:
    """Attach a summary to the run that this code is part of, if any; see `ActiveRun.attach_summary`."""
    run = _current_run.get()
    if run:
        run.attach_summary(summary)


def classify_end(error: BaseException) -> tuple[State, int]:
    """Return the state and the exit code of a run that an exception ended."""
    # Signals first, then errors by the exit codes that they mean.
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if type(error).__name__ == "Terminated":
        return "interrupted", TERMINATED
    if isinstance(error, ConfigError):
        return "failed", USAGE
    if isinstance(error, FacepipeError):
        return "failed", FAILED
    # A command that ends itself: typer.Exit has exit_code, SystemExit has code.
    code = getattr(error, "exit_code", getattr(error, "code", None))
    if isinstance(error, SystemExit) and code is None:
        return "done", DONE
    if not isinstance(code, int):
        return "failed", FAILED
    states = {DONE: "done", OVER_BUDGET: "over_budget", INTERRUPTED: "interrupted", TERMINATED: "interrupted"}
    return cast(State, states.get(code, "failed")), code


def _has_gallery(path: str) -> bool:
    """Tell whether there is a gallery; other folders get no record."""
    return storage.folder_exists(storage.join(path, "faces", "_delta_log"))


def _normalise_path(gallery: str) -> str:
    return storage.to_absolute(gallery).rstrip("/") or "/"


def _clean_label(text: str) -> str:
    """Return a word as it is; anything else may be a path or a message, which a record must not hold."""
    return text if _LABEL.fullmatch(text) else "other"
