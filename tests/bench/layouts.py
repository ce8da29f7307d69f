"""List one corpus in the layouts that people hold: python tests/bench/layouts.py [IMAGES [LAYOUT...]]

Prints rows, labels, errors, and seconds of one core to list a million.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "facepipe" / "sources")]

import numpy as np  # noqa: E402
import test_layouts as layouts  # noqa: E402

from facepipe.sources import SourceConfig, open_source  # noqa: E402


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    per_person = 20
    layouts.PERSONS = tuple(str(7 + n) for n in range(count // per_person))
    layouts.FEATURES["label"]["names"] = list(layouts.PERSONS)  # type: ignore[index]
    layouts.IMAGES = [
        (
            f"{person}/{n}.jpg",
            b"\xff\xd8\xff" + np.random.default_rng([int(person), n]).bytes(500) + b"\xff\xd9",
            person,
        )
        for person in layouts.PERSONS
        for n in range(per_person)
    ]
    names = {b"huggingface": json.dumps({"info": {"features": layouts.FEATURES}}).encode()}
    layouts.HF_SCHEMA = layouts.HF_SCHEMA.with_metadata(names)
    write_set = layouts.write_verification_set
    layouts.write_verification_set = lambda path, images, same, *rest: write_set(
        path, images, [True] * (len(images) // 2), *rest
    )
    print("| layout | rows | labels | errors | seconds per million |\n|---|---|---|---|---|")
    chosen = sys.argv[2:]
    for name, write in layouts.LAYOUTS.items():
        if chosen and name not in chosen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = write(Path(folder))
            except BaseException as error:  # pytest skips what needs a package that is not here
                print(f"| {name} | not written: {error} |")
                continue
            begin = time.process_time()
            items = list(open_source(SourceConfig(str(path))))
            seconds = time.process_time() - begin
            labels = len({item.identity for item in items} - {None})
            errors = sum(item.listing_error is not None for item in items)
            print(f"| {name} | {len(items)} | {labels} | {errors} | {seconds / len(items) * 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
