"""Time the writers of `facepipe export` on 100,000 faces: python tests/bench/exports.py"""

import tempfile
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from facepipe.arrow import to_float_lists
from facepipe.exports.export import _WRITERS

FACES = 100_000


class SyntheticFaces:
    """Faces in batches as a gallery gives them."""

    dim = 128

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        vectors = random.normal(size=(FACES, self.dim)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        columns = {
            "face_id": pa.array(random.integers(0, 1 << 62, FACES, dtype=np.int64)),
            "image_id": [f"{n:032x}" for n in range(FACES)],
            "uri": [f"/data/faces/person{n // 10}/{n}.jpg" for n in range(FACES)],
            "source": ["faces"] * FACES,
            "identity": [f"person{n // 10}" for n in range(FACES)],
            "width": pa.array([640] * FACES, pa.int32()),
            "height": pa.array([480] * FACES, pa.int32()),
            "box": to_float_lists(random.random((FACES, 4), np.float32) * 400),
            "landmarks": to_float_lists(random.random((FACES, 10), np.float32) * 400),
            "det_score": random.random(FACES, np.float32),
            "embedding": to_float_lists(vectors),
        }
        self._batches = pa.table(columns).to_batches(8192)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return iter(self._batches)


def main() -> None:
    faces = SyntheticFaces()
    for name, write in _WRITERS.items():
        with tempfile.TemporaryDirectory() as folder:
            begin = time.process_time()
            write(faces, folder)  # type: ignore[arg-type]
            print(f"{name}: {time.process_time() - begin:.1f} s of one core")


if __name__ == "__main__":
    main()
