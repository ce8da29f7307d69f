"""Measure how good and how fast an index is: recall against exact search, queries per second, bytes, lists."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from facepipe.errors import EvaluationError, MissingPackageError
from facepipe.evaluation.identification import Identification, compute_identification, search_probes
from facepipe.extras import describe_missing
from facepipe.gallery import Gallery
from facepipe.index import tune
from facepipe.index.candidates import compute_imbalance
from facepipe.index.exact import read_live_blocks, search_exactly
from facepipe.index.manifest import RecallPoint
from facepipe.index.search import Index

_SINGLE_QUERIES = 50  # timed one by one
_EXACT_QUERIES = 100  # timed against every vector


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
    identification: Identification | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON."""
        return asdict(self)


def evaluate_index(
    gallery: Gallery, queries: int | None = None, recall: float | None = None, picture: str | None = None, seed: int = 1
) -> IndexResult:
    """Measure the published index, on another sample than the one that chose its setting.

    Args:
        gallery: the gallery.
        queries: size of the sample.
        recall: recall to choose the setting for, by default that of the index.
        picture: file to draw the recall curve to.
        seed: seed of the sample.

    Raises:
        EvaluationError: if the index is empty.
    """
    index = Index(gallery.path, recall)
    index.freeze()
    if not index.live:
        raise EvaluationError(f"the index of {gallery.path!r} is empty: there is nothing to measure")
    # Recall and speed.
    sample = tune.draw_sample(index, seed, queries)
    began = time.perf_counter()
    # One neighbour more than scored, because a query finds itself.
    hits = index.search(sample.queries, tune.K + 1)
    elapsed = time.perf_counter() - began
    ids = hits.exclude_own(sample.own, tune.K).ids
    at_1 = tune.compute_recall(ids[:, :1], sample.truth[:, :1])
    at_10 = tune.compute_recall(ids, sample.truth)
    curve = tune.measure_curve(index, sample, index.manifest.recall)
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
        identification=identification,
        notes=notes,
    )


def _measure_exact_qps(index: Index, sample: tune.RecallSample) -> float:
    chosen = sample.queries[:_EXACT_QUERIES]
    began = time.perf_counter()
    search_exactly(chosen, read_live_blocks(index), tune.K)
    return len(chosen) / (time.perf_counter() - began)


def _measure_single_ms(index: Index, sample: tune.RecallSample) -> float:
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
    figure.savefig(path, dpi=150)
