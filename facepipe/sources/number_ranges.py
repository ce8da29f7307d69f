"""Which numbers a set of labels uses: enough to tell whether two datasets number their people alike."""

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)


class NumberRanges:
    """The least and the greatest of the labels that are numbers, for each way to write them.

    Numbers with leading zeros are kept apart by their length, because 7 and 0007 are two labels.
    """

    def __init__(self) -> None:
        # By length, or 0 for numbers without leading zeros.
        self._ranges: dict[int, tuple[int, int]] = {}

    def add(self, labels: Iterable[str | None]) -> None:
        """Add labels; those that are not numbers are passed over."""
        for label in labels:
            # Most labels are names: the cheaper test comes first.
            if label is None or not label.isdecimal() or not _NUMBER.fullmatch(label):
                continue
            number = int(label)
            width = len(label) if label[0] == "0" and len(label) > 1 else 0
            least, greatest = self._ranges.get(width, (number, number))
            self._ranges[width] = (min(least, number), max(greatest, number))

    def overlaps(self, other: "NumberRanges") -> bool:
        """Tell whether some number lies in a range of both."""
        return any(
            least <= other._ranges[width][1] and other._ranges[width][0] <= greatest
            for width, (least, greatest) in self._ranges.items()
            if width in other._ranges
        )
