"""Tables of images in base64, as MS-Celeb-1M was handed out: a line per face, the person first and the image last.

The columns are Freebase id, rank, address of the image, of the page, face id, box, and the image. Lines are found
without reading the images: only where a line's last field lies is kept.
"""

import base64
import binascii
import mmap
import os
from collections.abc import Collection, Iterator

from facepipe.errors import StorageError
from facepipe.sources.identity import IdentityRule, make_identity_rule
from facepipe.sources.item import WorkItem, make_broken_item, make_file_uri, make_member_uri
from facepipe.sources.selection import PassedOver, Selection
from facepipe.storage import describe_error, get_open_fingerprint, is_remote

# What JPEG, PNG, GIF, WebP and BMP begin with, in base64.
_IMAGE_STARTS = (b"/9j/", b"iVBORw0KGgo", b"R0lGOD", b"UklGR", b"Qk0")
_SNIFFED_BYTES = 1 << 16
_MIN_FIELDS = 3
_MAX_NAME = 200  # bytes of a field in the name of an image


def is_base64_table(path: str) -> bool:
    """Say whether the first line of a file ends in an image in base64."""
    if is_remote(path):
        return False
    try:
        with open(path, "rb") as file:
            line = file.read(_SNIFFED_BYTES).partition(b"\n")[0]
    except OSError:
        return False
    fields = line.split(b"\t")
    return len(fields) >= _MIN_FIELDS and fields[-1].startswith(_IMAGE_STARTS)


class Base64Table:
    """The images of a table, one per line. An image is named by its line, its person and its face.

    Attributes:
        path: Path of the table.
        name: Name of the source.
        has_labels: Whether there is a column of labels; there is.
        other_folders: Folders beside the listed ones; none.
    """

    has_labels = True
    other_folders: Collection[str] = ()

    def __init__(self, path: str, identity: IdentityRule, name: str | None, selection: Selection):
        self.path = os.path.abspath(path)
        self.name = name or os.path.splitext(os.path.basename(path))[0]
        self._identify = make_identity_rule("label" if identity == "auto" else identity)
        self._selection = selection
        self._passed_over = PassedOver()

    @property
    def ignored(self) -> int:
        """Number of lines that source.include and source.exclude leave out. Every other line is an item."""
        return self._passed_over.total

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what was left out."""
        return self._passed_over.describe()

    def __iter__(self) -> Iterator[WorkItem]:
        self._passed_over.clear()
        try:
            with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                yield from self._list_lines(content, get_open_fingerprint(file))
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            reason = describe_error(error) if isinstance(error, OSError) else "the table is empty"
            yield make_broken_item(self.path, reason)

    def _list_lines(self, content: mmap.mmap, fingerprint: str) -> Iterator[WorkItem]:
        container = make_file_uri(self.path)
        encoded = os.fsencode(self.path)
        begin = 0
        number = 0
        while begin < len(content):
            end = content.find(b"\n", begin)
            end = len(content) if end < 0 else end
            number += 1
            # Only the fields before the image are read.
            image = content.rfind(b"\t", begin, end) + 1
            stop = end - 1 if content[end - 1 : end] == b"\r" else end
            if image <= begin or image >= stop:
                if content[begin:stop].strip():
                    yield make_broken_item(self.path, "the line holds no image", f"line{number}")
                begin = end + 1
                continue
            fields = content[begin : min(image - 1, begin + _SNIFFED_BYTES)].split(b"\t")
            person = fields[0].decode("utf-8", "backslashreplace")[:_MAX_NAME]
            face = fields[4 if len(fields) > 4 else -1].decode("utf-8", "backslashreplace")[:_MAX_NAME]
            name = f"{number}/{person}/{face}"
            reason = None if self._selection.takes_all_files else self._selection.reject_file(name)
            if reason is not None:
                self._passed_over.add(reason)
            else:
                yield WorkItem(
                    uri=make_member_uri(container, name),
                    path=encoded,
                    offset=image,
                    length=stop - image,
                    fingerprint=f"{fingerprint}@{image}",
                    identity=self._identify(name, person),
                )
            begin = end + 1


def unpack_base64(data: bytes) -> bytes:
    """Decode an image in base64.

    Raises:
        StorageError: it is not base64.
    """
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise StorageError(f"not base64: {error}") from error
