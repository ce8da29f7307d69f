"""Uris as paths, and back: what a move of a folder or a file changes in them."""

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pyarrow.compute as pc

from facepipe.sources.extensions import CONTAINER_PATTERN
from facepipe.sources.item import make_file_uri
from facepipe.storage import is_remote

# The uri of a member: the container, its extension, and # before the name.
_MEMBER = re.compile(rf"(.*?\.(?:{CONTAINER_PATTERN}))(#.*)", re.IGNORECASE | re.DOTALL)


def split_uri(uri: str) -> tuple[str, str]:
    """Split a uri into the path of its file, and the member in it with its `#`, which is empty for a file."""
    match = _MEMBER.fullmatch(uri)
    container, member = (match[1], match[2]) if match else (uri, "")
    if container.startswith("file://"):
        # The escapes of a file:// uri hide a `#` that belongs to its path.
        return os.fsdecode(unquote_to_bytes(container.removeprefix("file://"))), member
    return container, member


@dataclass(frozen=True)
class PathChange:
    """A folder or a file that has another path.

    Attributes:
        old: Its path or URL before.
        new: Its path or URL now.
    """

    old: str
    new: str

    def change_uri(self, uri: str) -> str | None:
        """Return the uri that an image has now; None for one that lies elsewhere."""
        path, member = split_uri(uri)
        if path != self.old and not path.startswith(f"{self.old.rstrip('/')}/"):
            return None
        changed = f"{self.new.rstrip('/')}{path[len(self.old.rstrip('/')) :]}"
        return make_file_uri(changed if is_remote(changed) else os.fsencode(changed)) + member

    def change_uris(self, uris: pa.ChunkedArray) -> pa.Array:
        """Return the uris that images have now, (n,); null for those that lie elsewhere."""
        values = pc.unique(uris)
        changed = pa.array([self.change_uri(uri) for uri in values.to_pylist()], pa.string())
        return changed.take(pc.index_in(uris, values).combine_chunks())
