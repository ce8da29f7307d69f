"""A model's TOML file: what it may say, what it is refused for, and that it comes back as it was written."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from facepipe.config import build, read_toml
from facepipe.errors import ConfigError, ModelError, WeightsError
from facepipe.imaging.alignment import scale_arcface_template
from facepipe.models.zoo.card_file import (
    CardFile,
    InputConfig,
    read_card,
    resolve_chip_layout,
    resolve_input,
    save_model,
    set_measured_limits,
    to_euclidean_threshold,
    to_toml,
)
from facepipe.models.zoo.loading import load_card, load_embedder, load_net
from facepipe.models.zoo.registry import find_card, find_chip_layout


class Tiny(nn.Module):
    """Two convolutions' worth of an embedder."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture of the tests."""
    from facepipe.models.zoo.architectures import ARCHITECTURES, Architecture

    made = Architecture("tiny", "embedder", "for tests", lambda dim, size: Tiny(dim))
    monkeypatch.setitem(ARCHITECTURES, "tiny", made)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def saved(folder: Path, dim: int = 128, **settings: Any) -> Path:
    torch.manual_seed(0)
    return save_model(
        folder / "m.toml", Tiny(dim).state_dict(), CardFile("m", "", architecture="tiny", dim=dim, **settings)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "m"\nweigths = "m.onnx"', "did you mean weights"),
        ('name = "m"\nweights = "m.onnx"\n[input]\nmeans = 0', "input.means: did you mean input.mean"),
        ('name = "m"\nweights = "m.pth"\narchitecture = "resnet19"', "'resnet19'; there are .*resnet18"),
        ('name = "m"\nweights = "m.pth"', "need an architecture: .*mobilefacenet"),
        (
            'name = "m"\nweights = "m.pth"\nrole = "detector"\narchitecture = "resnet18"',
            "resnet18 is not an architecture of a detector",
        ),
        (
            'name = "m"\nweights = "m.pth"\narchitecture = "retinaface-mnet025"',
            "retinaface-mnet025 is not an architecture of an embedder",
        ),
        ('name = "m"\nweights = "m.onnx"\nrole = "tracker"', "role"),
        ('name = "m"\nweights = "m.onnx"\n[input]\nsize = [9, 9]\nmean = 0', "input.channels, input.scale are missing"),
        ('name = "m"\nweights = "m.pth"\narchitecture = "resnet18"\n[input]\nscale = [1, 0, 1]', "divided by it"),
        ('name = "m"\nweights = "m.pth"\narchitecture = "resnet18"\n[input]\nsize = [0, 9]', "width and height"),
        (
            'name = "m"\nweights = "m.onnx"\nrole = "detector"\narchitecture = "yunet"\n[input]\nmean = 1',
            "input.mean cannot be set for yunet",
        ),
        (
            'name = "m"\nweights = "m.pth"\nrole = "detector"\narchitecture = "retinaface-mnet025"\n[input]\nscale = 2',
            "input.scale cannot be set for retinaface-mnet025",
        ),
        ('name = "m"\nweights = "m.onnx"\nmetric = "cosinus"', "metric"),
        ('weights = "m.onnx"', "name"),
        ('name = "m', "is not TOML"),
    ],
)
def test_what_a_file_is_refused_for(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_card(write(tmp_path / "m.toml", text))


def test_layouts_that_cannot_be() -> None:
    graph = CardFile("m", "m.onnx")
    with pytest.raises(ConfigError, match=r"m: input.size = \[width, height\] is missing"):
        resolve_chip_layout(graph)
    with pytest.raises(ConfigError, match=r"input.template is missing: arcface, dlib, or five"):
        resolve_chip_layout(CardFile("m", "m.onnx", input=InputConfig((112, 112))))
    four = ((1.0, 2.0), (3.0, 2.0), (2.0, 3.0), (1.0, 4.0))
    with pytest.raises(ConfigError, match=r"five points, input.template has 4"):
        resolve_chip_layout(CardFile("m", "m.onnx", input=InputConfig((112, 112), template=four)))


def test_what_is_not_given_is_the_architectures() -> None:
    plain = CardFile("m", "m.pth", architecture="mobilefacenet")
    assert (resolve_chip_layout(plain).size, resolve_input(plain).scale) == ((96, 112), (128.0, 128.0, 128.0))
    larger = CardFile("m", "m.pth", architecture="mobilefacenet", input=InputConfig((112, 112), "bgr", scale=1.0))
    assert resolve_chip_layout(larger).template == scale_arcface_template((112, 112))
    assert (resolve_input(larger).channels, resolve_input(larger).mean, resolve_input(larger).scale) == (
        "bgr",
        (127.5,) * 3,
        (1.0,) * 3,
    )
    box = CardFile("m", "m.pth", architecture="mobilefacenet", input=InputConfig(alignment="box", fill=7))
    assert (resolve_chip_layout(box).kind, resolve_chip_layout(box).template, resolve_chip_layout(box).fill) == (
        "box",
        (),
        7,
    )


@pytest.mark.usefixtures("tiny")
def test_a_model_comes_back_as_it_was_written(tmp_path: Path) -> None:
    given = {
        "same_person": 1.1,
        "licence": 'MIT, "as is"',
        "source": "trained here \\ é",
        "figures": {"accuracy": 0.98},
        "input": InputConfig((64, 48), "bgr", (1.0, 2.0, 3.0), 2.5, "similarity", scale_arcface_template((64, 48))),
    }
    path = saved(tmp_path, **given)
    file = read_card(path)
    assert {name: getattr(file, name) for name in given} == given
    assert file.sha256 == hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()
    write(tmp_path / "again.toml", to_toml(file))
    assert read_card(tmp_path / "again.toml") == file
    net, _ = load_net(path)
    torch.manual_seed(0)
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), Tiny(128).state_dict().values(), strict=True)
    )
    assert load_card(path).layout == find_chip_layout(str(path))
    assert find_card(str(tmp_path / "m.safetensors"), "embedder").sha256 == find_card(str(path), "embedder").sha256


@pytest.mark.usefixtures("tiny")
def test_weights_that_are_not_the_files(tmp_path: Path) -> None:
    path = saved(tmp_path)
    weights = tmp_path / "m.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(WeightsError, match="and its TOML file says"):
        load_card(path)
    weights.write_bytes(whole[:100])
    write(path, 'name = "m"\nweights = "m.safetensors"\narchitecture = "tiny"')
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_net(path)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"m\.safetensors' are missing"):
        load_card(path)


@pytest.mark.usefixtures("tiny")
def test_dimensions_must_be_what_the_file_says(tmp_path: Path) -> None:
    path = saved(tmp_path, 200)
    assert load_embedder(path, "cpu", 1).dim == load_embedder(path, "cpu", 1, raw=True).dim == 200
    write(path, path.read_text().replace("dim = 200", "dim = 100"))
    with pytest.raises(WeightsError, match=r"fc.weight \(200, 4\), expected \(100, 4\)"):
        load_embedder(path, "cpu", 1)


@pytest.mark.usefixtures("tiny")
def test_models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    (tmp_path / "dlib-resnet.toml").write_text(path.read_text())
    with pytest.raises(ModelError, match="no embedder is called 'm'"):
        find_card("m", "embedder")
    monkeypatch.setenv("FACEPIPE_MODELS", str(tmp_path))
    assert find_card("m", "embedder").sha256 == find_card(str(path), "embedder").sha256
    assert find_card("dlib-resnet", "embedder").licence == "public domain", "what is registered comes first"
    with pytest.raises(ModelError, match="'m' is an embedder, expected a detector"):
        find_card("m", "detector")
    with pytest.raises(ConfigError, match="cannot read"):
        find_card(str(tmp_path / "other.toml"), "embedder")


@pytest.mark.usefixtures("tiny")
def test_whatever_moves_a_vector_moves_the_fingerprint(tmp_path: Path) -> None:
    first = load_card(saved(tmp_path)).sha256
    assert load_card(saved(tmp_path, licence="MIT", same_person=1.0)).sha256 == first
    changed = [{"channels": "bgr"}, {"mean": 1.0}, {"scale": 2.0}]
    found = {load_card(saved(tmp_path, input=InputConfig(**one))).sha256 for one in changed}  # type: ignore[arg-type]
    assert len(found | {first}) == 4


def test_a_threshold_in_cosine_is_a_distance_here(tiny: None, tmp_path: Path) -> None:
    found = load_card(saved(tmp_path, metric="cosine", same_person=0.363))
    assert found.same_person == pytest.approx((2 - 2 * 0.363) ** 0.5)
    assert found.metric == "euclidean on unit vectors"
    with pytest.raises(ConfigError, match="a cosine is between"):
        load_card(saved(tmp_path, metric="cosine", same_person=1.2))


def test_lineages_that_are_fed_otherwise_have_to_say_so(tmp_path: Path) -> None:
    """facenet-pytorch's and TreB1eN's checkpoints have our layers, and were trained on other numbers."""
    from facepipe.models.zoo.architectures import ARCHITECTURES

    for name, lineage in (("facenet-inception", "facenet-pytorch"), ("mobilefacenet", "treb1en")):
        made = ARCHITECTURES[name].find_lineage(lineage)
        assert made is not None
        torch.save({made.mark: torch.zeros(1)}, tmp_path / "m.pth")
        text = f'name = "m"\nweights = "m.pth"\narchitecture = "{name}"\ndim = 512\n'
        with pytest.raises(
            ConfigError, match=f"checkpoints of {lineage} do not take the default input of .* channels = "
        ):
            load_net(write(tmp_path / "m.toml", text))
        text += '[input]\nchannels = "rgb"\nmean = 127.5\nscale = 128\n'
        with pytest.raises(WeightsError, match="missing"):
            load_net(write(tmp_path / "m.toml", text))


def test_a_retinaface_of_a_file_stands_where_the_registered_one_does(tmp_path: Path) -> None:
    text = 'name = "m"\nweights = "m.pth"\nrole = "detector"\narchitecture = "retinaface-resnet50"\n'
    (tmp_path / "m.pth").write_bytes(b"weights")
    assert load_card(write(tmp_path / "m.toml", text)).square == find_card("retinaface-mnet025", "detector").square


MEASURED = {"copies_near": 0.2, "measured_faces": 1000}


@pytest.mark.parametrize(
    "text",
    [
        'name = "m"\nweights = "w.onnx"\n',
        '# mine\nname = "m"  # so called\nweights = "w.onnx"\n\n[input]  # taken\nsize = [4, 4]\n\n[figures]\nold = 1.0\n',
        '[figures]\ncopies_near = 0.5\n"old" = 1\n',
        'same_person = 0.3\nname = "m"\n[figures]\nold = 1.0\n[input]\nfill = 3',
    ],
)
def test_measured_limits_change_nothing_else(text: str, tmp_path: Path) -> None:
    """Comments stay, values are replaced, and a second measurement replaces the first."""
    path = write(tmp_path / "m.toml", text)
    if "name" not in text:
        path.write_text('name = "m"\nweights = "w.onnx"\n' + text)
    elif "weights" not in text:
        path.write_text('weights = "w.onnx"\n' + text)
    before = build(CardFile, read_toml(path))
    comments = [line for line in path.read_text().splitlines() if "#" in line]
    for distance in (0.7, 0.6):
        set_measured_limits(path, build(CardFile, read_toml(path)), distance, MEASURED)
        after = build(CardFile, read_toml(path))
        assert after == replace(before, same_person=distance, figures={**before.figures, **MEASURED})
    assert all(line in path.read_text().splitlines() for line in comments)


def test_measured_limits_in_cosines(tmp_path: Path) -> None:
    path = write(tmp_path / "m.toml", 'name = "m"\nweights = "w.onnx"\nmetric = "cosine"\n')
    set_measured_limits(path, build(CardFile, read_toml(path)), 1.0, {})
    assert to_euclidean_threshold(build(CardFile, read_toml(path))) == pytest.approx(1.0)


def test_a_file_that_cannot_be_changed_is_left_alone(tmp_path: Path) -> None:
    text = 'name = "m"\nweights = "w.onnx"\nfigures = {old = 1.0}\n'
    path = write(tmp_path / "m.toml", text)
    with pytest.raises(ConfigError, match=r"add same_person = 0.7000 to it"):
        set_measured_limits(path, build(CardFile, read_toml(path)), 0.7, MEASURED)
    assert path.read_text() == text
