"""Run records: GALLERY/runs/<run id>.json says what a run of a command did, how it ended, and how long it took.

Records hold counts, times and names of classes; never a file name, a label or a message. `last-<job>.json` repeats a
job's newest record that ended and the newest that ended well: a watcher reads one file a job, however many runs came
since.
"""

import json
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import facepipe
from facepipe import storage
from facepipe.errors import ConfigError, StorageError

State = Literal["running", "done", "failed", "interrupted", "over_budget"]

_RECORD = re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}\.json")
_LAST = re.compile(r"last-([a-z][a-z0-9_]*)\.json")
_JOB = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass
class RunRecord:
    """A run of a command on a gallery.

    parent: the run that started it (a nightly run), if any; started, ended: UTC, ISO 8601; version_before,
    version_after: of the table; counters: `images`, `faces`, `skipped`, `status.ok`, ...; seconds: wall clock by phase;
    stage_seconds: seconds of work by stage, added up over workers; error: name of the exception's class.
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

    def __post_init__(self) -> None:
        if not _JOB.fullmatch(self.job):
            raise ConfigError(f"{self.job!r} is no name of a job: lower-case letters, digits and _")

    @property
    def duration(self) -> float | None:
        """Seconds from start to end."""
        return None if self.ended is None else timestamp(self.ended) - timestamp(self.started)

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunRecord":
        """Raises TypeError where a key is missing; keys of a later facepipe are passed over."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


class Last(NamedTuple):
    """A job's newest run that ended, and the newest that ended well."""

    ended: RunRecord
    success: RunRecord | None


def new_run_id() -> str:
    """`YYYYmmddTHHMMSS-xxxxxx` in UTC: ids sort by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def now() -> str:
    """UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def timestamp(text: str) -> float:
    """Seconds since 1970 of an ISO 8601 time."""
    return datetime.fromisoformat(text).timestamp()


def folder_of(gallery_path: str) -> str:
    """Where a gallery's run records lie."""
    return storage.join(gallery_path, "runs")


def write(gallery_path: str, record: RunRecord) -> None:
    """Write a record, or write it again with what has become known; readers see the old one or the new one.

    Raises StorageError. Of a run that ended, `last-<job>.json` tells as well.
    """
    _put(gallery_path, f"{record.run}.json", record.to_json())
    if record.ended is not None:
        found = _read(gallery_path, f"last-{record.job}.json") or {}
        success = asdict(record) if record.state == "done" else found.get("success")
        text = json.dumps({"ended": asdict(record), "success": success}, indent=1)
        _put(gallery_path, f"last-{record.job}.json", text.encode())


def last(gallery_path: str, n: int = 10) -> list[RunRecord]:
    """The newest n records, newest first. Names are listed, n files are read; a damaged file is passed over."""
    names = sorted(filter(_RECORD.fullmatch, _names(gallery_path)), reverse=True)[: max(0, n)]
    return list(filter(None, (_record(_read(gallery_path, name)) for name in names)))


def last_of_jobs(gallery_path: str) -> dict[str, Last]:
    """The last run of every job that ever ended here; one file read a job."""
    found = {}
    for name in sorted(_names(gallery_path)):
        match = _LAST.fullmatch(name)
        values = _read(gallery_path, name) if match else None
        ended = _record(values.get("ended")) if values else None
        if values and ended:
            found[ended.job] = Last(ended, _record(values.get("success")))
    return found


def prune(gallery_path: str, keep: int = 1000) -> int:
    """Delete all records but the newest `keep`; how many went. The last run of every job stays known."""
    names = sorted(filter(_RECORD.fullmatch, _names(gallery_path)), reverse=True)[max(0, keep) :]
    for name in names:
        storage.delete(storage.join(folder_of(gallery_path), name))
    return len(names)


def _names(gallery_path: str) -> Iterable[str]:
    return storage.list_names(folder_of(gallery_path))


def _put(gallery_path: str, name: str, data: bytes) -> None:
    storage.replace(storage.join(folder_of(gallery_path), name), data, unique=True)


def _read(gallery_path: str, name: str) -> dict[str, Any] | None:
    """None where there is no such file, or one that is no JSON object: what only informs must not stop anyone."""
    try:
        found = json.loads(storage.read(os.fsencode(storage.join(folder_of(gallery_path), name))))
    except (StorageError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _record(values: Any) -> RunRecord | None:
    try:
        record = RunRecord.from_dict(values)
        times = [timestamp(record.started), timestamp(record.ended or record.started)]
        return record if all(times) and isinstance(record.counters, dict) else None
    except (AttributeError, TypeError, ValueError, ConfigError):
        return None
