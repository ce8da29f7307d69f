"""A corpus of more than a thousand hostile files never ends a run: each becomes one row, and the good images between
them come out as if they were alone. Shards, tables and lists that are hostile do no more harm.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import poison
import pytest
from conftest import REPOSITORY, draw
from helpers import embed, rows

from facepipe.errors import SourceError
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.imaging.decode import decode
from facepipe.imaging.header import Header
from facepipe.sources import SourceConfig, WorkItem, open_source
from facepipe.stages import Decode

SEED = int(os.environ.get("FACEPIPE_POISON_SEED", "0"))
COUNT = 1000
GOOD = 20
MEMORY_MB = 2500  # the models are fakes: this is decoding, in batches of 16

_SETTINGS: dict[str, Any] = {
    "source": {"identity": "none", "name": "corpus"},
    "detect": {"model": "fake-detector"},
    "embed": {"model": "fake-embedder"},
    "run": {"block_smallest": 16, "block_largest": 64, "commit_seconds": 1.0},
}
_CHILD = """
import json, sys
sys.path.insert(0, "tests")
from helpers import embed
summary = embed(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), runner="inline")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([summary.to_dict(), int(peak.split()[1]) // 1024]))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """(folder, how many images a source has to account for)"""
    root = tmp_path_factory.mktemp("poisoned")
    (root / "good").mkdir()
    for n in range(GOOD):
        cv2.imwrite(str(root / "good" / f"{n:02d}.png"), draw(n))
    return root, GOOD + poison.plant(root, SEED, COUNT)


def _undated(gallery: Path) -> list[dict[str, Any]]:
    return rows(gallery)


def test_the_corpus_is_the_same_every_time() -> None:
    assert len(poison.seeds()) >= 30
    assert list(poison.mutants(3, 200)) == list(poison.mutants(3, 200))
    assert list(poison.mutants(3, 200)) != list(poison.mutants(4, 200))


@pytest.mark.slow
def test_a_poisoned_corpus(corpus: tuple[Path, int], tmp_path: Path) -> None:
    root, images = corpus
    assert images > COUNT
    embed(root / "good", tmp_path / "alone", _SETTINGS, runner="inline")
    alone = _undated(tmp_path / "alone")
    assert len({row["uri"] for row in alone}) == GOOD

    command = [sys.executable, "-c", _CHILD, str(root), str(tmp_path / "inline"), json.dumps(_SETTINGS)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    summary, peak = json.loads(done.stdout.splitlines()[-1])
    print(f"{summary['images']} images, {summary['statuses']}, {summary['seconds']:.1f} s, {peak} MB")
    assert peak < MEMORY_MB
    assert (summary["images"], summary["repeated"]) == (images, 0)
    assert sum(summary["statuses"].values()) == images
    assert not summary["statuses"].get("crashed"), "an error that no stage foresaw"

    inline = _undated(tmp_path / "inline")
    assert len({row["uri"] for row in inline}) == images
    assert [row for row in inline if row["uri"].startswith(f"{root}/good/")] == alone
    assert Counter({row["uri"]: row["status"] for row in inline}.values()) == summary["statuses"]
    status = {row["uri"].removeprefix(f"{root}/"): (row["status"], row["error"]) for row in inline}
    assert status["bombs/progressive.jpg"] == ("too_large", "3000 scans, the limit is 100")
    assert status["bombs/giant-1.png"][0] == "too_large"
    assert status["names/sparse.jpg"][0] == "too_large"
    assert status["names/fifo.jpg"] == status["names/device.jpg"] == ("read_error", "not a regular file")
    assert status["names/fifo.tar"] == ("read_error", "not a regular file")
    assert status["names/linked.jpg"][0] == status["names/-rf.jpg"][0] == "ok"

    local = embed(root, tmp_path / "local", _SETTINGS, runner="local", workers=2)
    assert (local.images, local.statuses) == (images, summary["statuses"])
    assert _undated(tmp_path / "local") == inline
    assert verify_gallery(Gallery(str(tmp_path / "local"))).problems == []


def test_no_file_is_much_work(corpus: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is decoded once at most, and none with more pixels, or passes over them, than the limits allow."""
    stage = Decode()
    stage.setup()
    decoded: list[str] = []

    def counted(data: bytes, header: Header, reduce: int = 1) -> np.ndarray:
        assert header.width * header.height <= stage.max_pixels
        assert header.scans <= stage.max_scans
        decoded.append(path.name)
        pixels = decode(data, header, reduce)
        assert pixels.size <= 3 * stage.max_pixels, "the header told the truth"
        return pixels

    monkeypatch.setattr("facepipe.stages.decode.decode", counted)
    for folder in ("bombs", "odd", "mutants"):
        for path in sorted((corpus[0] / folder).iterdir()):
            assert stage.decode_image(path.read_bytes()).status in ("ok", "decode_error", "too_large")
    assert len(decoded) == len(set(decoded)) > 100


def _items(path: Path, **config: Any) -> list[WorkItem]:
    found = []
    for item in open_source(SourceConfig(str(path), **config)):
        found.append(item)
        assert len(found) < 1000, "a listing without end"
    return found


def test_hostile_shards(tmp_path: Path) -> None:
    expected = poison.tars(tmp_path / "tars")
    total = 0
    for name, count in expected.items():
        found = _items(tmp_path / "tars" / f"{name}.tar")
        assert len({item.uri for item in found}) == len(found), name
        if count is None:
            assert "tar cannot be read to its end" in (found[-1].listing_error or ""), name
        else:
            assert len(found) == count, name
        total += len(found)
    summary = embed(tmp_path / "tars", tmp_path / "g", _SETTINGS, runner="inline")
    assert summary.images == sum(summary.statuses.values()) == total
    assert not summary.statuses["crashed"]


def test_members_of_a_tar_are_only_names(tmp_path: Path) -> None:
    poison.tars(tmp_path / "tars")
    shard = tmp_path / "tars" / "escaping.tar"
    found = _items(shard)
    assert [item.uri for item in found][:2] == [f"{shard}#../../etc/x.jpg", f"{shard}#/etc/y.jpg"]
    assert {item.path for item in found} == {os.fsencode(shard)}
    assert embed(shard, tmp_path / "g", _SETTINGS, runner="inline").statuses["ok"] == 5


def test_hostile_tables(tmp_path: Path) -> None:
    readable = poison.tables(tmp_path / "tables")
    total = 0
    for path in (tmp_path / "tables").glob("*.parquet"):
        found = _items(path)
        assert found, path
        assert readable.get(path.stem, False) or len(found) == 1 or path.stem == "headless", path
        total += len({item.uri for item in found})
    summary = embed(tmp_path / "tables", tmp_path / "g", _SETTINGS, runner="inline")
    assert summary.images == sum(summary.statuses.values()) == total
    assert summary.statuses["ok"] >= 40
    assert not summary.statuses["crashed"]


def test_hostile_lists(tmp_path: Path) -> None:
    expected = poison.lists(tmp_path / "lists")
    for name, least in expected.items():
        path = tmp_path / "lists" / f"{name}.txt"
        listed = _items(path)
        assert len(listed) >= least, name
        summary = embed(path, tmp_path / f"g-{name}", _SETTINGS, runner="inline")
        assert summary.images + summary.repeated == len(listed), name
        assert summary.images == sum(summary.statuses.values()), name
        assert not summary.statuses["crashed"], name
    (tmp_path / "lists" / "blank.txt").write_bytes(b"\n" * 100)
    with pytest.raises(SourceError, match="is empty"):
        _items(tmp_path / "lists" / "blank.txt")
    (tmp_path / "lists" / "binary.txt").write_bytes(bytes(range(1, 256)) * 20)
    with pytest.raises(SourceError, match="holds binary data"):
        _items(tmp_path / "lists" / "binary.txt")
