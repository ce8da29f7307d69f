"""Training in one process, or in workers of Ray Train. Both run the same loop, which resumes from its checkpoints."""

import os
import re
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from facepipe import errors
from facepipe.errors import AgreedError, ConfigError, FacepipeError, ModelError, WorkerError
from facepipe.models.runtime.device import resolve_device
from facepipe.models.runtime.memory import keep_freed_memory
from facepipe.training.trainer import metrics_log
from facepipe.training.trainer.checkpointing import FOLDER
from facepipe.training.trainer.config import TrainingRunConfig
from facepipe.training.trainer.loop import LoopSettings, OnProgress, Outcome, TrainingLoop, count_loaders
from facepipe.training.trainer.mixed_precision import choose_precision
from facepipe.training.trainer.ranks import Ranks
from facepipe.training.trainer.task import TrainingTask
from pipelines.runtime.runners import ray as ray_runner

_RAY_FOLDER = re.compile(r"\.ray-[0-9a-f]{8}")
_STOP = "stop"  # a file beside the checkpoints that asks workers to end
_COLLECTIVE_TIMEOUT_S = 4 * 3600.0  # the others wait while the first rank validates
_POLL_S = 0.5
_MAX_ERROR_CHARACTERS = 300


class TrainingPlan(Protocol):
    """A recipe for a task. It is pickled to every worker, which builds the task there."""

    @property
    def run(self) -> TrainingRunConfig:
        """The settings of the run."""

    def build(self) -> tuple[TrainingTask, LoopSettings]:
        """Build the task and the settings of its loop."""


@dataclass(frozen=True)
class WorkerDevice:
    """What each worker computes on.

    Attributes:
        name: cpu or cuda.
        threads: CPU threads per worker.
        cpus: CPUs per worker that Ray sets aside, for the worker and its loaders.
    """

    name: str
    threads: int
    cpus: int = 1


def check_device(run: TrainingRunConfig) -> None:
    """Check the device and the precision of a run on this machine, before anything is started.

    Raises:
        ModelError: The run needs a GPU, but this machine has none.
        ConfigError: The device does not support the precision.
    """
    import torch

    if run.runner == "inline" or "RAY_ADDRESS" not in os.environ:
        choose_precision(run.precision, torch.device(resolve_device(run.device)))


def train_inline(plan: TrainingPlan, on_progress: OnProgress, should_stop: Callable[[], bool]) -> Outcome:
    """Train in this process.

    Args:
        plan: what to train.
        on_progress: called with every line of the metrics.
        should_stop: called after every step; True ends the run cleanly.
    """
    import torch

    ranks = Ranks(0, 1, torch.device(resolve_device(plan.run.device)))
    # The number of threads is a setting of the whole process, which is restored for the caller.
    threads_before = torch.get_num_threads()
    try:
        return _run_loop(plan, ranks, plan.run.threads or _count_cpus(), on_progress, should_stop)
    finally:
        torch.set_num_threads(threads_before)


def _count_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _run_loop(
    plan: TrainingPlan, ranks: Ranks, threads: int, on_progress: OnProgress, should_stop: Callable[[], bool]
) -> Outcome:
    """Set up torch in this process and run the loop."""
    import torch

    torch.set_num_threads(threads)
    keep_freed_memory()
    # The deterministic mode needs this variable before the first use of a GPU's matrix library.
    if plan.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(plan.run.deterministic)
    task, settings = plan.build()
    return TrainingLoop(task, settings, ranks, should_stop).run(on_progress)


class RayTraining:
    """Training in workers of Ray Train, on this machine or on the cluster that RAY_ADDRESS names."""

    def __init__(self, plan: TrainingPlan):
        self._plan = plan
        self._run_config = plan.run
        self._stop_file = Path(plan.run.output) / FOLDER / _STOP

    def run(self, on_progress: OnProgress, should_stop: Callable[[], bool]) -> Outcome:
        """Train, and return the outcome of the first worker.

        Args:
            on_progress: called with new lines of the metrics.
            should_stop: polled while workers run; True asks them to end cleanly.

        Raises:
            WorkerError: Workers were lost more often than `run.failures` allows.
        """
        device = self._choose_device(ray_runner.start())
        try:
            # A stop file that an earlier run left would end this one at once.
            self._stop_file.unlink(missing_ok=True)
            box: dict[str, Any] = {}
            # Ray would handle Ctrl-C itself in the main thread, and end workers in the middle of a step.
            thread = threading.Thread(target=self._fit, args=(device, box), daemon=True)
            thread.start()
            self._watch(thread, on_progress, should_stop)
            return _get_outcome(box)
        finally:
            self._stop_file.unlink(missing_ok=True)
            ray_runner.stop()

    def _choose_device(self, resources: Any) -> WorkerDevice:
        """Choose the device and threads of workers.

        Raises:
            ConfigError: Ray has fewer CPUs than workers, or some GPUs but fewer than workers.
            ModelError: The run needs more GPUs than Ray has.
        """
        run = self._run_config
        device = run.device
        # Use GPUs if there is one per worker, CPUs if there is none. With some GPUs the user must decide.
        if device == "auto":
            if 0 < resources.gpus < run.workers:
                raise ConfigError(
                    f"run.workers={run.workers}, but Ray has {resources.gpus} GPUs: lower it, or set run.device"
                )
            device = "cuda" if resources.gpus >= run.workers else "cpu"
        if device == "cuda" and resources.gpus < run.workers:
            raise ModelError(f"run.workers={run.workers} on cuda needs as many GPUs, but Ray has {resources.gpus}")
        if resources.cpus < run.workers:
            raise ConfigError(f"run.workers={run.workers}, but Ray has {resources.cpus} CPUs: lower it")
        threads = run.threads or max(1, resources.cpus // run.workers)
        if device != "cuda":
            return WorkerDevice(device, threads)
        # Loaders need CPUs, of the machine that has the fewest per GPU, so that Ray finds a place for each worker.
        cpus = min(threads, resources.cpus_per_gpu or threads)
        loaders = count_loaders(cpus) if run.loaders is None else run.loaders
        return WorkerDevice(device, threads, max(1, min(cpus, 1 + loaders)))

    def _fit(self, device: WorkerDevice, box: dict[str, Any]) -> None:
        """Run Ray Train, and put its result or its error into the box."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        # The results folder is only for the cluster's own state: checkpoints are written by the loop.
        on_gpu = device.name == "cuda"
        # The name is drawn at random, so that what is deleted is ours: at the end, and what a killed run left.
        for leftover in Path(self._run_config.output).glob(".ray-*"):
            if _RAY_FOLDER.fullmatch(leftover.name) and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
        results = str(Path(self._run_config.output) / f".ray-{secrets.token_hex(4)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = TorchTrainer(
                _run_worker,
                train_loop_config={"plan": self._plan, "device": device},
                torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=int(_COLLECTIVE_TIMEOUT_S)),
                scaling_config=ScalingConfig(
                    num_workers=self._run_config.workers,
                    use_gpu=on_gpu,
                    resources_per_worker={"CPU": device.cpus} | ({"GPU": 1} if on_gpu else {}),
                ),
                run_config=RunConfig(
                    name="train",
                    storage_path=results,
                    failure_config=FailureConfig(max_failures=self._run_config.failures),
                ),
            )
            try:
                box["result"] = trainer.fit().return_value
            except Exception as error:
                box["error"] = error
        shutil.rmtree(results, ignore_errors=True)

    def _watch(self, thread: threading.Thread, on_progress: OnProgress, should_stop: Callable[[], bool]) -> None:
        """Report new lines of the metrics until the thread ends, and pass a request to stop on to the workers."""
        # Metrics are read from the file that the first worker appends to.
        reported = metrics_log.read_last_metrics(self._run_config.output)
        while thread.is_alive():
            thread.join(_POLL_S)
            newest = metrics_log.read_last_metrics(self._run_config.output)
            if newest and newest != reported:
                reported = newest
                on_progress(newest)
            if should_stop() and self._stop_file.parent.is_dir():
                self._stop_file.touch()


def _get_outcome(box: dict[str, Any]) -> Outcome:
    """Return the outcome of the first worker, or raise the error that ended the training."""
    # Look for an error of facepipe among those of the workers; otherwise take the last line of the text.
    error = box.get("error")
    if error is not None:
        for failure in getattr(error, "worker_failures", {}).values():
            cause = getattr(failure, "cause", failure)
            if isinstance(cause, FacepipeError):
                raise cause
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[-1].strip()[:_MAX_ERROR_CHARACTERS] if lines else type(error).__name__
        raise WorkerError(f"Ray Train gave up: {reason}") from error
    # A worker returns an error as its name and message if a retry cannot fix it.
    result = box["result"]
    if isinstance(result, Outcome):
        return result
    kind, message = result
    raise getattr(errors, kind, WorkerError)(message)


def _run_worker(config: dict[str, Any]) -> Any:
    """Run the loop in a worker of Ray Train.

    An error that a retry would not fix is returned, not raised, so that Ray does not retry.

    Returns:
        The outcome, or the name and the message of an error.
    """
    import ray.train
    import ray.train.torch
    import torch

    # Each worker computes on one device, and knows its rank among all.
    context = ray.train.get_context()
    plan: TrainingPlan = config["plan"]
    worker_device: WorkerDevice = config["device"]
    device = torch.device("cpu")
    if worker_device.name == "cuda":
        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)  # so that plain "cuda" means this GPU as well
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), device)
    stop_file = Path(plan.run.output) / FOLDER / _STOP
    try:
        return _run_loop(plan, ranks, worker_device.threads, lambda progress: None, stop_file.exists)
    except FacepipeError as error:
        if ranks.world > 1 and not isinstance(error, AgreedError):
            raise  # the other workers do not know about it: Ray must restart all of them
        return type(error).__name__, str(error)
