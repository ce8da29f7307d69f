"""Names of images as pairs files write them: the end of the path, without its extension."""

import os
from collections.abc import Iterable


class ImageNames:
    """A set of names such as `Aaron_Eckhart/Aaron_Eckhart_0001`."""

    def __init__(self, names: Iterable[str]):
        self._names = frozenset(names)
        self._depths = sorted({name.count("/") + 1 for name in self._names})

    def __bool__(self) -> bool:
        return bool(self._names)

    def find_name(self, uri: str) -> str | None:
        """The name that an image goes by; None where it is none of these."""
        parts = os.path.splitext(uri.replace("#", "/"))[0].split("/")
        ends = ("/".join(parts[-depth:]) for depth in self._depths)
        return next((name for name in ends if name in self._names), None)
