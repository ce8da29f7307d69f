"""Files that a command writes where the user says: on a disk or in an object store, whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from facepipe.errors import ConfigError, StorageError
from facepipe.storage.atomic import replace_file
from facepipe.storage.error_text import describe_error
from facepipe.storage.files import write_file
from facepipe.storage.urls import is_remote


def save_figure(figure: Any, path: str) -> None:
    """Save a picture of matplotlib on a disk or in an object store; the ending of its name says the format.

    Raises:
        StorageError: the picture cannot be written.
        ConfigError: matplotlib does not know the format.
    """
    with write_output(path, "picture") as unfinished:
        try:
            figure.savefig(unfinished, dpi=150, format=os.path.splitext(path)[1].lstrip(".") or "png")
        except ValueError as error:
            raise ConfigError(f"cannot write the picture {path!r}: {error}") from error


@contextmanager
def write_output(out: str, what: str) -> Iterator[str]:
    """Yield the path of a local file that takes the place of the output when the block ends without an error.

    Args:
        out: path or URL of the output.
        what: what it is, for messages, such as "list".

    Raises:
        StorageError: the output cannot be written.
    """
    if not is_remote(out):
        with replace_file(out, what=what) as path:
            yield path
        return
    with tempfile.TemporaryDirectory(prefix="facepipe-") as folder:
        # The ending stays, because some libraries choose the format by it.
        path = os.path.join(folder, os.path.basename(out.rstrip("/")))
        try:
            yield path
        except OSError as error:
            raise StorageError(f"cannot write the {what} {out!r}: {describe_error(error)}") from error
        write_file(out, path)
