"""What a table of very many files costs: open it, list it, scan it, commit to it, and clean up after it.

    python tests/bench/table_files.py [--files 20000 100000 400000] [--folder FOLDER]

The log is real: statistics of real rows, in entries of 25,000 files. The table's files are links to a few files of one row
each, so that a scan opens every one of them. Their images are counted, as runs leave them (facepipe.gallery.file_counts). Each step runs in a process of its own, and prints seconds, CPU seconds,
how long the interpreter stood still for other threads (a lease's heartbeat is one), and the memory that it took.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from galleries import CONTRACT, Faces, rows

from facepipe.gallery import Gallery
from facepipe.gallery.commits import log
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord, compute_statistics, encode_parquet
from facepipe.gallery.maintenance import vacuum
from facepipe.gallery.maintenance.quick import check_files
from facepipe.gallery.table import RUNS
from facepipe.observe.info import describe_gallery
from facepipe.schema import OK, STATUSES
from facepipe.storage.lease import hold_lease

STEPS = ("open", "files", "names", "totals", "first", "scan", "info", "quick", "unnamed", "commits", "history")
PER_ENTRY = 25_000
LINKS = 50_000  # that a file may have: ext4 allows 65,000


def make_row() -> pa.Table:
    """Draw a row."""
    identities, vectors = next(Faces().blocks(1))
    return rows(identities, vectors, 0)


def make_gallery(path: str, count: int) -> None:
    """Make a gallery whose table has `count` files of one row."""
    gallery = Gallery.create(path, CONTRACT)
    one_row = make_row()
    data = encode_parquet(one_row)
    statistics = json.loads(compute_statistics(one_row))
    first = Path(path)
    actions: list[dict[str, Any]] = []
    version = 0
    for number in range(count):
        name = f"part-20261130T093054-3aa1c6-{number:06d}-{number:032x}.parquet"
        file = Path(gallery.faces_folder, name)
        if number % LINKS == 0:
            file.write_bytes(data)
            first = file
        else:
            os.link(first, file)
        folder = f"/data/corpus/{number // 1000:06d}"
        statistics["minValues"]["uri"] = f"{folder}/{number:09d}_0.jpg"
        statistics["maxValues"]["uri"] = f"{folder}/{number:09d}_9.jpg"
        add = log.AddAction(name, len(data), {}, 1_700_000_000_000 + number, True, json.dumps(statistics))
        actions.append(log.encode_action(add))
        if len(actions) == PER_ENTRY or number == count - 1:
            version += 1
            log.write_entry(gallery.faces_folder, version, "WRITE", actions)
            actions = []
    # All files hold one face.
    counts = {"deleted": 0, **dict.fromkeys(STATUSES, 0), OK: 1, "faces": 1}
    table = pa.table({"path": Gallery(path).list_paths(), **{key: [value] * count for key, value in counts.items()}})
    Path(path, RUNS).mkdir(exist_ok=True)
    pq.write_table(table, Path(path, RUNS, "counts.parquet"), compression="zstd")


def run_step(step: str, path: str) -> None:
    """Run one step, and print what it took."""
    gallery = Gallery(path) if step != "open" else None
    if step in ("unnamed", "history"):
        with hold_lease(path) as lease:
            work: dict[str, Callable[[], object]] = {
                "unnamed": lambda: vacuum.claim_unreferenced(path, lease),
                "history": lambda: vacuum.delete_history(Gallery(path), lease),
            }
            measure(step, work[step])
        return
    if step == "commits":
        assert gallery is not None
        commit = Committer(gallery, f"run-{time.time_ns()}")
        statistics = compute_statistics(make_row())
        data = encode_parquet(make_row())

        def commit_twenty() -> None:
            for number in range(20):
                name = f"part-bench-{time.time_ns()}-{number:032x}.parquet"
                Path(gallery.faces_folder, name).write_bytes(data)
                commit([PartRecord(0, path=name, size=len(data), stats=statistics)], {})

        measure("20 commits", commit_twenty)
        return
    steps: dict[str, Callable[[], object]] = {
        "open": lambda: Gallery(path),
        "files": lambda: gallery.files(),
        "names": lambda: gallery.list_paths(),
        "totals": lambda: gallery.count_totals(),
        "first": lambda: next(gallery.batches(["uri", "identity"])),
        "scan": lambda: sum(batch.num_rows for batch in gallery.batches(["uri", "identity"])),
        "info": lambda: describe_gallery(gallery),
        "quick": lambda: check_files(gallery),
    }
    measure(step, steps[step])


def measure(name: str, work: Callable[[], object]) -> None:
    """Time some work, and watch how long the interpreter stands still."""
    longest = 0.0
    is_done = threading.Event()

    def beat() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not is_done.wait(0.005):
            now = time.perf_counter()
            longest = max(longest, now - last)
            last = now

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    before = read_memory("VmRSS")
    start = time.perf_counter()
    cpu = read_cpu()
    work()
    seconds = time.perf_counter() - start
    used = read_cpu() - cpu
    is_done.set()
    heart.join()
    print(
        f"| {name} | {seconds:.2f} | {used:.2f} | {longest:.2f} | {before:.0f} | {read_memory('VmRSS'):.0f} "
        f"| {read_memory('VmHWM'):.0f} |",
        flush=True,
    )


def read_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def read_memory(name: str) -> float:
    """Read a figure of this process's memory, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[20_000, 100_000, 400_000])
    parser.add_argument("--folder")
    parser.add_argument("--steps", choices=STEPS, nargs="+", default=STEPS)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        run_step(arguments.step, arguments.folder)
        return
    print(f"{date.today()}, {platform.processor()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.0f}")
    print(f"`python {shlex.join(sys.argv)}`")
    folder = arguments.folder or tempfile.mkdtemp()
    for count in arguments.files:
        path = os.path.join(folder, str(count))
        if not os.path.exists(path):
            make_gallery(path, count)
        size = sum(file.stat().st_size for file in Path(path, "faces", "_delta_log").iterdir())
        print(f"\n{count} files, log of {size / 1e6:.0f} MB, pyarrow {pa.__version__}\n")
        print(
            "| step | s | CPU s | interpreter still, s | MiB before | after | peak |\n|---|---|---|---|---|---|---|",
            flush=True,
        )
        for step in arguments.steps:
            subprocess.run([sys.executable, __file__, "--step", step, "--folder", path], check=True)
    if not arguments.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
