"""Find identities that two galleries share, by near faces or by name, and judge which are one person.

Shared images are pairs and drops.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates.images import encode_strings
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.one_person.judge import (
    MIN_PROBABILITY,
    MIN_SHOWN,
    NEAR,
    SAME_NAME,
    SAME_PICTURE,
    GroupPairs,
    judge_pairs,
)
from facepipe.curation.one_person.model import OnePersonModel, sum_groups
from facepipe.nearest.similarity import Pairs
from facepipe.types import Float32, Int64

_COPY_SHARE = 0.8  # of the limit of copies: two faces of one picture; with dlib's network 0.2, strangers 0.24 and more
_EXPECTED_SHARE = 0.03  # of the persons of the smaller gallery, that both have, before any face is looked at


@dataclass(frozen=True)
class SharedFaces:
    """Faces of two galleries, and which pairs of them are near.

    Attributes:
        table: n rows as of `gather_faces`.
        edges: pairs of rows.
        first: row that stands for a row and its copies in the edges, (n,), -1 if a row is not a face.
        row: row of each node of the graph, (m,).
        vectors: unit vectors of the nodes, (m, dim).
        density: densities of the nodes, (m,).
        max_neighbours: edges that a face can have.
        copy_distance: distance up to which faces are of copies.
    """

    table: pa.Table
    edges: Pairs
    first: Int64
    row: Int64
    vectors: Float32
    density: Float32
    max_neighbours: int
    copy_distance: float


@dataclass(frozen=True)
class SharedIdentities:
    """What two galleries share.

    Attributes:
        persons: Pairs of identities that are one person, with the probability of that.
        look_alikes: Pairs that are not, or not surely: near faces, or one name.
        faces: Rows of the faces, as of `gather_faces`.
    """

    persons: pa.Table
    look_alikes: pa.Table
    faces: pa.Table


def find_shared_identities(
    faces: pa.Table,
    edges: Pairs,
    first: Int64 | None = None,
    *,
    threshold: float = 0.35,
    max_neighbours: int = 32,
) -> pa.Table:
    """Find identities of side 0 and side 1 that near faces link, or that have the same name.

    Names are compared without case, and `_` counts as a space. 0.07 % of the pairs of strangers on LFW lie within the
    default threshold.

    Args:
        faces: n rows as of `gather_faces`.
        edges: pairs of rows. Only pairs within the threshold count.
        first: row that stands for a row and its copies in the edges, (n,), -1 if a row is not a face. By default every
            row stands for itself. A copy has the links of the row that stands for it. If a row stands for more than
            `max_neighbours` names per side, the first of them have its links.
        threshold: distance up to which faces are near.
        max_neighbours: edges that a face can have.

    Returns:
        One row per pair of identities: identity_0, identity_1, same_name, links (pairs of faces), best and mean
        distance of those (null if none), faces_0, faces_1 (faces that the two have), share (of all
        pairs of their faces, the links; no more than `max_neighbours` per face of the smaller identity can be edges).
        The highest share comes first, then the nearest.
    """
    side = faces["side"].to_numpy()
    codes = encode_strings(faces["identity"])
    first = np.arange(len(codes)) if first is None else first
    is_link = (edges.distance <= threshold) & (first[edges.u] != first[edges.v])  # copies meet in the row they share
    owners_0, owners_1 = _count_owners(side, codes, first, max_neighbours)
    links = _link_identities(owners_0, owners_1, edges.take(is_link))
    # Merge links and equal names into one row per pair of identities.
    table = pa.concat_tables([links, _match_names(faces)]).group_by(["code_0", "code_1"])
    table = table.aggregate([("links", "sum"), ("best", "min"), ("mean", "max"), ("same_name", "max")])
    table = table.rename_columns(["code_0", "code_1", "links", "best", "mean", "same_name"])
    return _describe(table, faces, side, codes, max_neighbours)


def judge_shared_identities(faces: SharedFaces, shared: pa.Table, *, threshold: float) -> SharedIdentities:
    """Judge which pairs of identities are one person.

    Args:
        faces: faces of both galleries.
        shared: of `find_shared_identities`.
        threshold: similarity from which two faces count as one person.

    Returns:
        The rows with a column `probability`, the most likely ones first.
    """
    codes = encode_strings(faces.table["identity"])
    side = faces.table["side"].to_numpy()
    # A name of each gallery is a group of faces.
    label = np.where(codes >= 0, 2 * codes + side, -1)[faces.row]
    ends = np.stack([_find_codes(faces.table, codes, shared[f"identity_{n}"]) * 2 + n for n in (0, 1)], axis=1)
    count = 2 * (int(codes.max(initial=-1)) + 1)
    groups = sum_groups(faces.vectors, faces.density, label, count)
    model = OnePersonModel.fit(
        groups,
        faces.vectors,
        faces.density,
        label,
        compared=ends[groups.size[ends].min(axis=1) > 0],
        threshold=threshold,
    )
    pairs = _compare_groups(faces, shared, groups, ends)
    probability = judge_pairs(model, pairs)
    # A name without a usable face says what its name says.
    table = shared.append_column("probability", pa.array(probability.astype(np.float32)))
    order = [("probability", "descending"), ("share", "descending"), ("best", "ascending")]
    table = table.sort_by([*order, ("identity_0", "ascending"), ("identity_1", "ascending")])
    is_person = pc.greater_equal(table["probability"], MIN_PROBABILITY)
    is_shown = pc.or_(pc.greater_equal(table["probability"], MIN_SHOWN), table["same_name"])
    look_alikes = table.filter(pc.and_(pc.invert(is_person), is_shown))
    return SharedIdentities(table.filter(is_person), look_alikes, faces.table)


def _find_codes(table: pa.Table, codes: Int64, names: pa.ChunkedArray) -> Int64:
    """Find the codes (m,) of names (m,)."""
    row = pc.index_in(names, value_set=pc.unique(table["identity"])).to_numpy()
    first = pc.index_in(pc.unique(table["identity"]), value_set=table["identity"].combine_chunks()).to_numpy()
    return np.asarray(codes[first[row]], np.int64)


def _compare_groups(faces: SharedFaces, shared: pa.Table, groups: Clusters, ends: Int64) -> GroupPairs:
    """Compute the mean similarity of two names' faces, without pairs of faces that are copies."""
    copies = find_shared_identities(
        faces.table,
        faces.edges,
        faces.first,
        threshold=faces.copy_distance * _COPY_SHARE,
        max_neighbours=faces.max_neighbours,
    )
    # Look up the copies of each pair by its names.
    keys = ["identity_0", "identity_1"]
    counted = shared.select(keys).append_column("at", pa.array(np.arange(shared.num_rows)))
    counted = counted.join(copies.select([*keys, "links", "mean"]), keys, join_type="left outer").sort_by("at")
    links = pc.fill_null(counted["links"], 0).to_numpy().astype(np.float64)
    distance = pc.fill_null(counted["mean"], 0.0).to_numpy().astype(np.float64)
    sizes = groups.size[ends]
    pair_count = sizes.prod(axis=1).astype(np.float64)
    links = np.minimum(links, pair_count)
    product = np.einsum("nd,nd->n", groups.sums[ends[:, 0]], groups.sums[ends[:, 1]])
    rest = np.maximum(1, pair_count - links)
    density = (groups.density[ends[:, 0]] + groups.density[ends[:, 1]]) / 2
    similarity = (product - links * (1 - distance**2 / 2)) / rest - density
    has_rest = pair_count > links
    used = [int((groups.size[side::2] > 0).sum()) for side in (0, 1)]
    reason = np.where(shared["same_name"].to_numpy(), SAME_NAME, NEAR)
    is_number = pc.invert(pc.match_substring_regex(shared["identity_0"], r"\pL")).to_numpy()
    return GroupPairs(
        ends=ends,
        similarity=similarity.astype(np.float32),
        sizes=np.where(has_rest[:, None], sizes, 0),
        reason=np.where(links > 0, SAME_PICTURE, reason),
        is_number=is_number.astype(np.int64),
        total=float(used[0]) * float(used[1]),
        expected=max(1.0, _EXPECTED_SHARE * min(used)),
    )


def _count_owners(side: npt.NDArray[np.int8], codes: Int64, first: Int64, max_owners: int) -> tuple[pa.Table, pa.Table]:
    """Count the faces of each identity (code) that each row (first) stands for; one table per side."""
    known = np.flatnonzero((codes >= 0) & (first >= 0))
    faces = pa.table({"first": first[known], "code": codes[known], "side": side[known]})
    counts = faces.group_by(["first", "code", "side"]).aggregate([([], "count_all")])
    counts = counts.sort_by([("side", "ascending"), ("first", "ascending"), ("code", "ascending")])
    # Keep the first identities of each row.
    owners = np.stack([counts["side"].to_numpy(), counts["first"].to_numpy()])
    starts = np.ones(counts.num_rows, bool)
    starts[1:] = (owners[:, 1:] != owners[:, :-1]).any(axis=0)
    number = np.arange(counts.num_rows)
    rank = number - np.maximum.accumulate(np.where(starts, number, 0))
    counts = counts.filter(pa.array(rank < max_owners))
    owners_0 = counts.filter(pc.equal(counts["side"], 0)).drop_columns(["side"])
    owners_1 = counts.filter(pc.equal(counts["side"], 1)).drop_columns(["side"])
    return owners_0, owners_1


def _link_identities(owners_0: pa.Table, owners_1: pa.Table, edges: Pairs) -> pa.Table:
    """Link pairs of identities that edges join, through all faces that the edges' ends stand for."""
    owners_0 = owners_0.rename_columns(["first_0", "code_0", "count_0"])
    owners_1 = owners_1.rename_columns(["first_1", "code_1", "count_1"])
    # A row that stands for faces of both sides links them at distance 0.
    shared = np.intersect1d(owners_0["first_0"].to_numpy(), owners_1["first_1"].to_numpy())
    # Either end of an edge may be of side 0.
    ends = pa.table(
        {
            "first_0": np.concatenate([edges.u, edges.v, shared]),
            "first_1": np.concatenate([edges.v, edges.u, shared]),
            "distance": np.concatenate([edges.distance, edges.distance, np.zeros(len(shared), np.float32)]),
        }
    )
    # An edge counts for all faces that its ends stand for.
    met = ends.join(owners_0, "first_0", join_type="inner").join(owners_1, "first_1", join_type="inner")
    links = pc.multiply(met["count_0"], met["count_1"])
    weighted = pc.multiply(met["distance"].cast(pa.float64()), links.cast(pa.float64()))
    met = met.append_column("links", links).append_column("weighed", weighted).group_by(["code_0", "code_1"])
    sums = met.aggregate([("links", "sum"), ("distance", "min"), ("weighed", "sum")])
    return pa.table(
        {
            "code_0": sums["code_0"],
            "code_1": sums["code_1"],
            "links": sums["links_sum"],
            "best": sums["distance_min"],
            "mean": pc.divide(sums["weighed_sum"], sums["links_sum"].cast(pa.float64())),
            "same_name": pa.array(np.zeros(sums.num_rows, bool)),
        }
    )


def _match_names(faces: pa.Table) -> pa.Table:
    """Pair the identities of both sides that have one name."""
    # The names of each side, in the form in which they are compared.
    names = pa.table({"side": faces["side"], "code": encode_strings(faces["identity"]), "identity": faces["identity"]})
    names = names.filter(pc.is_valid(names["identity"])).group_by(["side", "code", "identity"]).aggregate([])
    name = pc.utf8_lower(pc.replace_substring(names["identity"], "_", " "))
    names = names.append_column("name", name).select(["side", "code", "name"])
    names_0 = names.filter(pc.equal(names["side"], 0)).drop_columns(["side"])
    names_1 = names.filter(pc.equal(names["side"], 1)).drop_columns(["side"])
    both = names_0.join(names_1, "name", join_type="inner", left_suffix="_0", right_suffix="_1")
    count = both.num_rows
    return pa.table(
        {
            "code_0": both["code_0"],
            "code_1": both["code_1"],
            "links": pa.array(np.zeros(count, np.int64)),
            "best": pa.nulls(count, pa.float32()),
            "mean": pa.nulls(count, pa.float64()),
            "same_name": pa.array(np.ones(count, bool)),
        }
    )


def _describe(
    table: pa.Table, faces: pa.Table, side: npt.NDArray[np.int8], codes: Int64, max_neighbours: int
) -> pa.Table:
    """Replace codes by names, and add counts of faces and the share of linked pairs."""
    code_0 = table["code_0"].to_numpy()
    code_1 = table["code_1"].to_numpy()
    is_known = codes >= 0
    size = int(codes.max(initial=-1)) + 1
    faces_0 = np.bincount(codes[is_known & (side == 0)], minlength=size)[code_0]
    faces_1 = np.bincount(codes[is_known & (side == 1)], minlength=size)[code_1]
    row = np.zeros(size, np.int64)  # any row of each identity, for its name
    row[codes[is_known]] = np.flatnonzero(is_known)
    # Edges per face are limited, so that more links than this are not possible.
    possible = np.minimum(faces_0 * faces_1, max_neighbours * np.minimum(faces_0, faces_1))
    shared = pa.table(
        {
            "identity_0": faces["identity"].take(pa.array(row[code_0])),
            "identity_1": faces["identity"].take(pa.array(row[code_1])),
            "same_name": table["same_name"],
            "links": table["links"],
            "best": table["best"],
            "mean": table["mean"].cast(pa.float32()),
            "faces_0": pa.array(faces_0),
            "faces_1": pa.array(faces_1),
            "share": pa.array(np.minimum(table["links"].to_numpy() / np.maximum(possible, 1), 1.0)),
        }
    )
    order = [("share", "descending"), ("best", "ascending"), ("identity_0", "ascending"), ("identity_1", "ascending")]
    return shared.sort_by(order)
