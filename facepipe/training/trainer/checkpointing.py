r"""Checkpoints: one file each, complete or absent. A digest is verified before anything in a file is used.

Format: `facepipe-checkpoint 1 <SHA-256 of the rest>\n`, then the output of torch.save. Loading runs no code.
"""

import fcntl
import hashlib
import io
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from facepipe.errors import StorageError, TrainingError
from facepipe.observe import logs
from facepipe.storage import describe_error, replace_file, sync_folder
from facepipe.storage.atomic import UNFINISHED, open_for_writing
from facepipe.storage.locks import require_locks
from facepipe.storage.owned import delete_owned

FOLDER = "checkpoints"
BEST = "best.ckpt"
_FORMAT = b"facepipe-checkpoint 1 "
_HEADER_BYTES = len(_FORMAT) + 64 + 1
# Seconds to wait for another run's lock, and between two tries.
_LOCK_TIMEOUT_S = 60.0
_LOCK_POLL_S = 0.2
_MAX_AGES = 10  # checkpoints before the last one to look for


# Names of checkpoints, of damaged ones, and of unfinished ones.
_OWN_NAME = re.compile(
    rf"(?:last(?:-\d+)?|best)\.(?:ckpt|damaged)(?:(?:\.[0-9a-f]{{8}}|\.\d+)?{re.escape(UNFINISHED)})?"
)


def is_own_name(name: str) -> bool:
    """Tell whether a file in the folder of checkpoints is one that training writes, by its name."""
    return bool(_OWN_NAME.fullmatch(name))


class DamagedCheckpointError(Exception):
    """The file is not a complete checkpoint.

    Callers of this module handle it: they use an older checkpoint or report that there is none.
    """


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: file to write.
        content: tensors, numbers and texts, nested in dicts and lists.

    Raises:
        StorageError: The file cannot be written.
    """
    # The digest stands before the content, so it is made in memory first.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getbuffer()
    with replace_file(str(path), sync=True, unique=True, what="checkpoint") as unfinished:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(_FORMAT + hashlib.sha256(body).hexdigest().encode() + b"\n")
            file.write(body)
    sync_folder(str(path.parent))


def is_checkpoint(path: Path) -> bool:
    """Check that a file begins like a checkpoint of `write_checkpoint`."""
    try:
        with path.open("rb") as file:
            return file.read(len(_FORMAT)) == _FORMAT
    except OSError:
        return False


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; its tensors are on the CPU.

    Raises:
        DamagedCheckpointError: The file is not a complete checkpoint.
        StorageError: The file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read the checkpoint {str(path)!r}: {describe_error(error)}") from error
    # Check the digest before the content is parsed.
    body = memoryview(data)[_HEADER_BYTES:]
    if not data.startswith(_FORMAT):
        raise DamagedCheckpointError("it is not a checkpoint of this format")
    if hashlib.sha256(body).hexdigest().encode() != data[len(_FORMAT) : _HEADER_BYTES - 1]:
        raise DamagedCheckpointError("its SHA-256 differs from the one in its header")
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(str(error).splitlines()[0]) from error


class CheckpointFolder:
    """The checkpoints of a run: `last.ckpt`, up to `keep` - 1 before it (`last-1.ckpt`, ...), and `best.ckpt`."""

    def __init__(self, output: str, keep: int = 2):
        self.folder = Path(output) / FOLDER
        self._keep = keep
        self.last_step = 0  # step of the checkpoint that this object wrote or read last

    @property
    def best_path(self) -> Path:
        """The file of the network with the best score."""
        return self.folder / BEST

    @property
    def last_path(self) -> Path:
        """The file of the last checkpoint."""
        return self._get_path(0)

    @property
    def has_checkpoint(self) -> bool:
        """Whether a run can resume from this folder."""
        return any(self._get_path(age).exists() for age in range(_MAX_AGES))

    def _get_path(self, age: int) -> Path:
        return self.folder / (f"last-{age}.ckpt" if age else "last.ckpt")

    def save(self, content: dict[str, Any]) -> None:
        """Write the last checkpoint. At every moment the folder holds at least one complete checkpoint."""
        # Rotate older checkpoints from the oldest on, then write the new one.
        for age in range(self._keep - 1, 0, -1):
            with suppress(FileNotFoundError):
                os.replace(self._get_path(age - 1), self._get_path(age))
        write_checkpoint(self._get_path(0), content)
        self.last_step = content["step"]

    def load(self) -> dict[str, Any] | None:
        """Load the newest complete checkpoint. Damaged ones are logged and renamed to `.damaged`.

        Returns:
            The content of the checkpoint, or None if the folder holds no checkpoint.

        Raises:
            TrainingError: All checkpoints are damaged.
        """
        paths = [self._get_path(age) for age in range(_MAX_AGES)]
        existing = [path for path in paths if path.exists()]
        # Take the newest that is complete.
        for path in existing:
            try:
                content = read_checkpoint(path)
                self.last_step = content["step"]
                return content
            except DamagedCheckpointError as error:
                logs.get_logger(__name__).warning(
                    "checkpoint.damaged", extra={"fields": {"file": path.name, "why": error}}
                )
                # If it stayed, the next save would rotate a complete checkpoint out.
                path.rename(path.with_suffix(".damaged"))
        if existing:
            raise TrainingError(f"every checkpoint in {str(self.folder)!r} is damaged: start again with --fresh")
        return None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs from writing here.

        A run that was killed may take a while to release the lock, so this waits for it.

        Raises:
            TrainingError: Another run still holds the lock after the timeout.
            StorageError: The file system's locks keep no other run out.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        require_locks(str(self.folder))
        with open(open_for_writing(str(self.folder / "lock")), "w") as file:
            deadline = time.monotonic() + _LOCK_TIMEOUT_S
            while not _try_lock(file):
                if time.monotonic() > deadline:
                    raise TrainingError(
                        f"another run is writing to {str(self.folder.parent)!r}: wait until it ends, or stop it"
                    )
                time.sleep(_LOCK_POLL_S)
            # Files of a run that was killed while it wrote a checkpoint.
            self._delete(lambda name: is_own_name(name) and name.endswith(UNFINISHED))
            yield

    def clear(self) -> None:
        """Delete all checkpoints of training. Other files, and links, stay."""
        self._delete(is_own_name)

    def _delete(self, owns: Callable[[str], bool]) -> None:
        delete_owned(str(self.folder), owns)

    def list_paths(self) -> list[Path]:
        """List the checkpoints, complete or not, in no order."""
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if is_own_name(path.name)]


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
