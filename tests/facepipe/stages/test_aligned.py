"""Aligned crops: one face per image at the template's place, whatever the size, and no detector."""

import io
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from facepipe.gallery import Contract
from facepipe.imaging.alignment import ARCFACE_112
from facepipe.imaging.geometry import fit_similarity, warp_chip
from facepipe.models.detectors.aligned import AlignedCrops
from facepipe.models.zoo.registry import ALIGNED
from facepipe.schema import DECODE_ERROR, OK, WORK_ITEM
from facepipe.stages import Align, Chain, Decode, Detect, Embed, Read


def run_chain(folder: Path, names: list[str], detector: str = ALIGNED) -> pa.Table:
    items = [{"uri": name, "path": str(folder / name).encode()} for name in names]
    stages = (Read(), Decode(), Detect(model=detector), Align(detector=detector), Embed())
    chain = Chain(stages)
    chain.setup()
    return chain(pa.Table.from_pylist(items, schema=WORK_ITEM))


@pytest.mark.parametrize(("width", "height"), [(112, 112), (224, 224), (96, 112), (64, 64)])
def test_the_face_is_where_the_template_has_it(width: int, height: int) -> None:
    (faces,) = AlignedCrops().detect(np.zeros((1, height, width, 3), np.uint8))
    scale = height / 112
    shift = (width - 112 * scale) / 2
    assert np.allclose(faces.landmarks[0], np.array(ARCFACE_112) * scale + (shift, 0), atol=1e-3)
    x1, y1, x2, y2 = faces.boxes[0]
    assert x1 < faces.landmarks[0, :, 0].min() < faces.landmarks[0, :, 0].max() < x2
    assert y1 < faces.landmarks[0, :, 1].min() < faces.landmarks[0, :, 1].max() < y2


def test_every_crop_is_one_face_and_its_vector_is_that_of_the_photo(portrait: Path, tmp_path: Path) -> None:
    """A crop of a photo's face, and one of noise, which is a face because the user says so; a damaged file is a row."""
    photo = run_chain(portrait.parent, [portrait.name], "retinaface-mnet025")
    landmarks = np.array(photo["landmarks"][0].as_py()).reshape(5, 2)
    pixels = np.asarray(Image.open(io.BytesIO(portrait.read_bytes())).convert("RGB"))
    for name, side in (("small.png", 112), ("large.png", 224)):
        matrix = fit_similarity(landmarks, np.array(ARCFACE_112) * side / 112)
        Image.fromarray(warp_chip(pixels, matrix, (side, side))).save(tmp_path / name)
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    assert cv2.imwrite(str(tmp_path / "noise.png"), noise)
    (tmp_path / "broken.png").write_bytes((tmp_path / "small.png").read_bytes()[:200])
    rows = run_chain(tmp_path, ["small.png", "large.png", "noise.png", "broken.png"])
    assert rows["status"].to_pylist() == [OK, OK, OK, DECODE_ERROR]
    assert rows["face_index"].to_pylist() == [0, 0, 0, None]
    vectors = [np.array(vector) for vector in rows["embedding"].to_pylist()[:3]]
    original = np.array(photo["embedding"][0].as_py())
    assert np.linalg.norm(vectors[1] - original) < 0.2, "two photos of a person are 0.4 apart"
    assert np.linalg.norm(vectors[0] - original) < 0.3
    assert np.linalg.norm(vectors[2] - original) > 0.4


def test_a_gallery_of_crops_has_a_contract_of_its_own() -> None:
    crops = Contract.from_models(ALIGNED, "dlib-resnet", flip=True)
    assert crops != Contract.from_models("retinaface-mnet025", "dlib-resnet", flip=True)
    assert crops.detector == ALIGNED
