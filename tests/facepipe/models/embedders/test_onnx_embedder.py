"""Embedders as ONNX graphs: foreign ones in any layout, our own exports, and galleries made with them."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import embed
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from facepipe.errors import ConfigError, ContractError, ModelError
from facepipe.gallery import Gallery
from facepipe.models.embedders.engines import OnnxEmbedder, TorchEmbedder
from facepipe.models.parity import make_scene_chips, measure_difference
from facepipe.models.projection import Projection, save_projection, to_unit_vectors
from facepipe.models.runtime.onnx_session import DeviceRun, open_session
from facepipe.models.runtime.preprocess import Input
from facepipe.models.zoo.architectures import ARCHITECTURES, Architecture
from facepipe.models.zoo.card_file import CardFile, InputConfig, read_card, save_model
from facepipe.models.zoo.export import export_model
from facepipe.models.zoo.loading import hash_without_projection
from facepipe.models.zoo.registry import find_card

FED = Input("bgr", (100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
SIZE = (24, 32)


class Tiny(nn.Module):
    """One convolution, batch norms as everywhere, one linear layer."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 5, 2), nn.BatchNorm2d(16)
        self.fc, self.last = nn.Linear(16, dim), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


def tiny(dim: int = 512) -> Tiny:
    """With statistics that folding must not lose."""
    torch.manual_seed(0)
    net = Tiny(dim)
    for norm in (net.norm, net.last):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net.eval()


def foreign(channels_last: bool, batch: int | str) -> bytes:
    """The tiny net as somebody else's exporter would have written it: float input, named as they like."""
    net = tiny()
    state = {name: value.numpy() for name, value in net.state_dict().items() if "tracked" not in name}
    height, width = SIZE[1], SIZE[0]
    shape = [batch, height, width, 3] if channels_last else [batch, 3, height, width]
    nodes = [helper.make_node("Transpose", ["data"], ["x"], perm=[0, 3, 1, 2])] if channels_last else []
    first = "x" if channels_last else "data"
    norms = ("weight", "bias", "running_mean", "running_var")
    nodes += [
        helper.make_node("Conv", [first, "conv.weight", "conv.bias"], ["a"], strides=[2, 2]),
        helper.make_node("BatchNormalization", ["a", *(f"norm.{n}" for n in norms)], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "fc.weight", "fc.bias"], ["f"], transB=1),
        helper.make_node("BatchNormalization", ["f", *(f"last.{n}" for n in norms)], ["fc1"]),
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("fc1", TensorProto.FLOAT, [batch, 512])],
        [numpy_helper.from_array(value, name) for name, value in state.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8, "n"])
def test_foreign_graphs_in_any_layout(channels_last: bool, batch: int | str) -> None:
    made = OnnxEmbedder(foreign(channels_last, batch), FED, SIZE)
    assert (made.dim, made.size) == (512, SIZE)
    assert measure_difference(TorchEmbedder(tiny(), FED, SIZE, device="cpu"), made) < 1e-5
    chips = make_scene_chips(SIZE, 11)
    alone = np.concatenate([made.embed(chip[None]) for chip in chips])
    assert np.abs(made.embed(chips) - alone).max() < 1e-5, "the batch does not show in the vectors"
    assert made.embed(chips[:0]).shape == (0, 512)


def test_what_a_graph_is_fed_matters() -> None:
    right = OnnxEmbedder(foreign(False, "n"), FED, SIZE)
    chips = make_scene_chips(SIZE, 3)
    for other in (Input("rgb", FED.mean, FED.scale), Input("bgr", (0.0,) * 3, FED.scale), Input("bgr", FED.mean)):  # type: ignore[arg-type]
        assert np.abs(OnnxEmbedder(foreign(False, "n"), other, SIZE).embed(chips) - right.embed(chips)).max() > 0.01


def test_a_gpu_that_cannot_be_started_is_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime says that it has CUDA, and then falls back to the CPU without a word."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for device in ("cuda", "cuda:1"):
            with pytest.raises(ModelError, match="could not start CUDAExecutionProvider"):
                open_session(foreign(False, "n"), threads=1, device=device)


def test_a_gpu_is_asked_for_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class Started:
        def __init__(self, graph: bytes, options: Any, providers: list[tuple[str, dict[str, str]]]):
            self.providers = providers

        def get_providers(self) -> list[str]:
            return [name for name, _ in self.providers]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Started)
    # Single precision is IEEE on a GPU too.
    for device, options in (("cuda:1", {"device_id": "1", "use_tf32": "0"}), ("cuda", {"use_tf32": "0"})):
        assert open_session(b"", threads=1, device=device).providers == [("CUDAExecutionProvider", options)]


def test_bound_runs_give_what_plain_ones_give() -> None:
    """What a GPU's session is fed and gives back, on a session of the CPU."""
    session = open_session(foreign(channels_last=False, batch="n"), threads=1)
    chips = np.random.default_rng(0).normal(size=(5, 3, SIZE[1], SIZE[0])).astype(np.float32)
    expected = session.run(["fc1"], {"data": chips})[0]
    run = DeviceRun(session, "cpu")
    with ThreadPoolExecutor(3) as pool:
        for vectors in pool.map(lambda _: run("data", chips, "fc1"), range(6)):
            assert np.array_equal(vectors, expected)


def of_levels(name: str) -> bytes:
    """A graph from uint8 chips to the mean level of each channel."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", [name], ["x"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["x"], ["vectors"], axes=[1, 2], keepdims=0),
        ],
        "levels",
        [helper.make_tensor_value_info(name, TensorProto.UINT8, ["n", SIZE[1], SIZE[0], 3])],
        [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["n", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def test_whole_levels_are_fed_as_they_are_or_not_at_all() -> None:
    chips = make_scene_chips(SIZE, 3)
    plain = Input("rgb", (0, 0, 0), (1, 1, 1))
    assert np.abs(OnnxEmbedder(of_levels("data"), plain, SIZE).embed(chips) - chips.mean((1, 2))).max() < 1e-3
    for fed in (FED, Input(), replace(plain, channels="bgr")):
        with pytest.raises(ModelError, match=r'takes uint8 chips unchanged.* channels = "rgb", mean = 0, scale = 1'):
            OnnxEmbedder(of_levels("data"), fed, SIZE)
        assert OnnxEmbedder(of_levels("chips"), fed, SIZE).dim == 3, "ours: what it is fed is inside"


def test_graphs_that_are_no_embedders() -> None:
    with pytest.raises(ModelError, match="cannot load the graph"):
        OnnxEmbedder(b"no graph", FED, SIZE)
    with pytest.raises(ModelError, match=r"does not take chips of \(32, 32\)"):
        OnnxEmbedder(foreign(False, "n"), FED, (32, 32))
    two = onnx.load_from_string(foreign(False, "n"))
    two.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    with pytest.raises(ModelError, match=r"one input of four dimensions, this one data .*more"):
        OnnxEmbedder(two.SerializeToString(), FED, SIZE)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny net of 512 dimensions as a model with a projection."""
    made = Architecture("tiny", "embedder", "for tests", lambda dim, size: Tiny(dim), FED)
    monkeypatch.setitem(ARCHITECTURES, "tiny", made)
    told = CardFile("m", "", architecture="tiny", dim=512, projection="p.safetensors", figures={"accuracy": 0.5})
    model = save_model(tmp_path / "m.toml", tiny().state_dict(), _sized(told))
    _projected(model, MATRIX)
    return model


MATRIX = np.linalg.qr(np.random.default_rng(0).normal(size=(512, 128)))[0].astype(np.float32)


def _projected(model: Path, matrix: np.ndarray) -> None:
    """Write the projection that a model's file names."""
    file = read_card(model)
    told = {"model_sha256": hash_without_projection(model, file)}
    save_projection(model.parent / file.projection, Projection(matrix, 1.0), told)


def _sized(told: CardFile) -> CardFile:
    return replace(told, input=InputConfig(SIZE, alignment="box", fill=9))


def test_an_export_holds_all_that_comes_before_and_after(saved: Path, tmp_path: Path) -> None:
    made = export_model(str(saved), tmp_path / "out.onnx")
    assert (made.dim, made.difference < 1e-5) == (128, True)
    file = read_card(tmp_path / "out.toml")
    assert (file.name, file.dim, file.projection, file.figures) == ("m", 128, "", {"accuracy": 0.5})
    assert find_card(str(tmp_path / "out.toml"), "embedder").layout == find_card(str(saved), "embedder").layout
    graph = onnx.load(tmp_path / "out.onnx").graph
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["n", 32, 24, 3]
    one, other = (find_card(str(path), "embedder").load("cpu", 1) for path in (saved, tmp_path / "out.toml"))
    assert measure_difference(one, other) < 1e-5
    whole = TorchEmbedder(tiny(), FED, SIZE, device="cpu").embed(make_scene_chips(SIZE))
    assert np.abs(to_unit_vectors(other.embed(make_scene_chips(SIZE))) - to_unit_vectors(whole @ MATRIX)).max() < 1e-5
    with pytest.raises(ConfigError, match="exists: choose another name"):
        export_model(str(saved), saved.with_suffix(".onnx"))
    with pytest.raises(ModelError, match="runs unchanged"):
        export_model(str(tmp_path / "out.toml"), tmp_path / "again.onnx")
    with pytest.raises(ModelError, match="nothing to export"):
        export_model("fake-embedder", tmp_path / "again.onnx")


def test_an_export_that_is_not_the_same_is_not_written(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import facepipe.models.zoo.export as exporting

    shifted = replace(exporting.load_torch_model(str(saved)), input=Input())
    right = exporting.build_onnx_graph(shifted)
    monkeypatch.setattr(exporting, "build_onnx_graph", lambda found, opset: right)
    with pytest.raises(ModelError, match="nothing was written; try another --opset"):
        export_model(str(saved), tmp_path / "out.onnx")
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("name", ["dlib-resnet", "mobilefacenet"])
def test_networks_of_the_zoo_are_exported(name: str, tmp_path: Path) -> None:
    model = name
    if name != "dlib-resnet":
        torch.manual_seed(0)
        net = ARCHITECTURES[name].build(128, ARCHITECTURES[name].layout.size)
        model = str(save_model(tmp_path / "m.toml", net.state_dict(), CardFile("m", "", architecture=name)))
    made = export_model(model, tmp_path / "out.onnx")
    assert made.difference < 1e-5
    assert find_card(str(tmp_path / "out.toml"), "embedder").load("cpu", 1).dim == 128
    kinds = {node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node}
    assert "Conv" in kinds
    assert "PRelu" not in kinds, "ONNX Runtime's own is slow"


@pytest.fixture
def people(shared: Path, tmp_path: Path) -> Path:
    """Four pictures of LFW."""
    for n, path in enumerate(sorted((shared / "data" / "lfw-dev" / "images").glob("*/*.jpg"))[:4]):
        folder = tmp_path / "people" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).symlink_to(path)
        assert n < 4
    return tmp_path / "people"


def toml(folder: Path, name: str, **values: Any) -> Path:
    """A foreign graph's file; text is quoted, numbers are not."""
    (folder / "foreign.onnx").write_bytes(foreign(False, "n"))
    told = {"mean": 100.0, "alignment": '"similarity"', "template": '"arcface"', "matrix": MATRIX, **values}
    path = folder / f"{name}.toml"
    path.write_text(
        f'name = "foreign"\nweights = "foreign.onnx"\ndim = 512\nprojection = "{name}.safetensors"\n[input]\n'
        f'size = {list(SIZE)}\nchannels = "bgr"\nmean = {told["mean"]}\nscale = 60\nalignment = {told["alignment"]}\n'
        + (f"template = {told['template']}\n" if told["alignment"] == '"similarity"' else "")
    )
    _projected(path, told["matrix"])
    return path


@pytest.mark.parametrize("alignment", ["similarity", "eyes", "box"])
def test_a_gallery_of_a_foreign_graph(alignment: str, people: Path, tmp_path: Path) -> None:
    model = toml(tmp_path, "one", alignment=f'"{alignment}"')
    settings = {"embed": {"model": str(model)}}
    first = embed(people, tmp_path / "g", settings, runner="inline")
    assert (first.statuses, first.faces >= 4) == ({"ok": 4}, True)
    vectors = Gallery(tmp_path / "g").vectors()[1]
    assert vectors.shape[1] == 128
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    contract = Gallery(tmp_path / "g").contract
    assert (contract.embedder, contract.alignment.split(":")[0]) == ("foreign", alignment)
    again = embed(people, tmp_path / "g", settings, runner="inline")
    assert (again.images, again.skipped) == (0, 4)
    other = toml(tmp_path, "two", alignment=f'"{alignment}"', mean=90.0)
    with pytest.raises(ContractError, match=r"embedder_sha256: the gallery has .*, asked for is"):
        embed(people, tmp_path / "g", {"embed": {"model": str(other)}}, runner="inline")
    turned = toml(tmp_path, "three", alignment=f'"{alignment}"', matrix=np.eye(512, 128, dtype=np.float32))
    with pytest.raises(ContractError, match="embedder_sha256"):
        embed(people, tmp_path / "g", {"embed": {"model": str(turned)}}, runner="inline")
