"""dlib's network in eight bits on CPUs, once it is known that this CPU computes it right."""

import numpy as np

from facepipe.errors import ModelError
from facepipe.models.dlib.dlib_onnx import graph
from facepipe.models.dlib.layout import SIDE, Convolution
from facepipe.models.dlib.ranges import RANGES
from facepipe.models.engines import OnnxDlib, session
from facepipe.models.parity import scenes
from facepipe.models.projection import unit
from facepipe.types import Float32

_FARTHEST = 0.05  # roundings in another order move a unit vector by 0.01 to 0.02


def load(convolutions: list[Convolution], fc: Float32, threads: int) -> OnnxDlib:
    """The network. Raises ModelError on a CPU whose eight-bit products saturate (x86 without VNNI): vectors would be
    wrong there, and nothing would say so.
    """
    written = graph(convolutions, fc, RANGES)
    made = OnnxDlib(written, threads)
    chips = scenes((SIDE, SIDE), 4)
    reference = session(written, threads, as_written=True).run(None, {"chips": chips})[0]
    if _apart(made.embed(chips), reference) > _FARTHEST:
        raise ModelError(
            "this CPU computes products of eight bits with saturation (it has no VNNI), and the vectors would be "
            "wrong: use the embedder dlib-resnet"
        )
    return made


def _apart(a: Float32, b: Float32) -> float:
    """Largest distance of vectors (n, 128) and (n, 128) brought to unit length."""
    return float(np.linalg.norm(unit(a) - unit(b), axis=1).max())
