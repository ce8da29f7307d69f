"""Bulk search on four Ray nodes: owners of shards against a copy per worker and against one process.

    python tests/bench/owners.py [--faces 300000] [--queries 20000] [--nodes 4] [--memory 2] [--shards 8] [--kill]
        [--exact] [--gallery FOLDER]

The gallery is synthetic (galleries.py), and the queries are new faces of its people. All nodes are on this machine, with
one CPU each, or four if there is one, and a memory cgroup each. For every way: queries per second as a ratio to one
process, whether the answers are the same to the bit, the largest private memory (USS) and resident memory of a worker,
that of the driver, the most that the processes of a node held without the page cache, the number of owners that were
started, and the recall against exact search. With --kill, one node that is not the driver's is killed when the first block is finished, or an owner if there is
one node. --owners says how many owners share the nodes.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before tests/, which has a folder of the package's name

import ray_nodes
from bench.galleries import Faces, make_gallery
from ray_nodes import Cluster

from facepipe.arrow import to_float_lists
from facepipe.config import build
from facepipe.gallery import Gallery
from facepipe.index import manifest as manifests
from facepipe.index.exact import scan_index
from facepipe.index.search import Index
from pipelines.index import IndexConfig
from pipelines.index import run as build_index
from pipelines.search import SearchConfig, SearchSummary
from pipelines.search import run as search

MIB = 1 << 20


@dataclass
class Watch:
    """Samples the memory of processes while a search runs."""

    nodes: Cluster | None
    driver: int = 0
    workers: dict[int, int] = field(default_factory=dict)
    mapped: dict[int, int] = field(default_factory=dict)
    owners: set[int] = field(default_factory=set)
    node: int = 0
    done: bool = False

    def run(self) -> None:
        """Sample until the search is done."""
        while not self.done:
            self.driver = max(self.driver, psutil.Process().memory_full_info().uss)
            for node in self.nodes.nodes if self.nodes else ():
                self.node = max(self.node, node.count_held())
                for process, title in node.workers():
                    if "IDLE" in title:
                        continue
                    if "LazyOwner" in title:
                        self.owners.add(process.pid)
                    with suppress(psutil.Error):
                        memory = process.memory_full_info()
                        self.workers[process.pid] = max(self.workers.get(process.pid, 0), memory.uss)
                        self.mapped[process.pid] = max(self.mapped.get(process.pid, 0), memory.rss)
            time.sleep(0.3)


def measure(
    path: str,
    queries: Path,
    out: Path,
    settings: dict[str, object],
    nodes: Cluster | None,
    *,
    kill: bool,
    find: dict[str, object],
) -> tuple[pa.Table, SearchSummary, Watch, float]:
    """Search, and measure the memory and the seconds after the first block."""
    watch = Watch(nodes)
    thread = threading.Thread(target=watch.run)
    thread.start()
    first: list[tuple[float, int]] = []

    def note(summary: SearchSummary) -> None:
        if not first:
            first.append((time.perf_counter(), summary.queries))
            if kill and nodes is not None:
                if len(nodes.nodes) > 1:
                    nodes.nodes[-1].kill()
                else:
                    next(process for process, title in nodes.nodes[0].workers() if "LazyOwner" in title).kill()

    try:
        summary = search(build(SearchConfig, {"run": settings, "search": find}), path, str(queries), str(out), note)
        ended = time.perf_counter()
    finally:
        watch.done = True
        thread.join()
    began, searched = first[0]
    return pq.read_table(out), summary, watch, (summary.queries - searched) / max(1e-9, ended - began)


@contextmanager
def start_nodes(count: int, memory: int) -> Iterator[Cluster]:
    """Start nodes one after the other, so that each has the machine to itself while it starts."""
    # A busy machine answers late.
    ray_nodes._SOON.update({"RAY_health_check_period_ms": "3000", "RAY_health_check_failure_threshold": "8"})
    nodes = Cluster((1 if count > 1 else 4,), memory=memory)
    try:
        nodes.start()
        for _ in range(count - 1):
            nodes.add()
        yield nodes
    finally:
        nodes.stop()


def main() -> None:
    """Print a row per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=300_000)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--memory", type=float, default=2.0, help="GiB per node")
    parser.add_argument("--owners", type=int)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--block", type=int, default=2_000)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--gallery", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        path = args.gallery or folder / "g"
        if not Gallery.exists(str(path)):
            make_gallery(path, args.faces)
        if not manifests.exists(str(path)):
            size = -(-args.faces // args.shards)
            build_index(build(IndexConfig, {"index": {"shard_vectors": size}}), str(path))
        manifest = manifests.load(str(path))
        vectors = Faces().draw(np.random.default_rng(1).integers(0, args.faces // 10, args.queries), 10**9)
        pq.write_table(
            pa.table({"embedding": to_float_lists(vectors)}), folder / "q.parquet", row_group_size=args.block
        )
        codes = sum(entry.files["index.faiss"].bytes for entry in manifest.shards)
        print(
            f"{manifest.live} faces in {len(manifest.shards)} shards, {manifest.total_bytes / MIB:.0f} MiB "
            f"({codes / MIB:.0f} of codes), {manifest.template.factory}; {args.queries} queries in blocks of {args.block}"
        )
        find = {"path": "scan" if args.exact else "lists"}
        block = {"block": args.block}
        ways = {"one process": ({"runner": "inline", **block}, False)}
        ways["copies"] = ({"runner": "ray", "cpus": 1, "placement": "copies", **block}, False)
        ways["owners"] = ({"runner": "ray", "placement": "owners", "owners": args.owners, **block}, False)
        if args.kill:
            ways["owners, one killed"] = (ways["owners"][0], True)
        print(
            f"{'way':24} {'ratio':>6} {'equal':>6} {'worker MiB':>11} {'RSS MiB':>8} {'driver MiB':>11} {'node MiB':>9} {'owners':>7} {'seconds':>8}"
        )
        expected = None
        rate = 0.0
        with start_nodes(args.nodes, int(args.memory * 1024) * MIB) as nodes:
            for way, (settings, kill) in ways.items():
                os.environ.pop("RAY_ADDRESS", None)
                is_on_ray = settings["runner"] == "ray"
                if is_on_ray:
                    os.environ.update(nodes.environment)
                out = folder / f"{way.replace(' ', '_')}.parquet"
                table, summary, watch, per_second = measure(
                    str(path), folder / "q.parquet", out, settings, nodes if is_on_ray else None, kill=kill, find=find
                )
                expected = table if expected is None else expected
                rate = rate or per_second
                print(
                    f"{way:24} {per_second / rate:6.2f} {'yes' if table.equals(expected) else 'NO':>6} "
                    f"{max(watch.workers.values(), default=0) / MIB:11.0f} {max(watch.mapped.values(), default=0) / MIB:8.0f} "
                    f"{watch.driver / MIB:11.0f} {watch.node / MIB:9.0f} {len(watch.owners):7} {summary.seconds:8.1f}",
                    flush=True,
                )
        index = Index(str(path))
        truth = scan_index(index, vectors[:500], 10).ids
        found = index.search(vectors[:500], 10).ids
        share = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)])
        print(f"recall@10 of the first 500 queries {1.0 if args.exact else share:.4f} (stated {summary.recall})")


if __name__ == "__main__":
    main()
