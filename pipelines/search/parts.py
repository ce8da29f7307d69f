"""Parts of a search on disk: one Parquet file per block of queries, and the search that they belong to."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.errors import ConfigError, IndexingError, IndexReplacedError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.hidden import list_complete
from facepipe.gallery.table import FOLDERS
from facepipe.index import manifest as manifests
from facepipe.index.answers import ANSWERS, OLD_NAMES, SearchCounts, SearchOptions, answer_queries
from facepipe.index.manifest import Manifest
from facepipe.index.queries import Queries, QueryBlock, QuerySource, read_block
from facepipe.index.search import Index
from facepipe.index.shard_set import ShardSet
from facepipe.sources.parquet import list_parquet_files
from facepipe.storage import (
    describe_error,
    file_exists,
    is_remote,
    join,
    list_names,
    make_folders,
    open_seekable,
    read,
    replace,
    replace_file,
    sync_folder,
)
from facepipe.storage.atomic import UNFINISHED, publish_file
from facepipe.storage.lease import LEASE_FILE, LEASE_GUARD
from facepipe.storage.owned import delete_owned, delete_owned_folder
from pipelines.search.config import SearchSummary

Result = TypeVar("Result")

# Key of the counts in a part's Parquet metadata, from which a resumed search adds them up.
_COUNTS = b"facepipe.counts"

# What lies in the folder of the parts.
_MARKER = ".facepipe-search"
_JOB = "job.json"
_PINNED = "index.json"
_JOINED = "joined"
_PARTS = "parts"
_QUERIES = "queries"
_PART = re.compile(r"part-\d{6,}\.parquet(?:\.[0-9a-f]{8}\.new)?")


@dataclass(frozen=True)
class SearchJob:
    """What decides the results: a part that was made for another job is not used. Stored as JSON beside the parts.

    Attributes:
        gallery: Path or URL of the gallery that is searched.
        created: When its index was published.
        queries: Path or URL of the queries.
        fingerprint: Of the queries.
        block: Queries per block.
        find: What to look for.
        path: lists or scan.
    """

    gallery: str
    created: float
    queries: str
    fingerprint: str
    block: int
    find: SearchOptions
    path: str


@dataclass(frozen=True)
class SearchTask:
    """A block of queries to search.

    Attributes:
        job: The search.
        block: The queries.
        work: Folder of the parts.
        threads: By default one per CPU.
        device: Device of a scan.
    """

    job: SearchJob
    block: QueryBlock
    work: str
    threads: int | None
    device: str


def check_output(out: str) -> None:
    """Refuse an output that would replace what no search wrote.

    Args:
        out: path or URL of the file, if it ends with .parquet, or of the folder.

    Raises:
        ConfigError: there is such a file, or a folder.
    """
    if out.lower().endswith((".csv", ".tsv", ".json", ".jsonl", ".txt")):
        raise ConfigError(
            f"a search writes Parquet: call the output hits.parquet, or name a folder, not {out!r}. "
            "`facepipe identify` writes CSV"
        )
    if is_remote(out):
        paths = [out] if out.endswith(".parquet") else [join(out, name) for name in list_names(out)]
        replaced = [path for path in paths if file_exists(path) and path.endswith(".parquet")]
    elif os.path.lexists(out):
        if not os.path.isfile(out) or not out.endswith(".parquet"):
            raise ConfigError(f"{out!r} exists: choose another name")
        replaced = [out]
    else:
        replaced = []
    for path in replaced:
        if not _is_output(path):
            raise ConfigError(f"{path!r} exists and is not the output of a search: choose another name")


def check_place(out: str, queries: str, gallery: str) -> None:
    """Refuse an output among the queries, or among the files of a gallery.

    Args:
        out: path of the output.
        queries: path or URL of the queries.
        gallery: path or URL of the gallery that is searched.

    Raises:
        ConfigError: the output would lie there.
    """
    # Parts of the answers would be read as queries.
    places = [queries] if os.path.isdir(queries) and list_parquet_files(queries).files else []
    # Reports hold what a user asked for. All else in a gallery is facepipe's own.
    folders = [name for name in FOLDERS if name != "reports"]
    places += [join(path, name) for path in (gallery, queries) for name in folders if Gallery.exists(path)]
    real_out = os.path.realpath(out)
    for place in places:
        if not is_remote(place) and f"{real_out}/".startswith(f"{os.path.realpath(place)}/"):
            raise ConfigError(f"the output {out!r} lies in {place!r}, which this search reads: choose another place")


def remove_unused_folder(work: str) -> None:
    """Remove the folder of the parts if nothing was put into it."""
    with suppress(OSError):
        if os.listdir(work) == [_MARKER]:
            os.unlink(os.path.join(work, _MARKER))
            os.rmdir(work)


def _is_output(path: str) -> bool:
    """Tell whether a file or object holds answers of a search."""
    try:
        with open_seekable(path) as file:
            return pq.read_schema(file).names in (ANSWERS.names, OLD_NAMES)
    except (OSError, StorageError, pa.ArrowException):
        return False


def make_folder(work: str) -> None:
    """Make the folder of the parts and mark it as ours, or go on with one of an interrupted search.

    Raises:
        ConfigError: the folder holds files and is not of a search.
        StorageError: it cannot be written.
    """
    marker = os.path.join(work, _MARKER)
    if os.path.islink(work):
        raise ConfigError(f"{work!r} is a link: delete it, or choose another output")
    try:
        make_folders(work)
        names = sorted(os.listdir(work))
        # Older versions wrote no marker. They made nothing but these. A run may also have ended while it wrote it.
        is_old = _JOB in names or names in ([_QUERIES], [_MARKER + UNFINISHED])
        if names and _MARKER not in names and not is_old:
            raise ConfigError(f"{work!r} holds {names[0]!r} and is not of a search: move it, or choose another output")
        text = b"Parts of a search of facepipe. The same command resumes it; delete the folder to begin anew.\n"
        replace(marker, text)
    except OSError as error:
        raise StorageError(f"cannot write {work!r}: {describe_error(error)}") from error


def owns_file(name: str) -> bool:
    """Tell whether a file in the folder of the parts is of the search, by its name there."""
    folder, slash, inner = name.partition("/")
    if not slash:
        return name in (_MARKER, _JOB, _PINNED, _JOINED) or bool(_PART.fullmatch(name))
    if folder == _PARTS:
        return not inner or bool(_PART.fullmatch(inner))
    # The queries are a gallery of its own, which is made and deleted with the parts.
    return folder == _QUERIES and (not inner or inner.split("/")[0] in (*FOLDERS, LEASE_FILE, LEASE_GUARD))


def owns_part(name: str) -> bool:
    """Tell whether a file in the folder of an output is a part of it, by its name there."""
    return bool(_PART.fullmatch(name))


def prepare_folder(work: str, job: SearchJob) -> None:
    """Note the job in the folder of the parts, and delete the parts of another job."""
    # Parts of another job would give wrong answers, so the job is compared as text with the stored one.
    if not is_same_search(work, job):
        delete_owned(work, lambda name: bool(_PART.fullmatch(name)))
        replace(os.path.join(work, _JOB), _encode_job(job))


def find_unfinished(source: QuerySource, rows: int, work: str, summary: SearchSummary) -> Iterator[QueryBlock]:
    """Yield the blocks without a part; the summary gets the counts of the others."""
    for block in source.cut_blocks(rows):
        summary.blocks += 1
        path = _get_part_path(work, block.number)
        if os.path.exists(path):
            summary.skipped_blocks += 1
            summary.add_counts(SearchCounts(**json.loads(pq.read_schema(path).metadata[_COUNTS])))
        else:
            yield block


def get_queries_folder(work: str) -> str:
    """Return the gallery into which queries that are images are embedded."""
    return os.path.join(work, _QUERIES)


@dataclass(frozen=True)
class QueryPack:
    """A block with its queries, for a machine that may see neither their files nor the folder of the parts.

    Attributes:
        task: The block.
        queries: Its queries, some thousands each.
    """

    task: SearchTask
    queries: tuple[Queries, ...]


@dataclass(frozen=True)
class EncodedPart:
    """The answers to a block.

    Attributes:
        counts: Of its queries.
        data: The part, as Parquet.
    """

    counts: SearchCounts
    data: bytes


def search_block(task: SearchTask, pinned: "PinnedIndex") -> SearchCounts:
    """Search a block of queries and write its part, which appears when it is complete."""
    return _search_opened(task, pinned, lambda index: answer_and_write(index, task))


def pack_block(task: SearchTask, dim: int) -> QueryPack:
    """Read the queries of a block, which are vectors of `dim` numbers."""
    return QueryPack(task, tuple(read_block(task.block, dim)))


def search_pack(pack: QueryPack, pinned: "PinnedIndex") -> EncodedPart:
    """Search a packed block, as a task on another machine does. All that it needs there is the gallery."""
    return _search_opened(pack.task, pinned, lambda index: _answer(index, pack.task, pack.queries))


def _search_opened(task: SearchTask, pinned: "PinnedIndex", search: Callable[[Index], Result]) -> Result:
    """Call a function with the index that a search is pinned to."""
    open_pinned = partial(_open_index, task.job.gallery, pinned, task.job.find.recall, task.threads)
    try:
        return search(open_pinned())
    except IndexReplacedError:
        # Faces were erased meanwhile: the same index without them is there, unless its files are deleted.
        _open_index.cache_clear()
        return search(open_pinned())


def answer_and_write(index: Index, task: SearchTask) -> SearchCounts:
    """Search a block of queries in an open index and write its part, which appears when it is complete."""
    part = _answer(index, task, read_block(task.block, index.dim))
    write_part(task, part)
    return part.counts


def _answer(index: Index, task: SearchTask, queries: Iterable[Queries]) -> EncodedPart:
    # A search of lists needs no device.
    device = task.device if task.job.path == "scan" else None
    table, counts = answer_queries(index, queries, task.job.find, device)
    # The part and its counts become visible together, by one rename.
    table = table.replace_schema_metadata({_COUNTS: json.dumps(asdict(counts))})
    data = pa.BufferOutputStream()
    pq.write_table(table, data, compression="zstd")
    return EncodedPart(counts, data.getvalue().to_pybytes())


def write_part(task: SearchTask, part: EncodedPart) -> None:
    """Write the part of a block, which appears when it is complete."""
    path = _get_part_path(task.work, task.block.number)
    # Synced, because a resumed search takes every part for a whole one.
    with replace_file(path, sync=True, unique=True) as unfinished, open(unfinished, "wb") as file:
        file.write(part.data)


def deliver(work: str, out: str, blocks: int) -> None:
    """Join the parts into one file, or move them into a folder, and delete the folder of the parts.

    Args:
        work: folder of the parts.
        out: path of the file, if it ends with .parquet, or of the folder.
        blocks: number of parts.
    """
    # The output appears by a rename. Parts are joined one at a time, to need the memory of one.
    check_output(out)  # it may have come meanwhile
    parts = [_get_part_path(work, number) for number in range(blocks)]
    try:
        if out.endswith(".parquet"):
            temporary = os.path.join(work, _JOINED)
            with pq.ParquetWriter(temporary, ANSWERS, compression="zstd") as writer:
                for part in parts:
                    writer.write_table(pq.read_table(part).replace_schema_metadata(None))
            publish_file(temporary, out, sync=True)
        else:
            folder = os.path.join(work, _PARTS)
            os.makedirs(folder)
            for part in parts:
                os.rename(part, os.path.join(folder, os.path.basename(part)))
            os.rename(folder, out)
            sync_folder(out)
            sync_folder(os.path.dirname(os.path.abspath(out)))
    except OSError as error:
        raise StorageError(f"cannot write {out!r}: {describe_error(error)}") from error
    delete_owned_folder(work, owns_file)


@dataclass(frozen=True)
class PinnedIndex:
    """The index that a search began with, and goes on with although a newer one may have taken its place.

    Attributes:
        manifest: The index.
        erasures: Ids of the erasures that were complete when it was read.
    """

    manifest: Manifest
    erasures: frozenset[str]

    def __hash__(self) -> int:
        return hash((self.manifest.created, self.erasures))

    @classmethod
    def from_published(cls, gallery: str) -> "PinnedIndex":
        """Take the published index of a gallery."""
        # In this order: an erasure that is completed in between counts as one since then.
        erasures = list_complete(gallery)
        return cls(manifests.load(gallery), erasures)

    def open(
        self,
        gallery: str,
        recall: float | None = None,
        threads: int | None = None,
        *,
        merge: bool = True,
        open_elsewhere: Callable[[Manifest], ShardSet] | None = None,
    ) -> Index:
        """Open the index.

        Args:
            gallery: path or URL of the gallery.
            recall: recall@10 to search with; by default the one that it was built for.
            threads: by default one per CPU.
            merge: join its shards in memory, which pays for many queries.
            open_elsewhere: opens the shards in other processes; by default they are opened in this one.

        Raises:
            IndexReplacedError: its files are deleted.
        """
        open_pinned = partial(Index, gallery, recall, threads, merge, open_elsewhere=open_elsewhere)
        try:
            return open_pinned(self.manifest, known_erasures=self.erasures)
        except IndexReplacedError:
            # An erasure rewrites shards. What it leaves is the same index, without the erased faces.
            current = PinnedIndex.from_published(gallery)
            if current.manifest.created == self.manifest.created:
                return open_pinned(current.manifest, known_erasures=current.erasures)
            raise IndexReplacedError(
                f"the index of {gallery!r} with which this search began is deleted: run the same command again, which "
                "searches the newest one from the beginning"
            ) from None


@lru_cache(maxsize=1)
def _open_index(gallery: str, pinned: PinnedIndex, recall: float | None, threads: int | None) -> Index:
    """Open the index that a search began with, once per process."""
    return pinned.open(gallery, recall, threads)


def pin_index(work: str, pinned: PinnedIndex) -> None:
    """Note which index is searched, for workers that start later and for a run that resumes the search."""
    manifest = json.loads(manifests.encode(pinned.manifest))
    state = {"erasures": sorted(pinned.erasures), "manifest": manifest}
    replace(os.path.join(work, _PINNED), json.dumps(state).encode())


def load_pinned_index(work: str, gallery: str) -> PinnedIndex | None:
    """Load which index an interrupted search began with; None if it is not known."""
    path = os.path.join(work, _PINNED)
    try:
        state = json.loads(read(path))
        manifest = manifests.decode(json.dumps(state["manifest"]).encode(), path, gallery)
        return PinnedIndex(manifest, frozenset(state["erasures"]))
    except (StorageError, IndexingError, ValueError, KeyError, TypeError):
        return None


def require_pinned_index(work: str, job: SearchJob) -> PinnedIndex:
    """Load the index that a search is pinned to.

    Raises:
        IndexReplacedError: it is not known.
    """
    pinned = load_pinned_index(work, job.gallery)
    if pinned is None or pinned.manifest.created != job.created:
        raise IndexReplacedError(
            f"{work!r} does not say which index of {job.gallery!r} is searched: run the same command again, which "
            "searches the newest one from the beginning"
        )
    return pinned


def is_same_search(work: str, job: SearchJob) -> bool:
    """Tell whether the parts in a folder are of a job."""
    try:
        return read(os.path.join(work, _JOB)) == _encode_job(job)
    except StorageError:
        return False


def _encode_job(job: SearchJob) -> bytes:
    return json.dumps(asdict(job), sort_keys=True).encode()


def _get_part_path(work: str, number: int) -> str:
    return os.path.join(work, f"part-{number:06d}.parquet")
