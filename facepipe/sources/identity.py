"""Rules that read a label from where an image is: from its folder, its file name, its list, or not at all."""

import posixpath
from collections.abc import Callable
from typing import Literal
from urllib.parse import unquote

from facepipe.sources.item import FolderLabel, NestedFolderLabel
from facepipe.sources.labels import LABEL_COLUMNS, format_label

IdentityRule = Literal["auto", "folder", "filename", "label", "none"]

Identify = Callable[[str, object], str | None]
"""From (path relative to the source's root, label given by the source) to the identity."""

# Folders deeper than this hold no persons: `BUPT/images/race_per_7000/African/m.0107_f` is as deep as they are known.
_MAX_LEVELS = 6
# What Hive writes into a path for a column without a value.
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def take_folder_name(path: str) -> str | None:
    """Take the name of an image's folder: `lfw/Aaron_Eckhart/0001.jpg` -> `Aaron_Eckhart`."""
    return path.rpartition("/")[0].rstrip("/").rpartition("/")[2] or None


def take_filename_prefix(path: str) -> str | None:
    """Take the part of a file name before its last underscore: `faces/obama_1.jpg` -> `obama`; None without one."""
    stem = posixpath.splitext(posixpath.basename(path))[0]
    prefix, underscore, _ = stem.rpartition("_")
    return prefix if underscore and prefix else None


def read_partitions(path: str) -> dict[str, str | None]:
    """Read the columns that Hive's layout writes into the folders of a path: `identity=ann/part-0.parquet`."""
    columns: dict[str, str | None] = {}
    for part in path.split("/")[:-1]:
        name, equals, value = part.partition("=")
        if equals and name:
            columns[unquote(name)] = None if value == _HIVE_NULL else unquote(value)
    return columns


def make_identity_rule(name: IdentityRule) -> Identify:
    """Make the function that finds identities, and writes them as `format_label` does.

    With `auto` the name of a folder comes as it is, as a `FolderLabel`.
    """
    take_label = _pick_rule(name)

    def identify(path: str, label: object) -> str | None:
        # The rules expect a path in normal form.
        return take_label(path if _is_normal(path) else posixpath.normpath(path), label)

    return identify


def _is_normal(path: str) -> bool:
    """Tell whether a path is certainly in normal form. It takes a fraction of the time of normalising every path."""
    # A part that begins with a dot may be `..`, or only a hidden name: both are normalised.
    return not (path.startswith((".", "/")) or path.endswith("/") or "//" in path or "/." in path)


def _pick_rule(name: IdentityRule) -> Identify:
    match name:
        case "folder":
            return _identify_by_folder
        case "filename":
            return lambda path, label: format_label(take_filename_prefix(path))
        case "label":
            return lambda path, label: format_label(label)
        case "none":
            return lambda path, label: None
        case _:
            return _identify


def _identify_by_folder(path: str, label: object) -> str | None:
    folder = take_folder_name(path)
    name, equals, value = (folder or "").partition("=")
    if equals and name.lower() in LABEL_COLUMNS:
        return format_label(None if value == _HIVE_NULL else unquote(value))
    return format_label(folder)


def _identify(path: str, label: object) -> str | None:
    """Find a label by the rule `auto`: one beside the image, a partition of labels, or the folder's name."""
    if label is not None:
        return format_label(label)
    if "=" in path:
        partitions = read_partitions(path)
        column = next((name for name in partitions if name.lower() in LABEL_COLUMNS), None)
        if column is not None:
            return format_label(partitions[column])
        if partitions:
            return None
    parents, _, folder = path.rpartition("/")[0].rpartition("/")
    levels = path.count("/")
    if levels == 1:
        return FolderLabel(folder)
    parents = parents.strip("/")
    return NestedFolderLabel(folder, parents) if parents and levels <= _MAX_LEVELS else None
