"""Group duplicates: one kept image and those that agree with it directly, never only through a chain of others."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import coo_array

from facepipe.curation.duplicates.images import RankedImages
from facepipe.curation.duplicates.pairs import ImageLinks
from facepipe.curation.duplicates.rule import EXACT, KINDS, NEAR, DuplicateRule
from facepipe.types import Bool, Int64

GROUP_SCHEMA = pa.schema(
    [
        ("group", pa.int64()),
        ("kind", pa.string()),
        ("images", pa.int64()),
        ("kept_uri", pa.string()),
        ("kept_side", pa.int8()),
    ]
)


@dataclass(frozen=True)
class ImageGroups:
    """Groups of n images. They are numbered by the uri of the kept image.

    Attributes:
        kept: Image that is kept for each image, (n,): itself if it is kept.
        kind: Index into KINDS of the link to the kept image, (n,), -1 if it is kept itself.
        is_mirrored: Whether it mirrors the kept image, (n,).
        is_turned: Whether it is turned against the kept image, (n,).
        group: Number of its group, (n,), -1 if it is in none.
    """

    kept: Int64
    kind: npt.NDArray[np.int8]
    is_mirrored: Bool
    is_turned: Bool
    group: Int64


def group_images(images: RankedImages, picture: Int64, links: ImageLinks, rule: DuplicateRule) -> ImageGroups:
    """Group each image with the first kept image, in the order of the rule, that it is a duplicate of.

    Args:
        images: n images.
        picture: first image of the same picture, (n,).
        links: at most one link per two pictures.
        rule: what makes groups, and which copy is kept.
    """
    own = np.arange(len(images))
    # Only links of the kinds that make groups.
    links = links.take(links.kind <= KINDS.index(rule.drop))
    first = images.first_with_bytes if rule.drop == EXACT else picture
    p = picture[links.a]
    q = picture[links.b]
    kept = _find_leaders(len(images), p, q)[first]
    # Of two galleries only side 0 loses images, and only to side 1.
    if images.has_two_sides:
        kept = np.where((images.side == 0) & (images.side[kept] == 1), kept, own)

    # The kind of the link between each image and the one that is kept for it.
    is_dropped = kept != own
    kind = np.full(len(images), -1, np.int8)
    is_mirrored = np.zeros(len(images), bool)
    is_turned = np.zeros(len(images), bool)
    kind[is_dropped & (picture == picture[kept])] = KINDS.index(NEAR)
    kind[is_dropped & (images.first_with_bytes == images.first_with_bytes[kept])] = KINDS.index(EXACT)
    # The others have a link between two pictures: look it up.
    rest = np.flatnonzero(is_dropped & (kind < 0))
    if len(rest):
        keys = np.minimum(p, q) * len(images) + np.maximum(p, q)
        order = np.argsort(keys)
        one = picture[rest]
        other = picture[kept[rest]]
        wanted = np.minimum(one, other) * len(images) + np.maximum(one, other)
        at = order[np.searchsorted(keys[order], wanted)]
        kind[rest] = links.kind[at]
        is_mirrored[rest] = links.is_mirrored[at]
        is_turned[rest] = links.turn[at] != 0
    return ImageGroups(kept, kind, is_mirrored, is_turned, _number_groups(images, kept))


def _find_leaders(count: int, p: Int64, q: Int64) -> Int64:
    """Find the leader of each node (count,): in their order, each node without a leader leads its free neighbours."""
    leader = np.arange(count)
    is_free = np.ones(count, bool)
    rows = np.concatenate([p, q])
    columns = np.concatenate([q, p])
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), (count, count)).tocsr()
    # Images are numbered by rank, so that the best copy becomes the leader.
    for node in np.unique(rows).tolist():
        if is_free[node]:
            neighbours = graph.indices[graph.indptr[node] : graph.indptr[node + 1]]
            neighbours = neighbours[is_free[neighbours]]
            leader[neighbours] = node
            is_free[neighbours] = False
            is_free[node] = False
    return leader


def _number_groups(images: RankedImages, kept: Int64) -> Int64:
    """Assign numbers to groups by the uri of what is kept: (n,), -1 for images without copies."""
    is_dropped = kept != np.arange(len(kept))
    leaders = np.unique(kept[is_dropped])
    number = np.full(len(kept), -1)
    number[leaders[np.argsort(images.uri_position[leaders])]] = np.arange(len(leaders))
    return np.where(is_dropped | (number >= 0), number[kept], -1)


def build_group_table(images: RankedImages, groups: ImageGroups) -> pa.Table:
    """Build one row per group: group, kind (of its weakest link), images, kept_uri, kept_side."""
    grouped = np.flatnonzero(groups.group >= 0)
    group = groups.group[grouped]
    count = int(group.max(initial=-1)) + 1
    weakest = np.zeros(count, np.int8)
    np.maximum.at(weakest, group, groups.kind[grouped])
    kept = np.zeros(count, np.int64)
    kept[group] = groups.kept[grouped]
    leaders = images.take(["uri", "side"], kept)
    return pa.table(
        {
            "group": pa.array(np.arange(count)),
            "kind": pa.array(np.array(KINDS, object)[weakest], pa.string()),
            "images": pa.array(np.bincount(group, minlength=count)),
            "kept_uri": leaders["uri"],
            "kept_side": leaders["side"],
        }
    )
