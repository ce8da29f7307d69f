"""Answers of a search as an Arrow table: what is looked for, found, ranked, labelled and decided."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from facepipe.index.decide import Rule, decide
from facepipe.index.exact import scan_index
from facepipe.index.queries import Queries
from facepipe.index.search import Index
from facepipe.schema import OK
from facepipe.types import Float32, Int64

Count = Annotated[int, Field(ge=1)]
Distance = Annotated[float, Field(gt=0, le=2)]
ANSWERS = pa.schema(
    [
        ("query_id", pa.string()),
        ("query_uri", pa.string()),
        ("status", pa.string()),
        ("rank", pa.int32()),
        ("face_id", pa.int64()),
        ("distance", pa.float32()),
        ("identity", pa.string()),
        ("uri", pa.string()),
        ("decision", pa.string()),
    ]
)


@dataclass(frozen=True)
class Find:
    """What is looked for.

    k: nearest faces a query; radius: all faces within this Euclidean distance instead, at most `most` of them
    recall: recall@10 to search with, by default the one the index was built for
    threshold: distance up to which the nearest faces say who it is; decide: by the nearest one, or by their vote
    path: lists (visit the nearest inverted lists), scan (compare with every vector: exact), or auto: the cheaper one
    leave_self_out: a face does not find itself; by default where a gallery is searched with its own faces
    """

    k: Count = 10
    radius: Distance | None = None
    most: Count = 1000
    recall: Annotated[float, Field(gt=0, le=1)] | None = None
    threshold: Distance | None = None
    decide: Rule = "nearest"
    path: Literal["auto", "lists", "scan"] = "auto"
    leave_self_out: bool | None = None


def joined(parts: list[Queries]) -> list[Queries]:
    """One set of queries: a scan reads all vectors once for them."""
    if len(parts) < 2:
        return parts
    arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("own", "vectors", "status")}
    return [Queries(pa.concat_arrays([p.names for p in parts]), pa.concat_arrays([p.uris for p in parts]), **arrays)]


def answers(index: Index, queries: Queries, find: Find, scan: str | None, counts: dict[str, Any]) -> pa.Table:
    """Rows of the answers, in the order of the queries; a query without an answer has one row without a rank.

    scan: the device on which to compare with every vector, instead of visiting lists. Adds to `counts`.
    """
    good = queries.status == OK
    asked, ids, distances = _found(index, queries.vectors[good], queries.own[good], find, scan)
    asked = np.flatnonzero(good)[asked]
    labels = index.labels(ids)
    ranks = _ranks(asked)
    decisions = _decisions(len(good), asked, ranks, labels["identity"], distances, find)
    alone = np.setdiff1d(np.arange(len(good)), asked)
    order = np.argsort(np.concatenate([asked, alone]), kind="stable")
    every = np.concatenate([asked, alone])[order]
    padding = pa.nulls(len(alone))
    columns = {
        "rank": pa.concat_arrays([pa.array(ranks, pa.int32()), padding.cast(pa.int32())]),
        "face_id": pa.concat_arrays([pa.array(ids), padding.cast(pa.int64())]),
        "distance": pa.concat_arrays([pa.array(distances, pa.float32()), padding.cast(pa.float32())]),
        "identity": pa.concat_arrays([*labels["identity"].chunks, padding.cast(pa.string())]),
        "uri": pa.concat_arrays([*labels["uri"].chunks, padding.cast(pa.string())]),
    }
    taken = {name: column.take(pa.array(order)) for name, column in columns.items()}
    chosen = pa.array(every)
    counts["queries"] += len(good)
    counts["rows"] += len(asked)
    for reason in queries.status[~good]:
        counts["bad"][reason] = counts["bad"].get(reason, 0) + 1
    if decisions is not None:
        counts["unknown"] += int((decisions[good] == "Unknown").sum())
        counts["identified"] += int((decisions[good] != "Unknown").sum())
    return pa.table(
        {
            "query_id": queries.names.take(chosen),
            "query_uri": queries.uris.take(chosen),
            "status": pa.array(queries.status[every], pa.string()),
            **taken,
            "decision": pa.nulls(len(every), pa.string())
            if decisions is None
            else pa.array(decisions[every], pa.string(), mask=~good[every]),
        },
        schema=ANSWERS,
    )


def _found(index: Index, vectors: Float32, own: Int64, find: Find, scan: str | None) -> tuple[Int64, Int64, Float32]:
    """Flat (query, face id, distance), by query, nearest first."""
    if find.radius is not None:
        near = index.within(vectors, find.radius, find.most + bool(find.leave_self_out))
        asked = np.repeat(np.arange(len(near)), [len(ids) for ids, _ in near])
        ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in near)])
        distances = np.concatenate([np.empty(0, np.float32), *(d for _, d in near)])
        keep = ids != own[asked] if find.leave_self_out else np.ones(len(ids), bool)
        return asked[keep], ids[keep], distances[keep]
    k = find.k + bool(find.leave_self_out)
    hits = scan_index(index, vectors, k, scan) if scan else index.search(vectors, k)
    if find.leave_self_out:
        hits = hits.exclude_own(own, find.k)
    asked, places = np.nonzero(hits.ids >= 0)
    return asked, hits.ids[asked, places], hits.distances[asked, places]


def _ranks(asked: Int64) -> Int64:
    """1, 2, ... within each run of equal queries."""
    starts = np.flatnonzero(np.diff(asked, prepend=-1))
    return np.arange(len(asked)) - np.repeat(starts, np.diff(np.append(starts, len(asked)))) + 1


def _decisions(
    queries: int,
    asked: Int64,
    ranks: Int64,
    identities: pa.ChunkedArray,
    distances: Float32,
    find: Find,
) -> npt.NDArray[np.object_] | None:
    if find.threshold is None:
        return None
    wide = int(ranks.max(initial=1))
    names = np.full((queries, wide), None, object)
    far = np.full((queries, wide), np.inf, np.float32)
    names[asked, ranks - 1] = identities.to_pylist()
    far[asked, ranks - 1] = distances
    return decide(names, far, find.threshold, find.decide)
