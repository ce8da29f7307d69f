"""Measure the merging of clusters alone: CPU seconds and peak memory, with and without pages of mapped files.

    python tests/bench/merging.py WORK [--faces 300000]

The graph of synthetic faces (galleries.py) is built once in WORK. Run it with PYTHONPATH at another checkout to compare.
"""

import argparse
import resource
import threading
import time
from pathlib import Path

from galleries import make_gallery

from facepipe.curation.clusters.identities import cluster_faces
from facepipe.curation.graph import Graph
from pipelines.graph import GraphConfig, GraphRunConfig, open_graph

_POLL_SECONDS = 0.005


def read_anonymous_bytes() -> int:
    """Read the memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--faces", type=int, default=300_000)
    arguments = parser.parse_args()
    folder = arguments.work / f"graph-{arguments.faces}"
    if not folder.exists():
        gallery = make_gallery(arguments.work / f"gallery-{arguments.faces}", arguments.faces)
        open_graph([gallery], GraphConfig(), GraphRunConfig(), str(folder), print)
        print("the graph is built: run the same command again to measure")
        return
    graph = Graph(str(folder))
    peak = 0

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, read_anonymous_bytes())
            time.sleep(_POLL_SECONDS)

    threading.Thread(target=watch, daemon=True).start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    clusters = cluster_faces(graph)[1]
    seconds = time.process_time() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{arguments.faces} faces, {len(clusters)} clusters, {seconds:.1f} CPU s; peak {after >> 10} MiB "
        f"({before >> 10} before), {peak >> 20} of them without mapped files"
    )


if __name__ == "__main__":
    main()
