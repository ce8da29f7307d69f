"""Whether `facepipe index` keeps to its memory budget, enforced by the kernel.

    python tests/bench/index_memory.py [--faces 2000000] [--budgets 4GiB 480MiB] [--gallery FOLDER]

Each build runs in a memory cgroup of the size of its budget (cgroup v1, as root). The kernel kills a process that needs more.
Page cache counts too, but the kernel frees it under pressure. The script also polls the process for its memory without mapped
files (RssAnon).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from galleries import make_gallery

from facepipe.gallery import Gallery
from facepipe.index.plan import parse_size

CGROUP = Path("/sys/fs/cgroup/memory/facepipe-bench")


def read_process_memory(pid: int, key: str) -> float:
    """Read a value of a process's status, in MiB; 0 if the process has ended."""
    try:
        match = re.search(rf"{key}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(match[1]) / 1024 if match else 0.0


def build_within(gallery: Path, budget: str) -> None:
    """Build the index within a memory budget, and print the peak memory."""
    limited = CGROUP.parent.is_dir() and os.access(CGROUP.parent, os.W_OK)
    if limited:
        CGROUP.mkdir(exist_ok=True)
        (CGROUP / "memory.limit_in_bytes").write_text(str(parse_size(budget)))

    def enter() -> None:
        if limited:
            (CGROUP / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, "-m", "jobs.cli", "index", str(gallery), "--memory", budget, "--retrain", "--json"]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=enter)
    anonymous = resident = 0.0
    while process.poll() is None:
        anonymous = max(anonymous, read_process_memory(process.pid, "RssAnon"))
        resident = max(resident, read_process_memory(process.pid, "VmHWM"))
        time.sleep(0.02)
    out, err = process.communicate()
    if limited:
        CGROUP.rmdir()
    print(err.splitlines()[0] if err else "")
    enforcement = "in a cgroup of that size" if limited else "not enforced: no writable memory cgroup"
    if process.returncode:
        print(f"--memory {budget} ({enforcement}): exit {process.returncode}: {err[-300:]}")
        return
    done = json.loads(out)
    print(
        f"--memory {budget} ({enforcement}): {time.monotonic() - began:.0f} s; peak without mapped files {anonymous:.0f} MiB, with "
        f"them {resident:.0f} MiB; float32 vectors {done['vectors'] * 512 / 2**20:.0f} MiB; {done['factory']}, {done['shards']} "
        f"shards, {done['nprobe']} lists and {done['rescore']} candidates for recall@10 {done['recall_at_10']}; {done['seconds']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=2_000_000)
    parser.add_argument("--budgets", nargs="+", default=["4GiB", "480MiB"])
    parser.add_argument("--gallery", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = args.gallery or Path(temporary) / "g"
        if not Gallery.exists(str(path)):
            make_gallery(path, args.faces)
        for budget in args.budgets:
            build_within(path, budget)


if __name__ == "__main__":
    main()
