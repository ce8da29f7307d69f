"""Verification sets of insightface, such as `lfw.bin`: encoded images, two per pair, and which pairs are the same.

The file is a pickle of a list of bytes and a list of booleans. A pickle can run programs when it is loaded, so that
none is loaded here: its opcodes are read one by one, and anything but lists, bytes and booleans is refused. The images
are not kept: what matters is where in the file they are.
"""

import os
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from facepipe.errors import StorageError
from facepipe.sources.item import WorkItem, make_broken_item, make_file_uri, make_member_uri
from facepipe.storage import get_open_fingerprint, is_special_file, open_seekable

# Opcodes that hold bytes, and how many bytes of the opcode and its length stand before these.
_BYTES = {
    "BINBYTES": 5,
    "SHORT_BINBYTES": 2,
    "BINBYTES8": 9,
    # Python 2 wrote bytes as these.
    "BINSTRING": 5,
    "SHORT_BINSTRING": 2,
}
_NUMBERS = ("BININT", "BININT1", "BININT2", "INT", "LONG1")
_IGNORED = ("PROTO", "FRAME")
_MAX_MEMBERS = 50_000_000


@dataclass(frozen=True)
class ImageRange:
    """Where an image is in the file.

    Attributes:
        offset: Its first byte.
        length: Its number of bytes.
    """

    offset: int
    length: int


@dataclass(frozen=True)
class VerificationSet:
    """What a file holds.

    Attributes:
        images: Places of the images, two per pair.
        same: Whether a pair shows one person.
    """

    images: list[ImageRange]
    same: list[bool]


def name_image(position: int) -> str:
    """Name the image at a position, counted from 0."""
    return f"{position:06d}"


def list_verification_images(path: str) -> Iterator[WorkItem]:
    """Yield the items of a verification set. They have no labels: the set says of pairs only who is the same.

    Args:
        path: local path or URL of the `.bin` file.
    """
    try:
        if is_special_file(path):
            raise StorageError("not a regular file")
        with open_seekable(path) as file:
            verification_set = read_verification_set(file)
            fingerprint = get_open_fingerprint(file)
    except (StorageError, OSError) as error:
        yield make_broken_item(path, str(error))
        return
    container = make_file_uri(path)
    encoded = os.fsencode(path)
    for position, image in enumerate(verification_set.images):
        yield WorkItem(
            uri=make_member_uri(container, name_image(position)),
            path=encoded,
            offset=image.offset,
            length=image.length,
            fingerprint=f"{fingerprint}@{image.offset}",
        )


def read_verification_set(file: BinaryIO) -> VerificationSet:
    """Read where the images of an open file are, and which pairs are the same.

    Raises:
        StorageError: The file is not a verification set.
    """
    result = _PickleReader().read(file)
    match result:
        case (list() as images, list() as same) if _are_sound(images, same):
            return VerificationSet(images, [bool(value) for value in same])
    raise StorageError(
        "not a verification set: it must hold a list of images, two per pair, and a list of true and false"
    )


def _are_sound(images: list[Any], same: list[Any]) -> bool:
    return (
        len(images) == 2 * len(same)
        and all(isinstance(image, ImageRange) for image in images)
        and all(isinstance(value, bool | int) and value in (0, 1) for value in same)
    )


class _PickleReader:
    """Builds what a pickle of lists, tuples, bytes and booleans describes, with a place instead of each image."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self, file: BinaryIO) -> Any:
        """Read the pickle at the position of a file."""
        try:
            for opcode, argument, position in pickletools.genops(file):
                if opcode.name == "STOP":
                    return self._stack.pop() if len(self._stack) == 1 else None
                self._apply(opcode.name, argument, int(position or 0))
        except StorageError:
            raise
        # genops raises ValueError for what is no pickle; the rest is what a damaged one leads to.
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError, UnicodeError) as error:
            raise StorageError(f"not a verification set: {error}") from error
        return None

    def _apply(self, name: str, argument: Any, position: int) -> None:
        stack = self._stack
        if name in _BYTES:
            begin = position + _BYTES[name]
            stack.append(ImageRange(begin, len(argument)))
        elif name in _NUMBERS:
            stack.append(argument)
        elif name in ("NEWTRUE", "NEWFALSE"):
            stack.append(name == "NEWTRUE")
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "APPEND":
            value = stack.pop()
            _extend(stack[-1], [value])
        elif name == "APPENDS":
            values = self._pop_marked()
            _extend(stack[-1], values)
        elif name in ("TUPLE", "LIST"):
            values = self._pop_marked()
            stack.append(tuple(values) if name == "TUPLE" else values)
        elif name == "TUPLE2":
            second = stack.pop()
            first = stack.pop()
            stack.append((first, second))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name not in _IGNORED:
            raise StorageError(f"not a verification set: it holds more than images and booleans ({name.lower()})")

    def _pop_marked(self) -> list[Any]:
        begin = self._marks.pop()
        values = self._stack[begin:]
        del self._stack[begin:]
        return values


def _extend(target: Any, values: list[Any]) -> None:
    if not isinstance(target, list) or len(target) + len(values) > _MAX_MEMBERS:
        raise StorageError("not a verification set: a list is expected")
    target.extend(values)
