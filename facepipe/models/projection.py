"""Bring vectors to fewer numbers with one matrix, fitted once and kept beside the model's TOML file.

The projection is linear and uncentred. It then commutes with averaging the mirror image in and with normalising, so a
raw vector may be projected before either. Of all matrices of its rank it changes the inner products of its sample least
(Eckart and Young, 1936). Centring, as in usual PCA, would measure angles from the mean face and not from the origin.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from facepipe.errors import ModelError, WeightsError
from facepipe.models.protocols import Embedder, RunsOnDevice
from facepipe.schema import DEFAULT_DIM
from facepipe.storage import write
from facepipe.types import Float32, Float64, UInt8Image

# Names in the safetensors file.
_MODEL = "model_sha256"
_TENSOR = "projection"


class SecondMoment:
    """Sum of the outer products of unit vectors, of constant size however many there are.

    Attributes:
        total: (d, d).
        count: Number of vectors.
    """

    def __init__(self, dim: int):
        self.total = np.zeros((dim, dim), np.float64)
        self.count = 0

    def add(self, raw: Float32) -> None:
        """Add raw vectors (n, d), normalised."""
        vectors = to_unit_vectors(raw)
        self.total += vectors.T @ vectors
        self.count += len(vectors)


@dataclass(frozen=True)
class Projection:
    """A matrix that brings vectors to fewer dimensions.

    Attributes:
        matrix: (d, k) with orthonormal columns.
        energy: Share of the vectors' squared length that it keeps.
    """

    matrix: Float32
    energy: float


def fit_projection(moment: SecondMoment, dim: int = DEFAULT_DIM) -> Projection:
    """Find the `dim` directions that hold most of the squared length.

    Raises:
        ModelError: There are too few vectors or dimensions.
    """
    own_dim = len(moment.total)
    if own_dim <= dim:
        reason = "needs no projection" if own_dim == dim else f"cannot be brought to {dim} without loss"
        raise ModelError(f"a model of {own_dim} dimensions {reason}: only longer vectors are projected")
    check_face_count(moment.count, own_dim)
    # Eigenvalues ascend, so the directions that hold most come last.
    values, vectors = np.linalg.eigh(moment.total)
    top = vectors[:, ::-1][:, :dim]
    # Eigenvectors have no sign of their own: the largest component of each is made positive.
    top = top * np.sign(top[np.abs(top).argmax(0), np.arange(dim)])
    energy = float(values[::-1][:dim].sum() / values.sum())
    return Projection(top.astype(np.float32), energy)


def check_face_count(faces: int, dim: int) -> None:
    """Check that there are enough faces to find the directions of so many dimensions.

    Raises:
        ModelError: There are fewer faces than dimensions.
    """
    if faces < dim:
        raise ModelError(
            f"{faces} faces are too few to fit a projection of {dim} dimensions: it needs at least {dim} besides those "
            "that its loss is measured on, and some ten times as many to be sound"
        )


def to_unit_vectors(raw: npt.ArrayLike) -> Float64:
    """Divide vectors (n, d) by their length; those of length 0 stay."""
    vectors = np.asarray(raw, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def save_projection(path: Path, projection: Projection, metadata: dict[str, str]) -> None:
    """Write a projection as safetensors, with what it was fitted on as metadata."""
    from safetensors.numpy import save

    with_energy = {**metadata, "energy": f"{projection.energy:.6f}"}
    write(str(path), save({_TENSOR: np.ascontiguousarray(projection.matrix)}, metadata=with_energy))


def read_projection(path: Path, dim: int, sha256: str) -> Float32:
    """Read the matrix of a projection.

    Args:
        path: The safetensors file.
        dim: Length of the model's vectors.
        sha256: Fingerprint of the model that the projection must belong to.

    Returns:
        (dim, k).

    Raises:
        WeightsError: The file is missing or damaged, or belongs to another model.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load

    try:
        tensors = load(path.read_bytes())
        with safe_open(path, "np") as file:
            fitted_on = (file.metadata() or {}).get(_MODEL)
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"the projection {str(path)!r} cannot be read: {error}") from error
    # A missing matrix is treated as one of the wrong shape.
    matrix = tensors.get(_TENSOR, np.empty((0, 0), np.float32))
    if matrix.ndim != 2 or matrix.shape[0] != dim or not 0 < matrix.shape[1] < dim:
        raise WeightsError(
            f"{str(path)!r} holds no projection of {dim} dimensions to fewer (its shape is {matrix.shape}): "
            "it belongs to another model; `facepipe models project` fits one"
        )
    if fitted_on != sha256:
        raise WeightsError(
            f"{str(path)!r} was fitted on the model {fitted_on or 'that it does not name'}, and this one is {sha256} "
            "(weights and input count): fit it again with `facepipe models project`"
        )
    return np.asarray(matrix, np.float32)


def read_projected_dim(path: Path) -> int:
    """Read to how many numbers a projection brings vectors, from the head of its file.

    Raises:
        WeightsError: The file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            shape = file.get_slice(_TENSOR).get_shape()
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"the projection {str(path)!r} cannot be read: {error}") from error
    if len(shape) != 2:
        raise WeightsError(f"{str(path)!r} holds no projection: its shape is {tuple(shape)}")
    return int(shape[1])


class ProjectedEmbedder:
    """An embedder whose raw vectors are multiplied by a matrix.

    Attributes:
        size: (width, height) of a chip.
        dim: Length of a vector.
    """

    def __init__(self, inner: Embedder, matrix: Float32):
        """Wrap an embedder; the matrix is (d, k)."""
        self._inner = inner
        self._matrix = matrix
        self.size = inner.size
        self.dim = matrix.shape[1]

    @classmethod
    def from_file(cls, embedder: Embedder, path: Path, sha256: str) -> "ProjectedEmbedder":
        """Wrap an embedder with the matrix of a file.

        Raises:
            WeightsError: The matrix was fitted on another model than the one with fingerprint `sha256`.
        """
        return cls(embedder, read_projection(path, embedder.dim, sha256))

    def configure(self, precision: str, max_batch: int) -> None:
        """Choose how the inner embedder runs on a device; see `RunsOnDevice`. On a CPU there is nothing to choose."""
        if isinstance(self._inner, RunsOnDevice):
            self._inner.configure(precision, max_batch)

    def embed(self, chips: UInt8Image) -> Float32:
        """Embed chips; see `Embedder`."""
        return project_rows(self._inner.embed(chips), self._matrix)


def project_rows(raw: Float32, matrix: Float32) -> Float32:
    """Project vectors (n, d) with a matrix (d, k), row by row.

    A product of whole matrices rounds by its shape, and a vector must not depend on its batch.
    """
    if not len(raw):
        return np.empty((0, matrix.shape[1]), np.float32)
    return np.asarray(np.stack([row @ matrix for row in raw]), np.float32)
