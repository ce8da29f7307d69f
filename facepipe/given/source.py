"""A source whose images have given faces: what a list names and what not, and the labels that it gives."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from facepipe.errors import SourceError
from facepipe.given.records import Records
from facepipe.given.table import GivenFaces
from facepipe.hashing import hash64_each
from facepipe.sources.item import SeveralLabels, Source, WorkItem, WrappedSource
from facepipe.types import Int64, UInt64

_BATCH_ITEMS = 8192
_FIRST_ITEMS = 64  # of a list that fits, one of these is mostly named
_NAMED = 3  # of what is missing


class GivenFacesSource(WrappedSource):
    """A source that compares its images with a list of faces while it is listed.

    Listing it raises SourceError in the end if the list names none of the images, or means two of them by one name.
    """

    def __init__(self, source: Source, faces: GivenFaces, *, takes_labels: bool, prefix: str, other_faces: str):
        """Wrap a source.

        Args:
            source: lists the images.
            faces: the given faces.
            takes_labels: whether the labels of the list count.
            prefix: put before each of them.
            other_faces: what becomes of images that the list does not name, as the end of a sentence.
        """
        super().__init__(source)
        self._faces = faces
        self._takes_labels = takes_labels and faces.figures.has_labels
        self._prefix = prefix
        self._other_faces = other_faces
        self._reset()

    def _reset(self) -> None:
        self._owners = np.zeros(len(self._faces.keys), np.uint64)
        self._listed = 0
        self._unnamed = 0
        self._examples: list[str] = []
        self._several = 0
        self._is_complete = False

    @property
    def gives_labels(self) -> bool:
        """Whether an image without a label has none by the source's word."""
        return self._takes_labels or self._source.gives_labels

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the listing for the user; complete at its end."""
        notes = list(self._source.notes)
        if self._takes_labels:
            # The folders' labels did not count.
            notes = [note for note in notes if not note.startswith("no image got a label")]
        return (*notes, *(self._describe_matches() if self._is_complete else ()))

    def __iter__(self) -> Iterator[WorkItem]:
        self._reset()
        items = iter(self._source)
        while batch := list(islice(items, _BATCH_ITEMS)):
            # What could not be listed is no image.
            uris = ["" if item.listing_error is not None else item.uri for item in batch]
            at = self._faces.find(uris)
            self._note_matches(uris, at)
            yield from self._label_items(batch, at) if self._takes_labels else batch
        self._is_complete = True
        if self._listed and not self._owners.any():
            raise _make_mismatch(self._faces, self._listed, self._examples)

    def _note_matches(self, uris: list[str], at: Int64) -> None:
        """Note which images the list names. Raises SourceError for a name that two images have."""
        is_image = np.array([bool(uri) for uri in uris])
        is_named = at >= 0
        self._listed += int(is_image.sum())
        self._unnamed += int((is_image & ~is_named).sum())
        for row in np.flatnonzero(is_image & ~is_named)[: _NAMED - len(self._examples)].tolist():
            self._examples.append(uris[row])
        # Of several images of one name the last one is left as the owner, which all others then notice.
        rows = np.flatnonzero(is_named)
        hashes = np.maximum(hash64_each([uris[row] for row in rows.tolist()]), 1) if len(rows) else _NO_HASHES
        before = self._owners[at[rows]]
        self._owners[at[rows]] = hashes
        clash = ((before != 0) & (before != hashes)) | (self._owners[at[rows]] != hashes)
        if clash.any():
            uri = uris[int(rows[np.flatnonzero(clash)[0]])]
            raise SourceError(
                f"{_join(self._faces.figures.lists)} means {uri!r} and another image by one name, such as 1.jpg in two "
                "folders. Name a smaller source, or write more of the paths into the list"
            )

    def _label_items(self, batch: list[WorkItem], at: Int64) -> Iterator[WorkItem]:
        """Yield the items with the labels of the list, if it names them."""
        rows = np.flatnonzero(at >= 0)
        firsts = self._faces.read_first(at[rows])["label"]
        counts = self._faces.count(at[rows])
        labels: dict[int, str | None] = {}
        for row, code, count in zip(rows.tolist(), firsts.tolist(), counts.tolist(), strict=True):
            labels[row] = self._prefix + self._faces.labels[code] if code >= 0 else None
            if count == 1:
                continue
            of_faces = find_labels(self._faces.read(int(at[row])), self._faces.labels, self._prefix)
            if len(set(of_faces)) > 1:
                self._several += 1
                labels[row] = SeveralLabels(next(filter(None, of_faces)))
        for row, item in enumerate(batch):
            yield item._replace(identity=labels[row]) if row in labels else item

    def _describe_matches(self) -> Iterator[str]:
        figures = self._faces.figures
        lists = _join(figures.lists)
        named = int((self._owners != 0).sum())
        yield f"faces are given: {lists} names {named} of {self._listed} images"
        if self._unnamed:
            yield (
                f"{self._unnamed} images are not in the list of boxes, such as {self._examples[0]!r}: "
                f"{self._other_faces}"
            )
        missing = np.flatnonzero(self._owners == 0)
        if len(missing):
            example = figures.describe_line(int(self._faces.read_first(missing[:1])["line"][0]))
            yield f"{len(missing)} images of {lists} are not in the source ({example})"
        yield from _describe_lists(figures.unusable, figures.examples, figures.repeated)
        if figures.crowds or figures.others:
            yield f"{figures.crowds} boxes of crowds and {figures.others} of other things than faces were left out"
        if self._several:
            yield (
                f"{self._several} images show several persons by the list. If the list names others later, they keep "
                "the labels that they have"
            )


def require_named(source: Source, faces: GivenFaces) -> None:
    """Require that a list of faces names an image of a source. The source is listed up to the first such image.

    Raises:
        SourceError: It names none.
    """
    listed = 0
    examples: list[str] = []
    items = iter(source)
    count = _FIRST_ITEMS
    while batch := list(islice(items, count)):
        uris = [item.uri for item in batch if item.listing_error is None]
        if (faces.find(uris) >= 0).any():
            return
        listed += len(uris)
        examples = (examples + uris)[:_NAMED]
        count = _BATCH_ITEMS
    if listed:
        raise _make_mismatch(faces, listed, examples)


def _make_mismatch(faces: GivenFaces, listed: int, examples: list[str]) -> SourceError:
    return SourceError(
        f"{_join(faces.figures.lists)} names none of the {listed} images of the source, such as "
        f"{', '.join(map(repr, examples))}: names are compared with the ends of paths"
    )


_NO_HASHES: UInt64 = np.empty(0, np.uint64)


def _describe_lists(unusable: int, examples: list[str], repeated: int) -> Iterator[str]:
    if unusable:
        yield f"{unusable} lines of boxes cannot be used ({'; '.join(examples)})"
    if repeated:
        yield f"{repeated} lines of boxes say the same as another one"


def _join(paths: list[str]) -> str:
    return ", ".join(map(repr, paths))


def find_labels(records: Records, labels: list[str], prefix: str) -> list[str | None]:
    """Find the label of each record, with a prefix."""
    return [prefix + labels[code] if code >= 0 else None for code in records["label"].tolist()]
