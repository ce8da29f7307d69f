"""The networks of the zoo, without weights: how each is built, and what it takes. A model's TOML file names one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from facepipe.errors import ModelError
from facepipe.imaging.alignment import ChipLayout, scale_arcface_template
from facepipe.imaging.dlib_chip import BoxToSquare
from facepipe.models.runtime.preprocess import Input

if TYPE_CHECKING:
    from torch import nn

    from facepipe.models.checkpoint import State

Size = tuple[int, int]
Build = Callable[[int, Size], "nn.Module"]


@dataclass(frozen=True)
class Lineage:
    """Checkpoints of one public implementation.

    Attributes:
        name: What a TOML file's `keys` calls it.
        mark: Name of a tensor that only these checkpoints have.
        key_map: The function that renames their tensors to ours, by its path below `facepipe.models`.
        input: What they were trained on, if that is not the architecture's.
    """

    name: str
    mark: str
    key_map: str
    input: Input | None = None


@dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes:
        name: What a TOML file calls it.
        role: "detector" or "embedder".
        summary: One line for lists.
        build: Builds the module with random weights: (length of the vectors, (width, height) of the chips) -> module.
            Detectors ignore both.
        input: Channel order, mean and scale.
        layout: How chips are cut.
        lineages: Public checkpoints that it can load.
        square: For a detector, as in its `Card`.
    """

    name: str
    role: str
    summary: str
    build: Build
    input: Input = field(default_factory=Input)
    layout: ChipLayout = field(
        default_factory=lambda: ChipLayout((112, 112), template=scale_arcface_template((112, 112)))
    )
    lineages: tuple[Lineage, ...] = ()
    square: BoxToSquare | None = None

    def find_lineage(self, name: str) -> Lineage | None:
        """Find the lineage of that name."""
        return next((lineage for lineage in self.lineages if lineage.name == name), None)

    def detect_lineage(self, state: "State") -> Lineage | None:
        """Detect the lineage of a checkpoint from its tensor names; None for our own names."""
        return next((lineage for lineage in self.lineages if lineage.mark in state), None)

    def load_key_maps(self) -> dict[str, Callable[["State"], "State"]]:
        """Load the key maps by lineage, each from a public checkpoint's names to ours."""
        return {lineage.name: _import(lineage.key_map) for lineage in self.lineages}


def _import(path: str) -> Any:
    """Import `module.name` from below `facepipe.models`."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"facepipe.models.{module}"), name)


def _build_embedder(path: str, **options: Any) -> Build:
    """Return a function that builds an embedder. It imports the module when called: listing the zoo loads no framework.

    Args:
        path: The class, below `facepipe.models`.
        options: Further arguments of the class.
    """

    def build(dim: int, size: Size) -> "nn.Module":
        net: nn.Module = _import(path)(dim=dim, **options)
        return net

    return build


def _build_sized_embedder(path: str, **options: Any) -> Build:
    """Return a function that builds an embedder for chips of one size; see `_build_embedder`."""

    def build(dim: int, size: Size) -> "nn.Module":
        net: nn.Module = _import(path)(dim=dim, size=size, **options)
        return net

    return build


def _build_detector(path: str, **options: Any) -> Build:
    """Return a function that builds a detector; see `_build_embedder`."""

    def build(dim: int, size: Size) -> "nn.Module":
        net: nn.Module = _import(path)(**options)
        return net

    return build


def _refuse_onnx(dim: int, size: Size) -> "nn.Module":
    raise ModelError("this model is an ONNX graph, which runs unchanged: it has no torch module")


def _make_arcface_layout(size: Size) -> ChipLayout:
    return ChipLayout(size, template=scale_arcface_template(size))


# Mean positions of RetinaFace's five points in dlib's own 150x150 chips, measured on LFW.
DLIB_TEMPLATE = ((46.54, 43.32), (101.94, 43.67), (74.14, 77.59), (50.28, 102.77), (96.35, 103.30))
RETINAFACE_SQUARE = (0.0, 0.072, 0.989)  # measured on LFW, tests/bench/dlib_exact.py

_ZERO = (0.0, 0.0, 0.0)
_ONE = (1.0, 1.0, 1.0)
_SCALE_128 = (128.0, 128.0, 128.0)
_SCALE_255 = (255.0, 255.0, 255.0)
_LETTERBOX = ChipLayout((160, 160), "eyes", fill=128)


def _describe_iresnet(depth: int) -> Architecture:
    return Architecture(
        name=f"iresnet{depth}",
        role="embedder",
        summary=f"IResNet-{depth} of insightface's arcface_torch: LResNet{depth}E-IR in torch's epsilon",
        build=_build_sized_embedder("embedders.iresnet.IResNet", depth=depth, eps=1e-5),
        layout=_make_arcface_layout((112, 112)),
        lineages=(Lineage("arcface-torch", "features.weight", "embedders.keys.rename_arcface_torch_iresnet"),),
    )


def _describe_resnet(depth: int) -> Architecture:
    return Architecture(
        name=f"resnet{depth}",
        role="embedder",
        summary=f"ResNet-{depth}, average pooling, one linear layer (He et al., CVPR 2016)",
        build=_build_embedder("embedders.resnet.ResNet", depth=depth),
        input=Input(mean=(123.675, 116.28, 103.53), scale=(58.395, 57.12, 57.375)),
        layout=_make_arcface_layout((112, 112)),
        # Of ImageNet: a trunk, with a classifier instead of the embedding layer.
        lineages=(Lineage("torchvision", "fc.weight", "embedders.keys.rename_torchvision_resnet"),),
    )


def _describe_retinaface(name: str, trunk_name: str, trunk: str) -> Architecture:
    return Architecture(
        name=name,
        role="detector",
        summary=f"RetinaFace, {trunk_name} (Deng et al., CVPR 2020)",
        build=_build_detector("detectors.retinaface.RetinaFaceNet", trunk=trunk, norms=True),
        input=Input("bgr", (104.0, 117.0, 123.0), _ONE),
        lineages=(Lineage("biubug6", "ClassHead.0.conv1x1.weight", "detectors.retinaface_keys.rename_biubug6_keys"),),
        square=RETINAFACE_SQUARE,
    )


_ALL = (
    Architecture(
        name="dlib-resnet",
        role="embedder",
        summary="dlib's face recognition ResNet (King, 2017)",
        build=_build_embedder("dlib.resnet.DlibResNet"),
        input=Input(mean=(122.782, 117.001, 104.298), scale=(256.0, 256.0, 256.0)),
        layout=ChipLayout((150, 150), template=DLIB_TEMPLATE),
    ),
    Architecture(
        name="mobilefacenet",
        role="embedder",
        summary="MobileFaceNet, 112x96 or any multiple of 16 (Chen et al., CCBR 2018)",
        build=_build_sized_embedder("embedders.mobilefacenet.MobileFaceNet"),
        input=Input(scale=_SCALE_128),
        layout=_make_arcface_layout((96, 112)),
        lineages=(
            Lineage("xiaoccer", "dw_conv1.conv.weight", "embedders.keys.rename_xiaoccer_mobilefacenet"),
            # Its faces are read as BGR, and (x / 255 - 0.5) / 0.5.
            Lineage("treb1en", "conv2_dw.conv.weight", "embedders.keys.rename_treb1en_mobilefacenet", Input("bgr")),
        ),
    ),
    Architecture(
        name="lresnet50e-ir",
        role="embedder",
        summary="LResNet50E-IR (Deng et al., ArcFace, CVPR 2019)",
        build=_build_sized_embedder("embedders.iresnet.IResNet", depth=50),
        input=Input(scale=_SCALE_128),
        layout=_make_arcface_layout((112, 112)),
        lineages=(Lineage("mxnet", "pre_fc1_weight", "embedders.keys.rename_mxnet_iresnet"),),
    ),
    _describe_iresnet(18),
    _describe_iresnet(34),
    _describe_iresnet(50),
    _describe_iresnet(100),
    _describe_resnet(18),
    _describe_resnet(50),
    Architecture(
        name="facenet-mobilenet",
        role="embedder",
        summary="FaceNet on MobileNetV1 (Schroff et al., CVPR 2015; Howard et al., 2017)",
        build=_build_embedder("embedders.facenet_mobilenet.FaceNetMobileNet"),
        input=Input(mean=_ZERO, scale=_SCALE_255),
        layout=_LETTERBOX,
        lineages=(
            Lineage(
                name="bubbliiiing",
                mark="backbone.model.stage1.0.0.weight",
                key_map="embedders.keys.rename_bubbliiiing_mobilenet",
            ),
        ),
    ),
    Architecture(
        name="facenet-inception",
        role="embedder",
        summary="FaceNet on Inception-ResNet-v1 (Schroff et al., CVPR 2015; Szegedy et al., AAAI 2017)",
        build=_build_embedder("embedders.inception_resnet.InceptionResNetV1"),
        input=Input(mean=_ZERO, scale=_SCALE_255),
        layout=_LETTERBOX,
        lineages=(
            Lineage(
                name="facenet-pytorch",
                mark="logits.weight",
                key_map="embedders.keys.rename_facenet_pytorch_inception",
                input=Input(scale=_SCALE_128),
            ),
            Lineage(
                name="bubbliiiing",
                mark="backbone.model.conv2d_1a.conv.weight",
                key_map="embedders.keys.rename_bubbliiiing_inception",
            ),
        ),
    ),
    _describe_retinaface("retinaface-mnet025", "MobileNet-0.25", "mobilenet025"),
    _describe_retinaface("retinaface-resnet50", "ResNet-50", "resnet50"),
    Architecture(
        name="yunet",
        role="detector",
        summary="YuNet (Wu et al., MIR 2023), an ONNX file of the user's",
        build=_refuse_onnx,
        input=Input("bgr", _ZERO, _ONE),
    ),
    Architecture(
        name="scrfd",
        role="detector",
        summary="SCRFD (Guo et al., ICLR 2022), an ONNX file of the user's",
        build=_refuse_onnx,
        input=Input(scale=_SCALE_128),
    ),
)

ARCHITECTURES = {architecture.name: architecture for architecture in _ALL}
