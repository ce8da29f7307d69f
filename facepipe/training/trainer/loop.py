"""The training loop.

A step's batch and randomness depend on (seed, step, rank) only. Everything else is in the checkpoint. A run that was
killed and resumes therefore ends with exactly the same weights as one that was not, on the same kind of machine.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from facepipe.errors import AgreedError, FacepipeError
from facepipe.hashing import hash64
from facepipe.training.trainer import checkpointing, optim, schedule, state
from facepipe.training.trainer.checkpointing import CheckpointFolder
from facepipe.training.trainer.config import OptimConfig, ScheduleConfig, TrainingRunConfig
from facepipe.training.trainer.metrics_log import MetricsLog, TrainingProgress
from facepipe.training.trainer.mixed_precision import Gradients, MixedPrecision
from facepipe.training.trainer.ranks import Ranks
from facepipe.training.trainer.running_means import RunningMeans
from facepipe.training.trainer.schedule import ValidationHistory
from facepipe.training.trainer.task import Batch, BatchMaker, EpochTask, HasBatchMaker, TrainingTask

EndReason = Literal["done", "stopped", "interrupted"]
OnProgress = Callable[[TrainingProgress], None]
_ERROR = "why"  # key of an error among scores
# Processes that prepare batches for a GPU: more of them make no batch sooner.
_MAX_LOADERS = 8
# Scores that tell the scale of the space, and the share of it at which the space counts as collapsed.
_IMPOSTOR_DISTANCE = "impostor_distance"
_GENUINE_DISTANCE = "genuine_distance"
_COLLAPSED = 0.1


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs besides its task.

    Attributes:
        optim: the optimiser.
        schedule: the schedule.
        run: the run.
        frozen: names of the network's frozen parameters.
        unfreeze_step: step from which on no parameter is frozen; 0: never.
        layer_decay: factor on the learning rate per layer away from the output.
        validate_steps: steps between validations; the last step is validated as well. 0: no validation.
        identity: values by name that a checkpoint must have too; otherwise it belongs to another run.
        earlier: by name, what versions before gave as value for the same settings.
        starts_at_random: whether the start weights are random: trained weights of the same score are preferred to them,
            and the scale of their space says nothing.
    """

    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: TrainingRunConfig = field(default_factory=TrainingRunConfig)
    frozen: frozenset[str] = frozenset()
    unfreeze_step: int = 0
    layer_decay: float = 1.0
    validate_steps: int = 0
    identity: dict[str, str] = field(default_factory=dict)
    earlier: dict[str, frozenset[str]] = field(default_factory=dict)
    starts_at_random: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        end: done; stopped (early, because scores no longer rose or nothing was left to learn); or interrupted.
        step: steps done.
        steps: steps of the whole training.
        seconds: time of all attempts together.
        resumed: step that this attempt resumed from; 0: it started from the beginning.
        history: the validation of the start weights, and the best one in training.
    """

    end: EndReason
    step: int
    steps: int
    seconds: float
    resumed: int
    history: ValidationHistory


class TrainingLoop:
    """The training of a task on one rank.

    Args:
        task: what to train.
        settings: the loop's settings.
        ranks: this process among all processes of the training.
        should_stop: called after every step, or with several ranks at every line of the metrics. True ends the run
            cleanly.
    """

    def __init__(
        self, task: TrainingTask, settings: LoopSettings, ranks: Ranks, should_stop: Callable[[], bool] = lambda: False
    ):
        self.task = task
        self.settings = settings
        self.ranks = ranks
        self._should_stop = should_stop
        self._run_config = settings.run
        self._checkpoints = CheckpointFolder(self._run_config.output, self._run_config.keep)
        self._precision = MixedPrecision(self._run_config.precision, ranks.device)
        self._schedule = schedule.build_schedule(settings.schedule, task.steps_per_epoch)
        # Move network and head to the device, then build the optimiser on their parameters.
        task.net = task.net.to(ranks.device)
        task.objective = task.objective.to(ranks.device)
        task.net = task.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = optim.group_parameters(task.net, task.objective, settings.optim, settings.layer_decay)
        self._optimizer = optim.build_optimizer(groups, settings.optim)
        # Sharded parameters have whole gradients on each rank; only the shared ones are averaged.
        sharded = state.find_sharded_parameters(task.objective)
        parameters = optim.name_parameters(task.net, task.objective)
        self._shared = [p for name, p in parameters.items() if name not in sharded]
        self._gradients = Gradients(self._shared, [parameters[name] for name in sharded], ranks)
        self._history = ValidationHistory()
        self._resumed_step = 0
        self._earlier_seconds = 0.0

    def run(self, on_progress: OnProgress = lambda progress: None) -> Outcome:
        """Train to the end, from the last checkpoint if there is one.

        Args:
            on_progress: called with every line of the metrics, on the first rank.

        Raises:
            TrainingError: A loss is not finite, the space has collapsed, or the checkpoints are damaged or belong to a
                run with other settings. The last good checkpoint is kept.
        """
        # Only the first rank writes metrics and holds the lock; the others follow.
        if not self.ranks.is_first:
            self._restore()
            return self._train(lambda progress: None)
        with self._checkpoints.lock():
            self._restore()
            with MetricsLog(self._run_config.output, self._resumed_step, self._run_config.tensorboard) as metrics_log:

                def report(progress: TrainingProgress) -> None:
                    metrics_log.write(progress)
                    on_progress(progress)

                return self._train(report)

    def _train(self, report: OnProgress) -> Outcome:
        """Run the steps, epoch by epoch."""
        # Set up clock, means and mode for the step to resume from.
        self._began = time.monotonic()
        self._saved = self._began
        self._means = RunningMeans(self.ranks.device)
        self._set_mode(self._resumed_step)
        done = self._resumed_step
        end: EndReason | None = None
        if self._is_out_of_patience() and done < self._schedule.total:
            end = "stopped"
        # A run that resumes has the scores of its start in the checkpoint.
        if not done and self.settings.validate_steps:
            scores = self._validate(0)
            if scores:
                report(self._build_progress(0, scores))
        # Each epoch is prepared, and then its steps run until one ends the training.
        for steps in [] if end else self._iterate_epochs():
            end = self._prepare_epoch(done)
            for step, inputs in [] if end else self._iterate_batches(steps):
                self._step(step, inputs)
                done = step + 1
                end = self._finish_step(done, report)
                if end:
                    break
            if end:
                break
        return Outcome(
            end=end or "done",
            step=done,
            steps=self._schedule.total,
            seconds=self._measure_elapsed(),
            resumed=self._resumed_step,
            history=self._history,
        )

    def _iterate_epochs(self) -> Iterator[range]:
        """Yield the remaining steps: all at once, or epoch by epoch if the task prepares each epoch's batches."""
        step = self._resumed_step
        total = self._schedule.total
        length = self.task.steps_per_epoch if isinstance(self.task, EpochTask) else total
        while step < total:
            # A resumed run enters its epoch in the middle and leaves at the epoch's end.
            steps = range(step, min(total, step - step % length + length))
            yield steps
            step = steps.stop

    def _prepare_epoch(self, done: int) -> EndReason | None:
        """Let the task prepare its epoch's batches. The run ends if nothing is left to learn."""
        if not isinstance(self.task, EpochTask):
            return None
        # Preparing runs the network without training it, and does not count as throughput.
        with self._means.pause(), torch.no_grad():
            self.task.net.eval()
            can_learn = self.task.prepare_epoch(done // self.task.steps_per_epoch, self.ranks)
            self._set_mode(done)
        if can_learn:
            return None
        if not done:
            raise AgreedError("no triplet of the training set has a loss above 0: set a larger loss.margin")
        if done > self._resumed_step:
            self._save(done)
        return "stopped"

    def _iterate_batches(self, steps: range) -> Iterator[tuple[int, Batch]]:
        """Yield steps and their batches, which loader processes prepare ahead if there are any."""
        # Pinned memory lets the copy to the device go on during the computation.
        on_gpu = self.ranks.device.type == "cuda"
        loaders = self._run_config.loaders
        if loaders is None:
            loaders = count_loaders(torch.get_num_threads()) if on_gpu else 0
        maker = self.task.batches if isinstance(self.task, HasBatchMaker) else self.task
        batches = DataLoader(
            _RankBatches(maker, self.ranks.rank, self.ranks.world),
            batch_size=None,
            sampler=steps,
            num_workers=loaders,
            prefetch_factor=4 if loaders else None,
            # A process that has CUDA, NCCL and Ray's threads must not be forked.
            multiprocessing_context="forkserver" if loaders and on_gpu else None,
            pin_memory=on_gpu,
        )
        for step, batch in zip(steps, batches, strict=True):
            yield step, tuple(tensor.to(self.ranks.device, non_blocking=on_gpu) for tensor in batch)

    def _set_mode(self, step: int) -> None:
        unfrozen = 0 < self.settings.unfreeze_step <= step
        optim.freeze_parameters(self.task.net, frozenset() if unfrozen else self.settings.frozen)
        self.task.objective.train()

    def _step(self, step: int, inputs: Batch) -> None:
        """Train on one batch."""
        if step == self.settings.unfreeze_step:
            self._set_mode(step)
        # Seed each step and rank, so that dropout is the same after a resume.
        torch.manual_seed(hash64("step", str(self._run_config.seed), str(step), str(self.ranks.rank)))
        optim.set_learning_rate(self._optimizer, self._get_learning_rate(step))
        with self._precision.autocast():
            loss, figures = self.task.compute_loss(inputs)
        self._precision.backward(loss)
        # Average the shared gradients before they are clipped; sharded ones are complete.
        self.ranks.average(p.grad for p in self._shared if p.grad is not None)
        self._precision.step(self._optimizer, self.settings.optim.clip, self._gradients)
        self._means.add(step, loss.detach(), len(inputs[0]) * self.ranks.world, figures)

    def _get_learning_rate(self, step: int) -> float:
        return self.settings.optim.peak_rate * self._schedule.compute_factor(step, self._history.reductions)

    def _finish_step(self, done: int, report: OnProgress) -> EndReason | None:
        """Do what is due after a step: validate, report, save.

        Args:
            done: steps done.
            report: called with the line of the metrics.

        Returns:
            Why the run ends here, or None if it continues.
        """
        # Find out what is due after this step.
        is_last = done == self._schedule.total
        log_due = is_last or done % self._run_config.log_every == 0
        interval = self.settings.validate_steps
        validation_due = interval > 0 and (is_last or done % interval == 0)
        checkpoint_steps = self._run_config.checkpoint_steps
        checkpoint_due = bool(checkpoint_steps and done % checkpoint_steps == 0)
        if self.ranks.world > 1 and not (log_due or validation_due or checkpoint_due):
            return None  # ranks agree on anything else only at steps that all of them can compute
        # Ranks agree on a stop or an overdue checkpoint, because only some may see it.
        stop, overdue = self.ranks.reduce_max([self._should_stop(), self._is_checkpoint_overdue()])
        if not (log_due or validation_due or checkpoint_due or stop or overdue):
            return None
        # A bad loss must not get into a checkpoint, so it is looked for first.
        self._check_losses(done)
        scores = self._validate(done) if validation_due else {}
        if log_due or scores:
            report(self._build_progress(done, scores))
        if is_last or validation_due or checkpoint_due or stop or overdue:
            self._save(done)
        if is_last:
            return "done"
        if stop:
            return "interrupted"
        return "stopped" if self._is_out_of_patience() else None

    def _is_out_of_patience(self) -> bool:
        return 0 < self._run_config.patience <= self._history.stale

    def _is_checkpoint_overdue(self) -> bool:
        return self.ranks.is_first and time.monotonic() - self._saved > self._run_config.checkpoint_seconds

    def _check_losses(self, done: int) -> None:
        """Raise AgreedError for the first step whose loss was not finite, on any rank."""
        # The first bad step over all ranks: the maximum of negated steps is their minimum.
        (negated_step,) = self.ranks.reduce_max([-self._means.find_first_bad_step()])
        if negated_step > -math.inf:
            step = int(-negated_step)
            raise AgreedError(
                f"the loss is not finite at step {step + 1} (epoch {step // self.task.steps_per_epoch + 1}, learning "
                f"rate {self._get_learning_rate(step):.3g}): lower optim.lr, set optim.clip or lengthen "
                f"schedule.warmup. {self._describe_checkpoint()}"
            )

    def _describe_checkpoint(self) -> str:
        step = self._checkpoints.last_step
        if not step:
            return "No checkpoint was written yet"
        path = str(self._checkpoints.last_path)
        return f"The checkpoint of step {step} is kept; set model.start = {path!r} to continue from it"

    def _validate(self, done: int) -> dict[str, float]:
        """Score the network on the first rank, and keep the network if it is the best so far.

        Args:
            done: steps done; 0: the network is the start.
        """
        # The first rank scores, and all ranks get the scores.
        with self._means.pause(), torch.no_grad():
            self.task.net.eval()
            scores = self.ranks.broadcast(self._compute_scores() if self.ranks.is_first else {})
            self._set_mode(done)
        if _ERROR in scores:
            if not done:
                raise AgreedError(f"the weights that training starts from cannot be scored: {scores[_ERROR]}")
            raise AgreedError(f"the validation at step {done} failed: {scores[_ERROR]}. {self._describe_checkpoint()}")
        if scores:
            self._record(scores, done)
            # Weights that are not finite must not become the best model.
            if self._history.model_step == done:
                self._check_weights(done)
            if self.ranks.is_first and self._history.model_step == done:
                content = {"net": self.task.net.state_dict(), "step": done, "scores": scores}
                checkpointing.write_checkpoint(self._checkpoints.best_path, content)
        return scores

    def _record(self, scores: dict[str, float], done: int) -> None:
        """Add a validation to the history.

        Raises:
            AgreedError: The space has collapsed.
        """
        if not done:
            self._history = self._history.record_start(scores)
            return
        # A collapsed space must not get into a checkpoint, even if its score is still good. The space of random weights
        # has no scale that could be lost: its distances may fall to nearly nothing before they grow.
        start = self._history.start
        if not self.settings.starts_at_random and _has_collapsed(scores, start):
            raise AgreedError(
                f"the space has collapsed at step {done}: {_describe_distances(scores, start)}. Lower optim.lr "
                f"({self.settings.optim.peak_rate:g}), set optim.clip or lengthen schedule.warmup, and start again "
                f"with --fresh. {self._describe_best()}"
            )
        self._history = self._history.record(
            scores, done, self.settings.schedule, starts_at_random=self.settings.starts_at_random
        )

    def _describe_best(self) -> str:
        step = self._history.model_step
        weights = f"The best weights, of step {step}," if step else "The start weights"
        return f"{weights} are kept in {str(self._checkpoints.best_path)!r}"

    def _compute_scores(self) -> dict[str, Any]:
        try:
            return dict(self.task.validate(self.task.net))
        except FacepipeError as error:
            return {_ERROR: str(error)}  # the other ranks must learn about it

    def _build_progress(self, done: int, scores: dict[str, float]) -> TrainingProgress:
        means = self._means.finish_window(self.ranks)
        return TrainingProgress(
            step=done,
            steps=self._schedule.total,
            epoch=done / self.task.steps_per_epoch,
            loss=means.loss,
            lr=self._get_learning_rate(max(0, done - 1)),
            speed=means.images_per_second,
            seconds=self._measure_elapsed(),
            figures=means.figures,
            scores=scores,
        )

    def _measure_elapsed(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._began

    def _check_weights(self, done: int) -> None:
        """Raise AgreedError if a weight is not finite, on any rank: each rank has its own slice of a sharded head."""
        is_bad = not state.has_finite_state(self.task.net, self.task.objective)
        if self.ranks.reduce_max([is_bad])[0]:
            if not done:
                raise AgreedError("the weights that training starts from are not finite: set another model.start")
            raise AgreedError(f"the weights are not finite after step {done}. {self._describe_checkpoint()}")

    def _save(self, done: int) -> None:
        """Write a checkpoint. All ranks call it, because sharded tensors are gathered."""
        with self._means.pause():
            self._check_weights(done)
            content = state.build_state_dict(self.task, self._optimizer, self._precision.scaler)
            if self.ranks.is_first:
                content["step"] = done
                content["seconds"] = self._measure_elapsed()
                content["standing"] = self._history.to_dict()
                content["identity"] = self.settings.identity
                self._checkpoints.save(content)
        self._saved = time.monotonic()

    def _restore(self) -> None:
        """Resume from the last checkpoint, if there is one."""
        # The first rank loads first, because it renames damaged files.
        if not self.ranks.is_first:
            self.ranks.wait()
        content = self._checkpoints.load()
        if self.ranks.is_first:
            self.ranks.wait()
        if content is None:
            return
        self._check_identity(content["identity"])
        state.load_state_dict(content, self.task, self._optimizer, self._precision.scaler)
        self._history = state.load_validation_history(content)
        self._resumed_step = content["step"]
        self._earlier_seconds = content["seconds"]

    def _check_identity(self, identity: dict[str, str]) -> None:
        """Raise AgreedError if the checkpoint belongs to a run with other settings."""
        # A resumed run with other settings would end with weights that no single config explains.
        earlier = self.settings.earlier
        changed = [
            name
            for name, value in self.settings.identity.items()
            if identity.get(name) not in {value, *earlier.get(name, ())}
        ]
        if changed:
            raise AgreedError(
                f"{self._run_config.output!r} holds checkpoints of a run with other settings ({', '.join(changed)}): "
                "start again with --fresh, or set another run.output"
            )


def _has_collapsed(scores: dict[str, float], start: dict[str, float]) -> bool:
    """Tell whether impostors are at a tenth of the distance, or less, that they had at the start."""
    before = start.get(_IMPOSTOR_DISTANCE, 0.0)
    return before > 0 and scores.get(_IMPOSTOR_DISTANCE, before) <= _COLLAPSED * before


def _describe_distances(scores: dict[str, float], start: dict[str, float]) -> str:
    text = (
        f"the median distance of impostor pairs is {scores[_IMPOSTOR_DISTANCE]:.4f}, and was "
        f"{start[_IMPOSTOR_DISTANCE]:.4f} at the start"
    )
    if _GENUINE_DISTANCE in scores and _GENUINE_DISTANCE in start:
        text += f" (of genuine pairs {scores[_GENUINE_DISTANCE]:.4f}, was {start[_GENUINE_DISTANCE]:.4f})"
    return text


def count_loaders(cpus: int) -> int:
    """Count the processes that prepare batches for a GPU, of the CPUs of its worker. The worker itself keeps one."""
    return max(0, min(_MAX_LOADERS, cpus - 1))


class _RankBatches(Dataset[Batch]):
    """A rank's shares of the batches, by step."""

    def __init__(self, maker: BatchMaker, rank: int, world: int):
        self._maker = maker
        self._rank = rank
        self._world = world

    def __getitem__(self, step: int) -> Batch:
        return self._maker.make_batch(step, self._rank, self._world)
