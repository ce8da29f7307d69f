"""Training in one process, or in workers of Ray Train: the same loop, which takes up its own checkpoints."""

import os
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
from facepipe.training.trainer.loop import LoopSettings, Outcome, TrainingLoop
from facepipe.training.trainer.metrics_log import TrainingProgress
from facepipe.training.trainer.mixed_precision import choose_precision
from facepipe.training.trainer.ranks import Ranks
from facepipe.training.trainer.task import TrainingTask
from pipelines.runtime.runners import ray as ray_runner

Tell = Callable[[TrainingProgress], None]
_STOP = "stop"  # a file beside the checkpoints that asks workers to end
_COLLECTIVE_SECONDS = 4 * 3600.0  # the others wait while the first one validates
_POLL_SECONDS = 0.5


class TrainingPlan(Protocol):
    """Makes what is trained; pickled to every worker, and called there."""

    @property
    def run(self) -> TrainingRunConfig: ...

    def __call__(self) -> tuple[TrainingTask, LoopSettings]: ...


@dataclass(frozen=True)
class WorkerDevice:
    """Where training will run. cpus: of a worker."""

    device: str
    cpus: int


def check_device(run: TrainingRunConfig) -> None:
    """Raises ModelError where a GPU is asked for on this machine and there is none, and ConfigError for a precision
    that the device does not have; nothing has been started then."""
    import torch

    if run.runner == "inline" or "RAY_ADDRESS" not in os.environ:
        choose_precision(run.precision, torch.device(resolve_device(run.device)))


def train_inline(plan: TrainingPlan, tell: Tell, stop: Callable[[], bool]) -> Outcome:
    """Train in this process."""
    import torch

    device = resolve_device(plan.run.device)
    threads = torch.get_num_threads()
    try:
        return _run_loop(plan, Ranks(0, 1, torch.device(device)), (tell, stop), plan.run.threads or _count_cpus())
    finally:
        torch.set_num_threads(threads)


def _count_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _run_loop(plan: TrainingPlan, ranks: Ranks, ends: tuple[Tell, Callable[[], bool]], threads: int) -> Outcome:
    import torch

    torch.set_num_threads(threads)
    keep_freed_memory()
    if plan.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(plan.run.deterministic)
    tell, stop = ends
    task, settings = plan()
    return TrainingLoop(task, settings, ranks, stop).run(tell)


class RayTraining:
    """Train in workers of Ray Train on this machine, or on the cluster that RAY_ADDRESS names."""

    def __init__(self, plan: TrainingPlan):
        self._plan, self._run = plan, plan.run
        self._stop = Path(self._run.output) / FOLDER / _STOP

    def __call__(self, tell: Tell, stop: Callable[[], bool]) -> Outcome:
        """The first worker's outcome. Raises WorkerError where workers die more than `run.failures` times."""
        place = self._choose_device(ray_runner.start())
        try:
            self._stop.unlink(missing_ok=True)
            box: dict[str, Any] = {}
            # Not in the main thread: there Ray would take Ctrl-C for itself, and end workers in the middle of a step.
            fitting = threading.Thread(target=self._fit, args=(place, box), daemon=True)
            fitting.start()
            self._watch(fitting, tell, stop)
            return _get_outcome(box)
        finally:
            self._stop.unlink(missing_ok=True)
            ray_runner.stop()

    def _choose_device(self, found: Any) -> WorkerDevice:
        run = self._run
        device = run.device if run.device != "auto" else "cuda" if found.gpus >= run.workers else "cpu"
        if run.device == "auto" and 0 < found.gpus < run.workers:
            raise ConfigError(
                f"run.workers is {run.workers}, and Ray has {found.gpus} GPUs: lower it, or set run.device"
            )
        if device == "cuda" and found.gpus < run.workers:
            raise ModelError(f"run.workers {run.workers} on cuda need as many GPUs, and Ray has {found.gpus}")
        if found.cpus < run.workers:
            raise ConfigError(f"run.workers is {run.workers}, and Ray has {found.cpus} CPUs: lower it")
        return WorkerDevice(device, run.threads or max(1, found.cpus // run.workers))

    def _fit(self, place: WorkerDevice, box: dict[str, Any]) -> None:
        from ray.train import FailureConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        gpu = place.device == "cuda"
        results = str(Path(self._run.output) / ".ray")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = TorchTrainer(
                _run_worker,
                train_loop_config={"plan": self._plan, "place": place},
                torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(_COLLECTIVE_SECONDS)),
                scaling_config=ScalingConfig(num_workers=self._run.workers, use_gpu=gpu),
                run_config=RayRunConfig(
                    name="train", storage_path=results, failure_config=FailureConfig(max_failures=self._run.failures)
                ),
            )
            try:
                box["result"] = trainer.fit().return_value
            except Exception as error:
                box["error"] = error
        shutil.rmtree(results, ignore_errors=True)

    def _watch(self, fitting: threading.Thread, tell: Tell, stop: Callable[[], bool]) -> None:
        told = metrics_log.read_last_metrics(self._run.output)
        while fitting.is_alive():
            fitting.join(_POLL_SECONDS)
            newest = metrics_log.read_last_metrics(self._run.output)
            if newest and newest != told:
                told = newest
                tell(newest)
            if stop() and self._stop.parent.is_dir():
                self._stop.touch()


def _get_outcome(box: dict[str, Any]) -> Outcome:
    error = box.get("error")
    if error is not None:
        failures = getattr(error, "worker_failures", {}).values()
        for found in failures:
            cause = getattr(found, "cause", found)
            if isinstance(cause, FacepipeError):
                raise cause
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise WorkerError(f"Ray Train gave up: {lines[-1].strip()[:300] if lines else type(error).__name__}") from error
    result = box["result"]
    if isinstance(result, Outcome):
        return result
    kind, message = result
    raise getattr(errors, kind, WorkerError)(message)


def _run_worker(config: dict[str, Any]) -> Any:
    """In each of Ray's workers. An error that trying again would not mend is given back, so that Ray does not."""
    import ray.train
    import ray.train.torch
    import torch

    context, plan, place = ray.train.get_context(), config["plan"], config["place"]
    device = ray.train.torch.get_device() if place.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what is loaded onto plain "cuda" comes here as well
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), device)
    asked = Path(plan.run.output) / FOLDER / _STOP
    try:
        return _run_loop(plan, ranks, (lambda progress: None, asked.exists), place.cpus)
    except FacepipeError as error:
        if ranks.world > 1 and not isinstance(error, AgreedError):
            raise  # the others do not know: all have to be started again
        return type(error).__name__, str(error)
