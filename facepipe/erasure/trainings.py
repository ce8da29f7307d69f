"""Folders outside a gallery in which trainings keep its faces: chips, and the ids of the faces that a model has seen.

A training on a gallery records its folders in it. An erasure looks into those that are on this machine, and names what
is left of the erased. It deletes nothing there: a training may be reading the chips.
"""

import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.gallery.table import RUNS
from facepipe.hashing import hash64
from facepipe.storage.owned import walk_files
from facepipe.types import Int64

_RECORD = re.compile(r"training-[0-9a-f]{16}\.json")
_CHIPS = re.compile(r"chips-\d{5,}\.arrow")
_FACES = "faces.npy"


@dataclass(frozen=True)
class TrainingFolder:
    """A folder of a training, or of chips.

    Attributes:
        path: Absolute path.
        host: Name of the machine.
    """

    path: str
    host: str

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine."""
        return self.host == socket.gethostname()


@dataclass(frozen=True)
class LeftFaces:
    """A file with erased faces.

    Attributes:
        path: The file.
        faces: How many.
        are_chips: Whether it holds their pictures. Otherwise it holds the ids of what a model was trained on.
    """

    path: str
    faces: int
    are_chips: bool

    def __str__(self) -> str:
        if self.are_chips:
            return f"{self.path}: chips of {self.faces} erased faces"
        return f"{self.path}: a model was trained on {self.faces} of the erased faces"


def describe_chips(paths: Sequence[str]) -> str:
    """Say which files hold chips of erased faces, and what to do."""
    folders = sorted({os.path.dirname(path) for path in paths})
    return (
        f"the images are erased, but chips of a training still hold some of the faces: delete {', '.join(folders)}; "
        "`facepipe train` cuts chips of the others again"
    )


def record_training(gallery: str, folder: str) -> None:
    """Record in a gallery that a folder gets chips or ids of its faces. Nothing happens if it cannot be written."""
    record = TrainingFolder(os.path.abspath(folder), socket.gethostname())
    name = f"training-{hash64(record.host, record.path):016x}.json"
    with suppress(StorageError):
        storage.replace(storage.join(gallery, RUNS, name), json.dumps(asdict(record)).encode())


def list_trainings(gallery: str) -> list[TrainingFolder]:
    """List the folders that trainings on a gallery have recorded; damaged records are left out."""
    folders = []
    for name in sorted(storage.list_names(storage.join(gallery, RUNS))):
        if _RECORD.fullmatch(name):
            with suppress(StorageError, ValueError, TypeError):
                values = json.loads(storage.read(storage.join(gallery, RUNS, name).encode()))
                folders.append(TrainingFolder(**values))
    return folders


def find_left_faces(folder: str, faces: Int64) -> Iterator[LeftFaces]:
    """Find erased faces in the folder of a training, or of chips.

    Args:
        folder: a local folder. There may be none.
        faces: ids of the erased faces.

    Raises:
        StorageError: a folder or a file cannot be read.
    """
    if not os.path.isdir(folder):
        return
    for name, is_folder in walk_files(folder):
        path = os.path.join(folder, name)
        if is_folder or os.path.islink(path):
            continue
        base = os.path.basename(name)
        are_chips = bool(_CHIPS.fullmatch(base))
        if are_chips or base == _FACES:
            count = _count_in_chips(path, faces) if are_chips else _count_in_ids(path, faces)
            if count:
                yield LeftFaces(path, count, are_chips)


def _count_in_chips(path: str, faces: Int64) -> int:
    count = 0
    try:
        with pa.memory_map(path) as file, pa.ipc.open_file(file) as reader:
            for number in range(reader.num_record_batches):
                ids = reader.get_batch(number)["face_id"].to_numpy(zero_copy_only=False)
                count += int(np.isin(ids, faces).sum())
    except (OSError, pa.ArrowException, KeyError) as error:
        raise StorageError(f"cannot read the chips {path!r}: {storage.describe_error(error)}") from error
    return count


def _count_in_ids(path: str, faces: Int64) -> int:
    try:
        return int(np.isin(np.load(path, mmap_mode="r"), faces).sum())
    except (OSError, ValueError, EOFError) as error:
        raise StorageError(f"cannot read {path!r}: {storage.describe_error(error)}") from error
