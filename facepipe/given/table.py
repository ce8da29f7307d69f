"""Look up the given faces of images by their uris."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from facepipe import storage
from facepipe.given.lists import FACES, FIGURES, KEYS, LABELS, STARTS
from facepipe.given.names import make_keys
from facepipe.given.records import RECORD, ListFigures, Records
from facepipe.hashing import hash64_each
from facepipe.sorted_lookup import find_sorted
from facepipe.types import Int64

_COPIED_BYTES = 1 << 22


class GivenFaces:
    """The faces of a folder that `read_lists` wrote. Its files are mapped into memory."""

    def __init__(self, folder: str):
        self._folder = folder

    @cached_property
    def figures(self) -> ListFigures:
        """What was read of the lists."""
        return ListFigures(**json.loads(storage.read(storage.join(self._folder, FIGURES))))

    @cached_property
    def labels(self) -> list[str]:
        """The labels by their numbers."""
        labels: list[str] = json.loads(storage.read(storage.join(self._folder, LABELS)))
        return labels

    @cached_property
    def keys(self) -> npt.NDArray[Any]:
        """Hashes of the names of images, (n,), rising."""
        return self._map(KEYS, np.dtype("<u8"))

    @cached_property
    def _starts(self) -> npt.NDArray[Any]:
        return self._map(STARTS, np.dtype("<i8"))

    @cached_property
    def _faces(self) -> npt.NDArray[Any]:
        return self._map(FACES, RECORD)

    def find(self, uris: Sequence[str]) -> Int64:
        """Find the images of uris, (n,): positions in `keys`, -1 for one that no list names.

        A list that names more of an image's path counts before one that names less.
        """
        depths = self.figures.depths
        if not depths or not uris:
            return np.full(len(uris), -1, np.int64)
        keys = chain.from_iterable(make_keys(uri, depths) for uri in uris)
        at = find_sorted(self.keys, hash64_each(list(keys))).reshape(len(uris), -1)
        # The first key that a list has.
        first = (at >= 0).argmax(axis=1)
        return np.asarray(at[np.arange(len(uris)), first], np.int64)

    def read(self, position: int) -> Records:
        """Read the records of an image by its position in `keys`: its faces, or one that says that there is none."""
        return np.array(self._faces[self._starts[position] : self._starts[position + 1]])

    def read_first(self, positions: Int64) -> Records:
        """Read the first record of several images, (n,)."""
        return np.array(self._faces[self._starts[positions]])

    def count(self, positions: Int64) -> Int64:
        """Count the records of several images, (n,)."""
        return np.asarray(self._starts[positions + 1] - self._starts[positions], np.int64)

    def _map(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        path = storage.join(self._folder, name)
        if not storage.is_remote(path):
            return np.memmap(path, dtype, "r") if os.path.getsize(path) else np.empty(0, dtype)
        # A copy without a name, which goes with the map.
        with tempfile.TemporaryFile(prefix="facepipe-") as local, storage.open_seekable(path) as remote:
            shutil.copyfileobj(remote, local, _COPIED_BYTES)
            local.flush()
            return np.memmap(local, dtype, "r") if local.tell() else np.empty(0, dtype)
