"""The settings of the training loop: the optimiser, the schedule and the run."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
# Peak learning rates by default: from random weights, and from trained ones.
TRAINING_RATE = 0.1
FINE_TUNING_RATE = 0.001


@dataclass(frozen=True)
class OptimConfig:
    """Configure the optimiser.

    The head is what the loss learns beside the network: class centres and parameters of margins.

    Attributes:
        optimizer: algorithm: sgd, adam or adamw.
        lr: peak learning rate of the network, for the whole batch of all workers; default: 0.1 from random weights,
            0.001 from the weights of `model.start`.
        head_lr: factor on the learning rate of the head.
        momentum: momentum of sgd.
        nesterov: use Nesterov's momentum (sgd).
        beta1: decay of the first moment (adam and adamw).
        beta2: decay of the second moment (adam and adamw).
        eps: term that keeps divisions stable (adam and adamw).
        weight_decay: weight decay of the network's weights.
        head_weight_decay: weight decay of the head's weights; default: `weight_decay`.
        norm_weight_decay: weight decay of biases and of the weights of normalisation layers.
        clip: maximum norm of all gradients together; larger gradients are scaled down to it. 0: no limit.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive | None = None
    head_lr: Positive = 1.0
    momentum: Below1 = 0.9
    nesterov: bool = True
    beta1: Below1 = 0.9
    beta2: Below1 = 0.999
    eps: Positive = 1e-8
    weight_decay: Weight = 5e-4
    head_weight_decay: Weight | None = None
    norm_weight_decay: Weight = 0.0
    clip: Weight = 0.0

    def resolve(self, *, has_start: bool) -> "OptimConfig":
        """Return the settings with a learning rate.

        Args:
            has_start: whether the network starts from trained weights, which a rate for random ones would ruin.
        """
        if self.lr is not None:
            return self
        return replace(self, lr=FINE_TUNING_RATE if has_start else TRAINING_RATE)

    @property
    def peak_rate(self) -> float:
        """The peak learning rate."""
        return TRAINING_RATE if self.lr is None else self.lr


@dataclass(frozen=True)
class ScheduleConfig:
    """Configure the length of the training and the learning rate.

    Lengths are in epochs, or in steps if `steps` is set.

    Attributes:
        epochs: length of the training in epochs.
        steps: length of the training in steps, instead of `epochs`.
        policy: how the learning rate falls. constant: not at all. step: times `gamma` at each milestone. cosine: along
            half a cosine. poly: along a polynomial of degree `power`. plateau: times `gamma` after more than
            `plateau_patience` validations without a better score.
        milestones: where policy step lowers the learning rate.
        gamma: factor on the learning rate at each reduction (step and plateau).
        power: degree of the polynomial (poly).
        plateau_patience: validations without a better score before a reduction (plateau).
        warmup: length of the linear rise from zero at the beginning.
        final: share of the peak learning rate at which cosine, poly and plateau end.
        validate: length between two validations; default: one epoch. The start weights and the last step are validated
            as well, and the network with the best score becomes the model. 0: no validation, and the last network
            becomes the model.
    """

    epochs: Positive = 20.0
    steps: Count | None = None
    policy: Literal["constant", "step", "cosine", "poly", "plateau"] = "cosine"
    milestones: tuple[Positive, ...] = ()
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    power: Positive = 2.0
    plateau_patience: Natural = 2
    warmup: Weight = 0.0
    final: Share = 0.0
    validate: Weight | None = None


@dataclass(frozen=True)
class TrainingRunConfig:
    """Configure where the training runs and what it writes.

    Only seed, precision, deterministic and patience change the trained weights. So does the number of workers if the
    training uses batch norm, mining or partial FC, which see one worker's share of the batch. Otherwise it changes the
    last digits only.

    Attributes:
        output: folder of the model, the checkpoints, the metrics and the report.
        chips: folder of the aligned faces, which several runs can share; default: OUTPUT/chips.
        runner: where training runs: ray (workers of Ray Train) or inline (this process).
        workers: processes that share each batch, one per GPU; inline has one.
        device: auto, cpu or cuda.
        precision: fp32 (IEEE), tf32, bf16, fp16 (with loss scaling), or auto: bf16 on a GPU that supports it, otherwise
            fp32.
        seed: random seed of weights, batches, augmentation and dropout.
        threads: CPU threads per worker; default: an equal share of the machine.
        loaders: processes per worker that prepare batches ahead; 0: the worker prepares its batches itself; default: on
            a GPU one less than the worker has CPUs, and at most 8, otherwise 0.
        checkpoint_steps: write a checkpoint every so many steps, and at every validation and at the end.
        checkpoint_seconds: write a checkpoint at least every so many seconds.
        keep: checkpoints to keep; if the last one is damaged, training resumes from the one before.
        log_every: steps between two lines of metrics.jsonl.
        patience: validations without a better score after which training stops early; 0: never.
        failures: how often Ray restarts lost workers, which resume from the last checkpoint.
        deterministic: on GPUs, use only algorithms that give the same bits every time.
        tensorboard: also write curves for TensorBoard.
    """

    output: str = ""
    chips: str = ""
    runner: Literal["ray", "inline"] = "ray"
    workers: Count = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    seed: Natural = 0
    threads: Count | None = None
    loaders: Natural | None = None
    checkpoint_steps: Count | None = None
    checkpoint_seconds: Positive = 600.0
    keep: Annotated[int, Field(ge=1, le=10)] = 2
    log_every: Count = 10
    patience: Natural = 0
    failures: Natural = 3
    deterministic: bool = False
    tensorboard: bool = False
