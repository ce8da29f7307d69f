"""What two galleries share: identities linked by near faces or by their names. (Shared images are pairs and drops.)"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.duplicates.images import Ints, codes_of

Floats = npt.NDArray[np.float32]


def shared_identities(faces: pa.Table, u: Ints, v: Ints, distance: Floats, threshold: float = 0.35) -> pa.Table:
    """Identities of side 0 and side 1 that are linked by faces within the threshold, or that have the same name.

    identity_0, identity_1, same_name, links (pairs of faces), best and mean distance of those (null if none), faces_0,
    faces_1 (faces that the two have), share (links of all pairs of their faces; capped edges leave some out). Highest
    share first, then the nearest. Names are compared without case, and `_` counts as a space. Within the default
    threshold lie 0.07 % of the pairs of strangers on LFW.
    """
    side, codes = faces["side"].to_numpy(), codes_of(faces["identity"])
    links = _linked(side, codes, (np.asarray(u), np.asarray(v), np.asarray(distance)), threshold)
    table = pa.concat_tables([links, _namesakes(faces)]).group_by(["code_0", "code_1"])
    table = table.aggregate([("links", "sum"), ("best", "min"), ("mean", "max"), ("same_name", "max")])
    table = table.rename_columns(["code_0", "code_1", "links", "best", "mean", "same_name"])
    return _described(table, faces, side, codes)


def _linked(side: npt.NDArray[np.int8], codes: Ints, edges: tuple[Ints, Ints, Floats], threshold: float) -> pa.Table:
    u, v, distance = edges
    counts = (distance <= threshold) & (side[u] != side[v]) & (codes[u] >= 0) & (codes[v] >= 0)
    u, v, distance = u[counts], v[counts], distance[counts]
    zero = np.where(side[u] == 0, u, v)
    pairs = pa.table({"code_0": codes[zero], "code_1": codes[u + v - zero], "distance": distance.astype(np.float32)})
    found = pairs.group_by(["code_0", "code_1"]).aggregate([("distance", f) for f in ("count", "min", "mean")])
    found = found.rename_columns(["code_0", "code_1", "links", "best", "mean"])
    return found.append_column("same_name", pa.array(np.zeros(found.num_rows, bool)))


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


def _described(table: pa.Table, faces: pa.Table, side: npt.NDArray[np.int8], codes: Ints) -> pa.Table:
    pair = [table[f"code_{n}"].to_numpy() for n in (0, 1)]
    known = codes >= 0
    size = int(codes.max(initial=-1)) + 1
    faces_of = [np.bincount(codes[known & (side == n)], minlength=size)[pair[n]] for n in (0, 1)]
    first = np.zeros(size, np.int64)
    first[codes[known]] = np.flatnonzero(known)
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
        "share": pa.array(table["links"].to_numpy() / np.maximum(faces_of[0] * faces_of[1], 1)),
    }
    order = [("share", "descending"), ("best", "ascending"), ("identity_0", "ascending"), ("identity_1", "ascending")]
    return pa.table(columns).sort_by(order)
