"""Crash marks: small files in the gallery that tell which images were in work when a worker, or a whole run, ended.

Every runner can read them. An image that ends its worker twice, once in a block and once alone, is set aside: nothing
is retried forever. Marks outlive the run, because an image may end worker and driver together, as when a pod runs out
of memory. Such an image is tried alone twice: a whole run may end for many other reasons.

If a GPU failed on an image, the mark names the GPU. Another GPU tries the image again, and no later run counts it.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.hashing import hash64
from facepipe.storage.inside import is_link

_BLOCK = "block-"
_IMAGE = "image-"
_SUSPECTS = "suspects"
_MISSING = "missing"
_DEVICE = "device-"
_NAME = re.compile("[0-9a-f]{16}")
# Marks lie in the folder of their run, those of workers in a folder named after the worker's stages. What a listing
# found out is no mark, but lies there and goes with them.
_RUN = re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}")
_MARK_FOLDER = re.compile(rf"{_RUN.pattern}/(?:[A-Za-z-]+/)?")
_LISTED = (
    r"retried|listing(?:-again)?/(?:listing\.json|unlisted|contents)|given/(?:faces\.json|keys|starts|faces|labels)"
)
_MARK = re.compile(
    rf"{_RUN.pattern}/(?:{_SUSPECTS}|{_MISSING}|{_LISTED}|[A-Za-z-]+/(?:{_BLOCK}\d+|(?:{_IMAGE}|{_DEVICE}){_NAME.pattern}))"
)
_MAX_CRASHES = 2  # runs that an image may end while it is in work alone

Claim = Callable[[], object]
"""Proves that no other run has begun since this one did, or raises. It is called when the marks are listed."""


class CrashMarks:
    """A folder of marks. A mark exists while its work is going on, so a mark that is found tells of a crash."""

    def __init__(self, folder: str):
        self._folder = folder

    @cached_property
    def suspects(self) -> dict[str, int]:
        """Images that were in work when an earlier run ended, by name; and how many runs each ended while alone."""
        return _parse_suspects(_read_mark(storage.join(os.path.dirname(self._folder), _SUSPECTS)))

    @contextmanager
    def mark_block(self, uris: Sequence[str]) -> Iterator[bool]:
        """Mark a block of images as in work.

        The mark is named after the images, so that it does not depend on how the work is cut.

        Args:
            uris: the images.

        Yields:
            Whether a worker crashed on the block, or a run on one of its images.
        """
        # A mark that exists already is from a worker that ended on this block, and whose block is tried again.
        mark = storage.join(self._folder, f"{_BLOCK}{hash64(*uris)}")
        names = [_name_image(uri) for uri in uris]
        has_crashed = storage.file_exists(mark) or any(name in self.suspects for name in names)
        # No `finally` below: if the work ends with an error or with the process, the marks must stay.
        _write_mark(mark, "\n".join(names))
        yield has_crashed
        if has_crashed:
            for name in names:
                storage.delete(storage.join(self._folder, _IMAGE + name))
        storage.delete(mark)

    @contextmanager
    def mark_image(self, uri: str, device: str = "") -> Iterator[bool]:
        """Mark an image as in work alone. The mark of an image that crashed stays.

        Args:
            uri: the image.
            device: name of the worker's GPU, if it has one.

        Yields:
            Whether a worker crashed on the image. A crash of another GPU does not count.
        """
        name = _name_image(uri)
        mark = storage.join(self._folder, _IMAGE + name)
        # A mark tells of a worker of this run that ended on the image. Suspects are counted over earlier runs.
        crashes = self.suspects.get(name, 0)
        has_crashed = crashes >= _MAX_CRASHES
        if storage.file_exists(mark):
            blamed = _parse_device(_read_mark(mark))
            has_crashed = has_crashed or not blamed or blamed == hash_device(device)
        if not has_crashed:
            _write_mark(mark, str(crashes))
        yield has_crashed
        if not has_crashed:
            storage.delete(mark)

    def blame_device(self, uri: str, device: str) -> None:
        """Write into the mark of an image that a GPU failed on it.

        Args:
            uri: the image, which is in work alone.
            device: name of the GPU.
        """
        name = _name_image(uri)
        mark = storage.join(self._folder, _IMAGE + name)
        _write_mark(mark, f"{self.suspects.get(name, 0)} {hash_device(device)}")


def locate_device_mark(folder: str, device: str) -> str:
    """Return the path of the mark that tells how a GPU fares.

    Args:
        folder: folder of the workers' marks.
        device: name of the GPU.
    """
    return storage.join(folder, _DEVICE + hash_device(device))


def list_device_marks(folder: str) -> list[str]:
    """List the marks that tell how the GPUs of a run fare."""
    files = (entry.url for entry in storage.list_files(folder))
    return [path for path in files if re.fullmatch(_DEVICE + _NAME.pattern, path.rsplit("/", 1)[1])]


def inherit_crash_marks(runs: str, run: str, claim: Claim = lambda: None) -> int:
    """Carry over images that were in work when earlier runs ended, and delete the marks of these runs.

    Args:
        runs: the gallery's folder of runs. No other run may be going on.
        run: id of the new run.
        claim: renews the lease of the gallery: a run that was paused must not delete the marks of a later one.

    Returns:
        Number of suspect images.
    """
    marks = list(_iterate_marks(runs))
    suspects: dict[str, int] = {}
    for path in marks:
        for name, crashes in _read_suspects(path).items():
            suspects[name] = max(crashes, suspects.get(name, 0))
    # Write the new list before the marks that it is made from are deleted.
    if suspects:
        lines = (f"{name} {crashes}" for name, crashes in sorted(suspects.items()))
        _write_mark(storage.join(runs, run, _SUSPECTS), "\n".join(lines))
    # Those of earlier runs, and folders that are empty then.
    delete_crash_marks(runs, keep=run, claim=claim)
    return len(suspects)


def _read_suspects(path: str) -> dict[str, int]:
    """Read the suspects that a mark tells of, and their crashes while they were alone."""
    # Images of a block are suspects without a crash of their own; an image in work alone has one more crash.
    file_name = path.rsplit("/", 1)[1]
    if file_name != _SUSPECTS and not file_name.startswith((_BLOCK, _IMAGE)):
        return {}  # another file of the run
    text = _read_mark(path)
    if file_name.startswith(_BLOCK):
        return {line: 0 for line in text.splitlines() if _NAME.fullmatch(line)}
    if file_name.startswith(_IMAGE):
        crashes = _parse_count(text.partition(" ")[0])
        # That a GPU failed is no fault of the image.
        return {file_name.removeprefix(_IMAGE): crashes if _parse_device(text) else crashes + 1}
    return _parse_suspects(text)


def delete_crash_marks(runs: str, keep: str = "", inherited: str = "", claim: Claim = lambda: None) -> None:
    """Delete all marks but those of one run. Records of runs, which are files of the folder itself, stay.

    Args:
        runs: the gallery's folder of runs.
        keep: id of the run whose marks stay.
        inherited: id of a run that did not finish. Its list of suspects stays for the next run.
        claim: as for `inherit_crash_marks`.
    """
    outdated = []
    for path in _iterate_marks(runs):
        parts = _split_relative(runs, path)
        if parts[0] != keep and parts != [inherited, _SUSPECTS]:
            outdated.append(path)
    if outdated:
        claim()
        storage.delete_many(outdated)
    # Folders of runs that are empty now go as well.
    if not storage.is_remote(runs):
        for name in storage.list_names(runs):
            if _RUN.fullmatch(name) and name != keep and not is_link(storage.join(runs, name)):
                storage.delete_empty_folders(storage.join(runs, name))
                with suppress(OSError):  # it is not empty, or no folder
                    os.rmdir(storage.join(runs, name))


def is_mark(name: str) -> bool:
    """Tell whether a file or folder below the folder of runs is a mark or holds marks, by its name there."""
    if name.endswith("/"):
        return bool(_MARK_FOLDER.fullmatch(name))
    return bool(_MARK.fullmatch(name))


def _iterate_marks(runs: str) -> Iterator[str]:
    """Iterate over the marks of all runs. Other files below the folder are of somebody else, and so are links."""
    for entry in storage.list_files(runs):
        if is_mark("/".join(_split_relative(runs, entry.url))) and not is_link(entry.url):
            yield entry.url


def _parse_suspects(text: str) -> dict[str, int]:
    """Parse a list of suspects. It may be cut short by a full disk or a crash."""
    suspects = {}
    for line in text.splitlines():
        words = line.split(" ")
        if len(words) == 2 and _NAME.fullmatch(words[0]):
            suspects[words[0]] = _parse_count(words[1])
    return suspects


def _parse_device(text: str) -> str:
    """Parse which GPU failed on an image, from the image's mark. Empty: none did."""
    device = text.partition(" ")[2]
    return device if _NAME.fullmatch(device) else ""


def hash_device(name: str) -> str:
    """Hash the name of a GPU for the names and texts of marks."""
    return f"{hash64(name):016x}"


def _parse_count(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 9 else 0


def _split_relative(base: str, path: str) -> list[str]:
    return path.removeprefix(base.rstrip("/") + "/").split("/")


def _name_image(uri: str) -> str:
    return f"{hash64(uri):016x}"


def _write_mark(path: str, text: str) -> None:
    """Write a mark. It is not synced to disk like other files: it must outlive the process, not the machine."""
    storage.make_parent_folder(path)
    storage.write(path, text.encode("ascii"), sync=False)


def _read_mark(path: str) -> str:
    try:
        return storage.read(path).decode("ascii", "replace")
    except StorageError:
        return ""
