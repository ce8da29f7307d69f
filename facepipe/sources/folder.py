"""A folder tree on a disk. Folders are read one at a time; the walk holds one open folder per level."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from stat import S_ISREG

from facepipe.sources.expand import Expander, Plain
from facepipe.sources.identity import IdentityRule
from facepipe.sources.item import WorkItem, make_broken_item
from facepipe.storage import describe_error, get_local_fingerprint, is_special_mode

_SORT_RUN = 100_000

_Parents = tuple[tuple[int, int], ...]
_Listing = Iterator["WorkItem | _Listing"]


class FolderSource:
    """Every image (and tar shard) below a folder.

    Symbolic links are followed, out of the root too, since datasets are often farms of links; an image is known by the
    link's path. A link back to a parent folder is passed over. A folder that is linked to from within a linked folder
    is listed once, and a row says where it was left out: folders that link to each other would multiply without end.
    A link that leads nowhere is a row. Devices, FIFOs and sockets are rows, and are never opened.
    """

    def __init__(self, root: str, identity: IdentityRule = "auto", name: str | None = None):
        self.root = os.path.abspath(root)
        self.name = name or os.path.basename(self.root) or "root"
        self._expand = Expander(identity)
        self._wanted: Callable[[str], bool] = lambda relative: True
        self._depth: int | None = None
        self._nested: set[tuple[int, int]] = set()

    @property
    def ignored(self) -> int:
        return self._expand.ignored

    def only(self, wanted: Callable[[str], bool], depth: int | None) -> "FolderSource":
        """Keep the files whose path below the root is wanted, at most `depth` folders down (None: any)."""
        self._wanted, self._depth = wanted, depth
        return self

    def __iter__(self) -> Iterator[WorkItem]:
        self._expand.ignored = 0
        self._nested.clear()
        return self._walk()

    def _walk(self) -> Iterator[WorkItem]:
        """Depth first, with a stack of its own: folders may lie deeper than Python's calls may."""
        open_folders = [self._folder(os.fsencode(self.root), "", (), 0)]
        while open_folders:
            found = next(open_folders[-1], None)
            if found is None:
                open_folders.pop()
            elif isinstance(found, WorkItem):
                yield found
            else:
                open_folders.append(found)

    def _folder(self, folder: bytes, relative: str, parents: "_Parents", links: int) -> "_Listing":
        """The items of a folder, and listings of the folders in it; `links` is how many links lead to it."""
        try:
            info = os.stat(folder)
            here = (info.st_dev, info.st_ino)
            if here in parents:
                return
            if links > 1:
                if here in self._nested:
                    yield make_broken_item(folder, "a link to a folder that was listed before")
                    return
                self._nested.add(here)
            plain = self._expand.folder(folder, relative)
            with os.scandir(folder) as entries:
                # Sorted runs: a readable order, and bounded memory in a folder of millions.
                while run := sorted(islice(entries, _SORT_RUN), key=lambda entry: entry.name):
                    for entry in run:
                        name = os.fsdecode(entry.name)
                        path = f"{relative}/{name}" if relative else name
                        if not _is_dir(entry):
                            yield from self._file(entry, name, path, plain)
                        elif self._depth is None or len(parents) < self._depth:
                            more = links + 1 if entry.is_symlink() else links
                            yield self._folder(entry.path, path, (*parents, here), more)
        except OSError as error:
            yield make_broken_item(folder, f"folder cannot be read: {describe_error(error)}")

    def _file(self, entry: "os.DirEntry[bytes]", name: str, relative: str, plain: Plain) -> Iterable[WorkItem]:
        if not self._wanted(relative):
            return ()
        try:
            info = entry.stat()
        except OSError:
            return self._expand(entry.path, relative, None)  # a dangling or looping link: reading it will say why
        mark = get_local_fingerprint(info)
        item = plain(name, entry.path, mark) if S_ISREG(info.st_mode) else None
        return (item,) if item else self._expand(entry.path, relative, mark, is_special_mode(info.st_mode))


def _is_dir(entry: "os.DirEntry[bytes]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
