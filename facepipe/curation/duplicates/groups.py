"""Groups of duplicates: one kept image and those that agree with it directly, never only through a chain of others."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array

from facepipe.curation.duplicates.images import Images
from facepipe.curation.duplicates.pairs import Links
from facepipe.curation.duplicates.rule import EXACT, KINDS, NEAR, DuplicateRule
from facepipe.types import Bool, Int64


@dataclass(frozen=True)
class Grouping:
    """By image: kept (the image that stays for it, itself where it stays), kind (index into KINDS, -1 where it stays),
    mirrored, and group (-1 where it is alone). Groups are numbered by the uri of what is kept.
    """

    kept: Int64
    kind: npt.NDArray[np.int8]
    mirrored: Bool
    group: Int64


def grouped(images: Images, picture: Int64, links: Links, rule: DuplicateRule) -> Grouping:
    """Every image with the first (in the order of the rule) of those that stay and that it is a duplicate of."""
    own = np.arange(len(images))
    links = links.take(links.kind <= KINDS.index(rule.drop))
    first = images.same_bytes if rule.drop == EXACT else picture
    p, q = picture[links.a], picture[links.b]
    leader = _leaders(len(images), p, q)
    kept = leader[first]
    if images.compares:
        kept = np.where((images.side == 0) & (images.side[kept] == 1), kept, own)
    kind, mirrored = _links_to_kept(images, picture, (p, q, links), kept)
    return Grouping(kept, kind, mirrored, _numbered(images, kept))


def _leaders(n: int, p: Int64, q: Int64) -> Int64:
    """(n,) the leader of each of n nodes. In their order, each node that follows none leads its free neighbours."""
    leader = np.arange(n)
    free = np.ones(n, bool)
    ends = (np.concatenate([p, q]), np.concatenate([q, p]))
    graph = coo_array((np.ones(len(ends[0]), bool), ends), (n, n)).tocsr()
    for node in np.unique(ends[0]).tolist():
        if free[node]:
            near = graph.indices[graph.indptr[node] : graph.indptr[node + 1]]
            near = near[free[near]]
            leader[near], free[near], free[node] = node, False, False
    return leader


def _links_to_kept(
    images: Images, picture: Int64, pairs: tuple[Int64, Int64, Links], kept: Int64
) -> tuple[npt.NDArray[np.int8], Bool]:
    """(kind, mirrored) of the link between each image and what is kept for it."""
    n, own = len(images), np.arange(len(images))
    p, q, links = pairs
    kind = np.full(n, -1, np.int8)
    mirrored = np.zeros(n, bool)
    kind[(kept != own) & (picture == picture[kept])] = KINDS.index(NEAR)
    kind[(kept != own) & (images.same_bytes == images.same_bytes[kept])] = KINDS.index(EXACT)
    rest = np.flatnonzero((kept != own) & (kind < 0))
    if len(rest):
        keys = np.minimum(p, q) * n + np.maximum(p, q)
        order = np.argsort(keys)
        one, other = picture[rest], picture[kept[rest]]
        at = order[np.searchsorted(keys[order], np.minimum(one, other) * n + np.maximum(one, other))]
        kind[rest], mirrored[rest] = links.kind[at], links.mirrored[at]
    return kind, mirrored


def _numbered(images: Images, kept: Int64) -> Int64:
    dropped = kept != np.arange(len(kept))
    stays = np.unique(kept[dropped])
    names = images.table.select(["uri", "side"]).take(pa.array(stays))
    order = pc.sort_indices(names, sort_keys=[("uri", "ascending"), ("side", "ascending")]).to_numpy()
    number = np.full(len(kept), -1)
    number[stays[order]] = np.arange(len(stays))
    return np.where(dropped | (number >= 0), number[kept], -1)


def as_table(images: Images, grouping: Grouping) -> pa.Table:
    """One row a group: group, kind (of its weakest link), images, kept_uri, kept_side."""
    within = np.flatnonzero(grouping.group >= 0)
    group = grouping.group[within]
    count = int(group.max(initial=-1)) + 1
    weakest, kept = np.zeros(count, np.int8), np.zeros(count, np.int64)
    np.maximum.at(weakest, group, grouping.kind[within])
    kept[group] = grouping.kept[within]
    stays = images.table.select(["uri", "side"]).take(pa.array(kept))
    columns = {
        "group": pa.array(np.arange(count)),
        "kind": pa.array(np.array(KINDS, object)[weakest], pa.string()),
        "images": pa.array(np.bincount(group, minlength=count)),
        "kept_uri": stays["uri"],
        "kept_side": stays["side"],
    }
    return pa.table(columns)
