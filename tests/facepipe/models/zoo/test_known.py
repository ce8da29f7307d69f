"""Known models: what to get is said, a file is recognised by its hash, and a look-alike of its shape works at once."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from helpers import embed
from onnx import TensorProto, helper, numpy_helper

from facepipe.errors import ModelError, UnknownModelError, WeightsError
from facepipe.gallery import Gallery
from facepipe.imaging.alignment import ARCFACE_112
from facepipe.models.protocols import DetectionLimits
from facepipe.models.zoo import known, packaged
from facepipe.models.zoo.check import check_model
from facepipe.models.zoo.install import add_model, require_golden
from facepipe.models.zoo.known import KNOWN_MODELS, REGISTERED_PROVENANCE, find_commercial_obstacle
from facepipe.models.zoo.registry import CARDS, find_card


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FACEPIPE_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def make_sface_like(seed: int = 0, dim: int = 128) -> bytes:
    """Make a graph of SFace's inputs and shapes: one image of 1x3x112x112, opset 8, weights among the inputs, 128-D."""
    rng = np.random.default_rng(seed)
    conv = numpy_helper.from_array(rng.normal(size=(8, 3, 16, 16)).astype(np.float32) / 500, "conv")
    fc = numpy_helper.from_array(rng.normal(size=(392, dim)).astype(np.float32), "fc")
    nodes = [
        helper.make_node("Conv", ["data", "conv"], ["a"], strides=[16, 16]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "fc"], ["fc1"]),
    ]
    values = [("data", [1, 3, 112, 112]), ("conv", [8, 3, 16, 16]), ("fc", [392, dim])]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values]
    output = helper.make_tensor_value_info("fc1", TensorProto.FLOAT, [1, dim])
    graph = helper.make_graph(nodes, "sface-like", inputs, [output], [conv, fc])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=3)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def make_known(name: str, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a look-alike's hash be that of a known model."""
    model = KNOWN_MODELS[name]
    card = replace(model.card, sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(KNOWN_MODELS, name, replace(model, card=card))


def test_the_table_is_complete() -> None:
    assert len(KNOWN_MODELS) >= 12
    assert not set(KNOWN_MODELS) & set(CARDS)
    for model in KNOWN_MODELS.values():
        assert len(bytes.fromhex(model.card.sha256)) == 32
        assert all([model.card.licence, model.code_licence, model.data, model.summary, model.card.source])
        assert model.publisher.startswith("https://")
        assert model.card.weights.endswith(".onnx")
    weights = {card.name for card in CARDS.values() if card.sha256 and not card.for_tests}
    assert set(REGISTERED_PROVENANCE) | {"aligned-arcface"} >= weights


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_a_missing_file_is_asked_for(name: str) -> None:
    model = KNOWN_MODELS[name]
    with pytest.raises(UnknownModelError) as raised:
        find_card(name, model.card.role)
    message = str(raised.value)
    for part in (model.card.weights, model.card.sha256, model.publisher, model.data, "facepipe models add"):
        assert part in message
    assert ("projection" in message) == model.needs_projection


def test_the_names_are_offered() -> None:
    with pytest.raises(UnknownModelError, match="Known, if you have their files: sface,"):
        find_card("sfase", "embedder")


def test_sface_works_once_its_file_is_there(
    portrait: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_sface_like()
    make_known("sface", data, monkeypatch)
    (tmp_path / "downloaded.onnx").write_bytes(data)
    added = add_model(tmp_path / "downloaded.onnx")
    assert (added.model.name, added.card_path) == ("sface", folder / "sface.toml")
    assert sorted(path.name for path in folder.iterdir()) == ["face_recognition_sface_2021dec.onnx", "sface.toml"]
    assert add_model(folder / "face_recognition_sface_2021dec.onnx") == added, "once more, from where it is"
    card = find_card("sface", "embedder")
    assert (card.dim, card.licence, card.layout and card.layout.size) == (128, "Apache-2.0", (112, 112))
    summary = embed(portrait, tmp_path / "gallery", {"embed": {"model": "sface"}}, runner="inline")
    assert summary.statuses == {"ok": 1}
    gallery = Gallery(str(tmp_path / "gallery"))
    assert (gallery.contract.embedder, gallery.contract.dim) == ("sface", 128)
    # What the graph itself makes of the chip.
    assert np.linalg.norm(gallery.to_arrow(["embedding"])["embedding"][0].as_py()) == pytest.approx(1, abs=1e-5)


def test_a_quality_model_works_once_its_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One score per chip, the same in any batch; it is no embedder, and no other graph is one of its kind."""
    data = make_sface_like(dim=1)
    make_known("ediffiqa-t", data, monkeypatch)
    (tmp_path / "quality.onnx").write_bytes(data)
    assert add_model(tmp_path / "quality.onnx").model.name == "ediffiqa-t"
    card = find_card("ediffiqa-t", "quality")
    assert (card.licence, card.layout and card.layout.template) == ("CC-BY-4.0", ARCFACE_112)
    chips = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)
    model = card.load("cpu", 1)
    scores = model.score(chips)
    assert scores.shape == (5,)
    assert np.array_equal(scores, np.concatenate([model.score(chips[n : n + 1]) for n in range(5)]))
    assert len(model.score(chips[:0])) == 0
    checked = check_model("ediffiqa-t")
    assert (checked.role, checked.dim) == ("quality", None)
    assert "beside `face_quality`" in checked.note
    with pytest.raises(UnknownModelError, match="'ediffiqa-t' is a quality model, expected an embedder"):
        find_card("ediffiqa-t", "embedder")
    wide = make_sface_like()
    make_known("ediffiqa-t", wide, monkeypatch)
    (tmp_path / "wide.onnx").write_bytes(wide)
    add_model(tmp_path / "wide.onnx")
    with pytest.raises(ModelError, match="one number per chip, and this graph gives 128"):
        find_card("ediffiqa-t", "quality").load("cpu", 1)
    with pytest.raises(UnknownModelError, match="no quality model is called 'ediffiq'; registered are: none"):
        find_card("ediffiq", "quality")


def test_an_altered_file_is_refused(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_sface_like()
    make_known("sface", data, monkeypatch)
    path = tmp_path / "face_recognition_sface_2021dec.onnx"
    path.write_bytes(make_sface_like(1))
    with pytest.raises(ModelError, match=r"is not sface: expected .*opencv_zoo"):
        add_model(path)
    assert not folder.exists()
    (tmp_path / "other.onnx").write_bytes(b"x")
    with pytest.raises(ModelError, match="no file of a known model"):
        add_model(tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="no such file"):
        add_model(tmp_path / "gone.onnx")
    path.write_bytes(data)
    add_model(path)
    (folder / path.name).write_bytes(make_sface_like(1))
    with pytest.raises(WeightsError):
        find_card("sface", "embedder")


def test_golden_vectors(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_sface_like()
    make_known("sface", data, monkeypatch)
    (tmp_path / "sface.onnx").write_bytes(data)
    add_model(tmp_path / "sface.onnx")
    assert not require_golden("sface")
    assert require_golden("sface")
    path = folder / "sface.golden.json"
    golden = json.loads(path.read_text())
    golden["vectors"][0][0] += 10
    path.write_text(json.dumps(golden))
    with pytest.raises(ModelError, match="other vectors"):
        require_golden("sface")


def test_a_retinaface_graph_is_a_detector(portrait: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default's own graph under a known name finds the same faces, to the bit."""
    data = packaged.read_retinaface_onnx()
    make_known("retinaface-mv2", data, monkeypatch)
    (tmp_path / "retinaface_mv2.onnx").write_bytes(data)
    add_model(tmp_path / "retinaface_mv2.onnx")
    limits = DetectionLimits(0.5, 0.4)
    image = cv2.resize(cv2.cvtColor(cv2.imread(str(portrait)), cv2.COLOR_BGR2RGB), (480, 640))
    expected = packaged.load_retinaface("cpu", 1, limits).detect([image])[0]
    found = find_card("retinaface-mv2", "detector").load("cpu", 1, limits).detect([image])[0]
    assert len(found.scores) == 1
    assert all(np.array_equal(one, other) for one, other in zip(found[:3], expected[:3], strict=True))


def test_commercial_use(portrait: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_commercial_obstacle("sface", "Apache-2.0") is None
    assert find_commercial_obstacle("dlib-resnet", CARDS["dlib-resnet"].licence) is None
    assert "research use only" in str(find_commercial_obstacle("arcface-zoo", "Apache-2.0"))
    assert "not verified" in str(find_commercial_obstacle("lvface-t", KNOWN_MODELS["lvface-t"].card.licence))
    assert "non-commercial" in str(find_commercial_obstacle("mine", "non-commercial research"))
    settings = {"models": {"policy": "commercial"}}
    assert embed(portrait, tmp_path / "gallery", settings, runner="inline").statuses == {"ok": 1}
    data = make_sface_like()
    make_known("sface", data, monkeypatch)
    research = replace(KNOWN_MODELS["sface"], data="research use only", data_allows_commercial_use=False)
    monkeypatch.setitem(known.KNOWN_MODELS, "sface", research)
    (tmp_path / "sface.onnx").write_bytes(data)
    add_model(tmp_path / "sface.onnx")
    with pytest.raises(ModelError, match="refuses sface: it was trained on research use only"):
        embed(portrait, tmp_path / "other", settings, {"embed": {"model": "sface"}}, runner="inline")
    assert not (tmp_path / "other").exists()
