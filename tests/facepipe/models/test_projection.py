"""Projections: which directions are kept, what commutes with them, and a fit on a gallery's images from end to end."""

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import embed
from safetensors import safe_open
from torch import Tensor, nn

from facepipe.errors import ConfigError, EvaluationError, ModelError, WeightsError
from facepipe.evaluation.projected import PairRows, draw_pairs, score_vectors
from facepipe.gallery import Gallery
from facepipe.models.projection import (
    ProjectedEmbedder,
    Projection,
    SecondMoment,
    fit_projection,
    read_projection,
    save_projection,
    to_unit_vectors,
)
from facepipe.models.zoo.card_file import CardFile, InputConfig, read_card, save_model
from facepipe.models.zoo.registry import find_card
from facepipe.schema import WORK_ITEM
from facepipe.sources import SourceConfig, open_source
from facepipe.sources.relocate import ImageLocator
from facepipe.stages import Read
from facepipe.types import Float32, UInt8Image
from pipelines.project import ProjectConfig, ProjectSummary, run

Settings = dict[str, Any]


def vectors(n: int, dim: int = 160, seed: int = 0) -> Float32:
    """Directions of falling strength about a mean that is not 0, as real embeddings have."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=(n, dim)) * 0.97 ** np.arange(dim) + 0.2, np.float32)


def fitted(raw: Float32) -> Projection:
    moment = SecondMoment(raw.shape[1])
    for part in np.array_split(raw, 5):
        moment.add(part)
    return fit_projection(moment)


def gram_error(raw: Float32, matrix: Float32) -> float:
    whole = to_unit_vectors(raw)
    part = whole @ matrix.astype(np.float64)
    return float(np.linalg.norm(whole @ whole.T - part @ part.T))


def test_inner_products_are_kept_best() -> None:
    raw = vectors(600)
    found = fitted(raw)
    assert np.abs(found.matrix.T @ found.matrix - np.eye(128)).max() < 1e-5
    centred = to_unit_vectors(raw) - to_unit_vectors(raw).mean(0)
    usual = np.linalg.svd(centred, full_matrices=False)[2][:128].T.astype(np.float32)
    random = np.linalg.qr(np.random.default_rng(1).normal(size=(160, 128)))[0].astype(np.float32)
    best = gram_error(raw, found.matrix)
    assert best < gram_error(raw, usual)
    assert best < 0.2 * gram_error(raw, random)
    kept = np.square(to_unit_vectors(raw) @ found.matrix).sum() / 600
    assert found.energy == pytest.approx(kept, abs=1e-5)
    assert np.array_equal(found.matrix, fitted(raw).matrix)


def test_it_commutes_with_mirroring_and_normalising() -> None:
    matrix = fitted(vectors(400)).matrix
    a, b = vectors(20, seed=2), vectors(20, seed=3)
    inside = to_unit_vectors((a @ matrix + b @ matrix) / 2)
    assert np.abs(inside - to_unit_vectors(to_unit_vectors((a + b) / 2) @ matrix)).max() < 1e-5


def test_too_few_vectors_or_dimensions() -> None:
    with pytest.raises(ModelError, match=r"159 faces are too few .* 160 dimensions: it needs at least 160"):
        fitted(vectors(159))
    with pytest.raises(ModelError, match="128 dimensions needs no projection"):
        fitted(vectors(300, 128))
    with pytest.raises(ModelError, match="64 dimensions cannot be brought to 128"):
        fitted(vectors(300, 64))


class Raw:
    """Gives the vectors it was made with."""

    size = (4, 4)

    def __init__(self, raw: Float32):
        self._raw, self.dim = raw, raw.shape[1]

    def embed(self, chips: UInt8Image) -> Float32:
        return self._raw[: len(chips)]


def test_an_embedder_with_a_file(tmp_path: Path) -> None:
    raw = vectors(300)
    found = fitted(raw)
    file = tmp_path / "p.safetensors"
    save_projection(file, found, {"seed": "3", "model_sha256": "abc"})
    made = ProjectedEmbedder.from_file(Raw(raw), file, "abc")
    with pytest.raises(WeightsError, match="was fitted on the model abc, and this one is abd"):
        ProjectedEmbedder.from_file(Raw(raw), file, "abd")
    chips = np.zeros((30, 4, 4, 3), np.uint8)
    assert (made.dim, made.size) == (128, (4, 4))
    assert np.abs(made.embed(chips) - raw[:30] @ found.matrix).max() < 1e-5
    assert np.array_equal(made.embed(chips)[:1], made.embed(chips[:1])), "a vector does not depend on its batch"
    assert made.embed(chips[:0]).shape == (0, 128)
    with pytest.raises(WeightsError, match=r"no projection of 161 dimensions .*belongs to another model"):
        read_projection(file, 161, "abc")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(WeightsError, match="cannot be read"):
        read_projection(file, 160, "abc")


def test_pairs_are_measured_as_they_are() -> None:
    people = np.repeat(np.arange(30), 4)
    centres = np.random.default_rng(0).normal(size=(30, 64))
    raw = centres[people] + 0.1 * np.random.default_rng(1).normal(size=(120, 64))
    pairs = draw_pairs(people, 0)
    assert pairs is not None
    assert int(pairs.same.sum()) == 30 * 6
    found = score_vectors(raw, pairs)
    assert (found.accuracy, found.tar, found.different) == (1.0, 1.0, 120 * 119 // 2 - 180)
    noise = score_vectors(np.random.default_rng(2).normal(size=(120, 64)), pairs)
    assert noise.accuracy < 0.65
    lost = PairRows(np.array([0, -1]), np.array([1, 4]), np.array([True, False]), np.array([0, 1]))
    assert score_vectors(raw, lost).tar is None
    assert draw_pairs(np.arange(9), 0) is None
    assert draw_pairs(np.zeros(9, np.int64), 0) is None


class Tiny(nn.Module):
    """Mean colours of a 3x3 grid, spread over `dim` numbers."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc = nn.Linear(27, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 3).flatten(1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 people, 2 pictures each, of 3 'faces' in colours of their own."""
    root = tmp_path_factory.mktemp("corpus")
    for n in range(80):
        rng = np.random.default_rng(n // 2)
        image = np.full((90, 200, 3), 200, np.uint8)
        for k in range(3):
            b, g, r = (int(v) for v in (*rng.integers(0, 70, 2), rng.integers(190, 255)))
            cv2.rectangle(image, (10 + 60 * k, 20), (40 + 60 * k, 60 + n % 2), (b, g, r), -1)
        image[-2:] = np.random.default_rng(1000 + n).integers(0, 255, (2, 200, 3))
        folder = root / f"person{n // 2}"
        folder.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f"{n}.png"), image)
    return root


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The TOML file of a 150-D embedder."""
    from facepipe.models.zoo.architectures import ARCHITECTURES, Architecture

    monkeypatch.setitem(
        ARCHITECTURES, "tiny", Architecture("tiny", "embedder", "for tests", lambda dim, size: Tiny(dim))
    )
    torch.manual_seed(0)
    threshold: Settings = {"metric": "cosine", "same_person": 0.3}
    told = CardFile("m", "", architecture="tiny", dim=150, input=InputConfig((32, 32), "bgr"), **threshold)
    return save_model(tmp_path / "m.toml", Tiny(150).state_dict(), told)


def project(model: Path, gallery: Path, **settings: Any) -> ProjectSummary:
    return run(ProjectConfig(device="cpu", threads=1, **settings), str(model), str(gallery))


def test_a_fit_on_a_gallery(corpus: Path, fakes: Settings, model: Path, tmp_path: Path) -> None:
    own = tmp_path / "corpus"
    shutil.copytree(corpus, own)
    embed(own, tmp_path / "g", fakes)
    (own / "person0" / "0.png").unlink()
    cv2.imwrite(str(own / "person1" / "2.png"), np.zeros((9, 9, 3), np.uint8))
    before = model.read_text()
    summary = project(model, tmp_path / "g")
    assert summary.images == {"ok": 78, "read_error": 2}
    assert 150 <= summary.faces < 234, "some people are left out, to measure on"
    assert summary.energy > 0.9999, "27 numbers fit into 128"
    assert summary.full is not None
    assert summary.reduced is not None
    assert summary.full.same > 0
    assert summary.reduced.accuracy == pytest.approx(summary.full.accuracy, abs=1e-6)
    assert not summary.measured_on_fit
    assert model.read_text() == before
    file = read_card(tmp_path / "m-128.toml")
    assert (file.name, file.dim, file.projection) == ("m-128", 150, "m.projection.safetensors")
    assert file.figures["energy_of_128"] == pytest.approx(summary.energy, abs=1e-6)
    with safe_open(str(tmp_path / "m.projection.safetensors"), "np") as stored:
        told = stored.metadata()
    assert json.loads(told["contract"])["embedder"] == "fake-embedder"
    assert (told["faces"], told["seed"], told["version"]) == (
        str(summary.faces),
        "0",
        str(Gallery(tmp_path / "g").version),
    )
    assert find_card(str(tmp_path / "m-128.toml"), "embedder").load("cpu", 1).dim == 128
    made = find_card(str(tmp_path / "m-128.toml"), "embedder")
    assert made.same_person == file.same_person, "what was measured is a distance, whatever the model's own file is in"
    other = tmp_path / "m-128-rgb.toml"
    other.write_text((tmp_path / "m-128.toml").read_text().replace('"bgr"', '"rgb"'))
    with pytest.raises(
        ModelError, match=f"was fitted on the model {find_card(str(model), 'embedder').sha256}, and this"
    ):
        find_card(str(other), "embedder").load("cpu", 1)
    with pytest.raises(ConfigError, match=r"m-128.toml' exists"):
        project(model, tmp_path / "g")
    written = (tmp_path / "m.projection.safetensors").read_bytes()
    for name in ("m-128.toml", "m.projection.safetensors"):
        (tmp_path / name).unlink()
    with pytest.raises(ModelError, match="100 faces are too few"):
        project(model, tmp_path / "g", faces=100)
    assert not (tmp_path / "m-128.toml").exists()
    assert len(written) > 150 * 128 * 4


def test_the_loss_on_a_pairs_file(corpus: Path, fakes: Settings, model: Path, tmp_path: Path) -> None:
    embed(corpus, tmp_path / "g", fakes, {"source": {"identity": "none"}})
    lines = [f"person{n}/{2 * n}.png,person{n}/{2 * n + 1}.png,1" for n in range(20)]
    lines += [f"person{n}/{2 * n}.png,person{n + 20}/{2 * n + 40}.png,0" for n in range(20)]
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("\n".join(["file_x,file_y,same", *lines]))
    summary = project(model, tmp_path / "g", pairs=str(pairs))
    assert summary.full is not None
    assert (summary.full.same, summary.full.different, summary.full.tar) == (20, 20, None)
    assert summary.measured_on_fit, "240 faces are few for 150 dimensions"
    pairs.write_text("file_x,file_y,same\nnot/there.png,person0/0.png,1\n")
    for name in ("m-128.toml", "m.projection.safetensors"):
        (tmp_path / name).unlink()
    with pytest.raises(EvaluationError, match="not in the gallery, such as not/there"):
        project(model, tmp_path / "g", pairs=str(pairs))
    unlabelled = project(model, tmp_path / "g")
    assert (unlabelled.full, unlabelled.faces) == (None, 240)
    assert "--pairs" in unlabelled.unmeasured


def test_images_are_found_again(corpus: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(corpus / "person1" / "3.png", "x/3.png")
    data = (corpus / "person2" / "4.png").read_bytes()
    pq.write_table(pa.table({"bytes": [b"", data], "uri": ["p", "q"]}), tmp_path / "b.parquet")
    (tmp_path / "odd").mkdir()
    shutil.copy(corpus / "person0" / "0.png", os.fsencode(tmp_path / "odd") + b"/\xff.png")
    places, read_one = ImageLocator(), Read()
    for source in ("a.tar", "b.parquet", "odd"):
        for item in open_source(SourceConfig(str(tmp_path / source))):
            again = places.locate_image(item.uri)
            assert (again.path, again.offset, again.length) == (item.path, item.offset, item.length)
            rows = [{**again._asdict(), "previous": None}]
            table = read_one(pa.Table.from_pylist(rows, WORK_ITEM))
            assert table["status"][0].as_py() == "ok"
    assert places.locate_image(f"{tmp_path}/a.tar#gone.png").listing_error == "no longer in its container"
    assert places.locate_image("s3://faces/x.jpg").path == b"s3://faces/x.jpg"
