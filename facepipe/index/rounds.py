"""The rounds of a search: queries that got too few candidates are repeated with more lists and more candidates.

A round is run by whoever has the shards open: this process, or owners on many machines.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from facepipe.nearest.distances import Hits
from facepipe.types import Bool, Float32, Int64

_GROWTH = 4  # of lists and candidates, for queries that need more
_MIN_RADIUS_CANDIDATES = 64
NO_ID = np.iinfo(np.int64).max
"""Sorts behind every face id."""

Answer = tuple[Int64, Float32]


@dataclass(frozen=True)
class SearchSetting:
    """How hard to search.

    Attributes:
        nprobe: Lists visited per query.
        rescore: Candidates re-scored exactly per query.
    """

    nprobe: int
    rescore: int


@dataclass(frozen=True)
class ShardsSize:
    """How much there is to search.

    Attributes:
        live: Vectors that a search can return.
        lists: Inverted lists; 0 for an exact index.
    """

    live: int
    lists: int


@dataclass(frozen=True)
class NearestRound:
    """What a round finds for the nearest faces.

    Attributes:
        ids: Face ids (n, w), nearest first, ties by id; `NO_ID` behind the last one.
        squared: Their squared distances (n, w), infinite behind the last one.
        candidates: Number of candidates of each query, (n,).
        complete: Whether (n,) the visited lists hold no more.
    """

    ids: Int64
    squared: Float32
    candidates: Int64
    complete: Bool

    @classmethod
    def concatenate(cls, rounds: "list[NearestRound]") -> "NearestRound":
        """Put the rounds of some queries, which are of one width, one below the other."""
        return cls(
            ids=np.concatenate([one.ids for one in rounds]),
            squared=np.concatenate([one.squared for one in rounds]),
            candidates=np.concatenate([one.candidates for one in rounds]),
            complete=np.concatenate([one.complete for one in rounds]),
        )


@dataclass(frozen=True)
class RadiusRound:
    """What a round finds within a radius.

    Attributes:
        answers: Per query (ids, distances), nearest first, ties by id.
        inside: Number of candidates (n,) within the radius, also of those that were not returned.
        candidates: Number of candidates of each query, (n,).
        complete: Whether (n,) the visited lists hold no more.
    """

    answers: list[Answer]
    inside: Int64
    candidates: Int64
    complete: Bool

    @classmethod
    def concatenate(cls, rounds: "list[RadiusRound]") -> "RadiusRound":
        """Put the rounds of some queries one below the other."""
        return cls(
            answers=[answer for one in rounds for answer in one.answers],
            inside=np.concatenate([one.inside for one in rounds]),
            candidates=np.concatenate([one.candidates for one in rounds]),
            complete=np.concatenate([one.complete for one in rounds]),
        )


def find_nearest(
    queries: Float32,
    k: int,
    setting: SearchSetting,
    size: ShardsSize,
    run_round: Callable[[Float32, int, int], NearestRound],
) -> Hits:
    """Find the k nearest faces of queries.

    Args:
        queries: unit vectors (n, dim).
        k: faces per query.
        setting: how hard to search at first.
        size: how much there is to search.
        run_round: finds the k nearest of some queries among a number of candidates, from a number of lists.
    """
    hits = Hits.create_empty(len(queries), k)
    pending = np.arange(len(queries))
    nprobe = setting.nprobe
    count = max(setting.rescore, min(2 * k, size.live))
    while pending.size:
        # Those tied with the last are left out: a few more are requested, so that the rest are as many as meant.
        requested = min(count + max(2, count // 50), size.live + 1)
        result = run_round(queries[pending], requested, nprobe)
        width = result.ids.shape[1]
        hits.ids[pending, :width] = result.ids
        hits.distances[pending, :width] = result.squared
        # Search again for queries with fewer than k candidates, unless all lists were visited and hold no more.
        has_enough = result.candidates >= k
        is_exhausted = result.complete & (nprobe >= size.lists)
        pending = pending[~(has_enough | is_exhausted)]
        count *= _GROWTH
        nprobe *= _GROWTH
    hits.ids[~np.isfinite(hits.distances)] = -1
    return Hits(hits.ids, np.sqrt(hits.distances))


def find_within(
    queries: Float32,
    max_faces: int,
    setting: SearchSetting,
    size: ShardsSize,
    run_round: Callable[[Float32, int, int], RadiusRound],
) -> list[Answer]:
    """Find the faces within a radius, with more and more candidates until they reach well beyond it.

    Args:
        queries: unit vectors (n, dim).
        max_faces: maximum faces per query.
        setting: how hard to search at first.
        size: how much there is to search.
        run_round: finds the faces within the radius of some queries among a number of candidates, from a number of
            lists.

    Returns:
        Per query (ids, distances), nearest first.
    """
    answers: list[Answer] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
    pending = np.arange(len(queries))
    count = max(setting.rescore, _MIN_RADIUS_CANDIDATES)
    while pending.size:
        result = run_round(queries[pending], min(count, size.live + 1), setting.nprobe)
        # Each round has more candidates, so that its answers replace the earlier ones.
        for query, answer in zip(pending, result.answers, strict=True):
            answers[query] = answer
        # Stop once candidates are several times the faces inside: those not seen then lie outside.
        reaches_beyond = result.inside * _GROWTH <= result.candidates
        has_enough = result.inside >= max_faces
        pending = pending[~(reaches_beyond | result.complete | has_enough)]
        count *= _GROWTH
    return answers
