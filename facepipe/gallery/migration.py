"""A gallery on its way to another model: a second gallery in its folder, which becomes the gallery in one commit.

GALLERY/migration is a gallery of its own, with the same images and faces and the vectors of the other model. It can be
indexed and searched until it takes the place of the first one. An image of it is up to date if it has the content, the
label and the place that it has in the first gallery.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.gallery.changes import PartialGallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.log import LOG
from facepipe.gallery.commits.parts import compute_statistics
from facepipe.gallery.commits.rewrite import (
    REWRITE,
    Action,
    MarkImages,
    make_add_action,
    make_remove_action,
    read_rows,
    write_rows,
)
from facepipe.gallery.contract import CONTRACT_PROPERTY
from facepipe.gallery.file_counts import count_images
from facepipe.gallery.table import Gallery
from facepipe.hashing import hash64_column
from facepipe.schema import FACES, READ_ERROR
from facepipe.storage.hashtable import HashTable
from facepipe.storage.lease import LEASE_FILE, LEASE_GUARD, is_held
from facepipe.types import Bool, UInt64

FOLDER = "migration"
"""Folder of the second gallery in that of the first."""
JOB = "migrate"
"""Job of the commits."""

# What an image is known by. What differs makes it stale.
_STATE_COLUMNS = (
    "uri",
    "image_id",
    "fingerprint",
    "status",
    "identity",
    "source",
    "missing_since",
    "former_uris",
    "ingested_at",
)
_FAILED = "migrate:"  # how `failed_with` of an image begins whose faces could not be embedded again
_OWN_PREFIXES = ("faces/part-", "faces/_delta_log/", "index/", "reports/", "runs/", "erased/")
_DROPPED = "faces.dropped"  # the table of a second gallery that is being deleted
_ROWS = 65536
_UNIT_SEPARATOR = "\x1f"


def locate_migration(gallery: str) -> str:
    """Return the path or URL of the second gallery."""
    return storage.join(gallery, FOLDER)


@dataclass(frozen=True)
class ImageStates:
    """What n images are known by.

    Attributes:
        uris: Their uris.
        keys: Hashes of the uris, (n,).
        states: Hashes of everything that an up-to-date copy has in common, (n,).
        failed: Whether each image could not be embedded again, (n,).
    """

    uris: pa.Array
    keys: UInt64
    states: UInt64
    failed: Bool


def read_states(rows: pa.Table) -> ImageStates:
    """Read the states of the images of some rows, one per image."""
    first = rows.filter(pc.fill_null(pc.equal(rows["face_index"], 0), True))
    columns = [_to_text(first[name]) for name in _STATE_COLUMNS]
    joined = pc.binary_join_element_wise(*columns, _UNIT_SEPARATOR, null_handling="replace", null_replacement="\x00")
    states = hash64_column(joined)
    # An image that could not be embedded again has other rows, and says what it stands for.
    marks = pc.fill_null(first["failed_with"], "")
    is_failed = pc.starts_with(marks, _FAILED).to_numpy(zero_copy_only=False)
    if is_failed.any():
        texts = marks.filter(pa.array(is_failed)).to_pylist()
        states = states.copy()
        states[is_failed] = [int(text.removeprefix(_FAILED), 16) for text in texts]
    uris = first["uri"].combine_chunks()
    return ImageStates(uris, hash64_column(uris), states, np.asarray(is_failed, bool))


def _to_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_list(column.type):
        texts = [None if uris is None else _UNIT_SEPARATOR.join(map(str, uris)) for uris in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    return column.cast(pa.string())


def iterate_states(gallery: Gallery) -> Iterator[ImageStates]:
    """Yield the states of a gallery's images, a batch at a time. Images that are being erased are left out."""
    for batch in gallery.batches([*_STATE_COLUMNS, "face_index", "failed_with"], rows=_ROWS):
        yield read_states(pa.Table.from_batches([batch]))


class MigrationProgress:
    """Which images of a gallery its second gallery has, up to date. Call `close` when done."""

    def __init__(self, second: Gallery, *, retries: bool = False):
        """Read the second gallery.

        Args:
            second: the second gallery.
            retries: whether images that could not be embedded again count as stale.
        """
        self._known = HashTable(width=1)
        for images in iterate_states(second):
            states = np.where(images.failed, ~images.states, images.states) if retries else images.states
            self._known.add(images.keys, states[:, None])

    def close(self) -> None:
        """Delete the temporary file."""
        self._known.close()

    def find_pending(self, images: ImageStates) -> Bool:
        """Tell which images (n,) are missing or stale."""
        is_known, states = self._known.get(images.keys)
        return np.asarray(~is_known | (states[:, 0] != images.states), bool)

    def find_known(self, images: ImageStates) -> Bool:
        """Tell of which images (n,) the second gallery has rows, also stale ones."""
        return self._known.get(images.keys)[0]


def count_pending(first: Gallery, second: Gallery) -> int:
    """Count the images of the first gallery that the second one lacks, or has in an older state."""
    with closing(MigrationProgress(second)) as progress:
        return sum(int(progress.find_pending(images).sum()) for images in iterate_states(first))


def describe_migration(gallery: Gallery) -> dict[str, Any]:
    """Describe the migration of a gallery that is under way; empty if there is none.

    The images that the second gallery has are counted, not compared: the next run finds those that changed since.
    """
    path = locate_migration(gallery.path)
    if not Gallery.exists(path):
        return {}
    second = Gallery(path)
    images = count_images(second)["images"]
    total = count_images(gallery)["images"]
    command = f"facepipe migrate {gallery.path}"
    if is_held(path):
        state = "a run writes to it"
    elif images < total:
        state = f"stopped: `{command} --embedder {second.contract.embedder}` resumes it"
    else:
        state = f"waits for `{command} --switch`"
    return {
        "embedder": second.contract.embedder,
        "dim": second.dim,
        "images": images,
        "of": total,
        "state": state,
        "path": path,
    }


def list_surplus(first: Gallery, second: Gallery) -> list[str]:
    """List the images of the second gallery that the first one has no more, or is erasing."""
    with closing(MigrationProgress(first)) as known:
        parts = [images.uris.filter(pa.array(~known.find_known(images))) for images in iterate_states(second)]
    return [uri for part in parts for uri in part.to_pylist()]


def iterate_files(gallery: Gallery) -> Iterator[Gallery]:
    """Yield a gallery once per file of its table, with the images of that file only."""
    for file in sorted(gallery.files(), key=lambda file: (file["min.uri"] or "", file["path"])):
        yield PartialGallery(gallery, [file["path"]])


def make_failed_row(row: dict[str, object], state: int, error: str) -> dict[str, object]:
    """Make the row of an image whose faces could not be embedded again, from the first of its rows."""
    kept = ("uri", "source", "identity", "ingested_at", "missing_since", "former_uris")
    blank: dict[str, object] = dict.fromkeys(FACES.names)
    # Without a fingerprint a later `embed` reads the image again.
    return {
        **blank,
        **{name: row[name] for name in kept},
        "status": READ_ERROR,
        "error": error,
        "failed_with": f"{_FAILED}{state:016x}",
    }


def count_failed(second: Gallery) -> int:
    """Count the images of the second gallery whose faces could not be embedded again."""
    rows = second.batches(["failed_with"], "failed_with is not null", rows=_ROWS)
    return sum(pc.sum(pc.starts_with(batch["failed_with"], _FAILED)).as_py() or 0 for batch in rows)


def commit_switch(first: Gallery, second: Gallery, commit: Committer) -> None:
    """Make the second gallery's files those of the first one, with its contract, in one commit.

    The older version's files stay where they are until they are vacuumed.

    Args:
        first: the gallery, under its lease.
        second: the second gallery, under its lease.
        commit: of the first gallery.
    """
    # The files have their place before the commit names them. One that is there is of a run that was killed.
    added: list[Action] = []
    for file in second.files():
        if file["path"] in second.deleted_rows:
            added.append(write_rows(first, read_rows(second, file["path"]), REWRITE, data_change=True)[0])
            continue
        _bring_file(second, first, file["path"])
        stats = compute_statistics(read_rows(second, file["path"]))
        added.append(make_add_action(file["path"], file["size_bytes"], stats))
    if len(second.marks):
        added.append(MarkImages(second.marks.images))

    def make_actions() -> list[Action]:
        removed = [make_remove_action(file["path"]) for file in Gallery(first.path).files()]
        return [*removed, *added]

    commit.commit_actions(make_actions, {"job": JOB}, {CONTRACT_PROPERTY: second.contract.to_json()})


def _bring_file(source: Gallery, target: Gallery, name: str) -> None:
    """Put a file of one table into the folder of another, by a link if the disk can."""
    old = storage.join(source.faces_folder, name)
    new = storage.join(target.faces_folder, name)
    if storage.is_remote(new):
        storage.write(new, storage.read(old))
        return
    try:
        os.unlink(new)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"cannot replace {new!r}: {storage.describe_error(error)}") from error
    try:
        os.link(old, new)
    except OSError:  # a disk without links
        storage.write(new, storage.read(old))


def delete_migration(gallery: str) -> None:
    """Delete the second gallery, after it has become the first one. Folders that it did not make stay."""
    path = locate_migration(gallery)
    if storage.is_remote(path):
        # Without its log the folder is no gallery any more, whatever stops the rest.
        log_folder = storage.join(path, "faces", LOG)
        storage.delete_many(entry.url for entry in storage.list_files(log_folder))
    else:
        os.rename(os.path.join(path, "faces"), os.path.join(path, _DROPPED))
    delete_leftovers(gallery)


def delete_leftovers(gallery: str) -> bool:
    """Delete what is left of a second gallery that was being deleted; tell whether there was something."""
    path = locate_migration(gallery)
    if Gallery.exists(path):
        return False
    if storage.is_remote(path):
        start = len(path.rstrip("/")) + 1
        left = [entry.url for entry in storage.list_files(path) if entry.url[start:].startswith(_OWN_PREFIXES)]
        storage.delete_many(left)
        # The lease goes with what it was for, unless another run has it by now.
        if left and not is_held(path):
            storage.delete(storage.join(path, LEASE_FILE))
        return bool(left)
    if not os.path.isdir(os.path.join(path, _DROPPED)) or os.path.islink(path):
        return False
    # The table goes last, because it marks the others as left over.
    for name in ("index", "reports", "runs", "erased", _DROPPED):
        part = os.path.join(path, name)
        if os.path.isdir(part) and not os.path.islink(part):
            shutil.rmtree(part)
    # The folder goes with the files of its lease, unless others have put something there.
    for name in (LEASE_FILE, LEASE_GUARD):
        with suppress(OSError):
            os.unlink(os.path.join(path, name))
    with suppress(OSError):
        os.rmdir(path)
    return True
