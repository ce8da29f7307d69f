"""Names of public checkpoints' tensors in our networks: one function a lineage, `state -> state`, nothing is read.

Names that a lineage does not know stay as they are, so that `facepipe.models.checkpoint.load_state` can name them.
"""

from itertools import chain

from facepipe.models.checkpoint import State
from facepipe.models.embedders import facenet_mobilenet, iresnet, mobilefacenet

Names = dict[str, str]  # what a module is called there -> here

_BOTTLENECKS = sum(units for _, _, units, _ in mobilefacenet.BOTTLENECKS)
_UNITS = [(s, u) for s, units in enumerate(iresnet.UNITS[100]) for u in range(units)]  # other depths have fewer
_MXNET_LEAVES = {
    "weight": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}


def mobilefacenet_xiaoccer(state: State) -> State:
    """MobileFaceNet_Pytorch by Xiaoccer (core/model.py); 112x96 (h x w), (x - 127.5) / 128, RGB."""
    layers = [f"{part}.{leaf}" for part in ("expand", "depthwise", "project") for leaf in ("conv", "bn", "act")]
    names = _conv_bn("prelu", {"conv1": "stem", "dw_conv1": "stem_depthwise", "conv2": "expand"})
    names |= _conv_bn("prelu", {"linear7": "global_depthwise", "linear1": "linear"})
    for block in range(_BOTTLENECKS):
        names |= {f"blocks.{block}.conv.{n}": f"blocks.{block}.{layer}" for n, layer in enumerate(layers)}
    return _renamed(state, names)


def mobilefacenet_treb1en(state: State) -> State:
    """MobileFaceNet of InsightFace_Pytorch by TreB1eN (model.py); 112x112. Its linear layer is our 1x1 convolution."""
    rows = ((f"conv_{n}{n + 1}", *(f"conv_{n + 1}.model.{u}" for u in range(units))) for n, units in _TREB1EN_ROWS)
    names = _conv_bn("prelu", {"conv1": "stem", "conv2_dw": "stem_depthwise"})
    names |= _conv_bn("prelu", {"conv_6_sep": "expand", "conv_6_dw": "global_depthwise"})
    for n, block in enumerate(chain(*rows)):
        parts = {"conv": "expand", "conv_dw": "depthwise", "project": "project"}
        names |= _conv_bn("prelu", {f"{block}.{there}": f"blocks.{n}.{here}" for there, here in parts.items()})
    found = _renamed(state, names | {"linear": "linear.conv", "bn": "linear.bn"})
    weight = found.get("linear.conv.weight")
    return found if weight is None else found | {"linear.conv.weight": weight.reshape(*weight.shape[:2], 1, 1)}


_TREB1EN_ROWS = ((2, 4), (3, 6), (4, 2))  # (number, units after the first) of each strided bottleneck's row


def iresnet_arcface_torch(state: State) -> State:
    """insightface's arcface_torch (backbones/iresnet.py); IResNet with eps 1e-5."""
    names = {"conv1": "stem.conv", "bn1": "stem.bn", "prelu": "stem.act"}
    names |= {"bn2": "bn", "fc": "linear", "features": "last_bn"}
    unit = {"bn1": "bn", "conv1": "conv1.conv", "bn2": "conv1.bn", "prelu": "conv1.act"}
    unit |= {"conv2": "conv2.conv", "bn3": "conv2.bn", "downsample.0": "shortcut.conv", "downsample.1": "shortcut.bn"}
    for stage, n in _UNITS:
        names |= {f"layer{stage + 1}.{n}.{there}": f"stages.{stage}.{n}.{here}" for there, here in unit.items()}
    return _renamed(state, names)


def iresnet_mxnet(state: State) -> State:
    """insightface's LResNet*E-IR of MXNet (symbol/fresnet.py), names without `arg:` and `aux:`; IResNet with eps 2e-5.

    The last scale is 1 there whatever the file holds (`fix_gamma`), so it is 1 here.
    """
    names = {"conv0": "stem.conv", "bn0": "stem.bn", "relu0": "stem.act"}
    names |= {"bn1": "bn", "pre_fc1": "linear", "fc1": "last_bn"}
    unit = {"bn1": "bn", "conv1": "conv1.conv", "bn2": "conv1.bn", "relu1": "conv1.act"}
    unit |= {"conv2": "conv2.conv", "bn3": "conv2.bn", "conv1sc": "shortcut.conv", "sc": "shortcut.bn"}
    for stage, n in _UNITS:
        names |= {f"stage{stage + 1}_unit{n + 1}_{there}": f"stages.{stage}.{n}.{here}" for there, here in unit.items()}
    found = _renamed({_dotted(name): tensor for name, tensor in state.items()}, names)
    scale = found.get("last_bn.weight")
    return found if scale is None else found | {"last_bn.weight": scale.new_ones(scale.shape)}


def inception_resnet_facenet_pytorch(state: State) -> State:
    """facenet-pytorch (models/inception_resnet_v1.py); (x - 127.5) / 128, RGB. Its classifier is left out."""
    return _without("logits", state)


def inception_resnet_bubbliiiing(state: State) -> State:
    """bubbliiiing's facenet-pytorch (nets/facenet.py), backbone inception_resnetv1; x / 255, RGB."""
    trunk = {k.removeprefix("backbone.model."): v for k, v in _without("classifier", state).items()}
    return _renamed(trunk, {"Bottleneck": "last_linear"})


def facenet_mobilenet_bubbliiiing(state: State) -> State:
    """bubbliiiing's facenet-pytorch (nets/facenet.py), backbone mobilenet; x / 255, RGB."""
    names = {f"backbone.model.stage1.0.{n}": f"stem.{leaf}" for n, leaf in enumerate(("conv", "bn"))}
    layers = {0: "depthwise.conv", 1: "depthwise.bn", 3: "pointwise.conv", 4: "pointwise.bn"}
    places = [f"stage1.{n}" for n in range(1, 6)] + [f"stage2.{n}" for n in range(6)] + ["stage3.0", "stage3.1"]
    for block, place in zip(range(len(facenet_mobilenet.BLOCKS)), places, strict=True):
        names |= {f"backbone.model.{place}.{n}": f"blocks.{block}.{layer}" for n, layer in layers.items()}
    return _renamed(_without("classifier", state), names | {"Bottleneck": "linear"})


def resnet_torchvision(state: State) -> State:
    """torchvision's and timm's ResNet-18 and ResNet-50 without their classifier: a trunk, no embedding layer."""
    return _without("fc", state)


def _renamed(state: State, names: Names) -> State:
    parts = ((*name.rpartition("."), tensor) for name, tensor in state.items())
    return {f"{names.get(module, module)}{dot}{leaf}": tensor for module, dot, leaf, tensor in parts}


def _conv_bn(activation: str, names: Names) -> Names:
    """The names of the parts of convolution, batch norm and activation, from those of the whole."""
    inner = {"conv": "conv", "bn": "bn", activation: "act"}
    return {f"{there}.{a}": f"{here}.{b}" for there, here in names.items() for a, b in inner.items()}


def _without(module: str, state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{module}.")}


def _dotted(name: str) -> str:
    """`stage1_unit1_bn1_moving_mean` as `stage1_unit1_bn1.running_mean`."""
    leaf = next((leaf for leaf in _MXNET_LEAVES if name.endswith(f"_{leaf}")), None)
    return name if leaf is None else f"{name.removesuffix(f'_{leaf}')}.{_MXNET_LEAVES[leaf]}"
