"""Labels that changed at the source: they go to the gallery's rows, and no image is read for them."""

import numpy as np

from facepipe.sources.item import SeveralLabels, Source, WorkItem
from facepipe.sources.number_ranges import NumberRanges
from facepipe.sources.screening import Screening, hash_labels
from facepipe.types import Bool

# Images that lost their label and wait until the source gives any label at all.
_MAX_WAITING = 1_000_000


class LabelChanges:
    """Finds known images whose label at the source is not the one that the gallery has.

    An image keeps to the source that it came from. Another source only gives a label to an image that has none. If the
    source gives no label to any image, the labels in the gallery stay, unless the user asked for no labels.

    Attributes:
        kept_count: Images that keep a label which their source does not give.
        other_count: Images to which another source gives another label.
    """

    def __init__(self, source: Source):
        self.kept_count = 0
        self.other_count = 0
        self._source = source
        self._changes: list[tuple[str, str | None]] = []
        self._waiting: list[str] = []
        self._other_numbers: NumberRanges | None = None

    @property
    def count(self) -> int:
        """Number of changes that wait to be taken."""
        return len(self._changes)

    @property
    def notes(self) -> list[str]:
        """Sentences for the user about labels that stay as they are, at the end of a listing."""
        notes = []
        kept = self.kept_count + len(self._waiting)
        if kept:
            notes.append(
                f"{kept} images have labels in the gallery, but none at the source now. They keep them; to remove them "
                "add --identity none"
            )
        numbers = self._source.label_numbers
        if numbers and self._other_numbers and numbers.overlaps(self._other_numbers):
            notes.append(
                f"the labels of {self._source.name!r} are numbers, and so are labels of other sources in this gallery. "
                f"If they number other people, add --label-prefix {self._source.name}- (if the same, --label-prefix '')"
            )
        if self.other_count:
            notes.append(
                f"{self.other_count} images have a label from another source of this gallery, and another one here. "
                "They keep the first"
            )
        return notes

    def find(self, items: list[WorkItem], screening: Screening, is_same: Bool, is_changed: Bool) -> Bool:
        """Find the images of a batch that get another label.

        Args:
            items: listed images, n of them.
            screening: what the gallery knows of them.
            is_same: which of them the gallery holds unchanged, (n,).
            is_changed: which of them the gallery holds, but have to be read again, (n,).

        Returns:
            The changed images whose new label has to wait until they are read, (n,). The other changes are kept here.
        """
        self._other_numbers = screening.other_numbers
        if screening.labels is None or screening.is_own is None or not items:
            return np.zeros(len(items), bool)
        labels = hash_labels([item.identity for item in items])
        differs = (is_same | is_changed) & (labels != screening.labels)
        # One label for an image would take the place of those of its faces.
        differs &= ~np.array([isinstance(item.identity, SeveralLabels) for item in items])
        has_label = labels != 0
        had_label = screening.labels != 0
        self.other_count += int((differs & has_label & had_label & ~screening.is_own).sum())
        # A label that is new or another one. That of a changed image is only known to be right after it was read.
        is_new = differs & has_label & (screening.is_own | ~had_label)
        for n in np.flatnonzero(is_new & is_same).tolist():
            self._changes.append((items[n].uri, items[n].identity))
        # A label that is gone, which is no label for any content.
        for n in np.flatnonzero(differs & ~has_label & screening.is_own).tolist():
            if len(self._waiting) < _MAX_WAITING:
                self._waiting.append(items[n].uri)
            else:
                self.kept_count += 1
        if self._source.gives_labels:
            self._changes += [(uri, None) for uri in self._waiting]
            self._waiting = []
        return is_new & is_changed

    def take(self, most: int) -> list[tuple[str, str | None]]:
        """Take up to so many changes: uris and their new labels."""
        taken = self._changes[:most]
        self._changes = self._changes[most:]
        return taken
