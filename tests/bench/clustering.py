"""Compare clustering algorithms on the same edges of real faces, and measure F, time and memory as distractors grow.

    python tests/bench/clustering.py algorithms GALLERY
    python tests/bench/clustering.py growth [--real GALLERY] [--faces 10000 30000 100000 300000 1000000] [--mean 10]

GALLERY holds labelled real faces (`facepipe embed lfw-dev/images GALLERY --identity folder`). growth adds synthetic
faces (galleries.py) to the real ones, so that the same labelled faces are clustered among more and more strangers; F is that of
the real faces alone and of all. Every size runs in a process of its own: its peak memory is what the system counted.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from chinese_whispers import cluster_by_whispers
from galleries import BLOCK, CONTRACT, Faces, append, rows

from facepipe.curation.clusters.identities import cluster_faces
from facepipe.curation.graph import Graph
from facepipe.curation.graph.components import find_components
from facepipe.evaluation.clusters import evaluate_clusters, score_clusters
from facepipe.gallery import Gallery
from pipelines.cluster import ClusterConfig, run
from pipelines.dedup import DedupConfig
from pipelines.dedup import run as dedup

REAL = "/real/"


def compare_algorithms(path: str) -> None:
    """Print the table of algorithms, each with the default threshold, on one graph."""
    run(ClusterConfig(), path)
    gallery = Gallery(path)
    graph = Graph(f"{gallery.path}/reports/graph")
    print(
        f"{len(graph.nodes)} faces, threshold {graph.info.distance:.4f} found from the data, {graph.info.edges} edges"
    )
    print(f"{'algorithm':14} {'pairs P':>8} {'R':>7} {'F':>7} {'BCubed P':>9} {'R':>7} {'F':>7} {'clusters':>9}")
    threshold = np.float32(graph.info.threshold.similarity)
    pairs = graph.edges.read_within(2.0)
    similarity = graph.compute_similarity(pairs)
    above = similarity >= threshold
    pairs, weight = pairs.take(above), similarity[above] - threshold + np.float32(1e-6)
    count = len(graph.nodes)
    labelled = {
        "linkage": cluster_faces(graph)[0],
        "whispers": cluster_by_whispers(count, pairs.u, pairs.v, weight),
        "components": find_components(count, pairs.u, pairs.v),
    }
    for name, labels in labelled.items():
        with tempfile.TemporaryDirectory() as folder:
            table = f"{folder}/faces.parquet"
            pq.write_table(pa.table({"face_id": graph.nodes.ids, "cluster": labels}), table)
            found = evaluate_clusters(gallery, table).to_dict()
        p, b = found["pairwise"], found["bcubed"]
        figures = [p["precision"], p["recall"], p["f"], b["precision"], b["recall"], b["f"]]
        print(f"{name:14} " + " ".join(f"{x:8.4f}" for x in figures) + f" {found['clusters']:9}")


def mix_gallery(path: Path, real: Gallery | None, count: int, mean: float) -> Gallery:
    """Make a gallery of all real faces and `count` synthetic ones, `mean` per person."""
    gallery = Gallery.create(str(path), real.contract if real else CONTRACT)

    def iterate_tables() -> Iterator[pa.Table]:
        if real:
            table = real.to_arrow(where="status = 'ok'")
            table = table.filter(pa.compute.equal(table["face_index"], 0))
            uris = pa.array([REAL + str(n) for n in range(table.num_rows)])
            yield table.set_column(table.column_names.index("uri"), "uri", uris)
        done = 0
        for identities, vectors in draw_persons(count, mean):
            yield rows(identities, vectors, done)
            done += len(vectors)

    append(gallery, iterate_tables(), "mixed")
    return Gallery(str(path))


def draw_persons(count: int, mean: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw identities and faces in blocks; of less than a block the first persons with all their faces."""
    for identities, vectors in Faces(mean_size=mean).blocks(max(count, BLOCK)):
        if count < BLOCK:
            first = np.argsort(identities, kind="stable")[:count]
            yield identities[first], vectors[first]
            return
        yield identities, vectors


def measure_one(path: str) -> None:
    """Cluster and dedup a gallery, and print one line of JSON."""
    began = time.perf_counter()
    summary = run(ClusterConfig(), path)
    clustered = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    dedup(DedupConfig(), path)
    deduped = time.perf_counter()
    table = pq.read_table(f"{path}/reports/cluster/faces.parquet", columns=["uri", "identity", "cluster"])
    truth = pa.compute.dictionary_encode(table["identity"].combine_chunks()).indices.to_numpy().astype(np.int64)
    found = table["cluster"].to_numpy()
    real = pa.compute.starts_with(table["uri"], REAL).to_numpy()
    figures = {
        "faces": len(found),
        "seconds": summary.seconds,
        "cluster": clustered - began,
        "dedup": deduped - clustered,
    }
    figures |= {"recall": summary.recall, "threshold": summary.distance, "clusters": summary.clusters}
    figures |= {"peak": peak, "peak_dedup": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    for name, chosen in (("all", np.ones(len(found), bool)), ("real", real)):
        if chosen.any():
            scores = score_clusters(truth[chosen], found[chosen])
            figures |= {f"pairs_{name}": scores.pairwise.f, f"bcubed_{name}": scores.bcubed.f}
    print(json.dumps(figures))


def measure_growth(real: str | None, sizes: list[int], mean: float) -> None:
    """Print a line per size. Each runs in a process of its own, so that its peak memory is its own."""
    for count in sizes:
        with tempfile.TemporaryDirectory() as folder:
            gallery = mix_gallery(Path(folder) / "G", Gallery(real) if real else None, count, mean)
            command = [sys.executable, __file__, "one", gallery.path]
            out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        s = out["seconds"]
        line = f"{out['faces']:>8} faces: graph {s['graph']:.1f} s, merge {s['merge']:.1f}, review {s['review']:.1f}, "
        line += f"write {s['write']:.1f}, dedup {out['dedup']:.1f}; peak {out['peak']:.2f} GiB, "
        line += (
            f"with dedup {out['peak_dedup']:.2f}; edge recall {out['recall']:.4f}, threshold {out['threshold']:.4f}; "
        )
        line += f"F pairs {out['pairs_all']:.4f}, BCubed {out['bcubed_all']:.4f}"
        if "pairs_real" in out:
            line += f"; of the real faces {out['pairs_real']:.4f}, {out['bcubed_real']:.4f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["algorithms", "growth", "one"])
    parser.add_argument("gallery", nargs="?")
    parser.add_argument("--real")
    parser.add_argument("--faces", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--mean", type=float, default=10)
    args = parser.parse_args()
    if args.what == "growth":
        measure_growth(args.real, args.faces, args.mean)
    else:
        {"algorithms": compare_algorithms, "one": measure_one}[args.what](args.gallery)


if __name__ == "__main__":
    main()
