"""Measure applying and reading decisions: time and memory by their number.

    python tests/bench/decisions.py FOLDER [--faces 1000000] [--decisions 1000000]

Each decision says who a face of a synthetic gallery is, or that it is the same as another one. The file is JSON lines.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from galleries import CONTRACT, append

from facepipe.decisions import read_decisions
from facepipe.decisions.apply import apply_files
from facepipe.gallery import Gallery
from facepipe.schema import OK, conform

Result = TypeVar("Result")
_BLOCK = 100_000


def make_gallery(path: Path, count: int) -> Gallery:
    """Make a gallery of faces with boxes, and without vectors, which decisions do not look at."""
    gallery = Gallery.create(str(path), CONTRACT)
    rng = np.random.default_rng(0)
    blocks = []
    for first in range(0, count, _BLOCK):
        numbers = range(first, min(first + _BLOCK, count))
        columns = {
            "face_id": pa.array(rng.integers(0, 1 << 63, len(numbers))),
            "image_id": pa.array([f"{number:032x}" for number in numbers]),
            "uri": pa.array([f"/synthetic/{number:09d}.jpg" for number in numbers]),
            "status": pa.array([OK] * len(numbers)),
            "face_index": pa.array(np.zeros(len(numbers), np.int16)),
            "box": pa.array([[10.0, 10.0, 90.0, 100.0]] * len(numbers), pa.list_(pa.float32())),
        }
        blocks.append(conform(pa.table(columns)))
    append(gallery, blocks, "bench")
    return Gallery(str(path))


def write_decisions(gallery: Gallery, path: Path, count: int) -> None:
    """Write a file of decisions that do not contradict each other."""
    ids = gallery.to_arrow(["face_id"])["face_id"].to_numpy()
    chosen = np.random.default_rng(1).permutation(ids)[:count]
    with path.open("w") as file:
        for number, face in enumerate(chosen.tolist()):
            row = {"decision": "is", "face_id": str(face), "person": f"person {number // 10}", "who": "bench"}
            if number % 10 == 9:
                row = {"decision": "same_as", "face_id": str(face), "other_face_id": str(chosen[number - 1])}
            file.write(json.dumps(row) + "\n")


def measure(name: str, work: Callable[[], Result]) -> Result:
    """Run something, and print its seconds and the most memory that the process has had so far."""
    began = time.perf_counter()
    result = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{name}: {time.perf_counter() - began:.1f} s, at most {peak:.0f} MiB", flush=True)
    return result


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faces", type=int, default=1_000_000)
    parser.add_argument("--decisions", type=int, default=1_000_000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    gallery = measure("gallery", lambda: make_gallery(args.folder / "gallery", args.faces))
    file = args.folder / "decisions.jsonl"
    measure("file", lambda: write_decisions(gallery, file, args.decisions))
    summary = measure("apply", lambda: apply_files(gallery, [str(file)]))
    print(summary.added, summary.problems[:3])
    again = measure("apply again", lambda: apply_files(gallery, [str(file)]))
    print(again.known, again.added)
    decisions = measure("read", lambda: read_decisions(gallery))
    print(len(decisions), "decisions,", len(decisions.same_pairs), "pairs")


if __name__ == "__main__":
    main()
