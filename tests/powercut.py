"""A power cut: what a disk holds of a folder when the current goes away.

`SyncedState` works without root. It notes what a process syncs and builds, at any moment, a folder that a disk may hold
after a cut. `Ext4` is a real file system on a loop device; a copy of its image is what a disk would hold.
"""

import os
import random
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from facepipe import storage
from facepipe.storage import atomic

# Device and inode of a file or folder.
_Id = tuple[int, int]

CUTS = ("synced", "named", "mixed")
"""What a cut leaves: only what was synced; all names, with the synced content; a random mix of old and new names."""


class SyncedState:
    """What was synced of a folder, by POSIX's word: a file's content by its own fsync, a name by that of its folder.

    Attributes:
        root: The folder.
        syncs: Number of syncs so far.
        on_sync: Called before each sync takes effect, as then most is unsynced.
    """

    def __init__(self, root: Path):
        self.root = root
        self.syncs = 0
        self.on_sync: Callable[[], None] = lambda: None
        self._contents: dict[_Id, bytes] = {}
        self._names: dict[_Id, dict[str, _Id]] = {}
        # Open files keep their inodes, which would be used again for other files.
        self._open: dict[_Id, int] = {}
        self._is_paused = False

    @contextmanager
    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Iterator["SyncedState"]:
        """Note every sync of this process; what is there at the beginning counts as synced."""
        real_sync = os.fsync
        self._note_tree()

        def note_sync(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            real_sync(descriptor)
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            # The lease's heartbeat has a thread of its own, and no part in what is promised.
            is_main = threading.current_thread() is threading.main_thread()
            if is_main and not self._is_paused and f"{path}/".startswith(f"{self.root}/"):
                self._call_back()
                self._note(f"/proc/self/fd/{descriptor}")
                self.syncs += 1

        def note_disk(descriptor: int) -> None:
            self._call_back()
            sync_disk(descriptor)
            self._note_tree()
            self.syncs += 1

        sync_disk = atomic._sync_disk
        monkeypatch.setattr(os, "fsync", note_sync)
        monkeypatch.setattr(atomic, "_sync_disk", note_disk)
        try:
            yield self
        finally:
            monkeypatch.undo()
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _call_back(self) -> None:
        self._is_paused = True
        try:
            self.on_sync()
        finally:
            self._is_paused = False

    def _note_tree(self) -> None:
        for folder, _, names in os.walk(self.root):
            self._note(folder)
            for name in names:
                self._note(os.path.join(folder, name))

    def _note(self, path: str) -> None:
        """Note a file or folder as it is now."""
        info = self._hold(path)
        if stat.S_ISDIR(info.st_mode):
            # Listing the link of a descriptor lists its folder.
            names = {}
            for name in os.listdir(path):
                with suppress(FileNotFoundError):
                    names[name] = _identify(self._hold(os.path.join(path, name)))
            self._names[_identify(info)] = names
        elif stat.S_ISREG(info.st_mode):
            with open(path, "rb") as file:
                self._contents[_identify(info)] = file.read()

    def _hold(self, path: str) -> os.stat_result:
        descriptor = os.open(path, os.O_RDONLY)
        info = os.fstat(descriptor)
        if _identify(info) in self._open:
            os.close(descriptor)
        else:
            self._open[_identify(info)] = descriptor
        return info

    def cut(self, folder: Path, kind: str, seed: int = 0) -> None:
        """Write to a new folder what a disk may hold.

        Args:
            folder: where it is written.
            kind: one of CUTS.
            seed: of the mix.
        """
        rng = random.Random(seed)
        self._write(_identify(os.stat(self.root)), str(self.root), folder, kind, rng)

    def _write(self, at: _Id, real: str, folder: Path, kind: str, rng: random.Random) -> None:
        """Write a folder that may hold other names than the real one, which may be gone."""
        folder.mkdir(parents=True)
        old = self._names.get(at, {})
        new: dict[str, _Id] = {}
        # A folder that was renamed has the same names under another path.
        with suppress(OSError):
            if at in self._open:
                real = os.readlink(f"/proc/self/fd/{self._open[at]}")
            for name in os.listdir(real):
                with suppress(FileNotFoundError):
                    new[name] = _identify(os.stat(os.path.join(real, name)))
        for name in sorted({*old, *new}):
            newest = kind == "named" or (kind == "mixed" and rng.random() < 0.5)
            chosen = (new if newest else old).get(name)
            if chosen is None:
                continue
            if self._is_folder(chosen, os.path.join(real, name)):
                self._write(chosen, os.path.join(real, name), folder / name, kind, rng)
            else:
                (folder / name).write_bytes(self._contents.get(chosen, b""))

    def _is_folder(self, which: _Id, path: str) -> bool:
        if which in self._open:
            return stat.S_ISDIR(os.fstat(self._open[which]).st_mode)
        return os.path.isdir(path)


def _identify(info: os.stat_result) -> _Id:
    return info.st_dev, info.st_ino


class Ext4:
    """An ext4 file system in a file.

    Attributes:
        path: Where it is mounted.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._image = folder / "disk.img"
        self.path = folder / "disk"

    def sync(self) -> None:
        """Have everything on the disk, as half a minute without a cut does."""
        storage.sync_disks(str(self.path))

    def commit_journal(self) -> None:
        """Have the journal write what it has, as it does every five seconds: names, and of new files no content."""
        with open(self.path / "unrelated", "wb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())

    def copy_image(self) -> Path:
        """Copy what the disk holds now."""
        copies = [self._folder / f"copy-{n}.img" for n in range(2)]
        # Until two copies are equal: the kernel may be writing meanwhile.
        for _ in range(50):
            for copy in copies:
                subprocess.run(["cp", "--sparse=always", self._image, copy], check=True)
            if not subprocess.run(["cmp", "-s", *copies]).returncode:
                break
        return copies[0]

    @contextmanager
    def cut(self) -> Iterator[Path]:
        """Mount a copy of what the disk holds, as a machine does that starts again."""
        copy = self.copy_image()
        point = self._folder / "after"
        point.mkdir(exist_ok=True)
        subprocess.run(["mount", "-o", "loop", copy, point], check=True, capture_output=True)
        try:
            yield point
        finally:
            subprocess.run(["umount", "-l", point], check=True)


@contextmanager
def mount_ext4(folder: Path, megabytes: int = 48) -> Iterator[Ext4 | None]:
    """Mount a new ext4; None if nobody may do so here."""
    disk = Ext4(folder)
    disk.path.mkdir(parents=True)
    image = folder / "disk.img"
    if not shutil.which("mkfs.ext4") or os.geteuid():
        yield None
        return
    subprocess.run(["truncate", "-s", f"{megabytes}M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, disk.path], capture_output=True).returncode:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk.path], check=True)
