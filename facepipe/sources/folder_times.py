"""Which folders have the same time as at the last listing, so that no file in them came or went.

A folder's modification time changes if a file or folder in it is added, removed or renamed. It stays if a file is
written in its place. So a folder with the same time holds the same names, and perhaps other bytes under one of them.
Only a listing of every file sees those.

Between two listings of every file, folders that have the same time are passed over, if the gallery has exactly as many
images of them as were listed then, and none that is to be tried again. What is kept of a folder is a salted hash of its
path, its time and inode, and two numbers.
"""

import hashlib
import os
import secrets
import time
from array import array
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.sorted_lookup import find_sorted
from facepipe.types import Bool, Int64, UInt64

# A folder that changed within so many seconds before its listing may have changed again within the same tick of its
# file system's clock, which may differ from this machine's.
_SETTLED_SECONDS = 3600.0
_SALT_BYTES = 16
_SALT = b"facepipe.salt"
_SETTINGS = b"facepipe.settings"
_LISTINGS = b"facepipe.listings"
_SCHEMA = pa.schema(
    [
        ("folder", pa.uint64()),  # salted hash of the path
        ("modified", pa.int64()),  # ns
        ("inode", pa.uint64()),
        ("images", pa.int64()),  # that were listed in it
        ("has_folders", pa.bool_()),
    ]
)
# What is known of a folder of the last listing.
_UNKNOWN, _SAME, _OTHER = range(3)
# Number of images of a folder that is listed in any case, until its time changes.
_NEVER = -1


class FolderTimes:
    """The folders of the last listing, and those of this one.

    First the gallery's images are counted by folder (`find`, `count`, `refuse`), then `settle` decides, and then the
    source is listed.

    Attributes:
        passed_images: Images in folders that the listing has passed over so far.
    """

    def __init__(self, path: str, settings: str, full_every: int):
        """Load what the last listing left.

        Args:
            path: path or URL of the file, which `save` writes anew.
            settings: what the listing depends on. If it differs from the last time, every file is looked at.
            full_every: number of listings among which one looks at every file.
        """
        self.passed_images = 0
        self._path = path
        self._settings = settings
        self._salt = secrets.token_bytes(_SALT_BYTES)
        self._listings = 0
        self._began = time.time()
        last = _read(path, settings)
        if last is not None and int(last.schema.metadata[_LISTINGS]) + 1 < full_every:
            self._salt = last.schema.metadata[_SALT]
            self._listings = int(last.schema.metadata[_LISTINGS]) + 1
        else:
            last = _SCHEMA.empty_table()
        self._hashes: UInt64 = last["folder"].to_numpy()
        self._modified: Int64 = last["modified"].to_numpy()
        self._inodes: UInt64 = last["inode"].to_numpy()
        self._images: Int64 = last["images"].to_numpy()
        self._has_folders: Bool = last["has_folders"].to_numpy()
        self._states = np.full(len(self._hashes), _UNKNOWN, np.int8)
        self._held = np.zeros(len(self._hashes), np.int64)
        self._is_refused = self._images == _NEVER
        self._is_passed = np.zeros(len(self._hashes), bool)
        # Folders of this listing, column by column.
        self._new_hashes = array("Q")
        self._new_modified = array("q")
        self._new_inodes = array("Q")
        self._new_images = array("q")
        self._new_has_folders = array("b")

    @property
    def is_empty(self) -> bool:
        """Whether every file is looked at."""
        return not len(self._hashes)

    # ---- before the listing: what the gallery has

    def find(self, uris: pa.ChunkedArray) -> Int64:
        """Find the folders of images whose time is the same.

        Args:
            uris: uris of the images, (n,).

        Returns:
            A number per image, (n,); -1 if its folder is not one of them.
        """
        if self.is_empty:
            return np.full(len(uris), -1, np.int64)
        folders = pc.dictionary_encode(pc.replace_substring_regex(uris, "/[^/]*$", "")).combine_chunks()
        if isinstance(folders, pa.ChunkedArray):
            folders = pa.concat_arrays(folders.chunks) if folders.num_chunks else pa.array([]).dictionary_encode()
        paths = folders.dictionary.to_pylist()
        rows = find_sorted(self._hashes, self._hash([path.encode() for path in paths]))
        for n in np.flatnonzero(rows >= 0).tolist():
            if self._states[rows[n]] == _UNKNOWN:
                self._states[rows[n]] = self._look(paths[n], rows[n])
        rows[self._is_refused[rows] | (self._states[rows] != _SAME)] = -1
        found: Int64 = rows[folders.indices.to_numpy()] if len(folders) else np.empty(0, np.int64)
        return found

    def _look(self, path: str, row: int) -> int:
        """Look at a folder's time and inode now."""
        try:
            info = os.stat(path)
        except (OSError, ValueError):
            return _OTHER
        is_same = info.st_mtime_ns == self._modified[row] and info.st_ino == self._inodes[row]
        return _SAME if is_same else _OTHER

    def refuse(self, folders: Int64) -> None:
        """Note folders that have to be listed because an image in them is to be tried again.

        Args:
            folders: numbers that `find` has returned.
        """
        self._is_refused[folders[folders >= 0]] = True

    def count(self, folders: Int64) -> None:
        """Count images that the gallery has.

        Args:
            folders: numbers that `find` has returned, one per image.
        """
        np.add.at(self._held, folders[folders >= 0], 1)

    def settle(self) -> None:
        """Decide which folders are passed over: those of which the gallery has all images that were listed."""
        # Folders without images in the gallery were not looked at. They are listed, which costs little.
        is_same = (self._states == _SAME) & ~self._is_refused
        self._is_passed = is_same & (self._held == self._images)
        self._is_refused |= is_same & ~self._is_passed

    def is_passed(self, folders: Int64) -> Bool:
        """Tell of numbers that `find` has returned, (n,), whether the folder is passed over."""
        if not len(self._is_passed):
            return np.zeros(len(folders), bool)
        return (folders >= 0) & self._is_passed[folders]

    # ---- the listing

    def pass_over(self, folder: bytes) -> bool:
        """Tell whether the listing passes over the files of a folder, and keep what is known of it."""
        row = self._find_row(folder)
        if row < 0 or not self._is_passed[row]:
            return False
        self.passed_images += int(self._images[row])
        self._note(row, int(self._images[row]), has_folders=bool(self._has_folders[row]))
        return True

    def has_folders(self, folder: bytes) -> bool:
        """Tell whether there are folders in a folder that is passed over."""
        return bool(self._has_folders[self._find_row(folder)])

    def note(self, folder: bytes, info: os.stat_result, images: int, *, has_folders: bool) -> None:
        """Note a folder that was listed.

        Args:
            folder: its path.
            info: what was known of it before it was listed.
            images: number of images in it, not in folders below.
            has_folders: whether there are folders in it.
        """
        if self._began - info.st_mtime < _SETTLED_SECONDS:
            return
        row = self._find_row(folder)
        if row >= 0 and self._is_refused[row] and info.st_mtime_ns == self._modified[row]:
            images = _NEVER  # what is wrong with it has not changed
        self._new_hashes.append(int(self._hash([folder])[0]))
        self._new_modified.append(info.st_mtime_ns)
        self._new_inodes.append(info.st_ino)
        self._new_images.append(images)
        self._new_has_folders.append(has_folders)

    def _note(self, row: int, images: int, *, has_folders: bool) -> None:
        """Note a folder of the last listing again."""
        self._new_hashes.append(int(self._hashes[row]))
        self._new_modified.append(int(self._modified[row]))
        self._new_inodes.append(int(self._inodes[row]))
        self._new_images.append(images)
        self._new_has_folders.append(has_folders)

    def save(self) -> None:
        """Write what the next listing needs, when everything is listed.

        Raises:
            StorageError: it cannot be written. The next listing then looks at what is there.
        """
        columns = {
            "folder": np.frombuffer(self._new_hashes, np.uint64),
            "modified": np.frombuffer(self._new_modified, np.int64),
            "inode": np.frombuffer(self._new_inodes, np.uint64),
            "images": np.frombuffer(self._new_images, np.int64),
            "has_folders": np.frombuffer(self._new_has_folders, bool),
        }
        order = np.argsort(columns["folder"])
        metadata = {_SALT: self._salt, _SETTINGS: self._settings, _LISTINGS: str(self._listings)}
        table = pa.table({name: values[order] for name, values in columns.items()}, schema=_SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
        storage.replace(self._path, sink.getvalue().to_pybytes())

    def _find_row(self, folder: bytes) -> int:
        return int(find_sorted(self._hashes, self._hash([folder]))[0])

    def _hash(self, paths: Sequence[bytes]) -> UInt64:
        digests = [hashlib.blake2b(path, digest_size=8, key=self._salt).digest() for path in paths]
        return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _read(path: str, settings: str) -> pa.Table | None:
    """Read what a listing with the same settings has left; None if there is none that can be used."""
    try:
        table = pq.read_table(pa.BufferReader(storage.read(path)))
        metadata = table.schema.metadata or {}
        if metadata.get(_SETTINGS, b"").decode() != settings or len(metadata.get(_SALT, b"")) != _SALT_BYTES:
            return None
        int(metadata[_LISTINGS])
        return table.cast(_SCHEMA.with_metadata(metadata))
    except (StorageError, pa.ArrowException, KeyError, ValueError):
        return None
