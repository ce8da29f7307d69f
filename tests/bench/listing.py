"""Listing and screening: images per second and peak memory, for new images and for a gallery that holds them all.

    python tests/bench/listing.py [--images 1000000] [--rounds 3]

Empty files in folders of a thousand; the gallery that knows them is built from rows, not from embedded images. Known
images are passed over `rounds` times, and the median counts. CPU seconds are this process's: the machine is shared.
"""

import argparse
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from facepipe.gallery import Contract, Gallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord, add_shared_columns, make_status_rows, write_part
from facepipe.gallery.known import KnownImages
from facepipe.sources import SourceConfig, open_source
from facepipe.sources.blocks import Block, BlockSize, cut_blocks


def touch(folder: Path, count: int) -> None:
    for n in range(count):
        if n % 1000 == 0:
            place = folder / f"{n // 1000:05d}"
            os.makedirs(place)
        os.close(os.open(place / f"{n:08d}.jpg", os.O_CREAT | os.O_WRONLY))


def listed(folder: Path, gallery: Gallery | None) -> Iterator[Block]:
    known = KnownImages(gallery)
    yield from cut_blocks(open_source(SourceConfig(str(folder))), known, BlockSize(workers=2))
    known.close()


def remember(folder: Path, gallery: Gallery) -> None:
    """A gallery with a row for every file."""
    commit = Committer(gallery, "bench")
    records, batch = [], []
    for block in listed(folder, None):
        batch.append(block.items)
        if len(batch) == 256 or block.last:
            items = pa.concat_tables(batch)
            rows = add_shared_columns(make_status_rows(items, "decode_error", "bench"), "bench")
            rows = (
                rows.append_column("image_id", pa.array(["0" * 32] * rows.num_rows))
                if "image_id" not in rows.column_names
                else rows
            )
            records.append(write_part(rows, items, gallery.faces_folder, "bench", PartRecord(block.number)))
            batch = []
    commit(records, {})


def memory() -> str:
    """Peak of this process, and what of it now is not backed by a file: the table of known images is."""
    status = Path("/proc/self/status").read_text()
    peak, anonymous = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024 for name in ("VmHWM", "RssAnon"))
    return f"peak {peak:.0f} MiB, {anonymous:.0f} MiB without mapped files"


def timed(files: Path, gallery: Gallery | None) -> tuple[int, int, float, float]:
    """(new images, images passed over, seconds, CPU seconds)."""
    began, worked = time.perf_counter(), time.process_time()
    new = skipped = 0
    for block in listed(files, gallery):
        new, skipped = new + block.items.num_rows, skipped + block.skipped
    return new, skipped, time.perf_counter() - began, time.process_time() - worked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for n in (args.images // 10, args.images):
            files = Path(folder) / f"f{n}"
            touch(files, n)
            found, _, seconds, cpu = timed(files, None)
            print(f"{found} new images listed in {seconds:.1f} s, {cpu:.1f} s of CPU ({found / seconds:,.0f}/s)")
            print(f"  {memory()}", flush=True)
        gallery = Gallery.create(f"{folder}/g", Contract.from_models("fake-detector", "fake-embedder", True))
        remember(files, gallery)
        rounds = [timed(files, Gallery(f"{folder}/g")) for _ in range(args.rounds)]
        assert all(new == 0 and skipped == args.images for new, skipped, _, _ in rounds)
        times = [seconds for _, _, seconds, _ in rounds]
        print(
            f"{args.images} known images passed over in {statistics.median(times):.1f} s "
            f"({min(times):.1f} to {max(times):.1f}), {statistics.median(cpu for *_, cpu in rounds):.1f} s of CPU "
            f"({args.images / statistics.median(times):,.0f}/s)\n  {memory()}"
        )


if __name__ == "__main__":
    main()
