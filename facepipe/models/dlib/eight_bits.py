"""dlib's network in eight bits on CPUs, after a check that this CPU computes it right."""

import platform
from pathlib import Path

import numpy as np

from facepipe.errors import ModelError
from facepipe.models.dlib.dlib_onnx import build_dlib_onnx
from facepipe.models.dlib.layout import SIDE, Convolution
from facepipe.models.dlib.ranges import RANGES
from facepipe.models.embedders.engines import OnnxDlib
from facepipe.models.parity import make_scene_chips
from facepipe.models.projection import to_unit_vectors
from facepipe.models.runtime.onnx_session import open_session
from facepipe.types import Float32

# Flags of /proc/cpuinfo of x86 processors that add products of eight bits in 32 bits.
_EXACT_PRODUCT_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})
_X86 = frozenset({"x86_64", "AMD64", "i686"})
_MAX_DISTANCE = 0.05  # rounding in another order moves a unit vector by 0.01 to 0.02
_SATURATES = (
    "this CPU computes products of eight bits with saturation (it has no VNNI), and the vectors would be wrong: "
    "use the embedder dlib-resnet"
)


def has_exact_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether this CPU computes sums of products of eight bits without saturation, as far as it says.

    x86 processors without VNNI add pairs of products in 16 bits. Small sums are right there, so a check with a few
    pictures is not enough. On other processors, or if the flags cannot be read, the answer is yes, and the check in
    `load_int8_dlib` decides.

    Args:
        cpuinfo: The file that lists the flags.
    """
    if platform.machine() not in _X86:
        return True
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    flags = [line.partition(":")[2].split() for line in lines if line.startswith("flags")]
    return not flags or not _EXACT_PRODUCT_FLAGS.isdisjoint(flags[0])


def load_int8_dlib(convolutions: list[Convolution], fc: Float32, threads: int) -> OnnxDlib:
    """Load the network in eight bits.

    Args:
        convolutions: From `fold_layers`.
        fc: (256, 128) from `fold_layers`.
        threads: Threads of ONNX Runtime.

    Raises:
        ModelError: The eight-bit products of this CPU saturate (x86 without VNNI). Vectors would silently be wrong.
    """
    if not has_exact_products():
        raise ModelError(_SATURATES)
    graph = build_dlib_onnx(convolutions, fc, RANGES)
    embedder = OnnxDlib(graph, threads)
    # Without fusion every node is computed as written, in floating point, which cannot saturate.
    chips = make_scene_chips((SIDE, SIDE), 4)
    reference = open_session(graph, threads=threads, optimise=False).run(None, {"chips": chips})[0]
    if _measure_distance(embedder.embed(chips), reference) > _MAX_DISTANCE:
        raise ModelError(_SATURATES)
    return embedder


def _measure_distance(a: Float32, b: Float32) -> float:
    """Measure the largest distance between unit vectors, row by row."""
    return float(np.linalg.norm(to_unit_vectors(a) - to_unit_vectors(b), axis=1).max())
