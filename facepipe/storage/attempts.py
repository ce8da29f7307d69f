"""Attempts of one job: a later one takes the leases of an earlier one over, and an earlier one gets none back.

A scheduler may start a job again although its last attempt still runs: the network was cut, or a head node did not
answer. The scheduler has given that attempt up. So the later one must not be turned away by its lease, and the earlier
one must not go on when it wakes.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter

from facepipe.errors import StorageError
from facepipe.storage import conditional
from facepipe.storage.files import make_folder
from facepipe.storage.urls import join

JOB_VARIABLE = "FACEPIPE_JOB"
"""Environment variable that names a job: the same for all its attempts, another one for the next job."""
_RAY_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_FILE = "attempts.json"
_MAX_JOBS = 20
_MAX_ATTEMPTS = 100
# What KubeRay puts behind a RayJob's name for each attempt: a hyphen and five characters.
_RAY_SUFFIX = 6


@dataclass(frozen=True)
class Attempt:
    """An attempt of a job.

    Attributes:
        job: name of the job; empty if no scheduler has named one.
        number: number of the attempt, counted in the order in which they began; 0 if it is not known.
    """

    job: str = ""
    number: int = 0


_current = Attempt()


def get_attempt() -> Attempt:
    """Return the attempt that this process is."""
    return _current


def register_attempt(folder: str) -> Attempt:
    """Register this process as an attempt of its job, once; later calls return the same one.

    The environment names the job: FACEPIPE_JOB, or the submission id that KubeRay gives each attempt of a RayJob.
    Without either this process is no attempt of anything. If the register cannot be written, it has no number.

    Args:
        folder: folder or URL for the register.
    """
    global _current
    job, own_id = _read_names()
    if not job:
        _current = Attempt()
    elif _current.job != job or not _current.number:
        _current = Attempt(job)
        with suppress(StorageError):
            make_folder(folder)
            _current = Attempt(job, _count_attempt(join(folder, _FILE), job, own_id))
    return _current


def _read_names() -> tuple[str, str]:
    """Read the name of the job and the id of this attempt from the environment."""
    submission = ""
    with suppress(ValueError, AttributeError, TypeError):
        metadata = json.loads(os.environ.get(_RAY_VARIABLE, "{}")).get("metadata", {})
        submission = str(metadata.get("job_submission_id", ""))
    job = os.environ.get(JOB_VARIABLE, "")
    if not job and submission[-_RAY_SUFFIX : -_RAY_SUFFIX + 1] == "-":
        job = submission[:-_RAY_SUFFIX]
    return job, submission or f"{os.uname().nodename} {os.getpid()} {os.stat('/proc/self').st_ctime_ns}"


@dataclass
class _Register:
    """The attempts of a job.

    Attributes:
        count: how many there were.
        numbers: the numbers of the newest ones, by their ids.
    """

    count: int = 0
    numbers: dict[str, int] = field(default_factory=dict)


def _count_attempt(path: str, job: str, own_id: str) -> int:
    """Add an attempt to the register, and return its number."""
    while True:
        content = conditional.read_tagged(path)
        jobs = _decode(content[0]) if content else {}
        register = jobs.pop(job, _Register())
        if own_id in register.numbers:
            return register.numbers[own_id]
        register.count += 1
        register.numbers[own_id] = register.count
        register.numbers = dict(list(register.numbers.items())[-_MAX_ATTEMPTS:])
        # The newest jobs are kept; this one is the newest.
        kept = dict(list(jobs.items())[1 - _MAX_JOBS :])
        kept[job] = register
        data = json.dumps({name: asdict(values) for name, values in kept.items()}).encode()
        try:
            conditional.write_if(path, data, content[1] if content else None)
        except conditional.ConflictError:
            continue  # another attempt was faster
        return register.count


def _decode(data: bytes) -> dict[str, _Register]:
    """Decode the register; an empty one if it is damaged."""
    try:
        return TypeAdapter(dict[str, _Register]).validate_json(data)
    except ValueError:
        return {}
