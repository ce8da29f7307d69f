"""Find identities that two galleries share, by near faces or by name.

Shared images are pairs and drops.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates.images import encode_strings
from facepipe.nearest.similarity import Pairs
from facepipe.types import Int64


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
