"""From a listed file to its work items: an image is one item, an archive one item per member, anything else none."""

import os
from collections.abc import Callable, Iterable

from facepipe.sources.containers.lmdb_file import LOCK_FILE, LmdbReader
from facepipe.sources.containers.record_io import RecordReader
from facepipe.sources.containers.verification_set import list_verification_images
from facepipe.sources.containers.zip_archive import ZipReader
from facepipe.sources.extensions import (
    ARCHIVE_EXTENSIONS,
    IMAGE_EXTENSIONS,
    VERIFICATION_EXTENSION,
    get_extension,
    is_hidden,
)
from facepipe.sources.identity import IdentityRule, make_identity_rule
from facepipe.sources.item import WorkItem, make_broken_item, make_file_uri
from facepipe.sources.selection import ARCHIVE, OTHER, PassedOver, Selection, is_closed_archive
from facepipe.sources.tar import TarReader

FolderExpander = Callable[[str, bytes, str], WorkItem | None]
"""From (name, path, fingerprint) of a file to its item; None if `Expander.expand_file` has to decide."""


class Expander:
    """Turns files into items, and counts those that are neither image nor archive.

    The content decides later what a file holds. The extension only keeps text and metadata files out.

    Attributes:
        selection: Which files are listed.
        passed_over: What was not listed so far.
    """

    def __init__(
        self,
        identity: IdentityRule = "auto",
        label_column: str | None = None,
        selection: Selection | None = None,
        *,
        takes_verification_sets: bool = False,
    ):
        """Make an expander.

        Args:
            identity: where labels come from.
            label_column: key of the label in a member `KEY.json`; by default the first known one.
            selection: which files are listed; by default all but those of systems.
            takes_verification_sets: whether `.bin` files are listed, which lie beside training sets.
        """
        self.selection = selection or Selection()
        self.passed_over = PassedOver()
        self._identify = make_identity_rule(identity)
        self._tar_reader = TarReader(self._identify, label_column, self.selection, self.passed_over)
        self._zip_reader = ZipReader(self._identify, self.selection, self.passed_over)
        self._lmdb_reader = LmdbReader(self._identify, self.selection, self.passed_over)
        self._takes_verification_sets = takes_verification_sets
        self._is_shared_label = identity != "filename"  # by all files of a folder

    def expand_file(
        self, path: str | bytes, relative: str, fingerprint: str | None, is_special: bool = False
    ) -> Iterable[WorkItem]:
        """Return the items of one file.

        Args:
            path: local path or URL of the file.
            relative: its path below the source's root, with `/`.
            fingerprint: changes if the file may have changed.
            is_special: the file is a device, FIFO or socket, and must not be opened.
        """
        # Files that are neither image nor archive are counted and left out.
        extension = get_extension(relative)
        is_lock = extension == "mdb" and os.path.basename(relative) == LOCK_FILE
        if is_hidden(relative) or is_lock or not self._takes(extension):
            is_archive = is_closed_archive(relative)
            self.passed_over.add(ARCHIVE if is_archive else OTHER, relative if is_archive else "")
            return ()
        if is_special:
            return (make_broken_item(path, "not a regular file"),)
        match extension:
            case "tar" | "tar.gz" | "tgz":
                return self._tar_reader.list_items(os.fsdecode(path), relative)
            case "zip":
                return self._zip_reader.list_items(os.fsdecode(path), relative)
            case "mdb":
                return self._lmdb_reader.list_items(os.fsdecode(path), relative)
            case "rec":
                return RecordReader(self._identify).list_items(os.fsdecode(path))
            case "bin":
                return list_verification_images(os.fsdecode(path))
        encoded = path if isinstance(path, bytes) else os.fsencode(path)
        identity = self._identify(relative, None)
        return (WorkItem(make_file_uri(path), encoded, fingerprint=fingerprint, identity=identity),)

    def _takes(self, extension: str) -> bool:
        if extension == VERIFICATION_EXTENSION:
            return self._takes_verification_sets
        return extension in IMAGE_EXTENSIONS or extension in ARCHIVE_EXTENSIONS

    def reject_file(self, relative: str) -> str | None:
        """Return why patterns leave a file out; None if they do not. What is in a tar is asked for by its own name."""
        if get_extension(relative) in ARCHIVE_EXTENSIONS:
            return self.selection.reject_container(relative)
        return self.selection.reject_file(relative)

    def make_folder_expander(self, folder: bytes, relative: str) -> FolderExpander:
        """Make a faster `expand_file` for the plain images of one folder.

        Most of an image's item is the same for its whole folder: the start of the uri, and often the label. In a tree
        of millions this saves half of the time of listing.

        Args:
            folder: path of the folder.
            relative: its path below the source's root.
        """
        # Try an image's name: if its path needs no escape, plain names beside it need none either.
        probe = os.path.join(folder, b"x.jpg")
        if make_file_uri(probe).encode("utf-8", "replace") != probe:
            return lambda name, path, fingerprint: None  # the uris of this folder need escapes
        prefix = make_file_uri(probe)[: -len("x.jpg")]
        relative_prefix = f"{relative}/" if relative else ""
        identify = self._identify
        shared_label = identify(f"{relative_prefix}x.jpg", None)
        is_shared_label = self._is_shared_label

        def expand_image(name: str, path: bytes, fingerprint: str) -> WorkItem | None:
            # Names that may need an escape, or are no plain image, are left to the slower function.
            stem, _, extension = name.rpartition(".")
            if not stem or extension not in IMAGE_EXTENSIONS or stem[0] == "." or "#" in stem or not stem.isascii():
                return None
            label = shared_label if is_shared_label else identify(relative_prefix + name, None)
            return WorkItem(prefix + name, path, None, None, fingerprint, label)

        return expand_image
