"""Pictures that a gallery holds more often than a face has neighbours in the graph."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench.galleries import CONTRACT, Faces, append, rows

from facepipe.gallery import Gallery
from pipelines.dedup import DedupConfig, run


def test_of_a_thousand_copies_one_is_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    identities = np.repeat(np.arange(500), 3)
    vectors = Faces().draw(identities, 0)
    copied = np.repeat(vectors[:2], 500, axis=0) + rng.normal(0, 0.002, (1000, 128)).astype(np.float32)
    copied /= np.linalg.norm(copied, axis=1, keepdims=True)
    table = rows(np.concatenate([identities, np.repeat(identities[:2], 500)]), np.concatenate([vectors, copied]), 0)
    hashes = np.concatenate([rng.integers(-(2**62), 2**62, 1500), np.repeat([11, -(2**60)], 500)])
    hashes[:2] = [11, -(2**60)]
    table = table.set_column(table.column_names.index("image_hash"), "image_hash", pa.array(hashes))
    table = table.set_column(
        table.column_names.index("width"), "width", pa.array(rng.integers(50, 999, 2500), pa.int32())
    )
    table = table.set_column(table.column_names.index("height"), "height", pa.array(np.full(2500, 100), pa.int32()))
    append(Gallery.create(str(tmp_path / "G"), CONTRACT), [table], "run")

    summary = run(DedupConfig(), str(tmp_path / "G"))

    assert summary.drop == 1000
    groups = pq.read_table(tmp_path / "G/reports/dedup/groups.parquet")
    assert sorted(groups["images"].to_pylist()) == [501, 501]
    kept = pq.read_table(tmp_path / "G/reports/dedup/decisions.parquet").filter(pa.compute.field("decision") == "keep")
    assert kept.num_rows == 1500
    widest = table["width"].to_numpy()[[0, *range(1500, 2000)]].max()
    uris = dict(zip(table["uri"].to_pylist(), table["width"].to_pylist(), strict=True))
    assert widest in [uris[uri] for uri in groups["kept_uri"].to_pylist()]
