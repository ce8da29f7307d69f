"""train: train an embedder or a detector, from random weights or from a checkpoint."""

from facepipe.extras import require_module

# Before torch is imported, whose own error does not say what to type.
require_module("torch", "training")

from pipelines.train.pipeline import DetectorConfig, TrainConfig, run  # noqa: E402

__all__ = ["DetectorConfig", "TrainConfig", "run"]
