"""Build and search against stock faiss and exact search, as ratios of one run.

    python tests/bench/index.py [--faces 1000000] [--queries 10000] [--rounds 3] [--gallery FOLDER]

The gallery is synthetic (galleries.py), and the queries are new faces of its people. Every round times exact `faiss.knn`, a
stock index (same factory, nprobe and candidates, IndexRefineFlat) and facepipe, one after the other. The ratios are medians
over the rounds.
"""

import argparse
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from galleries import Faces, make_gallery

from facepipe.arrow import to_float_lists
from facepipe.config import build
from facepipe.gallery import Gallery
from facepipe.index.manifest import load
from facepipe.index.plan import parse_lists
from facepipe.index.rows import read_face_rows, sample_vectors
from facepipe.index.samples import compute_recall
from facepipe.index.search import Index, SearchSetting
from pipelines.index import IndexConfig
from pipelines.index import run as build_index
from pipelines.search import SearchConfig
from pipelines.search import run as search

GRID = [
    (nprobe, count) for nprobe in (168, 176, 184, 192, 208, 224, 416, 448, 480, 512, 576) for count in (100, 150, 200)
]


def measure_seconds(call: object) -> float:
    """Measure the seconds that a call takes."""
    began = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - began


class Stock:
    """One faiss index over all vectors in memory."""

    def __init__(self, factory: str, trained_on: np.ndarray, vectors: np.ndarray):
        self.index = faiss.index_factory(128, factory)
        self.train = measure_seconds(lambda: self.index.train(trained_on))
        self.add = measure_seconds(lambda: self.index.add(vectors))
        self.refined = faiss.IndexRefineFlat(self.index, faiss.swig_ptr(vectors))

    def search(self, queries: np.ndarray, setting: SearchSetting) -> np.ndarray:
        self.index.nprobe = setting.nprobe
        self.refined.k_factor = setting.rescore / 10
        return self.refined.search(queries, 10)[1]


def find_cheapest_setting(index: Index, queries: np.ndarray, truth: np.ndarray, goal: float) -> SearchSetting:
    """Find the cheapest setting of a grid that reaches the recall."""
    for nprobe, count in sorted(GRID, key=lambda pair: 0.7 * pair[0] + 0.15 * pair[1]):
        setting = SearchSetting(nprobe, count)
        if compute_recall(index.search(queries, 10, setting).ids, truth).mean() >= goal:
            return setting
    return SearchSetting(*GRID[-1])


def build_stock(gallery: Gallery, vectors: np.ndarray) -> Stock:
    """Build a stock index with the factory of the gallery's index."""
    factory = load(gallery.path).template.factory
    return Stock(factory, sample_vectors(gallery, min(len(vectors), 128 * parse_lists(factory)), 0), vectors)


def print_build_ratio(gallery: Gallery, vectors: np.ndarray, rounds: int) -> Stock:
    """Build both indexes in every round, print the ratios, and return the last stock index."""
    for _ in range(rounds):
        done = build_index(IndexConfig(), gallery.path, retrain=True)
        stock = build_stock(gallery, vectors)
        ours = done.seconds["sample"] + done.seconds["train"] + done.seconds["shards"]
        theirs = stock.train + stock.add
        print(
            f"build: facepipe sample {done.seconds['sample']:.1f} train {done.seconds['train']:.1f} shards "
            f"{done.seconds['shards']:.1f} (measure {done.seconds['measure']:.1f}) s; stock train {stock.train:.1f} add "
            f"{stock.add:.1f} s; ratio {ours / theirs:.2f}, with measuring {(ours + done.seconds['measure']) / theirs:.2f}",
            flush=True,
        )
    return stock


def print_search_ratios(
    index: Index, stock: Stock, vectors: np.ndarray, ids: np.ndarray, queries: np.ndarray, rounds: int
) -> None:
    """Print rates and recalls of exact search, the stock index and facepipe at two goals, and times of single queries."""
    truth = ids[faiss.knn(queries, vectors, 10)[1]]
    for goal in (0.95, 0.99):
        setting = find_cheapest_setting(index, queries, truth, goal)
        rates, recalls = [], []
        for _ in range(rounds):
            exact = measure_seconds(lambda: faiss.knn(queries, vectors, 10))
            theirs = measure_seconds(lambda s=setting: stock.search(queries, s))
            ours = measure_seconds(lambda s=setting: index.search(queries, 10, s))
            rates.append([len(queries) / t for t in (exact, theirs, ours)])
            recalls = [
                compute_recall(ids[stock.search(queries, setting)], truth).mean(),
                compute_recall(index.search(queries, 10, setting).ids, truth).mean(),
            ]
        exact, theirs, ours = np.array(rates).T
        print(
            f"recall@10 {goal}: {setting}: recall facepipe {recalls[1]:.4f} stock {recalls[0]:.4f}; queries/s exact "
            f"{np.median(exact):.0f} stock {np.median(theirs):.0f} facepipe {np.median(ours):.0f}; facepipe / exact "
            f"{np.median(ours / exact):.1f} ({(ours / exact).min():.1f} to {(ours / exact).max():.1f}), facepipe / stock "
            f"{np.median(ours / theirs):.2f} ({(ours / theirs).min():.2f} to {(ours / theirs).max():.2f})",
            flush=True,
        )
    index.search(queries[:1])
    lone = [measure_seconds(lambda n=n: index.search(queries[n : n + 1], 10, setting)) for n in range(200)]
    lone_stock = [measure_seconds(lambda n=n: stock.search(queries[n : n + 1], setting)) for n in range(200)]
    print(
        f"one query at the latter: facepipe {1e3 * np.median(lone):.2f} ms, stock {1e3 * np.median(lone_stock):.2f} ms",
        flush=True,
    )


def print_bulk_ratios(gallery: Gallery, stock: Stock, faces: Faces, people: int, count: int, folder: Path) -> None:
    """Print the times of many queries at once, in blocks and by the whole of `search`."""
    queries = faces.draw(np.random.default_rng(3).integers(0, people, count), 10**9 + 1)
    names = pa.array([f"q{n}" for n in range(count)])
    pq.write_table(
        pa.table({"query_id": names, "embedding": to_float_lists(queries)}), folder / "q.parquet", row_group_size=20_000
    )
    index = Index(gallery.path, recall=0.99)
    for nprobe in (index.setting.nprobe, 512, 640):
        setting = SearchSetting(nprobe, 200)
        few = slice(0, 5000)
        truth = find_truth(gallery, queries[few])
        if compute_recall(index.search(queries[few], 10, setting).ids, truth).mean() >= 0.99:
            break
    for block in (1000, 10_000):
        theirs = measure_seconds(
            lambda b=block: [stock.search(queries[at : at + b], setting) for at in range(0, count, b)]
        )
        ours = measure_seconds(lambda: index.search(queries, 10, setting))
        reached = compute_recall(index.search(queries[few], 10, setting).ids, truth).mean()
        print(
            f"bulk, {count} queries, {setting}, recall {reached:.4f}: stock in blocks of {block} {theirs:.1f} s, Index.search {ours:.1f} s, ratio {theirs / ours:.2f}",
            flush=True,
        )
    config = build(SearchConfig, {"search": {"recall": 0.99}})
    done = search(config, gallery.path, str(folder / "q.parquet"), str(folder / "hits.parquet"))
    hits = pq.read_table(folder / "hits.parquet", columns=["face_id"])["face_id"].to_numpy().reshape(count, 10)
    print(
        f"the whole of `search` (path {done.path}, {done.nprobe} lists, {done.rescore} re-scored), labels and Parquet included: "
        f"{done.seconds:.1f} s, recall {compute_recall(hits[few], truth).mean():.4f}",
        flush=True,
    )


def find_truth(gallery: Gallery, queries: np.ndarray) -> np.ndarray:
    """Find the ids of the ten true neighbours per query."""
    ids, vectors = gallery.vectors()
    return ids[faiss.knn(queries, vectors, 10)[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--bulk", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gallery", type=Path, help="Gallery made before; with an index if the build is skipped.")
    parser.add_argument("--skip-build", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path, faces = args.gallery or Path(temporary) / "g", Faces()
        gallery = Gallery(str(path)) if Gallery.exists(str(path)) else make_gallery(path, args.faces, faces)
        parts = [
            (rows.ids, rows.vectors)
            for f in gallery.files()
            for rows in read_face_rows(gallery.faces_folder, [f["path"]], gallery.dim)
        ]
        ids, vectors = np.concatenate([i for i, _ in parts]), np.concatenate([v for _, v in parts])
        del parts
        stock = build_stock(gallery, vectors) if args.skip_build else print_build_ratio(gallery, vectors, 2)
        people = int(args.faces / faces.mean_size * 0.95)
        queries = faces.draw(np.random.default_rng(7).integers(0, people, args.queries), 10**9)
        print_search_ratios(Index(gallery.path), stock, vectors, ids, queries, args.rounds)
        print_bulk_ratios(gallery, stock, faces, people, args.bulk, Path(temporary))


if __name__ == "__main__":
    main()
