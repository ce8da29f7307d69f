"""The shape of dlib's face network and its weights in the order they run, without any framework."""

from typing import NamedTuple

from facepipe.imaging.dlib_chip import SIDE as SIDE
from facepipe.models.dlib.format import FormatError, Layer
from facepipe.types import Float32

# Levels enter the network as (level - MEAN_RGB) / SCALE.
MEAN_RGB = (122.782, 117.001, 104.298)
SCALE = 256.0
# (channels in, channels out, stride) of each block, from the input to the output.
BLOCKS = (
    (32, 32, 1),
    (32, 32, 1),
    (32, 32, 1),
    (32, 64, 2),
    (64, 64, 1),
    (64, 64, 1),
    (64, 64, 1),
    (64, 128, 2),
    (128, 128, 1),
    (128, 128, 1),
    (128, 256, 2),
    (256, 256, 1),
    (256, 256, 1),
    (256, 256, 2),
)


class Convolution(NamedTuple):
    """A convolution with the affine layer after it folded in.

    Attributes:
        weight: (out, in, k, k).
        bias: (out,).
        stride: Step both ways.
        padding: Zeros on each side.
    """

    weight: Float32
    bias: Float32
    stride: int
    padding: int


class _ConvolutionShape(NamedTuple):
    i: int
    o: int
    kernel: int
    stride: int
    padding: int


def fold_layers(layers: list[Layer]) -> tuple[list[Convolution], Float32]:
    """Fold the layers of the file into what runs.

    Returns:
        The 29 convolutions in the order they run, and the fully connected matrix (256, 128).

    Raises:
        FormatError: The layers are not those of dlib's face network.
    """
    # The stem, then two 3x3 convolutions per block; a strided one has no padding.
    shapes = [_ConvolutionShape(3, 32, 7, 2, 0)]
    for i, o, stride in BLOCKS:
        shapes.append(_ConvolutionShape(i, o, 3, stride, 0 if stride == 2 else 1))
        shapes.append(_ConvolutionShape(o, o, 3, 1, 1))
    if [layer.kind for layer in layers] != ["con", "affine"] * len(shapes) + ["fc"]:
        raise FormatError("the file's layers are not those of dlib's face network")
    convolutions = [_fold(shape, layers[2 * n], layers[2 * n + 1]) for n, shape in enumerate(shapes)]
    return convolutions, layers[-1].params.reshape(256, 128)


def _fold(shape: _ConvolutionShape, con: Layer, affine: Layer) -> Convolution:
    i, o, k, stride, padding = shape
    if con.sizes != (o, k, k, stride, stride, padding, padding):
        raise FormatError(f"convolution of sizes {con.sizes}, expected {o} filters {k}x{k} stride {stride}")
    # Filters come first in the tensor, biases last; likewise factors and offsets of the affine layer.
    weight = con.params[:-o].reshape(o, i, k, k)
    bias = con.params[-o:]
    gamma = affine.params[:o]
    beta = affine.params[o:]
    return Convolution(weight * gamma[:, None, None, None], bias * gamma + beta, stride, padding)
