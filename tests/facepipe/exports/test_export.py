"""Exports: each format is read back as its programs read it, vectors to the last bit; the erased are in none."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import embed, run_facepipe

from facepipe.errors import GalleryError, StorageError
from facepipe.exports import vector_stores
from facepipe.exports.export import export_faces
from facepipe.exports.faces import to_texts
from facepipe.gallery import Gallery, hidden, suppressed

TEXT_FORMATS = ("list", "coco", "fiftyone", "milvus", "qdrant", "pgvector")
FAKES = {
    "detect": {"model": "fake-detector"},
    "embed": {"model": "fake-embedder"},
    "run": {"runner": "inline"},
}


@pytest.fixture(scope="module")
def gallery(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("export") / "g"
    embed(drawings, path, FAKES)
    return str(path)


@pytest.fixture(scope="module")
def faces(gallery: str) -> dict[int, dict[str, Any]]:
    rows = Gallery(gallery).to_arrow(where="face_id is not null").to_pylist()
    return {row["face_id"]: row for row in rows}


def require_same_vector(found: Any, face: dict[str, Any]) -> None:
    assert np.array_equal(np.asarray(found, np.float32), np.asarray(face["embedding"], np.float32))


def require_fields(row: dict[str, Any], face: dict[str, Any], *names: str) -> None:
    assert {name: row[name] for name in names} == {name: face[name] for name in names}


def test_vectors_as_texts_are_the_same_floats() -> None:
    random = np.random.default_rng(5)
    bits = random.integers(0, 1 << 32, 40_000, np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)][:39_000].reshape(-1, 100)
    texts = to_texts(pa.array(values.tolist(), pa.list_(pa.float32()))).to_pylist()
    # Readers of JSON parse 64 bits, and round to 32 afterwards.
    parsed = np.array([json.loads(text) for text in texts]).astype(np.float32)
    assert np.array_equal(parsed.view(np.uint32), values.view(np.uint32))


def test_list(gallery: str, faces: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    assert export_faces(Gallery(gallery), str(tmp_path / "out"), "list") == len(faces)
    with (tmp_path / "out" / "faces.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["face_id"]) for row in rows} == faces.keys()
    for row in rows:
        face = faces[int(row["face_id"])]
        assert (row["path"], row["identity"]) == (face["uri"], face["identity"] or "")
        assert np.allclose([float(row[name]) for name in ("x1", "y1", "x2", "y2")], face["box"])


def test_coco(gallery: str, faces: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    export_faces(Gallery(gallery), str(tmp_path / "out"), "coco")
    content = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert set(content) >= {"images", "annotations", "categories"}
    images = {image["id"]: image for image in content["images"]}
    assert len(images) == len({face["uri"] for face in faces.values()})
    assert sorted(annotation["id"] for annotation in content["annotations"]) == list(range(1, len(faces) + 1))
    for annotation in content["annotations"]:
        face = faces[int(annotation["attributes"]["face_id"])]
        image = images[annotation["image_id"]]
        assert image["file_name"] == face["uri"]
        require_fields(image, face, "width", "height")
        left, top, width, height = annotation["bbox"]
        assert np.allclose([left, top, left + width, top + height], face["box"])
        assert np.isclose(annotation["area"], width * height)
        assert annotation["attributes"]["identity"] == face["identity"]
        assert np.allclose(np.reshape(annotation["keypoints"], (5, 3))[:, :2].ravel(), face["landmarks"])
        assert annotation["num_keypoints"] == len(content["categories"][0]["keypoints"]) == 5


def test_fiftyone(gallery: str, faces: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    export_faces(Gallery(gallery), str(tmp_path / "out"), "fiftyone")
    data = json.loads((tmp_path / "out" / "data.json").read_text())
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert labels["classes"] == ["face"]
    assert data.keys() == labels["labels"].keys()
    seen = set()
    for key, detections in labels["labels"].items():
        for detection in detections:
            face = faces[int(detection["attributes"]["face_id"])]
            seen.add(face["face_id"])
            assert data[key] == face["uri"]
            x, y, width, height = detection["bounding_box"]
            box = np.array([x, y, x + width, y + height]) * np.tile([face["width"], face["height"]], 2)
            assert np.allclose(box, face["box"], atol=1e-2)
    assert seen == faces.keys()
    assert not (tmp_path / "out" / "left_out.txt").read_text()


def test_milvus(
    gallery: str, faces: dict[int, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_stores, "_ROWS_PER_FILE", 5)
    export_faces(Gallery(gallery), str(tmp_path / "out"), "milvus")
    schema = json.loads((tmp_path / "out" / "schema.json").read_text())
    fields = {field["name"]: field for field in schema["fields"]}
    rows: list[dict[str, Any]] = []
    for path in sorted((tmp_path / "out").glob("*.parquet")):
        table = pq.read_table(path)
        assert table.column_names == list(fields)
        rows += table.to_pylist()
    assert {row["face_id"] for row in rows} == faces.keys()
    assert [name for name, field in fields.items() if field.get("is_primary")] == ["face_id"]
    for row in rows:
        require_fields(row, faces[row["face_id"]], "uri", "identity", "source", "det_score")
        require_same_vector(row["embedding"], faces[row["face_id"]])
        assert len(row["embedding"]) == fields["embedding"]["params"]["dim"]


def test_milvus_takes_the_schema(gallery: str, tmp_path: Path) -> None:
    pymilvus = pytest.importorskip("pymilvus")
    export_faces(Gallery(gallery), str(tmp_path / "out"), "milvus")
    content = json.loads((tmp_path / "out" / "schema.json").read_text())
    schema = pymilvus.CollectionSchema.construct_from_dict(content)
    schema.verify()
    assert schema.primary_field.name == "face_id"
    types = {field.name: field.dtype for field in schema.fields}
    assert types["embedding"] == pymilvus.DataType.FLOAT_VECTOR
    assert types["uri"] == types["identity"] == pymilvus.DataType.VARCHAR


def test_qdrant(
    gallery: str, faces: dict[int, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_stores, "_REQUEST_BYTES", 20_000)
    export_faces(Gallery(gallery), str(tmp_path / "out"), "qdrant")
    paths = sorted((tmp_path / "out").glob("points-*.json"))
    assert len(paths) > 1
    assert all(path.stat().st_size < 21_000 for path in paths)
    points = [point for path in paths for point in json.loads(path.read_text())["points"]]
    assert {point["id"] for point in points} == faces.keys()
    for point in points:
        require_same_vector(point["vector"], faces[point["id"]])
        require_fields(point["payload"], faces[point["id"]], "uri", "source", "det_score")
        assert point["payload"].get("identity") == faces[point["id"]]["identity"]


def test_qdrant_takes_the_requests(gallery: str, faces: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    client_module = pytest.importorskip("qdrant_client")
    models = client_module.models
    export_faces(Gallery(gallery), str(tmp_path / "out"), "qdrant")
    client = client_module.QdrantClient(":memory:")
    wanted = json.loads((tmp_path / "out" / "collection.json").read_text())
    client.create_collection("faces", vectors_config=models.VectorParams(**wanted["vectors"]))
    for path in (tmp_path / "out").glob("points-*.json"):
        body = models.PointsList.model_validate_json(path.read_text())
        client.upsert("faces", points=body.points)
    assert client.count("faces").count == len(faces)
    face = next(iter(faces.values()))
    (hit,) = client.query_points("faces", query=face["embedding"], limit=1).points
    assert hit.payload["uri"] == face["uri"]


def test_pgvector(
    gallery: str, faces: dict[int, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_stores, "_ROWS_PER_FILE", 7)
    export_faces(Gallery(gallery), str(tmp_path / "out"), "pgvector")
    script = (tmp_path / "out" / "load.sql").read_text()
    assert "embedding vector(128)" in script
    paths = sorted((tmp_path / "out").glob("*.csv"))
    assert [line.split("'")[1] for line in script.splitlines() if "copy" in line] == [path.name for path in paths]
    seen = set()
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                face = faces[int(row["face_id"])]
                seen.add(face["face_id"])
                assert (row["uri"], row["identity"] or None) == (face["uri"], face["identity"])
                require_same_vector(json.loads(row["embedding"]), face)
    assert seen == faces.keys()


def test_lance(gallery: str, faces: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    export_faces(Gallery(gallery), str(tmp_path / "out"), "lance")
    table = lance.dataset(str(tmp_path / "out" / "faces.lance")).to_table()
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 128)
    assert set(table["face_id"].to_pylist()) == faces.keys()
    for row in table.to_pylist():
        require_fields(row, faces[row["face_id"]], "uri", "identity", "box", "landmarks", "width", "image_id")
        require_same_vector(row["vector"], faces[row["face_id"]])


@pytest.mark.parametrize("kind", TEXT_FORMATS)
def test_the_erased_are_in_no_export(gallery: str, tmp_path: Path, kind: Any) -> None:
    """Neither those whose erasure is recorded, nor those that an older version of the table holds."""
    path = str(tmp_path / "g")
    shutil.copytree(gallery, path)
    rows = Gallery(path).to_arrow(["uri", "image_id"], "face_id is not null").to_pylist()
    uris = sorted({row["uri"] for row in rows})
    contents = {row["uri"]: row["image_id"] for row in rows}
    suppressed.suppress_images(path, "request", uris[:2], [contents[uris[2]]])
    export_faces(Gallery(path), str(tmp_path / "out"), kind)
    text = b"".join(file.read_bytes() for file in (tmp_path / "out").iterdir())
    if kind == "milvus":
        text = "".join(str(pq.read_table(file).to_pylist()) for file in (tmp_path / "out").glob("*.parquet")).encode()
    gone = [uri for uri in uris if uri in uris[:2] or contents[uri] == contents[uris[2]]]
    assert not [
        uri for uri in gone if f'{uri}"'.encode() in text or f"{uri}'".encode() in text or f"{uri},".encode() in text
    ]
    assert any(uri.encode() in text for uri in uris if uri not in gone)


def test_an_erasure_meanwhile_leaves_no_export(gallery: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = iter([(), ("request",)])
    monkeypatch.setattr(hidden, "list_requests", lambda path: next(requests))
    with pytest.raises(GalleryError, match="erased while the export ran"):
        export_faces(Gallery(gallery), str(tmp_path / "out"), "list")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_touched(gallery: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(StorageError, match="not an empty folder"):
        export_faces(Gallery(gallery), str(tmp_path / "out"), "list")
    with pytest.raises(GalleryError, match="no face"):
        export_faces(Gallery(gallery), str(tmp_path / "new"), "coco", "identity = 'nobody'")
    with pytest.raises(StorageError, match="object store"):
        export_faces(Gallery(gallery), "s3://bucket/out", "list")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command(gallery: str, faces: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    code, out, _ = run_facepipe("export", gallery, tmp_path / "a", "--format", "qdrant", "--json")
    assert code == 0
    assert json.loads(out)["faces"] == len(faces)
    code, _, err = run_facepipe("export", gallery, tmp_path / "b", "--format", "coco", "--columns", "uri")
    assert code == 2
    assert "--columns belongs to --format parquet" in err
