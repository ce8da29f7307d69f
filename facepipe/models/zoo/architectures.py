"""The networks of the zoo, without weights: how each is built and what it takes. A model's TOML file names one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from facepipe.errors import ModelError
from facepipe.imaging.alignment import ChipLayout, scale_arcface_template
from facepipe.models.runtime.preprocess import Input

if TYPE_CHECKING:
    from torch import nn

    from facepipe.models.checkpoint import State

Size = tuple[int, int]


@dataclass(frozen=True)
class Lineage:
    """Checkpoints of one public implementation. mark: a tensor's name that only they have; where their key map is.

    input: what they were trained on, where that is not the architecture's
    """

    name: str
    mark: str
    module: str
    function: str
    input: Input | None = None


@dataclass(frozen=True)
class Architecture:
    """One network.

    build: (dimension of the vectors, (width, height)) -> the module with random weights; detectors ignore both
    lineages: the key maps of public checkpoints
    square: of a detector, as in its `Card`
    """

    name: str
    role: str
    summary: str
    build: Callable[[int, Size], "nn.Module"]
    input: Input = field(default_factory=Input)
    layout: ChipLayout = field(
        default_factory=lambda: ChipLayout((112, 112), template=scale_arcface_template((112, 112)))
    )
    lineages: tuple[Lineage, ...] = ()
    square: tuple[float, float, float] | None = None

    def lineage(self, name: str | None) -> Lineage | None:
        """The lineage of that name."""
        return next((lineage for lineage in self.lineages if lineage.name == name), None)

    def key_maps(self) -> dict[str, Callable[["State"], "State"]]:
        """By name, each from a public checkpoint's names to ours."""
        return {lineage.name: _module(lineage.module, lineage.function) for lineage in self.lineages}

    def lineage_of(self, state: "State") -> str | None:
        """The lineage whose mark is among a checkpoint's names; None for our own."""
        return next((lineage.name for lineage in self.lineages if lineage.mark in state), None)


def _module(path: str, name: str) -> Any:
    from importlib import import_module

    return getattr(import_module(f"facepipe.models.{path}"), name)


# Mean positions of RetinaFace's five points in dlib's own 150x150 chips, measured on LFW.
DLIB_TEMPLATE = ((46.54, 43.32), (101.94, 43.67), (74.14, 77.59), (50.28, 102.77), (96.35, 103.30))
_DLIB_MEAN = (122.782, 117.001, 104.298)
_ZERO = (0.0, 0.0, 0.0)
_IMAGENET = Input(mean=(123.675, 116.28, 103.53), scale=(58.395, 57.12, 57.375))
_LETTERBOX = ChipLayout((160, 160), "eyes", fill=128)


def _arcface(size: Size) -> ChipLayout:
    return ChipLayout(size, template=scale_arcface_template(size))


def _embedder(path: str, name: str, sized: bool = False, **fixed: Any) -> Callable[[int, Size], "nn.Module"]:
    """Builds an embedder of the module `path` lazily, so that listing the zoo loads no framework."""

    def build(dim: int, size: Size) -> "nn.Module":
        made: nn.Module = _module(path, name)(dim=dim, **({"size": size} if sized else {}), **fixed)
        return made

    return build


def _detector(path: str, name: str, **fixed: Any) -> Callable[[int, Size], "nn.Module"]:
    def build(dim: int, size: Size) -> "nn.Module":
        made: nn.Module = _module(path, name)(**fixed)
        return made

    return build


def _graph(dim: int, size: Size) -> "nn.Module":
    raise ModelError("this model is an ONNX graph: it is run as it is, and has no torch module")


RETINAFACE_SQUARE = (0.0, 0.072, 0.989)  # measured on LFW, tests/bench/dlib_exact.py
_KEYS = "embedders.keys"
_BUBBLIIIING_MARK = "backbone.model.conv2d_1a.conv.weight"
_BIUBUG6 = (Lineage("biubug6", "ClassHead.0.conv1x1.weight", "detectors.retinaface_keys", "rename_biubug6_keys"),)

ARCHITECTURES = {
    made.name: made
    for made in (
        Architecture(
            name="dlib-resnet",
            role="embedder",
            summary="dlib's face recognition ResNet (King, 2017)",
            build=_embedder("dlib.resnet", "DlibResNet"),
            input=Input(mean=_DLIB_MEAN, scale=(256.0, 256.0, 256.0)),
            layout=ChipLayout((150, 150), template=DLIB_TEMPLATE),
        ),
        Architecture(
            name="mobilefacenet",
            role="embedder",
            summary="MobileFaceNet, 112x96 or any multiple of 16 (Chen et al., CCBR 2018)",
            build=_embedder("embedders.mobilefacenet", "MobileFaceNet", sized=True),
            input=Input(scale=(128.0, 128.0, 128.0)),
            layout=_arcface((96, 112)),
            lineages=(
                Lineage("xiaoccer", "dw_conv1.conv.weight", _KEYS, "mobilefacenet_xiaoccer"),
                # Its faces are read as BGR, and (x / 255 - 0.5) / 0.5.
                Lineage("treb1en", "conv2_dw.conv.weight", _KEYS, "mobilefacenet_treb1en", Input("bgr")),
            ),
        ),
        Architecture(
            name="lresnet50e-ir",
            role="embedder",
            summary="LResNet50E-IR (Deng et al., ArcFace, CVPR 2019)",
            build=_embedder("embedders.iresnet", "IResNet", sized=True, depth=50),
            input=Input(scale=(128.0, 128.0, 128.0)),
            layout=_arcface((112, 112)),
            lineages=(Lineage("mxnet", "pre_fc1_weight", _KEYS, "iresnet_mxnet"),),
        ),
        *(
            Architecture(
                name=f"iresnet{depth}",
                role="embedder",
                summary=f"IResNet-{depth} of insightface's arcface_torch: LResNet{depth}E-IR in torch's epsilon",
                build=_embedder("embedders.iresnet", "IResNet", sized=True, depth=depth, eps=1e-5),
                layout=_arcface((112, 112)),
                lineages=(Lineage("arcface-torch", "features.weight", _KEYS, "iresnet_arcface_torch"),),
            )
            for depth in (18, 34, 50, 100)
        ),
        *(
            Architecture(
                name=f"resnet{depth}",
                role="embedder",
                summary=f"ResNet-{depth}, average pooling, one linear layer (He et al., CVPR 2016)",
                build=_embedder("embedders.resnet", "ResNet", depth=depth),
                input=_IMAGENET,
                layout=_arcface((112, 112)),
            )
            for depth in (18, 50)
        ),
        Architecture(
            name="facenet-mobilenet",
            role="embedder",
            summary="FaceNet on MobileNetV1 (Schroff et al., CVPR 2015; Howard et al., 2017)",
            build=_embedder("embedders.facenet_mobilenet", "FaceNetMobileNet"),
            input=Input(mean=_ZERO, scale=(255.0, 255.0, 255.0)),
            layout=_LETTERBOX,
            lineages=(
                Lineage("bubbliiiing", "backbone.model.stage1.0.0.weight", _KEYS, "facenet_mobilenet_bubbliiiing"),
            ),
        ),
        Architecture(
            name="facenet-inception",
            role="embedder",
            summary="FaceNet on Inception-ResNet-v1 (Schroff et al., CVPR 2015; Szegedy et al., AAAI 2017)",
            build=_embedder("embedders.inception_resnet", "InceptionResNetV1"),
            input=Input(mean=_ZERO, scale=(255.0, 255.0, 255.0)),
            layout=_LETTERBOX,
            lineages=(
                Lineage(
                    *("facenet-pytorch", "logits.weight", _KEYS, "inception_resnet_facenet_pytorch"),
                    input=Input(scale=(128.0, 128.0, 128.0)),
                ),
                Lineage("bubbliiiing", _BUBBLIIIING_MARK, _KEYS, "inception_resnet_bubbliiiing"),
            ),
        ),
        *(
            Architecture(
                name=name,
                role="detector",
                summary=f"RetinaFace, {trunk} (Deng et al., CVPR 2020)",
                build=_detector("detectors.retinaface", "RetinaFaceNet", trunk=key, norms=True),
                input=Input("bgr", (104.0, 117.0, 123.0), (1.0, 1.0, 1.0)),
                lineages=_BIUBUG6,
                square=RETINAFACE_SQUARE,
            )
            for name, trunk, key in (
                ("retinaface-mnet025", "MobileNet-0.25", "mobilenet025"),
                ("retinaface-resnet50", "ResNet-50", "resnet50"),
            )
        ),
        Architecture(
            *("yunet", "detector", "YuNet (Wu et al., MIR 2023), an ONNX file of the user's", _graph),
            input=Input("bgr", _ZERO, (1.0, 1.0, 1.0)),
        ),
        Architecture(
            *("scrfd", "detector", "SCRFD (Guo et al., ICLR 2022), an ONNX file of the user's", _graph),
            input=Input(scale=(128.0, 128.0, 128.0)),
        ),
    )
}
