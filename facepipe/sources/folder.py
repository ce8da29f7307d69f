"""A folder tree on a disk. Folders are read one at a time; the walk holds one open folder per level."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from stat import S_ISREG

from facepipe.sources.expand import Expander, FolderExpander
from facepipe.sources.extensions import ARCHIVE_EXTENSIONS, IMAGE_EXTENSIONS, get_extension, is_hidden
from facepipe.sources.folder_times import FolderTimes
from facepipe.sources.item import WorkItem, make_broken_item, make_file_uri
from facepipe.sources.selection import EXCLUDED
from facepipe.storage import describe_error, get_local_fingerprint, is_special_mode

# Entries that are sorted at a time.
_SORT_RUN = 100_000

_FolderIds = tuple[tuple[int, int], ...]
"""(device, inode) of folders."""
_Listing = Iterator["WorkItem | _Listing"]


class FolderSource:
    """Every image (and tar shard) below a folder.

    Symbolic links are followed, out of the root too, because datasets are often farms of links. An image is known by
    the link's path. A link back to a parent folder is passed over. A folder that is linked to from within a linked
    folder is listed once, and a row says where it was left out: folders that link to each other would multiply without
    end. A link that leads nowhere is a row. Devices, FIFOs and sockets are rows, and are never opened.

    Attributes:
        root: Absolute path of the folder.
        name: Name of the source.
    """

    has_labels = None  # labels come from folders' names, or stand beside the images

    def __init__(self, root: str, expander: Expander | None = None, name: str | None = None):
        self.root = os.path.abspath(root)
        self.name = name or os.path.basename(self.root) or "root"
        self._expander = expander or Expander()
        self._selection = self._expander.selection
        self._passed_over = self._expander.passed_over
        self._is_wanted: Callable[[str], bool] = lambda relative: True
        self._max_depth: int | None = None
        self._nested_folders: set[tuple[int, int]] = set()
        self._takes_all_files = self._selection.takes_all_files
        self._times: FolderTimes | None = None

    @property
    def ignored(self) -> int:
        """Number of files and folders passed over so far."""
        return self._passed_over.total

    @property
    def other_folders(self) -> Collection[str]:
        """Folders right below the root, with images that patterns leave out; two at most."""
        return self._passed_over.folders

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what was passed over."""
        return self._passed_over.describe()

    def pass_over(self, times: FolderTimes) -> None:
        """Pass over the files of folders that have not changed, by their times. Note the others for next time."""
        self._times = times

    def select(self, is_wanted: Callable[[str], bool], max_depth: int | None) -> "FolderSource":
        """Keep only some files.

        Args:
            is_wanted: tells from its path below the root whether a file is kept.
            max_depth: folders below the root to go down; None for any.

        Returns:
            This source.
        """
        self._is_wanted = is_wanted
        self._max_depth = max_depth
        return self

    def __iter__(self) -> Iterator[WorkItem]:
        self._passed_over.clear()
        self._nested_folders.clear()
        return self._walk()

    def _walk(self) -> Iterator[WorkItem]:
        """Walk depth first, with a stack of its own: folders may lie deeper than Python's calls may."""
        # Each entry is the listing of an open folder; the last one is the deepest.
        open_folders = [self._list_folder(os.fsencode(self.root), "", (), 0)]
        while open_folders:
            entry = next(open_folders[-1], None)
            if entry is None:
                open_folders.pop()
            elif isinstance(entry, WorkItem):
                yield entry
            else:
                open_folders.append(entry)

    def _list_folder(self, folder: bytes, relative: str, parents: _FolderIds, links: int) -> _Listing:
        """Yield the items of a folder, and listings of the folders in it; `links` is how many links lead to it."""
        try:
            info = os.stat(folder)
            # A folder that is among its own parents was reached by a link back: it is passed over.
            folder_id = (info.st_dev, info.st_ino)
            if folder_id in parents:
                return
            # Below two links the same folder may come up again and again, so it is listed once.
            if links > 1:
                if folder_id in self._nested_folders:
                    yield make_broken_item(folder, "a link to a folder that was listed before")
                    return
                self._nested_folders.add(folder_id)
            expand_image = self._expander.make_folder_expander(folder, relative)
            census = _Census(folder, info, self._times)
            if census.is_passed:
                yield _make_folder_item(expand_image)
                if not census.has_folders:
                    return
            with os.scandir(folder) as entries:
                # Sorted runs: a readable order, and bounded memory in a folder of millions.
                while run := sorted(islice(entries, _SORT_RUN), key=lambda entry: entry.name):
                    for entry in run:
                        name = os.fsdecode(entry.name)
                        path = f"{relative}/{name}" if relative else name
                        goes_down = self._max_depth is None or len(parents) < self._max_depth
                        if _is_plain_file(entry):
                            if not census.is_passed:
                                yield from census.watch(self._list_file(entry, name, path, expand_image), entry)
                        elif goes_down and (problem := _find_problem(entry, name)):
                            census.is_plain = False
                            yield make_broken_item(entry.path, problem)
                        elif not _is_folder(entry):
                            census.is_plain = False
                            yield from self._list_file(entry, name, path, expand_image)
                        elif not goes_down:
                            continue
                        elif reason := self._selection.reject_folder(name, path):
                            self._passed_over.add(reason, name)
                            if reason == EXCLUDED:
                                self._passed_over.note_folder(f"{path}/x.jpg")
                        else:
                            entry_links = links + 1 if entry.is_symlink() else links
                            census.is_plain &= entry_links == links
                            census.has_folders = True
                            yield self._list_folder(entry.path, path, (*parents, folder_id), entry_links)
            census.note()
        except OSError as error:
            yield make_broken_item(folder, f"folder cannot be read: {describe_error(error)}")

    def _list_file(
        self, entry: "os.DirEntry[bytes]", name: str, relative: str, expand_image: FolderExpander
    ) -> Iterable[WorkItem]:
        if not self._is_wanted(relative):
            self._passed_over.note_folder(relative)
            return ()
        if not self._takes_all_files and (reason := self._expander.reject_file(relative)):
            self._passed_over.add(reason)
            self._passed_over.note_folder(relative)
            return ()
        try:
            info = entry.stat()
        except OSError:
            # A link that leads nowhere or in a circle: reading it will say why.
            return self._expander.expand_file(entry.path, relative, None)
        fingerprint = get_local_fingerprint(info)
        item = expand_image(name, entry.path, fingerprint) if S_ISREG(info.st_mode) else None
        if item is not None:
            return (item,)
        return self._expander.expand_file(entry.path, relative, fingerprint, is_special_mode(info.st_mode))


class _Census:
    """Counts what is in a folder, for the next listing.

    Attributes:
        is_passed: Whether the folder's files are passed over.
        is_plain: Whether all that is in it are plain images, other files and folders: its time then tells all changes.
        has_folders: Whether there are folders in it.
    """

    def __init__(self, folder: bytes, info: os.stat_result, times: FolderTimes | None):
        self._folder = folder
        self._info = info
        self._times = times
        self._images = 0
        self.is_passed = times is not None and times.pass_over(folder)
        self.has_folders = times is not None and self.is_passed and times.has_folders(folder)
        # A folder whose uris need escapes is not known by its path.
        self.is_plain = times is not None and make_file_uri(folder + b"/x").encode() == folder + b"/x"

    def watch(self, items: Iterable[WorkItem], entry: "os.DirEntry[bytes]") -> Iterable[WorkItem]:
        """Count the items of a file, and return them."""
        if not self.is_plain:
            return items
        listed = tuple(items)
        self._images += len(listed)
        # The images in an archive may change although its folder does not.
        self.is_plain = all(
            item.path == entry.path and item.offset is None and not item.listing_error for item in listed
        )
        return listed

    def note(self) -> None:
        """Note the folder, if its time tells all changes in it."""
        if self._times is not None and self.is_plain and not self.is_passed:
            self._times.note(self._folder, self._info, self._images, has_folders=self.has_folders)


def _make_folder_item(expand_image: FolderExpander) -> WorkItem:
    """Make the item that stands for a folder whose images are passed over. It has the folder's label, and no name."""
    item = expand_image("x.jpg", b"", "")
    return WorkItem("", b"", identity=None if item is None else item.identity)


def _is_plain_file(entry: "os.DirEntry[bytes]") -> bool:
    """Tell whether an entry is a file and no link; most file systems say so in the listing."""
    try:
        return entry.is_file(follow_symlinks=False)
    except OSError:
        return False


def _find_problem(entry: "os.DirEntry[bytes]", name: str) -> str:
    """Say why an entry that may be a folder cannot be looked up; empty if it can, or if it is no folder.

    Such is a link to a folder of a disk that is not mounted. Its images must not count as gone.
    """
    extension = get_extension(name)
    if is_hidden(name) or extension in IMAGE_EXTENSIONS or extension in ARCHIVE_EXTENSIONS:
        return ""  # listed as a file: reading it will say why
    # A link that leads nowhere counts as no folder, so it is looked up.
    try:
        if not entry.is_dir() and entry.is_symlink():
            entry.stat()
    except FileNotFoundError:
        return "" if extension else "a link that leads nowhere"
    except OSError as error:
        return f"cannot be looked up: {describe_error(error)}"
    return ""


def _is_folder(entry: "os.DirEntry[bytes]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
