"""Nodes of a Ray cluster killed at random moments of `embed`: what becomes of the run, and of the gallery.

    python tests/bench/nodes.py [--trials 12] [--images 600] [--seed 0]

A cluster of three nodes on this machine, one worker each; in every trial SIGKILL takes all processes of one node that is
not the driver's, and a new node takes its place for the next. In every fourth the process that lists the source dies
instead. `at` is the share of images committed by then, `busy` says whether the node had a block in hand, `orphans` are
Parquet files that no version of the table names (`facepipe compact` deletes them).
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before tests/, which has a folder of the package's name

from conftest import draw
from helpers import rows
from ray_nodes import Cluster, Node, cluster

from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery

LIMIT = 150  # seconds after which a run is said to hang
SETTINGS = [
    *("--set", "detect.model=fake-detector", "--set", "embed.model=fake-embedder", "--set", "run.block_smallest=4"),
    *("--set", "run.block_largest=8", "--set", "run.commit_seconds=0.05", "--quiet"),
]


def make_corpus(root: Path, images: int, side: int = 960) -> Path:
    """Images of some tens of milliseconds' work each, a few of them broken."""
    root.mkdir(parents=True, exist_ok=True)
    for n in range(images):
        data = cv2.imencode(".png", cv2.resize(draw(n), (side, side), interpolation=cv2.INTER_NEAREST))[1].tobytes()
        (root / f"{n:04d}.png").write_bytes(data[: len(data) // 2] if n % 50 == 7 else data)
    return root


def start(corpus: Path, gallery: Path, nodes: Cluster | None, log: Path | None = None) -> "subprocess.Popen[bytes]":
    """`facepipe embed` in a process of its own: on the cluster, or else inline."""
    runner = "ray" if nodes else "inline"
    command = [sys.executable, "-m", "jobs.cli", "embed", str(corpus), str(gallery), "--runner", runner, *SETTINGS]
    with (log or Path("/dev/null")).open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=nodes.environment if nodes else None)


def committed(gallery: Path) -> int:
    """Images in the table; 0 where there is none yet."""
    return Gallery(str(gallery)).counts()["images"] if Gallery.exists(str(gallery)) else 0


def listing(node: Node) -> list[psutil.Process]:
    """The process that lists the source, where that is on this node and still at work."""
    return [process for process, title in node.workers() if "Listing" in title]


def working(node: Node) -> int:
    """How many of the node's workers are in the middle of a block."""
    return sum("ReadDecodeFacesWrite" in title and "submit" in title for _, title in node.workers())


@dataclass
class Outcome:
    """What became of a run one of whose nodes was killed."""

    trial: int
    at: float = 0.0
    victim: str = "none"
    busy: bool = False
    code: int | None = None
    equal: bool = False
    problems: list[str] = field(default_factory=list)
    orphans: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        ended = "hangs" if self.code is None else "yes" if self.code == 0 else f"rc {self.code}"
        return (
            f"{self.trial:5} {self.at:6.0%}  {self.victim:8} {'yes' if self.busy else 'no':5} {ended:9} {'yes' if self.equal else 'NO':6} "
            f"{len(self.problems):8} {self.orphans:7} {self.seconds:8.1f}"
        )


def run(
    trial: int, nodes: Cluster, corpus: Path, gallery: Path, expected: list[dict[str, object]], log: Path
) -> Outcome:
    """One run, one node killed at a random moment of it."""
    rng, outcome = random.Random(trial), Outcome(trial)
    images = len({row["uri"] for row in expected})
    share = rng.uniform(0, 0.4 if trial % 4 == 3 else 0.9)
    began = time.monotonic()
    driver = start(corpus, gallery, nodes, log)
    try:
        while driver.poll() is None and committed(gallery) <= share * images:
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 0.3))
        victim = rng.choice([node for node in nodes.nodes[1:] if node.alive])
        lists = listing(nodes.nodes[0]) if trial % 4 == 3 else []
        outcome.at = committed(gallery) / images
        if lists:
            outcome.victim, outcome.busy = "listing", True
            lists[0].kill()
        elif driver.poll() is None:
            outcome.victim, outcome.busy = "node", working(victim) > 0
            victim.kill()
        outcome.code = driver.wait(LIMIT)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait()
    outcome.seconds = time.monotonic() - began
    outcome.equal = rows(gallery) == expected
    found = Gallery(str(gallery))
    outcome.problems = verify_gallery(found).problems
    named = {Path(file["path"]).name for file in found.files()}
    outcome.orphans = len({path.name for path in Path(found.faces_folder).glob("*.parquet")} - named)
    return outcome


def trials(count: int, images: int, seed: int, folder: Path) -> Iterator[Outcome]:
    corpus = make_corpus(folder / "corpus", images)
    assert start(corpus, folder / "inline", None).wait(600) == 0
    expected = rows(folder / "inline")
    with cluster() as nodes:
        began = time.monotonic()
        assert start(corpus, folder / "whole", nodes).wait(300) == 0
        print(f"{images} images; a run of which no node dies takes {time.monotonic() - began:.1f} s\n", flush=True)
        print("trial     at  victim   busy  finished  equal  problems orphans  seconds", flush=True)
        for n in range(seed, seed + count):
            outcome = run(n, nodes, corpus, folder / f"g{n}", expected, folder / f"log{n}")
            nodes.refill()
            yield outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for outcome in trials(args.trials, args.images, args.seed, Path(folder)):
            print(outcome, flush=True)
            for problem in outcome.problems:
                print(f"      {problem}", flush=True)


if __name__ == "__main__":
    main()
