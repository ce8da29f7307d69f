"""How far apart faces lie in a gallery's space: limits on distances mean something in the space they were measured in.

The limits of copies were measured with dlib's network, whose strangers are 0.56 apart. Networks with an angular margin
put them at 1.41. A model whose card has no limits gets those of dlib's network, in proportion to the distance of its
strangers. `facepipe models measure` measures them.
"""

import numpy as np

from facepipe.gallery import Gallery
from facepipe.index.rows import read_face_rows
from facepipe.models.zoo.registry import find_copy_limits
from facepipe.types import Float32

COPY_LIMITS = {"near": 0.12, "close_near": 0.25, "same_shot": 0.15}
"""Limits of copies that were measured with dlib's network (`DuplicateRule`)."""

# Median distance of strangers in the space of dlib's network (LFW), and how far others may differ and count as alike.
_STRANGERS = 0.564
_ALIKE = (0.75, 1.33)
_MAX_FILES = 8
_ROWS_PER_FILE = 256
_PAIRS = 20_000
_MIN_ROWS = 3


def find_space_limits(gallery: Gallery) -> dict[str, float]:
    """Find the distances up to which faces of a gallery are of copies: of its model's card, or by its strangers."""
    limits = find_copy_limits(gallery.contract.embedder)
    if limits:
        return limits
    scale = _measure_scale(gallery)
    return {name: limit * scale for name, limit in COPY_LIMITS.items()}


def find_space_scale(gallery: Gallery) -> float:
    """Find how many times farther apart copies are in a gallery's space than in that of dlib's network."""
    default = COPY_LIMITS["close_near"]
    return find_space_limits(gallery).get("close_near", default) / default


def _measure_scale(gallery: Gallery) -> float:
    """Measure how many times farther apart strangers are than in the space of dlib's network, about; 1 if they are not.

    The median of random pairs is that of strangers, unless one person has most of the faces. Then it is smaller, and
    so are the limits.
    """
    vectors = _read_some(gallery)
    if len(vectors) < _MIN_ROWS:
        return 1.0
    rng = np.random.default_rng(0)
    left = rng.integers(0, len(vectors), _PAIRS)
    right = (left + rng.integers(1, len(vectors), _PAIRS)) % len(vectors)
    scale = float(np.median(np.linalg.norm(vectors[left] - vectors[right], axis=1))) / _STRANGERS
    return 1.0 if _ALIKE[0] <= scale <= _ALIKE[1] else scale


def _read_some(gallery: Gallery) -> Float32:
    """Read some vectors (n, dim) of some files, which are named by hashes: few bytes of a large table."""
    paths = sorted(file["path"] for file in gallery.files() if file["faces"])
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(paths))[:_MAX_FILES]
    parts = [np.empty((0, gallery.dim), np.float32)]
    # Of few files, more rows each.
    count = _ROWS_PER_FILE * _MAX_FILES // max(1, len(chosen))
    for place in np.sort(chosen):
        faces = read_face_rows(gallery.faces_folder, [paths[place]], gallery.dim, deleted=gallery.deleted_rows)
        rows = next(faces, None)
        if rows is not None:
            picked = np.sort(rng.permutation(len(rows))[:count])
            parts.append(rows.vectors[picked])
    return np.concatenate(parts)
