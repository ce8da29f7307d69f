"""From a config to an objective: the one place that knows which class computes which loss."""

from typing import Protocol

from torch import Tensor, nn

from facepipe.errors import ConfigError
from facepipe.training.losses.config import LossConfig, resolve_loss_config
from facepipe.training.losses.heads import AngularHead, CircleHead, ClassHead, CosineHead
from facepipe.training.losses.pairs import CirclePairLoss, CosineEmbeddingLoss
from facepipe.training.losses.triplets import OfflineTripletLoss, TripletLoss, TripletSoftmax


class Objective(Protocol):
    """A module (embeddings (n, dim) raw float, labels (n,) int64) -> scalar loss."""

    needs_pairs: bool  # whether a batch must hold several faces of a person
    figures: dict[str, Tensor]  # detached scalars of the last forward; may be empty

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor: ...


_HEADS: dict[str, type[ClassHead]] = {
    "softmax": ClassHead,
    "normface": CosineHead,
    "am-softmax": CosineHead,
    "arcface": CosineHead,
    "subcenter-arcface": CosineHead,
    "circle": CircleHead,
    "l-softmax": AngularHead,
    "a-softmax": AngularHead,
}


def build_objective(config: LossConfig, dim: int, classes: int, seed: int) -> nn.Module:
    """The objective (an `Objective`) for embeddings of `dim` numbers and labels below `classes`.

    seed: of the first class centres. Errors: ConfigError for a config that cannot be used.
    """
    config = resolve_loss_config(config)
    if classes < 2:
        raise ConfigError(f"{classes} class: training tells persons apart, give it at least 2")
    if config.name in _HEADS:
        return _HEADS[config.name](config, dim, classes, seed)
    if config.name == "triplet-softmax":
        return TripletSoftmax(config, dim, classes, seed)
    triplet = OfflineTripletLoss if config.offline else TripletLoss
    kinds: dict[str, type[nn.Module]] = {
        "triplet": triplet,
        "cosine": CosineEmbeddingLoss,
        "circle-pair": CirclePairLoss,
    }
    return kinds[config.name](config)
