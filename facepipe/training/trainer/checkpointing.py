"""Checkpoints: one file each, whole or not there, with a digest that is checked before anything in it is believed.

facepipe-checkpoint 1 <SHA-256 of the rest>\\n  followed by what torch.save wrote; loaded without running any code
"""

import fcntl
import hashlib
import io
import os
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from facepipe.errors import StorageError, TrainingError
from facepipe.observe import logs
from facepipe.storage import describe_error, replace_file, sync_folder

FOLDER = "checkpoints"
BEST = "best.ckpt"
_FORMAT = b"facepipe-checkpoint 1 "
_PATIENCE = 60.0  # seconds
_OLDEST = 10  # of those before the last that are looked for
_HEAD = len(_FORMAT) + 64 + 1


class DamagedError(Exception):
    """The file is no whole checkpoint. Stays in this module's callers: there is an older one, or there is none."""


def write(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers and texts (nested in dicts and lists) in one step. Raises StorageError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getbuffer()
    with replace_file(str(path), sync=True, unique=True, what="checkpoint") as unfinished:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(_FORMAT + hashlib.sha256(body).hexdigest().encode() + b"\n")
            file.write(body)
    sync_folder(str(path.parent))


def is_ours(path: Path) -> bool:
    """Whether a file begins as `write` begins it."""
    try:
        with path.open("rb") as file:
            return file.read(len(_FORMAT)) == _FORMAT
    except OSError:
        return False


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, on the CPU. Raises DamagedError, or StorageError where the file cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read the checkpoint {str(path)!r}: {describe_error(error)}") from error
    body = memoryview(data)[_HEAD:]
    if not data.startswith(_FORMAT):
        raise DamagedError("it is no checkpoint of this format")
    if hashlib.sha256(body).hexdigest().encode() != data[len(_FORMAT) : _HEAD - 1]:
        raise DamagedError("its SHA-256 is not the one it was written with")
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DamagedError(str(error).splitlines()[0]) from error


class Checkpoints:
    """The checkpoints of a run: `last.ckpt`, the `keep` - 1 before it as `last-1.ckpt` ..., and `best.ckpt`."""

    def __init__(self, output: str, keep: int = 2):
        self.folder = Path(output) / FOLDER
        self._keep = keep
        self.last_step = 0  # of the last checkpoint that was written or read here

    @property
    def best(self) -> Path:
        """Where the network with the best score lies."""
        return self.folder / BEST

    @property
    def last(self) -> Path:
        """Where the last checkpoint lies."""
        return self._last(0)

    @property
    def present(self) -> bool:
        """Whether a run can go on from here."""
        return any(self._last(age).exists() for age in range(_OLDEST))

    def _last(self, age: int) -> Path:
        return self.folder / (f"last-{age}.ckpt" if age else "last.ckpt")

    def save(self, content: dict[str, Any]) -> None:
        """Make this the last checkpoint. At every moment at least one whole one is there."""
        for age in range(self._keep - 1, 0, -1):
            with suppress(FileNotFoundError):
                os.replace(self._last(age - 1), self._last(age))
        write(self._last(0), content)
        self.last_step = content["step"]

    def load(self) -> dict[str, Any] | None:
        """The newest whole checkpoint; None where there is none. DamagedError ones are told of and set aside.

        Raises TrainingError where there are some, and all are damaged.
        """
        found = [path for age in range(_OLDEST) if (path := self._last(age)).exists()]
        for path in found:
            try:
                content = read(path)
                self.last_step = content["step"]
                return content
            except DamagedError as error:
                logs.get(__name__).warning("checkpoint.damaged", extra={"fields": {"file": path.name, "why": error}})
                path.rename(path.with_suffix(".damaged"))  # else it would push a whole one out
        if found:
            raise TrainingError(f"every checkpoint in {str(self.folder)!r} is damaged; begin again with --fresh")
        return None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else writes here. A run that was killed may take a while to let go, and is waited for.

        Raises TrainingError where another run holds on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as file:
            until = time.monotonic() + _PATIENCE
            while not _locked(file):
                if time.monotonic() > until:
                    raise TrainingError(
                        f"another run is writing to {str(self.folder.parent)!r}: let it end, or stop it"
                    )
                time.sleep(0.2)
            for left in self.folder.glob("*.new"):  # of a run that was killed while writing
                left.unlink(missing_ok=True)
            yield

    def clear(self) -> None:
        """Delete all checkpoints."""
        for pattern in ("*.ckpt*", "*.damaged"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
