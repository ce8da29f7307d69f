"""A model as one ONNX graph that takes uint8 chips as they are cut: what it is fed, and its projection, are inside.

A graph is written only when ONNX Runtime makes the same vectors of it as torch does of the model.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facepipe.errors import ConfigError, ModelError, StorageError
from facepipe.imaging.alignment import ChipLayout
from facepipe.models.card import Card
from facepipe.models.parity import TOLERANCE, measure_difference
from facepipe.models.protocols import Embedder
from facepipe.models.runtime.preprocess import Input
from facepipe.models.zoo.architectures import ARCHITECTURES
from facepipe.models.zoo.card_file import CardFile, InputConfig, resolve_chip_layout, resolve_input, to_toml
from facepipe.models.zoo.registry import CARDS, find_card, load_dlib_net
from facepipe.storage import write
from facepipe.types import Float32

if TYPE_CHECKING:
    from torch import nn

OPSET = 20


@dataclass(frozen=True)
class TorchModel:
    """An embedder as torch has it: the net, what it is fed, how its chips are cut, and what its TOML file will say."""

    net: "nn.Module"
    fed: Input
    layout: ChipLayout
    card: CardFile
    projection: Float32 | None = None

    def embedder(self) -> Embedder:
        """It, run by torch on the CPU."""
        from facepipe.models.engines import TorchEmbedder
        from facepipe.models.projection import ProjectedEmbedder

        made: Embedder = TorchEmbedder(self.net, self.fed, self.layout.size, "cpu")
        return made if self.projection is None else ProjectedEmbedder(made, self.projection)


@dataclass(frozen=True)
class ExportedModel:
    """What was written. difference: between components of unit vectors, torch's and ONNX Runtime's, at most."""

    weights: str
    card: str
    opset: int
    dim: int
    difference: float


def export_model(model: str, out: Path, opset: int = OPSET) -> ExportedModel:
    """Write OUT.onnx (`chips` (n, h, w, 3) uint8 RGB -> `vectors` (n, dim) float32) and OUT.toml beside it.

    model: a TOML file, or the name of an embedder
    Raises ConfigError where one of the two exists, ModelError where the graph's vectors are not torch's.
    """
    from facepipe.models.engines import OnnxEmbedder

    weights, toml = out.with_suffix(".onnx"), out.with_suffix(".toml")
    for path in (weights, toml):
        if path.exists():
            raise ConfigError(f"{str(path)!r} exists: choose another name")
    found = load_torch_model(model)
    torch_embedder = found.embedder()
    graph = build_onnx_graph(found, opset)
    worst = measure_difference(torch_embedder, OnnxEmbedder(graph, found.fed, found.layout.size))
    if worst > TOLERANCE:
        raise ModelError(
            f"ONNX Runtime's vectors of {found.card.name} differ from torch's by {worst:.2g}, more than {TOLERANCE:g}: "
            "nothing was written; try another --opset"
        )
    written = replace(
        found.card, weights=weights.name, sha256=hashlib.sha256(graph).hexdigest(), dim=torch_embedder.dim
    )
    try:
        write(str(weights), graph)
        write(str(toml), to_toml(written).encode())
    except StorageError:
        weights.unlink(missing_ok=True)
        raise
    return ExportedModel(str(weights), str(toml), opset, torch_embedder.dim, worst)


def load_torch_model(model: str) -> TorchModel:
    """Raises ModelError for what there is no torch module of: an ONNX graph, a test's fake."""
    from facepipe.models.zoo.registry import find_card_file

    if model in CARDS:
        return _registered(find_card(model, "embedder"))
    path = find_card_file(model)
    if path is None:
        find_card(model, "embedder")  # says what there is
        raise ModelError(f"{model} has no TOML file")
    return _from_file(path)


def _registered(found: Card) -> TorchModel:
    layout, fed = found.layout, ARCHITECTURES["dlib-resnet"].input
    if found.name != "dlib-resnet" or layout is None:
        raise ModelError(f"{found.name} is no torch module: there is nothing to export")
    written = CardFile(
        name=found.name,
        weights="",
        architecture=found.name,
        same_person=found.same_person,
        licence=found.licence,
        source=found.weights,
    )
    return TorchModel(load_dlib_net(), fed, layout, replace(written, input=_spelt_out(layout, fed)))


def _from_file(path: Path) -> TorchModel:
    from facepipe.models.projection import read_projection
    from facepipe.models.zoo.loading import fingerprint_without_projection, load_card, load_net

    load_card(path)  # checks the weights' SHA-256
    net, file = load_net(path)
    if file.role != "embedder":
        raise ModelError(f"{path}: {file.name} is a {file.role}; embedders are exported")
    matrix = (
        read_projection(path.parent / file.projection, file.dim, fingerprint_without_projection(path, file))
        if file.projection
        else None
    )
    layout, fed = resolve_chip_layout(file), resolve_input(file)
    written = replace(file, projection="", keys="", input=_spelt_out(layout, fed))
    return TorchModel(net, fed, layout, written, matrix)


def _spelt_out(layout: ChipLayout, fed: Input) -> InputConfig:
    channels: Any = fed.channels
    template = layout.template or None
    fill = None if layout.kind in ("similarity", "dlib") else layout.fill
    return InputConfig(layout.size, channels, fed.mean, fed.scale, layout.kind, template, fill)


def build_onnx_graph(found: TorchModel, opset: int = OPSET) -> bytes:
    """The ONNX graph. Raises ModelError without onnxscript, and where torch cannot write the net."""
    import torch

    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError("writing ONNX graphs needs onnxscript: pip install 'facepipe[export]'") from error
    width, height = found.layout.size
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    with _quiet(), torch.inference_mode():
        try:
            made: Any = torch.onnx.export(
                _whole(found),
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
            first = str(error).strip().splitlines()[0]
            raise ModelError(f"torch cannot write {found.card.name} as an ONNX graph: {first}") from error
    data: bytes = made.model_proto.SerializeToString()
    return data


def _whole(found: TorchModel) -> "nn.Module":
    """From uint8 chips to vectors, as one module."""
    import torch
    from torch import Tensor, nn

    from facepipe.models.embedders.prelu import replace_prelus

    class Whole(nn.Module):
        mean: Tensor
        scale: Tensor
        projection: Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.net = replace_prelus(found.net).eval()
            for name, values in (("mean", found.fed.mean), ("scale", found.fed.scale)):
                self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
            self.register_buffer("projection", None if found.projection is None else torch.tensor(found.projection))

        def forward(self, chips: Tensor) -> Tensor:
            x = chips.permute(0, 3, 1, 2).float()
            x = x.flip(1) if found.fed.channels == "bgr" else x
            vectors: Tensor = self.net((x - self.mean) / self.scale)
            return vectors if self.projection is None else vectors @ self.projection

    return Whole().eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns of its own deprecated calls, and of packages that it could do more with."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
