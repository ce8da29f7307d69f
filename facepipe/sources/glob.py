"""A glob on a disk: `photos/**/*.jpg`, `shards/train-*.tar`; also a path to a single file."""

import os
import re

from facepipe.sources.folder import FolderSource
from facepipe.sources.identity import IdentityRule

_WILDCARD = re.compile(r"[*?\[]")


def open_glob(pattern: str, identity: IdentityRule = "auto", name: str | None = None) -> FolderSource:
    """Open the source of every image (and tar shard) whose path matches; `**` stands for any number of folders."""
    pattern = os.path.abspath(pattern)
    wildcard = None if os.path.exists(pattern) else _WILDCARD.search(pattern)
    # The root is the deepest folder above the first wildcard.
    root = os.path.dirname(pattern if wildcard is None else pattern[: wildcard.start()])
    relative = pattern[len(root) :].lstrip("/")
    regex = re.compile(re.escape(relative) if wildcard is None else translate_glob(relative))
    max_depth = None if "**" in relative else relative.count("/")
    source = FolderSource(root, identity, name)
    return source.select(lambda path: regex.fullmatch(path) is not None, max_depth)


def translate_glob(pattern: str) -> str:
    """Translate a glob to a regular expression.

    `*` and `?` stay inside one folder, `**/` spans any number of them.
    """
    # Split the pattern into wildcards, sets in brackets, and single characters.
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL)
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(wildcards.get(token) or _translate_token(token) for token in tokens)


def _translate_token(token: str) -> str:
    """Translate a single character, or a set of characters in brackets."""
    if len(token) < 3:
        return re.escape(token)
    inside = token[1:-1].replace("\\", "\\\\")
    return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
