"""What two galleries share: identities linked by near faces or by their names. (Shared images are pairs and drops.)"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates.images import codes_of
from facepipe.nearest.similarity import Pairs
from facepipe.types import Int64


def shared_identities(
    faces: pa.Table, edges: Pairs, first: Int64 | None = None, threshold: float = 0.35, most: int = 32
) -> pa.Table:
    """Identities of side 0 and side 1 that are linked by faces within the threshold, or that have the same name.

    edges: between rows of `faces`, of which only pairs within the threshold count. first (n,): the row that stands for
    a row and its copies in the edges, -1 where a row is no face; by default every row stands for itself. A copy has
    the links of the row that stands for it; under more than `most` names a side the first of them have.

    identity_0, identity_1, same_name, links (pairs of faces), best and mean distance of those (null if none), faces_0,
    faces_1 (faces that the two have), share (links of all pairs of their faces, of which no more than `most` a face of
    the smaller identity can be edges). Highest share first, then the nearest. Names are compared without case, and `_`
    counts as a space. Within the default threshold lie 0.07 % of the pairs of strangers on LFW.
    """
    side, codes = faces["side"].to_numpy(), codes_of(faces["identity"])
    first = np.arange(len(codes)) if first is None else first
    counts = (edges.distance <= threshold) & (first[edges.u] != first[edges.v])  # copies meet in the row they share
    links = _linked(_standing(side, codes, first, most), edges.take(counts))
    table = pa.concat_tables([links, _namesakes(faces)]).group_by(["code_0", "code_1"])
    table = table.aggregate([("links", "sum"), ("best", "min"), ("mean", "max"), ("same_name", "max")])
    table = table.rename_columns(["code_0", "code_1", "links", "best", "mean", "same_name"])
    return _described(table, faces, side, codes, most)


def _standing(side: npt.NDArray[np.int8], codes: Int64, first: Int64, most: int) -> tuple[pa.Table, pa.Table]:
    """Of each side: identities (code) of the faces that a row (first) stands for, and how many faces of each."""
    known = np.flatnonzero((codes >= 0) & (first >= 0))
    faces = pa.table({"first": first[known], "code": codes[known], "side": side[known]})
    counted = faces.group_by(["first", "code", "side"]).aggregate([([], "count_all")])
    counted = counted.sort_by([(name, "ascending") for name in ("side", "first", "code")])
    owners = np.stack([counted[name].to_numpy() for name in ("side", "first")])
    begins = np.ones(counted.num_rows, bool)
    begins[1:] = (owners[:, 1:] != owners[:, :-1]).any(axis=0)
    rank = np.arange(counted.num_rows) - np.maximum.accumulate(np.where(begins, np.arange(counted.num_rows), 0))
    counted = counted.filter(pa.array(rank < most))
    one, other = (counted.filter(pc.equal(counted["side"], n)).drop_columns(["side"]) for n in (0, 1))
    return one, other


def _linked(standing: tuple[pa.Table, pa.Table], edges: Pairs) -> pa.Table:
    """Pairs of identities that edges join, through all faces that the edges' ends stand for."""
    zero, one = (table.rename_columns([f"first_{n}", f"code_{n}", f"count_{n}"]) for n, table in enumerate(standing))
    itself = np.intersect1d(zero["first_0"].to_numpy(), one["first_1"].to_numpy())
    ends = pa.table(
        {
            "first_0": np.concatenate([edges.u, edges.v, itself]),
            "first_1": np.concatenate([edges.v, edges.u, itself]),
            "distance": np.concatenate([edges.distance, edges.distance, np.zeros(len(itself), np.float32)]),
        }
    )
    met = ends.join(zero, "first_0", join_type="inner").join(one, "first_1", join_type="inner")
    links = pc.multiply(met["count_0"], met["count_1"])
    weighed = pc.multiply(met["distance"].cast(pa.float64()), links.cast(pa.float64()))
    met = met.append_column("links", links).append_column("weighed", weighed).group_by(["code_0", "code_1"])
    found = met.aggregate([("links", "sum"), ("distance", "min"), ("weighed", "sum")])
    columns = {
        "code_0": found["code_0"],
        "code_1": found["code_1"],
        "links": found["links_sum"],
        "best": found["distance_min"],
        "mean": pc.divide(found["weighed_sum"], found["links_sum"].cast(pa.float64())),
        "same_name": pa.array(np.zeros(found.num_rows, bool)),
    }
    return pa.table(columns)


def _namesakes(faces: pa.Table) -> pa.Table:
    """Identities of both sides with one name."""
    named = pa.table({"side": faces["side"], "code": codes_of(faces["identity"]), "identity": faces["identity"]})
    named = named.filter(pc.is_valid(named["identity"])).group_by(["side", "code", "identity"]).aggregate([])
    name = pc.utf8_lower(pc.replace_substring(named["identity"], "_", " "))
    named = named.append_column("name", name).select(["side", "code", "name"])
    sides = [named.filter(pc.equal(named["side"], n)).drop_columns(["side"]) for n in (0, 1)]
    both = sides[0].join(sides[1], "name", join_type="inner", left_suffix="_0", right_suffix="_1")
    n = both.num_rows
    columns = {
        **{name: both[name] for name in ("code_0", "code_1")},
        "links": pa.array(np.zeros(n, np.int64)),
        "best": pa.nulls(n, pa.float32()),
        "mean": pa.nulls(n, pa.float64()),
        "same_name": pa.array(np.ones(n, bool)),
    }
    return pa.table(columns)


def _described(table: pa.Table, faces: pa.Table, side: npt.NDArray[np.int8], codes: Int64, most: int) -> pa.Table:
    pair = [table[f"code_{n}"].to_numpy() for n in (0, 1)]
    known = codes >= 0
    size = int(codes.max(initial=-1)) + 1
    faces_of = [np.bincount(codes[known & (side == n)], minlength=size)[pair[n]] for n in (0, 1)]
    first = np.zeros(size, np.int64)
    first[codes[known]] = np.flatnonzero(known)
    possible = np.minimum(faces_of[0] * faces_of[1], most * np.minimum(*faces_of))
    names = [faces["identity"].take(pa.array(first[codes_])) for codes_ in pair]
    columns = {
        "identity_0": names[0],
        "identity_1": names[1],
        "same_name": table["same_name"],
        "links": table["links"],
        "best": table["best"],
        "mean": table["mean"].cast(pa.float32()),
        "faces_0": pa.array(faces_of[0]),
        "faces_1": pa.array(faces_of[1]),
        "share": pa.array(np.minimum(table["links"].to_numpy() / np.maximum(possible, 1), 1.0)),
    }
    order = [("share", "descending"), ("best", "ascending"), ("identity_0", "ascending"), ("identity_1", "ascending")]
    return pa.table(columns).sort_by(order)
