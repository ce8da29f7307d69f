"""Build the loss that a config names."""

from typing import Protocol

from torch import Tensor, nn

from facepipe.errors import ConfigError
from facepipe.training.losses.config import PML, LossConfig, resolve_loss_config
from facepipe.training.losses.heads import AngularHead, CircleHead, ClassHead, CosineHead
from facepipe.training.losses.pairs import CirclePairLoss, CosineEmbeddingLoss
from facepipe.training.losses.pml import MetricLearningLoss
from facepipe.training.losses.quality_heads import AdaFaceHead, MagFaceHead
from facepipe.training.losses.triplets import OfflineTripletLoss, TripletLoss, TripletSoftmax


class Objective(Protocol):
    """A module that computes a loss from embeddings and labels.

    Attributes:
        needs_pairs: whether a batch must hold several faces per person.
        figures: scalars of the last forward pass by name, detached; may be empty.
    """

    needs_pairs: bool
    figures: dict[str, Tensor]

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, a scalar, from raw embeddings (n, dim) and labels (n,) int64."""


# Losses against class centres, by name.
_HEADS: dict[str, type[ClassHead]] = {
    "softmax": ClassHead,
    "normface": CosineHead,
    "am-softmax": CosineHead,
    "arcface": CosineHead,
    "subcenter-arcface": CosineHead,
    "circle": CircleHead,
    "adaface": AdaFaceHead,
    "magface": MagFaceHead,
    "l-softmax": AngularHead,
    "a-softmax": AngularHead,
}


def build_objective(config: LossConfig, dim: int, classes: int, seed: int) -> nn.Module:
    """Build the loss, an `Objective`.

    Args:
        config: settings of the loss.
        dim: length of an embedding.
        classes: number of classes; labels are below it.
        seed: random seed of the initial class centres.

    Raises:
        ConfigError: The settings are wrong, or there are fewer than 2 classes.
    """
    config = resolve_loss_config(config)
    if classes < 2:
        raise ConfigError(f"{classes} class in the training data: training needs at least 2")
    if config.name.startswith(PML):
        return MetricLearningLoss(config.name, config.miner, dim=dim, classes=classes, seed=seed)
    if config.name in _HEADS:
        return _HEADS[config.name](config, dim, classes, seed)
    if config.name == "triplet-softmax":
        return TripletSoftmax(config, dim, classes, seed)
    if config.name == "triplet":
        return OfflineTripletLoss(config) if config.offline else TripletLoss(config)
    # Losses over the pairs of a batch.
    pair_losses: dict[str, type[nn.Module]] = {"cosine": CosineEmbeddingLoss, "circle-pair": CirclePairLoss}
    return pair_losses[config.name](config)
