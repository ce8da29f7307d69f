"""Vectors rounded so that distances between them are exact in single precision, in whatever order they are summed.

Matrix products round differently with the shape of the batch. The nearest list of a vector would then depend on the
vectors that come with it, and the results of an index on how it is cut into shards. On multiples of 2^-11 all sums of
128 products of unit vectors are multiples of 2^-22 below 4, which 24 bits of mantissa hold exactly.
"""

import numpy as np

from facepipe.types import Float32

# Grid steps per unit: 2^11.
_STEPS = np.float32(2048)


def round_to_grid(vectors: Float32) -> Float32:
    """Round each component of vectors to the nearest multiple of 2^-11.

    A 128-D vector moves by about 0.0016, a two-hundredth of the distance to its list's centroid. Only lists and codes
    are found with these; reported distances come from the vectors themselves.

    Args:
        vectors: (n, d) of at most unit norm.
    """
    rounded = np.multiply(vectors, _STEPS, dtype=np.float32)
    np.rint(rounded, out=rounded)
    rounded /= _STEPS
    return np.ascontiguousarray(rounded)
