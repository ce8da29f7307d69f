"""A glob on a disk: `photos/**/*.jpg`, `shards/train-*.tar`; also a path to a single file."""

import os
import re

from facepipe.sources.folder import FolderSource
from facepipe.sources.identity import IdentityRule

_MAGIC = re.compile(r"[*?\[]")


def open_glob(pattern: str, identity: IdentityRule = "auto", name: str | None = None) -> FolderSource:
    """Every image (and tar shard) whose path matches; `**` stands for any number of folders."""
    pattern = os.path.abspath(pattern)
    magic = None if os.path.exists(pattern) else _MAGIC.search(pattern)
    root = os.path.dirname(pattern if magic is None else pattern[: magic.start()])
    rest = pattern[len(root) :].lstrip("/")
    regex = re.compile(re.escape(rest) if magic is None else translate_glob(rest))
    source = FolderSource(root, identity, name)
    return source.only(
        lambda relative: regex.fullmatch(relative) is not None, None if "**" in rest else rest.count("/")
    )


def translate_glob(pattern: str) -> str:
    """A regular expression for a glob: `*` and `?` stay inside one folder, `**/` spans any number of them."""
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(special.get(token) or _literal_or_set(token) for token in tokens)


def _literal_or_set(token: str) -> str:
    if len(token) < 3:
        return re.escape(token)
    inside = token[1:-1].replace("\\", "\\\\")
    return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
