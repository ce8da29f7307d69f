"""A glob on a disk: `photos/**/*.jpg`, `shards/train-*.tar`; also a path to a single file."""

import os
import re
from collections.abc import Callable

from facepipe.sources.expand import Expander
from facepipe.sources.folder import FolderSource
from facepipe.sources.patterns import translate_glob

_WILDCARD = re.compile(r"[*?\[]")


def open_glob(pattern: str, make_expander: Callable[[tuple[str, ...]], Expander], name: str | None) -> FolderSource:
    """Open the source of every image (and tar shard) whose path matches; `**` stands for any number of folders.

    Args:
        pattern: the glob.
        make_expander: makes the expander from patterns that name folders.
        name: name of the source.
    """
    pattern = os.path.abspath(pattern)
    wildcard = None if os.path.exists(pattern) else _WILDCARD.search(pattern)
    # The root is the deepest folder above the first wildcard.
    root = os.path.dirname(pattern if wildcard is None else pattern[: wildcard.start()])
    relative = pattern[len(root) :].lstrip("/")
    regex = re.compile(re.escape(relative) if wildcard is None else translate_glob(relative))
    max_depth = None if "**" in relative else relative.count("/")
    source = FolderSource(root, make_expander((relative,)), name)
    return source.select(lambda path: regex.fullmatch(path) is not None, max_depth)
