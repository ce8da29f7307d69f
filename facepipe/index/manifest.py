"""The manifest: which files make up the index. What it does not name does not exist; swapping it is publication."""

import hashlib
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from facepipe import storage
from facepipe.errors import IndexingError
from facepipe.gallery import Gallery

FORMAT = 1
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


def folder_of(gallery: str) -> str:
    """Where a gallery's index lies."""
    return storage.join(gallery, "index")


def exists(gallery: str) -> bool:
    """Whether there is a published index."""
    return os.path.exists(os.path.join(folder_of(gallery), NAME))


def load(gallery: str) -> Manifest:
    """The published manifest. Raises IndexingError where there is none."""
    path = os.path.join(folder_of(gallery), NAME)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise IndexingError(f"no index in {gallery!r}: `facepipe index {gallery}` builds it") from error
    except OSError as error:
        raise IndexingError(f"cannot read {path!r}: {(error.strerror or str(error)).lower()}") from error
    try:
        return TypeAdapter(Manifest).validate_json(data)
    except ValidationError as error:
        raise IndexingError(
            f"{path!r} is damaged or of another version of facepipe: `facepipe index {gallery} --retrain` makes it anew"
        ) from error


def publish(gallery: str, manifest: Manifest) -> None:
    """Make a manifest the one in force: after this returns it survives a power cut, before it nobody sees it."""
    folder = folder_of(gallery)
    path = os.path.join(folder, NAME)
    storage.write(path + ".new", TypeAdapter(Manifest).dump_json(manifest, indent=1))
    os.replace(path + ".new", path)
    sync_folder(folder)


def sweep(gallery: str, manifest: Manifest | None) -> None:
    """Delete what the manifest does not name: leftovers of a crash, and what was replaced. Needs the index lock."""
    folder = folder_of(gallery)
    named = {NAME, ".lock"}
    if manifest:
        named |= {manifest.template.name, *(shard.name for shard in manifest.shards)}
        named |= {shard.tombstones for shard in manifest.shards if shard.tombstones}
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name in named:
            continue
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def digest(path: str) -> File:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return File(os.path.getsize(path), hashlib.file_digest(file, "sha256").hexdigest())


def sync(path: str) -> None:
    """Have a file on disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: str) -> None:
    """Have a folder's entries on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
