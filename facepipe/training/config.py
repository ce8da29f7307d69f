"""The settings of the network that is trained."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from facepipe.training.trainer.config import Count, Natural, Share, Weight


@dataclass(frozen=True)
class ModelConfig:
    """What is trained, and from which weights on.

    architecture: `facepipe models --architectures` lists them; may be left out where `start` says it
    start: weights to start from: a model's TOML file, the name of a registered model, or a checkpoint of the
        architecture (.safetensors, .pth); nothing: random weights. Layers whose size depends on `dim` start at random
        where the weights have another `dim`
    dim: length of an embedding; by default that of `start`, else 128
    freeze: names, or beginnings of names, of parameters that stay as they are, or "trunk": all but the layers that
        make the embedding. Batch normalisation in frozen parts keeps its statistics as well
    unfreeze_at: from here on nothing is frozen: epochs, or steps where `schedule.steps` is given; 0: never
    layer_decay: factor on the learning rate for each layer further from the output (layer-wise decay); 1: none
    imprint: of so many images of each identity the mean direction becomes where its class centre starts; 0: centres
        start at random. For fine-tuning; costs one pass over these images
    dropout: probability of the network's own dropout layers; by default the architecture's
    """

    architecture: str = ""
    start: str = ""
    dim: Count | None = None
    freeze: Literal["trunk"] | tuple[str, ...] = ()
    unfreeze_at: Weight = 0.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    imprint: Natural = 0
    dropout: Share | None = None
