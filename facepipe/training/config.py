"""The settings of the network to train."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from facepipe.training.trainer.config import Count, Natural, Share, Weight


@dataclass(frozen=True)
class ModelConfig:
    """Configure the network to train and the weights it starts from.

    Attributes:
        architecture: name of the network; `facepipe models --architectures` lists them. Optional if `start` implies it.
        start: weights to start from: a model's TOML file, the name of a registered model, or a checkpoint of the
            architecture (.safetensors, .pth). Default: random weights. Layers whose size depends on `dim` start at
            random if the weights have another `dim`.
        dim: length of an embedding; default: that of `start`, or 128.
        freeze: parameters to freeze: names, or prefixes of names, or "trunk": all layers except those that make the
            embedding. Batch normalisation in frozen layers keeps its statistics too.
        unfreeze_at: when to unfreeze all parameters, in epochs, or in steps if `schedule.steps` is set; 0: never.
        layer_decay: factor on the learning rate per layer away from the output (layer-wise decay); 1: no decay.
        imprint: images per identity whose mean direction becomes the initial class centre; 0: random class centres.
            Meant for fine-tuning; costs one pass over these images.
        dropout: probability of the network's own dropout layers; default: that of the architecture.
    """

    architecture: str = ""
    start: str = ""
    dim: Count | None = None
    freeze: Literal["trunk"] | tuple[str, ...] = ()
    unfreeze_at: Weight = 0.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    imprint: Natural = 0
    dropout: Share | None = None
