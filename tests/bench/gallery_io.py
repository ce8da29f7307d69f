"""Writing and scanning a gallery of 1M faces, against raw pyarrow on the same columns, files and codec.

    python tests/bench/gallery_io.py [--rows 1000000] [--per-file 50000 512] [--rounds 3] [--folder FOLDER]

Writing: `write_part` and the commits (rows chosen and counted, statistics, checksum, file synced to the disk, Delta log)
against `pyarrow.parquet.write_table(table, path, compression="zstd")`, once as it is and once synced as well. Scanning:
the three ways in which the library reads vectors, against `pyarrow.parquet.read_table` of the same columns of the same
files, a file at a time. Rows have every column but thumbnails. Files of 50,000 rows are what compaction leaves, those of
512 what workers write. Each round does everything once, one after the other; ratios are made within a round.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from galleries import CONTRACT, Faces, rows

from facepipe.arrow import to_float_lists
from facepipe.gallery import Gallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord, write_part
from facepipe.index.rows import read_face_rows
from facepipe.schema import FACES

COMMIT_EVERY = 64  # files; a run commits every ten seconds
Timings = dict[str, list[float]]


def full(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    """Rows as a worker makes them: every column has values, but those of thumbnails and of missing images."""
    n = table.num_rows
    drawn = {
        "box": to_float_lists(rng.uniform(0, 1000, (n, 4)).astype(np.float32)),
        "landmarks": to_float_lists(rng.uniform(0, 1000, (n, 10)).astype(np.float32)),
        "source": pa.array(["bench"] * n),
        "fingerprint": pa.array([f"{size}-{time}" for size, time in rng.integers(1 << 40, 1 << 60, (n, 2))]),
        "width": pa.array(np.full(n, 1024, np.int32)),
        "height": pa.array(np.full(n, 768, np.int32)),
        "image_hash": pa.array(rng.integers(-(1 << 63), 1 << 63, n)),
        "ingested_at": pa.array([datetime.now(UTC)] * n, pa.timestamp("us", "UTC")),
    }
    floats = ("det_score", "face_px", "sharpness", "yaw", "roll", "embedding_norm")
    drawn |= {name: pa.array(rng.uniform(0, 90, n).astype(np.float32)) for name in floats}
    columns = [drawn.get(field.name, table[field.name]) for field in FACES if field.name != "missing_since"]
    return pa.table(columns, [name for name in FACES.names if name != "missing_since"])


def tables(count: int, per_file: int) -> list[pa.Table]:
    """All rows, in tables of a file each."""
    rng, made, done = np.random.default_rng(0), [], 0
    for identities, faces in Faces().blocks(count):
        table = full(rows(identities, faces, done), rng)
        made += [table.slice(at, per_file) for at in range(0, table.num_rows, per_file)]
        done += table.num_rows
    return made


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """(seconds, CPU seconds of all threads)."""
    began, worked = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - worked


def write_raw(parts: list[pa.Table], folder: Path, sync: bool) -> None:
    for n, part in enumerate(parts):
        path = folder / f"{n:06d}.parquet"
        pq.write_table(part, path, compression="zstd")
        if sync:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def write_gallery(parts: list[pa.Table], gallery: Gallery) -> None:
    commit = Committer(gallery, "bench")
    records: list[PartRecord] = []
    for n, part in enumerate(parts):
        items = pa.table([part["uri"], pa.nulls(part.num_rows, pa.uint64())], ["uri", "previous"])
        records.append(write_part(part, items, gallery.faces_folder, "bench", PartRecord(n)))
        if len(records) == COMMIT_EVERY:
            commit(records, {})
            records = []
    commit(records, {})


def raw_scan(gallery: Gallery, columns: list[str]) -> None:
    for file in gallery.files():
        pq.read_table(f"{gallery.faces_folder}/{file['path']}", columns=columns)


def raw_arrays(gallery: Gallery) -> None:
    """What `Gallery.vectors` gives, the plain way."""
    files = [f"{gallery.faces_folder}/{file['path']}" for file in gallery.files()]
    parts = [pq.read_table(file, columns=["face_id", "embedding"]) for file in files]
    np.concatenate([part["face_id"].to_numpy() for part in parts])
    np.concatenate([part["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 128) for part in parts])


def index_scan(gallery: Gallery) -> None:
    for _ in read_face_rows(gallery.faces_folder, [file["path"] for file in gallery.files()], gallery.dim):
        pass


def batch_scan(gallery: Gallery) -> None:
    for _ in gallery.batches(["face_id", "embedding"], rows=65536):
        pass


def writes(parts: list[pa.Table], folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    raw, synced = folder / "raw", folder / "synced"
    for place in (raw, synced):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    shutil.rmtree(folder / "g", ignore_errors=True)
    gallery = Gallery.create(str(folder / "g"), CONTRACT)
    yield "write, raw", lambda: write_raw(parts, raw, False)
    yield "write, raw, synced", lambda: write_raw(parts, synced, True)
    yield "write, facepipe", lambda: write_gallery(parts, gallery)


def scans(gallery: Gallery) -> Iterator[tuple[str, Callable[[], None]]]:
    two, four = ["face_id", "embedding"], ["face_id", "embedding", "uri", "identity"]
    yield "scan of 4 columns, raw", lambda: raw_scan(gallery, four)
    yield "scan of 4 columns, index, graph and search (read_face_rows)", lambda: index_scan(gallery)
    yield "scan of 2 columns, raw", lambda: raw_scan(gallery, two)
    yield "scan of 2 columns, Gallery.batches", lambda: batch_scan(gallery)
    yield "scan of 2 columns, raw, to arrays", lambda: raw_arrays(gallery)
    yield "scan of 2 columns, Gallery.vectors", lambda: gallery.vectors() and None


AGAINST = {
    "write, facepipe": ("write, raw", "write, raw, synced"),
    "scan of 4 columns, index, graph and search (read_face_rows)": ("scan of 4 columns, raw",),
    "scan of 2 columns, Gallery.batches": ("scan of 2 columns, raw",),
    "scan of 2 columns, Gallery.vectors": ("scan of 2 columns, raw, to arrays", "scan of 2 columns, raw"),
}


def show(what: str, seconds: Timings, cpu: Timings, size: int) -> None:
    taken = statistics.median(seconds[what])
    print(f"  {what}: {taken:.2f} s, {statistics.median(cpu[what]):.2f} s of CPU, {size / 1e6 / taken:,.0f} MB/s")
    for other in AGAINST.get(what, ()):
        for unit, found in (("speed", seconds), ("CPU", cpu)):
            ratios = sorted(a / b for a, b in zip(found[other], found[what], strict=True))
            print(f"    {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) of {other}, by {unit}")


def measured(parts: list[pa.Table], rounds: int, folder: Path) -> None:
    seconds, cpu = defaultdict(list), defaultdict(list)

    def note(what: str, work: Callable[[], None]) -> None:
        for found, value in zip((seconds, cpu), timed(work), strict=True):
            found[what].append(value)

    for _ in range(rounds):
        for what, work in writes(parts, folder):
            note(what, work)
            os.sync()
        for what, work in scans(Gallery(str(folder / "g"))):
            note(what, work)
    files = Gallery(str(folder / "g")).files()
    count, stored = sum(file["num_records"] for file in files), sum(file["size_bytes"] for file in files)
    held = sum(part.nbytes for part in parts)
    print(f"{count} rows in {len(files)} files: {held / 1e6:,.0f} MB in memory, {stored / 1e6:,.0f} MB on the disk")
    per_row = {"write": held / count, "scan of 2": 8 + 512, "scan of 4": 8 + 512 + 40}
    for what in seconds:
        show(what, seconds, cpu, int(next(v for k, v in per_row.items() if what.startswith(k)) * count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--per-file", type=int, nargs="+", default=[50_000, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the files go; they are deleted again")
    args = parser.parse_args()
    for per_file in args.per_file:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            measured(tables(args.rows, per_file), args.rounds, folder)
        finally:
            shutil.rmtree(folder)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
