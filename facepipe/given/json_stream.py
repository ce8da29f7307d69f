"""Read the lists of a large JSON object element by element, so that the file is never in memory as a whole."""

import json
from collections.abc import Iterator
from typing import IO, Any

_CHUNK = 1 << 20
_MAX_VALUE = 1 << 26  # characters of one value: an element of a list, or what is no list
_OF_NUMBERS = "0123456789.eE+-"
_SPACE = " \t\n\r"


class JsonStreamError(ValueError):
    """The text is no JSON, or a value of it is too large."""


def iterate_elements(file: IO[str]) -> Iterator[tuple[str, Any]]:
    """Yield (key, element) for each element of each list of a JSON object, and (key, value) for its other values.

    Raises:
        JsonStreamError: the text is no JSON object, or ends too early.
    """
    yield from _JsonStream(file).iterate()


class _JsonStream:
    """Reads an object whose values are lists."""

    def __init__(self, file: IO[str]):
        self._file = file
        self._text = ""
        self._at = 0
        self._is_ended = False
        self._decoder = json.JSONDecoder()

    def iterate(self) -> Iterator[tuple[str, Any]]:
        """Yield (key, element) for each element of each list of the object, and (key, value) for other values."""
        self._expect("{")
        if self._peek() == "}":
            return
        while True:
            key = self._read_value()
            if not isinstance(key, str):
                raise JsonStreamError("a key is no text")
            self._expect(":")
            if self._peek() == "[":
                for element in self._iterate_list():
                    yield key, element
            else:
                yield key, self._read_value()
            if self._peek() == "}":
                return
            self._expect(",")

    def _iterate_list(self) -> Iterator[Any]:
        self._expect("[")
        if self._peek() == "]":
            self._expect("]")
            return
        while True:
            yield self._read_value()
            if self._peek() == "]":
                self._expect("]")
                return
            self._expect(",")

    def _peek(self) -> str:
        """Return the next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._fill(_CHUNK):
                return ""

    def _expect(self, character: str) -> None:
        found = self._peek()
        if found != character:
            raise JsonStreamError(f"expected {character!r}, found {found or 'the end of the file'!r}")
        self._at += 1

    def _read_value(self) -> Any:
        """Read a value that lies in memory as a whole."""
        self._peek()
        wanted = _CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number may go on behind what is in memory, and of `0.5` the beginning is a number as well.
                if self._is_ended or (end < len(self._text) and self._text[end] not in _OF_NUMBERS):
                    self._at = end
                    return value
            except RecursionError as error:
                raise JsonStreamError("a value is nested too deeply") from error
            except ValueError as error:
                if self._is_ended:
                    raise JsonStreamError(str(error)) from error
            # Twice as much each time, so that a long value is not parsed too often.
            if len(self._text) - self._at > _MAX_VALUE:
                raise JsonStreamError(f"a value of more than {_MAX_VALUE >> 20} MiB")
            self._fill(wanted)
            wanted *= 2

    def _fill(self, count: int) -> bool:
        """Read more, and drop what was read before. Returns whether there was any."""
        more = self._file.read(count)
        self._is_ended = not more
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(more)
