"""dlib's serialisation format, as far as the face recognition network uses it (dlib/serialize.h, dnn/core.h, layers.h).

The network is stored from the input layer outwards; every layer's parameters are one tensor. Reading walks the file
to its last byte, so that a file of another layout is refused and not misread.
"""

from typing import NamedTuple

import numpy as np

from facepipe.types import Float32


class Layer(NamedTuple):
    """One layer with parameters: kind is "con", "affine" or "fc"; `sizes` holds the integers stored with it."""

    kind: str
    params: Float32
    sizes: tuple[int, ...]


class FormatError(ValueError):
    """The bytes are not a network of the layout that this reader knows."""


class Reader:
    """A cursor over serialised bytes."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def integer(self) -> int:
        """Control byte (bit 7: negative, low bits: number of bytes), then the magnitude, little-endian."""
        control = self._take(1)[0]
        size = control & 0x0F
        if control & 0x70 or not 1 <= size <= 8:
            raise FormatError(f"no integer at byte {self.at - 1}")
        value = int.from_bytes(self._take(size), "little")
        return -value if control & 0x80 else value

    def integers(self, n: int) -> tuple[int, ...]:
        return tuple(self.integer() for _ in range(n))

    def string(self) -> str:
        return self._take(self.integer()).decode("latin-1")

    def booleans(self, n: int) -> None:
        if set(self._take(n)) - set(b"01"):
            raise FormatError(f"no boolean before byte {self.at}")

    def real(self) -> float:
        """A float is mantissa and exponent of two."""
        mantissa, exponent = self.integers(2)
        return mantissa * 2.0**exponent

    def tensor(self) -> Float32:
        version, *shape = self.integers(5)
        if version != 2 or min(shape) < 0:
            raise FormatError(f"no tensor before byte {self.at}")
        count = int(np.prod(shape))
        return np.frombuffer(self._take(4 * count), "<f4").astype(np.float32)

    def alias(self) -> None:
        if self.integers(5)[0] != 1:
            raise FormatError(f"no alias tensor before byte {self.at}")

    def _take(self, n: int) -> bytes:
        part = self.data[self.at : self.at + n]
        if len(part) != n:
            raise FormatError("the file ends early")
        self.at += n
        return part


_INNERMOST = 3  # version of the layer that sits on the input; add layers have 2, tags and skips 1


def read_metric_network(data: bytes) -> list[Layer]:
    """Layers with parameters, from the input to the output, of a loss_metric network."""
    reader = Reader(data)
    _expect(reader.integer() == 1 and reader.string() == "loss_metric_2", "loss_metric at the start")
    reader.real()
    reader.real()
    versions = [reader.integer()]
    while versions[-1] != _INNERMOST:
        versions.append(reader.integer())
        _expect(versions[-1] in (1, 2, _INNERMOST), f"layer version {versions[-1]}")
    _expect(reader.string() == "input_rgb_image_sized", "input layer")
    for _ in range(3):
        reader.real()
    reader.integers(2)
    layers = [_layer(reader, version) for version in reversed(versions) if version != 1]
    _expect(reader.at == len(data), f"end of file, {len(data) - reader.at} bytes are left over")
    return [layer for layer in layers if layer is not None]


def _layer(reader: Reader, version: int) -> Layer | None:
    """One add_layer: the layer's details, three flags, three tensors that are empty in a cleaned network."""
    layer = _details(reader)
    reader.booleans(3)
    for _ in range(3):
        reader.tensor()
    if version == _INNERMOST:
        reader.integer()
    return layer


def _details(reader: Reader) -> Layer | None:
    match reader.string():
        case "con_4":
            layer = Layer("con", reader.tensor(), reader.integers(7))
            reader.alias()
            reader.alias()
            _rates(reader)
            return layer
        case "affine_":
            layer = Layer("affine", reader.tensor(), ())
            reader.alias()
            reader.alias()
            _expect(reader.integer() == 0, "affine layer in convolution mode")
            return layer
        case "fc_2":
            sizes = reader.integers(2)
            layer = Layer("fc", reader.tensor(), sizes)
            reader.alias()
            reader.alias()
            _expect(reader.integer() == 1, "fully connected layer without bias")
            _rates(reader)
            return layer
        case "max_pool_2" | "avg_pool_2":
            reader.integers(6)
        case "relu_" | "add_prev_":
            pass
        case other:
            raise FormatError(f"unknown layer {other!r}")
    return None


def _rates(reader: Reader) -> None:
    """Learning rate and weight decay multipliers of weights and biases."""
    for _ in range(4):
        reader.real()


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise FormatError(f"not a dlib face network: expected {what}")
