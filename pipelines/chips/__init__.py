"""chips: cut aligned faces for training, from images or from the images of a gallery."""

from pipelines.chips.prepare import mark_in_use, prepare_chips, prepare_images, prepare_pairs
from pipelines.chips.run import ChipRunConfig

__all__ = ["ChipRunConfig", "mark_in_use", "prepare_chips", "prepare_images", "prepare_pairs"]
