"""Vectors of another length brought to 128: one matrix, fitted once, kept beside the model's TOML file.

Linear and uncentred: it then commutes with averaging the mirror image in and with normalising, so that a raw vector may
be projected before either; and of all matrices of rank 128 it changes the inner products of its sample least (Eckart
and Young, 1936). Centring, as in usual PCA, would measure angles from the mean face and not from the origin.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from facepipe.errors import ModelError, WeightsError
from facepipe.models.protocols import Embedder
from facepipe.schema import EMBEDDING_DIM
from facepipe.storage import write
from facepipe.types import Float32, Float64, UInt8Image

_MODEL = "model_sha256"
_TENSOR = "projection"


class SecondMoment:
    """Sum of the outer products of unit vectors: (d, d) float64, whatever their number."""

    def __init__(self, dim: int):
        self.total = np.zeros((dim, dim), np.float64)
        self.count = 0

    def add(self, raw: Float32) -> None:
        """Raw vectors (n, d), which are normalised first."""
        vectors = to_unit_vectors(raw)
        self.total += vectors.T @ vectors
        self.count += len(vectors)


@dataclass(frozen=True)
class Projection:
    """matrix (d, 128) float32 with orthonormal columns; energy: share of the vectors' squared length that it keeps."""

    matrix: Float32
    energy: float


def fit_projection(moment: SecondMoment) -> Projection:
    """The directions that hold most of the squared length. Raises ModelError for too few vectors or dimensions."""
    dim = len(moment.total)
    if dim <= EMBEDDING_DIM:
        less = "needs no projection" if dim == EMBEDDING_DIM else f"cannot be brought to {EMBEDDING_DIM} without loss"
        raise ModelError(f"a model of {dim} dimensions {less}: only longer vectors are projected")
    check_face_count(moment.count, dim)
    values, vectors = np.linalg.eigh(moment.total)
    top = vectors[:, ::-1][:, :EMBEDDING_DIM]
    # Eigenvectors have no sign of their own: the largest component of each is made positive.
    top = top * np.sign(top[np.abs(top).argmax(0), np.arange(EMBEDDING_DIM)])
    return Projection(top.astype(np.float32), float(values[::-1][:EMBEDDING_DIM].sum() / values.sum()))


def check_face_count(faces: int, dim: int) -> None:
    """Raise ModelError where so few faces cannot show the directions of so many dimensions."""
    if faces < dim:
        raise ModelError(
            f"{faces} faces are too few to fit a projection of {dim} dimensions: it needs {dim} at least beside those "
            "that its loss is measured on, and some ten times as many to be sound"
        )


def to_unit_vectors(raw: npt.ArrayLike) -> Float64:
    """Vectors (n, d) over their length, float64; those of length 0 stay."""
    vectors = np.asarray(raw, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def save_projection(path: Path, projection: Projection, metadata: dict[str, str]) -> None:
    """Write the matrix as safetensors, with what it was fitted on."""
    from safetensors.numpy import save as packed

    told = {**metadata, "energy": f"{projection.energy:.6f}"}
    write(str(path), packed({_TENSOR: np.ascontiguousarray(projection.matrix)}, metadata=told))


def read_projection(path: Path, dim: int, sha256: str) -> Float32:
    """The matrix (dim, 128) of a file. Raises WeightsError where it is missing, damaged or of another model.

    sha256: fingerprint of the model it is to go with
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load

    try:
        tensors = load(path.read_bytes())
        with safe_open(path, "np") as file:
            fitted = (file.metadata() or {}).get(_MODEL)
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"the projection {str(path)!r} cannot be read: {error}") from error
    matrix = tensors.get(_TENSOR, np.empty((0, 0), np.float32))
    if matrix.shape != (dim, EMBEDDING_DIM):
        raise WeightsError(
            f"{str(path)!r} holds no projection of {dim} dimensions to {EMBEDDING_DIM} (found {matrix.shape}): it "
            "belongs to another model; `facepipe models project` fits one"
        )
    if fitted != sha256:
        raise WeightsError(
            f"{str(path)!r} was fitted on the model {fitted or 'that it does not name'}, and this one is {sha256} "
            "(weights and input count): fit it anew with `facepipe models project`"
        )
    return np.asarray(matrix, np.float32)


class ProjectedEmbedder:
    """An embedder whose raw vectors are multiplied by a matrix (d, 128)."""

    def __init__(self, inner: Embedder, matrix: Float32):
        self._inner, self._matrix = inner, matrix
        self.size, self.dim = inner.size, matrix.shape[1]

    @classmethod
    def from_file(cls, embedder: Embedder, file: Path, sha256: str) -> "ProjectedEmbedder":
        """With the matrix of a file. Raises WeightsError where it was fitted on another model than that of `sha256`."""
        return cls(embedder, read_projection(file, embedder.dim, sha256))

    def embed(self, chips: UInt8Image) -> Float32:
        return np.asarray(_rows(self._inner.embed(chips), self._matrix), np.float32)


def _rows(raw: Float32, matrix: Float32) -> Float32:
    """Row by row: a product of whole matrices rounds by its shape, and a vector must not depend on its batch."""
    return np.stack([row @ matrix for row in raw]) if len(raw) else np.empty((0, matrix.shape[1]), np.float32)
