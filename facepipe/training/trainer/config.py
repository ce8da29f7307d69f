"""What training can be told, whatever is trained: the model, the optimiser, the schedule, the run."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class OptimConfig:
    """How weights are moved. The head is what the loss brings: class centres, margins' parameters.

    optimizer: sgd, adam or adamw
    lr: learning rate of the network at the schedule's height, for the whole batch of all workers
    head_lr: factor on it for the head
    momentum: of sgd, Nesterov's where `nesterov`; beta1, beta2, eps: of adam and adamw
    weight_decay: of the network's weights; head_weight_decay: of the head's, by default the same
    norm_weight_decay: of biases and of normalisation layers' weights
    clip: largest norm of all gradients together; larger ones are scaled down to it. 0: none
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive = 0.1
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


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, and how the learning rate falls. Lengths are epochs, or steps where `steps` is given.

    epochs: length of the training; steps: its length in steps, instead
    policy: constant, step (times `gamma` at each milestone), cosine, poly (of degree `power`), or plateau (times
        `gamma` after more than `plateau_patience` validations without a better score)
    milestones: where policy step falls
    warmup: length of the linear rise from nothing at the beginning
    final: share of the rate that cosine, poly and plateau end at
    validate: length between validations, by default an epoch; there is one at the end as well, and the best network is
        the result. 0: none, and the last network is
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
class RunConfig:
    """Where the training runs and what it leaves. Of these only seed, precision, deterministic and patience change
    the weights; and the number of workers, since batch norm, mining and partial FC see a worker's share of the batch.
    Without these it changes the last digits alone.

    output: folder of the model, the checkpoints, the metrics and the report
    chips: folder of the faces as the network takes them, which several runs may share; by default OUTPUT/chips
    runner: ray (workers of Ray Train) or inline (this process)
    workers: processes that share each batch, one a GPU; inline has one
    device: auto, cpu or cuda
    precision: fp32, bf16, fp16 (with loss scaling), or auto: bf16 on a GPU that has it, else fp32
    seed: of weights, batches, augmentation and dropout
    threads: of a worker on the CPU; by default its share of the machine
    loaders: processes of each worker that prepare batches ahead; 0: none, batches are made where they are used
    checkpoint_steps, checkpoint_seconds: a checkpoint is written at least so often, at every validation, and at the end
    keep: checkpoints that are kept; where the last is damaged the one before is taken
    log_every: steps between two lines of metrics.jsonl
    patience: validations without a better score after which training stops; 0: it does not
    failures: how often Ray starts lost workers again, which go on from the last checkpoint
    deterministic: on GPUs, only algorithms that give the same bits every time
    tensorboard: write curves for TensorBoard as well
    """

    output: str = ""
    chips: str = ""
    runner: Literal["ray", "inline"] = "ray"
    workers: Count = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: Natural = 0
    threads: Count | None = None
    loaders: Natural = 0
    checkpoint_steps: Count | None = None
    checkpoint_seconds: Positive = 600.0
    keep: Annotated[int, Field(ge=1, le=10)] = 2
    log_every: Count = 10
    patience: Natural = 0
    failures: Natural = 3
    deterministic: bool = False
    tensorboard: bool = False
