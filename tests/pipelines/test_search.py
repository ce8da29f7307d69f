"""Searches: images, galleries and Parquet as queries; restarts; odd queries; decisions; the same answers by every way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from helpers import embed

from facepipe.arrow import to_float_lists
from facepipe.config import build
from facepipe.errors import ConfigError, ContractError, EvaluationError, GalleryError, IndexingError, SourceError
from facepipe.evaluation.identification import Probes, compute_identification, find_operating_point, search_probes
from facepipe.evaluation.index import evaluate_index
from facepipe.gallery import Gallery
from facepipe.gallery.export import export_parquet
from facepipe.index.decide import decide_identities
from facepipe.index.search import Index
from pipelines.index import IndexConfig
from pipelines.index import run as index
from pipelines.search import SearchConfig, SearchSummary, run

COUNT = 4000


def search(gallery: Path | Gallery, queries: Path | str, out: Path, **find: Any) -> tuple[pa.Table, SearchSummary]:
    path = gallery.path if isinstance(gallery, Gallery) else str(gallery)
    settings = {"search": find, "run": {"block": 300}}
    summary = run(build(SearchConfig, settings), path, str(queries), str(out))
    return pq.read_table(out), summary


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    path = str(tmp_path_factory.mktemp("search") / "g")
    identities, vectors = next(iter(Faces().blocks(COUNT)))
    table = rows(identities, vectors, 0)
    append(Gallery.create(path, CONTRACT), [table.slice(at, 250) for at in range(0, COUNT, 250)], "first")
    index(build(IndexConfig, {"index": {"factory": "IVF64,PQ64x4fs", "shard_vectors": 1500}}), path)
    return Gallery(path)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 queries in row groups of 130."""
    path = tmp_path_factory.mktemp("queries") / "q.parquet"
    vectors = Faces().draw(np.arange(1000) % 350, 10**9)
    table = pa.table({"query_id": [f"q{n}" for n in range(1000)], "embedding": to_float_lists(vectors)})
    pq.write_table(table, path, row_group_size=130)
    return path


def test_parquet_queries(gallery: Gallery, asked: Path, tmp_path: Path) -> None:
    found, summary = search(gallery, asked, tmp_path / "hits.parquet", k=5)
    assert (summary.queries, summary.rows, found.num_rows, summary.bad) == (1000, 5000, 5000, {})
    assert found["rank"].to_pylist() == [1, 2, 3, 4, 5] * 1000
    assert found["query_id"].to_pylist()[::5] == [f"q{n}" for n in range(1000)]
    distances = found["distance"].to_numpy().reshape(1000, 5)
    assert (np.diff(distances, axis=1) >= 0).all()
    held = {row["face_id"]: row for row in gallery.to_arrow(["face_id", "uri", "identity", "embedding"]).to_pylist()}
    vectors = np.array(pq.read_table(asked)["embedding"].to_pylist(), np.float32)
    for n, row in enumerate(found.slice(0, 100).to_pylist()):
        face = held[row["face_id"]]
        assert (row["uri"], row["identity"]) == (face["uri"], face["identity"])
        assert row["distance"] == pytest.approx(np.linalg.norm(vectors[n // 5] - face["embedding"]), abs=1e-5)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_every_way_gives_the_same_answers(gallery: Gallery, asked: Path, tmp_path: Path) -> None:
    scan, summary = search(gallery, asked, tmp_path / "scan.parquet", path="scan")
    assert summary.path == "scan"
    lists, _ = search(gallery, asked, tmp_path / "lists.parquet", path="lists", recall=1.0)
    same = np.mean(scan["face_id"].to_numpy() == lists["face_id"].to_numpy())
    assert same > 0.97
    settings = {"search": {"path": "lists", "recall": 1.0}, "run": {"block": 170, "runner": "ray", "cpus": 1}}
    run(build(SearchConfig, settings), gallery.path, str(asked), str(tmp_path / "ray.parquet"))
    assert pq.read_table(tmp_path / "ray.parquet").equals(lists)
    folder, _ = search(gallery, asked, tmp_path / "parts", path="lists", recall=1.0)
    assert folder.equals(lists)


def test_the_gallery_searches_itself_without_itself(gallery: Gallery, tmp_path: Path) -> None:
    found, _ = search(gallery, gallery.path, tmp_path / "self.parquet", k=3)
    assert found.num_rows == 3 * COUNT
    assert not np.any(found["query_id"].cast(pa.int64()).to_numpy() == found["face_id"].to_numpy())
    found, _ = search(gallery, gallery.path, tmp_path / "with.parquet", k=1, leave_self_out=False)
    assert np.all(found["query_id"].cast(pa.int64()).to_numpy() == found["face_id"].to_numpy())
    assert not found["distance"].to_numpy().any()


def test_radius(gallery: Gallery, asked: Path, tmp_path: Path) -> None:
    found, summary = search(gallery, asked, tmp_path / "near.parquet", radius=0.3)
    assert found["distance"].drop_null().to_numpy().max() <= 0.3
    per_query = found.group_by("query_id").aggregate([("face_id", "count")])["face_id_count"].to_pylist()
    assert len(per_query) == 1000, "queries without an answer have a row"
    assert min(per_query) == 0
    assert sum(per_query) == summary.rows


def test_goes_on_from_the_last_finished_block(gallery: Gallery, asked: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(summary: SearchSummary) -> None:
        if summary.queries > 500:
            raise StopError

    config = build(SearchConfig, {"run": {"block": 200}})
    out = tmp_path / "hits.parquet"
    with pytest.raises(StopError):
        run(config, gallery.path, str(asked), str(out), stop)
    assert not out.exists()
    summary = run(config, gallery.path, str(asked), str(out))
    assert summary.skipped_blocks == 2
    assert summary.queries == 1000
    whole, _ = search(gallery, asked, tmp_path / "whole.parquet")
    assert pq.read_table(out).equals(whole)
    with pytest.raises(StopError):
        run(config, gallery.path, str(asked), str(tmp_path / "other.parquet"), stop)
    other = build(SearchConfig, {"run": {"block": 200}, "search": {"k": 3}})
    assert run(other, gallery.path, str(asked), str(tmp_path / "other.parquet")).skipped_blocks == 0


def test_odd_queries_are_rows_with_a_status(gallery: Gallery, tmp_path: Path) -> None:
    good = Faces().draw(np.arange(1), 0)[0].tolist()
    lists = [good, None, [1.0] * 64, [0.0] * 128, [float("nan")] * 128, [5 * v for v in good], [None] * 128, good]
    pq.write_table(pa.table({"embedding": pa.array(lists, pa.list_(pa.float64()))}), tmp_path / "q.parquet")
    found, summary = search(gallery, tmp_path / "q.parquet", tmp_path / "hits.parquet", k=2)
    status = dict(zip(found["query_id"].to_pylist(), found["status"].to_pylist(), strict=True))
    expected = ["ok", "no embedding", "64 dimensions, not 128", "zero vector", "not finite", "ok", "not finite", "ok"]
    assert [status[str(n)] for n in range(8)] == expected
    assert summary.bad == {"no embedding": 1, "64 dimensions, not 128": 1, "zero vector": 1, "not finite": 2}
    assert found.num_rows == 3 * 2 + 5
    ids = found["face_id"].to_pylist()
    assert ids[:2] == ids[-2:]


def test_queries_that_do_not_fit(gallery: Gallery, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    wide = pa.table({"embedding": pa.array([[0.1] * 512], pa.list_(pa.float32(), 512))})
    pq.write_table(wide, tmp_path / "wide.parquet")
    with pytest.raises(ConfigError, match="512 dimensions"):
        search(gallery, tmp_path / "wide.parquet", out)
    pq.write_table(pa.table({"embedding": [1.0]}), tmp_path / "flat.parquet")
    with pytest.raises(ConfigError, match="not a list"):
        search(gallery, tmp_path / "flat.parquet", out)
    for name, damage in (
        ("empty", b""),
        ("page", b"<html>404</html>"),
        ("cut", (tmp_path / "wide.parquet").read_bytes()[:200]),
    ):
        (tmp_path / f"{name}.parquet").write_bytes(damage)
        with pytest.raises(SourceError, match=f"cannot read .*{name}"):
            search(gallery, tmp_path / f"{name}.parquet", out)
    with pytest.raises(SourceError, match="no such file"):
        search(gallery, "/no/such/folder/x", out)
    with pytest.raises(GalleryError, match="no gallery"):
        search(tmp_path / "nothing", tmp_path / "wide.parquet", out)
    other = tmp_path / "other"
    append(Gallery.create(str(other), CONTRACT.__class__(**{**CONTRACT.__dict__, "flip": True})), [], "x")
    with pytest.raises(ContractError, match="flip"):
        search(gallery, other, out)
    identities, vectors = next(iter(Faces().blocks(20)))
    append(Gallery(str(other)), [rows(identities, vectors, 0)], "y")
    export_parquet(Gallery(str(other)), str(tmp_path / "exported"))
    with pytest.raises(ContractError, match="flip"):
        search(gallery, tmp_path / "exported", out)
    with pytest.raises(IndexingError, match="facepipe index"):
        search(other, other, out)
    out.mkdir()
    with pytest.raises(ConfigError, match="exists"):
        search(gallery, gallery.path, out)


def test_images_as_queries(drawings: Path, fakes: dict[str, dict[str, object]], tmp_path: Path) -> None:
    embed(drawings, tmp_path / "g", fakes)
    index(IndexConfig(), str(tmp_path / "g"))
    settings = {"embed": {"run": {"runner": "inline"}}}
    summary = run(build(SearchConfig, settings), str(tmp_path / "g"), str(drawings), str(tmp_path / "hits.parquet"))
    found = pq.read_table(tmp_path / "hits.parquet").to_pylist()
    first = [row for row in found if row["rank"] == 1]
    assert summary.images["ok"] == 40
    assert summary.images["no_face"] == 20
    assert all(row["distance"] == 0 for row in first)
    # Plain rectangles look alike to the fake embedder: the same picture is among the nearest, not always the first.
    nearest = {row["query_id"] for row in found if row["uri"] == row["query_uri"] and row["distance"] == 0}
    assert len(nearest) > 0.9 * len(first)


def test_decisions() -> None:
    names = np.array([["a", "b", "b"], ["a", "b", "b"], [None, "c", "a"], [None, None, None]], object)
    distances = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.6], [0.1, 0.2, 0.3], [0.1, 0.1, 0.1]], np.float32)
    assert decide_identities(names, distances, 0.5).tolist() == ["a", "a", "c", "Unknown"]
    assert decide_identities(names, distances, 0.5, "vote").tolist() == ["b", "a", "c", "Unknown"]
    assert decide_identities(names, distances, 0.05).tolist() == ["Unknown"] * 4


def test_identify(gallery: Gallery, asked: Path, tmp_path: Path) -> None:
    found, summary = search(gallery, asked, tmp_path / "who.parquet", k=4, threshold=0.35)
    assert summary.identified + summary.unknown == 1000
    for row in found.filter(pa.array(found["rank"].to_numpy() == 1)).to_pylist():
        assert row["decision"] == (row["identity"] if row["distance"] <= 0.35 else "Unknown")


def test_calibration_on_numbers_done_by_hand() -> None:
    other = np.arange(1, 101) / 100
    mate = np.where(np.arange(100) < 50, 0.005, np.inf)
    mate[:10] = 0.5
    found = Probes(mate, other, 100, 1.0)
    point = find_operating_point(found, 0.05)
    assert (point.false_alarms, point.probes) == (5, 100)
    assert 0.05 <= point.threshold < 0.06
    assert point.fnir == pytest.approx(0.2)
    assert compute_identification(found).rank_1 == pytest.approx(0.8)
    with pytest.raises(
        EvaluationError, match=r"1 false alarm in 1,000 with \d+ labelled faces \(1,000 needed\): try FPIR=0\.\d+$"
    ):
        find_operating_point(found, 0.001)
    stricter = find_operating_point(Probes(mate, other, 50, 0.5), 0.05)
    assert stricter.threshold < point.threshold


def test_probing_equals_a_table_of_all_distances(gallery: Gallery) -> None:
    found = search_probes(gallery, Index(gallery.path, recall=1.0))
    vectors = gallery.vectors()[1]
    names = np.array(gallery.to_arrow(["identity"])["identity"].to_pylist(), object)
    distances = np.linalg.norm(vectors[:200, None] - vectors[None], axis=-1)
    same = names[:200, None] == names[None]
    np.fill_diagonal(distances, np.inf)
    mate, other = np.where(same, distances, np.inf).min(1), np.where(same, np.inf, distances).min(1)
    assert np.isclose(found.other[:200], other, atol=1e-5).mean() > 0.97
    assert np.isclose(found.mate[:200], mate, atol=1e-5).mean() > 0.97


def test_the_recall_of_what_was_asked_for_is_stated(gallery: Gallery, asked: Path, tmp_path: Path) -> None:
    stated = {}
    for name, find in {"few": {"k": 5}, "many": {"k": 100}, "radius": {"radius": 0.4}}.items():
        _, summary = search(gallery, asked, tmp_path / f"{name}.parquet", path="lists", **find)
        assert summary.recall is not None
        assert summary.recall >= 0.97
        stated[summary.recall_of] = summary.nprobe
        assert (summary.recall_at_10 is None) == (name != "few")
    assert list(stated) == ["recall@5", "recall@100", "recall within 0.4"]
    assert stated["recall@100"] > stated["recall@5"]


def test_a_scan_by_radius_finds_what_comparing_finds(gallery: Gallery, asked: Path, tmp_path: Path) -> None:
    found, summary = search(gallery, asked, tmp_path / "scan.parquet", path="scan", radius=0.35, most=50)
    assert (summary.path, summary.recall, summary.recall_of) == ("scan", 1.0, "recall within 0.35")
    ids, vectors = gallery.vectors()
    queries = np.array(pq.read_table(asked)["embedding"].to_pylist(), np.float32)
    for n in range(0, 1000, 100):
        distances = np.linalg.norm(queries[n].astype(np.float64) - vectors, axis=1)
        expected = ids[np.argsort(distances)][: int((distances <= 0.35).sum())][:50]
        rows_of = found.filter(pa.compute.field("query_id") == f"q{n}")
        assert [face for face in rows_of["face_id"].to_pylist() if face is not None] == expected.tolist()


def test_evaluate_index(gallery: Gallery, tmp_path: Path) -> None:
    result = evaluate_index(gallery, picture=str(tmp_path / "recall.png"))
    assert result.recall_at_10 >= 0.95
    assert result.identification is not None
    assert result.identification.rank_1 > 0.9
    assert (tmp_path / "recall.png").stat().st_size > 5000
    json.dumps(result.to_dict())


def test_no_threshold_where_people_share_faces() -> None:
    with pytest.raises(EvaluationError, match="the same, to the bit"):
        find_operating_point(Probes(np.zeros(100), np.zeros(100), 100, 1.0), 0.1)
