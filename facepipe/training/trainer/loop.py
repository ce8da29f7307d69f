"""The training loop. Step t's batch and randomness depend on (seed, t, rank) alone; all else is in the checkpoint.

So a run that was killed and goes on ends with the very weights of one that was not, on the same kind of machine.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from facepipe.errors import AgreedError, FacepipeError
from facepipe.hashing import hash64
from facepipe.training.trainer import checkpointing, optim, schedule
from facepipe.training.trainer import state as snapshot
from facepipe.training.trainer.checkpointing import Checkpoints
from facepipe.training.trainer.config import OptimConfig, RunConfig, ScheduleConfig
from facepipe.training.trainer.metrics_log import Journal, Progress
from facepipe.training.trainer.mixed_precision import Gradients, Precision
from facepipe.training.trainer.ranks import Ranks
from facepipe.training.trainer.running_means import Window
from facepipe.training.trainer.schedule import Standing
from facepipe.training.trainer.state import sliced
from facepipe.training.trainer.task import Batch, Renewed, Task

End = Literal["done", "stopped", "interrupted"]
Tell = Callable[[Progress], None]
_WHY = "why"


@dataclass(frozen=True)
class Settings:
    """What the loop is told beside its task.

    frozen: names of the network's parameters that stay; unfreeze_step: from here on none does (0: never)
    validate_steps: steps between validations; the last step is validated as well. 0: none
    identity: what a checkpoint must agree with, by name; else it is of another run
    """

    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)
    frozen: frozenset[str] = frozenset()
    unfreeze_step: int = 0
    layer_decay: float = 1.0
    validate_steps: int = 0
    identity: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: done, stopped (early: scores no longer rose, or nothing was left to learn) or interrupted; and
    what came of it."""

    end: End
    step: int
    steps: int
    seconds: float
    resumed: int
    standing: Standing


class Loop:
    """Trains a task. stop: asked after every step (by several workers: at every line); True ends the run cleanly."""

    def __init__(self, task: Task, settings: Settings, ranks: Ranks, stop: Callable[[], bool] = lambda: False):
        self.task, self.settings, self.ranks, self._stop = task, settings, ranks, stop
        self._run = settings.run
        self._checkpoints = Checkpoints(self._run.output, self._run.keep)
        self._precision = Precision(self._run.precision, ranks.device)
        self._schedule = schedule.lay_out(settings.schedule, task.steps_per_epoch)
        task.net, task.objective = task.net.to(ranks.device), task.objective.to(ranks.device)
        task.net = task.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        grouped = optim.groups(task.net, task.objective, settings.optim, settings.layer_decay)
        self._optimizer = optim.make(grouped, settings.optim)
        self._own = sliced(task.objective)
        every = optim.named(task.net, task.objective)
        self._shared = [p for name, p in every.items() if name not in self._own]
        self._gradients = Gradients(self._shared, [every[name] for name in self._own], ranks)
        self._standing, self._resumed, self._before = Standing(), 0, 0.0

    def __call__(self, tell: Tell = lambda progress: None) -> Outcome:
        """Train from the last checkpoint, if there is one, to the end. tell: gets every line of the metrics.

        Raises TrainingError where a loss is not finite, or checkpoints are damaged or of a run with other settings;
        the last good checkpoint stays.
        """
        with self._alone():
            self._restore()
            with self._journal() as journal:

                def told(progress: Progress) -> None:
                    journal(progress)
                    tell(progress)

                return self._train(told if self.ranks.first else lambda progress: None)

    def _alone(self) -> AbstractContextManager[None]:
        return self._checkpoints.held() if self.ranks.first else nullcontext()

    def _journal(self) -> AbstractContextManager[Tell]:
        if not self.ranks.first:
            return nullcontext(lambda progress: None)
        return Journal(self._run.output, self._resumed, self._run.tensorboard)

    def _train(self, tell: Tell) -> Outcome:
        self._began = self._saved = time.monotonic()
        self._window = Window(self.ranks.device)
        self._set_mode(self._resumed)
        done = self._resumed
        end: End | None = "stopped" if self._stale() and done < self._schedule.total else None
        for steps in [] if end else self._stretches():
            end = self._renew(done)
            for step, inputs in [] if end else self._batches(steps):
                self._step(step, inputs)
                done = step + 1
                end = self._after(done, tell)
                if end:
                    break
            if end:
                break
        return Outcome(end or "done", done, self._schedule.total, self._elapsed(), self._resumed, self._standing)

    def _stretches(self) -> Iterator[range]:
        """The steps to go: all of them, or epoch by epoch where batches are prepared anew for each."""
        at, total = self._resumed, self._schedule.total
        each = self.task.steps_per_epoch if isinstance(self.task, Renewed) else total
        while at < total:
            stretch = range(at, min(total, at - at % each + each))
            yield stretch
            at = stretch.stop

    def _renew(self, done: int) -> End | None:
        """Prepare the epoch's batches where the task does so; the run ends where nothing is left to learn."""
        if not isinstance(self.task, Renewed):
            return None
        with self._window.paused(), torch.no_grad():
            self.task.net.eval()
            more = self.task.renew(done // self.task.steps_per_epoch, self.ranks)
            self._set_mode(done)
        if more:
            return None
        if not done:
            raise AgreedError("no triplet of the training set costs anything: set a larger loss.margin")
        if done > self._resumed:
            self._save(done)
        return "stopped"

    def _batches(self, steps: range) -> Iterator[tuple[int, Batch]]:
        """Steps and their batches, prepared ahead where there are loaders."""
        loaders, on_gpu = self._run.loaders, self.ranks.device.type == "cuda"
        source = _Shares(self.task, self.ranks.rank, self.ranks.world)
        ready = DataLoader(
            source,
            batch_size=None,
            sampler=steps,
            num_workers=loaders,
            prefetch_factor=4 if loaders else None,
            pin_memory=on_gpu,
        )
        for step, batch in zip(steps, ready, strict=True):
            yield step, tuple(tensor.to(self.ranks.device, non_blocking=on_gpu) for tensor in batch)

    def _set_mode(self, step: int) -> None:
        thawed = 0 < self.settings.unfreeze_step <= step
        optim.freeze(self.task.net, frozenset() if thawed else self.settings.frozen)
        self.task.objective.train()

    def _step(self, step: int, inputs: Batch) -> None:
        if step == self.settings.unfreeze_step:
            self._set_mode(step)
        torch.manual_seed(hash64("step", str(self._run.seed), str(step), str(self.ranks.rank)))
        optim.set_rate(self._optimizer, self._rate(step))
        with self._precision.autocast():
            loss, figures = self.task.loss(inputs)
        self._precision.backward(loss)
        self.ranks.mean(p.grad for p in self._shared if p.grad is not None)
        self._precision.step(self._optimizer, self.settings.optim.clip, self._gradients)
        self._window.add(step, loss.detach(), len(inputs[0]) * self.ranks.world, figures)

    def _rate(self, step: int) -> float:
        return self.settings.optim.lr * self._schedule.factor(step, self._standing.reductions)

    def _after(self, done: int, tell: Tell) -> End | None:
        """What is due after so many steps: a line, a validation, a checkpoint; how the run ends, if it ends here."""
        last = done == self._schedule.total
        line = last or done % self._run.log_every == 0
        judged = self.settings.validate_steps > 0 and (last or done % self.settings.validate_steps == 0)
        planned = bool(self._run.checkpoint_steps and done % self._run.checkpoint_steps == 0)
        if self.ranks.world > 1 and not (line or judged or planned):
            return None  # several workers agree at steps that all know of
        stop, due = self.ranks.most([self._stop(), self._overdue()])
        if not (line or judged or planned or stop or due):
            return None
        self._check(done)
        scores = self._validate(done) if judged else {}
        if line or scores:
            tell(self._progress(done, scores))
        if last or judged or planned or stop or due:
            self._save(done)
        return "done" if last else "interrupted" if stop else "stopped" if self._stale() else None

    def _stale(self) -> bool:
        return 0 < self._run.patience <= self._standing.stale

    def _overdue(self) -> bool:
        return self.ranks.first and time.monotonic() - self._saved > self._run.checkpoint_seconds

    def _check(self, done: int) -> None:
        """Raises TrainingError at the first step since the last check whose loss was not finite, on any worker."""
        (found,) = self.ranks.most([-self._window.first_bad()])
        if found > -math.inf:
            step = int(-found)
            raise AgreedError(
                f"the loss is not finite at step {step + 1} (epoch {step // self.task.steps_per_epoch + 1}, learning "
                f"rate {self._rate(step):.3g}): lower optim.lr, set optim.clip or lengthen schedule.warmup. "
                + self._kept()
            )

    def _kept(self) -> str:
        kept = self._checkpoints.last_step
        if not kept:
            return "No checkpoint had been written yet"
        return f"The checkpoint of step {kept} is kept; model.start = {str(self._checkpoints.last)!r} goes on from it"

    def _validate(self, done: int) -> dict[str, float]:
        """Scores of the network as it stands; the best one so far is kept. Takes the first worker alone."""
        with self._window.paused(), torch.no_grad():
            self.task.net.eval()
            scores = self.ranks.from_first(self._scored() if self.ranks.first else {})
            self._set_mode(done)
        if _WHY in scores:
            raise AgreedError(f"the validation at step {done} failed: {scores[_WHY]}. {self._kept()}")
        if scores:
            self._standing = self._standing.after(scores, done, self.settings.schedule)
            if self._standing.step == done:
                self._finite(done)
            if self.ranks.first and self._standing.step == done:
                content = {"net": self.task.net.state_dict(), "step": done, "scores": scores}
                checkpointing.write(self._checkpoints.best, content)
        return scores

    def _scored(self) -> dict[str, Any]:
        try:
            return dict(self.task.validate(self.task.net))
        except FacepipeError as error:
            return {_WHY: str(error)}  # the other ranks must learn of it

    def _progress(self, done: int, scores: dict[str, float]) -> Progress:
        loss, figures, speed = self._window.close(self.ranks)
        epoch = done / self.task.steps_per_epoch
        spent = self._elapsed()
        return Progress(done, self._schedule.total, epoch, loss, self._rate(done - 1), speed, spent, figures, scores)

    def _elapsed(self) -> float:
        return self._before + time.monotonic() - self._began

    def _finite(self, done: int) -> None:
        bad = not snapshot.finite(self.task.net, self.task.objective)
        if self.ranks.most([bad])[0]:  # a slice of a head may be bad on one rank alone
            raise AgreedError(f"the weights are not finite after step {done}. {self._kept()}")

    def _save(self, done: int) -> None:
        with self._window.paused():
            self._finite(done)
            content = snapshot.take(self.task, self._optimizer, self._precision.scaler)
            if self.ranks.first:
                about = {"step": done, "seconds": self._elapsed(), "standing": vars(self._standing)}
                self._checkpoints.save({**content, **about, "identity": self.settings.identity})
        self._saved = time.monotonic()

    def _restore(self) -> None:
        if not self.ranks.first:
            self.ranks.wait()  # the first one sets damaged files aside
        content = self._checkpoints.load()
        if self.ranks.first:
            self.ranks.wait()
        if content is None:
            return
        self._same_run(content["identity"])
        snapshot.give(content, self.task, self._optimizer, self._precision.scaler)
        self._standing, self._resumed = snapshot.standing(content), content["step"]
        self._before = content["seconds"]

    def _same_run(self, identity: dict[str, str]) -> None:
        other = [name for name, value in self.settings.identity.items() if identity.get(name) != value]
        if other:
            raise AgreedError(
                f"{self._run.output!r} holds the checkpoints of a run with other {', '.join(other)}: begin again "
                "with --fresh, or give another run.output"
            )


class _Shares(Dataset[Batch]):
    """A rank's shares of the batches, by step."""

    def __init__(self, task: Task, rank: int, world: int):
        self._batch, self._rank, self._world = task.batch, rank, world

    def __getitem__(self, step: int) -> Batch:
        return self._batch(step, self._rank, self._world)
