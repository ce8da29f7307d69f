"""Parts of a search on disk: one Parquet file per block of queries, and the search that they belong to."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache

import pyarrow.parquet as pq

from facepipe.errors import StorageError
from facepipe.index.answers import ANSWERS, SearchCounts, SearchOptions, answer_queries
from facepipe.index.queries import QueryBlock, QuerySource, read_block
from facepipe.index.search import Index
from facepipe.storage import describe_error, replace_file
from pipelines.search.config import SearchSummary

# Key of the counts in a part's Parquet metadata, from which a resumed search adds them up.
_COUNTS = b"facepipe.counts"


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


def prepare_folder(work: str, job: SearchJob) -> None:
    """Note the job in the folder of the parts, and delete the parts of another job."""
    # Parts of another job would give wrong answers, so the job is compared as text with the stored one.
    path = os.path.join(work, "job.json")
    state = json.dumps(asdict(job), sort_keys=True)
    try:
        with open(path) as file:
            is_same = file.read() == state
    except OSError:
        is_same = False
    if not is_same:
        for name in os.listdir(work):
            if name.startswith("part-"):
                os.unlink(os.path.join(work, name))
        with open(path, "w") as file:
            file.write(state)


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


def search_block(task: SearchTask) -> SearchCounts:
    """Search a block of queries and write its part, which appears when it is complete."""
    index = _open_index(task.job.gallery, task.job.created, task.job.find.recall, task.threads)
    # A search of lists needs no device.
    device = task.device if task.job.path == "scan" else None
    table, counts = answer_queries(index, read_block(task.block), task.job.find, device)
    # The part and its counts become visible together, by one rename.
    table = table.replace_schema_metadata({_COUNTS: json.dumps(asdict(counts))})
    path = _get_part_path(task.work, task.block.number)
    with replace_file(path, unique=True) as unfinished:
        pq.write_table(table, unfinished, compression="zstd")
    return counts


def deliver(work: str, out: str, blocks: int) -> None:
    """Join the parts into one file, or move them into a folder, and delete the folder of the parts.

    Args:
        work: folder of the parts.
        out: path of the file, if it ends with .parquet, or of the folder.
        blocks: number of parts.
    """
    # The output appears by a rename. Parts are joined one at a time, to need the memory of one.
    parts = [_get_part_path(work, number) for number in range(blocks)]
    try:
        if out.endswith(".parquet"):
            temporary = os.path.join(work, "joined")
            with pq.ParquetWriter(temporary, ANSWERS, compression="zstd") as writer:
                for part in parts:
                    writer.write_table(pq.read_table(part).replace_schema_metadata(None))
            os.replace(temporary, out)
        else:
            folder = work + "/parts"
            os.makedirs(folder)
            for part in parts:
                os.rename(part, os.path.join(folder, os.path.basename(part)))
            os.rename(folder, out)
    except OSError as error:
        raise StorageError(f"cannot write {out!r}: {describe_error(error)}") from error
    shutil.rmtree(work, ignore_errors=True)


@lru_cache(maxsize=1)
def _open_index(gallery: str, created: float, recall: float | None, threads: int | None) -> Index:
    """Open the index once per process. `created` is there so that another index is opened anew."""
    return Index(gallery, recall, threads, merge=True)


def _get_part_path(work: str, number: int) -> str:
    return os.path.join(work, f"part-{number:06d}.parquet")
