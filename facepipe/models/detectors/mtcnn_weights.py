"""MTCNN's weights from the package mtcnn: LZ4 frames of pickles of Keras arrays, written by joblib.

Nothing in the files is executed. The unpickler knows four names, and none of them is a function of another package.
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
# Layers in the order in which Keras lists a model's weights: kernel and bias of each, a slope for every PReLU.
_LAYERS = {
    "pnet": "conv1 prelu1 conv2 prelu2 conv3 prelu3 head.box head.face",
    "rnet": "conv1 prelu1 conv2 prelu2 conv3 prelu3 dense4 prelu4 head.box head.face",
    "onet": "conv1 prelu1 conv2 prelu2 conv3 prelu3 conv4 prelu4 dense5 prelu5 head.box head.landmarks head.face",
}
# First bytes of an LZ4 frame; the largest content and array that are accepted.
_LZ4_MAGIC = b"\x04\x22\x4d\x18"
_MAX_BYTES = 1 << 24


def load_packaged_nets() -> "MtcnnNets":
    """Load the three networks with the weights of the package mtcnn, ready for inference.

    Raises:
        WeightsError: The package is missing, or its files are not the registered ones.
    """
    from facepipe.models.detectors.mtcnn_nets import MtcnnNets

    nets = MtcnnNets()
    state: dict[str, Tensor] = {}
    for name, sha256 in SHA256.items():
        file = find_package_file("mtcnn", f"assets/weights/{name}.lz4", "mtcnn")
        frame = verify_sha256(file.read_bytes(), sha256, str(file))
        state |= convert_keras_arrays(name, read_arrays(decompress_lz4_frame(frame)))
    load_state(nets, state, "the package mtcnn")
    return nets.eval().requires_grad_(False)


def convert_keras_arrays(net: str, arrays: list[Float32]) -> "dict[str, Tensor]":
    """Convert the arrays of Keras to the state dict of one network.

    Args:
        net: "pnet", "rnet" or "onet".
        arrays: Kernels (row, column, in, out), dense layers (in, out) and slopes (1, 1, channel).

    Raises:
        WeightsError: The number of arrays is wrong.
    """
    import torch

    state = {}
    layers = _LAYERS[net].split()
    # A layer has two arrays, a PReLU one.
    if len(arrays) != sum(1 if "prelu" in layer else 2 for layer in layers):
        raise WeightsError(f"{len(arrays)} arrays do not make an MTCNN {net}")
    remaining = iter(arrays)
    for layer in layers:
        weight = next(remaining)
        if "prelu" in layer:
            weight = weight.reshape(-1)
        # Kernels (row, column, in, out) become (out, in, row, column); dense layers are transposed.
        else:
            weight = weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight.T
            state[f"{net}.{layer}.bias"] = torch.from_numpy(next(remaining).copy())
        state[f"{net}.{layer}.weight"] = torch.from_numpy(weight.copy())
    return state


def decompress_lz4_frame(data: bytes) -> bytes:
    """Decompress one LZ4 frame (LZ4 frame format 1.6).

    Checksums are skipped, because callers check a SHA-256.

    Raises:
        WeightsError: The bytes are not such a frame, or it is damaged or too large.
    """
    if data[:4] != _LZ4_MAGIC or len(data) < 7 or data[4] >> 6 != 1:
        raise WeightsError("not an LZ4 frame")
    flags = data[4]
    has_content_size = bool(flags & 8)
    has_dictionary_id = bool(flags & 1)
    has_block_checksums = bool(flags & 16)
    # The header is 7 bytes and what its flags add; the blocks follow, up to one of size 0.
    start = 7 + 8 * has_content_size + 4 * has_dictionary_id
    content = bytearray()
    try:
        while size := int.from_bytes(data[start : start + 4], "little"):
            start += 4
            length = size & 0x7FFFFFFF
            block = data[start : start + length]
            start += length + 4 * has_block_checksums
            if len(block) < length or len(content) > _MAX_BYTES:
                raise WeightsError("the LZ4 frame is cut off or too large")
            # The highest bit of the size marks a block that is not compressed.
            is_stored = bool(size >> 31)
            if is_stored:
                content += block
            else:
                _decompress_lz4_block(block, content)
    except IndexError as error:
        raise WeightsError("the LZ4 frame is damaged") from error
    return bytes(content)


def _decompress_lz4_block(block: bytes, content: bytearray) -> None:
    """Append one compressed block; matches may reach back into the blocks before it."""
    start = 0
    while True:
        # A sequence begins with a token: the lengths of its literals and of its match.
        token = block[start]
        literals, start = _read_length(block, start + 1, token >> 4)
        content += block[start : start + literals]
        start += literals
        # The last sequence has no match.
        if start >= len(block):
            return
        offset = block[start] | block[start + 1] << 8
        match, start = _read_length(block, start + 2, token & 15)
        if not 0 < offset <= len(content):
            raise WeightsError("the LZ4 frame is damaged")
        match_start = len(content) - offset
        # A match is at least 4 bytes long; its token holds what is longer.
        match += 4
        piece = content[match_start : match_start + match]
        content += (piece * (match // offset + 1))[:match]  # a match may overlap its own output


def _read_length(block: bytes, start: int, nibble: int) -> tuple[int, int]:
    """Read a length that begins with four bits; also return the offset of what follows it."""
    length = nibble
    if nibble < 15:
        return length, start
    while block[start] == 255:
        length += 255
        start += 1
    return length + block[start], start + 1


class _Wrapper:
    """Stand-in for joblib's NumpyArrayWrapper: describes the array that follows in the stream."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: str


class _Subclass:
    """Stand-in for numpy.ndarray, which the wrapper names and which is never called."""


_KNOWN_CLASSES = {
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): _Wrapper,
    ("numpy", "ndarray"): _Subclass,
    ("numpy", "dtype"): np.dtype,
}


# The interpreter's unpickler in Python. Arrays lie between the opcodes, and only this one can be made to read them.
_Unpickler: Any = pickle._Unpickler


class _ArrayUnpickler(_Unpickler):
    """Reads a list of arrays as joblib writes it, and refuses whatever else a pickle can hold."""

    dispatch: ClassVar = dict(_Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        self._stream = stream

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN_CLASSES.get((module, name))
        if known is None:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a list of arrays")
        return known

    def load_build(self) -> None:
        # The wrapper is complete at this opcode, and the bytes of its array come next in the stream.
        super().load_build()
        if isinstance(self.stack[-1], _Wrapper):
            self.stack[-1] = self._read_array(self.stack[-1])

    dispatch[pickle.BUILD[0]] = load_build

    def _read_array(self, wrapper: _Wrapper) -> Float32:
        """Read the array whose bytes come next: a count of padding bytes, the padding, the numbers."""
        padding = self._stream.read(1)
        self._stream.read(padding[0])
        if wrapper.dtype != np.dtype("<f4") or wrapper.order != "C":
            raise pickle.UnpicklingError(f"an array of {wrapper.dtype} in order {wrapper.order}")
        size = 4 * int(np.prod(wrapper.shape, dtype=np.int64))
        data = self._stream.read(size) if 0 <= size <= _MAX_BYTES else b""
        return np.frombuffer(data, "<f4").reshape(wrapper.shape)


def read_arrays(data: bytes) -> list[Float32]:
    """Read the float32 arrays of a pickle that joblib wrote.

    Raises:
        WeightsError: The pickle holds anything else than a list of arrays, or is damaged.
    """
    try:
        loaded = _ArrayUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # whatever a hostile stream provokes
        raise WeightsError(f"refused: the pickle holds more than arrays, or is damaged ({error})") from error
    if not isinstance(loaded, list) or not all(isinstance(array, np.ndarray) for array in loaded):
        raise WeightsError("the pickle is not a list of arrays")
    return loaded
