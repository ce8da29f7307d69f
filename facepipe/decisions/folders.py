"""A folder tree that somebody sorted by hand: each folder is a person, and each file one of the gallery's images."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from facepipe import storage
from facepipe.decisions.resolve import read_faces
from facepipe.decisions.rows import WrittenRow
from facepipe.decisions.schema import IS
from facepipe.gallery.table import Gallery
from facepipe.sources.extensions import IMAGE_EXTENSIONS, get_extension, is_hidden

_CHUNK_BYTES = 1 << 20


@dataclass
class FolderMatches:
    """What the files of a tree match in the gallery.

    Attributes:
        by_content: files with the bytes of an image of the gallery.
        by_name: files with the name of one image of the gallery, and other bytes.
        unmatched: files that match no image; they are refused.
        ignored: files that are not images, or lie in no person's folder.
    """

    by_content: int = 0
    by_name: int = 0
    unmatched: int = 0
    ignored: int = 0


@dataclass
class _SortedFile:
    path: str
    place: str
    person: str
    image_id: str


@dataclass
class _Images:
    """Images of the gallery by the last part of their uri."""

    uris: dict[str, list[str]] = field(default_factory=dict)


def iterate_folder(gallery: Gallery, folder: str, matches: FolderMatches) -> Iterator[WrittenRow]:
    """Iterate over the decisions that a sorted folder stands for: each image is the person of its folder.

    An image is found by its content, or else by its file name if only one image of the gallery has it.

    Args:
        gallery: the gallery.
        folder: path or URL of the folder; the folders in it are persons, and may hold folders.
        matches: what the files match is counted there.

    Raises:
        StorageError: a file cannot be read.
    """
    files = list(_iterate_sorted_files(folder, matches))
    wanted = pa.array(sorted({file.image_id for file in files}), pa.string())
    known = set(read_faces(gallery, "image_id", wanted)["image_id"].to_pylist())
    strangers = [file for file in files if file.image_id not in known]
    images = _find_by_name(gallery, {os.path.basename(file.path) for file in strangers}) if strangers else _Images()
    for file in files:
        values: dict[str, Any] = {"decision": IS, "person": file.person}
        error = ""
        if file.image_id in known:
            matches.by_content += 1
            values["image_id"] = file.image_id
        else:
            uris = images.uris.get(os.path.basename(file.path), [])
            if len(uris) == 1:
                matches.by_name += 1
                values["uri"] = uris[0]
            else:
                matches.unmatched += 1
                error = (
                    f"{len(uris)} images of the gallery have this name, and none these bytes"
                    if uris
                    else "the gallery has no face of an image with these bytes or this name"
                )
        yield WrittenRow(file.place, None if error else values, os.path.basename(folder.rstrip("/")), error)


def _iterate_sorted_files(folder: str, matches: FolderMatches) -> Iterator[_SortedFile]:
    base = folder.rstrip("/") + "/"
    for entry in storage.list_files(folder):
        name = entry.url.removeprefix(base)
        if "/" not in name or is_hidden(name) or get_extension(name) not in IMAGE_EXTENSIONS:
            matches.ignored += 1
            continue
        yield _SortedFile(entry.url, name, name.split("/")[0], _hash_file(entry.url))


def _hash_file(path: str) -> str:
    """Compute the image id of a file, without holding it."""
    digest = hashlib.sha256()
    with storage.open_seekable(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()[:32]


def _find_by_name(gallery: Gallery, names: set[str]) -> _Images:
    """Find the images whose uri ends in one of some names."""
    wanted = pa.array(sorted(names), pa.string())
    images = _Images()
    seen: Counter[str] = Counter()
    for batch in gallery.batches(["uri"], "face_id is not null"):
        last = pc.replace_substring_regex(batch["uri"], r"^(?s:.*)[/#]", "")
        for uri in pc.unique(batch["uri"].filter(pc.is_in(last, value_set=wanted))).to_pylist():
            seen[uri] += 1
            if seen[uri] == 1:
                images.uris.setdefault(uri.replace("#", "/").rpartition("/")[2], []).append(uri)
    return images
