"""train: train an embedder or a detector, from random weights or from a checkpoint."""

from pipelines.train.pipeline import DetectorConfig, TrainConfig, run

__all__ = ["DetectorConfig", "TrainConfig", "run"]
