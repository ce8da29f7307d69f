"""Tensor names of public checkpoints, renamed to those of our networks: one function per lineage.

Names that a function does not know stay, so that `facepipe.models.checkpoint.load_state` can list them as left over.
"""

from facepipe.models.checkpoint import State
from facepipe.models.embedders import facenet_mobilenet, iresnet, mobilefacenet

Names = dict[str, str]  # name of a module in the checkpoint -> in our network

_BOTTLENECKS = sum(units for _, _, units, _ in mobilefacenet.BOTTLENECKS)
# Stage and number of each unit of the deepest IResNet; other depths have fewer.
_IRESNET_UNITS = [(stage, unit) for stage, units in enumerate(iresnet.UNITS[100]) for unit in range(units)]
_MXNET_LEAVES = {
    "weight": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}


def rename_xiaoccer_mobilefacenet(state: State) -> State:
    """Rename MobileFaceNet_Pytorch by Xiaoccer (core/model.py).

    Its chips are 112x96 (h x w), (x - 127.5) / 128, RGB.
    """
    # The layers of a block in the checkpoint's order, which numbers them from 0 on.
    layers = [f"{part}.{leaf}" for part in ("expand", "depthwise", "project") for leaf in ("conv", "bn", "act")]
    names = _add_parts("prelu", {"conv1": "stem", "dw_conv1": "stem_depthwise", "conv2": "expand"})
    names |= _add_parts("prelu", {"linear7": "global_depthwise", "linear1": "linear"})
    for block in range(_BOTTLENECKS):
        names |= {f"blocks.{block}.conv.{n}": f"blocks.{block}.{layer}" for n, layer in enumerate(layers)}
    return _rename_modules(state, names)


# (number, units after the first) of each strided bottleneck's row.
_TREB1EN_ROWS = ((2, 4), (3, 6), (4, 2))


def rename_treb1en_mobilefacenet(state: State) -> State:
    """Rename MobileFaceNet of InsightFace_Pytorch by TreB1eN (model.py).

    Its chips are 112x112. Its linear layer is our 1x1 convolution.
    """
    names = _add_parts("prelu", {"conv1": "stem", "conv2_dw": "stem_depthwise"})
    names |= _add_parts("prelu", {"conv_6_sep": "expand", "conv_6_dw": "global_depthwise"})
    # A row is a strided block and a model of further units; ours are numbered through.
    blocks = []
    for row, units in _TREB1EN_ROWS:
        blocks.append(f"conv_{row}{row + 1}")
        blocks += [f"conv_{row + 1}.model.{unit}" for unit in range(units)]
    for n, block in enumerate(blocks):
        parts = {"conv": "expand", "conv_dw": "depthwise", "project": "project"}
        names |= _add_parts("prelu", {f"{block}.{theirs}": f"blocks.{n}.{ours}" for theirs, ours in parts.items()})
    renamed = _rename_modules(state, names | {"linear": "linear.conv", "bn": "linear.bn"})
    weight = renamed.get("linear.conv.weight")
    if weight is not None:
        # A linear weight (o, i) becomes a kernel (o, i, 1, 1).
        renamed["linear.conv.weight"] = weight.reshape(*weight.shape[:2], 1, 1)
    return renamed


def rename_arcface_torch_iresnet(state: State) -> State:
    """Rename insightface's arcface_torch (backbones/iresnet.py); IResNet with eps 1e-5."""
    names = {
        "conv1": "stem.conv",
        "bn1": "stem.bn",
        "prelu": "stem.act",
        "bn2": "bn",
        "fc": "linear",
        "features": "last_bn",
    }
    unit_names = {
        "bn1": "bn",
        "conv1": "conv1.conv",
        "bn2": "conv1.bn",
        "prelu": "conv1.act",
        "conv2": "conv2.conv",
        "bn3": "conv2.bn",
        "downsample.0": "shortcut.conv",
        "downsample.1": "shortcut.bn",
    }
    for stage, unit in _IRESNET_UNITS:
        prefix = f"layer{stage + 1}.{unit}."
        names |= {prefix + theirs: f"stages.{stage}.{unit}.{ours}" for theirs, ours in unit_names.items()}
    return _rename_modules(state, names)


def rename_mxnet_iresnet(state: State) -> State:
    """Rename insightface's LResNet*E-IR of MXNet (symbol/fresnet.py); IResNet with eps 2e-5.

    Names come without `arg:` and `aux:`. The last scale is 1 there whatever the file holds (`fix_gamma`), so it is 1
    here.
    """
    names = {
        "conv0": "stem.conv",
        "bn0": "stem.bn",
        "relu0": "stem.act",
        "bn1": "bn",
        "pre_fc1": "linear",
        "fc1": "last_bn",
    }
    unit_names = {
        "bn1": "bn",
        "conv1": "conv1.conv",
        "bn2": "conv1.bn",
        "relu1": "conv1.act",
        "conv2": "conv2.conv",
        "bn3": "conv2.bn",
        "conv1sc": "shortcut.conv",
        "sc": "shortcut.bn",
    }
    for stage, unit in _IRESNET_UNITS:
        prefix = f"stage{stage + 1}_unit{unit + 1}_"
        names |= {prefix + theirs: f"stages.{stage}.{unit}.{ours}" for theirs, ours in unit_names.items()}
    renamed = _rename_modules({_split_leaf(name): tensor for name, tensor in state.items()}, names)
    scale = renamed.get("last_bn.weight")
    if scale is not None:
        renamed["last_bn.weight"] = scale.new_ones(scale.shape)
    return renamed


def rename_facenet_pytorch_inception(state: State) -> State:
    """Rename facenet-pytorch (models/inception_resnet_v1.py), without its classifier.

    Its chips are (x - 127.5) / 128, RGB.
    """
    return _drop_module("logits", state)


def rename_bubbliiiing_inception(state: State) -> State:
    """Rename bubbliiiing's facenet-pytorch (nets/facenet.py), backbone inception_resnetv1.

    Its chips are x / 255, RGB.
    """
    kept = _drop_module("classifier", state)
    trunk = {name.removeprefix("backbone.model."): tensor for name, tensor in kept.items()}
    return _rename_modules(trunk, {"Bottleneck": "last_linear"})


def rename_bubbliiiing_mobilenet(state: State) -> State:
    """Rename bubbliiiing's facenet-pytorch (nets/facenet.py), backbone mobilenet.

    Its chips are x / 255, RGB.
    """
    names = {
        "backbone.model.stage1.0.0": "stem.conv",
        "backbone.model.stage1.0.1": "stem.bn",
        "Bottleneck": "linear",
    }
    # Positions in the checkpoint's blocks; 2 and 5 are activations without tensors.
    layers = {0: "depthwise.conv", 1: "depthwise.bn", 3: "pointwise.conv", 4: "pointwise.bn"}
    their_blocks = [f"stage1.{n}" for n in range(1, 6)] + [f"stage2.{n}" for n in range(6)] + ["stage3.0", "stage3.1"]
    our_blocks = range(len(facenet_mobilenet.BLOCKS))
    for ours, theirs in zip(our_blocks, their_blocks, strict=True):
        names |= {f"backbone.model.{theirs}.{n}": f"blocks.{ours}.{layer}" for n, layer in layers.items()}
    return _rename_modules(_drop_module("classifier", state), names)


def rename_torchvision_resnet(state: State) -> State:
    """Rename torchvision's and timm's ResNet-18 and ResNet-50, without their classifier.

    What is left is a trunk without an embedding layer.
    """
    return _drop_module("fc", state)


def _rename_modules(state: State, names: Names) -> State:
    renamed = {}
    for name, tensor in state.items():
        module, dot, leaf = name.rpartition(".")
        renamed[f"{names.get(module, module)}{dot}{leaf}"] = tensor
    return renamed


def _add_parts(activation: str, names: Names) -> Names:
    """Extend names of convolution, batch norm and activation together to the names of the three parts.

    Args:
        activation: What the checkpoint calls the activation.
        names: Names of the whole.
    """
    parts = {"conv": "conv", "bn": "bn", activation: "act"}
    return {
        f"{theirs}.{their_part}": f"{ours}.{our_part}"
        for theirs, ours in names.items()
        for their_part, our_part in parts.items()
    }


def _drop_module(module: str, state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{module}.")}


def _split_leaf(name: str) -> str:
    """Rename `stage1_unit1_bn1_moving_mean` to `stage1_unit1_bn1.running_mean`."""
    leaf = next((leaf for leaf in _MXNET_LEAVES if name.endswith(f"_{leaf}")), None)
    return name if leaf is None else f"{name.removesuffix(f'_{leaf}')}.{_MXNET_LEAVES[leaf]}"
