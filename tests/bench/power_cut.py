"""What a power cut leaves of a gallery, and what the syncs cost that keep it.

    python tests/bench/power_cut.py [--checkout FOLDER] [--seconds 0 6 12]
    python tests/bench/power_cut.py --commits 200 [--checkout FOLDER] [--folder FOLDER]

Without --commits each step runs on an ext4 of its own in a file, on a gallery that is on the disk. A copy of the file at a
moment is what a disk holds if the current goes away then. The copy is mounted and read. That needs root and a loop device.

With --commits it measures commits of one small file each, with and without syncs. --checkout names another checkout of
facepipe whose code is run, such as one of an older commit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import cv2  # noqa: E402
from conftest import draw  # noqa: E402
from powercut import Ext4, mount_ext4  # noqa: E402

_SETTINGS = (
    "detect.model=fake-detector",
    "embed.model=fake-embedder",
    "run.block_largest=8",
    "run.commit_seconds=0.02",
)
_EMBED = [word for setting in _SETTINGS for word in ("--set", setting)] + ["--runner", "inline", "--quiet"]

_COMMIT = """
import os, sys, time

if sys.argv[3] == "without":
    os.fsync = lambda file: None
from bench.galleries import CONTRACT, Faces
from bench.galleries import rows as face_rows
from facepipe.gallery import Gallery
try:
    from facepipe.gallery.commits.committer import Committer
    from facepipe.gallery.commits.parts import PartRecord
    from facepipe.gallery.commits.rewrite import write_rows
except ImportError:
    from facepipe.gallery.commit import Committer
    from facepipe.gallery.parts import Record as PartRecord
    from facepipe.gallery.rewrite import write as write_rows

gallery = Gallery.create(sys.argv[1], CONTRACT)
commit = Committer(gallery, "run")
ids, vectors = next(Faces().blocks(10))
for n in range(int(sys.argv[2])):
    action, name = write_rows(gallery, face_rows(ids, vectors, 10 * n), "test", True)
    began = time.perf_counter()
    commit([PartRecord(0, path=name, size=action.size, stats=action.stats)], {})
    print(time.perf_counter() - began)
"""


@dataclass(frozen=True)
class Facepipe:
    """The commands of a checkout.

    Attributes:
        checkout: Its folder.
    """

    checkout: Path

    def run(self, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        """Run a command."""
        command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
        return subprocess.run(command, cwd=self.checkout, env=self.environment, capture_output=True, text=True)

    def require(self, *words: str | Path) -> None:
        """Run a command that must succeed."""
        done = self.run(*words)
        if done.returncode:
            raise SystemExit(f"{words[0]} failed: {done.stderr[-2000:]}")

    @property
    def environment(self) -> dict[str, str]:
        """The environment that makes Python import from the checkout."""
        paths = os.pathsep.join([str(self.checkout), str(self.checkout / "tests")])
        return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Step:
    """What is done before the disk is synced, what after it, and how many images must be there then."""

    name: str
    prepare: Callable[[Facepipe, Path, Path], None]
    run: Callable[[Facepipe, Path, Path], None]
    images: int


def draw_corpus(folder: Path) -> None:
    """Draw two sources of 24 images of three people each."""
    for n in range(48):
        place = folder / f"source{n // 24}" / f"person{n % 3}"
        place.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"{n:02d}.png"), draw(n))


def embed(number: int) -> Callable[[Facepipe, Path, Path], None]:
    """Make the step that embeds a source."""
    return lambda facepipe, corpus, gallery: facepipe.require("embed", corpus / f"source{number}", gallery, *_EMBED)


def embed_and_index(facepipe: Facepipe, corpus: Path, gallery: Path) -> None:
    """Make a gallery of the first source, with its index."""
    embed(0)(facepipe, corpus, gallery)
    facepipe.require("index", gallery, "--quiet")


STEPS = [
    Step("first embed", lambda *_: None, embed(0), 24),
    Step("second embed", embed_and_index, embed(1), 48),
    Step("erase", embed_and_index, lambda f, _, g: f.require("erase", g, "--identity", "person1"), 16),
    Step("compact", embed_and_index, lambda f, _, g: f.require("compact", g, "--all"), 24),
    Step("index", embed(0), lambda f, _, g: f.require("index", g, "--quiet"), 24),
]


def describe_cut(facepipe: Facepipe, gallery: Path, images: int) -> str:
    """Describe what a disk holds of a gallery."""
    done = facepipe.run("verify", gallery, "--json")
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return f"LOST: {(done.stderr.strip() or 'no message').splitlines()[-1][:110]}"
    held = found.get("images", found.get("table", {}).get("images"))
    problems = found.get("problems", [])
    lost = f"LOST {images - held} of {images} images" if held < images else f"all {images} images"
    return f"{lost}, verify finds {len(problems)} problems{': ' + str(problems[0])[:90] if problems else ''}"


def print_table(facepipe: Facepipe, seconds: list[float], folder: Path) -> None:
    """Run each step, cut, and print what is left."""
    corpus = folder / "corpus"
    draw_corpus(corpus)
    print("| step | cut | what is left |\n|---|---|---|")
    for number, step in enumerate(STEPS):
        with mount_ext4(folder / f"{number}", megabytes=96) as disk:
            if disk is None:
                raise SystemExit("nobody may mount a disk here: run as root, with loop devices")
            gallery = disk.path / "g"
            step.prepare(facepipe, corpus, gallery)
            disk.sync()
            step.run(facepipe, corpus, gallery)
            ended = time.monotonic()
            for second in seconds:
                time.sleep(max(0.0, ended + second - time.monotonic()))
                print_cut(facepipe, step, disk, f"{time.monotonic() - ended:.0f} s after")
            disk.commit_journal()
            print_cut(facepipe, step, disk, "after the journal's next commit")


def print_cut(facepipe: Facepipe, step: Step, disk: Ext4, moment: str) -> None:
    """Cut a disk, and print what is left."""
    with disk.cut() as after:
        print(f"| {step.name} | {moment} | {describe_cut(facepipe, after / 'g', step.images)} |", flush=True)


def print_commits(facepipe: Facepipe, count: int, folder: Path) -> None:
    """Print how long commits take, with and without syncs."""
    print("| commits | median ms | 95 % ms |\n|---|---|---|")
    for how in ("with", "without"):
        command = [sys.executable, "-c", _COMMIT, str(folder / how), str(count), how]
        options = {"cwd": facepipe.checkout, "env": facepipe.environment, "check": True}
        done = subprocess.run(command, capture_output=True, text=True, **options)
        times = sorted(1000 * float(line) for line in done.stdout.split())
        print(f"| {how} syncs | {statistics.median(times):.1f} | {times[int(0.95 * len(times))]:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=REPOSITORY)
    parser.add_argument("--seconds", type=float, nargs="*", default=[0.0, 6.0, 12.0])
    parser.add_argument("--commits", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        code = Facepipe(options.checkout.resolve())
        if options.commits:
            print_commits(code, options.commits, Path(temporary))
        else:
            print_table(code, options.seconds, Path(temporary))
