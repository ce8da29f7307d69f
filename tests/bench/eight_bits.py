"""Compare dlib's network in eight bits with floating point: ranges of its activations, accuracy on LFW, and speed.

    python tests/bench/eight_bits.py [--shares 3e-5,0] [--print-ranges]

It needs ../shared, and takes the largest face near the middle of every image of LFW-dev. Ranges come from every twelfth
face. A share of the values on either side is left out of a range. View 2 is the folds 1 to 5. All pairs are those of the
3,811 faces: 4,414 of one person and 7.3 million of two.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from corpus import SHARED

from facepipe.arrow import view_buffers
from facepipe.evaluation.pairs import score_pairs
from facepipe.evaluation.pairs_file import read_pairs
from facepipe.models.dlib.dlib_onnx import Range, build_dlib_onnx, build_dlib_onnx_with_activations
from facepipe.models.dlib.ranges import RANGES
from facepipe.models.embedders.engines import OnnxDlib
from facepipe.models.runtime.onnx_session import open_session
from facepipe.models.zoo.packaged import read_dlib_weights
from facepipe.schema import WORK_ITEM
from facepipe.stages import Align, Decode, Detect, Read
from facepipe.stages.chips import Subject
from facepipe.types import Float32, UInt8

IMAGES = SHARED / "data" / "lfw-dev" / "images"
_BINS = 1 << 15


def cut_subjects(paths: list[Path]) -> Iterator[npt.NDArray[np.uint8]]:
    """Cut the aligned chip of each image's subject."""
    stages = (Read(), Decode(), Detect(device="cpu"), Subject(), Align(thumbs=False))
    for stage in stages:
        stage.setup()
    for at in range(0, len(paths), 16):
        items = [{"uri": str(path), "path": str(path).encode()} for path in paths[at : at + 16]]
        table = pa.Table.from_pylist(items, schema=WORK_ITEM)
        for stage in stages:
            table = stage(table)
        for view in view_buffers(table["chip"]):
            yield (
                np.zeros((150, 150, 3), np.uint8)
                if view is None
                else np.frombuffer(view, np.uint8).reshape(150, 150, 3)
            )


def count_values(chips: UInt8) -> list[tuple[float, float, npt.NDArray[np.int64]]]:
    """Find the lowest and highest value of each activation, and count the values in bins between them."""
    graph, names = build_dlib_onnx_with_activations(*read_dlib_weights())
    run = open_session(graph, threads=1)
    parts = [chips[at : at + 8] for at in range(0, len(chips), 8)]
    low = np.full(len(names), np.inf)
    high = np.full(len(names), -np.inf)
    for part in parts:
        for n, values in enumerate(run.run(names, {"chips": part})):
            low[n] = min(low[n], values.min())
            high[n] = max(high[n], values.max())
    counts = np.zeros((len(names), _BINS), np.int64)
    for part in parts:
        for n, values in enumerate(run.run(names, {"chips": part})):
            counts[n] += np.histogram(values, _BINS, (low[n], high[n]))[0]
    return list(zip(low.tolist(), high.tolist(), counts, strict=True))


def find_ranges(histograms: list[tuple[float, float, npt.NDArray[np.int64]]], share: float) -> list[Range]:
    """Find the ranges that leave a share of the values out on either side, to four digits."""
    cut = []
    for low, high, counts in histograms:
        below = np.cumsum(counts) / counts.sum()
        edges = np.linspace(low, high, _BINS + 1)
        top = edges[min(_BINS, int(np.searchsorted(below, 1 - share)) + 1)]
        bottom = 0.0 if low >= 0 else edges[np.searchsorted(below, share)]
        cut.append((float(f"{bottom:.4g}"), float(f"{top:.4g}")))
    return cut


def embed_with_mirror(engine: OnnxDlib, chips: UInt8) -> Float32:
    """Embed chips as unit vectors, with mirror images averaged in."""
    raw = engine.embed(chips) + engine.embed(np.ascontiguousarray(chips[:, :, ::-1]))
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), np.float32)


def describe_view2(vectors: Float32, names: list[str]) -> str:
    """Describe accuracy and TAR by the protocol of View 2."""
    at = {name: n for n, name in enumerate(names)}
    pairs = read_pairs(SHARED / "data" / "lfw-dev" / "pairs.txt")
    apart = np.array([np.linalg.norm(vectors[at[p.left]].astype(float) - vectors[at[p.right]]) for p in pairs])
    result = score_pairs(apart, np.array([p.same for p in pairs]), np.array([p.fold for p in pairs]))
    return f"View 2 {result.accuracy:.4f} ± {result.standard_error:.4f}, TAR at 1e-3 {result.tar['0.001']:.4f}"


def describe_all_pairs(vectors: Float32, names: list[str]) -> str:
    """Describe the EER, and the TAR at three FARs, over all pairs of images."""
    persons = np.unique([name.split("/")[0] for name in names], return_inverse=True)[1]
    left, right = np.triu_indices(len(vectors), 1)
    same = persons[left] == persons[right]
    cosine = (vectors @ vectors.T)[left, right]
    genuine = np.sort(cosine[same])
    impostor = np.sort(cosine[~same])
    rejected = np.arange(len(genuine)) / len(genuine)
    accepted = 1 - np.searchsorted(impostor, genuine) / len(impostor)
    at = int(np.abs(rejected - accepted).argmin())
    tars = [(genuine > impostor[-max(1, int(far * len(impostor)))]).mean() for far in (1e-2, 1e-3, 1e-4)]
    return f"all pairs: EER {(rejected[at] + accepted[at]) / 2:.5f}, TAR at 1e-2, 1e-3, 1e-4 " + " ".join(
        f"{tar:.4f}" for tar in tars
    )


def measure_milliseconds(call: Callable[[], object], items: int) -> float:
    """Measure the least CPU time per item, of twenty calls."""
    times = []
    for _ in range(20):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times) / items * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", default="")
    parser.add_argument("--print-ranges", action="store_true")
    args = parser.parse_args()
    paths = sorted(IMAGES.glob("*/*.jpg"))
    names = [str(path.relative_to(IMAGES).with_suffix("")) for path in paths]
    chips = np.stack(list(cut_subjects(paths)))
    weights = read_dlib_weights()
    graphs = {"float32": build_dlib_onnx(*weights), "eight bits": build_dlib_onnx(*weights, RANGES)}
    if args.shares:
        counted = count_values(chips[::12])
        for share in map(float, args.shares.split(",")):
            cut = find_ranges(counted, share)
            graphs[f"eight bits, {share:g} cut off"] = build_dlib_onnx(*weights, cut)
            if args.print_ranges:
                print(share, cut)
    reference: Float32 | None = None
    base = 0.0
    for name, graph in graphs.items():
        engine = OnnxDlib(graph)
        spent = measure_milliseconds(lambda e=engine: e.embed(chips[:8]), 8)  # type: ignore[misc]
        vectors = embed_with_mirror(engine, chips)
        base = base or spent
        reference = vectors if reference is None else reference
        moved = np.median(np.linalg.norm(vectors - reference, axis=1))
        print(f"{name}: {spent:.2f} ms per chip ({base / spent:.2f} times), moved by {moved:.3f} in the median")
        print(f"  {describe_view2(vectors, names)}; {describe_all_pairs(vectors, names)}", flush=True)


if __name__ == "__main__":
    main()
