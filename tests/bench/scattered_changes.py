"""What a night reads and writes of the table if changes are scattered over it.

Images are touched, missing, relabelled, replaced and erased.

    python tests/bench/scattered_changes.py [--images 100000 1000000] [--shares 0.001 0.01] [--folder FOLDER]

The table is as compaction leaves it: files of 50,000 rows in the order of uris, an image per row, thumbnails of 2,111 random
bytes (the mean on LFW). Each step is made twice: with files spared, by marks and by deletion vectors, and with files written anew,
as it was before. Erasures are made both ways too: hidden at once and purged together, and written anew at once. Bytes are those of read and write calls of the process (/proc/self/io), so also those that the page cache answers.
"""

import argparse
import dataclasses
import os
import platform
import resource
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from galleries import CONTRACT, Faces, append, rows
from gallery_io import full

from facepipe.gallery import Gallery
from facepipe.gallery.commits import rewrite as rewrites
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord
from facepipe.gallery.commits.rewrite import write_new_rows
from facepipe.gallery.known import KnownImages
from facepipe.gallery.maintenance.compact import fold_marks
from facepipe.gallery.maintenance.purge import find_due_files, purge_files
from facepipe.schema import FACES

THUMB_BYTES = 2_111
ROWS_PER_FILE = 50_000
ERASURES = 3


@dataclass(frozen=True)
class Usage:
    """What a process has used so far."""

    seconds: float
    cpu: float
    read: int
    written: int


_MADE_BEFORE: list[Usage] = []


def read_usage() -> Usage:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return Usage(time.perf_counter(), usage.ru_utime + usage.ru_stime, int(io["rchar"]), int(io["wchar"]))


def make_gallery(path: str, count: int) -> None:
    """Make a gallery of `count` images with a face each."""
    rng = np.random.default_rng(0)
    gallery = Gallery.create(path, CONTRACT)

    def draw() -> Iterator[pa.Table]:
        done = 0
        for identities, vectors in Faces().blocks(count):
            table = full(rows(identities, vectors, done), rng)
            thumbs = [rng.bytes(THUMB_BYTES) for _ in range(table.num_rows)]
            n = table.schema.get_field_index("thumb")
            yield table.set_column(n, FACES.field("thumb"), pa.array(thumbs, pa.binary()))
            done += table.num_rows

    append(gallery, draw(), "bench")


def choose_uris(path: str, share: float, seed: int) -> list[str]:
    """Choose a share of the images at random."""
    uris = Gallery(path).to_arrow(["uri"])["uri"].to_numpy()
    return sorted(np.random.default_rng(seed).choice(uris, max(1, round(share * len(uris))), replace=False).tolist())


def measure(name: str, path: str, work: Callable[..., object], *values: object) -> None:
    """Print what some work reads and writes, in shares of the table as well."""
    _MADE_BEFORE[:] = [read_usage()]
    work(path, *values)
    after = read_usage()
    # What prepares the work is left out.
    before = _MADE_BEFORE[-1]
    size = sum(file["size_bytes"] for file in Gallery(path).files())
    read = after.read - before.read
    written = after.written - before.written
    print(
        f"| {name} | {read / 1e6:,.1f} | {read / size:.1%} | {written / 1e6:,.1f} | {written / size:.1%} "
        f"| {after.cpu - before.cpu:.1f} | {after.seconds - before.seconds:.1f} |",
        flush=True,
    )


def touch(path: str, uris: list[str]) -> None:
    fingerprints: dict[str, str | None] = {uri: f"touched-{time.time_ns()}" for uri in uris}
    Committer(Gallery(path), f"run-{time.time_ns()}")([PartRecord(0, touched=fingerprints)], {})


def relabel(path: str, uris: list[str]) -> None:
    labels: dict[str, str | None] = dict.fromkeys(uris, f"label-{time.time_ns()}")
    Committer(Gallery(path), f"run-{time.time_ns()}")([PartRecord(0, relabelled=labels)], {})


def replace(path: str, uris: list[str]) -> None:
    """Commit new rows of images whose content is another one."""
    gallery = Gallery(path)
    rng = np.random.default_rng(time.time_ns())
    rows = gallery.to_arrow(where=ds.field("uri").isin(pa.array(uris)))
    identifiers = pa.array(rng.integers(1, 1 << 62, rows.num_rows))
    rows = rows.set_column(0, FACES.field(0), identifiers)
    before = read_usage()
    action = write_new_rows(gallery, rows, f"run-{time.time_ns()}")
    record = PartRecord(0, path=action.path, size=action.size, stats=action.stats, replaced=uris)
    Committer(gallery, f"run-{time.time_ns()}")([record], {})
    _MADE_BEFORE.append(before)


def erase(path: str, uris: list[str]) -> None:
    plan = rewrites.plan_rewrite_of_uris(uris, lambda rows, mask: rows.filter(pc.invert(mask)))
    commit = Committer(Gallery(path), f"run-{time.time_ns()}")
    commit.commit_actions(lambda: list(rewrites.rewrite_files(Gallery(path), plan)), {})


def hide(path: str, uris: list[str]) -> None:
    """Delete rows as an erasure does that purges later."""
    plan = rewrites.plan_rewrite_of_uris(uris, lambda rows, mask: rows.filter(pc.invert(mask)))
    plan = dataclasses.replace(plan, deletes=True, defers=True, keeps=lambda rows: pa.array([False] * rows.num_rows))
    commit = Committer(Gallery(path), f"run-{time.time_ns()}")
    commit.commit_actions(lambda: list(rewrites.rewrite_files(Gallery(path), plan)), {})


def purge(path: str) -> None:
    gallery = Gallery(path)
    commit = Committer(gallery, f"run-{time.time_ns()}")
    purge_files(gallery, find_due_files(gallery, 30, everything=True), commit)


def read_two_columns(path: str) -> None:
    for _ in Gallery(path).batches(["uri", "identity"], "det_score > 2"):
        pass


def miss(path: str, uris: list[str]) -> None:
    """Mark images as missing, by the same reads and writes as `mark_missing`."""
    now = pa.scalar(datetime.now(UTC), FACES.field("missing_since").type)
    wanted = pa.array(uris)

    def set_time(table: pa.Table, mask: Any) -> pa.Table:
        n = table.schema.get_field_index("missing_since")
        return table.set_column(n, FACES.field("missing_since"), pc.if_else(mask, now, table["missing_since"]))

    plan = rewrites.Rewrite(
        columns=("uri", "source", "missing_since", "face_index"),
        matches=lambda table: pc.and_(pc.is_null(table["missing_since"]), pc.is_in(table["uri"], wanted)),
        change=set_time,
        data_change=False,
        change_marked=lambda table: set_time(table, pa.scalar(True)),
    )
    commit = Committer(Gallery(path), f"run-{time.time_ns()}")
    commit.commit_actions(lambda: list(rewrites.rewrite_files(Gallery(path), plan)), {})


def fold(path: str) -> None:
    fold_marks(Gallery(path), Committer(Gallery(path), f"run-{time.time_ns()}"), everything=True)


def read_known(path: str) -> None:
    KnownImages(Gallery(path)).close()


def measure_share(path: str, share: float, *, with_anew: bool) -> None:
    """Measure changes of a share of the images."""
    for seed, (name, from_bytes) in enumerate((("spared", 0), ("anew", 1 << 62))[: 1 + with_anew]):
        rewrites._SPARED_FROM_BYTES = from_bytes
        # Others each time: those that have changed lie in a small file of their own.
        uris = choose_uris(path, share, seed=2 * seed)
        others = choose_uris(path, share, seed=2 * seed + 1)
        measure(f"{share:.1%} touched, {name}", path, touch, uris)
        measure(f"{share:.1%} missing, {name}", path, miss, others)
        touch(path, others)
        measure(f"{share:.1%} relabelled, {name}", path, relabel, uris)
        measure(f"{share:.1%} replaced, {name}", path, replace, others)
        measure("two columns read afterwards", path, read_two_columns)
    rewrites._SPARED_FROM_BYTES = 0
    touch(path, uris)
    measure(f"{share:.1%} of marks folded", path, fold)
    relabel(path, uris)
    replace(path, others)
    measure("deleted rows purged", path, purge)
    for night in range(ERASURES):
        measure(f"{share:.1%} hidden, night {night + 1}", path, hide, choose_uris(path, share, seed=90 + night))
    measure(f"the {ERASURES} nights of erasures purged", path, purge)
    measure(f"{share:.1%} erased at once", path, erase, choose_uris(path, share, seed=99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.001, 0.01])
    parser.add_argument("--folder")
    parser.add_argument("--spared-only", action="store_true", help="leave out what writes files anew")
    arguments = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.0f}")
    print(f"`python {shlex.join(sys.argv)}`")
    folder = arguments.folder or tempfile.mkdtemp()
    for count in arguments.images:
        path = os.path.join(folder, str(count))
        if not os.path.exists(path):
            make_gallery(path, count)
        size = sum(file["size_bytes"] for file in Gallery(path).files())
        print(f"\n{count} images, {size / 1e6:,.0f} MB\n")
        print(
            "| step | MB read | of the table | MB written | of the table | CPU s | s |\n|---|---|---|---|---|---|---|"
        )
        measure("reading what is known", path, read_known)
        for share in arguments.shares:
            measure_share(path, share, with_anew=not arguments.spared_only)
    if not arguments.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
