"""An object store as a source, against an S3 server on this machine."""

import io
import tarfile
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw
from helpers import embed, rows, same_faces

from facepipe.errors import ConfigError, SourceError, StorageError
from facepipe.sources import SourceConfig, open_source


def fill(client: Any, folder: Path) -> None:
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for n in range(4):
            data = cv2.imencode(".png", draw(n))[1].tobytes()
            info = tarfile.TarInfo(f"t{n}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for n in range(4, 12):
        place = folder / f"person{n % 2}"
        place.mkdir(exist_ok=True)
        cv2.imwrite(str(place / f"ü {n}.png"), draw(n))
    (folder / "notes.txt").write_text("x")
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "faces", f"set/{path.relative_to(folder)}")


def test_a_prefix_gives_the_same_rows_as_the_folder(bucket: Any, fakes: dict[str, Any], tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    fill(bucket, corpus)
    for runner in ("inline", "local"):
        summary = embed("s3://faces/set/", tmp_path / f"s3-{runner}", fakes, runner=runner)
        assert (summary.images, summary.failed, summary.ignored) == (12, 0, 1)
        again = embed("s3://faces/set/", tmp_path / f"s3-{runner}", fakes, runner=runner)
        assert (again.images, again.skipped) == (0, 12)
    embed(corpus, tmp_path / "folder", fakes)
    same_faces(rows(tmp_path / "s3-inline"), rows(tmp_path / "folder"))
    found = rows(tmp_path / "s3-inline")
    assert {row["identity"] for row in found} == {None, "person0", "person1"}
    assert all(row["uri"].startswith("s3://faces/set/") for row in found)


def test_a_changed_object_is_read_again(bucket: Any, fakes: dict[str, Any], tmp_path: Path) -> None:
    for n in (1, 2):
        bucket.put_object(Bucket="faces", Key="change/a.png", Body=cv2.imencode(".png", draw(n))[1].tobytes())
        summary = embed("s3://faces/change", tmp_path / "g", fakes)
        assert (summary.images, summary.faces) == (1, n)
    assert len(rows(tmp_path / "g")) == 2


def test_parquet_on_an_object_store(bucket: Any, fakes: dict[str, Any], tmp_path: Path) -> None:
    images = [cv2.imencode(".png", draw(n))[1].tobytes() for n in range(6)]
    out = io.BytesIO()
    pq.write_table(pa.table({"bytes": images, "identity": [str(n) for n in range(6)]}), out)
    bucket.put_object(Bucket="faces", Key="t.parquet", Body=out.getvalue())
    assert embed("s3://faces/t.parquet", tmp_path / "g", fakes).images == 6


def test_what_is_not_there_is_said(bucket: Any, fakes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no image"):
        embed("s3://faces/none", tmp_path / "g", fakes)
    with pytest.raises(StorageError, match="cannot list s3://absent") as caught:
        embed("s3://absent/x", tmp_path / "g", fakes)
    assert "secret-of-the-test" not in str(caught.value)
    with pytest.raises(ConfigError, match="names no bucket"):
        open_source(SourceConfig("s3://"))
    (tmp_path / "l.csv").write_text("uri\ns3://faces/gone.jpg\n")
    summary = embed(tmp_path / "l.csv", tmp_path / "g2", fakes)
    assert summary.statuses == {"read_error": 1}


def test_labels_and_photos_of_a_prefix_are_those_of_a_folder(bucket: Any, tmp_path: Path) -> None:
    trees = {
        "people": ["Ann/1.jpg", "Bob/1.jpg", "@eaDir/1.jpg", "Ann/.thumbnails/1.jpg", "notes.txt"],
        "splits": ["train/1.jpg", "test/1.jpg", "#recycle/1.jpg"],
        "shards": ["00000/1.jpg", "00001/1.jpg"],
    }
    for tree, names in trees.items():
        for name in names:
            path = tmp_path / tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
            bucket.put_object(Bucket="faces", Key=f"{tree}/{name}", Body=b"x")
        for patterns in ({}, {"include": "Ann"}, {"exclude": ("A*", "train")}):
            found = []
            for uri in (f"s3://faces/{tree}", str(tmp_path / tree)):
                source = open_source(SourceConfig(uri, **patterns))  # type: ignore[arg-type]
                found.append([(item.uri.removeprefix(f"{uri}/"), item.identity) for item in source])
                found[-1] += [("note", note) for note in source.notes if note.startswith("no image got")]
            assert sorted(found[0]) == sorted(found[1])


def test_partitions_of_a_prefix_are_columns(bucket: Any) -> None:
    for name in ("ann", "b%20ob"):
        out = io.BytesIO()
        pq.write_table(pa.table({"bytes": [b"x"]}), out)
        bucket.put_object(Bucket="faces", Key=f"set/identity={name}/p.parquet", Body=out.getvalue())
    found = list(open_source(SourceConfig("s3://faces/set", kind="parquet")))
    assert [item.identity for item in found] == ["ann", "b ob"]
    with pytest.raises(SourceError, match=r"--set source\.kind=parquet"):
        embed("s3://faces/set", "/nowhere", {})
