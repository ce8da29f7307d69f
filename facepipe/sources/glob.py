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
    root, relative = split_glob(pattern)
    regex = re.compile(translate_pattern(root, relative))
    max_depth = None if "**" in relative else relative.count("/")
    source = FolderSource(root, make_expander((relative,)), name)
    return source.select(lambda path: regex.fullmatch(path) is not None, max_depth)


def split_glob(pattern: str) -> tuple[str, str]:
    """Split a glob, or the path of a single file, into the deepest folder above its first wildcard and the rest."""
    pattern = os.path.abspath(pattern)
    wildcard = None if os.path.exists(pattern) else _WILDCARD.search(pattern)
    root = os.path.dirname(pattern if wildcard is None else pattern[: wildcard.start()])
    return root, pattern[len(root) :].lstrip("/")


def translate_pattern(root: str, relative: str) -> str:
    """Translate what `split_glob` returns to a regular expression of paths below the root.

    A file whose name holds a wildcard's character is that file only.
    """
    return re.escape(relative) if os.path.exists(os.path.join(root, relative)) else translate_glob(relative)
