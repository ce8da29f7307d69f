"""Measuring a model: from a gallery's images to the figures in its TOML file, and what the graph makes of them."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from helpers import embed
from torch import Tensor, nn

from facepipe.errors import GalleryError, ModelError
from facepipe.models.zoo.card_file import CardFile, InputConfig, read_card, save_model
from facepipe.models.zoo.registry import find_copy_limits, find_match_threshold
from pipelines.measure import MeasureConfig, MeasureSummary, run


class Tiny(nn.Module):
    """Mean colours of a 3x3 grid, spread over 128 numbers."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc = nn.Linear(27, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 3).flatten(1))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from facepipe.models.zoo.architectures import ARCHITECTURES, Architecture

    made = Architecture("tiny", "embedder", "for tests", lambda dim, size: Tiny(dim))
    monkeypatch.setitem(ARCHITECTURES, "tiny", made)
    torch.manual_seed(0)
    card = CardFile("m", "", architecture="tiny", input=InputConfig((32, 32), "bgr"))
    return save_model(tmp_path / "m.toml", Tiny(128).state_dict(), card)


def draw_images(root: Path, count: int) -> Path:
    """Two pictures each of 'faces' in colours of their own."""
    for n in range(count):
        rng = np.random.default_rng(n // 2)
        image = np.full((70, 60, 3), 200, np.uint8)
        b, g, r = (int(v) for v in (*rng.integers(0, 70, 2), rng.integers(190, 255)))
        cv2.rectangle(image, (10, 10), (40, 50 + n % 2), (b, g, r), -1)
        image[-2:] = np.random.default_rng(1000 + n).integers(0, 255, (2, 60, 3))
        (root / f"person{n // 2}").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / f"person{n // 2}" / f"{n}.png"), image)
    return root


def measure(model: Path, gallery: Path, **settings: Any) -> MeasureSummary:
    return run(MeasureConfig(device="cpu", threads=1, **settings), str(model), str(gallery))


def test_a_model_without_a_distance_gets_one(model: Path, fakes: dict[str, Any], tmp_path: Path) -> None:
    embed(draw_images(tmp_path / "images", 420), tmp_path / "g", fakes)
    assert find_match_threshold(str(model)) is None
    assert find_copy_limits(str(model)) == {}
    summary = measure(model, tmp_path / "g")
    assert summary.faces == 420
    assert summary.same_person is not None
    assert summary.copies is not None
    assert (summary.same_person.basis, summary.same_person.same) == ("labels", 210)
    assert find_match_threshold(str(model)) == pytest.approx(summary.same_person.distance, abs=1e-4)
    assert set(find_copy_limits(str(model))) == {"near", "close_near", "same_shot"}
    assert read_card(model).figures["measured_faces"] == 420
    alone = measure(model, tmp_path / "g", labels=False, faces=200).same_person
    assert alone is not None
    assert (alone.basis, alone.same) == ("strangers", 0)


def test_what_cannot_be_measured(model: Path, fakes: dict[str, Any], tmp_path: Path) -> None:
    embed(draw_images(tmp_path / "images", 20), tmp_path / "g", fakes)
    before = model.read_text()
    with pytest.raises(GalleryError, match="has 20 images with a face: measuring a model takes 200"):
        measure(model, tmp_path / "g")
    model.write_text(before.replace("dim = 128", "dim = 150"))
    with pytest.raises(ModelError, match=r"does not fit Tiny.*expected \(150, 27\)"):
        measure(model, tmp_path / "g")
