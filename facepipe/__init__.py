"""facepipe: large image corpora in, a gallery of 128-D face embeddings out.

    facepipe.Gallery("G")            the rows of a gallery as Arrow, pandas or NumPy
    facepipe.Index("G")              search in it
    facepipe.encode(["photo.jpg"])   the faces of a few images

Importing this package loads neither torch nor ray nor faiss; what needs them is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from facepipe.errors import (
    AccountingError,
    ConfigError,
    ContractError,
    EvaluationError,
    FacepipeError,
    GalleryBusyError,
    GalleryError,
    IndexingError,
    ModelError,
    SourceError,
    StorageError,
    ThresholdError,
    WeightsError,
    WorkerError,
)
from facepipe.opencv import set_environment

# Every way of running imports this package before OpenCV, which reads the environment when it is imported.
set_environment()

if TYPE_CHECKING:
    from facepipe.encoding import Encoded, Face, encode
    from facepipe.gallery import Contract, Gallery
    from facepipe.index.search import Index

__version__ = "0.1.0"
__all__ = [
    "AccountingError",
    "ConfigError",
    "Contract",
    "ContractError",
    "Encoded",
    "EvaluationError",
    "Face",
    "FacepipeError",
    "Gallery",
    "GalleryBusyError",
    "GalleryError",
    "Index",
    "IndexingError",
    "ModelError",
    "SourceError",
    "StorageError",
    "ThresholdError",
    "WeightsError",
    "WorkerError",
    "encode",
]

_LAZY = {
    "Contract": "facepipe.gallery",
    "Gallery": "facepipe.gallery",
    "Encoded": "facepipe.encoding",
    "Face": "facepipe.encoding",
    "encode": "facepipe.encoding",
    "Index": "facepipe.index.search",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'facepipe' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value
