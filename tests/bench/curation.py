"""Measure graph, cluster, clean and dedup on a synthetic gallery: CPU seconds and peak memory, phase by phase.

    python tests/bench/curation.py WORK [--faces 300000] [--steps graph cluster clean dedup]

Every step runs in a process of its own. Its memory is that which no file backs (RssAnon): mapped vectors are pages that
the kernel may drop. The gallery is made once in WORK: faces of galleries.py, of which one in twenty has a wrong label,
one in twenty is a near copy of the one before it, and one in fifty an exact copy. Run it with PYTHONPATH at another
checkout to compare; `--digest` prints a digest of all tables and lists, which must stay the same.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
from galleries import CONTRACT, append, make_labelled_rows

from facepipe.gallery import Gallery

STEPS = ("graph", "cluster", "clean", "dedup")
_POLL_SECONDS = 0.005
_SKIPPED = {"facepipe.json", "mark.json", "report.html", "graph.json", "state.npz", "sums.npz"}


def read_anonymous_mib() -> float:
    """Read the memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


class Watch:
    """Note the peak of this process's memory and its CPU seconds, phase by phase."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float, float]] = []
        self._name = "start"
        self._peak = 0.0
        self._began = time.process_time()
        threading.Thread(target=self._poll, daemon=True).start()

    def _poll(self) -> None:
        while True:
            self._peak = max(self._peak, read_anonymous_mib())
            time.sleep(_POLL_SECONDS)

    def begin(self, name: str) -> None:
        """End the phase so far, and begin another one."""
        self.phases.append((self._name, self._peak, time.process_time() - self._began))
        self._name = name
        self._peak = read_anonymous_mib()
        self._began = time.process_time()


def run_step(step: str, gallery: str) -> None:
    """Run a step in this process, and print what it took."""
    from pipelines import clean, graph
    from pipelines.cluster import pipeline as cluster
    from pipelines.dedup import pipeline as dedup

    watch = Watch()
    if step == "graph":
        folder = Path(gallery) / "reports" / "graph"
        folder.parent.mkdir(exist_ok=True)
        graph.open_graph([Gallery(gallery)], graph.GraphConfig(), graph.GraphRunConfig(), str(folder), watch.begin)
    elif step == "cluster":
        cluster.run(cluster.ClusterConfig(), gallery, watch.begin)
    elif step == "clean":
        clean.run(clean.CleanConfig(), gallery, watch.begin)
    else:
        dedup.run(dedup.DedupConfig(), gallery, progress=watch.begin)
    watch.begin("")
    print(json.dumps(watch.phases))


def digest_folder(folder: Path) -> str:
    """Digest the tables and lists of a report by what they hold, row by row."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.name in _SKIPPED or not path.is_file():
            continue
        total.update(path.name.encode())
        if path.suffix == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(50_000):
                total.update(json.dumps(batch.to_pydict(), default=str).encode())
        else:
            total.update(path.read_bytes())
    return total.hexdigest()[:16]


def main() -> None:
    """Make the gallery, and run the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--faces", type=int, default=300_000)
    parser.add_argument("--mean", type=float, default=10)
    parser.add_argument("--steps", nargs="*", default=STEPS)
    parser.add_argument("--digest", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path = arguments.work / f"gallery-{arguments.faces}-{arguments.mean:g}"
    if arguments.inside:
        run_step(arguments.steps[0], str(path))
        return
    if not path.exists():
        append(Gallery.create(str(path), CONTRACT), make_labelled_rows(arguments.faces, arguments.mean), "synthetic")
    million = arguments.faces / 1e6
    for step in arguments.steps:
        command = [sys.executable, __file__, str(arguments.work), "--faces", str(arguments.faces), "--inside"]
        command += ["--mean", str(arguments.mean), "--steps", step]
        phases = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        start = phases[0][1]
        peak = max(mib for _, mib, _ in phases)
        seconds = sum(seconds for _, _, seconds in phases)
        each = (peak - start) / 1024 / million
        print(f"{step}: {seconds:.1f} CPU s, peak {peak:.0f} MiB, {each:.2f} GiB per million faces beyond {start:.0f}")
        for name, mib, part in phases[1:]:
            print(f"    {mib:6.0f} MiB {part:7.1f} s  {name}")
        if arguments.digest:
            print(f"    digest {digest_folder(path / 'reports' / step)}", flush=True)


if __name__ == "__main__":
    main()
