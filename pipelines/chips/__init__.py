"""chips: aligned faces for training, cut from images or from the images of a gallery."""

from pipelines.chips.prepare import in_use, prepare, prepare_images, prepare_pairs
from pipelines.chips.run import ChipRun

__all__ = ["ChipRun", "in_use", "prepare", "prepare_images", "prepare_pairs"]
