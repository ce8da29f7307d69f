"""Results of a search as an Arrow table: the options of a search, ranks, labels and decisions."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from facepipe.index.decide import UNKNOWN, DecisionRule, decide_identities
from facepipe.index.exact import scan_index, scan_within
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
        ("person", pa.int64()),
    ]
)
OLD_NAMES = ANSWERS.names[:-1]
"""Columns of the answers of older versions."""


@dataclass(frozen=True)
class SearchOptions:
    """What a search looks for.

    Attributes:
        k: Neighbours per query.
        radius: Maximum Euclidean distance; finds the faces within it instead of the k nearest.
        most: Maximum faces per query of a search by radius.
        recall: Share of the true faces to find, of the k nearest or within the radius; by default the one that the
            index was built for.
        threshold: Maximum distance of a face that identifies a query; anything farther is Unknown.
        decide: Rule for the identity: by the nearest face, or by vote of the faces within the threshold.
        path: lists (visit the nearest inverted lists), scan (compare with every vector: exact), or auto: the cheaper.
        leave_self_out: Whether a face does not find itself; by default if a gallery is searched with its own faces.
    """

    k: Count = 10
    radius: Distance | None = None
    most: Count = 1000
    recall: Annotated[float, Field(gt=0, le=1)] | None = None
    threshold: Distance | None = None
    decide: DecisionRule = "nearest"
    path: Literal["auto", "lists", "scan"] = "auto"
    leave_self_out: bool | None = None


@dataclass
class SearchCounts:
    """Counts of a search. Stored as JSON with each part of the results.

    Attributes:
        queries: All queries.
        rows: Faces found.
        identified: Queries with an identity.
        unknown: Queries without one.
        bad: Queries that could not be searched, by reason.
    """

    queries: int = 0
    rows: int = 0
    identified: int = 0
    unknown: int = 0
    bad: dict[str, int] = field(default_factory=dict)


class _FlatHits(NamedTuple):
    """Hits one below the other, by query, nearest first: (m,) each."""

    queries: Int64
    ids: Int64
    distances: Float32


def answer_queries(
    index: Index, parts: Iterable[Queries], options: SearchOptions, device: str | None
) -> tuple[pa.Table, SearchCounts]:
    """Search for the queries of all parts.

    Args:
        index: that is searched.
        parts: queries, some thousands at a time.
        options: what to look for.
        device: on which to compare with every vector, instead of visiting lists.

    Returns:
        Rows of `ANSWERS`, in the order of the queries, and their counts. A query without a hit has one row without a
        rank.
    """
    if device is not None:
        # A scan reads all vectors once for all of its queries.
        all_parts = list(parts)
        parts = [Queries.concatenate(all_parts)] if all_parts else []
    counts = SearchCounts()
    tables = [_answer_part(index, queries, options, device, counts) for queries in parts]
    return pa.concat_tables(tables) if tables else ANSWERS.empty_table(), counts


def _answer_part(
    index: Index, queries: Queries, options: SearchOptions, device: str | None, counts: SearchCounts
) -> pa.Table:
    """Search for some queries and add to the counts."""
    # Search with the usable queries; query_rows (m,) are the positions of the hits' queries among all.
    usable = queries.status == OK
    hits = _find_hits(index, queries.vectors[usable], queries.own[usable], options, device)
    query_rows = np.flatnonzero(usable)[hits.queries]
    labels = index.get_labels(hits.ids)
    ranks = _number_ranks(query_rows)
    decisions = _decide(len(usable), query_rows, ranks, labels["identity"], hits.distances, options)
    _add_counts(counts, queries, len(query_rows), decisions)

    # Rows of hits, then one row per query without a hit; sorted by query.
    without_hit = np.setdiff1d(np.arange(len(usable)), query_rows)
    row_queries = np.concatenate([query_rows, without_hit])
    order = np.argsort(row_queries, kind="stable")
    row_queries = row_queries[order]
    # The columns of a face are null in the row of a query without a hit.
    padding = pa.nulls(len(without_hit))
    columns = {
        "rank": pa.concat_arrays([pa.array(ranks, pa.int32()), padding.cast(pa.int32())]),
        "face_id": pa.concat_arrays([pa.array(hits.ids), padding.cast(pa.int64())]),
        "distance": pa.concat_arrays([pa.array(hits.distances, pa.float32()), padding.cast(pa.float32())]),
        "identity": pa.concat_arrays([*labels["identity"].chunks, padding.cast(pa.string())]),
        "uri": pa.concat_arrays([*labels["uri"].chunks, padding.cast(pa.string())]),
    }
    if decisions is None:
        decision = pa.nulls(len(row_queries), pa.string())
    else:
        # A query that could not be searched has no decision, rather than an unknown identity.
        decision = pa.array(decisions[row_queries], pa.string(), mask=~usable[row_queries])
    return pa.table(
        {
            "query_id": queries.names.take(pa.array(row_queries)),
            "query_uri": queries.uris.take(pa.array(row_queries)),
            "status": pa.array(queries.status[row_queries], pa.string()),
            **{name: column.take(pa.array(order)) for name, column in columns.items()},
            "decision": decision,
            "person": pa.concat_arrays([index.get_persons(hits.ids), padding.cast(pa.int64())]).take(pa.array(order)),
        },
        schema=ANSWERS,
    )


def _add_counts(counts: SearchCounts, queries: Queries, rows: int, decisions: npt.NDArray[np.object_] | None) -> None:
    usable = queries.status == OK
    counts.queries += len(usable)
    counts.rows += rows
    for reason in queries.status[~usable]:
        counts.bad[reason] = counts.bad.get(reason, 0) + 1
    if decisions is not None:
        counts.unknown += int((decisions[usable] == UNKNOWN).sum())
        counts.identified += int((decisions[usable] != UNKNOWN).sum())


def _find_hits(index: Index, vectors: Float32, own: Int64, options: SearchOptions, device: str | None) -> _FlatHits:
    """Search by radius, by scanning on a device, or by visiting lists."""
    # One face more, so that enough remain if a query finds itself.
    extra = 1 if options.leave_self_out else 0
    if options.radius is not None:
        # Answers differ in length: put them one below the other, with the query of each.
        find = index.search_within if device is None else partial(scan_within, index)
        answers = find(vectors, options.radius, options.most + extra)
        queries = np.repeat(np.arange(len(answers)), [len(ids) for ids, _ in answers])
        ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in answers)])
        distances = np.concatenate([np.empty(0, np.float32), *(distances for _, distances in answers)])
        if not options.leave_self_out:
            return _FlatHits(queries, ids, distances)
        others = ids != own[queries]
        return _FlatHits(queries[others], ids[others], distances[others])
    k = options.k + extra
    if device:
        hits = scan_index(index, vectors, k, device)
    else:
        hits = index.search(vectors, k, index.choose_setting(k=options.k))
    if options.leave_self_out:
        hits = hits.exclude_own(own, options.k)
    queries, columns = np.nonzero(hits.ids >= 0)
    return _FlatHits(queries, hits.ids[queries, columns], hits.distances[queries, columns])


def _number_ranks(queries: Int64) -> Int64:
    """Assign the ranks 1, 2, ... to the rows of each run of equal queries."""
    starts = np.flatnonzero(np.diff(queries, prepend=-1))
    lengths = np.diff(np.append(starts, len(queries)))
    return np.arange(len(queries)) - np.repeat(starts, lengths) + 1


def _decide(
    count: int,
    queries: Int64,
    ranks: Int64,
    identities: pa.ChunkedArray,
    distances: Float32,
    options: SearchOptions,
) -> npt.NDArray[np.object_] | None:
    """Decide the identity of each of `count` queries; None without a threshold."""
    if options.threshold is None:
        return None
    # Spread the hits over (queries, ranks); entries without a hit stay null and infinitely far.
    width = int(ranks.max(initial=1))
    by_rank = np.full((count, width), None, object)
    distances_by_rank = np.full((count, width), np.inf, np.float32)
    by_rank[queries, ranks - 1] = identities.to_pylist()
    distances_by_rank[queries, ranks - 1] = distances
    return decide_identities(by_rank, distances_by_rank, options.threshold, options.decide)
