"""What somebody probably meant by a name that a gallery does not hold."""

import difflib
import heapq
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow.compute as pc

from facepipe.gallery.table import Gallery

_CUTOFF = 0.6
# Names that are remembered, so that each is compared once. Beyond them some are compared again.
_MAX_SEEN = 500_000
# Names of images that are compared letter by letter; of a larger gallery only those that contain the name.
_MAX_IMAGES = 100_000
# Names in a path that are compared: the file and the folders right above it.
_SEGMENTS = 3
_SEPARATORS = re.compile(r"[\W_]+")
_WILDCARD = re.compile(r"[*?]|\[[^\]]*\]")


@dataclass(order=True, frozen=True)
class _Candidate:
    """A name, and how near it is to the one that was given.

    Attributes:
        score: 0 to 1.
        name: the name.
    """

    score: float
    name: str


@dataclass
class _Nearest:
    """The nearest of the names that it was shown.

    Attributes:
        count: how many to keep.
        kept: a heap with the farthest of them first.
    """

    count: int
    kept: list[_Candidate] = field(default_factory=list)

    @property
    def cutoff(self) -> float:
        """The score that a name has to exceed."""
        return self.kept[0].score if len(self.kept) == self.count else _CUTOFF

    def add(self, score: float, name: str) -> None:
        """Keep a name if it is among the nearest."""
        if score <= self.cutoff or any(candidate.name == name for candidate in self.kept):
            return
        heapq.heappush(self.kept, _Candidate(score, name))
        if len(self.kept) > self.count:
            heapq.heappop(self.kept)

    def list_names(self) -> list[str]:
        """List the names, the nearest first."""
        return [candidate.name for candidate in sorted(self.kept, reverse=True)]


def find_near_labels(gallery: Gallery, label: str, count: int = 3) -> list[str]:
    """Find the labels of a gallery that are nearest to one that it does not hold, the nearest first.

    Every label is read, and compared without regard to case, accents and separators.
    """
    return _find_nearest(label, _iterate_distinct(gallery, "identity"), count)


def find_near_sources(gallery: Gallery, name: str, count: int = 3) -> list[str]:
    """Find the sources of a gallery whose names are nearest to one that it does not have, the nearest first."""
    return _find_nearest(name, _iterate_distinct(gallery, "source"), count)


def find_near_images(gallery: Gallery, uri: str, count: int = 3) -> list[str]:
    """Find uris of a gallery that are nearest to a uri or a pattern that matches none, the nearest first.

    Names of files and of the folders above them are compared, without regard to case. In a large gallery those count
    that contain the name; of the rest only a part is compared.
    """
    # Of a pattern the last part without wildcards counts, which may be a folder's name.
    literal = [part for part in _WILDCARD.sub("/", uri).split("/") if _normalise(part)]
    part = literal[-1] if literal else ""
    stem = os.path.splitext(part)[0]
    wanted = _normalise(part)
    nearest = _Nearest(count)
    compared = 0
    for batch in gallery.batches(["uri"]):
        uris = pc.unique(batch["uri"])
        containing = uris.filter(pc.match_substring(uris, stem, ignore_case=True)) if stem else uris.slice(0, 0)
        # A file name that contains the whole name is nearer than any that resembles it.
        for name in containing.slice(0, count).to_pylist():
            nearest.add(1 + _compare(_normalise(uri), _normalise(name), 0), name)
        if len(nearest.kept) == count and nearest.cutoff >= 1:
            break
        rest = uris.slice(0, max(0, _MAX_IMAGES - compared)).to_pylist()
        compared += len(rest)
        for name in rest:
            segments = name.split("/")[-_SEGMENTS:]
            nearest.add(max(_compare(wanted, _normalise(segment), nearest.cutoff) for segment in segments), name)
    return nearest.list_names()


def describe_near(names: list[str]) -> str:
    """Ask whether one of some names was meant, as the end of a message; empty if there is none."""
    if not names:
        return ""
    return f": did you mean {' or '.join(repr(name) for name in names)}?"


def _find_nearest(wanted: str, names: Iterator[str], count: int) -> list[str]:
    nearest = _Nearest(count)
    normal = _normalise(wanted)
    for name in names:
        nearest.add(_compare(normal, _normalise(name), nearest.cutoff), name)
    return nearest.list_names()


def _iterate_distinct(gallery: Gallery, column: str) -> Iterator[str]:
    """Yield the values of a column; most of them once."""
    seen: set[str] = set()
    for batch in gallery.batches([column]):
        for name in pc.unique(batch[column]).to_pylist():
            if not name or name in seen:
                continue
            if len(seen) < _MAX_SEEN:
                seen.add(name)
            yield name


def _normalise(name: str) -> str:
    """Return a name without case, accents and separators, so that `abdullah_gul` is `Abdullah Gül`."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return _SEPARATORS.sub(" ", "".join(mark for mark in letters if not unicodedata.combining(mark))).strip()


def _compare(wanted: str, name: str, cutoff: float) -> float:
    """Return how near two normalised names are, from 0 to 1; 0 if they are not nearer than the cutoff."""
    if wanted == name:
        return 1.0
    # Words in another order are the same name: "Gul, Abdullah".
    if sorted(wanted.split()) == sorted(name.split()):
        return 0.99
    matcher = difflib.SequenceMatcher(None, name, wanted, autojunk=False)
    # Bounds that cost little spare most names the exact comparison.
    if matcher.real_quick_ratio() <= cutoff or matcher.quick_ratio() <= cutoff:
        return 0.0
    return matcher.ratio()
