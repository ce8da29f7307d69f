"""Peak memory of driver and workers at n and 10 n images: it must not grow with the corpus.

    python tests/bench/memory.py [--images 2000] [--runner local] [--models real]

A synthetic corpus of small JPEGs; the peaks are the kernel's (VmHWM), per process, polled until the run ends.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
from corpus import small_jpegs

ROLES = {"jobs.cli": "driver", "runners.child": "worker", "MapWorker": "worker", "ReadListing": "listing"}
FAKES = ["--set", "detect.model=fake-detector", "--set", "embed.model=fake-embedder"]


def peak_mib(pid: int) -> float:
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def peaks(command: list[str]) -> tuple[dict[str, float], dict[str, object], float]:
    """(peak MiB by role, the run's summary, seconds)."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    highest: dict[str, float] = defaultdict(float)
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for member in family:
                line = " ".join(member.cmdline()) if member.pid != process.pid else "jobs.cli"
                role = next((role for part, role in ROLES.items() if part in line), None)
                if role:
                    highest[role] = max(highest[role], peak_mib(member.pid))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    assert process.stdout
    return highest, json.loads(process.stdout.read()), time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--runner", default="local")
    parser.add_argument("--models", choices=["real", "fake"], default="real")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for n in (args.images, 10 * args.images):
            corpus = small_jpegs(Path(folder) / f"c{n}", n)
            command = [
                sys.executable,
                "-m",
                "jobs.cli",
                "embed",
                str(corpus),
                f"{folder}/g{n}",
                "--runner",
                args.runner,
            ]
            command += ["--json", "--quiet", *(FAKES if args.models == "fake" else [])]
            highest, summary, seconds = peaks(command)
            shown = "  ".join(f"{role} {mib:.0f} MiB" for role, mib in sorted(highest.items()))
            print(f"{args.runner}, {n} images, {summary['faces']} faces, {seconds:.0f} s: {shown}", flush=True)
            found.append(highest)
    for role in sorted(found[0]):
        print(f"{role}: {found[1][role] / found[0][role]:.3f} times the memory for 10 times the images")


if __name__ == "__main__":
    main()
