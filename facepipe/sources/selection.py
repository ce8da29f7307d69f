"""Which files of a source are listed: what systems leave beside photos is passed over, and patterns choose."""

import re
import threading
from collections import Counter
from collections.abc import Iterable

from facepipe.errors import ConfigError
from facepipe.sources.extensions import ARCHIVE_EXTENSIONS, IMAGE_EXTENSIONS, get_extension
from facepipe.sources.patterns import translate_glob

# Folders of thumbnails, bins and snapshots that file servers, desktops and archivers make. All dot folders are, too.
_SYSTEM_FOLDERS = frozenset(
    {
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "@__thumb",
        "@synothumb",
        "@synoresource",
        "_gsdata_",
        "@tmp",
        "#recycle",
        "#snapshot",
        "~snapshot",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",
        "__macosx",
        "network trash folder",
        "temporary items",
    }
)
_EXAMPLES = 3

SYSTEM_FOLDER = "in folders of thumbnails, bins or snapshots"
EXCLUDED = "excluded by source.exclude"
NOT_INCLUDED = "not named by source.include"
NESTED_ARCHIVE = "archives inside archives"
ARCHIVE = "archives of kinds that are not read"
OTHER = "other files"
_ARCHIVE = re.compile(r".*\.(?:tbz2?|txz|rar|7z|tar\.(?:bz2|xz|zst|lz4))", re.IGNORECASE | re.DOTALL)


class Selection:
    """Decides which files of a source are listed.

    A pattern without `/` is compared with each folder and with the file's name; one with `/` with the path below the
    source's root. A folder that matches stands for everything in it. `*` stays inside a folder, `**` spans several.
    """

    def __init__(
        self,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        named: Iterable[str] = (),
        *,
        system_folders: bool = False,
    ):
        """Compile the patterns.

        Args:
            include: only what matches one of them is listed; everything by default.
            exclude: what matches one of them is not listed.
            named: further patterns that can name a system's folder, so that it is listed.
            system_folders: list all of them.
        """
        self._takes_system_folders = system_folders
        included = tuple(include)
        self._include = _compile(included)
        self._exclude = _compile(tuple(exclude))
        parts = {part for pattern in (*included, *named) for part in pattern.split("/")}
        # A part of wildcards alone names no folder.
        literal = [translate_glob(part) for part in sorted(parts) if part.strip("*?")]
        self._named = re.compile("|".join(literal)) if literal else None

    @property
    def takes_all_files(self) -> bool:
        """Whether no pattern is given, so that a file needs no check of its own."""
        return self._include is None and self._exclude is None

    def reject_folder(self, name: str, relative: str) -> str | None:
        """Return why a folder is not entered; None if it is.

        Args:
            name: name of the folder.
            relative: its path below the source's root.
        """
        if self.is_system_folder(name):
            return SYSTEM_FOLDER
        return EXCLUDED if self._exclude is not None and self._exclude.fullmatch(relative) else None

    def reject_file(self, relative: str, container: str = "") -> str | None:
        """Return why a file is not listed by the patterns; None if it is.

        Args:
            relative: its path below the source's root, or its name in a container.
            container: path of the tar or table that it lies in. If that is included, so is everything in it.
        """
        relative = relative.removeprefix("./")
        if self._exclude is not None and self._exclude.fullmatch(relative):
            return EXCLUDED
        is_included = self._include is None or self._include.fullmatch(relative)
        return None if is_included or (container and self.includes(container)) else NOT_INCLUDED

    def reject_container(self, relative: str) -> str | None:
        """Return why a tar or a table is not opened; None if it is, because what is in it may be included."""
        return EXCLUDED if self._exclude is not None and self._exclude.fullmatch(relative) else None

    def includes(self, relative: str) -> bool:
        """Tell whether a pattern of `include` names a path."""
        return self._include is not None and self._include.fullmatch(relative) is not None

    def reject_folders(self, relative: str) -> str | None:
        """Return why the folders of a path are not entered; None if they are."""
        is_system = any(self.is_system_folder(name) for name in relative.split("/")[:-1])
        return SYSTEM_FOLDER if is_system else None

    def is_system_folder(self, name: str) -> bool:
        """Tell whether a folder is a system's, or hidden, and no pattern names it."""
        is_hidden = name.startswith(".") and name not in (".", "..")
        if self._takes_system_folders or not (is_hidden or name.lower() in _SYSTEM_FOLDERS):
            return False
        return self._named is None or self._named.fullmatch(name) is None


def _compile(patterns: tuple[str, ...]) -> re.Pattern[str] | None:
    """Compile patterns to one expression for whole paths; None without any."""
    expressions = []
    for pattern in patterns:
        text = pattern.strip("/")
        anywhere = "" if "/" in text else "(?:.*/)?"
        expression = f"{anywhere}{translate_glob(text)}(?:/.*)?"
        try:
            re.compile(expression)
        except re.error as error:
            raise ConfigError(f"source.include and source.exclude take globs, not {pattern!r}: {error}") from error
        expressions.append(expression)
    return re.compile("|".join(expressions), re.DOTALL) if expressions else None


class PassedOver:
    """Counts what a listing passes over, by reason. Threads that list archives count at the same time.

    Attributes:
        counts: Files and folders by reason.
        folders: Folders right below the root, with images that patterns leave out; two at most.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.folders: set[str] = set()
        self._names: dict[str, list[str]] = {}
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        """Number of files and folders that were passed over."""
        return self.counts.total()

    def add(self, reason: str, name: str = "") -> None:
        """Count one.

        Args:
            reason: why it is passed over.
            name: its name, as an example for the user.
        """
        with self._lock:
            self.counts[reason] += 1
            names = self._names.setdefault(reason, [])
            if name and name not in names:
                # The first by name, so that they do not depend on the order in which threads come to them.
                names.append(name)
                names.sort()
                del names[_EXAMPLES:]

    def note_folder(self, relative: str) -> None:
        """Note the folder of an image that patterns leave out: the folders beside it are not the only ones.

        Args:
            relative: path of the image below the source's root.
        """
        if len(self.folders) < 2 and relative.count("/") == 1 and get_extension(relative) in IMAGE_EXTENSIONS:
            self.folders.add(relative.partition("/")[0])

    def clear(self) -> None:
        """Begin anew."""
        self.counts.clear()
        self.folders.clear()
        self._names.clear()

    def describe(self) -> tuple[str, ...]:
        """Describe what was passed over although it may hold images; nothing if there is nothing of the kind."""
        parts = []
        for reason, count in sorted(self.counts.items()):
            if reason == OTHER:
                continue
            names = ", ".join(map(repr, self._names[reason]))
            parts.append(f"{count} {reason}{f' ({names})' if names else ''}")
        if not parts:
            return ()
        remedy = ". To list such a folder name it in source.include" if self.counts[SYSTEM_FOLDER] else ""
        return (f"passed over: {'; '.join(parts)}{remedy}",)


def is_archive(name: str) -> bool:
    """Tell from its name whether a file is an archive, read or not."""
    return get_extension(name) in ARCHIVE_EXTENSIONS or is_closed_archive(name)


def is_closed_archive(name: str) -> bool:
    """Tell from its name whether a file is an archive that is not read."""
    return _ARCHIVE.fullmatch(name) is not None
