"""Top 10 and joins on a device, beside the bare product of the same matrices in half precision.

    python tests/bench/gpu_nearest.py [--device cuda] [--sizes 100000x1000000,1000000x10000000] [--joins 1000000] [--rounds 3]
    python tests/bench/gpu_nearest.py --device cpu --sizes 2000x50000 --joins 20000

Prints the seconds of `find_neighbours` (with all transfers and the host's part) and of `find_pairs_on_device`, those of the
product alone, in tiles of the same size at the rate measured on the device in the same run, and their ratio. A join needs
half of the product. A sample of the answers is compared with faiss. On a CPU the ratio is that to faiss.knn. Vectors are
faces of a synthetic gallery.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import faiss
import numpy as np
import torch
from galleries import Faces

from facepipe.nearest.distances import VectorBlock
from facepipe.nearest.half_precision import choose_dtype
from facepipe.nearest.join_gpu import JoinRule, find_pairs_on_device
from facepipe.nearest.knn_gpu import BLOCK_ROWS, MAX_TILE_ROWS, Tiling, find_neighbours
from facepipe.nearest.similarity import refine_pairs

K = 10
SAMPLE = 200
MAX_NEIGHBOURS = 32
FACES_PER_DRAW = 1 << 18


def measure_seconds(call: Callable[[], object], device: str) -> float:
    """Measure the seconds that a call takes, until the device has finished."""
    began = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure_product_rate(device: str, rounds: int) -> float:
    """Measure the pairs per second of a bare product, tile by tile; the best of the rounds."""
    dtype = choose_dtype(device)
    rows, columns = (MAX_TILE_ROWS, BLOCK_ROWS) if device.startswith("cuda") else (512, 65_536)
    left, right = (torch.randn((n, 128), device=device).to(dtype) for n in (rows, columns))
    out = torch.empty((rows, columns), dtype=dtype, device=device)
    repeats = 20 if device.startswith("cuda") else 2

    def multiply_tiles() -> None:
        for _ in range(repeats):
            torch.mm(left, right.T, out=out)

    multiply_tiles()
    return repeats * rows * columns / min(measure_seconds(multiply_tiles, device) for _ in range(rounds))


def draw_faces(count: int, seed: int) -> np.ndarray:
    """Draw faces (n, 128) of persons with five on average, in random order."""
    out, rng = np.empty((count, 128), np.float32), np.random.default_rng(seed)
    for at in range(0, count, FACES_PER_DRAW):
        size = min(FACES_PER_DRAW, count - at)
        out[at : at + size] = Faces().draw(rng.integers(0, count // 5 + 1, size), seed * 10**10 + at)
    return out


def cut_blocks(vectors: np.ndarray) -> Iterator[VectorBlock]:
    """Cut vectors into blocks, with their positions as ids."""
    for at in range(0, len(vectors), BLOCK_ROWS):
        part = vectors[at : at + BLOCK_ROWS]
        yield VectorBlock(np.arange(at, at + len(part)), part)


def print_knn(queries: np.ndarray, vectors: np.ndarray, device: str, args: argparse.Namespace, rate: float) -> None:
    """Print the time of a top-10 search, and its ratio to the bare product."""
    find_neighbours(
        queries[:MAX_TILE_ROWS], cut_blocks(vectors[: 2 * BLOCK_ROWS]), K, device
    )  # warm: kernels are loaded, memory is there
    times = [
        measure_seconds(lambda: find_neighbours(queries, cut_blocks(vectors), K, device), device)
        for _ in range(args.rounds)
    ]
    bare = len(queries) * len(vectors) / rate
    found = find_neighbours(queries[:SAMPLE], cut_blocks(vectors), K, device)
    same = (found.ids == faiss.knn(queries[:SAMPLE], vectors, K)[1]).mean()
    line = f"top {K} of {len(queries)} x {len(vectors)}: {min(times):.2f} s"
    line += f"; product {bare:.2f} s, ratio {min(times) / bare:.2f}"
    if device == "cpu":
        theirs = min(measure_seconds(lambda: faiss.knn(queries, vectors, K), device) for _ in range(args.rounds))
        line += f"; faiss.knn {theirs:.2f} s, ratio {min(times) / theirs:.2f}"
    print(f"{line}; {same:.4%} of {SAMPLE} queries' answers are faiss's", flush=True)


def print_join(vectors: np.ndarray, device: str, args: argparse.Namespace, rate: float) -> None:
    """Print the time of a join at the similarity that a face has to its 5th nearest, on average."""
    flat = np.zeros(len(vectors), np.float32)
    sample = vectors[:SAMPLE]
    near = faiss.knn(np.ascontiguousarray(sample), vectors, 6, metric=faiss.METRIC_INNER_PRODUCT)[0]
    threshold = float(np.median(near[:, 5]))
    rule = JoinRule(threshold, MAX_NEIGHBOURS, 384)
    find_pairs_on_device(vectors[:MAX_TILE_ROWS], flat[:MAX_TILE_ROWS], rule, device)
    times = [
        measure_seconds(lambda: find_pairs_on_device(vectors, flat, rule, device), device) for _ in range(args.rounds)
    ]
    u, v = find_pairs_on_device(vectors, flat, rule, device)
    found = refine_pairs(vectors, flat, u, v, threshold)
    bare = len(vectors) ** 2 / 2 / rate
    ours = np.bincount(np.concatenate([found.u, found.v]), minlength=len(vectors))[:SAMPLE]
    index = faiss.IndexFlatIP(128)
    index.add(vectors)
    limits = index.range_search(np.ascontiguousarray(sample), threshold)[0]
    differ = np.abs(ours - (np.diff(limits.astype(np.int64)) - 1)).sum()
    print(
        f"join of {len(vectors)} at {threshold:.3f}: {min(times):.2f} s, {len(found)} pairs; half a product {bare:.2f} s, "
        f"ratio {min(times) / bare:.2f}; {differ} pairs of {SAMPLE} faces differ from faiss's, of {ours.sum()}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default="100000x1000000,1000000x10000000")
    parser.add_argument("--joins", default="1000000")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rate = measure_product_rate(args.device, args.rounds)
    tile = Tiling().plan_tile_rows(args.device, BLOCK_ROWS)
    print(f"{args.device}: product {rate * 256 / 1e12:.2f} TFLOP/s, {1e12 / rate:.2f} ps a pair; tiles of {tile} rows")
    for size in filter(None, args.sizes.split(",")):
        asked, held = (int(n) for n in size.split("x"))
        print_knn(draw_faces(asked, 1), draw_faces(held, 2), args.device, args, rate)
    for size in filter(None, args.joins.split(",")):
        print_join(draw_faces(int(size), 3), args.device, args, rate)


if __name__ == "__main__":
    main()
