"""Every exception facepipe raises on purpose. A message says what happened, where, and what to do.

FacepipeError
├── ConfigError          a key, value or command line that cannot be used (exit code 2)
├── MissingPackageError  an optional package is not installed
├── SourceError          the source is missing, empty or of an unknown kind
├── StorageError         a file or object could not be read or written
├── ModelError           a model cannot be loaded
│   ├── WeightsError     weights are missing, or their SHA-256 is not the registered one
│   └── UnknownModelError  no model has this name (exit code 2)
├── GalleryError         the folder is not a usable gallery
│   ├── ContractError    the gallery was made with other models or settings
│   ├── ThresholdError   no match threshold can be estimated
│   ├── ErasureLimitError  more images would be erased than may be without asking
│   └── GalleryBusyError another run is writing to the gallery
├── AccountingError      images listed and images accounted for differ
├── WorkerError          workers end before they can do any work
├── DeviceError          a GPU fails whatever it is given
├── IndexingError        the search index is missing, damaged, or does not fit the gallery
│   ├── IndexDamagedError   a file of it is not what was written
│   └── IndexReplacedError  it was replaced while it was read: open it again
├── TrainingError        a training run cannot go on: its loss is not finite, or its checkpoints are of another run
│   └── AgreedError      the same, on all workers at the same step
└── EvaluationError      a pairs file or gallery cannot be evaluated
"""


class FacepipeError(Exception):
    """Base of all: `except facepipe.FacepipeError` catches every expected failure."""


class ConfigError(FacepipeError):
    """A key, value or argument cannot be used."""


class MissingPackageError(FacepipeError):
    """An optional package is not installed; the message says what to type."""


class SourceError(FacepipeError):
    """The source is missing, empty or of an unknown kind."""


class StorageError(FacepipeError):
    """A file or object could not be read or written; the message is short enough for a row's `error`."""


class ModelError(FacepipeError):
    """A model cannot be loaded."""


class WeightsError(ModelError):
    """Weights are missing or altered."""


class UnknownModelError(ConfigError, ModelError):
    """No model has this name."""


class GalleryError(FacepipeError):
    """The folder is not a usable gallery."""


class ContractError(GalleryError):
    """The gallery's model contract differs from the requested one."""


class ThresholdError(GalleryError):
    """No match threshold can be estimated from the gallery, and its model has none of its own."""


class ErasureLimitError(GalleryError):
    """More images would be erased at once than may be without somebody confirming their number."""


class GalleryBusyError(GalleryError):
    """Another run is writing to this gallery."""


class AccountingError(FacepipeError):
    """Images listed and images accounted for differ."""


class WorkerError(FacepipeError):
    """Workers end before they can do any work."""


class DeviceError(FacepipeError):
    """A GPU fails whatever it is given. The message holds the device's own error."""


class IndexingError(FacepipeError):
    """The search index is missing, damaged, or does not fit the gallery."""


class IndexDamagedError(IndexingError):
    """A file of the search index is missing, or is not what was written. `facepipe index` rebuilds it."""


class IndexReplacedError(IndexingError):
    """The search index was replaced while it was read, or faces were erased from it: open it again."""


class TrainingError(FacepipeError):
    """A training run cannot go on: its loss is not finite, or its checkpoints are of another run."""


class AgreedError(TrainingError):
    """All workers raise it at the same step: a restart would not help."""


class EvaluationError(FacepipeError):
    """A pairs file or gallery cannot be evaluated."""
