"""Export the faces of a gallery into a new folder, all or nothing."""

import os
import secrets
import shutil
from collections.abc import Callable

from facepipe.errors import StorageError
from facepipe.exports.annotations import write_coco, write_fiftyone, write_list
from facepipe.exports.faces import ExportedFaces
from facepipe.exports.lance import write_lance
from facepipe.exports.vector_stores import write_milvus, write_pgvector, write_qdrant
from facepipe.gallery import Gallery
from facepipe.storage import describe_error, is_remote, sync_disks

_UNFINISHED = ".unfinished"
_WRITERS: dict[str, Callable[[ExportedFaces, str], None]] = {
    "list": write_list,
    "lance": write_lance,
    "coco": write_coco,
    "fiftyone": write_fiftyone,
    "milvus": write_milvus,
    "qdrant": write_qdrant,
    "pgvector": write_pgvector,
}


FORMATS = tuple(_WRITERS)
"""Names of the formats."""


def export_faces(gallery: Gallery, out: str, kind: str, where: str | None = None) -> int:
    """Export the faces of a gallery. Images whose erasure is recorded are not in it.

    Args:
        gallery: the gallery.
        out: the folder. It must not exist, or be empty.
        kind: the format, one of `FORMATS`.
        where: a filter as text; all faces by default.

    Returns:
        The number of faces.

    Raises:
        GalleryError: No face meets the filter, or somebody was erased meanwhile. Nothing is written then.
        StorageError: The folder holds something, or cannot be written.
    """
    if is_remote(out):
        raise StorageError(f"{out!r} is in an object store: export to a disk and copy it there")
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise StorageError(f"{out!r} exists and is not an empty folder: name a new one")
    faces = ExportedFaces(gallery, where)
    unfinished = f"{os.path.abspath(out)}.{secrets.token_hex(4)}{_UNFINISHED}"
    try:
        os.makedirs(os.path.dirname(unfinished), exist_ok=True)
        os.mkdir(unfinished)
        _WRITERS[kind](faces, unfinished)
        sync_disks(unfinished)
        faces.require_no_new_erasure()
        if os.path.isdir(out):
            os.rmdir(out)  # it is empty
        os.rename(unfinished, out)
    except OSError as error:
        raise StorageError(f"cannot write {out!r}: {describe_error(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return faces.count
