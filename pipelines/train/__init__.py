"""train: embedders and detectors, from scratch or from a checkpoint."""

from pipelines.train.pipeline import DetectorConfig, TrainConfig, run

__all__ = ["DetectorConfig", "TrainConfig", "run"]
