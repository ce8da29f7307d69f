"""Which images were in hand when a worker, or a whole run, died: small marks in the gallery that every runner can read.

An image that kills its worker twice, once in a block and once alone, is set aside: nothing is retried for ever. Marks
outlive the run, since an image may take worker and driver down together, as where a pod runs out of memory. Then it is
tried alone twice: a whole run has many reasons to die.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.hashing import hash64

_BLOCK, _IMAGE, _SUSPECTS = "block-", "image-", "suspects"
_NAME = re.compile("[0-9a-f]{16}")
_ALONE = 2  # runs that an image may take down while it is alone in hand


class CrashMarks:
    """A folder of marks: a mark is there while its work is in hand, so one that is found tells of a crash.

    suspects: names of images that were in hand when an earlier run died, and how often they were alone then.
    """

    def __init__(self, folder: str):
        self._folder = folder

    @cached_property
    def suspects(self) -> dict[str, int]:
        """From the runs before this one."""
        return _suspects(_read(storage.join(os.path.dirname(self._folder), _SUSPECTS)))

    @contextmanager
    def mark_block(self, number: int, uris: Sequence[str]) -> Iterator[bool]:
        """Mark a block as in hand; yields whether a worker died on it, or a run on one of its images."""
        mark, names = storage.join(self._folder, f"{_BLOCK}{number}"), [_name(uri) for uri in uris]
        crashed = storage.file_exists(mark) or any(name in self.suspects for name in names)
        _write(mark, "\n".join(names))
        yield crashed
        if crashed:
            for name in names:
                storage.delete(storage.join(self._folder, _IMAGE + name))
        storage.delete(mark)

    @contextmanager
    def mark_image(self, uri: str) -> Iterator[bool]:
        """Mark one image as in hand; yields whether a worker died on it. The mark of one that crashed stays."""
        name = _name(uri)
        mark = storage.join(self._folder, _IMAGE + name)
        deaths = self.suspects.get(name, 0)
        crashed = storage.file_exists(mark) or deaths >= _ALONE
        if not crashed:
            _write(mark, str(deaths))
        yield crashed
        if not crashed:
            storage.delete(mark)


def inherit_crash_marks(runs: str, run: str) -> int:
    """Hand what earlier runs left in hand to a new one, and delete their marks; how many images are suspect.

    runs: the gallery's folder of runs; no other run may be alive.
    """
    marks = [found.url for found in storage.list_files(runs) if _part_of(runs, found.url)[1:]]
    suspects: dict[str, int] = {}
    for path in marks:
        name, text = path.rsplit("/", 1)[1], _read(path)
        if name.startswith(_BLOCK):
            found = dict.fromkeys(filter(_NAME.fullmatch, text.splitlines()), 0)
        elif name.startswith(_IMAGE):
            found = {name.removeprefix(_IMAGE): 1 + _count(text)}
        else:
            found = _suspects(text)
        suspects |= {name: max(deaths, suspects.get(name, 0)) for name, deaths in found.items()}
    if suspects:
        lines = (f"{name} {deaths}" for name, deaths in sorted(suspects.items()))
        _write(storage.join(runs, run, _SUSPECTS), "\n".join(lines))
    for path in marks:
        if _part_of(runs, path)[0] != run:
            storage.delete(path)
    delete_crash_marks(runs, keep=run)
    return len(suspects)


def delete_crash_marks(runs: str, keep: str = "", inherited: str = "") -> None:
    """Delete all marks but those of one run; records of runs, which are files of the folder itself, stay.

    inherited: a run that did not come to its end, whose suspects the next one is to know.
    """
    for found in list(storage.list_files(runs)):
        parts = _part_of(runs, found.url)
        if len(parts) > 1 and parts[0] != keep and parts != [inherited, _SUSPECTS]:
            storage.delete(found.url)
    storage.delete_empty_folders(runs, keep=keep)


def _suspects(text: str) -> dict[str, int]:
    """Of a file that may be cut short: a full disk, a crash."""
    lines = (line.split(" ") for line in text.splitlines())
    return {words[0]: _count(words[1]) for words in lines if len(words) == 2 and _NAME.fullmatch(words[0])}


def _count(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 9 else 0


def _part_of(base: str, path: str) -> list[str]:
    return path.removeprefix(base.rstrip("/") + "/").split("/")


def _name(uri: str) -> str:
    return f"{hash64(uri):016x}"


def _write(path: str, text: str) -> None:
    """Not synced to disk as other files are: a mark need not outlive the machine, only the process."""
    storage.make_parent_folder(path)
    storage.write(path, text.encode("ascii"), sync=False)


def _read(path: str) -> str:
    try:
        return storage.read(path.encode()).decode("ascii", "replace")
    except StorageError:
        return ""
