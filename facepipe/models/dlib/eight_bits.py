"""dlib's network in eight bits on CPUs, once it is known that this CPU computes it right."""

import numpy as np

from facepipe.errors import ModelError
from facepipe.models.dlib.dlib_onnx import build_dlib_onnx
from facepipe.models.dlib.layout import SIDE, Convolution
from facepipe.models.dlib.ranges import RANGES
from facepipe.models.engines import OnnxDlib, open_session
from facepipe.models.parity import make_scene_chips
from facepipe.models.projection import to_unit_vectors
from facepipe.types import Float32

_FARTHEST = 0.05  # roundings in another order move a unit vector by 0.01 to 0.02


def load_int8_dlib(convolutions: list[Convolution], fc: Float32, threads: int) -> OnnxDlib:
    """The network. Raises ModelError on a CPU whose eight-bit products saturate (x86 without VNNI): vectors would be
    wrong there, and nothing would say so.
    """
    written = build_dlib_onnx(convolutions, fc, RANGES)
    made = OnnxDlib(written, threads)
    chips = make_scene_chips((SIDE, SIDE), 4)
    reference = open_session(written, threads, as_written=True).run(None, {"chips": chips})[0]
    if _apart(made.embed(chips), reference) > _FARTHEST:
        raise ModelError(
            "this CPU computes products of eight bits with saturation (it has no VNNI), and the vectors would be "
            "wrong: use the embedder dlib-resnet"
        )
    return made


def _apart(a: Float32, b: Float32) -> float:
    """Largest distance of vectors (n, 128) and (n, 128) brought to unit length."""
    return float(np.linalg.norm(to_unit_vectors(a) - to_unit_vectors(b), axis=1).max())
