"""A whole gallery in an object store: what is done to it there gives what it gives on a disk."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import draw
from helpers import embed, rows, same_faces

from facepipe.config import build
from facepipe.errors import GalleryBusyError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index.search import Index
from facepipe.index.verify import verify_index
from facepipe.storage import conditional
from facepipe.storage.lease import hold_lease
from pipelines import index
from pipelines.cluster import pipeline as cluster
from pipelines.dedup import pipeline as dedup

G = "s3://faces/team/gallery"


def test_embed_index_and_search_as_on_a_disk(
    bucket: Any, drawings: Path, fakes: dict[str, Any], tmp_path: Path
) -> None:
    local = str(tmp_path / "g")
    for gallery in (G, local):
        summary = embed(drawings, gallery, fakes, runner="local", workers=2)
        assert summary.images == 60
        assert index.run(index.IndexConfig(), gallery).action == "built"
    same_faces(rows(G), rows(local))
    again = embed(drawings, G, fakes)
    assert (again.images, again.skipped) == (0, 60)
    _, vectors = Gallery(local).vectors()
    near, same = (Index(gallery).search(vectors, k=5) for gallery in (G, local))
    np.testing.assert_array_equal(near.ids, same.ids)
    assert verify_gallery(Gallery(G)).problems == []
    assert verify_index(Gallery(G)) == []


def test_an_index_in_a_store_is_updated_from_a_machine_that_never_saw_it(
    bucket: Any, drawings: Path, fakes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(drawings, G, fakes)
    index.run(index.IndexConfig(), G)
    more = tmp_path / "more"
    more.mkdir()
    for n in range(100, 112):
        cv2.imwrite(str(more / f"{n}.png"), draw(n))
    embed(more, G, fakes)
    monkeypatch.setenv("FACEPIPE_CACHE", str(tmp_path / "another"))
    summary = index.run(index.IndexConfig(), G)
    assert (summary.action, summary.added > 0) == ("updated", True)
    assert verify_index(Gallery(G)) == []
    ids, vectors = Gallery(G).vectors()
    assert np.abs(Index(G).search(vectors, k=1).distances).max() < 1e-3, "each face finds itself, or one like it"
    assert len(ids) == Index(G).live
    names = [entry["Key"] for entry in bucket.list_objects_v2(Bucket="faces", Prefix="team/gallery/")["Contents"]]
    assert not [name for name in names if name.endswith((".part", ".origin", ".tags", ".new"))]


def test_reports_lie_in_the_store(bucket: Any, drawings: Path, fakes: dict[str, Any]) -> None:
    embed(drawings, G, fakes)
    asked = {"graph": {"threshold": 0.4}}
    dedup.run(build(dedup.DedupConfig, asked), G)
    cluster.run(build(cluster.ClusterConfig, asked), G)
    names = {e["Key"] for e in bucket.list_objects_v2(Bucket="faces", Prefix="team/gallery/reports/")["Contents"]}
    base = "team/gallery/reports/"
    assert {base + "dedup/report.html", base + "dedup/pairs.parquet", base + "cluster/faces.parquet"} <= names


def test_of_two_writers_one_wins(bucket: Any, drawings: Path, fakes: dict[str, Any]) -> None:
    embed(drawings, G, fakes)
    with hold_lease(G), pytest.raises(GalleryBusyError, match="another run"):
        embed(drawings, G, fakes)
    tag = conditional.write_if("s3://faces/x", b"1", None)
    with pytest.raises(conditional.ConflictError):
        conditional.write_if("s3://faces/x", b"2", None)
    conditional.write_if("s3://faces/x", b"3", tag)
    with pytest.raises(conditional.ConflictError):
        conditional.write_if("s3://faces/x", b"4", tag)
    first, second = (Committer(Gallery(G), name) for name in ("one", "two"))
    import pyarrow as pa

    from facepipe.gallery.commits.rewrite import Rewrite, rewrite_files

    def actions() -> list[Any]:
        everything = Rewrite(("uri",), lambda t: pa.array([True] * t.num_rows), lambda rows, mask: rows)
        return list(rewrite_files(Gallery(G), everything))

    before = rows(G)
    first.commit_actions(actions, {})
    with pytest.raises(GalleryBusyError, match="since this one began"):
        second.commit_actions(actions, {})
    assert rows(G) == before
    assert verify_gallery(Gallery(G)).problems == []


def test_no_credentials_in_what_is_left(bucket: Any, drawings: Path, fakes: dict[str, Any]) -> None:
    embed(drawings, G, fakes)
    index.run(index.IndexConfig(), G)
    for entry in bucket.list_objects_v2(Bucket="faces", Prefix="team/")["Contents"]:
        body = bucket.get_object(Bucket="faces", Key=entry["Key"])["Body"].read()
        assert b"secret-of-the-test" not in body, entry["Key"]
    assert json.loads(bucket.get_object(Bucket="faces", Key="team/gallery/.lock")["Body"].read())["released"]
