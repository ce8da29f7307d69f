"""Export a model as one ONNX graph that takes uint8 chips as they are cut.

Its preprocessing and its projection are inside the graph. A graph is only written if ONNX Runtime computes the same
vectors from it as torch does from the model.
"""

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facepipe.errors import ConfigError, ModelError, StorageError
from facepipe.extras import require_module
from facepipe.imaging.alignment import ChipLayout
from facepipe.models.card import Card
from facepipe.models.embedders.engines import OnnxEmbedder, TorchEmbedder
from facepipe.models.parity import TOLERANCE, measure_difference
from facepipe.models.projection import ProjectedEmbedder, read_projection
from facepipe.models.protocols import Embedder
from facepipe.models.runtime.preprocess import Input, preprocess_with
from facepipe.models.zoo.architectures import ARCHITECTURES
from facepipe.models.zoo.card_file import CardFile, InputConfig, resolve_chip_layout, resolve_input, to_toml
from facepipe.models.zoo.loading import hash_without_projection, load_card, load_net
from facepipe.models.zoo.packaged import load_dlib_net
from facepipe.models.zoo.registry import CARDS, find_card, find_card_file
from facepipe.storage import write
from facepipe.types import Float32

if TYPE_CHECKING:
    from torch import nn

OPSET = 20


@dataclass(frozen=True)
class TorchModel:
    """An embedder as a torch module.

    Attributes:
        net: The network with its weights.
        input: Channel order, mean and scale.
        layout: How its chips are cut.
        card: What the TOML file of the export will say.
        projection: (d, k), if it has one.
    """

    net: "nn.Module"
    input: Input
    layout: ChipLayout
    card: CardFile
    projection: Float32 | None = None

    def to_embedder(self) -> Embedder:
        """Run it with torch on the CPU."""
        embedder = TorchEmbedder(self.net, self.input, self.layout.size, device="cpu")
        return embedder if self.projection is None else ProjectedEmbedder(embedder, self.projection)


@dataclass(frozen=True)
class ExportedModel:
    """What an export wrote.

    Attributes:
        weights: Path of the ONNX graph.
        card: Path of the TOML file.
        opset: ONNX opset version.
        dim: Length of the vectors.
        difference: Largest difference between components of unit vectors, torch's and ONNX Runtime's.
    """

    weights: str
    card: str
    opset: int
    dim: int
    difference: float


def export_model(model: str, out: Path, opset: int = OPSET) -> ExportedModel:
    """Write OUT.onnx, from `chips` (n, h, w, 3) uint8 RGB to `vectors` (n, dim) float32, and OUT.toml.

    Args:
        model: A TOML file, or the name of an embedder.
        out: OUT, with any suffix.
        opset: ONNX opset version.

    Raises:
        ConfigError: One of the two files exists.
        ModelError: The graph's vectors differ from torch's.
    """
    weights_path = out.with_suffix(".onnx")
    card_path = out.with_suffix(".toml")
    for path in (weights_path, card_path):
        if os.path.lexists(path):
            raise ConfigError(f"{str(path)!r} exists: choose another name")
    # Export the graph and compare it.
    torch_model = load_torch_model(model)
    torch_embedder = torch_model.to_embedder()
    graph = build_onnx_graph(torch_model, opset)
    onnx_embedder = OnnxEmbedder(graph, torch_model.input, torch_model.layout.size)
    difference = measure_difference(torch_embedder, onnx_embedder)
    if difference > TOLERANCE:
        raise ModelError(
            f"ONNX Runtime's vectors of {torch_model.card.name} differ from torch's by {difference:.2g}, more than "
            f"{TOLERANCE:g}: nothing was written; try another --opset"
        )
    # Write both files, or none.
    card = replace(
        torch_model.card, weights=weights_path.name, sha256=hashlib.sha256(graph).hexdigest(), dim=torch_embedder.dim
    )
    try:
        write(str(weights_path), graph)
        write(str(card_path), to_toml(card).encode())
    except StorageError:
        weights_path.unlink(missing_ok=True)
        raise
    return ExportedModel(str(weights_path), str(card_path), opset, torch_embedder.dim, difference)


def load_torch_model(model: str) -> TorchModel:
    """Load an embedder as a torch module.

    Args:
        model: A TOML file, or the name of an embedder.

    Raises:
        ModelError: It has no torch module: an ONNX graph, or a fake for tests.
    """
    if model in CARDS:
        return _load_registered(find_card(model, "embedder"))
    path = find_card_file(model)
    if path is None:
        find_card(model, "embedder")  # its error lists what there is
        raise ModelError(f"{model} has no TOML file")
    return _load_from_file(path)


def _load_registered(card: Card) -> TorchModel:
    layout = card.layout
    model_input = ARCHITECTURES["dlib-resnet"].input
    if card.name != "dlib-resnet" or layout is None:
        raise ModelError(f"{card.name} is not a torch module: there is nothing to export")
    file = CardFile(
        name=card.name,
        weights="",
        architecture=card.name,
        same_person=card.same_person,
        licence=card.licence,
        source=card.weights,
        input=_make_explicit(layout, model_input),
    )
    return TorchModel(load_dlib_net(), model_input, layout, file)


def _load_from_file(path: Path) -> TorchModel:
    load_card(path)  # checks the SHA-256 of the weights
    net, file = load_net(path)
    if file.role != "embedder":
        raise ModelError(f"{path}: {file.name} is a detector; only embedders can be exported")
    projection = None
    if file.projection:
        sha256 = hash_without_projection(path, file)
        projection = read_projection(path.parent / file.projection, file.dim, sha256)
    layout = resolve_chip_layout(file)
    model_input = resolve_input(file)
    # The projection and our tensor names are inside the graph, so the new file names neither.
    card = replace(file, projection="", keys="", input=_make_explicit(layout, model_input))
    return TorchModel(net, model_input, layout, card, projection)


def _make_explicit(layout: ChipLayout, model_input: Input) -> InputConfig:
    """Spell out what the model takes, because an ONNX graph does not say it."""
    channels: Any = model_input.channels
    return InputConfig(
        size=layout.size,
        channels=channels,
        mean=model_input.mean,
        scale=model_input.scale,
        alignment=layout.kind,
        template=layout.template or None,
        fill=None if layout.kind in ("similarity", "dlib") else layout.fill,
    )


def build_onnx_graph(model: TorchModel, opset: int = OPSET) -> bytes:
    """Build the ONNX graph of a model.

    Raises:
        MissingPackageError: onnxscript is not installed.
        ModelError: torch cannot write the network.
    """
    require_module("onnxscript", "writing ONNX graphs")
    import torch

    width, height = model.layout.size
    # Two chips, because the exporter takes a batch of one for a constant.
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    with _suppress_warnings(), torch.inference_mode():
        try:
            program: Any = torch.onnx.export(
                _wrap_network(model),
                (example,),
                dynamo=True,
                input_names=["chips"],
                output_names=["vectors"],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            first_line = str(error).strip().splitlines()[0]
            raise ModelError(f"torch cannot write {model.card.name} as an ONNX graph: {first_line}") from error
    graph: bytes = program.model_proto.SerializeToString()
    return graph


def _wrap_network(model: TorchModel) -> "nn.Module":
    """Wrap the network in a module from uint8 chips to vectors."""
    import torch
    from torch import Tensor, nn

    from facepipe.models.embedders.prelu import replace_prelus

    class ChipsToVectors(nn.Module):
        mean: Tensor
        scale: Tensor
        projection: Tensor | None

        def __init__(self) -> None:
            super().__init__()
            # Slower activations are replaced for the graph; constants are buffers, so that they are exported.
            self.net = replace_prelus(model.net).eval()
            self.register_buffer("mean", torch.tensor(model.input.mean).view(1, 3, 1, 1))
            self.register_buffer("scale", torch.tensor(model.input.scale).view(1, 3, 1, 1))
            projection = None if model.projection is None else torch.tensor(model.projection)
            self.register_buffer("projection", projection)

        def forward(self, chips: Tensor) -> Tensor:
            planes = preprocess_with(chips, self.mean, self.scale, is_bgr=model.input.channels == "bgr")
            vectors: Tensor = self.net(planes)
            return vectors if self.projection is None else vectors @ self.projection

    return ChipsToVectors().eval()


@contextmanager
def _suppress_warnings() -> Iterator[None]:
    """Suppress the warnings of torch's exporter about its own deprecated calls and about optional packages."""
    logger = logging.getLogger("torch.onnx")
    previous = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(previous)
