"""Listing and screening: images per second and peak memory, for new images and for a gallery that holds them all.

    python tests/bench/listing.py [--images 1000000]

Empty files in folders of a thousand; the gallery that knows them is built from rows, not from embedded images.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from facepipe.gallery import Contract, Gallery
from facepipe.gallery.commit import Committer
from facepipe.gallery.known import KnownImages
from facepipe.gallery.parts import Record, stamp, status_rows, write_part
from facepipe.sources import SourceConfig, open_source
from facepipe.work.blocks import Block, BlockSize, blocks


def touch(folder: Path, count: int) -> None:
    for n in range(count):
        if n % 1000 == 0:
            place = folder / f"{n // 1000:05d}"
            os.makedirs(place)
        os.close(os.open(place / f"{n:08d}.jpg", os.O_CREAT | os.O_WRONLY))


def listed(folder: Path, gallery: Gallery | None) -> Iterator[Block]:
    known = KnownImages(gallery)
    yield from blocks(open_source(SourceConfig(str(folder))), known, BlockSize(workers=2))
    known.close()


def remember(folder: Path, gallery: Gallery) -> None:
    """A gallery with a row for every file."""
    commit = Committer(gallery, "bench")
    records, batch = [], []
    for block in listed(folder, None):
        batch.append(block.items)
        if len(batch) == 256 or block.last:
            items = pa.concat_tables(batch)
            rows = stamp(status_rows(items, "decode_error", "bench"), "bench")
            rows = (
                rows.append_column("image_id", pa.array(["0" * 32] * rows.num_rows))
                if "image_id" not in rows.column_names
                else rows
            )
            records.append(write_part(rows, items, gallery.faces_folder, "bench", Record(block.number)))
            batch = []
    commit(records, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for n in (args.images // 10, args.images):
            files = Path(folder) / f"f{n}"
            touch(files, n)
            began = time.perf_counter()
            found = sum(block.items.num_rows for block in listed(files, None))
            seconds = time.perf_counter() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{found} new images listed in {seconds:.1f} s ({found / seconds:,.0f}/s), peak {peak:.0f} MiB",
                flush=True,
            )
        gallery = Gallery.create(f"{folder}/g", Contract.of("fake-detector", "fake-embedder", True))
        remember(files, gallery)
        began = time.perf_counter()
        skipped = sum(block.skipped for block in listed(files, Gallery(f"{folder}/g")))
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{skipped} known images passed over in {seconds:.1f} s ({skipped / seconds:,.0f}/s), peak {peak:.0f} MiB"
        )


if __name__ == "__main__":
    main()
