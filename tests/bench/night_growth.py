"""What a night costs step by step, if the gallery grows and the changes do not.

    python tests/bench/night_growth.py [--images 100000 1000000] [--changes 1000] [--folders 10] [--folder FOLDER]

A folder of tiny files, a thousand in each folder, goes through the whole of `nightly`: listing, screening, blocks, parts,
commits, index, erasure, copies, compaction. Only the chain is fake: a stage reads each file and draws a face, so that no
decoder and no model is in the figures. Clusters are left out: `nightly.py` in this folder has them.

The first night takes everything in. Then come nights without a change and with changes, that pass over folders by their times
(`full_listing_every`), and that look at every file. Of the changes half are new files, three tenths are other contents under the
same name, one tenth is touched, one tenth is removed and erased. They are drawn from all files, or lie in `--folders` folders.
Folders get times in the past, because what has just changed is always listed. Printed are seconds of CPU per step, of this
process and of its children. The index is flat, because training one costs as much for a thousand changes as for none.
"""

import argparse
import cProfile
import os
import platform
import pstats
import resource
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from simulation import MIB, Drawn

from facepipe.config import build
from facepipe.gallery import Gallery
from facepipe.gallery.changes import ReadMark
from facepipe.hashing import compute_face_id, compute_image_id, hash64
from facepipe.schema import TOUCHED
from pipelines.dedup.pipeline import MARK, NAME
from pipelines.embed import EmbedConfig
from pipelines.nightly import pipeline as nightly
from pipelines.nightly.config import NightlyConfig
from pipelines.runtime.plan import WorkerGroup

PER_FOLDER = 1000
STEPS = ("embed", "index", "erase", "dedup", "compact")


@dataclass(frozen=True)
class DrawnByContent(Drawn):
    """The one stage: a random face per file, whose ids follow from the file's bytes, as in a real run."""

    needs: ClassVar[tuple[str, ...]] = ("uri", "path", "fingerprint", "identity", "offset", "previous")

    def __call__(self, items: pa.Table) -> pa.Table:
        rows = super().__call__(
            items.set_column(items.column_names.index("offset"), "offset", pa.array([1] * items.num_rows))
        )
        images = [compute_image_id(Path(os.fsdecode(path)).read_bytes()) for path in items["path"].to_pylist()]
        uris = items["uri"].to_pylist()
        ids = [compute_face_id(uri, image, 0) for uri, image in zip(uris, images, strict=True)]
        previous = items["previous"].to_pylist()
        is_same = [hash64(image) == old for image, old in zip(images, previous, strict=True)]
        columns: dict[str, Any] = {
            "image_id": pa.array(images),
            "face_id": pa.array(ids, pa.int64()),
            "status": pc.if_else(pa.array(is_same), TOUCHED, rows["status"]),
        }
        for name, column in columns.items():
            rows = rows.set_column(rows.column_names.index(name), name, column)
        return rows


@dataclass(frozen=True)
class DrawnEmbed(EmbedConfig):
    """An embedding whose chain is that stage."""

    def build_stages(self, group: WorkerGroup) -> tuple[Any, ...]:
        return (DrawnByContent(),)


class DrawnNights(NightlyConfig):
    """A night whose embeddings are that."""

    def build_source_config(self, source: Any) -> EmbedConfig:
        config = super().build_source_config(source)
        return DrawnEmbed(**{key.name: getattr(config, key.name) for key in fields(EmbedConfig)})


class Corpus:
    """Files that come, change and go, by number."""

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self.next = 0
        self.numbers: list[int] = []
        self.generation = 0
        self.rng = np.random.default_rng(5)
        self.add(count)

    def get_path(self, number: int) -> str:
        return f"{self.folder}/{number // PER_FOLDER:06d}/{number:09d}.jpg"

    def write(self, number: int, text: str) -> None:
        with open(self.get_path(number), "w") as file:
            file.write(text)

    def add(self, count: int) -> None:
        for number in range(self.next, self.next + count):
            if number % PER_FOLDER == 0:
                os.makedirs(os.path.dirname(self.get_path(number)), exist_ok=True)
            self.write(number, f"{number}")
            self.numbers.append(number)
        last = self.next + count
        places = set(range(self.next // PER_FOLDER, (last - 1) // PER_FOLDER + 1))
        self.next = last
        self.settle(places)

    def change(self, count: int, folders: int | None) -> None:
        """Change files of all folders, or of some."""
        self.generation += 1
        numbers = np.array(self.numbers)
        candidates = numbers
        if folders:
            chosen = self.rng.choice(np.unique(numbers // PER_FOLDER), folders, replace=False)
            candidates = numbers[np.isin(numbers // PER_FOLDER, chosen)]
        drawn = self.rng.choice(candidates, count // 2, replace=False)
        changed, touched, removed = np.split(drawn, [3 * count // 10, 4 * count // 10])
        for number in changed.tolist():
            self.write(number, f"{number} of day {self.generation}")
        for number in touched.tolist():
            os.utime(self.get_path(number))
        for number in removed.tolist():
            os.unlink(self.get_path(number))
        self.numbers = numbers[~np.isin(numbers, removed)].tolist()
        self.add(count - count // 2)
        self.settle({number // PER_FOLDER for number in drawn.tolist()})

    def settle(self, places: set[int]) -> None:
        """Give folders new times that are hours ago."""
        for place in places:
            folder = os.path.dirname(self.get_path(place * PER_FOLDER))
            time = 1e9 + 1000 * self.generation + place % 1000
            os.utime(folder, (time, time))


class Watch:
    """Measures the CPU seconds of each step of a night, and the memory."""

    def __init__(self, *, profiles: bool) -> None:
        self.cpu: dict[str, float] = {}
        self.profiles: dict[str, list[cProfile.Profile]] = {}
        self._profiles = profiles
        measure = nightly._Night._measure

        @contextmanager
        def measure_cpu(night: Any, step: str, source: str = "") -> Iterator[None]:
            before = read_cpu()
            profile = cProfile.Profile() if self._profiles else None
            if profile:
                profile.enable()
            try:
                with measure(night, step, source):
                    yield
            finally:
                if profile:
                    profile.disable()
                    self.profiles.setdefault(step, []).append(profile)
                self.cpu[step] = self.cpu.get(step, 0.0) + read_cpu() - before

        nightly._Night._measure = measure_cpu  # type: ignore[method-assign, assignment]

    def run(self, config: NightlyConfig) -> dict[str, float]:
        self.cpu = {}
        self.profiles = {}
        summary = nightly.run(config)
        assert summary.failures == [], summary.failures
        return dict(self.cpu)

    def show_profiles(self) -> None:
        for step, profiles in self.profiles.items():
            print(f"\n{step}")
            pstats.Stats(*profiles).sort_stats("cumulative").print_stats(60)


def read_cpu() -> float:
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def build_config(place: Path, full_listing_every: int, purge_days: float) -> NightlyConfig:
    source = {"uri": str(place / "in"), "name": "in", "missing": "erase", "full_listing_every": full_listing_every}
    return build(
        DrawnNights,
        {"gallery": str(place / "g"), "source": [source]},
        {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}},
        {"run": {"runner": "inline", "block_largest": 4096}, "index": {"factory": "Flat"}},
        {"night": {"clusters": "no", "dedup": True, "purge_days": purge_days}, "compact": {"fewest": 2}},
    )


def measure_gallery(args: argparse.Namespace, count: int, place: Path, watch: Watch) -> dict[str, dict[str, float]]:
    corpus = Corpus(place / "in", count)
    by_times = build_config(place, full_listing_every=1000, purge_days=args.purge_days)
    full = build_config(place, full_listing_every=1, purge_days=args.purge_days)
    # Copies are looked for from the second night on: the first would compare everything with everything.
    first = replace(by_times, night=replace(by_times.night, dedup=False))
    print(f"\n{count} images, first night: {show(watch.run(first))}", flush=True)
    gallery = Gallery(by_times.gallery)
    report = place / "g" / "reports" / NAME
    report.mkdir(parents=True, exist_ok=True)
    ReadMark.from_gallery(gallery).save(str(report / MARK))
    nights = {}
    for name, config, changes in (
        ("folders by their times, no change", by_times, 0),
        ("folders by their times, changes", by_times, args.changes),
        ("every file, no change", full, 0),
        ("every file, changes", full, args.changes),
    ):
        if changes:
            corpus.change(changes, args.folders)
        nights[name] = watch.run(config)
        print(f"{name}: {show(nights[name])}", flush=True)
    totals = Gallery(by_times.gallery).count_totals()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    print(f"{totals.files} files of {totals.bytes / 1e6:.0f} MB; peak of this process {peak:.0f} MiB", flush=True)
    return nights


def show(cpu: dict[str, float]) -> str:
    parts = [f"{step} {cpu.get(step, 0.0):.2f}" for step in STEPS]
    return f"{sum(cpu.values()):.2f} s of CPU; " + ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--folders", type=int, help="number of folders that the changes lie in; all by default")
    parser.add_argument(
        "--purge-days", type=float, default=0.0, help="night.purge_days: days that erased rows are hidden"
    )
    parser.add_argument("--folder", help="where the files and galleries go; they are deleted again")
    parser.add_argument("--keep", action="store_true", help="keep them")
    parser.add_argument("--profile", action="store_true", help="print a profile of the last night")
    args = parser.parse_args()
    print(f"{date.today()}, {platform.processor()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.0f}")
    print(f"`python {shlex.join(sys.argv)}`")
    watch = Watch(profiles=args.profile)
    totals = []
    for count in args.images:
        place = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            totals.append(measure_gallery(args, count, place, watch))
        finally:
            if not args.keep:
                shutil.rmtree(place)
        if args.profile:
            watch.show_profiles()
    for name in totals[0] if len(totals) > 1 else ():
        first, last = totals[0][name], totals[-1][name]
        ratios = [f"{step} {last[step] / max(0.01, first[step]):.1f}" for step in STEPS if step in first]
        whole = sum(last.values()) / sum(first.values())
        print(f"{name}: {args.images[-1]} images over {args.images[0]}: {', '.join(ratios)}, all {whole:.1f}")


if __name__ == "__main__":
    from night_growth import main as start  # as a module of that name workers can import the stage

    start()
