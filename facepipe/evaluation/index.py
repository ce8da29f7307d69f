"""How good and how fast an index is: recall against exact search, queries a second, bytes, lists; and a picture."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from facepipe.errors import EvaluationError
from facepipe.evaluation.identification import Identification, identification, probe
from facepipe.gallery import Gallery
from facepipe.index import tune
from facepipe.index.candidates import compute_imbalance
from facepipe.index.exact import read_live_blocks, search_exactly
from facepipe.index.manifest import RecallPoint
from facepipe.index.search import Index

_SINGLE = 50  # queries timed one by one
_EXACT = 100  # queries timed against every vector


@dataclass(frozen=True)
class IndexResult:
    """Figures of an index on a seeded sample of its own faces, each searched with itself left out.

    recall: share of the 1 and 10 true nearest that are found, with its standard error; qps, exact_qps: queries a second
    in batches, with the index and against every vector; single_ms: a query alone; bytes_per_vector: of the index files
    and beside them; imbalance: 1 when all lists are equally long; identification: None without labels.
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
        """For JSON."""
        return asdict(self)


def evaluate_index(
    gallery: Gallery, queries: int | None = None, recall: float | None = None, picture: str | None = None, seed: int = 1
) -> IndexResult:
    """Measure the published index; the sample is another one than that which chose its setting."""
    index = Index(gallery.path, recall)
    if not index.live:
        raise EvaluationError(f"the index of {gallery.path!r} is empty: there is nothing to measure")
    sample = tune.draw_sample(index, seed, queries)
    began = time.perf_counter()
    hits = index.search(sample.queries, tune.K + 1)
    elapsed = time.perf_counter() - began
    found = hits.exclude_own(sample.own, tune.K).ids
    at_1, at_10 = tune.compute_recall(found[:, :1], sample.truth[:, :1]), tune.compute_recall(found, sample.truth)
    curve = tune.measure_curve(index, sample, index.manifest.recall)
    if picture:
        draw(curve, index, picture)
    files = [(name, file.bytes) for shard in index.manifest.shards for name, file in shard.files.items()]
    vectors = sum(shard.vectors for shard in index.manifest.shards)
    codes = sum(size for name, size in files if name.endswith(".faiss"))
    people, notes = _people(gallery, index)
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
        exact_qps=_exact_qps(index, sample),
        single_ms=_single_ms(index, sample),
        bytes_per_vector=codes / vectors,
        side_bytes_per_vector=(sum(size for _, size in files) - codes) / vectors,
        imbalance=compute_imbalance(index.count_per_list()),
        curve=curve,
        identification=people,
        notes=notes,
    )


def _people(gallery: Gallery, index: Index) -> tuple[Identification | None, list[str]]:
    try:
        return identification(probe(gallery, index)), []
    except EvaluationError as error:
        return None, [str(error)]


def _exact_qps(index: Index, sample: tune.RecallSample) -> float:
    chosen = sample.queries[:_EXACT]
    began = time.perf_counter()
    search_exactly(chosen, read_live_blocks(index), tune.K)
    return len(chosen) / (time.perf_counter() - began)


def _single_ms(index: Index, sample: tune.RecallSample) -> float:
    times = []
    for query in sample.queries[:_SINGLE]:
        began = time.perf_counter()
        index.search(query[None])
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times))


def draw(curve: tuple[RecallPoint, ...], index: Index, path: str) -> None:
    """Recall against lists visited."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError("a picture needs matplotlib: pip install 'facepipe[report]'") from error
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    points = sorted(curve, key=lambda point: point.nprobe)
    for name, values in (("1", [p.recall_at_1 for p in points]), ("10", [p.recall_at_10 for p in points])):
        axes.plot([p.nprobe for p in points], values, marker=".", label=f"recall@{name}")
    axes.axvline(
        index.setting.nprobe, color="grey", linewidth=1, linestyle="--", label=f"chosen: {index.setting.nprobe}"
    )
    axes.set_xscale("log", base=2)
    axes.set(xlabel=f"lists visited, of {max(1, index.lists)}", ylabel="recall, lower bound of 95 %")
    axes.set_title(f"{index.live} faces, {index.manifest.template.factory}", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
