"""MTCNN's weights out of the package mtcnn: LZ4 frames of pickles that joblib wrote, of Keras' arrays.

Nothing in the files is executed: the unpickler knows four names, and none of them is a function of another package.
"""

import io
import pickle
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from facepipe.errors import WeightsError
from facepipe.models.checkpoint import load_state
from facepipe.models.weights import find_package_file, verify_sha256
from facepipe.types import Float32

if TYPE_CHECKING:
    from torch import Tensor

    from facepipe.models.detectors.mtcnn_nets import MtcnnNets


SHA256 = {
    "pnet": "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
    "rnet": "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
    "onet": "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
}
# Layers in the order Keras lists a model's weights: kernel and bias of each, a slope for every PReLU.
_ORDER = {
    "pnet": "conv1 prelu1 conv2 prelu2 conv3 prelu3 head.box head.face",
    "rnet": "conv1 prelu1 conv2 prelu2 conv3 prelu3 dense4 prelu4 head.box head.face",
    "onet": "conv1 prelu1 conv2 prelu2 conv3 prelu3 conv4 prelu4 dense5 prelu5 head.box head.landmarks head.face",
}
_MAGIC = b"\x04\x22\x4d\x18"
_LARGEST = 1 << 24


def load_packaged_nets() -> "MtcnnNets":
    """The three networks with the weights of the package mtcnn, ready for inference.

    Raises WeightsError where the package is missing or its files are not the registered ones.
    """
    from facepipe.models.detectors.mtcnn_nets import MtcnnNets

    nets = MtcnnNets()
    state: dict[str, Tensor] = {}
    for name, sha256 in SHA256.items():
        file = find_package_file("mtcnn", f"assets/weights/{name}.lz4", "mtcnn")
        state |= convert_keras_arrays(
            name, read_arrays(decompress_lz4_frame(verify_sha256(file.read_bytes(), sha256, str(file))))
        )
    load_state(nets, state, "the package mtcnn")
    return nets.eval().requires_grad_(False)


def convert_keras_arrays(net: str, arrays: list[Float32]) -> "dict[str, Tensor]":
    """The state dict of one network (`pnet`, `rnet`, `onet`) from Keras' list of arrays: kernels are (row, column,
    in, out), dense layers (in, out), slopes (1, 1, channel).
    """
    import torch

    state, left = {}, list(arrays)
    layers = _ORDER[net].split()
    if len(left) != sum(1 if "prelu" in layer else 2 for layer in layers):
        raise WeightsError(f"{len(left)} arrays do not make an MTCNN {net}")
    for layer in layers:
        weight = left.pop(0)
        if "prelu" in layer:
            weight = weight.reshape(-1)
        else:
            weight = weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight.T
            state[f"{net}.{layer}.bias"] = torch.from_numpy(left.pop(0).copy())
        state[f"{net}.{layer}.weight"] = torch.from_numpy(weight.copy())
    return state


def decompress_lz4_frame(data: bytes) -> bytes:
    """The content of one LZ4 frame (LZ4 frame format 1.6); checksums are passed over, callers check a SHA-256."""
    if data[:4] != _MAGIC or len(data) < 7 or data[4] >> 6 != 1:
        raise WeightsError("not an LZ4 frame")
    flags = data[4]
    at = 7 + 8 * bool(flags & 8) + 4 * bool(flags & 1)
    out = bytearray()
    try:
        while size := int.from_bytes(data[at : at + 4], "little"):
            at += 4
            length = size & 0x7FFFFFFF
            block = data[at : at + length]
            at += length + 4 * bool(flags & 16)
            if len(block) < length or len(out) > _LARGEST:
                raise WeightsError("the LZ4 frame is cut off or too large")
            if size >> 31:
                out += block
            else:
                _lz4_block(block, out)
    except IndexError as error:
        raise WeightsError("the LZ4 frame is damaged") from error
    return bytes(out)


def _lz4_block(block: bytes, out: bytearray) -> None:
    """Append one compressed block; matches may reach back into the blocks before it."""
    at = 0
    while True:
        token = block[at]
        literals, at = _length(block, at + 1, token >> 4)
        out += block[at : at + literals]
        at += literals
        if at >= len(block):
            return
        back = block[at] | block[at + 1] << 8
        match, at = _length(block, at + 2, token & 15)
        if not 0 < back <= len(out):
            raise WeightsError("the LZ4 frame is damaged")
        start, match = len(out) - back, match + 4
        piece = out[start : start + match]
        out += (piece * (match // back + 1))[:match]  # a match may overlap what it makes


def _length(block: bytes, at: int, nibble: int) -> tuple[int, int]:
    """A length that began with four bits, and where what follows it begins."""
    if nibble < 15:
        return nibble, at
    while block[at] == 255:
        nibble, at = nibble + 255, at + 1
    return nibble + block[at], at + 1


class _Wrapper:
    """Stands for joblib's NumpyArrayWrapper: says what array follows in the stream."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: str


class _Subclass:
    """Stands for numpy.ndarray, which the wrapper names and which is never called."""


_KNOWN = {
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): _Wrapper,
    ("numpy", "ndarray"): _Subclass,
    ("numpy", "dtype"): np.dtype,
}


# The interpreter's unpickler in Python: arrays lie between the opcodes, and it alone can be made to read them.
_Unpickler: Any = pickle._Unpickler


class _ArrayUnpickler(_Unpickler):
    """Reads a list of arrays as joblib writes it, and refuses whatever else a pickle can hold."""

    dispatch: ClassVar = dict(_Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        self._stream = stream

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is None:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a list of arrays")
        return known

    def load_build(self) -> None:
        super().load_build()
        if isinstance(self.stack[-1], _Wrapper):
            self.stack[-1] = self._array(self.stack[-1])

    dispatch[pickle.BUILD[0]] = load_build

    def _array(self, wrapper: _Wrapper) -> Float32:
        """The array whose bytes come next: a count of padding bytes, the padding, the numbers."""
        padding = self._stream.read(1)
        self._stream.read(padding[0])
        if wrapper.dtype != np.dtype("<f4") or wrapper.order != "C":
            raise pickle.UnpicklingError(f"an array of {wrapper.dtype} in order {wrapper.order}")
        size = 4 * int(np.prod(wrapper.shape, dtype=np.int64))
        data = self._stream.read(size) if 0 <= size <= _LARGEST else b""
        return np.frombuffer(data, "<f4").reshape(wrapper.shape)


def read_arrays(data: bytes) -> list[Float32]:
    """The list of float32 arrays in a pickle that joblib wrote. Raises WeightsError for anything else."""
    try:
        loaded = _ArrayUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # whatever a hostile stream provokes
        raise WeightsError(f"refused: the pickle holds more than arrays, or is damaged ({error})") from error
    if not isinstance(loaded, list) or not all(isinstance(array, np.ndarray) for array in loaded):
        raise WeightsError("the pickle is no list of arrays")
    return loaded
