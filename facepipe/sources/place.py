"""Where a source is, and whether an image can have come from there: a source is known by its place, not by its name."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe.sources.extensions import CONTAINER_PATTERN
from facepipe.sources.glob import split_glob, translate_pattern
from facepipe.sources.item import escape_name
from facepipe.storage import is_remote, to_absolute
from facepipe.types import Bool

# Uris of encodings that were adopted without a file: they lie nowhere.
_NOWHERE = "adopted:"
_CONTAINER = re.compile(rf".*\.(?:{CONTAINER_PATTERN})/*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class SourcePlace:
    """Where a source is.

    Attributes:
        root: Absolute path or URL of the folder, the Parquet file or the list.
        folder: Folder that its images lie in; for a list the folder that its paths are relative to.
        name: Name that the source has if the user gives it none.
        glob: Glob of the paths below the root that are listed; empty for all.
        pattern: The glob as a regular expression.
        is_open: Whether its images may lie anywhere, as those of a list may.
    """

    root: str
    folder: str
    name: str
    glob: str = ""
    pattern: str = ""
    is_open: bool = False

    def contains(self, uris: pa.Array | pa.ChunkedArray, former_roots: Iterable[str] = (), *, strict: bool) -> Bool:
        """Tell of images whether they can be of this source.

        Args:
            uris: uris of the images, (n,).
            former_roots: places where the source was before.
            strict: also for a list, only what lies in its folder.

        Returns:
            (n,).
        """
        if self.is_open and not strict:
            is_nowhere: Bool = pc.starts_with(uris, _NOWHERE).to_numpy(zero_copy_only=False)
            return ~is_nowhere
        is_inside = is_below(uris, self.folder if self.is_open else self.root)
        if self.pattern:
            is_inside = self._filter_by_pattern(uris, is_inside)
        for root in former_roots:
            is_inside |= is_below(uris, root)
        return is_inside

    def _filter_by_pattern(self, uris: pa.Array | pa.ChunkedArray, is_inside: Bool) -> Bool:
        """Keep the uris whose path below the root a glob takes; that of a member is its container's."""
        regex = re.compile(f"(?:{self.pattern})(?:#.*)?", re.DOTALL)
        start = len(self.root.rstrip("/")) + 1
        inside_uris = uris.filter(pa.array(is_inside)).to_pylist()
        # Escaped uris are rare, and are taken for inside: the glob would have to be compared with other characters.
        is_taken = [uri.startswith("file://") or regex.fullmatch(uri[start:]) is not None for uri in inside_uris]
        result = is_inside.copy()
        result[is_inside] = is_taken
        return result


def is_below(uris: pa.Array | pa.ChunkedArray, root: str) -> Bool:
    """Tell which uris are the root, below it, or members of it; (n,)."""
    result = np.zeros(len(uris), bool)
    for form in list_uri_forms(root):
        for ending in _list_endings(root):
            result |= pc.starts_with(uris, form + ending).to_numpy(zero_copy_only=False)
        result |= pc.equal(uris, form).to_numpy(zero_copy_only=False)
    return result


def match_places(roots: Sequence[str]) -> ds.Expression:
    """Build a filter for images that are, or lie in, one of some folders, prefixes or files; there is at least one."""
    conditions = []
    for root in roots:
        for form in list_uri_forms(root):
            conditions += [pc.starts_with(ds.field("uri"), form + ending) for ending in _list_endings(root)]
            conditions.append(ds.field("uri") == pa.scalar(form, pa.string()))
    combined = conditions[0]
    for condition in conditions[1:]:
        combined = combined | condition
    return combined


def _list_endings(root: str) -> tuple[str, ...]:
    """List what follows a root in the uris of images in it. Only a container has members: `a#1.jpg` is beside `a`."""
    return ("/", "#") if _CONTAINER.fullmatch(root) else ("/",)


def list_uri_forms(root: str) -> list[str]:
    """List what the uris of images at a root begin with."""
    forms = [escape_name(root.rstrip("/"))]
    if not is_remote(root):
        # Paths that are not UTF-8, or look like a member, have uris with escapes.
        forms.append("file://" + quote(os.fsencode(root.rstrip("/"))))
    return forms


def place_folder(uri: str) -> SourcePlace:
    """Locate a folder on a disk."""
    root = os.path.abspath(uri)
    return SourcePlace(root, root, os.path.basename(root) or "root")


def place_glob(uri: str) -> SourcePlace:
    """Locate the files that match a glob, or a single file, on a disk."""
    root, glob = split_glob(uri)
    return SourcePlace(root, root, os.path.basename(root) or "root", glob, translate_pattern(root, glob))


def place_prefix(url: str) -> SourcePlace:
    """Locate a prefix of an object store."""
    root = url.rstrip("/")
    return SourcePlace(root, root, url)


def place_parquet(path: str, *, is_open: bool) -> SourcePlace:
    """Locate a Parquet file, or a folder or prefix of them.

    Args:
        path: path or URL.
        is_open: whether its rows name images, which may lie anywhere, and hold none.
    """
    root = to_absolute(path).rstrip("/")
    folder = os.path.dirname(root) if root.endswith((".parquet", ".pq", ".arrow")) else root
    return SourcePlace(root, folder, os.path.basename(path.rstrip("/")), is_open=is_open)


def place_list(path: str, root: str | None) -> SourcePlace:
    """Locate a list file.

    Args:
        path: path of the list.
        root: folder that its paths are relative to; its own by default.
    """
    path = os.path.abspath(path)
    folder = os.path.dirname(path) if root is None else to_absolute(root)
    return SourcePlace(path, folder, os.path.splitext(os.path.basename(path))[0], is_open=True)


def find_spelling(root: str, known_roots: Iterable[str]) -> str | None:
    """Find the name by which a gallery knows a folder or file on a disk, if a link leads to it by another one.

    Args:
        root: absolute path.
        known_roots: roots that the gallery knows.

    Returns:
        The path that leads to the same place through a known root, its parent or its child; None if there is none.
    """
    if is_remote(root):
        return None
    real = os.path.realpath(root)
    for known in known_roots:
        if is_remote(known) or known == root or not os.path.exists(known):
            continue
        known_real = os.path.realpath(known)
        if known_real == real or is_same_folder(known, root):
            return known
        # The source is a part of a known one, or the other way round.
        if real.startswith(f"{known_real.rstrip('/')}/"):
            return _require_same(known + real[len(known_real.rstrip("/")) :], root)
        tail = known_real[len(real.rstrip("/")) :]
        if known_real.startswith(f"{real.rstrip('/')}/") and known.endswith(tail) and len(known) > len(tail):
            return _require_same(known[: -len(tail)], root)
    return None


def _require_same(path: str, root: str) -> str | None:
    """Return the path if it is another spelling of the root."""
    return path if path != root and os.path.realpath(path) == os.path.realpath(root) else None


def is_same_folder(path: str, other: str) -> bool:
    """Tell whether two paths lead to one folder. Of files this says little: a snapshot may share them by hard links."""
    try:
        return os.path.isdir(path) and os.path.samefile(path, other)
    except OSError:
        return False
