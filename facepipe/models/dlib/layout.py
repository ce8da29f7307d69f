"""The shape of dlib's face network and its weights in the order they run, without any framework."""

from typing import NamedTuple

from facepipe.models.dlib.format import FormatError, Layer
from facepipe.types import Float32

SIDE = 150
MEAN_RGB = (122.782, 117.001, 104.298)
SCALE = 256.0
# (channels in, channels out, stride) of each block, from the input to the output
BLOCKS = (
    *[(32, 32, 1)] * 3,
    (32, 64, 2),
    *[(64, 64, 1)] * 3,
    (64, 128, 2),
    *[(128, 128, 1)] * 2,
    (128, 256, 2),
    *[(256, 256, 1)] * 2,
    (256, 256, 2),
)


class Convolution(NamedTuple):
    """Weights (out, in, k, k) and bias (out,) with the affine layer folded in, stride and padding."""

    weight: Float32
    bias: Float32
    stride: int
    padding: int


def fold_layers(layers: list[Layer]) -> tuple[list[Convolution], Float32]:
    """(29 convolutions in the order they run, fully connected matrix (256, 128)) of the file's layers."""
    plan = [(3, 32, 7, 2, 0)]
    for i, o, stride in BLOCKS:
        plan += [(i, o, 3, stride, 0 if stride == 2 else 1), (o, o, 3, 1, 1)]
    if [layer.kind for layer in layers] != ["con", "affine"] * len(plan) + ["fc"]:
        raise FormatError("the file's layers are not those of dlib's face network")
    convolutions = [_fold(*step, layers[2 * n], layers[2 * n + 1]) for n, step in enumerate(plan)]
    return convolutions, layers[-1].params.reshape(256, 128)


def _fold(i: int, o: int, k: int, stride: int, padding: int, con: Layer, affine: Layer) -> Convolution:
    if con.sizes != (o, k, k, stride, stride, padding, padding):
        raise FormatError(f"convolution of sizes {con.sizes}, expected {o} filters {k}x{k} stride {stride}")
    weight, bias = con.params[:-o].reshape(o, i, k, k), con.params[-o:]
    gamma, beta = affine.params[:o], affine.params[o:]
    return Convolution(weight * gamma[:, None, None, None], bias * gamma + beta, stride, padding)
