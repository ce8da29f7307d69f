"""A folder of a gallery as files of this machine, whether the gallery lies on a disk or in an object store.

faiss and memory maps want files. The files of a gallery on a disk are used where they are. For a gallery in an object
store this machine keeps copies: they are fetched when needed and uploaded when made.
"""

import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from facepipe.errors import StorageError
from facepipe.storage import conditional
from facepipe.storage.aliases import find_utf8_path
from facepipe.storage.atomic import replace_file, sync_folder
from facepipe.storage.cache import get_cache_folder, make_private
from facepipe.storage.error_text import describe_error
from facepipe.storage.files import delete_many, get_entry, list_files, list_prefix, read, write_file
from facepipe.storage.inside import require_no_link
from facepipe.storage.lease import LEASE_FILE, LEASE_GUARD
from facepipe.storage.owned import Owns, delete_owned
from facepipe.storage.urls import is_remote, join

# Files beside the copies: the URL that they belong to, and their fingerprints in the store.
_ORIGIN = ".origin"
_TAGS = ".tags"
# Bytes per request of a long file.
_CHUNK_BYTES = 64 << 20
# Bytes of the longest file that is uploaded by one request, on a condition.
_MAX_CONDITIONAL_BYTES = 256 << 20
PRIVATE_NAMES = frozenset({_ORIGIN, _TAGS, LEASE_FILE, LEASE_GUARD})
"""Files of a folder that are neither uploaded nor part of what it holds."""


class AlteredFileError(StorageError):
    """A file is not what was written."""


class Store(ABC):
    """A folder of a gallery.

    Attributes:
        url: Where the folder is: its path, or its URL.
        folder: Folder on this machine with the files, or with copies of them.
        is_complete: Whether `folder` holds every file without `fetch` or `pull`.
    """

    url: str
    folder: str
    is_complete: bool

    def local_path(self, name: str) -> str:
        """Return the path of a file on this machine.

        Names may come from a manifest or a bucket, which anyone may have written.

        Raises:
            StorageError: the name leads out of the folder, or a part of it is a link.
        """
        path = os.path.join(self.folder, name)
        # Compare absolute paths, so that `..` and absolute names are refused.
        if not os.path.abspath(path).startswith(os.path.abspath(self.folder) + os.sep):
            raise StorageError(f"{name!r} names no file of {self.url!r}")
        require_no_link(self.folder, name)
        return path

    @abstractmethod
    def measure(self, name: str) -> tuple[int, str]:
        """Return (bytes, SHA-256) of a file as the store holds it. Raises StorageError or OSError if it cannot."""

    @abstractmethod
    def fetch(self, name: str, size: int, sha256: str) -> None:
        """Fetch a file if this machine has no copy. Raises AlteredFileError if what arrives has another checksum."""

    @abstractmethod
    def is_missing(self, name: str) -> bool:
        """Tell whether the store holds no such file. Raises StorageError if it cannot be asked."""

    @abstractmethod
    def upload(self, names: Iterable[str]) -> None:
        """Upload files; a name of a folder stands for everything in it."""

    @abstractmethod
    def upload_missing(self, sizes: Mapping[str, int]) -> None:
        """Upload the files, by name, that the store lacks or holds with another size."""

    @abstractmethod
    def pull(self) -> None:
        """Make the copies what the store is: fetch new and changed files, delete the others."""

    @abstractmethod
    def push(self, last: str = "", before_each: Callable[[], None] = lambda: None) -> None:
        """Make the store what the copies are.

        Args:
            last: name of the file that goes last, for readers that look for it first.
            before_each: called before each file. If it raises, the rest stays as it is.

        Raises:
            ConflictError: another run has changed a file since it was pulled.
        """

    @abstractmethod
    def sync(self) -> None:
        """Have new and renamed files of the folder survive a power cut."""

    def delete_owned(self, owns: Owns, before_batch: Callable[[], None] = lambda: None) -> None:
        """Delete the files that are ours. Other files, and links, stay where they are.

        Args:
            owns: tells which files are ours, by their name in the folder.
            before_batch: called again and again before something is deleted. If it raises, the rest stays.
        """
        delete_owned(self.folder, owns, before_batch)

    def list_names(self) -> set[str]:
        """List the names of files and folders directly in the folder, here and in the store."""
        try:
            return set(os.listdir(self.folder))
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise StorageError(f"cannot list {self.folder!r}: {describe_error(error)}") from error


class LocalStore(Store):
    """A folder of a gallery on a disk: nothing is copied."""

    is_complete = True

    def __init__(self, path: str):
        self.url = path
        self.folder = path

    def measure(self, name: str) -> tuple[int, str]:
        """Return (bytes, SHA-256) of a file."""
        path = self.local_path(name)
        with open(path, "rb") as file:
            return os.path.getsize(path), hashlib.file_digest(file, "sha256").hexdigest()

    def fetch(self, name: str, size: int, sha256: str) -> None:
        """Do nothing: the files are on this machine."""

    def is_missing(self, name: str) -> bool:
        """Tell whether there is no such file."""
        try:
            os.stat(self.local_path(name))
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError as error:
            raise StorageError(f"cannot look at {name!r} in {self.url!r}: {describe_error(error)}") from error
        return False

    def upload(self, names: Iterable[str]) -> None:
        """Do nothing: the files are where they belong."""

    def upload_missing(self, sizes: Mapping[str, int]) -> None:
        """Do nothing: the files are where they belong."""

    def pull(self) -> None:
        """Do nothing: the files are on this machine."""

    def push(self, last: str = "", before_each: Callable[[], None] = lambda: None) -> None:
        """Do nothing: the files are where they belong."""

    def sync(self) -> None:
        """Have new and renamed files of the folder survive a power cut."""
        sync_folder(self.folder)


class ObjectStore(Store):
    """A folder of a gallery in an object store, with copies of its files in the cache of this machine."""

    is_complete = False

    def __init__(self, gallery: str, name: str):
        self.url = join(gallery, name)
        self._gallery = gallery
        self._prefix = self.url.rstrip("/") + "/"
        self.folder = os.path.join(get_cache_folder(gallery), name)
        self._tags: dict[str, str] | None = None
        self._make_folder()

    def _make_folder(self) -> None:
        try:
            # The cache holds face vectors: only this user may read it.
            os.makedirs(get_cache_folder(), mode=0o700, exist_ok=True)
            make_private(get_cache_folder(self._gallery))
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            Path(self.folder, _ORIGIN).write_text(self.url)
        except OSError as error:
            raise StorageError(
                f"cannot keep a copy of {self._gallery!r} in {self.folder!r} (FACEPIPE_CACHE): {describe_error(error)}"
            ) from error

    def measure(self, name: str) -> tuple[int, str]:
        """Return (bytes, SHA-256) of a file as the object store holds it."""
        url = join(self.url, name)
        size = get_entry(url).size
        digest = hashlib.sha256()
        for data in _read_chunks(url, size):
            digest.update(data)
        return size, digest.hexdigest()

    def fetch(self, name: str, size: int, sha256: str) -> None:
        """Fetch a file in chunks if this machine has no copy; refuse one that arrives damaged."""
        url = join(self.url, name)
        path = self.local_path(name)
        if os.path.exists(path):
            return
        digest = hashlib.sha256()
        # The copy gets its name only if its checksum is right.
        with replace_file(path, unique=True) as unfinished:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(unfinished, "wb") as file:
                for data in _read_chunks(url, size):
                    digest.update(data)
                    file.write(data)
            if digest.hexdigest() != sha256:
                raise AlteredFileError(f"{url!r} is not what was written: its checksum differs")

    def is_missing(self, name: str) -> bool:
        """Tell whether the object store holds no such object."""
        # A listing tells an object that is not there from a store that does not answer.
        url = join(self.url, name)
        return all(entry.url != url for entry in list_prefix(url))

    def upload(self, names: Iterable[str]) -> None:
        """Upload files; a name of a folder stands for everything in it."""
        for name in names:
            path = self.local_path(name)
            if os.path.isdir(path):
                self.upload(f"{name}/{inner}" for inner in sorted(os.listdir(path)))
            else:
                write_file(join(self.url, name), path)

    def upload_missing(self, sizes: Mapping[str, int]) -> None:
        """Upload the files, by name, that the store lacks or holds with another size."""
        stored = {entry.url.removeprefix(self._prefix): entry.size for entry in list_prefix(self._prefix)}
        self.upload(name for name, size in sizes.items() if stored.get(name) != size)

    def pull(self) -> None:
        """Fetch new and changed files, and delete the copies of the others."""
        # Fetch what is new or has another fingerprint than at the last pull.
        known_tags = self._read_tags()
        tags = {}
        for entry in list_prefix(self._prefix):
            name = entry.url.removeprefix(self._prefix)
            if name.split("/")[0] in PRIVATE_NAMES:
                continue
            path = self.local_path(name)
            tags[name] = entry.fingerprint
            if known_tags.get(name) != entry.fingerprint or not os.path.exists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                Path(path).write_bytes(read(entry.url))
        # Copies of files that have left the store go.
        for name in known_tags.keys() - tags.keys():
            with suppress(OSError):
                os.unlink(self.local_path(name))
        self._write_tags(tags)

    def push(self, last: str = "", before_each: Callable[[], None] = lambda: None) -> None:
        """Upload all files, the file `last` at the end, and delete what was pulled and is no longer here.

        Objects that others have put there since then stay.
        """
        # Without this all objects would seem to be outdated.
        if not os.path.isdir(self.folder):
            raise StorageError(f"the copies of {self.url!r} in {self.folder!r} were deleted meanwhile: run it again")
        # A new report takes the place of the folder, which then has no mark of where it belongs.
        self._make_folder()
        # Upload what is here, with the last file at the end.
        paths = (os.path.relpath(entry.url, self.folder) for entry in list_files(self.folder))
        names = sorted((path for path in paths if path not in PRIVATE_NAMES), key=lambda name: (name == last, name))
        pulled_tags = self._read_tags()
        for name in names:
            before_each()
            self._upload_if(name, pulled_tags.get(name))
        # Delete what has gone here since it was pulled, and note the fingerprints of the rest.
        local_names = set(names)
        tags = {}
        outdated = []
        for entry in list_prefix(self._prefix):
            name = entry.url.removeprefix(self._prefix)
            if name in local_names:
                tags[name] = entry.fingerprint
            elif name in pulled_tags:
                outdated.append(entry.url)
        delete_many(outdated, before_each)
        self._write_tags(tags)

    def _upload_if(self, name: str, fingerprint: str | None) -> None:
        """Upload a file if the object is still the one that was pulled, or if there was none and is none.

        This process may have been paused since, and another run may have written the object. The store cannot compare
        the tag of a long file, which is uploaded in parts.
        """
        path = self.local_path(name)
        try:
            if os.path.getsize(path) > _MAX_CONDITIONAL_BYTES:
                self.upload([name])
                return
            data = Path(path).read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read the copy {path!r}: {describe_error(error)}") from error
        tag = fingerprint.partition("-")[2] if fingerprint else None
        conditional.write_if(join(self.url, name), data, tag)

    def sync(self) -> None:
        """Do nothing: the store keeps what it has accepted."""

    def delete_owned(self, owns: Owns, before_batch: Callable[[], None] = lambda: None) -> None:
        """Delete the files that are ours on this machine and in the store."""
        super().delete_owned(owns, before_batch)
        delete_owned(self.url, owns, before_batch)

    def list_names(self) -> set[str]:
        """List the names of files and folders directly in the folder, here and in the store."""
        stored = {entry.url.removeprefix(self._prefix).split("/")[0] for entry in list_prefix(self._prefix)}
        return super().list_names() | stored

    def _read_tags(self) -> dict[str, str]:
        """Read the fingerprints that the copied files had in the store."""
        if self._tags is not None:
            return self._tags
        with suppress(OSError, ValueError):
            tags: dict[str, str] = json.loads(Path(self.folder, _TAGS).read_text())
            return tags
        return {}

    def _write_tags(self, tags: dict[str, str]) -> None:
        # A new report takes the place of the folder with the file, so they are kept here too.
        self._tags = tags
        Path(self.folder, _TAGS).write_text(json.dumps(tags))


def open_store(gallery: str, name: str) -> Store:
    """Open the folder `name` of a gallery. For a gallery in an object store its copy is made if there is none.

    Args:
        gallery: path or URL of the gallery.
        name: path of the folder in the gallery, such as `reports/dedup`.

    Raises:
        StorageError: a folder below the first one is a link. The first one may lie on another disk.
    """
    if is_remote(gallery):
        return ObjectStore(gallery, name)
    first, _, rest = name.partition("/")
    if rest:
        require_no_link(join(gallery, first), rest)
    # Libraries that open files of the folder by their path take no other.
    return LocalStore(join(find_utf8_path(gallery), name))


def delete_copies(gallery: str, name: str = "") -> None:
    """Delete this machine's copies of a gallery in an object store, or of one folder of it.

    Raises:
        StorageError: a copy cannot be deleted.
    """
    if not is_remote(gallery):
        return
    folder = os.path.join(get_cache_folder(gallery), name)
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass  # there are none
    except OSError as error:
        raise StorageError(f"cannot delete the copies of {gallery!r} in {folder!r}: {describe_error(error)}") from error


def _read_chunks(url: str, size: int) -> Iterator[bytes]:
    for start in range(0, size, _CHUNK_BYTES):
        yield read(url, start, min(_CHUNK_BYTES, size - start))
