"""The manifest: which files make up the index. What it does not name does not exist; swapping it is publication."""

import hashlib
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from facepipe import storage
from facepipe.errors import GalleryBusyError, IndexingError, StorageError
from facepipe.gallery import Gallery
from facepipe.storage import conditional
from facepipe.storage.store import Store, open_store

FORMAT = 1
FOLDER = "index"
NAME = "manifest.json"
INDEX, VECTORS, IDS, ROWS, LABELS = "index.faiss", "vectors.npy", "ids.npy", "rows.npy", "labels.arrow"


@dataclass(frozen=True)
class File:
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Template:
    """The trained, empty index that all shards start from."""

    name: str
    file: File
    factory: str
    lists: int
    trained_on: int
    vectors: int  # in the table when it was trained
    imbalance: float  # of the lists' lengths after the first build; 1 is perfect
    seed: int
    chosen: bool = False  # the factory was asked for by name: no plan replaces it


@dataclass(frozen=True)
class ShardEntry:
    """An immutable shard: a folder with the index and its side files, and the file of ids that are dead in it."""

    name: str
    vectors: int
    files: dict[str, File]
    dead: int = 0
    tombstones: str | None = None
    tombstones_file: File | None = None

    @property
    def live(self) -> int:
        """Vectors that a search can return."""
        return self.vectors - self.dead


@dataclass(frozen=True)
class Point:
    """What a setting reaches, measured on a sample of the gallery against exact search."""

    nprobe: int
    rescore: int
    recall_at_1: float
    recall_at_10: float


@dataclass(frozen=True)
class Manifest:
    """The index of one table version."""

    table_version: int
    contract: dict[str, Any]
    template: Template
    shards: tuple[ShardEntry, ...]
    recall: float  # asked for
    nprobe: int = 1
    rescore: int = 100
    curve: tuple[Point, ...] = ()
    measured: int = 0  # live vectors when the curve was measured
    created: float = field(default_factory=time.time)
    format: int = FORMAT

    @property
    def live(self) -> int:
        """Vectors that a search can return."""
        return sum(shard.live for shard in self.shards)

    @property
    def dead(self) -> int:
        """Vectors that are still in shards and in no answer."""
        return sum(shard.dead for shard in self.shards)

    def setting(self, recall: float | None = None) -> tuple[int, int]:
        """(nprobe, candidates to re-score) for a recall, by the measured curve; its end where none reaches it."""
        if recall is None or not self.curve:
            return self.nprobe, self.rescore
        reached = [point for point in self.curve if point.recall_at_10 >= recall]
        point = reached[0] if reached else self.curve[-1]
        return point.nprobe, point.rescore


def measured_recall(manifest: Manifest, nprobe: int, rescore: int) -> float | None:
    """recall@10 that was measured for a setting of the curve, a lower bound of 95 %."""
    found = (point for point in manifest.curve if (point.nprobe, point.rescore) == (nprobe, rescore))
    return next((point.recall_at_10 for point in found), None)


def open_index_store(gallery: str) -> Store:
    """Open the folder of a gallery's index."""
    return open_store(gallery, FOLDER)


def path_of(gallery: str) -> str:
    """Where the manifest lies, in the gallery itself."""
    return storage.join(gallery, FOLDER, NAME)


def exists(gallery: str) -> bool:
    """Whether there is a published index."""
    return conditional.read_tagged(path_of(gallery)) is not None


def load(gallery: str) -> Manifest:
    """The published manifest. Raises IndexingError where there is none."""
    return load_tagged(gallery)[0]


def load_tagged(gallery: str) -> tuple[Manifest, str]:
    """The published manifest, and the tag that `publish` replaces it by."""
    path = path_of(gallery)
    try:
        found = conditional.read_tagged(path)
    except StorageError as error:
        raise IndexingError(str(error)) from error
    if found is None:
        raise IndexingError(f"no index in {gallery!r}: `facepipe index {gallery}` builds it")
    try:
        manifest = TypeAdapter(Manifest).validate_json(found[0])
        if any(part in ("", ".", "..") for name, _ in files_of(manifest) for part in name.split("/")[:2]):
            raise ValueError("a name that leaves the index's folder")
        return manifest, found[1]
    except ValueError as error:  # pydantic's are among them
        raise IndexingError(
            f"{path!r} is damaged or of another version of facepipe: `facepipe index {gallery} --retrain` makes it anew"
        ) from error


def tag(gallery: str) -> str | None:
    """What tells the manifest in force from any other, readable or not; None where there is none."""
    found = conditional.read_tagged(path_of(gallery))
    return found[1] if found else None


def publish(gallery: str, manifest: Manifest, replaces: str | None) -> str:
    """Make a manifest the one in force: after this returns it survives a power cut, before it nobody sees it.

    replaces: tag of the one it was made from; where that is no longer in force, GalleryBusyError is raised.
    """
    store = open_index_store(gallery)
    store.upload_missing({name: file.bytes for name, file in files_of(manifest)})
    data = TypeAdapter(Manifest).dump_json(manifest, indent=1)
    try:
        made = conditional.write_if(path_of(gallery), data, replaces)
    except conditional.ConflictError as error:
        raise GalleryBusyError(f"another run has published an index of {gallery!r} since this one began") from error
    store.sync()
    return made


def files_of(manifest: Manifest) -> list[tuple[str, File]]:
    """Every file of an index, by its name in the index's folder."""
    files = [(manifest.template.name, manifest.template.file)]
    for shard in manifest.shards:
        files += [(f"{shard.name}/{name}", file) for name, file in shard.files.items()]
        if shard.tombstones and shard.tombstones_file:
            files.append((shard.tombstones, shard.tombstones_file))
    return files


def sweep(gallery: str, manifest: Manifest | None) -> None:
    """Delete what the manifest does not name: leftovers of a crash, and what was replaced. Needs the index lock."""
    named = {NAME, f"{NAME}.guard"}
    if manifest:
        named |= {manifest.template.name, *(shard.name for shard in manifest.shards)}
        named |= {shard.tombstones for shard in manifest.shards if shard.tombstones}
    open_index_store(gallery).delete_except(named)


def digest(path: str) -> File:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return File(os.path.getsize(path), hashlib.file_digest(file, "sha256").hexdigest())


def contract_of(gallery: Gallery) -> dict[str, Any]:
    """A gallery's contract in the manifest's form."""
    return asdict(gallery.contract)


def state(gallery: Gallery) -> dict[str, Any] | None:
    """The index in a few figures, for people; None where there is none."""
    if not exists(gallery.path):
        return None
    try:
        found = load(gallery.path)
    except IndexingError as error:
        return {"problem": str(error)}
    return {
        "faces": found.live,
        "deleted, still in shards": found.dead,
        "shards": len(found.shards),
        "factory": found.template.factory,
        "lists visited, candidates re-scored": f"{found.nprobe}, {found.rescore}",
        "table version": found.table_version,
        "up to date": found.table_version == gallery.version,
        "bytes": sum(file.bytes for shard in found.shards for file in shard.files.values()),
    }
