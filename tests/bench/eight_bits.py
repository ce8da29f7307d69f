"""dlib's network in eight bits against floating point: the ranges of its activations, accuracy on LFW, and speed.

    python tests/bench/eight_bits.py [--shares 3e-5,0] [--print-ranges]

Needs ../shared. Of every image of LFW-dev the largest face near the middle; ranges come from every twelfth of them. A
share of the values on either side is left out of a range. View 2 are the folds 1 to 5; all pairs are those of the 3,811
faces (4,414 of one person and 7.3 million of two).
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


def faces(paths: list[Path]) -> Iterator[npt.NDArray[np.uint8]]:
    """The aligned chip of each image's subject."""
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


def histograms(chips: UInt8) -> list[tuple[float, float, npt.NDArray[np.int64]]]:
    """Lowest and highest value of each activation, and counts in between."""
    made, names = build_dlib_onnx_with_activations(*read_dlib_weights())
    run = open_session(made, threads=1)
    parts = [chips[at : at + 8] for at in range(0, len(chips), 8)]
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for part in parts:
        for n, values in enumerate(run.run(names, {"chips": part})):
            low[n], high[n] = min(low[n], values.min()), max(high[n], values.max())
    counts = np.zeros((len(names), _BINS), np.int64)
    for part in parts:
        for n, values in enumerate(run.run(names, {"chips": part})):
            counts[n] += np.histogram(values, _BINS, (low[n], high[n]))[0]
    return list(zip(low.tolist(), high.tolist(), counts, strict=True))


def ranges(found: list[tuple[float, float, npt.NDArray[np.int64]]], share: float) -> list[Range]:
    """What is left when a share of the values is cut off on either side, to four digits."""
    cut = []
    for low, high, counts in found:
        below, edges = np.cumsum(counts) / counts.sum(), np.linspace(low, high, _BINS + 1)
        top = edges[min(_BINS, int(np.searchsorted(below, 1 - share)) + 1)]
        bottom = 0.0 if low >= 0 else edges[np.searchsorted(below, share)]
        cut.append((float(f"{bottom:.4g}"), float(f"{top:.4g}")))
    return cut


def flipped(engine: OnnxDlib, chips: UInt8) -> Float32:
    """Unit vectors, mirror images averaged in."""
    raw = engine.embed(chips) + engine.embed(np.ascontiguousarray(chips[:, :, ::-1]))
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), np.float32)


def view2(vectors: Float32, names: list[str]) -> str:
    """Accuracy and TAR by the protocol."""
    at = {name: n for n, name in enumerate(names)}
    pairs = read_pairs(SHARED / "data" / "lfw-dev" / "pairs.txt")
    apart = np.array([np.linalg.norm(vectors[at[p.left]].astype(float) - vectors[at[p.right]]) for p in pairs])
    result = score_pairs(apart, np.array([p.same for p in pairs]), np.array([p.fold for p in pairs]))
    return f"View 2 {result.accuracy:.4f} ± {result.standard_error:.4f}, TAR at 1e-3 {result.tar['0.001']:.4f}"


def all_pairs(vectors: Float32, names: list[str]) -> str:
    """EER, and TAR at three FARs, over all pairs of images."""
    persons = np.unique([name.split("/")[0] for name in names], return_inverse=True)[1]
    left, right = np.triu_indices(len(vectors), 1)
    same, cosine = persons[left] == persons[right], (vectors @ vectors.T)[left, right]
    genuine, impostor = np.sort(cosine[same]), np.sort(cosine[~same])
    rejected, accepted = np.arange(len(genuine)) / len(genuine), 1 - np.searchsorted(impostor, genuine) / len(impostor)
    at = int(np.abs(rejected - accepted).argmin())
    tars = [(genuine > impostor[-max(1, int(far * len(impostor)))]).mean() for far in (1e-2, 1e-3, 1e-4)]
    return f"all pairs: EER {(rejected[at] + accepted[at]) / 2:.5f}, TAR at 1e-2, 1e-3, 1e-4 " + " ".join(
        f"{tar:.4f}" for tar in tars
    )


def milliseconds(call: Callable[[], object], items: int) -> float:
    """Least CPU time of one of twenty calls, an item."""
    times = []
    for _ in range(20):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times) / items * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", default="")
    parser.add_argument("--print-ranges", action="store_true")
    args = parser.parse_args()
    paths = sorted(IMAGES.glob("*/*.jpg"))
    names = [str(path.relative_to(IMAGES).with_suffix("")) for path in paths]
    chips = np.stack(list(faces(paths)))
    weights = read_dlib_weights()
    graphs = {"float32": build_dlib_onnx(*weights), "eight bits": build_dlib_onnx(*weights, RANGES)}
    if args.shares:
        found = histograms(chips[::12])
        for share in map(float, args.shares.split(",")):
            cut = ranges(found, share)
            graphs[f"eight bits, {share:g} cut off"] = build_dlib_onnx(*weights, cut)
            if args.print_ranges:
                print(share, cut)
    before: Float32 | None = None
    base = 0.0
    for name, written in graphs.items():
        engine = OnnxDlib(written)
        spent = milliseconds(lambda e=engine: e.embed(chips[:8]), 8)  # type: ignore[misc]
        vectors = flipped(engine, chips)
        base, before = base or spent, vectors if before is None else before
        moved = np.median(np.linalg.norm(vectors - before, axis=1))
        print(f"{name}: {spent:.2f} ms a chip ({base / spent:.2f} times), moved by {moved:.3f} in the median")
        print(f"  {view2(vectors, names)}; {all_pairs(vectors, names)}", flush=True)


if __name__ == "__main__":
    main()
