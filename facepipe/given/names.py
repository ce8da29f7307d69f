"""By which name a list and a source mean the same image: by the last parts of its path."""

import os
import unicodedata
from collections.abc import Iterator
from urllib.parse import unquote

MAX_DEPTH = 64
"""Most parts of a name in a list."""


def split_name(name: str) -> list[str]:
    """Split the name of an image, a path or a uri, into its parts. The member of a container is one more part."""
    if name.startswith("file://"):
        name = unquote(name.removeprefix("file://"))
    # A list from Windows has backslashes only; beside slashes they are part of a name.
    path = name if "/" in name else name.replace("\\", "/")
    if not path.isascii():
        path = unicodedata.normalize("NFC", path)
    return [part for part in path.replace("#", "/").split("/") if part not in ("", ".")]


def make_keys(uri: str, depths: list[int]) -> Iterator[str]:
    """Make the keys by which a list may name an image, the most certain one first.

    Args:
        uri: the image.
        depths: numbers of parts that names of the list have, falling.

    Yields:
        Twice as many keys as there are depths: the last parts of the path with and without the file's extension. A path
        of fewer parts gives empty keys, which no list has.
    """
    parts = split_name(uri)
    stem = os.path.splitext(parts[-1])[0] if parts else ""
    for depth in depths:
        if depth > len(parts):
            yield ""
            yield ""
            continue
        folders = parts[len(parts) - depth : -1]
        yield "/".join([*folders, parts[-1]])
        yield "/".join([*folders, stem])
