"""facepipe models on the command line, and models from files for embed and search."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import draw
from helpers import run_facepipe
from torch import Tensor, nn

from facepipe.gallery import Gallery
from facepipe.models.zoo.card_file import CardFile, InputConfig, save_model


class Tiny(nn.Module):
    """Mean colours of a 3x3 grid, spread over `dim` numbers."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc = nn.Linear(27, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 3).flatten(1))


def write_model(folder: Path, name: str, dim: int) -> Path:
    torch.manual_seed(0)
    card = CardFile(name, "", architecture="tiny", dim=dim, licence="MIT", input=InputConfig((32, 32)))
    return save_model(folder / f"{name}.toml", Tiny(dim).state_dict(), card)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    from facepipe.models.zoo.architectures import ARCHITECTURES, Architecture

    monkeypatch.setitem(
        ARCHITECTURES, "tiny", Architecture("tiny", "embedder", "for tests", lambda dim, size: Tiny(dim))
    )


def test_lists_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run_facepipe("models", "--json")
    names = [row["name"] for row in json.loads(out)["models"]]
    assert (code, {"dlib-resnet", "retinaface-mnet025"} <= set(names)) == (0, True)
    code, out, _ = run_facepipe("models", "--architectures", "--json")
    architectures = {row["name"]: row for row in json.loads(out)["architectures"]}
    assert (architectures["mobilefacenet"]["role"], architectures["mobilefacenet"]["input"]) == (
        "embedder",
        "RGB, mean 127.5, scale 128",
    )
    assert architectures["facenet-inception"]["alignment"] == "160x160, eyes level, box letterboxed with 128"
    write_model(tmp_path, "mine", 128)
    (tmp_path / "broken.toml").write_text('name = "broken"\nweights = "gone.onnx"\n')
    monkeypatch.setenv("FACEPIPE_MODELS", str(tmp_path))
    rows = {row["name"]: row for row in json.loads(run_facepipe("models", "--json")[1])["models"]}
    assert (rows["mine"]["licence"], len(rows["mine"]["sha256"])) == ("MIT", 64)
    assert "an ONNX graph does not say what it takes" in rows["broken"]["summary"]
    code, out, _ = run_facepipe("models")
    assert (code, "fake-" in out, "fatal-" in out) == (0, False, False), "models for tests"
    assert run_facepipe("models", "--architectures")[0] == 0


def test_check(tmp_path: Path) -> None:
    summary = json.loads(run_facepipe("models", "check", "dlib-resnet", "--json")[1])
    assert (summary["dim"], summary["parameters"], summary["licence"]) == (128, 5_614_592, "public domain")
    summary = json.loads(run_facepipe("models", "check", write_model(tmp_path, "mine", 130), "--json")[1])
    assert (summary["raw_dim"], summary["parameters"], summary["architecture"]) == (130, 28 * 130, "tiny")
    assert "models project" in summary["note"]
    assert json.loads(run_facepipe("models", "check", "fake-detector", "--json")[1])["role"] == "detector"
    (tmp_path / "mine.safetensors").write_bytes(b"nothing")
    code, _, err = run_facepipe("models", "check", tmp_path / "mine.toml")
    assert (code, "its TOML file says" in err) == (1, True)
    code, _, err = run_facepipe("models", "check", "nobody")
    assert (code, "no embedder is called 'nobody'" in err) == (2, True)
    code, _, err = run_facepipe("models", "check", tmp_path / "no.toml")
    assert (code, "cannot read" in err) == (2, True)


def test_export(tmp_path: Path) -> None:
    path = write_model(tmp_path, "mine", 128)
    code, out, _ = run_facepipe("models", "export", path, tmp_path / "out.onnx", "--json")
    summary = json.loads(out)
    assert (code, summary["opset"], summary["dim"], summary["difference"] < 1e-5) == (0, 20, 128, True)
    assert json.loads(run_facepipe("models", "check", tmp_path / "out.toml", "--json")[1])["dim"] == 128
    code, _, err = run_facepipe("models", "export", path, tmp_path / "out.onnx")
    assert (code, "choose another name" in err) == (2, True)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """45 pictures, 3 of a person, with 4 'faces' each."""
    for n in range(45):
        folder = tmp_path / "corpus" / f"p{n // 3}"
        folder.mkdir(parents=True, exist_ok=True)
        one = draw(2)
        tinted = [np.where(draw(2) > 200, 200 + (n * 7 + k * 13) % 50, one).astype(np.uint8) for k in range(2)]
        cv2.imwrite(str(folder / f"{n}.png"), np.hstack(tinted))
    return tmp_path / "corpus"


def test_from_projection_to_search(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = ["--runner", "inline", "--quiet"]
    assert (
        run_facepipe(
            "embed", corpus, tmp_path / "g", "--detector", "fake-detector", "--embedder", "fake-embedder", *fast
        )[0]
        == 0
    )
    assert len(Gallery(tmp_path / "g").vectors()[0]) == 180
    big = write_model(tmp_path, "mine", 140)
    code, _, err = run_facepipe(
        "embed", corpus, tmp_path / "h", "--detector", "fake-detector", "--embedder", big, *fast
    )
    assert (code, Gallery(tmp_path / "h").dim) == (0, 140), "a gallery takes vectors of this length too"
    code, _, err = run_facepipe("models", "project", big, tmp_path / "g", "--faces", "20")
    assert (code, "20 faces are too few" in err) == (1, True)
    code, out, _ = run_facepipe("models", "project", big, tmp_path / "g", "--seed", "8", "--quiet", "--json")
    summary = json.loads(out)
    assert (code, summary["images"], summary["full"]["same"] > 0) == (0, {"ok": 45}, True)
    monkeypatch.chdir(tmp_path)
    words = ["--detector", "fake-detector", "--embedder", "mine-128.toml"]
    assert run_facepipe("embed", corpus, "own2", *words, *fast)[0] == 0
    assert Gallery("own2").contract.embedder == "mine-128"
    assert run_facepipe("index", "own2", "--quiet")[0] == 0
    query = ["search", "own2", corpus / "p0", "hits.parquet", "--quiet", "--set", "embed.run.runner=inline"]
    code, _, err = run_facepipe(*query)
    assert (code, "mine-128" in err) == (2, True)
    assert run_facepipe(*query, "--embedder", "mine-128.toml")[0] == 0
    code, _, err = run_facepipe(*query, "--embedder", "mine-128.toml", "--detector", "mtcnn")
    assert (code, "--detector mtcnn is not the gallery's detector, which is fake-detector" in err) == (1, True)
    (tmp_path / "hits.parquet").unlink()
    monkeypatch.setenv("FACEPIPE_MODELS", str(tmp_path))
    assert run_facepipe(*query)[0] == 0


def test_a_warning_about_flip_with_face_recognition(tmp_path: Path) -> None:
    blank = tmp_path / "photos"
    blank.mkdir()
    cv2.imwrite(str(blank / "a.png"), np.zeros((64, 64, 3), np.uint8))
    fast = ["--detector", "fake-detector", "--embedder", "face-recognition", "--identity", "none", "--quiet"]
    fast += ["--runner", "inline"]
    code, _, err = run_facepipe("embed", blank, tmp_path / "g", *fast)
    assert (code, "--set embed.flip=false" in err) == (0, True)
    code, _, err = run_facepipe("embed", blank, tmp_path / "h", *fast, "--set", "embed.flip=false")
    assert (code, err) == (0, "")
