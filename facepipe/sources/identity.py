"""Rules that read a label from where an image is: from its folder, its file name, its list, or not at all."""

import posixpath
from collections.abc import Callable
from typing import Literal

from facepipe.sources.labels import format_label

IdentityRule = Literal["auto", "folder", "filename", "label", "none"]

Identify = Callable[[str, str | None], str | None]
"""From (path relative to the source's root, label given by the source) to the identity."""


def take_folder_name(path: str) -> str | None:
    """Take the name of an image's folder: `lfw/Aaron_Eckhart/0001.jpg` -> `Aaron_Eckhart`."""
    return path.rpartition("/")[0].rstrip("/").rpartition("/")[2] or None


def take_filename_prefix(path: str) -> str | None:
    """Take the part of a file name before its last underscore: `faces/obama_1.jpg` -> `obama`; None without one."""
    stem = posixpath.splitext(posixpath.basename(path))[0]
    prefix, underscore, _ = stem.rpartition("_")
    return prefix if underscore and prefix else None


def take_only_folder_name(path: str) -> str | None:
    """Take the folder's name if the image lies exactly one folder below the root, as in LFW and CASIA trees."""
    return take_folder_name(path) if path.count("/") == 1 else None


def make_identity_rule(name: IdentityRule) -> Identify:
    """Make the function that finds identities, and writes them as `format_label` does."""
    take_label = _pick_rule(name)

    def identify(path: str, label: str | None) -> str | None:
        # The rules expect a path in normal form.
        return format_label(take_label(path if _is_normal(path) else posixpath.normpath(path), label))

    return identify


def _is_normal(path: str) -> bool:
    """Tell whether a path is certainly in normal form. It takes a fraction of the time of normalising every path."""
    # A part that begins with a dot may be `..`, or only a hidden name: both are normalised.
    return not (path.startswith((".", "/")) or path.endswith("/") or "//" in path or "/." in path)


def _pick_rule(name: IdentityRule) -> Identify:
    match name:
        case "folder":
            return lambda path, label: take_folder_name(path)
        case "filename":
            return lambda path, label: take_filename_prefix(path)
        case "label":
            return lambda path, label: label
        case "none":
            return lambda path, label: None
        case _:
            return lambda path, label: label if label is not None else take_only_folder_name(path)
