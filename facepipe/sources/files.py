"""From a listed file to its work items: an image is one item, a tar shard one item a member, anything else none."""

import os
from collections.abc import Iterator

from facepipe.sources.identity import IdentityRule, rule
from facepipe.sources.item import WorkItem, broken, file_uri
from facepipe.sources.kinds import IMAGE_EXTENSIONS, extension, is_hidden
from facepipe.sources.tar import tar_items


class Expander:
    """Turns files into items and counts those that are neither image nor tar.

    What a file holds is decided later, from its content; the extension only keeps text and metadata files out.
    """

    def __init__(self, identity: IdentityRule):
        self.ignored = 0
        self._identify = rule(identity)

    def __call__(
        self, path: str | bytes, relative: str, fingerprint: str | None, special: bool = False
    ) -> Iterator[WorkItem]:
        """The items of one file; `relative` is its path below the source's root, with `/`.

        special: it is a device, FIFO or socket, and must not be opened
        """
        kind = extension(relative)
        if is_hidden(relative) or kind not in (*IMAGE_EXTENSIONS, "tar"):
            self.ignored += 1
        elif special:
            yield broken(path, "not a regular file")
        elif kind == "tar":
            yield from tar_items(os.fsdecode(path), self._identify)
        else:
            label = self._identify(relative, None)
            yield WorkItem(file_uri(path), os.fsencode(path), fingerprint=fingerprint, identity=label)
