"""Run records: GALLERY/runs/<run id>.json says what a run did, how it ended and how long it took.

Records hold counts, times and class names. They never hold a file name, a label or a message. `last-<job>.json` repeats
a job's newest record that ended, and the newest that succeeded. So a watcher reads one file per job, however many runs
there are.
"""

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import facepipe
from facepipe import storage
from facepipe.errors import ConfigError, StorageError

RUNS = "runs"
"""Folder of the records in a gallery."""

State = Literal["running", "done", "failed", "interrupted", "over_budget"]

_RECORD_NAME = re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}\.json")
_HISTORY_NAME = re.compile(r"last-([a-z][a-z0-9_]*)\.json")
_JOB_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass
class RunRecord:
    """The record of a run of a command on a gallery.

    Attributes:
        run: id of the run.
        job: name of the command.
        parent: id of the run that started this one, such as a nightly run.
        started: start time, UTC, ISO 8601.
        ended: end time, UTC, ISO 8601; None while the run goes on.
        state: running, done, failed, interrupted or over_budget.
        exit_code: exit code of the command; None while the run goes on.
        version_before: version of the table when the run began.
        version_after: version of the table when the run ended.
        counters: counts by name: `images`, `faces`, `skipped`, `status.ok` and so on.
        seconds: wall clock by phase.
        stage_seconds: seconds of work by stage, summed over workers.
        error: class name of the exception that ended the run.
        facepipe: version of facepipe.
        process: which process it is, so that one that was killed can be told from one that goes on.
    """

    run: str
    job: str
    parent: str | None = None
    started: str = ""
    ended: str | None = None
    state: State = "running"
    exit_code: int | None = None
    version_before: int | None = None
    version_after: int | None = None
    counters: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    facepipe: str = facepipe.__version__
    process: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _JOB_NAME.fullmatch(self.job):
            raise ConfigError(f"invalid job name {self.job!r}: use lower-case letters, digits and _")

    @property
    def duration(self) -> float | None:
        """Seconds from start to end; None while the run goes on."""
        if self.ended is None:
            return None
        return parse_time(self.ended) - parse_time(self.started)

    def to_json(self) -> bytes:
        """Return the record as one JSON object."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunRecord":
        """Build a record from JSON values, ignoring keys that a later facepipe added.

        Raises:
            TypeError: a key is missing.
        """
        known_names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known_names})


class JobHistory(NamedTuple):
    """A job's newest run that ended, and the newest that succeeded."""

    ended: RunRecord
    success: RunRecord | None


def new_run_id() -> str:
    """Create a run id, `YYYYmmddTHHMMSS-xxxxxx` in UTC: ids sort by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def format_now() -> str:
    """Format the current time: UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_time(text: str) -> float:
    """Convert an ISO 8601 time to seconds since 1970."""
    return datetime.fromisoformat(text).timestamp()


def get_runs_folder(gallery_path: str) -> str:
    """Return the folder of a gallery's run records."""
    return storage.join(gallery_path, RUNS)


def write_record(gallery_path: str, record: RunRecord) -> None:
    """Write a record, or replace it by a newer state of the same run.

    Readers see the old record or the new one. If the run has ended, `last-<job>.json` is written as well.

    Raises:
        StorageError: the record cannot be written.
    """
    _write_file(gallery_path, f"{record.run}.json", record.to_json())
    if record.ended is None:
        return
    history = _read_file(gallery_path, f"last-{record.job}.json") or {}
    success = asdict(record) if record.state == "done" else history.get("success")
    text = json.dumps({"ended": asdict(record), "success": success}, indent=1)
    _write_file(gallery_path, f"last-{record.job}.json", text.encode())


def read_newest(gallery_path: str, count: int = 10) -> list[RunRecord]:
    """Read the newest records, newest first.

    All names are listed, but only `count` files are read. A damaged file is skipped.
    """
    names = sorted(filter(_RECORD_NAME.fullmatch, _list_names(gallery_path)), reverse=True)[: max(0, count)]
    records = [_parse_record(_read_file(gallery_path, name)) for name in names]
    return [record for record in records if record is not None]


def read_job_histories(gallery_path: str) -> dict[str, JobHistory]:
    """Read the last run of every job that ever ended here, reading one file per job."""
    histories = {}
    for name in sorted(_list_names(gallery_path)):
        if not _HISTORY_NAME.fullmatch(name):
            continue
        values = _read_file(gallery_path, name)
        if values is None:
            continue
        ended = _parse_record(values.get("ended"))
        if ended:
            histories[ended.job] = JobHistory(ended, _parse_record(values.get("success")))
    return histories


def prune_records(gallery_path: str, keep: int = 1000) -> int:
    """Delete all records but the newest, and return how many were deleted.

    The last run of every job stays known, because it has a file of its own.

    Args:
        gallery_path: folder or URL of the gallery.
        keep: number of records to keep.
    """
    names = sorted(filter(_RECORD_NAME.fullmatch, _list_names(gallery_path)), reverse=True)[max(0, keep) :]
    for name in names:
        storage.delete(storage.join(get_runs_folder(gallery_path), name))
    return len(names)


def _list_names(gallery_path: str) -> Iterable[str]:
    return storage.list_names(get_runs_folder(gallery_path))


def _write_file(gallery_path: str, name: str, data: bytes) -> None:
    """Write a file of the runs folder whole or not at all."""
    storage.replace(storage.join(get_runs_folder(gallery_path), name), data, unique=True)


def _read_file(gallery_path: str, name: str) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing or damaged, because a record only informs."""
    try:
        values = json.loads(storage.read(storage.join(get_runs_folder(gallery_path), name)))
    except (StorageError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _parse_record(values: Any) -> RunRecord | None:
    """Build a record from JSON values; None if they are damaged."""
    try:
        record = RunRecord.from_dict(values)
        times = [parse_time(record.started), parse_time(record.ended or record.started)]
        is_valid = all(times) and isinstance(record.counters, dict)
    except (AttributeError, TypeError, ValueError, ConfigError):
        return None
    return record if is_valid else None
