"""Checks that only a GPU can settle, one line each: PASS, FAIL or INFO. `gpu_run.sh` says how to read them.

python tests/bench/gpu_probe.py --photos FOLDER [--only float32,syncs]
python tests/bench/gpu_probe.py --device cpu --small       anywhere, to see that it runs
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gpu as bench

from facepipe.arrow import to_vectors
from facepipe.models.zoo.registry import find_card
from facepipe.stages import Align, Chain, Decode, Detect, Embed

_GENERATOR = np.random.default_rng(0)
_RESULTS: dict[str, dict[str, Any]] = {}


class Probes:
    """The checks. Each says its line, and needs no other one."""

    def __init__(self, given: argparse.Namespace):
        self.device: str = given.device
        self.on_gpu = self.device != "cpu"
        self.small: bool = given.small
        self.seconds = 0.1 if given.small else 3.0
        self.photos = bench.list_photos(given.photos)
        self.count = 4 if given.small else 256

    def say(self, kind: str, name: str, text: str) -> None:
        _RESULTS[name] = {"kind": kind, "text": text}
        print(f"{kind:4} {name}: {text}", flush=True)

    def build(self, precision: str = "float32", batch: int = 32) -> list[Any]:
        """Build the three stages on the device."""
        detect = Detect(device=self.device, precision=precision, batch=batch)  # type: ignore[arg-type]
        embed = Embed(device=self.device, precision=precision)  # type: ignore[arg-type]
        stages = [detect, Align(thumbs=False), embed]
        for stage in stages:
            stage.setup()
        return stages

    def make_table(self) -> pa.Table:
        """Decode photos of many shapes; frames of noise without photos."""
        if not self.photos:
            return bench.make_table(bench.make_frames([], self.count))
        return Decode(threads=os.cpu_count() or 1)(bench.read_table(self.photos, self.count))

    def measure_rate(self, stages: list[Any], table: pa.Table, parallel: int) -> float:
        """Measure images per second of stages on tables like one."""
        chain = Chain(stages, table.num_rows, parallel=parallel)
        start: float | None = None

        def list_tables() -> Iterator[pa.Table]:
            while start is None or time.perf_counter() - start < self.seconds:
                yield table

        images = 0
        for n, _ in enumerate(chain._run_parallel(stages, list_tables())):
            if n == parallel:
                start = time.perf_counter()
            elif start is not None:
                images += self.count
        assert start is not None
        return images / (time.perf_counter() - start)

    def environment(self) -> None:
        """Versions, and whether there is a GPU at all."""
        text = f"python {sys.version.split()[0]}, torch {torch.__version__}, {os.cpu_count()} CPUs, {len(self.photos)} photos"
        if self.on_gpu:
            assert torch.cuda.is_available(), "torch sees no GPU"
            product = torch.ones(64, 64, device=self.device) @ torch.ones(64, 64, device=self.device)
            assert product.sum().item() == 64**3
            text += f", {torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
        self.say("INFO", "environment", text)

    def float32(self) -> None:
        """`precision=float32` is IEEE, and `tf32` is not."""
        noise = _GENERATOR.integers(0, 256, (16, 9, 9, 3), np.uint8)
        chips = noise.repeat(17, 1).repeat(17, 2)[:, :150, :150].copy()
        card = find_card("dlib-resnet", "embedder")
        expected = card.load("cpu", 4).embed(chips)
        moves = {}
        for precision in ("tf32", "float32"):
            embedder = card.load(self.device, 4)
            if hasattr(embedder, "configure"):
                embedder.configure(precision, 128)
            vectors = embedder.embed(chips)
            unit, other = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (vectors, expected))
            moves[precision] = float(np.median(np.linalg.norm(unit - other, axis=1)))
        kind = "PASS" if moves["float32"] < 2e-4 else "FAIL"
        self.say(kind, "float32", ", ".join(f"{name} moves vectors by {move:.1e}" for name, move in moves.items()))

    def syncs(self) -> None:
        """Find where the host waits for the device without meaning to."""
        if not self.on_gpu:
            self.say("INFO", "syncs", "needs CUDA")
            return
        table = self.make_table()
        stages = self.build()
        self.measure_rate(stages, table, 1)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for stage in stages:
                table = stage(table)
        torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{os.path.relpath(w.filename)}:{w.lineno}" for w in caught if "synchron" in str(w.message))
        self.say("INFO", "syncs", f"{sum(places.values())} per table: {dict(places.most_common(8))}")

    def out_of_memory(self) -> None:
        """With 3 GB of the card the same faces come out."""
        if not self.on_gpu:
            self.say("INFO", "out_of_memory", "needs CUDA")
            return
        table = self.make_table()
        expected = Chain(self.build(), self.count)(table)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(3e9 / total)
        try:
            stages = self.build(batch=64)
            found = Chain(stages, self.count, parallel=4)(table)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        is_same = found["face_id"].equals(expected["face_id"])
        apart = 9.0
        if is_same and len(found["embedding"].drop_null()):
            vectors, others = (to_vectors(t["embedding"].drop_null(), 128) for t in (found, expected))
            apart = float(np.linalg.norm(vectors - others, axis=1).max())
        batch = stages[0].detector._batches.max_batch
        self.say(
            "PASS" if is_same else "FAIL", "out_of_memory", f"batches of {batch}; vectors move by at most {apart:.1e}"
        )

    def throughput(self) -> None:
        """Images/s from decoded images: one shape, and photos of many shapes, by tables in work."""
        one_shape = bench.make_table(bench.make_frames(self.photos, self.count))
        many_shapes = self.make_table()
        for precision in ("float32",) if self.small else ("float32", "float16"):
            stages = self.build(precision)
            rates = {p: self.measure_rate(stages, many_shapes, p) for p in ((1, 2) if self.small else (1, 2, 4, 8))}
            text = ", ".join(f"{rate:,.0f} with {parallel} tables" for parallel, rate in rates.items())
            single = self.measure_rate(stages, one_shape, 4)
            self.say("INFO", f"throughput {precision}", f"photos of many shapes {text}; one shape {single:,.0f} with 4")

    def second_look(self) -> None:
        """One image without a face in each table must not stop the others."""
        frames = bench.make_frames(self.photos, self.count)
        noise = _GENERATOR.integers(0, 256, (bench.HEIGHT, bench.WIDTH, 3), np.uint8)
        stages = self.build()
        plain = self.measure_rate(stages, bench.make_table(frames), 4)
        with_one = self.measure_rate(stages, bench.make_table([*frames[:-1], noise]), 4)
        kind = "INFO" if not self.photos else "PASS" if with_one > 0.9 * plain else "FAIL"
        self.say(kind, "second_look", f"{plain:,.0f} images/s, {with_one:,.0f} with one without a face per table")

    def launches(self) -> None:
        """Kernels and copies of a table, and the share of the time that the GPU works."""
        if not self.on_gpu:
            self.say("INFO", "launches", "needs CUDA")
            return
        from torch.profiler import ProfilerActivity, profile

        table = self.make_table()
        stages = self.build("float16")
        self.measure_rate(stages, table, 1)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            start = time.perf_counter()
            Chain(stages, self.count)(table)
            torch.cuda.synchronize()
            wall = time.perf_counter() - start
        events = profiler.key_averages()
        busy = sum(event.self_device_time_total for event in events) / 1e6
        counts = {word: sum(e.count for e in events if word in e.key) for word in ("LaunchKernel", "MemcpyAsync")}
        self.say("INFO", "launches", f"{counts} per table of {self.count}; GPU {busy:.3f} s of {wall:.3f} s wall")

    def decoding(self) -> None:
        """JPEGs: Decode's threads on the CPUs against nvJPEG through torchvision."""
        if not self.photos:
            self.say("INFO", "decoding", "needs photos")
            return
        table = bench.read_table(self.photos, self.count)
        threads = os.cpu_count() or 1
        stage = Decode(threads=threads)
        stage(table)
        start = time.perf_counter()
        stage(table)
        text = (
            f"{table.num_rows / (time.perf_counter() - start):,.0f} photos/s by {threads} threads, at a reduced scale"
        )
        if self.on_gpu:
            try:
                from torchvision.io import ImageReadMode, decode_jpeg

                files = [torch.from_numpy(np.fromfile(path, np.uint8)) for path in self.photos]
                batch = [files[n % len(files)] for n in range(self.count)]
                decode_jpeg(batch[:32], mode=ImageReadMode.RGB, device="cuda")
                torch.cuda.synchronize()
                start = time.perf_counter()
                for at in range(0, self.count, 64):
                    decode_jpeg(batch[at : at + 64], mode=ImageReadMode.RGB, device="cuda")
                torch.cuda.synchronize()
                text += f"; {self.count / (time.perf_counter() - start):,.0f} by nvJPEG, at full size"
            except Exception as error:
                text += f"; torchvision: {type(error).__name__} {str(error)[:120]}"
        self.say("INFO", "decoding", text)

    def nearest(self) -> None:
        """Top 10 of ours, of faiss on CPUs (to compare), of faiss on the GPU, and the bare product."""
        import faiss

        from facepipe.nearest.knn_gpu import VectorBlock, find_neighbours

        n, m = (100, 5_000) if self.small else (20_000, 1_000_000)
        vectors = _GENERATOR.normal(size=(m, 128)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        queries = vectors[_GENERATOR.integers(0, m, n)] + 0.05 * _GENERATOR.normal(size=(n, 128)).astype(np.float32)
        queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
        device = self.device
        start = time.perf_counter()
        hits = find_neighbours(queries, [VectorBlock(np.arange(m), vectors)], 10, device)
        ours = time.perf_counter() - start
        ids = faiss.knn(queries[:100], vectors, 10)[1]
        share = float((hits.ids[:100] == ids).mean())
        text = f"{n:,} x {m:,}: {ours:.2f} s, {share:.1%} of ids are faiss's"
        if self.on_gpu and hasattr(faiss, "knn_gpu"):
            resources = faiss.StandardGpuResources()
            start = time.perf_counter()
            faiss.knn_gpu(resources, queries, vectors, 10)
            text += f"; faiss.knn_gpu {time.perf_counter() - start:.2f} s"
        self.say("PASS" if share > 0.99 else "FAIL", "nearest", text)

    def training(self) -> None:
        """Steps on chips in memory, with and without cuDNN's search."""
        from facepipe.models.runtime.preprocess import preprocess
        from facepipe.models.zoo.architectures import ARCHITECTURES
        from facepipe.training.losses import LossConfig, build_objective

        for name, batch in (("mobilefacenet", 8),) if self.small else (("mobilefacenet", 512), ("iresnet50", 512)):
            architecture = ARCHITECTURES[name]
            size = architecture.layout.size
            net = architecture.build(128, size).to(self.device).train()
            head = build_objective(LossConfig("arcface"), 128, 1000, 0).to(self.device)
            optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.01, momentum=0.9)
            chips = torch.randint(0, 256, (batch, size[1], size[0], 3), dtype=torch.uint8, device=self.device)
            labels = torch.randint(0, 1000, (batch,), device=self.device)
            rates = {}
            for search in (False, True):
                torch.backends.cudnn.benchmark = search
                for warm_up in (True, False):
                    start = time.perf_counter()
                    steps = 1 if self.small else 12
                    for _ in range(steps):
                        with torch.autocast(self.device.partition(":")[0], torch.bfloat16):
                            embeddings = net(preprocess(chips, architecture.input))
                        head(embeddings.float(), labels).backward()
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                    if self.on_gpu:
                        torch.cuda.synchronize()
                    if not warm_up:
                        rates[search] = batch * steps / (time.perf_counter() - start)
            torch.backends.cudnn.benchmark = False
            text = f"{rates[False]:,.0f} images/s, {rates[True]:,.0f} with cuDNN's search, batch {batch}, bfloat16"
            self.say("INFO", f"training {name}", text)


CHECKS = (
    *("environment", "float32", "syncs", "out_of_memory", "throughput", "second_look"),
    *("launches", "decoding", "nearest", "training"),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="few images")
    parser.add_argument("--photos", default="", help="folder of JPEGs")
    parser.add_argument("--only", default="", help="names of checks")
    given = parser.parse_args()
    probes = Probes(given)
    for name in given.only.split(",") if given.only else CHECKS:
        start = time.perf_counter()
        try:
            getattr(probes, name)()
        except Exception as error:
            probes.say("FAIL", name, f"{type(error).__name__}: {str(error)[:300]}")
            traceback.print_exc(limit=6)
        print(f"     ({name}: {time.perf_counter() - start:.1f} s)", flush=True)
        if probes.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
    out = os.environ.get("OUT")
    if out:
        Path(out, "probe.json").write_text(json.dumps(_RESULTS, indent=1))
    if any(result["kind"] == "FAIL" for result in _RESULTS.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
