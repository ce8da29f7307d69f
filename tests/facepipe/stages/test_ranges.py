"""Members of tars are read in large ranges: few requests, the same bytes."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import obstore
import pyarrow as pa
import pytest
from conftest import draw
from helpers import embed, rows, same_faces
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe import storage
from facepipe.schema import WORK_ITEM
from facepipe.sources import SourceConfig, open_source
from facepipe.stages import Chain, Read
from facepipe.stages.ranges import Container, RangeReader


def make_tar(path: Path, sizes: list[int], seed: int = 0) -> list[bytes]:
    """Write a tar with a member of random bytes of each size, and return the members."""
    rng = np.random.default_rng(seed)
    members = [rng.bytes(size) for size in sizes]
    with tarfile.open(path, "w") as tar:
        for n, data in enumerate(members):
            info = tarfile.TarInfo(f"{n:04d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return members


def list_items(uri: str) -> pa.Table:
    items = [[*item, None] for item in open_source(SourceConfig(uri))]
    columns = zip(*items, strict=True)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, WORK_ITEM, strict=True)], schema=WORK_ITEM)


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    real: Callable[..., Any] = getattr(module, name)

    def count(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(module, name, count)
    return calls


def test_a_tar_in_a_store_takes_a_request_per_32_mib(
    bucket: Any, fakes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for n in range(120):
            data = cv2.imencode(".png", draw(n))[1].tobytes()
            info = tarfile.TarInfo(f"{n:04d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    bucket.upload_file(str(tmp_path / "shard.tar"), "faces", "set/shard.tar")
    gets = count_calls(monkeypatch, obstore, "get")
    summary = embed("s3://faces/set/", tmp_path / "g", fakes, block_largest=64, block_smallest=30)
    assert (summary.images, summary.failed) == (120, 0)
    # One to see whether there is any image, one by the listing, and one per block of 64.
    keys = [args[1] for args in gets]
    assert keys.count("set/shard.tar") <= 4
    embed(tmp_path / "shard.tar", tmp_path / "local", fakes)
    same_faces(rows(tmp_path / "g"), rows(tmp_path / "local"))


def test_on_a_disk_a_tar_is_read_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = make_tar(tmp_path / "t.tar", [1000, 0, 70_000, 3, 512, 100_000] * 20)
    items = list_items(str(tmp_path / "t.tar"))
    reads = count_calls(monkeypatch, storage, "read")
    result = Chain((Read(),), 16)(items)
    assert result["bytes"].to_pylist() == members
    assert set(result["status"].to_pylist()) == {"ok"}
    assert len(reads) == 1


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4000), min_size=2, max_size=30), st.integers(1, 9000), st.data())
def test_any_members_are_read_as_they_are(sizes: list[int], max_bytes: int, data: st.DataObject) -> None:
    places = []
    offset = 0
    for size in sizes:
        offset += data.draw(st.sampled_from([0, 512, 1 << 21])) if offset else 0
        places.append((offset, size))
        offset += size
    source = Container(b"x", "f")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        lengths = []

        def read(path: bytes, start: int, length: int, limit: None, fingerprint: str) -> bytes:
            assert (path, fingerprint) == (b"x", "f")
            lengths.append(length)
            return bytes((start + n) % 251 for n in range(length))

        patch.setattr(storage, "read", read)
        reader = RangeReader(pool, max_bytes)
        reader.plan({source: places})
        for offset, size in data.draw(st.permutations(places)):
            assert reader.read(source, offset, size) == bytes((offset + n) % 251 for n in range(size))
        assert reader.read(source, 10**12, 5) is None, "not in the plan"
    assert max(lengths) <= max(max_bytes, *sizes)


def test_a_tar_that_was_replaced_or_cut_short_fails_its_own_members(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    members = make_tar(path, [5000] * 6)
    items = list_items(str(path))
    stat = path.stat()
    # Shorter, but with the size and time of its listing in no item: what is there can be read.
    nameless = items.set_column(items.schema.get_field_index("fingerprint"), "fingerprint", pa.nulls(6, pa.string()))
    with path.open("r+b") as file:
        file.truncate(20_000)
    result = Chain((Read(),), 4)(nameless)
    assert result["status"].to_pylist() == ["ok"] * 3 + ["read_error"] * 3
    assert result["bytes"].to_pylist()[:3] == members[:3]
    make_tar(path, [5000] * 6, seed=1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert Chain((Read(),), 4)(items)["status"].to_pylist() == ["replaced"] * 6


def test_members_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = make_tar(tmp_path / "t.tar", [100, 5000, 200])
    reads = count_calls(monkeypatch, storage, "read")
    result = Chain((Read(max_bytes=1000),), 16)(list_items(str(tmp_path / "t.tar")))
    assert result["status"].to_pylist() == ["ok", "too_large", "ok"]
    assert result["bytes"].to_pylist() == [members[0], None, members[2]]
    assert len(reads) == 2


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_a_zip_are_unpacked_from_their_range(
    method: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [bytes(f"image {n}", "ascii") * 500 for n in range(40)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        for n, data in enumerate(members):
            archive.writestr(f"{n:03d}.png", data)
    items = list_items(str(tmp_path / "a.zip"))
    reads = count_calls(monkeypatch, storage, "read")
    result = Chain((Read(),), 16)(items)
    assert result["bytes"].to_pylist() == members
    assert len(reads) == 1
    too_large = Chain((Read(max_bytes=3000),), 16)(items)
    assert set(too_large["status"].to_pylist()) == {"too_large"}
