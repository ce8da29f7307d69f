"""Which shards to merge: small ones into larger ones as they come, those full of deleted faces, or all on request."""

from collections.abc import Sequence

from facepipe.index.manifest import ShardEntry

_TIER = 2  # a shard is merged with the newer ones once they are together at least half as large


def plan_merges(shards: Sequence[ShardEntry], limit: int, max_deleted: float) -> list[list[ShardEntry]]:
    """Plan the groups of shards to merge now, each into one shard. A group of one loses its deleted vectors.

    Newer shards are merged into older ones as they grow. So there are about log2(n / night) shards, and a vector is
    copied as many times.

    Args:
        shards: oldest first.
        limit: maximum vectors per shard.
        max_deleted: share of deleted vectors above which a shard is rewritten.
    """
    newest = _group_newest(shards, limit)
    groups = []
    if len(newest) > 1:
        groups.append(newest)
    # Shards full of deleted vectors are rewritten alone, unless the merge above cleans them anyway.
    groups += [[shard] for shard in shards if shard.dead > max_deleted * shard.vectors and shard not in newest]
    if len(newest) == 1 and newest[0].dead > max_deleted * newest[0].vectors:
        groups.append(newest)
    return groups


def plan_full_merge(shards: Sequence[ShardEntry], limit: int) -> list[list[ShardEntry]]:
    """Plan the groups that leave as few shards as the limit allows, and no deleted vectors."""
    groups: list[list[ShardEntry]] = []
    for shard in shards:
        if groups and sum(other.live for other in groups[-1]) + shard.live <= limit:
            groups[-1].append(shard)
        else:
            groups.append([shard])
    return [group for group in groups if len(group) > 1 or group[0].dead]


def replace_group(
    shards: Sequence[ShardEntry], group: Sequence[ShardEntry], merged: ShardEntry | None
) -> list[ShardEntry]:
    """Put a merged shard in the place of its group's oldest shard; None if no vector is left."""
    position = shards.index(group[0])
    others = [shard for shard in shards if shard not in group]
    others[position:position] = [] if merged is None else [merged]
    return others


def _group_newest(shards: Sequence[ShardEntry], limit: int) -> list[ShardEntry]:
    """Group the newest shard with the older ones, as long as these are at most about as large as the group."""
    if not shards:
        return []
    group = [shards[-1]]
    total = shards[-1].live
    # Take older shards until one is much larger than the group, or the group would exceed the limit.
    for shard in reversed(shards[:-1]):
        if shard.live > _TIER * total or shard.live + total > limit:
            break
        group.insert(0, shard)
        total += shard.live
    return group
