"""Measure what lists of boxes and landmarks of VGGFace2's layout cost: CPU time, memory and disk by the number of lines.

    python tests/bench/given_lists.py [--lines 30000 100000 300000] [--for 3300000]

Each size runs in a process of its own: two lists are read, and the uris of all their images are looked up. The last row
extrapolates the two largest sizes linearly.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from facepipe.given.lists import FILES, read_lists
from facepipe.given.table import GivenFaces

_BATCH = 8192
_COLUMNS = ("reading", "finding", "memory", "disk")


def write_lists(folder: Path, lines: int) -> list[str]:
    """Write boxes and landmarks of as many faces, one per image, in the order of persons."""
    rng = np.random.default_rng(1)
    paths = [folder / "loose_bb.csv", folder / "loose_landmark.csv"]
    titles = ",".join(f"P{point}{axis}" for point in range(1, 6) for axis in "XY")
    with paths[0].open("w") as boxes, paths[1].open("w") as landmarks:
        boxes.write("NAME_ID,X,Y,W,H\n")
        landmarks.write(f"NAME_ID,{titles}\n")
        for number in range(lines):
            name = name_image(number)
            x, y, w, h = rng.integers(40, 200, 4).tolist()
            boxes.write(f'"{name}",{x},{y},{w},{h}\n')
            points = np.array([x, y]) + np.array([w, h]) * _SHARES
            landmarks.write(f'"{name}",' + ",".join(f"{value:.4f}" for value in points.ravel()) + "\n")
    return [str(path) for path in paths]


_SHARES = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])


def name_image(number: int) -> str:
    return f"n{number // 362:06d}/{number % 362:04d}_01"


def measure_one(lines: int) -> None:
    """Read lists of as many lines, find their images, and print the figures as JSON."""
    with tempfile.TemporaryDirectory() as work:
        paths = write_lists(Path(work), lines)
        memory = read_peak()
        begin = sum(os.times()[:2])
        with read_lists(paths) as folder:
            reading = sum(os.times()[:2]) - begin
            faces = GivenFaces(folder)
            begin = sum(os.times()[:2])
            found = 0
            for start in range(0, lines, _BATCH):
                numbers = range(start, min(start + _BATCH, lines))
                at = faces.find([f"/data/VGGFace2/train/{name_image(number)}.jpg" for number in numbers])
                found += int((at >= 0).sum())
                faces.read_first(at)
            assert found == lines
            finding = sum(os.times()[:2]) - begin
            disk = sum(os.path.getsize(os.path.join(folder, name)) for name in FILES)
        figures = {"reading": reading, "finding": finding, "memory": read_peak() - memory, "disk": disk / 2**20}
    print(json.dumps(figures))


def read_peak() -> float:
    """Read the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[30_000, 100_000, 300_000])
    parser.add_argument("--for", type=int, default=3_300_000, dest="target")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure_one(arguments.one)
        return
    print(f"{'faces':>10} {'read CPU s':>11} {'find CPU s':>11} {'peak MiB more':>14} {'disk MiB':>9}")
    results = []
    for lines in sorted(arguments.lines):
        command = [sys.executable, __file__, "--one", str(lines)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        results.append((lines, json.loads(output)))
        print_row(f"{lines:,}", results[-1][1])
    if len(results) > 1:
        (low, before), (high, last) = results[-2:]
        factor = (arguments.target - high) / (high - low)
        print_row(
            f"~{arguments.target:,}", {name: last[name] + factor * (last[name] - before[name]) for name in _COLUMNS}
        )


def print_row(title: str, figures: dict[str, float]) -> None:
    print(
        f"{title:>10} {figures['reading']:11.1f} {figures['finding']:11.1f} {figures['memory']:14.0f} "
        f"{figures['disk']:9.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
