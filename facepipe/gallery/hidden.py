"""Images whose erasure is recorded and not yet complete. Readers leave them out from that moment on.

`erased/hidden.list` names the erasures that are going on. `erased/ID.pending` holds the images of each, and
`erased/ID.indexed` ids of faces that only the index holds. Readers look at the first, small file often. They read the
others only if it has changed.

Rows that an erasure has deleted may stay on disk for some days. A gallery that was opened before that does not know
that they are deleted. So the list also has the version of the table from which on they are: readers of older ones are
refused.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.errors import GalleryError, StorageError
from facepipe.gallery.suppressed import get_erased_folder
from facepipe.storage import conditional
from facepipe.types import Int64

PENDING = ".pending"
INDEXED = ".indexed"
_LIST = "hidden.list"
_RECEIPT = ".json"
# What a pending file holds, by the kind of its values.
URIS = "uris"
FACES = "faces"
# A reader of an object store looks for changes at most this often.
_REMOTE_POLL_SECONDS = 2.0
_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class HiddenImages:
    """The images to leave out.

    Attributes:
        uris: their uris, Arrow strings.
        faces: sorted ids of all faces that the table or the index holds of them.
    """

    uris: pa.Array
    faces: Int64

    def __bool__(self) -> bool:
        return bool(len(self.uris) or len(self.faces))

    @cached_property
    def visible(self) -> ds.Expression:
        """A filter for the rows of all other images."""
        return ~ds.field("uri").isin(self.uris)


NOTHING_HIDDEN = HiddenImages(pa.array([], pa.string()), np.empty(0, np.int64))


@dataclass(frozen=True)
class _HiddenList:
    """The list of what readers must leave out.

    Attributes:
        requests: ids of the erasures that are going on, oldest first.
        oldest_readable: the oldest version of the table that readers may read.
    """

    requests: tuple[str, ...] = ()
    oldest_readable: int = 0


class HiddenWatch:
    """Knows at any time which images of a gallery its readers must leave out."""

    def __init__(self, gallery: str):
        self._gallery = gallery
        self._tag: str | None = None
        self._images = NOTHING_HIDDEN
        self._oldest_readable = 0
        self._last_look = -_REMOTE_POLL_SECONDS
        self._is_frozen = False

    def read(self) -> HiddenImages:
        """Read the images to leave out now.

        Returns:
            The same object as before if nothing has changed.

        Raises:
            StorageError: the files cannot be read.
            GalleryError: a file is damaged.
        """
        if self._is_frozen or self._was_read_just_now():
            return self._images
        for _ in range(_MAX_ATTEMPTS):
            tagged = conditional.read_tagged(_get_list_path(self._gallery))
            tag = tagged[1] if tagged else None
            if tag == self._tag:
                break
            content = _decode(tagged[0], self._gallery) if tagged else _HiddenList()
            # A file that is gone belongs to an erasure that has just been completed: look at the list again.
            images = _read_images(self._gallery, content.requests)
            self._images = images
            self._oldest_readable = content.oldest_readable
            self._tag = tag
        return self._images

    @property
    def oldest_readable(self) -> int:
        """The oldest version of the table that readers may read, as `read` found it last."""
        return self._oldest_readable

    def freeze(self) -> None:
        """Leave out the same images from now on, so that several passes over the gallery agree."""
        self.read()
        self._is_frozen = True

    def _was_read_just_now(self) -> bool:
        if not storage.is_remote(self._gallery):
            return False
        now = time.monotonic()
        if now - self._last_look < _REMOTE_POLL_SECONDS:
            return True
        self._last_look = now
        return False


def list_requests(gallery: str) -> tuple[str, ...]:
    """List the ids of the erasures that are recorded and not complete, oldest first."""
    tagged = conditional.read_tagged(_get_list_path(gallery))
    return _decode(tagged[0], gallery).requests if tagged else ()


def list_complete(gallery: str) -> frozenset[str]:
    """List the ids of the erasures that are complete, as their receipts say."""
    names = storage.list_names(get_erased_folder(gallery))
    return frozenset(name.removesuffix(_RECEIPT) for name in names if name.endswith(_RECEIPT))


def add_request(gallery: str, request: str) -> None:
    """Have readers look at the pending file of an erasure, which is new or has changed."""
    _change_list(gallery, lambda requests: [*(name for name in requests if name != request), request])


def remove_request(gallery: str, request: str, *, oldest_readable: int = 0) -> None:
    """Tell readers that an erasure is complete. Its pending file may be deleted afterwards.

    Args:
        gallery: folder or URL of the gallery.
        request: id of the erasure.
        oldest_readable: the oldest version of the table that readers may read from now on.
    """
    if request in list_requests(gallery):
        _change_list(gallery, lambda requests: [name for name in requests if name != request], oldest_readable)


def _change_list(gallery: str, change: Callable[[tuple[str, ...]], list[str]], oldest_readable: int = 0) -> None:
    """Change the list on the condition that nobody else does so at the same time."""
    path = _get_list_path(gallery)
    for _ in range(_MAX_ATTEMPTS):
        tagged = conditional.read_tagged(path)
        current = _decode(tagged[0], gallery) if tagged else _HiddenList()
        # The random number tells readers of a change even if the names are the same.
        content = {
            "change": secrets.token_hex(8),
            "requests": change(current.requests),
            "oldest_readable": max(oldest_readable, current.oldest_readable),
        }
        storage.make_parent_folder(path)
        try:
            conditional.write_if(path, json.dumps(content).encode(), tagged[1] if tagged else None)
        except conditional.ConflictError:
            continue
        return
    raise StorageError(f"cannot write {path!r}: others keep changing it; run the same command again")


def _get_list_path(gallery: str) -> str:
    return storage.join(get_erased_folder(gallery), _LIST)


def _decode(data: bytes, gallery: str) -> _HiddenList:
    try:
        content = json.loads(data)
        requests = content["requests"]
        # Lists of older versions have no such number.
        oldest_readable = content.get("oldest_readable", 0)
        if not all(isinstance(name, str) and "/" not in name for name in requests):
            raise ValueError("not a list of ids")
        if not isinstance(oldest_readable, int):
            raise ValueError("not a version")
    except (ValueError, TypeError, KeyError) as error:
        path = _get_list_path(gallery)
        raise GalleryError(
            f"{path!r}, which says what readers must leave out, is damaged: delete it, and run `facepipe erase "
            f"{gallery} --resume`, which makes it again"
        ) from error
    return _HiddenList(tuple(requests), oldest_readable)


def _read_images(gallery: str, requests: tuple[str, ...]) -> HiddenImages:
    """Read the pending files of erasures; one that is complete by now has none."""
    folder = get_erased_folder(gallery)
    uris = [pa.array([], pa.string())]
    faces = [np.empty(0, np.int64)]
    for request in requests:
        path = storage.join(folder, request + PENDING)
        pending = conditional.read_tagged(path)
        if pending is None:
            continue
        table = parse_pending(pending[0], path)
        uris.append(select_values(table, URIS))
        faces.append(select_values(table, FACES).cast(pa.int64()).to_numpy())
        indexed = conditional.read_tagged(storage.join(folder, request + INDEXED))
        if indexed is not None:
            faces.append(np.frombuffer(indexed[0], "<i8").astype(np.int64))
    return HiddenImages(pc.unique(pa.concat_arrays(uris)), np.unique(np.concatenate(faces)))


def parse_pending(data: bytes, path: str) -> pa.Table:
    """Parse a pending file: a table of `kind` and `value`.

    Args:
        data: the content.
        path: where it is, for the message.

    Raises:
        GalleryError: the file is damaged.
    """
    try:
        return pq.read_table(pa.BufferReader(data))
    except pa.ArrowException as error:
        raise make_damage_error(path) from error


def select_values(table: pa.Table, kind: str) -> pa.Array:
    """Select the values of a kind, as texts."""
    values = table.filter(pc.equal(table["kind"], kind))["value"].combine_chunks()
    return values.chunk(0) if isinstance(values, pa.ChunkedArray) else values


def make_damage_error(path: str) -> GalleryError:
    """Make the error to raise for a damaged pending file."""
    return GalleryError(
        f"{path!r}, which lists what an unfinished erasure deletes, is damaged: delete it, and erase again"
    )
