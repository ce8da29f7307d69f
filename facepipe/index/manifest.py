"""The manifest: which files make up the index. A file that it does not name is not in use; replacing it publishes.

A run may be paused anywhere, for hours, and another run may have taken the index over when it goes on. So nothing is
deleted by what a run remembers. `sweep` goes by the manifest that is in force, and by a list of files that was made
while the lease was provably held.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from facepipe import storage
from facepipe.errors import GalleryBusyError, IndexDamagedError, IndexingError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.log import sync_log
from facepipe.schema import DEFAULT_DIM
from facepipe.storage import conditional
from facepipe.storage.inside import is_inside, require_no_link
from facepipe.storage.lease import Lease
from facepipe.storage.store import Store, open_store
from facepipe.storage.uploads import UploadsUnknownError, abort_uploads

FORMAT = 1
INCOMPLETE = -1
"""Table version of an index that lost damaged shards: the next run compares every face with the table."""
FOLDER = "index"
NAME = "manifest.json"
CURVE_K = 10
"""Neighbours that the curve of every index is measured for."""
_RADIUS_RECALL = 0.99  # by default
_LAST_STEP = 0.005  # of recall, that may cost more than everything before it
_RADIUS_GROWTH = 8  # lists visited for a radius, against those for ten neighbours, if neither was measured

# A manifest that says that there is no index. It keeps the manifest of a run that was paused from being published.
_WITHDRAWN = "withdrawn"
_MAX_ATTEMPTS = 5

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
class ReplacedShard:
    """A shard that is no longer part of the index, kept for a while for searches that began before.

    Attributes:
        entry: The shard as it was.
        until: When its files may be deleted, in seconds since 1970 by the clock of the disk or store.
    """

    entry: ShardEntry
    until: float


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
class TargetPoint:
    """What a setting reaches for a target.

    Attributes:
        nprobe: Lists visited per query.
        rescore: Candidates re-scored per query.
        recall: Lower bound of the share of the true faces that are found.
    """

    nprobe: int
    rescore: int
    recall: float


@dataclass(frozen=True)
class TargetCurve:
    """What settings reach for a number of neighbours, or for a radius.

    Attributes:
        k: Neighbours per query; None for a radius.
        radius: Euclidean distance; None for neighbours.
        points: Measured settings, by rising recall.
    """

    k: int | None
    radius: float | None
    points: tuple[TargetPoint, ...]


@dataclass(frozen=True)
class ChosenSetting:
    """A setting for what is asked, and what it reaches.

    Attributes:
        nprobe: Lists visited per query.
        rescore: Candidates re-scored per query.
        recall: Lower bound of the share of the true faces that are found; None if it was not measured.
    """

    nprobe: int
    rescore: int
    recall: float | None


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
        created: Time of publication, seconds since 1970. It stays if faces are erased.
        format: Version of this format.
        replaced: Shards that are kept for searches that began before.
        lease: Id of the lease under which the manifest was published.
        targets: What settings reach for other numbers of neighbours than ten, and for radii; none in older versions.
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
    replaced: tuple[ReplacedShard, ...] = ()
    lease: str = ""
    targets: tuple[TargetCurve, ...] = ()

    @property
    def dim(self) -> int:
        """Numbers per vector."""
        return int(self.contract.get("dim", DEFAULT_DIM))

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

    def choose_target(
        self, *, k: int = CURVE_K, radius: float | None = None, recall: float | None = None
    ) -> ChosenSetting:
        """Choose the cheapest setting for a number of neighbours or a radius.

        Settings are measured for some numbers and radii. The next larger one counts, for which recall is lower. Beyond
        the largest one all lists are visited.

        Args:
            k: neighbours per query.
            radius: Euclidean distance, instead of a number of neighbours.
            recall: share of the true faces to find; by default the one that the index was built for, or more of those
                within a radius, because a radius means all.
        """
        if not self.template.lists:
            return ChosenSetting(self.nprobe, self.rescore, 1.0)
        if radius is None and k <= CURVE_K:
            return self._choose_few(k, recall)
        curve = self._find_target(k, radius)
        if curve is not None:
            goal = self.recall if recall is None else recall
            if recall is None and radius is not None:
                # Not at the price of all lists, if the last faces are lost to their codes.
                goal = max(goal, min(_RADIUS_RECALL, curve.points[-1].recall - _LAST_STEP))
            point = next((point for point in curve.points if point.recall >= goal), curve.points[-1])
            return ChosenSetting(point.nprobe, point.rescore, point.recall)
        nprobe = self.template.lists
        if not self.targets:
            # An index of an older version has one curve. Whatever this reaches is not known.
            growth = _RADIUS_GROWTH if radius is not None else (k / CURVE_K) ** 0.5
            nprobe = min(nprobe, round(growth * self.choose_setting(recall)[0]))
        return ChosenSetting(nprobe, self.rescore, None)

    def _choose_few(self, k: int, recall: float | None) -> ChosenSetting:
        """Choose the setting for up to ten neighbours by the curve."""
        nprobe, rescore = self.choose_setting(recall)
        if k == 1:
            goal = self.recall if recall is None else recall
            points = [point for point in self.curve if point.recall_at_1 >= goal]
            # The nearest face is in one of fewer lists than the ten nearest.
            if points and points[0].nprobe < nprobe:
                return ChosenSetting(points[0].nprobe, points[0].rescore, points[0].recall_at_1)
        for point in self.curve:
            if (point.nprobe, point.rescore) == (nprobe, rescore):
                return ChosenSetting(nprobe, rescore, point.recall_at_1 if k == 1 else point.recall_at_10)
        return ChosenSetting(nprobe, rescore, None)

    def _find_target(self, k: int, radius: float | None) -> TargetCurve | None:
        """Find the curve of the smallest target that is at least as large as what is asked."""
        if radius is not None:
            wider = [curve for curve in self.targets if curve.radius is not None and curve.radius >= radius]
            return min(wider, key=lambda curve: curve.radius or 0.0, default=None)
        larger = [curve for curve in self.targets if curve.k is not None and curve.k >= k]
        return min(larger, key=lambda curve: curve.k or 0, default=None)


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
    tagged = conditional.read_tagged(get_path(gallery))
    return tagged is not None and not _is_withdrawn(tagged[0])


def load(gallery: str) -> Manifest:
    """Load the published manifest.

    Raises:
        IndexingError: there is none, or it cannot be read.
        IndexDamagedError: it is damaged.
    """
    return load_tagged(gallery)[0]


def encode(manifest: Manifest) -> bytes:
    """Encode a manifest, for a reader that must find the same index again."""
    return TypeAdapter(Manifest).dump_json(manifest, indent=1)


def decode(data: bytes, path: str, gallery: str) -> Manifest:
    """Decode a manifest that `encode` encoded.

    Args:
        data: the content.
        path: where it is, for messages.
        gallery: path or URL of the gallery.

    Raises:
        IndexingError: it is damaged, or of a newer version.
    """
    return _parse(data, path, gallery)


def load_tagged(gallery: str) -> tuple[Manifest, str]:
    """Load the published manifest, and the tag by which `publish` replaces it.

    Raises:
        IndexingError: there is none, or it cannot be read.
        IndexDamagedError: it is damaged.
    """
    path = get_path(gallery)
    try:
        require_no_link(os.path.dirname(path), NAME)
        tagged = conditional.read_tagged(path)
    except StorageError as error:
        raise IndexingError(str(error)) from error
    if tagged is None:
        raise IndexingError(f"no index in {gallery!r}: `facepipe index {gallery}` builds it")
    if _is_withdrawn(tagged[0]):
        raise IndexingError(f"the index of {gallery!r} was withdrawn: `facepipe index {gallery}` builds another")
    return _parse(tagged[0], path, gallery), tagged[1]


def _parse(data: bytes, path: str, gallery: str) -> Manifest:
    try:
        manifest = TypeAdapter(Manifest).validate_json(data)
        # Names become paths: a damaged or forged manifest must not reach other folders.
        if not all(is_inside(name) and "/" not in name for name in _list_names(manifest)):
            raise ValueError("a name that leaves the index's folder")
        return manifest
    except ValueError as error:  # pydantic's errors are among them
        version = _read_values(data).get("format")
        if isinstance(version, int) and version > FORMAT:
            raise IndexingError(
                f"{path!r} is of a newer facepipe (format {version}, this one reads {FORMAT}): update facepipe, or "
                f"`facepipe index {gallery} --retrain` rebuilds it"
            ) from error
        raise IndexDamagedError(
            f"{path!r} is damaged or of another version of facepipe: `facepipe index {gallery} --retrain` rebuilds it"
        ) from error


def _read_values(data: bytes) -> dict[str, Any]:
    """Read the values of a manifest of any kind; none if it is damaged."""
    try:
        values = json.loads(data)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _is_withdrawn(data: bytes) -> bool:
    return bool(_read_values(data).get(_WITHDRAWN))


def read_tag(gallery: str) -> str | None:
    """Read the tag that tells the current manifest from any other, readable or not; None if there is none."""
    tagged = conditional.read_tagged(get_path(gallery))
    return None if tagged is None else tagged[1]


def publish(gallery: str, manifest: Manifest, replaces: str | None, lease: Lease, known: Manifest | None = None) -> str:
    """Make a manifest the current one. After this returns it survives a power cut; before it no reader sees it.

    Args:
        gallery: path or URL.
        manifest: the new one.
        replaces: tag of the manifest that it was made from.
        lease: of the index.
        known: the manifest that it was made from, if that could be read. Its files need not be uploaded.

    Returns:
        The new tag.

    Raises:
        GalleryBusyError: the manifest that it was made from is no longer the current one, or the lease is lost.
    """
    # Upload the files before the manifest names them.
    known_names = {name for name, _ in list_files(known)} if known else set()
    files = {name: file.bytes for name, file in list_files(manifest) if name not in known_names}
    store = open_index_store(gallery)
    store.upload_missing(files)
    # On a disk their names, and the version of the table, are durable before the manifest names them.
    store.sync()
    sync_log(storage.join(gallery, "faces"))
    # An upload may take hours. Whoever takes the lease over after this replaces the manifest before deleting anything.
    lease.renew()
    try:
        return _replace(gallery, _encode(manifest, lease), replaces)
    except conditional.ConflictError as error:
        raise GalleryBusyError(f"another run has published an index of {gallery!r} since this one began") from error


def _encode(manifest: Manifest, lease: Lease) -> bytes:
    return TypeAdapter(Manifest).dump_json(replace(manifest, lease=lease.id), indent=1)


def _replace(gallery: str, data: bytes, replaces: str | None) -> str:
    """Replace the manifest on the disk or in the store. Raises ConflictError if it is not the expected one."""
    tag = conditional.write_if(get_path(gallery), data, replaces)
    open_index_store(gallery).sync()
    return tag


def _list_names(manifest: Manifest) -> Iterator[str]:
    """List every name that becomes a part of a path, one by one."""
    yield manifest.template.name
    for shard in (*manifest.shards, *(old.entry for old in manifest.replaced)):
        yield shard.name
        yield from shard.files
        if shard.tombstones is not None:
            yield shard.tombstones


def withdraw(gallery: str, lease: Lease) -> None:
    """Publish that there is no index, because the manifest is damaged.

    Args:
        gallery: path or URL.
        lease: of the index.

    Raises:
        GalleryBusyError: another run publishes an index.
    """
    tag = read_tag(gallery)
    lease.renew()
    try:
        _replace(gallery, _encode_withdrawal(lease), tag)
    except conditional.ConflictError as error:
        raise GalleryBusyError(f"another run has published an index of {gallery!r} since this one began") from error


def _encode_withdrawal(lease: Lease) -> bytes:
    return json.dumps({_WITHDRAWN: True, "lease": lease.id}).encode()


def keep_replaced(draft: Manifest, previous: Manifest | None, until: float, now: float) -> Manifest:
    """Note in a draft which shards it replaces, so that their files are kept for a while.

    Args:
        draft: the manifest to be published.
        previous: the one in force.
        until: when the files of what is replaced now may be deleted.
        now: the time. What was replaced before is noted no longer if its time has passed.
    """
    if previous is None:
        return draft
    replaced = [shard for shard in previous.replaced if shard.until > now]
    if until > now:
        replaced += [ReplacedShard(entry, until) for entry in previous.shards if entry not in draft.shards]
    return replace(draft, replaced=tuple(shard for shard in replaced if shard.entry not in draft.shards))


def list_files(manifest: Manifest) -> list[tuple[str, FileDigest]]:
    """List every file of an index, by its name in the index's folder."""
    files = [(manifest.template.name, manifest.template.file)]
    for shard in manifest.shards:
        files += [(f"{shard.name}/{name}", file) for name, file in shard.files.items()]
        if shard.tombstones and shard.tombstones_file:
            files.append((shard.tombstones, shard.tombstones_file))
    return files


def list_known_files(manifest: Manifest) -> list[tuple[str, FileDigest]]:
    """List every file of an index, and of the shards that are kept for searches that began before."""
    kept = tuple(shard.entry for shard in manifest.replaced)
    return list_files(replace(manifest, shards=(*manifest.shards, *kept)))


def list_names_in_use(manifest: Manifest) -> set[str]:
    """List the names of files and folders directly in the index's folder that a search may read."""
    return {name.split("/")[0] for name, _ in list_known_files(manifest)}


def is_in_use(gallery: str, name: str) -> bool:
    """Tell whether the manifest in force names a file or folder of the index's folder.

    Raises:
        StorageError: it cannot be read.
    """
    path = get_path(gallery)
    tagged = conditional.read_tagged(path)
    if tagged is None or _is_withdrawn(tagged[0]):
        return False
    try:
        return name.split("/")[0] in list_names_in_use(_parse(tagged[0], path, gallery))
    except IndexingError:
        return True  # nothing tells


def sweep(gallery: str, lease: Lease) -> None:
    """Delete what the manifest in force does not name: leftovers of a crash, and what was replaced long enough ago.

    Only files that an index can have are deleted. The folder may lie on another disk, beside other files. Nothing is
    deleted if the manifest is damaged, because then nothing tells its files from leftovers.

    Args:
        gallery: path or URL.
        lease: of the index.

    Raises:
        GalleryBusyError: another run has taken the lease over.
    """
    store = open_index_store(gallery)
    # Otherwise a run that was killed leaves vectors that no listing shows. Not every store can be asked.
    with suppress(UploadsUnknownError):
        abort_uploads(store.url, lease, is_index_file)
    # A run that was killed may have published the manifest and not synced it. What it replaced must not go before.
    store.sync()
    # List first. The lease is renewed afterwards: so everything in the list was there before any later run began.
    listed = {name for name in store.list_names() if is_index_file(name) or is_index_file(name + "/")}
    now = lease.renew()
    if not listed:
        return
    for _ in range(_MAX_ATTEMPTS):
        # A run that held the lease before may publish once more.
        with suppress(conditional.ConflictError):
            _delete_names(store, _claim_unused(gallery, listed, now, lease), lease)
            return
        lease.renew()


def _claim_unused(gallery: str, listed: set[str], now: float, lease: Lease) -> set[str]:
    """Select the listed names that no search needs, and keep earlier runs from publishing a manifest that names them.

    A manifest replaces the one that it was made from, or is refused. So the one in force is published again, under this
    run's lease.

    Raises:
        ConflictError: another manifest was published meanwhile.
    """
    tagged = conditional.read_tagged(get_path(gallery))
    if tagged is None or _is_withdrawn(tagged[0]):
        values = _read_values(tagged[0]) if tagged else {}
        if values.get("lease") != lease.id:
            _replace(gallery, _encode_withdrawal(lease), tagged[1] if tagged else None)
        return listed
    try:
        manifest = _parse(tagged[0], get_path(gallery), gallery)
    except IndexingError:
        return set()
    current = keep_replaced(manifest, manifest, now, now)
    unused = listed - list_names_in_use(current)
    if unused and (manifest.lease != lease.id or current != manifest):
        _replace(gallery, _encode(current, lease), tagged[1])
    return unused


def delete_replaced(gallery: str, lease: Lease) -> str | None:
    """Delete the shards that are kept for searches that began before.

    Returns:
        The tag of the manifest in force; None if there is none that can be read.

    Raises:
        GalleryBusyError: another run has taken the lease over, or has published an index.
    """
    try:
        manifest, tag = load_tagged(gallery)
    except IndexingError:
        return None
    current = replace(manifest, replaced=())
    if current != manifest:
        tag = publish(gallery, current, tag, lease, known=manifest)
        unused = list_names_in_use(manifest) - list_names_in_use(current)
        _delete_names(open_index_store(gallery), unused, lease)
    return tag


def _delete_names(store: Store, names: set[str], lease: Lease) -> None:
    """Delete files and folders of the index by their names. What others have put into such a folder stays."""
    if names:
        store.delete_owned(lambda name: is_index_file(name) and name.split("/")[0] in names, lease.check)


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


def require_contract(manifest: Manifest, gallery: Gallery) -> None:
    """Require that an index holds the vectors of a gallery's model. Raises IndexingError otherwise."""
    if manifest.contract != dump_contract(gallery):
        raise IndexingError(
            f"the index of {gallery.path!r} is of {manifest.contract.get('embedder')}, and the gallery has the vectors "
            f"of {gallery.contract.embedder}: `facepipe index {gallery.path}` builds another"
        )


def dump_contract(gallery: Gallery) -> dict[str, Any]:
    """Return a gallery's contract in the manifest's form."""
    return asdict(gallery.contract)
