"""dlib's serialisation format, as far as its face recognition network uses it.

See dlib/serialize.h, dnn/core.h and layers.h. The network is stored from the input layer outwards, and every layer's
parameters are one tensor. Reading goes to the last byte of the file, so that a file of another layout is refused and
not misread.
"""

from typing import NamedTuple

import numpy as np

from facepipe.types import Float32


class Layer(NamedTuple):
    """One layer with parameters.

    Attributes:
        kind: "con", "affine" or "fc".
        params: All parameters in one row.
        sizes: The integers stored with the layer.
    """

    kind: str
    params: Float32
    sizes: tuple[int, ...]


class FormatError(ValueError):
    """The bytes are not a network of the layout that this reader knows."""


class Reader:
    """A cursor over serialised bytes. What it reads raises FormatError if the bytes are something else.

    Attributes:
        data: All bytes.
        offset: The next byte.
    """

    def __init__(self, data: bytes):
        self.data = data
        self.offset = 0

    def read_integer(self) -> int:
        """Read a control byte (bit 7: negative, low bits: number of bytes) and the magnitude, little-endian."""
        control = self._read_bytes(1)[0]
        size = control & 0x0F
        if control & 0x70 or not 1 <= size <= 8:
            raise FormatError(f"no integer at byte {self.offset - 1}")
        value = int.from_bytes(self._read_bytes(size), "little")
        return -value if control & 0x80 else value

    def read_integers(self, n: int) -> tuple[int, ...]:
        """Read n integers."""
        return tuple(self.read_integer() for _ in range(n))

    def read_string(self) -> str:
        """Read a string with its length before it."""
        return self._read_bytes(self.read_integer()).decode("latin-1")

    def skip_booleans(self, n: int) -> None:
        """Skip n booleans."""
        if set(self._read_bytes(n)) - set(b"01"):
            raise FormatError(f"no boolean before byte {self.offset}")

    def read_float(self) -> float:
        """Read a float, which is a mantissa and an exponent of two."""
        mantissa, exponent = self.read_integers(2)
        return mantissa * 2.0**exponent

    def read_tensor(self) -> Float32:
        """Read a tensor of any shape, in one row."""
        version, *shape = self.read_integers(5)
        if version != 2 or min(shape) < 0:
            raise FormatError(f"no tensor before byte {self.offset}")
        count = int(np.prod(shape))
        return np.frombuffer(self._read_bytes(4 * count), "<f4").astype(np.float32)

    def skip_alias(self) -> None:
        """Skip an alias of a tensor."""
        if self.read_integers(5)[0] != 1:
            raise FormatError(f"no alias tensor before byte {self.offset}")

    def _read_bytes(self, n: int) -> bytes:
        part = self.data[self.offset : self.offset + n]
        if len(part) != n:
            raise FormatError("the file ends early")
        self.offset += n
        return part


_INNERMOST = 3  # version of the layer on the input; add layers have 2, tags and skips 1


def read_metric_network(data: bytes) -> list[Layer]:
    """Read the layers with parameters of a loss_metric network, from the input to the output.

    Raises:
        FormatError: The bytes are something else.
    """
    reader = Reader(data)
    _expect(reader.read_integer() == 1 and reader.read_string() == "loss_metric_2", "loss_metric at the start")
    # The margin and the distance threshold of the loss.
    reader.read_float()
    reader.read_float()
    # The versions of all layers come first, down to the innermost one.
    versions = [reader.read_integer()]
    while versions[-1] != _INNERMOST:
        versions.append(reader.read_integer())
        _expect(versions[-1] in (1, 2, _INNERMOST), f"layer version {versions[-1]}")
    _expect(reader.read_string() == "input_rgb_image_sized", "input layer")
    # The mean of each channel, then the height and width of an image.
    for _ in range(3):
        reader.read_float()
    reader.read_integers(2)
    # The input layer comes last in the file. Tags and skips, of version 1, hold nothing.
    layers = [_read_layer(reader, version) for version in reversed(versions) if version != 1]
    _expect(reader.offset == len(data), f"end of file, {len(data) - reader.offset} bytes are left over")
    return [layer for layer in layers if layer is not None]


def _read_layer(reader: Reader, version: int) -> Layer | None:
    """Read one add_layer: the layer's details, three flags, three tensors that are empty in a cleaned network."""
    layer = _read_details(reader)
    reader.skip_booleans(3)
    for _ in range(3):
        reader.read_tensor()
    if version == _INNERMOST:
        reader.read_integer()
    return layer


def _read_details(reader: Reader) -> Layer | None:
    """Read what is specific to a kind of layer; None if it has no parameters."""
    match reader.read_string():
        case "con_4":
            # Filters and biases in one tensor, then their number, kernel, strides and padding; the aliases are views.
            layer = Layer("con", reader.read_tensor(), reader.read_integers(7))
            reader.skip_alias()
            reader.skip_alias()
            _skip_rates(reader)
            return layer
        case "affine_":
            layer = Layer("affine", reader.read_tensor(), ())
            reader.skip_alias()
            reader.skip_alias()
            _expect(reader.read_integer() == 0, "affine layer in convolution mode")
            return layer
        case "fc_2":
            sizes = reader.read_integers(2)
            layer = Layer("fc", reader.read_tensor(), sizes)
            reader.skip_alias()
            reader.skip_alias()
            _expect(reader.read_integer() == 1, "fully connected layer without bias")
            _skip_rates(reader)
            return layer
        case "max_pool_2" | "avg_pool_2":
            reader.read_integers(6)
        case "relu_" | "add_prev_":
            pass
        case other:
            raise FormatError(f"unknown layer {other!r}")
    return None


def _skip_rates(reader: Reader) -> None:
    """Skip the learning rate and weight decay multipliers of weights and biases."""
    for _ in range(4):
        reader.read_float()


def _expect(condition: bool, expected: str) -> None:
    if not condition:
        raise FormatError(f"not a dlib face network: expected {expected}")
