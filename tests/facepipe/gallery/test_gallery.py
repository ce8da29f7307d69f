"""The gallery: filters agree with memory, damage is found, versions stay readable."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as fs
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from helpers import embed, rows

import facepipe
from facepipe.config import build
from facepipe.errors import ConfigError, GalleryError
from facepipe.gallery import Gallery
from facepipe.gallery.export import export_parquet
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.observe.info import describe_gallery
from facepipe.schema import FACES, LATER, conform
from pipelines.embed import EmbedConfig


@pytest.fixture
def path(drawings: Path, fakes: dict[str, Any], tmp_path: Path) -> str:
    (tmp_path / "drawings").mkdir()
    for folder in drawings.iterdir():
        (tmp_path / "drawings" / folder.name).symlink_to(folder)
    (tmp_path / "drawings" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    embed(tmp_path / "drawings", tmp_path / "g", fakes)
    return str(tmp_path / "g")


def test_rows_as_arrow_pandas_and_numpy(path: str) -> None:
    gallery = facepipe.Gallery(path)
    ids, vectors = gallery.vectors()
    assert vectors.shape == (len(ids), 128)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert gallery.counts() == {"images": 61, "faces": len(ids), "ok": 40, "decode_error": 1, "no_face": 20}
    frame = gallery.to_pandas(["uri", "identity", "det_score"], where="identity = 'person1' and det_score is not null")
    assert set(frame["identity"]) == {"person1"}
    few, _ = gallery.vectors("identity in ('person1',)")
    assert 0 < len(few) < len(ids)
    assert sum(batch.num_rows for batch in gallery.batches(["uri"], rows=7)) == gallery.to_arrow(["uri"]).num_rows
    with pytest.raises(GalleryError, match="columns are"):
        gallery.to_arrow(["embeding"])
    with pytest.raises(ConfigError, match="no column 'statu'"):
        gallery.to_arrow(where="statu = 'ok'")


def test_filters_on_every_column_agree_with_memory(path: str) -> None:
    """Readers pass over files by the log's statistics; incomplete ones make them pass over too much."""
    gallery = facepipe.Gallery(path)
    everything = gallery.to_arrow()
    memory, table = ds.dataset(everything), gallery.dataset()
    for field in everything.schema:
        column = ds.field(field.name)
        filters = [column.is_valid(), column.is_null()]
        if not pa.types.is_nested(field.type):
            for value in [v for v in everything[field.name].to_pylist() if v is not None][:3]:
                scalar = pa.scalar(value, field.type)
                filters += [column == scalar, column != scalar, column < scalar, column >= scalar]
        for chosen in filters:
            assert table.count_rows(filter=chosen) == memory.count_rows(filter=chosen), str(chosen)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("status = 'ok'", 1),
        ("status <> 'ok'", 1),
        ("face_index = 0 AND NOT status != 'ok'", 1),
        ("face_index is null or face_index >= 0", 1),
    ],
)
def test_filters_as_text(path: str, text: str, count: int) -> None:
    gallery = facepipe.Gallery(path)
    frame = gallery.to_pandas()
    expected = {
        "status = 'ok'": (frame["status"] == "ok").sum(),
        "status <> 'ok'": (frame["status"] != "ok").sum(),
        "face_index = 0 AND NOT status != 'ok'": (frame["face_index"] == 0).sum(),
        "face_index is null or face_index >= 0": len(frame),
    }[text]
    assert len(gallery.to_pandas(["uri"], text)) == expected > 0


def test_filters_leave_quoted_text_alone(path: str, drawings: Path, fakes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    for name in ("k=1", "Rock AND Roll"):
        (tmp_path / "named" / name).symlink_to(drawings / "person0")
        assert (
            embed(tmp_path / "named" / name, path, fakes, {"source": {"identity": "folder", "name": name}}).images == 20
        )
    gallery = facepipe.Gallery(path)
    both = gallery.to_pandas(["uri"], "uri is not null")["uri"].str.contains("k=1").sum()
    (uri,) = set(gallery.to_pandas(["uri"])["uri"][lambda u: u.str.contains("k=1") & u.str.contains("p0_000")])
    assert both > 0
    assert len(gallery.to_pandas(["uri"], f"uri = '{uri}'")) == 1
    assert len(gallery.to_pandas(["uri"], "status in ('ok')")) == len(gallery.to_pandas(["uri"], "status = 'ok'")) > 0
    assert len(gallery.to_pandas(["uri"], "ingested_at > '2024-01-01'")) == len(gallery.to_pandas(["uri"]))
    for wrong in ("det_score > 'x'", "identity", "face_index = 'a'"):
        with pytest.raises(ConfigError):
            gallery.to_pandas(["uri"], wrong)


def test_old_versions_stay_readable(path: str, drawings: Path, fakes: dict[str, Any], tmp_path: Path) -> None:
    before = facepipe.Gallery(path)
    count = before.counts()["images"]
    embed(drawings / "person0", path, fakes)
    assert facepipe.Gallery(path).counts()["images"] == count + 20
    assert facepipe.Gallery(path, version=before.version).counts()["images"] == count


def damage(path: str, how: str) -> None:
    file = max((Path(path) / "faces").glob("*.parquet"), key=lambda p: p.stat().st_size)
    table = pq.ParquetFile(file).read()
    data = bytearray(file.read_bytes())
    if how == "flipped":
        data[len(data) // 3] ^= 1
        file.write_bytes(bytes(data))
    elif how == "cut":
        file.write_bytes(bytes(data[: len(data) // 2]))
    elif how == "deleted":
        file.unlink()
    elif how == "rows":
        pq.write_table(table.slice(1), file)
    elif how == "twice":
        pq.write_table(pa.concat_tables([table, table]), file)
    else:
        n = table.schema.get_field_index("embedding")
        longer = pa.array(
            [None if v is None else [2 * x for x in v] for v in table["embedding"].to_pylist()],
            table.schema.field(n).type,
        )
        pq.write_table(table.set_column(n, table.schema.field(n), longer), file)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("flipped", "checksum|cannot be read"),
        ("cut", "cannot be read"),
        ("deleted", "no such file"),
        ("rows", "the log says"),
        ("twice", "occur twice"),
        ("norms", "norm is not 1"),
    ],
)
def test_verify_finds_damage(path: str, how: str, said: str) -> None:
    assert verify_gallery(facepipe.Gallery(path)).problems == []
    damage(path, how)
    assert re.search(said, "\n".join(verify_gallery(facepipe.Gallery(path)).problems))


def test_export(path: str, tmp_path: Path) -> None:
    gallery = facepipe.Gallery(path)
    out = str(tmp_path / "out")
    assert (
        export_parquet(gallery, out, ["uri", "embedding"], "status = 'ok'")
        == pq.read_table(out).num_rows
        == len(gallery.vectors()[0])
    )
    assert pq.read_table(out).column_names == ["uri", "embedding"]
    with pytest.raises(GalleryError, match="not an empty folder"):
        export_parquet(gallery, out)


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch, drawings: Path, fakes: dict[str, Any], tmp_path: Path) -> str:
    """A gallery of 40 images made before the table had the newer columns."""
    (tmp_path / "drawings").mkdir()
    for name in ("person0", "person1"):
        shutil.copytree(drawings / name, tmp_path / "drawings" / name)
    before = pa.schema([field for field in FACES if field.name not in LATER])
    with monkeypatch.context() as patch:
        patch.setattr("facepipe.gallery.table.FACES", before)
        Gallery.create(str(tmp_path / "old"), build(EmbedConfig, fakes).contract)
    with monkeypatch.context() as patch:
        patch.setattr("facepipe.gallery.commits.parts.FACES", before)
        patch.setattr("facepipe.gallery.commits.parts.conform", lambda table, schema=before: conform(table, schema))
        patch.setattr(Gallery, "add_missing_columns", lambda self: None)
        embed(tmp_path / "drawings", tmp_path / "old", fakes)
    return str(tmp_path / "old")


def test_galleries_made_before_a_column_can_be_read(old: str, tmp_path: Path) -> None:
    gallery = facepipe.Gallery(old)
    assert not set(LATER) & {field.name for field in DeltaTable(gallery.faces_folder).schema().fields}
    assert set(gallery.to_pandas()["image_hash"].isna()) == {True}
    assert gallery.to_arrow(["uri"], "image_hash is null").num_rows == len(rows(old))
    assert gallery.to_arrow(["uri"], "image_hash is not null").num_rows == 0
    assert verify_gallery(gallery).problems == []
    assert export_parquet(gallery, str(tmp_path / "out")) == len(rows(old))
    assert pq.read_table(tmp_path / "out").schema.names == FACES.names


def test_galleries_made_before_a_column_get_it_when_written(
    old: str, drawings: Path, fakes: dict[str, Any], tmp_path: Path
) -> None:
    count = len(rows(old))
    changed = sorted((tmp_path / "drawings" / "person0").iterdir())[0]
    changed.write_bytes((drawings / "person2" / "p2_002.png").read_bytes())
    embed(tmp_path / "drawings", old, fakes)  # rewrites the old file without the replaced rows
    embed(drawings / "person2", old, fakes)
    gallery = facepipe.Gallery(old)
    assert set(LATER) <= {field.name for field in DeltaTable(gallery.faces_folder).schema().fields}
    assert [entry["operation"] for entry in DeltaTable(gallery.faces_folder).history()].count("ADD COLUMN") == 1
    written = [row for row in rows(old) if row["image_hash"] is not None]
    assert {row["uri"] for row in written} == {str(changed), *(str(p) for p in (drawings / "person2").iterdir())}
    assert len(rows(old)) > count
    for where, expected in (("is null", len(rows(old)) - len(written)), ("is not null", len(written))):
        assert gallery.to_arrow(["uri"], f"image_hash {where}").num_rows == expected
    assert gallery.to_arrow(["uri"], f"image_hash = {written[0]['image_hash']}").num_rows >= 1
    assert verify_gallery(gallery).problems == []
    assert export_parquet(gallery, str(tmp_path / "out")) == len(rows(old))


def test_what_is_no_gallery_is_said(tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match="no gallery at"):
        facepipe.Gallery(tmp_path)
    (tmp_path / "faces" / "_delta_log").mkdir(parents=True)
    (tmp_path / "faces" / "_delta_log" / "00000000000000000000.json").write_text("{broken")
    with pytest.raises(GalleryError, match=r"cannot be read|no gallery"):
        facepipe.Gallery(tmp_path)


def test_describe(path: str) -> None:
    found = describe_gallery(facepipe.Gallery(path))
    assert found["errors"] == [{"status": "decode_error", "error": "header ends early", "images": 1}]
    assert found["runs"][-1]["images"] == 61
    assert found["contract"]["embedder"] == "fake-embedder"


def test_other_delta_readers_see_the_same_rows(path: str) -> None:
    import deltalake

    native = fs.SubTreeFileSystem(path + "/faces", fs.LocalFileSystem())
    assert deltalake.DeltaTable(path + "/faces").to_pyarrow_table(filesystem=native).num_rows == len(rows(path))


def test_a_program_that_reads_a_gallery_ends_well(path: str) -> None:
    """deltalake's own filesystem aborts the interpreter at its end every other time."""
    code = f"import facepipe; print(len(facepipe.Gallery({path!r}).vectors()[0]))"
    for _ in range(5):
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
