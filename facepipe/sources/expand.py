"""From a listed file to its work items: an image is one item, a tar shard one item a member, anything else none."""

import os
from collections.abc import Callable, Iterable

from facepipe.sources.extensions import IMAGE_EXTENSIONS, get_extension, is_hidden
from facepipe.sources.identity import IdentityRule, make_identity_rule
from facepipe.sources.item import WorkItem, make_broken_item, make_file_uri
from facepipe.sources.tar import list_tar_items

Plain = Callable[[str, bytes, str], WorkItem | None]


def _is_its_uri(path: bytes) -> bool:
    return make_file_uri(path).encode("utf-8", "replace") == path


class Expander:
    """Turns files into items and counts those that are neither image nor tar.

    What a file holds is decided later, from its content; the extension only keeps text and metadata files out.
    """

    def __init__(self, identity: IdentityRule):
        self.ignored = 0
        self._identify = make_identity_rule(identity)
        self._same = identity != "filename"  # for all files of a folder

    def __call__(
        self, path: str | bytes, relative: str, fingerprint: str | None, special: bool = False
    ) -> Iterable[WorkItem]:
        """The items of one file; `relative` is its path below the source's root, with `/`.

        special: it is a device, FIFO or socket, and must not be opened
        """
        kind = get_extension(relative)
        if is_hidden(relative) or not (kind in IMAGE_EXTENSIONS or kind == "tar"):
            self.ignored += 1
            return ()
        if special:
            return (make_broken_item(path, "not a regular file"),)
        if kind == "tar":
            return list_tar_items(os.fsdecode(path), self._identify)
        where = path if isinstance(path, bytes) else os.fsencode(path)
        return (WorkItem(make_file_uri(path), where, None, None, fingerprint, self._identify(relative, None)),)

    def folder(self, folder: bytes, relative: str) -> Plain:
        """The same for the files of one folder: makes the item of (name, path, fingerprint) where it is an image like
        any other, and None where the long way is to decide.

        Most of an image's item is its folder's: what names it, and often who is on it. In a tree of millions that is
        half of the time that listing takes.
        """
        probe = os.path.join(folder, b"x.jpg")
        if not _is_its_uri(probe):
            return lambda name, path, fingerprint: None
        prefix = make_file_uri(probe)[: -len("x.jpg")]
        identify, under = self._identify, f"{relative}/" if relative else ""
        shared, same = identify(f"{under}x.jpg", None), self._same

        def item(name: str, path: bytes, fingerprint: str) -> WorkItem | None:
            stem, _, kind = name.rpartition(".")
            if not stem or kind not in IMAGE_EXTENSIONS or stem[0] == "." or "#" in stem or not stem.isascii():
                return None
            label = shared if same else identify(under + name, None)
            return WorkItem(prefix + name, path, None, None, fingerprint, label)

        return item
