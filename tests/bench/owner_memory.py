"""Owners of shards as plain processes, without Ray: memory and CPU seconds of each, and whether the answers are the same.

    python tests/bench/owner_memory.py GALLERY [--queries 12000] [--owners 1 2 4]

The gallery is made by galleries.py and has an index; the queries are new faces of its people. USS is private memory, of
which what the libraries take is subtracted. RSS includes mapped files, which the system may take back.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
from galleries import Faces

from facepipe.index import manifest as manifests
from facepipe.index.exact import scan_index
from facepipe.index.manifest import Manifest
from facepipe.index.owners import OwnedShard, OwnedShards, OwnerShare, ScanStep, ShardOwner
from facepipe.index.placement import NodeRoom, count_bytes, divide_shards
from facepipe.index.search import Index

MIB = 1 << 20
BLOCK = 1000


@dataclass
class Usage:
    """What an owner used: private bytes above the libraries', resident bytes, CPU seconds since it opened its shards."""

    private: int = 0
    resident: int = 0
    cpu: float = 0.0


def serve(pipe: Connection, share: OwnerShare) -> None:
    """Answer calls until None comes, then return the usage."""
    process = psutil.Process()
    libraries = process.memory_full_info().uss
    owner = ShardOwner(share)
    usage = Usage()
    opened = os.times()
    while (call := pipe.recv()) is not None:
        method, arguments = call
        result = getattr(owner, method)(*arguments)
        memory = process.memory_full_info()
        usage.private = max(usage.private, memory.uss - libraries)
        usage.resident = max(usage.resident, memory.rss)
        pipe.send(result)
    times = os.times()
    usage.cpu = times.user + times.system - opened.user - opened.system
    pipe.send(usage)


class ProcessCalls:
    """Owners in processes of their own."""

    def __init__(self, gallery: str, manifest: Manifest, owners: int):
        shards = [OwnedShard(entry, age) for age, entry in enumerate(manifest.shards)]
        rooms = [NodeRoom(str(n), 1 << 30, 1) for n in range(owners)]
        self.shares = [share for share in divide_shards(shards, rooms) if share]
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for share in self.shares:
            here, there = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(
                target=serve, args=(there, OwnerShare(gallery, share, 1))
            )
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    @property
    def owners(self) -> int:
        return len(self._pipes)

    def put(self, value: Any) -> Any:
        return value

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        called = self._pipes[: len(arguments)]
        for pipe, given in zip(called, arguments, strict=True):
            pipe.send((method, given))
        return [pipe.recv() for pipe in called]

    def call_scan(self, arguments: Sequence[tuple[Any, ...]]) -> list[ScanStep]:
        return self.call("scan_lists", arguments)

    def fetch(self, references: Sequence[Any]) -> list[Any]:
        return list(references)

    def close(self) -> list[Usage]:
        """End the processes and return what they used."""
        usages = []
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            usages.append(pipe.recv())
            process.join()
        return usages


def main() -> None:
    """Print a row per number of owners."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gallery")
    parser.add_argument("--queries", type=int, default=12_000)
    parser.add_argument("--owners", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    manifest = manifests.load(args.gallery)
    people = np.random.default_rng(1).integers(0, manifest.live // 10, args.queries)
    queries = Faces().draw(people, 10**9)
    blocks = [queries[at : at + BLOCK] for at in range(0, len(queries), BLOCK)]

    # One process with all shards, and the recall of its answers.
    index = Index(args.gallery, threads=1, merge=True)
    began = time.process_time()
    expected = [index.search(block) for block in blocks]
    alone = time.process_time() - began
    truth = scan_index(index, blocks[0], 10).ids
    found = expected[0].ids
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)])
    print(
        f"{manifest.live} faces, {len(manifest.shards)} shards, {manifest.total_bytes / MIB:.0f} MiB; {len(queries)} "
        f"queries, recall@10 {recall:.3f}; one process {alone:.1f} CPU seconds"
    )

    print("owners  equal  MiB of files, largest  USS, largest  RSS, largest  CPU s: owners  this process  ratio")
    for owners in args.owners:
        opened: list[ProcessCalls] = []

        def open_elsewhere(
            manifest: Manifest, owners: int = owners, opened: list[ProcessCalls] = opened
        ) -> OwnedShards:
            opened.append(ProcessCalls(args.gallery, manifest, owners))
            return OwnedShards(opened[-1])

        owned = Index(args.gallery, open_elsewhere=open_elsewhere)
        began = time.process_time()
        hits = [owned.search(block) for block in blocks]
        here = time.process_time() - began
        calls = opened[-1]
        usages = calls.close()
        equal = all(
            np.array_equal(a.ids, b.ids) and np.array_equal(a.distances, b.distances)
            for a, b in zip(hits, expected, strict=True)
        )
        files = max(sum(count_bytes(shard.entry) for shard in share) for share in calls.shares)
        cpu = sum(usage.cpu for usage in usages)
        print(
            f"{calls.owners:6}  {'yes' if equal else 'NO':>5}  {files / MIB:21.0f}  "
            f"{max(usage.private for usage in usages) / MIB:12.0f}  "
            f"{max(usage.resident for usage in usages) / MIB:12.0f}  {cpu:13.1f}  {here:12.1f}  {(cpu + here) / alone:5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
