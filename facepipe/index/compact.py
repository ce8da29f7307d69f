"""Which shards to merge: small ones into larger ones as they come, those full of dead, or all when asked."""

from collections.abc import Sequence

from facepipe.index.manifest import ShardEntry

_TIER = 2  # a shard is merged with the newer ones once they are together at least half as large


def due(entries: Sequence[ShardEntry], limit: int, max_dead: float) -> list[list[ShardEntry]]:
    """Groups to be merged, each into one shard of at most `limit` vectors; a group of one loses its dead.

    Newer shards are merged into older ones as they grow, so that there are about log2(n / night) of them and a vector
    is copied as many times.
    """
    groups, newest = [], _newest(entries, limit)
    if len(newest) > 1:
        groups.append(newest)
    groups += [[e] for e in entries if e.dead > max_dead * e.vectors and e not in newest]
    if len(newest) == 1 and newest[0].dead > max_dead * newest[0].vectors:
        groups.append(newest)
    return groups


def _newest(entries: Sequence[ShardEntry], limit: int) -> list[ShardEntry]:
    group, total = [entries[-1]] if entries else [], entries[-1].live if entries else 0
    for entry in reversed(entries[:-1]):
        if entry.live > _TIER * total or entry.live + total > limit:
            break
        group.insert(0, entry)
        total += entry.live
    return group


def everything(entries: Sequence[ShardEntry], limit: int) -> list[list[ShardEntry]]:
    """Groups that leave as few shards as the limit allows, and no dead."""
    groups: list[list[ShardEntry]] = []
    for entry in entries:
        if groups and sum(e.live for e in groups[-1]) + entry.live <= limit:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return [group for group in groups if len(group) > 1 or group[0].dead]
