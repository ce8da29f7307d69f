"""Which blocks and images were in hand when a worker died, kept as small files so that every runner can tell.

An image that kills its worker twice, once in a block and once alone, is set aside: nothing is retried for ever.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Attempts:
    """A folder of marks: a mark is there while its work is in hand, so one that is found tells of a crash."""

    def __init__(self, folder: str):
        self._folder = Path(folder)

    @contextmanager
    def block(self, number: int) -> Iterator[bool]:
        """Mark a block as in hand; yields whether it was in hand before, that is, whether a worker died on it."""
        mark = self._folder / f"block-{number}"
        crashed = mark.exists()
        self._set(mark)
        yield crashed
        for image in self._folder.glob(f"image-{number}-*"):
            image.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)

    @contextmanager
    def image(self, block: int, row: int) -> Iterator[bool]:
        """Mark one image as in hand; yields whether a worker died on it. The mark of one that crashed stays."""
        mark = self._folder / f"image-{block}-{row}"
        crashed = mark.exists()
        if not crashed:
            self._set(mark)
        yield crashed
        if not crashed:
            mark.unlink(missing_ok=True)

    def _set(self, mark: Path) -> None:
        os.makedirs(self._folder, exist_ok=True)
        mark.touch()
