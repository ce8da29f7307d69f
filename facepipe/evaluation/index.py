"""Measure how good and how fast an index is: recall against exact search, queries per second, bytes, lists."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from facepipe.errors import EvaluationError, MissingPackageError
from facepipe.evaluation.identification import Identification, compute_identification, search_probes
from facepipe.extras import describe_missing
from facepipe.gallery import Gallery
from facepipe.index import samples, tune
from facepipe.index.candidates import compute_imbalance
from facepipe.index.exact import read_live_blocks, search_exactly
from facepipe.index.manifest import CURVE_K, RecallPoint, require_contract
from facepipe.index.search import Index
from facepipe.nearest.distances import VectorBlock
from facepipe.storage.outputs import save_figure
from facepipe.types import Float64

_SINGLE_QUERIES = 50  # timed one by one
_EXACT_QUERIES = 100  # timed against every vector
# What is measured of searches as they may be asked for.
_KS = (1, 10, 100, 1000)
_ASKED_QUERIES = 200
_RADIUS_QUERIES = 100


@dataclass(frozen=True)
class AskedRecall:
    """What a search for a number of neighbours, or within a radius, finds.

    Attributes:
        k: Neighbours per query; None for a radius.
        radius: Euclidean distance; None for neighbours.
        nprobe: Lists visited per query.
        rescore: Candidates per query that are compared exactly.
        recall: Share of the true faces that are found; None if no query has a face within the radius.
        standard_error: Standard error of recall.
        stated: The recall that a search states, a lower bound; None if the index was not measured for it.
        queries: Queries that have a face to find.
        qps: Queries per second in a batch.
    """

    k: int | None
    radius: float | None
    nprobe: int
    rescore: int
    recall: float | None
    standard_error: float
    stated: float | None
    queries: int
    qps: float


@dataclass(frozen=True)
class IndexResult:
    """Figures of an index on a seeded sample of its own faces, each searched with itself left out.

    Attributes:
        faces: Number of faces.
        factory: FAISS factory string.
        shards: Number of shards.
        dead: Deleted vectors that are still in the index.
        queries: Size of the sample.
        nprobe: Lists visited per query.
        rescore: Candidates per query that are compared exactly.
        asked: Recall that the setting was chosen for.
        recall_at_1: Share of the true nearest face that is found.
        recall_at_10: Share of the 10 true nearest faces that are found.
        standard_error: Standard error of recall_at_10.
        qps: Queries per second in batches, with the index.
        exact_qps: Queries per second in batches, against every vector.
        single_ms: Milliseconds of a single query.
        bytes_per_vector: Bytes of the index files per vector.
        side_bytes_per_vector: Bytes of the other files per vector.
        imbalance: 1 if all lists are equally long.
        curve: Recall by lists visited.
        asked_for: Recall by number of neighbours, and by radius.
        identification: Figures of identification, None without labels.
        notes: Why figures are missing.
    """

    faces: int
    factory: str
    shards: int
    dead: int
    queries: int
    nprobe: int
    rescore: int
    asked: float
    recall_at_1: float
    recall_at_10: float
    standard_error: float
    qps: float
    exact_qps: float
    single_ms: float
    bytes_per_vector: float
    side_bytes_per_vector: float
    imbalance: float
    curve: tuple[RecallPoint, ...] = ()
    asked_for: tuple[AskedRecall, ...] = ()
    identification: Identification | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON."""
        return asdict(self)


def evaluate_index(
    gallery: Gallery,
    queries: int | None = None,
    recall: float | None = None,
    picture: str | None = None,
    seed: int = 1,
    *,
    ks: Sequence[int] | None = None,
    radii: Sequence[float] | None = None,
) -> IndexResult:
    """Measure the published index, on another sample than the one that chose its setting.

    Args:
        gallery: the gallery.
        queries: size of the sample.
        recall: recall to choose the setting for, by default that of the index.
        picture: file to draw the recall curve to.
        seed: seed of the sample.
        ks: numbers of neighbours to measure; by default 1, 10, 100 and 1,000.
        radii: Euclidean distances to measure; by default those that the index was measured for.

    Raises:
        EvaluationError: if the index is empty.
    """
    index = Index(gallery.path, recall)
    require_contract(index.manifest, gallery)
    index.freeze()
    if not index.live:
        raise EvaluationError(f"the index of {gallery.path!r} is empty: there is nothing to measure")
    # Recall and speed.
    sample = samples.draw_sample(index, seed, queries)
    began = time.perf_counter()
    # One neighbour more than scored, because a query finds itself.
    hits = index.search(sample.queries, CURVE_K + 1)
    elapsed = time.perf_counter() - began
    ids = hits.exclude_own(sample.own, CURVE_K).ids
    at_1 = samples.compute_recall(ids[:, :1], sample.truth[:, :1])
    at_10 = samples.compute_recall(ids, sample.truth)
    curve = tune.measure_curve(index, sample, index.manifest.recall)
    asked_for = measure_asked(index, seed, ks=ks, radii=radii)
    if picture:
        draw_recall_curve(curve, index, picture)
    # Size.
    files = [(name, file.bytes) for shard in index.manifest.shards for name, file in shard.files.items()]
    vectors = sum(shard.vectors for shard in index.manifest.shards)
    code_bytes = sum(size for name, size in files if name.endswith(".faiss"))
    all_bytes = sum(size for _, size in files)
    # Identification, if there are labels.
    identification: Identification | None = None
    notes: list[str] = []
    try:
        identification = compute_identification(search_probes(gallery, index))
    except EvaluationError as error:
        notes.append(str(error))
    return IndexResult(
        faces=index.live,
        factory=index.manifest.template.factory,
        shards=len(index.shards),
        dead=index.manifest.deleted,
        queries=len(sample.queries),
        nprobe=index.setting.nprobe,
        rescore=index.setting.rescore,
        asked=recall or index.manifest.recall,
        recall_at_1=float(at_1.mean()),
        recall_at_10=float(at_10.mean()),
        standard_error=float(at_10.std(ddof=1) / len(at_10) ** 0.5) if len(at_10) > 1 else 0.0,
        qps=len(sample.queries) / elapsed,
        exact_qps=_measure_exact_qps(index, sample),
        single_ms=_measure_single_ms(index, sample),
        bytes_per_vector=code_bytes / vectors,
        side_bytes_per_vector=(all_bytes - code_bytes) / vectors,
        imbalance=compute_imbalance(index.count_per_list()),
        curve=curve,
        asked_for=asked_for,
        identification=identification,
        notes=notes,
    )


def measure_asked(
    index: Index, seed: int, *, ks: Sequence[int] | None = None, radii: Sequence[float] | None = None
) -> tuple[AskedRecall, ...]:
    """Measure what searches for numbers of neighbours, and within radii, find.

    Args:
        index: the index.
        seed: seed of the sample.
        ks: numbers of neighbours; by default 1, 10, 100 and 1,000.
        radii: Euclidean distances; by default those that the index was measured for.
    """
    # Whoever has no other face has nothing to find.
    wanted = sorted(k for k in set(ks or _KS) if ks or k < index.live)
    sample = samples.draw_sample(index, seed, _ASKED_QUERIES, min(max(wanted, default=1), max(1, index.live - 1)))
    results = []
    for k in wanted:
        setting = index.choose_setting(k=k)
        began = time.perf_counter()
        hits = index.search(sample.queries, k + 1, setting).exclude_own(sample.own, k)
        seconds = time.perf_counter() - began
        shares = samples.compute_recall(hits.ids, sample.truth[:, :k])
        results.append(_describe_asked(index, shares, len(sample.own), seconds, k=k))
    measured = [curve.radius for curve in index.manifest.targets if curve.radius is not None]
    faces = VectorBlock(sample.own[:_RADIUS_QUERIES], sample.queries[:_RADIUS_QUERIES])
    for radius in sorted(set(measured if radii is None else radii)):
        inside = samples.draw_radius_sample(index, faces, radius, seed)
        began = time.perf_counter()
        index.search_within(faces.vectors, radius, max(1, index.live))
        seconds = time.perf_counter() - began
        shares = samples.compute_radius_recall(index, inside, radius, index.choose_setting(radius=radius))
        results.append(_describe_asked(index, shares, len(faces.ids), seconds, radius=radius))
    return tuple(results)


def _describe_asked(
    index: Index, shares: Float64, queries: int, seconds: float, *, k: int | None = None, radius: float | None = None
) -> AskedRecall:
    """Describe what was found.

    Args:
        index: the index.
        shares: share of the true faces that each query found, (m,).
        queries: number of queries that were timed.
        seconds: time that they took.
        k: neighbours per query.
        radius: Euclidean distance.
    """
    asked = {"k": k} if k is not None else {"radius": radius}
    setting = index.choose_setting(**asked)
    return AskedRecall(
        k=k,
        radius=radius,
        nprobe=setting.nprobe,
        rescore=setting.rescore,
        recall=float(shares.mean()) if len(shares) else None,
        standard_error=float(shares.std(ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else 0.0,
        stated=index.get_recall(**asked),
        queries=len(shares),
        qps=queries / seconds,
    )


def _measure_exact_qps(index: Index, sample: samples.RecallSample) -> float:
    chosen = sample.queries[:_EXACT_QUERIES]
    began = time.perf_counter()
    search_exactly(chosen, read_live_blocks(index), CURVE_K)
    return len(chosen) / (time.perf_counter() - began)


def _measure_single_ms(index: Index, sample: samples.RecallSample) -> float:
    times = []
    for query in sample.queries[:_SINGLE_QUERIES]:
        began = time.perf_counter()
        index.search(query[None])
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times))


def draw_recall_curve(curve: tuple[RecallPoint, ...], index: Index, path: str) -> None:
    """Draw recall against lists visited to a file.

    Raises:
        MissingPackageError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(describe_missing("matplotlib", "a picture")) from error
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    # The curve is sorted by recall, and a line needs it by lists visited.
    points = sorted(curve, key=lambda point: point.nprobe)
    lists = [point.nprobe for point in points]
    axes.plot(lists, [point.recall_at_1 for point in points], marker=".", label="recall@1")
    axes.plot(lists, [point.recall_at_10 for point in points], marker=".", label="recall@10")
    chosen = index.setting.nprobe
    axes.axvline(chosen, color="grey", linewidth=1, linestyle="--", label=f"chosen: {chosen}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel=f"lists visited, of {max(1, index.lists)}", ylabel="recall, lower bound of 95 %")
    axes.set_title(f"{index.live} faces, {index.manifest.template.factory}", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    save_figure(figure, path)
