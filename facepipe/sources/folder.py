"""A folder tree on a disk. Folders are read one at a time; the walk holds one open folder per level."""

import os
from collections.abc import Callable, Iterator
from itertools import islice

from facepipe.sources.files import Expander
from facepipe.sources.identity import IdentityRule
from facepipe.sources.item import WorkItem, broken
from facepipe.storage import local_fingerprint

_SORT_RUN = 100_000


class FolderSource:
    """Every image (and tar shard) below a folder. Symbolic links are followed, but not one back to a parent folder."""

    def __init__(self, root: str, identity: IdentityRule = "auto", name: str | None = None):
        self.root = os.path.abspath(root)
        self.name = name or os.path.basename(self.root) or "root"
        self._expand = Expander(identity)
        self._wanted: Callable[[str], bool] = lambda relative: True
        self._depth: int | None = None

    @property
    def ignored(self) -> int:
        return self._expand.ignored

    def only(self, wanted: Callable[[str], bool], depth: int | None) -> "FolderSource":
        """Keep the files whose path below the root is wanted, at most `depth` folders down (None: any)."""
        self._wanted, self._depth = wanted, depth
        return self

    def __iter__(self) -> Iterator[WorkItem]:
        self._expand.ignored = 0
        return self._walk(os.fsencode(self.root), "", ())

    def _walk(self, folder: bytes, relative: str, parents: tuple[tuple[int, int], ...]) -> Iterator[WorkItem]:
        try:
            info = os.stat(folder)
            here = (info.st_dev, info.st_ino)
            if here in parents:
                return
            with os.scandir(folder) as entries:
                # Sorted runs: a readable order, and bounded memory in a folder of millions.
                while run := sorted(islice(entries, _SORT_RUN), key=lambda entry: entry.name):
                    for entry in run:
                        name = os.fsdecode(entry.name)
                        yield from self._entry(entry, f"{relative}/{name}" if relative else name, (*parents, here))
        except OSError as error:
            yield broken(folder, f"folder cannot be read: {(error.strerror or str(error)).lower()}")

    def _entry(
        self, entry: "os.DirEntry[bytes]", relative: str, parents: tuple[tuple[int, int], ...]
    ) -> Iterator[WorkItem]:
        if _is_dir(entry):
            if self._depth is None or len(parents) <= self._depth:
                yield from self._walk(entry.path, relative, parents)
        elif self._wanted(relative):
            try:
                fingerprint: str | None = local_fingerprint(entry.stat())
            except OSError:
                fingerprint = None  # a dangling or looping link: reading it will say why
            yield from self._expand(entry.path, relative, fingerprint)


def _is_dir(entry: "os.DirEntry[bytes]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
