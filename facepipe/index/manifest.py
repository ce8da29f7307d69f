"""The manifest: which files make up the index. A file that it does not name is not in use; replacing it publishes."""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from facepipe import storage
from facepipe.errors import GalleryBusyError, IndexingError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.log import sync_log
from facepipe.storage import conditional
from facepipe.storage.inside import is_inside, require_no_link
from facepipe.storage.store import Store, open_store

FORMAT = 1
FOLDER = "index"
NAME = "manifest.json"

# Files of a shard.
INDEX = "index.faiss"
VECTORS = "vectors.npy"
IDS = "ids.npy"
ROWS = "rows.npy"
LABELS = "labels.arrow"

# Names that an index's files have: of a shard's folder, of the files in it, and of the files beside the shards. What is
# being written or fetched has one ending more.
_UNFINISHED = r"(?:(?:\.[0-9a-f]{8})?\.new)?"
_SHARD_FOLDER = re.compile(r"shard-[0-9a-f]+(?:\.partial)?")
_SHARD_FILE = re.compile("|".join(map(re.escape, (INDEX, VECTORS, IDS, ROWS, LABELS))).join(("(?:", ")")) + _UNFINISHED)
_SINGLE_FILE = re.compile(r"(?:template-[0-9a-f]+\.faiss|dead-[0-9a-f]+\.npy)" + _UNFINISHED)


@dataclass(frozen=True)
class FileDigest:
    """A file as it was written.

    Attributes:
        bytes: Size.
        sha256: Digest, in hexadecimal.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Template:
    """The trained, empty index that all shards start from.

    Attributes:
        name: File name.
        file: The file as it was written.
        factory: Factory string of faiss.
        lists: Inverted lists; 0 for an exact index.
        trained_on: Vectors of the training sample.
        vectors: Vectors in the table when it was trained.
        imbalance: Of the lists' lengths after the first build; 1 is perfect.
        seed: Of the training sample.
        chosen: Whether the factory was requested by name: no plan replaces it.
    """

    name: str
    file: FileDigest
    factory: str
    lists: int
    trained_on: int
    vectors: int
    imbalance: float
    seed: int
    chosen: bool = False


@dataclass(frozen=True)
class ShardEntry:
    """An immutable shard: a folder with the index and its side files, and a file of the ids that are deleted in it.

    Attributes:
        name: Folder name.
        vectors: Vectors in the shard, deleted ones included.
        files: Files of the folder by name.
        dead: Deleted vectors.
        tombstones: Name of the file of deleted ids, if there are any.
        tombstones_file: That file as it was written.
    """

    name: str
    vectors: int
    files: dict[str, FileDigest]
    dead: int = 0
    tombstones: str | None = None
    tombstones_file: FileDigest | None = None

    @property
    def live(self) -> int:
        """Vectors that a search can return."""
        return self.vectors - self.dead


@dataclass(frozen=True)
class RecallPoint:
    """What a setting reaches, measured on a sample of the gallery against exact search.

    Attributes:
        nprobe: Lists visited per query.
        rescore: Candidates re-scored per query.
        recall_at_1: Lower bound of the recall of the nearest face.
        recall_at_10: Lower bound of the recall of the ten nearest.
    """

    nprobe: int
    rescore: int
    recall_at_1: float
    recall_at_10: float


@dataclass(frozen=True)
class Manifest:
    """The index of one table version.

    Attributes:
        table_version: Version of the table that the index covers.
        contract: Models that the vectors were made with.
        template: The trained, empty index.
        shards: Oldest first.
        recall: Requested recall@10.
        nprobe: Lists visited per query.
        rescore: Candidates re-scored per query.
        curve: Measured settings, by rising recall.
        measured: Live vectors when the curve was measured.
        created: Time of publication, seconds since 1970.
        format: Version of this format.
    """

    table_version: int
    contract: dict[str, Any]
    template: Template
    shards: tuple[ShardEntry, ...]
    recall: float
    nprobe: int = 1
    rescore: int = 100
    curve: tuple[RecallPoint, ...] = ()
    measured: int = 0
    created: float = field(default_factory=time.time)
    format: int = FORMAT

    @property
    def live(self) -> int:
        """Vectors that a search can return."""
        return sum(shard.live for shard in self.shards)

    @property
    def deleted(self) -> int:
        """Vectors that are still in shards and in no result."""
        return sum(shard.dead for shard in self.shards)

    @property
    def total_bytes(self) -> int:
        """Size of all shards' files."""
        return sum(file.bytes for shard in self.shards for file in shard.files.values())

    def choose_setting(self, recall: float | None = None) -> tuple[int, int]:
        """Choose (nprobe, rescore) for a recall by the measured curve.

        Args:
            recall: recall@10; by default the one that the index was built for. The end of the curve if none reaches it.
        """
        if recall is None or not self.curve:
            return self.nprobe, self.rescore
        # The curve rises in cost and recall: the first point that reaches the recall is the cheapest.
        points = [point for point in self.curve if point.recall_at_10 >= recall]
        point = points[0] if points else self.curve[-1]
        return point.nprobe, point.rescore


def find_recall(manifest: Manifest, nprobe: int, rescore: int) -> float | None:
    """Find the recall@10 that was measured for a setting of the curve, a lower bound of 95 %."""
    for point in manifest.curve:
        if (point.nprobe, point.rescore) == (nprobe, rescore):
            return point.recall_at_10
    return None


def open_index_store(gallery: str) -> Store:
    """Open the folder of a gallery's index."""
    return open_store(gallery, FOLDER)


def get_path(gallery: str) -> str:
    """Return the path of the manifest in the gallery itself."""
    return storage.join(gallery, FOLDER, NAME)


def exists(gallery: str) -> bool:
    """Say whether there is a published index."""
    return conditional.read_tagged(get_path(gallery)) is not None


def load(gallery: str) -> Manifest:
    """Load the published manifest.

    Raises:
        IndexingError: there is none, or it cannot be read.
    """
    return load_tagged(gallery)[0]


def load_tagged(gallery: str) -> tuple[Manifest, str]:
    """Load the published manifest, and the tag by which `publish` replaces it.

    Raises:
        IndexingError: there is none, or it cannot be read.
    """
    path = get_path(gallery)
    try:
        require_no_link(os.path.dirname(path), NAME)
        tagged = conditional.read_tagged(path)
    except StorageError as error:
        raise IndexingError(str(error)) from error
    if tagged is None:
        raise IndexingError(f"no index in {gallery!r}: `facepipe index {gallery}` builds it")
    data, tag = tagged
    try:
        manifest = TypeAdapter(Manifest).validate_json(data)
        # Names become paths: a damaged or forged manifest must not reach other folders.
        if not all(is_inside(name) and "/" not in name for name in _list_names(manifest)):
            raise ValueError("a name that leaves the index's folder")
        return manifest, tag
    except ValueError as error:  # pydantic's errors are among them
        raise IndexingError(
            f"{path!r} is damaged or of another version of facepipe: `facepipe index {gallery} --retrain` rebuilds it"
        ) from error


def read_tag(gallery: str) -> str | None:
    """Read the tag that tells the current manifest from any other, readable or not; None if there is none."""
    tagged = conditional.read_tagged(get_path(gallery))
    return None if tagged is None else tagged[1]


def publish(gallery: str, manifest: Manifest, replaces: str | None) -> str:
    """Make a manifest the current one. After this returns it survives a power cut; before it no reader sees it.

    Args:
        gallery: path or URL.
        manifest: the new one.
        replaces: tag of the manifest that it was made from.

    Returns:
        The new tag.

    Raises:
        GalleryBusyError: the manifest that it was made from is no longer the current one.
    """
    store = open_index_store(gallery)
    # Upload the files before the manifest names them.
    store.upload_missing({name: file.bytes for name, file in list_files(manifest)})
    # On a disk their names, and the version of the table, are durable before the manifest names them.
    store.sync()
    sync_log(storage.join(gallery, "faces"))
    data = TypeAdapter(Manifest).dump_json(manifest, indent=1)
    try:
        tag = conditional.write_if(get_path(gallery), data, replaces)
    except conditional.ConflictError as error:
        raise GalleryBusyError(f"another run has published an index of {gallery!r} since this one began") from error
    return tag


def _list_names(manifest: Manifest) -> Iterator[str]:
    """List every name that becomes a part of a path, one by one."""
    yield manifest.template.name
    for shard in manifest.shards:
        yield shard.name
        yield from shard.files
        if shard.tombstones is not None:
            yield shard.tombstones


def list_files(manifest: Manifest) -> list[tuple[str, FileDigest]]:
    """List every file of an index, by its name in the index's folder."""
    files = [(manifest.template.name, manifest.template.file)]
    for shard in manifest.shards:
        files += [(f"{shard.name}/{name}", file) for name, file in shard.files.items()]
        if shard.tombstones and shard.tombstones_file:
            files.append((shard.tombstones, shard.tombstones_file))
    return files


def sweep(gallery: str, manifest: Manifest | None) -> None:
    """Delete what the manifest does not name: leftovers of a crash, and what was replaced. Needs the index lock.

    Only files that an index can have are deleted. The folder may lie on another disk, beside other files.
    """
    in_use: set[str] = set()
    if manifest:
        in_use.add(manifest.template.name)
        in_use.update(shard.name for shard in manifest.shards)
        in_use.update(shard.tombstones for shard in manifest.shards if shard.tombstones)
    store = open_index_store(gallery)
    # A run that was killed may have published the manifest and not synced it. What it replaced must not go before.
    store.sync()
    store.delete_owned(lambda name: is_index_file(name) and name.split("/")[0] not in in_use)


def is_index_file(name: str) -> bool:
    """Tell whether a file or a folder in the index's folder is of an index, by its name there.

    The manifest and the files that guard it are none: they are replaced, and never swept.
    """
    first, slash, inner = name.partition("/")
    if slash and not inner:
        return bool(_SHARD_FOLDER.fullmatch(first))
    if inner:
        return bool(_SHARD_FOLDER.fullmatch(first)) and bool(_SHARD_FILE.fullmatch(inner))
    return bool(_SINGLE_FILE.fullmatch(first))


def compute_digest(path: str) -> FileDigest:
    """Compute size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return FileDigest(os.path.getsize(path), hashlib.file_digest(file, "sha256").hexdigest())


def dump_contract(gallery: Gallery) -> dict[str, Any]:
    """Return a gallery's contract in the manifest's form."""
    return asdict(gallery.contract)


def describe_state(gallery: Gallery) -> dict[str, Any] | None:
    """Describe the index in a few figures, for people; None if there is none."""
    if not exists(gallery.path):
        return None
    try:
        manifest = load(gallery.path)
    except IndexingError as error:
        return {"problem": str(error)}
    return {
        "faces": manifest.live,
        "deleted, still in shards": manifest.deleted,
        "shards": len(manifest.shards),
        "factory": manifest.template.factory,
        "lists visited, candidates re-scored": f"{manifest.nprobe}, {manifest.rescore}",
        "table version": manifest.table_version,
        "up to date": manifest.table_version == gallery.version,
        "bytes": manifest.total_bytes,
    }
