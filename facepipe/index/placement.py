"""Where an index is opened for a search on several nodes: all shards by every worker, or each shard by one owner.

`copies` costs a copy of the index per node. `owners` costs one per cluster, a message to every owner per query, and a
merge of their answers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from facepipe.index.cost import estimate_lists
from facepipe.index.manifest import INDEX, Manifest, ShardEntry
from facepipe.index.open_shards import MAX_MERGED_BYTES
from facepipe.index.owners import OwnedShard
from facepipe.index.plan import format_size

Placement = Literal["copies", "owners"]

# Share of a node's memory that the files of an index may take, if every node has all of them. Candidates lie anywhere
# in them, so that what does not fit is read from a disk again and again.
_MEMORY_SHARE = 0.5
# Bytes per second that a node fetches from an object store.
_FETCH_RATE = 200e6
# Nanoseconds of one process per query and owner, to take and merge what the owners return. Measured: 2 to 4 µs of CPU
# for ten neighbours (docs/scale.md).
_MERGE = 5_000.0


@dataclass(frozen=True)
class NodeRoom:
    """What a node has for shards.

    Attributes:
        node: Its id.
        memory: Bytes of memory.
        cpus: CPUs.
    """

    node: str
    memory: int
    cpus: int


@dataclass(frozen=True)
class PlacedSearch:
    """A search that is to be placed.

    Attributes:
        queries: Number of queries.
        nprobe: Lists visited per query.
        rescore: Candidates re-scored per query.
        worker_cpus: CPUs per worker, if every worker opens all shards.
        is_remote: Whether the index lies in an object store.
    """

    queries: int
    nprobe: int
    rescore: int
    worker_cpus: int
    is_remote: bool


@dataclass(frozen=True)
class ChosenPlacement:
    """Where the shards are opened, and why.

    Attributes:
        placement: copies or owners.
        reason: For people.
    """

    placement: Placement
    reason: str


def count_bytes(entry: ShardEntry) -> int:
    """Count the bytes of a shard's files, all of which a search reads."""
    return sum(file.bytes for file in entry.files.values())


def choose_placement(manifest: Manifest, nodes: Sequence[NodeRoom], search: PlacedSearch) -> ChosenPlacement:
    """Choose where to open the shards, by their bytes, the nodes' memory and the number of queries."""
    if len(nodes) < 2:
        return ChosenPlacement("copies", "there is one node, which opens all shards either way")
    if len(manifest.shards) < 2:
        return ChosenPlacement("copies", f"the index has {len(manifest.shards)} shard, which cannot be divided")
    total = manifest.total_bytes
    needed = _count_copies(manifest, nodes, search)
    smallest = min(node.memory for node in nodes)
    if needed > _MEMORY_SHARE * smallest:
        return ChosenPlacement(
            "owners",
            f"a copy of all shards takes {format_size(needed)} per node, and the node with the least memory has "
            f"{format_size(smallest)}; an owner's share of {len(nodes)} takes {format_size(total // len(nodes))}",
        )
    if not search.is_remote:
        return ChosenPlacement(
            "copies",
            f"all shards take {format_size(needed)} per node, and the node with the least memory has "
            f"{format_size(smallest)}",
        )
    # What owners save of fetching, against what they cost in searching and merging.
    saved = (total - total / len(nodes)) / _FETCH_RATE
    extra = _estimate_seconds(manifest, nodes, search, owners=len(nodes)) - _estimate_seconds(
        manifest, nodes, search, owners=0
    )
    times = f"fetching takes {saved:.0f} s less with owners, and {search.queries} queries {max(0.0, extra):.0f} s more"
    return ChosenPlacement("owners" if saved > extra else "copies", times)


def _count_copies(manifest: Manifest, nodes: Sequence[NodeRoom], search: PlacedSearch) -> int:
    """Count the bytes per node if every worker opens all shards: mapped files once, merged codes once per worker."""
    codes = sum(entry.files[INDEX].bytes for entry in manifest.shards)
    workers = max(max(1, node.cpus // search.worker_cpus) for node in nodes)
    return manifest.total_bytes + (workers * codes if codes <= MAX_MERGED_BYTES else 0)


def _estimate_seconds(manifest: Manifest, nodes: Sequence[NodeRoom], search: PlacedSearch, *, owners: int) -> float:
    """Estimate the time of all queries; without owners every worker opens all shards."""
    # Shards are merged in memory if they are small enough, and are then one to search.
    codes = sum(entry.files[INDEX].bytes for entry in manifest.shards)
    parts = max(1, owners)
    shards = parts if codes / parts <= MAX_MERGED_BYTES else len(manifest.shards)
    per_query = estimate_lists(
        manifest.live,
        lists=max(1, manifest.template.lists),
        shards=shards,
        nprobe=search.nprobe,
        rescore=search.rescore,
        dim=manifest.dim,
    )
    cores = max(1, sum(node.cpus for node in nodes))
    return search.queries * max(per_query / cores, owners * _MERGE) / 1e9


def divide_shards(
    shards: Iterable[OwnedShard], rooms: Sequence[NodeRoom], held: Sequence[int] | None = None
) -> list[tuple[OwnedShard, ...]]:
    """Divide shards among rooms, so that each holds bytes in proportion to its memory.

    Args:
        shards: to divide.
        rooms: a room per owner.
        held: bytes that each room holds already.

    Returns:
        The shards of each room, oldest first. A room may get none.
    """
    load = list(held) if held is not None else [0] * len(rooms)
    shares: list[list[OwnedShard]] = [[] for _ in rooms]
    # The largest first, each to the room that is then the least full.
    for shard in sorted(shards, key=lambda one: (-count_bytes(one.entry), one.age)):
        size = count_bytes(shard.entry)
        chosen = min(range(len(rooms)), key=lambda n: ((load[n] + size) / max(1, rooms[n].memory), n))
        load[chosen] += size
        shares[chosen].append(shard)
    return [tuple(sorted(share, key=lambda one: one.age)) for share in shares]
