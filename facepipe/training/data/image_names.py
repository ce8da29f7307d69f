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
        """Find the name in this set that an image's uri ends with, or return None."""
        # Try the end of the path at each depth that a name of the set has.
        parts = os.path.splitext(uri.replace("#", "/"))[0].split("/")
        for depth in self._depths:
            name = "/".join(parts[-depth:])
            if name in self._names:
                return name
        return None
