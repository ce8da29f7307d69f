"""Files of a source: no file mixes sources, so that erasing one writes no byte of another anew."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from bench.galleries import CONTRACT, Faces, append
from bench.galleries import rows as make_rows

from facepipe.config import build
from facepipe.erasure.limits import ErasureLimit
from facepipe.erasure.selection import Selection
from facepipe.gallery import Gallery
from facepipe.gallery.commits import rewrite
from facepipe.gallery.maintenance import compact as compaction
from facepipe.gallery.maintenance.compact import CompactConfig, plan_compaction
from facepipe.hashing import compute_face_id
from facepipe.schema import FACES
from pipelines import compact, erase
from pipelines.nightly import pipeline as nightly
from pipelines.nightly.config import NightlyConfig

START = datetime.now(UTC) - timedelta(days=100)


def make_part(source: str, first: int, day: int) -> pa.Table:
    """Make twenty rows of a source that were embedded on some day; their uris do not come in the order of the days."""
    identities, vectors = next(Faces(seed=day).blocks(20))
    part = make_rows(identities, vectors, first)
    names = [f"/{source}/{(first * 7919) % 1000:04d}/{first + n:06d}.jpg" for n in range(20)]
    columns: dict[str, Any] = {
        "uri": names,
        "source": [source] * 20,
        "face_id": [
            compute_face_id(uri, image, 0) for uri, image in zip(names, part["image_id"].to_pylist(), strict=True)
        ],
        "ingested_at": [START + timedelta(days=day)] * 20,
    }
    for name, values in columns.items():
        part = part.set_column(FACES.get_field_index(name), FACES.field(name), pa.array(values, FACES.field(name).type))
    return part


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    """A gallery of three sources, six days each."""
    gallery = Gallery.create(str(tmp_path / "g"), CONTRACT)
    parts = [make_part(source, 1000 * n + 20 * day, day) for day in range(6) for n, source in enumerate("abc")]
    append(gallery, parts, "days")
    return Gallery(gallery.path)


def list_sources(gallery: Gallery) -> list[set[str]]:
    """List the sources of each file, by its rows."""
    filesystem = gallery.dataset()
    return [set(fragment.to_table(columns=["source"])["source"].to_pylist()) for fragment in filesystem.get_fragments()]


def test_compaction_keeps_sources_apart(gallery: Gallery) -> None:
    before = gallery.to_arrow(["uri", "face_id", "embedding"]).sort_by("uri")
    assert compact.run(CompactConfig(fewest=2), gallery.path).files == 3
    after = Gallery(gallery.path)
    assert sorted(map(sorted, list_sources(after))) == [["a"], ["b"], ["c"]]
    assert after.to_arrow(["uri", "face_id", "embedding"]).sort_by("uri") == before
    # One file per source is left, and nothing is to be joined.
    assert compact.run(CompactConfig(), gallery.path, everything=True).joined == 0


def test_a_source_goes_without_a_byte_of_others(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    read_rows = rewrite.read_rows

    def read_some_columns(table: Gallery, path: str, columns: Any = None) -> pa.Table:
        assert columns is not None, f"{path} was read as a whole"
        return read_rows(table, path, columns)

    compact.run(CompactConfig(fewest=2), gallery.path)
    folder = Path(gallery.faces_folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    kept = [file["path"] for file in Gallery(gallery.path).files() if file["min.source"] != "b"]
    monkeypatch.setattr(rewrite, "read_rows", read_some_columns)
    erased = erase.run(Selection(source="b"), gallery.path, limit=ErasureLimit(1.0))
    assert erased.images == 120
    after = Gallery(gallery.path)
    assert sorted(after.list_paths()) == sorted(kept)
    # No file was written, and those that stayed are the same.
    for path in folder.glob("*.parquet"):
        assert path.read_bytes() == before[path.name]


def test_files_of_a_retention_are_joined_by_time(gallery: Gallery) -> None:
    total = sum(file["size_bytes"] for file in gallery.files() if file["min.source"] == "a")
    config = CompactConfig(fewest=2, target_bytes=total // 2)
    groups = plan_compaction(gallery, config, dated=["a"])
    times = [[file["max.ingested_at"] for file in group] for group in groups if group[0]["min.source"] == "a"]
    assert len(times) > 1
    assert [time for group in times for time in group] == sorted(time for group in times for time in group)
    by_uri = [[file["min.uri"] for file in group] for group in groups if group[0]["min.source"] == "b"]
    assert by_uri == [sorted(uris) for uris in by_uri]


def test_a_night_names_the_sources_with_a_retention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = []
    real = compact.run

    def note(config: CompactConfig, gallery: str, *, dated: Any) -> Any:
        named.append(list(dated))
        return real(config, gallery, dated=dated)

    monkeypatch.setattr(compact, "run", note)
    sources = []
    for name, days in (("kept", None), ("dated", 30.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.jpg").write_bytes(b"no picture")
        sources.append({"uri": str(tmp_path / name)} | ({"retention_days": days} if days else {}))
    config = build(
        NightlyConfig,
        {"gallery": str(tmp_path / "g"), "source": sources},
        {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}, "run": {"runner": "inline"}},
        {"night": {"clusters": "no", "dedup": False, "few_failed": 9}},
    )
    nightly.run(config)
    assert named == [["dated"]]


def test_many_sources_share_files(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_MOST_SOURCES", 2)
    assert len(plan_compaction(gallery, CompactConfig(fewest=2))) == 1


def test_small_files_wait_until_they_are_enough(gallery: Gallery) -> None:
    # Eighteen files of three sources: fifteen more than must stay.
    assert plan_compaction(gallery, CompactConfig(fewest=17)) == []
    assert len(plan_compaction(gallery, CompactConfig(fewest=16))) == 3
