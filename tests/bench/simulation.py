"""Ten million images through the real pipeline with fake models: does anything grow that should not?

    python tests/bench/simulation.py [--items 10000000] [--new 100000] [--block 512] [--folder FOLDER]
        [--runner ray --workers 32]

`pipelines.embed.run` itself, with the local runner and two workers, or with Ray and as many actors as asked for (Ray is
told that the machine has a CPU for each): a Parquet list of encoded images is listed and
screened, cut into blocks of up to `--block`, handed to worker processes, written as parts (every column, real checksums,
statistics and syncs), and committed. What is fake: a stage that draws a random face for each work item takes the place
of the five that read, decode and run models, so images are one byte that nobody reads, and rows have no thumbnails.

Commits come every ten seconds, as in a real run; `--commit-seconds 1` makes many of them. A second run then lists all of
it again with some new images. Printed for each million: seconds and CPU an image, memory of the driver (highest RSS
sampled, and what of it no file backs) and of the workers, and the time of a commit; then the last million over the first,
and what the table's log has become.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

import pipelines.embed.pipeline
from facepipe.arrow import to_float_lists
from facepipe.gallery import Gallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord
from facepipe.gallery.known import KnownImages
from facepipe.gallery.table import open_table
from facepipe.hashing import compute_face_id, compute_image_id
from facepipe.schema import DEFAULT_DIM, NO_FACE, OK
from facepipe.sources import SourceConfig
from pipelines.embed import EmbedConfig, EmbedSummary, RunConfig
from pipelines.runtime.plan import WorkerGroup

PER_FILE, FACELESS = 100_000, 50  # rows of a source file; one image in so many shows no face
MIB = 1 << 20


@dataclass(frozen=True)
class Drawn:
    """The one stage: a random face for each work item, and none for every fiftieth."""

    needs: ClassVar[tuple[str, ...]] = ("uri", "fingerprint", "identity", "offset")
    adds: ClassVar[tuple[str, ...]] = ("status", "embedding")

    def setup(self) -> None:
        pass

    def __call__(self, items: pa.Table) -> pa.Table:
        n, uris = items.num_rows, items["uri"].to_pylist()
        has = items["offset"].to_numpy() % FACELESS != 0
        rng = np.random.default_rng(abs(hash(uris[0])))
        faces = rng.standard_normal((int(has.sum()), DEFAULT_DIM), np.float32)
        faces /= np.linalg.norm(faces, axis=1, keepdims=True)
        images = [compute_image_id(uri.encode()) for uri in uris]
        ids = [
            compute_face_id(uri, image, 0) if face else None for uri, image, face in zip(uris, images, has, strict=True)
        ]

        def some(values: np.ndarray) -> pa.Array:
            return pa.array(values, mask=~has)

        floats = {
            name: some(rng.random(n, np.float32)) for name in ("det_score", "face_px", "sharpness", "yaw", "roll")
        }
        return pa.table(
            {
                **{name: items[name] for name in ("uri", "fingerprint", "identity")},
                "image_id": pa.array(images),
                "face_id": pa.array(ids, pa.int64()),
                "status": pa.array(np.where(has, OK, NO_FACE).tolist(), pa.string()),
                **{name: pa.array(np.full(n, 640, np.int32)) for name in ("width", "height")},
                "image_hash": pa.array(rng.integers(-(1 << 63), 1 << 63, n)),
                "face_index": some(np.zeros(n, np.int16)),
                "box": to_float_lists(rng.random((len(faces), 4), np.float32), has),
                "landmarks": to_float_lists(rng.random((len(faces), 10), np.float32), has),
                **floats,
                "embedding": to_float_lists(faces, has),
                "embedding_norm": some(np.ones(n, np.float32)),
            }
        )


@dataclass(frozen=True)
class Simulated(EmbedConfig):
    """A run whose chain is that stage."""

    def build_stages(self, group: WorkerGroup) -> tuple[Any, ...]:
        return (Drawn(),)


class TimedCommitter(Committer):
    """Notes how long each commit takes."""

    seconds: ClassVar[list[float]] = []

    def __call__(self, records: list[PartRecord], metadata: dict[str, Any]) -> None:
        began = time.perf_counter()
        super().__call__(records, metadata)
        self.seconds.append(time.perf_counter() - began)


def rss(process: psutil.Process) -> tuple[int, int]:
    """(RSS, what of it no file backs), bytes; zeros if it has ended."""
    try:
        info = process.memory_info()
    except psutil.NoSuchProcess:
        return 0, 0
    return info.rss, info.rss - info.shared


@dataclass
class Million:
    """What one million images (of the listing) cost."""

    images: int
    seconds: float
    cpu: float
    driver: int
    anonymous: int
    workers: int
    commits: list[float]


@dataclass
class Watch:
    """Follows a run: `progress` is called for every block."""

    step: int
    made: list[Million] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._me = psutil.Process()
        self._start(0)

    def _start(self, listed: int) -> None:
        self._from, self._began, self._worked = listed, time.perf_counter(), self._cpu()
        self._peak, self._commits, self._sampled = (0, 0, 0), len(TimedCommitter.seconds), 0.0

    def _cpu(self) -> float:
        used = sum(self._me.cpu_times()[:4])  # with what ended children had used
        for child in self._me.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                times = child.cpu_times()
                used += times.user + times.system
        return used

    def __call__(self, summary: EmbedSummary) -> None:
        if time.perf_counter() - self._sampled > 0.25:
            self._sampled = time.perf_counter()
            workers = max((rss(child)[0] for child in self._me.children(recursive=True)), default=0)
            self._peak = tuple(map(max, self._peak, (*rss(self._me), workers)))
        if summary.listed - self._from >= self.step:
            self.close(summary)

    def close(self, summary: EmbedSummary) -> None:
        images = summary.listed - self._from
        if not images:
            return
        seconds, cpu = time.perf_counter() - self._began, self._cpu() - self._worked
        million = Million(images, seconds, cpu, *self._peak, TimedCommitter.seconds[self._commits :])
        self.made.append(million)
        commits = f"{len(million.commits)} commits of {1e3 * statistics.median(million.commits or [0]):.0f} ms"
        print(
            f"  {summary.listed / 1e6:6.2f}M: {1e6 * seconds / images:6.1f} µs and {1e6 * cpu / images:6.1f} µs of CPU an image; "
            f"driver {million.driver / MIB:.0f} MiB ({million.anonymous / MIB:.0f} without files), worker "
            f"{million.workers / MIB:.0f} MiB; {commits}, longest {1e3 * max(million.commits or [0]):.0f} ms",
            flush=True,
        )
        self._start(summary.listed)

    def flat(self) -> None:
        """The last whole million over the first."""
        whole = [m for m in self.made if m.images >= self.step]
        if len(whole) < 2:
            return
        first, last = whole[0], whole[-1]
        print(
            f"  last over first: seconds {last.seconds / first.seconds * first.images / last.images:.2f}, CPU "
            f"{last.cpu / first.cpu * first.images / last.images:.2f}, driver's memory {last.driver / first.driver:.2f} "
            f"(without files {last.anonymous / first.anonymous:.2f}), workers' {last.workers / first.workers:.2f}"
        )


def source_files(folder: Path, first: int, count: int) -> None:
    """Encoded images in Parquet: a byte each, which no run here reads."""
    for at in range(first, first + count, PER_FILE):
        numbers = range(at, min(first + count, at + PER_FILE))
        table = pa.table(
            {
                "uri": [f"{n // 1000:07d}/{n:010d}.jpg" for n in numbers],
                "identity": [f"person{n // 10}" for n in numbers],
                "image": pa.array([b"x"] * len(numbers), pa.binary()),
            }
        )
        pq.write_table(table, folder / f"images-{at // PER_FILE:06d}.parquet")


def start_ray(workers: int) -> None:
    """Start Ray with a CPU for each worker, whatever the machine has."""
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, object_store_memory=512 * MIB, log_to_driver=False)


def run(title: str, folder: Path, args: argparse.Namespace) -> Watch:
    print(title, flush=True)
    settings = RunConfig(
        args.runner,
        workers=args.workers,
        min_workers=args.workers,  # none ends and starts again while the listing is behind
        batch=args.block,
        block_largest=args.block,
        commit_seconds=args.commit_seconds,
    )
    config = Simulated(SourceConfig(str(folder / "source")), run=settings)
    watch = Watch(min(1_000_000, max(1, args.items // 10)))
    if args.runner == "ray":
        start_ray(args.workers)
    began = time.perf_counter()
    summary = pipelines.embed.run(config, str(folder / "g"), watch)
    watch.close(summary)
    print(
        f"  {summary.images} embedded, {summary.skipped} passed over in {time.perf_counter() - began:.1f} s; "
        f"first record after {summary.first_record_seconds:.1f} s"
    )
    watch.flat()
    return watch


def log(folder: Path) -> None:
    """What the table's log has grown to, and what opening it costs."""
    place = folder / "g" / "faces" / "_delta_log"
    sizes = {
        kind: [p.stat().st_size for p in place.iterdir() if p.name.endswith(kind)] for kind in (".json", ".parquet")
    }
    print(
        f"the log: {len(sizes['.json'])} commits of {sum(sizes['.json']) / 1e6:.1f} MB, "
        f"{len(sizes['.parquet'])} checkpoints of {max(sizes['.parquet'], default=0) / 1e6:.1f} MB at most"
    )
    before, began = rss(psutil.Process())[1], time.perf_counter()
    gallery = Gallery(str(folder / "g"))
    opened, held = time.perf_counter() - began, rss(psutil.Process())[1] - before
    began = time.perf_counter()
    files = len(gallery.files())
    listed = time.perf_counter() - began
    table = open_table(gallery.faces_folder)
    began = time.perf_counter()
    table.create_checkpoint()
    checkpoint = time.perf_counter() - began
    began = time.perf_counter()
    known = KnownImages(gallery)
    print(
        f"  opened in {opened:.2f} s (+{held / MIB:.0f} MiB), its {files} files listed in {listed:.2f} s, "
        f"a checkpoint in {checkpoint:.2f} s, the table of known images made in {time.perf_counter() - began:.1f} s"
    )
    known.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--new", type=int, default=100_000)
    parser.add_argument("--block", type=int, default=512, help="images of one unit of work, and so of one file")
    parser.add_argument("--runner", choices=["local", "ray"], default="local")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--commit-seconds", type=float, default=10.0)
    parser.add_argument("--folder", help="where the source and the gallery go (10 GB for 10M); they are deleted again")
    args = parser.parse_args()
    pipelines.embed.pipeline.Committer = TimedCommitter  # type: ignore[misc]
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        (folder / "source").mkdir()
        source_files(folder / "source", 0, args.items)
        run(f"{args.items} new images", folder, args)
        log(folder)
        source_files(folder / "source", args.items, args.new)
        run(f"{args.items} known and {args.new} new images", folder, args)
        log(folder)
    finally:
        shutil.rmtree(folder)
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


if __name__ == "__main__":
    from simulation import main as start  # as a module of that name workers can import the stage

    start()
