"""train: a config in, a model out, with its checkpoints, metrics, report and manifest; goes on where it stopped."""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

from facepipe import storage
from facepipe.errors import TrainingError
from facepipe.models.zoo.card_file import save_model
from facepipe.training.report import write_report
from facepipe.training.start import NetworkStart, build_card, resolve_start
from facepipe.training.trainer import checkpointing, metrics_log
from facepipe.training.trainer.config import TrainingRunConfig
from facepipe.training.trainer.loop import Outcome
from facepipe.training.trainer.metrics_log import TrainingProgress
from facepipe.training.validation import collect_names, read_validation_pairs
from pipelines.train.config import DetectorConfig, TrainConfig, read_config
from pipelines.train.manifest import FACES, MANIFEST, describe_detector, describe_embedder, write_faces, write_manifest
from pipelines.train.plan import DetectorPlan, EmbedderPlan
from pipelines.train.worker import RayTraining, TrainingPlan, check_device, train_inline

__all__ = ["DetectorConfig", "TrainConfig", "TrainSummary", "TrainingProgress", "read_config", "run"]

Tell = Callable[[TrainingProgress], None]
Say = Callable[[str], None]
MODEL, REPORT = "model", "report.html"


@dataclass
class TrainSummary:
    """What a training run has done.

    end: done or stopped (early); resumed: the step it went on from; best: the step the model is of; data: counts;
    notes: what a user should know of the data and the scores
    """

    output: str
    model: str
    end: str
    step: int
    steps: int
    epochs: float
    seconds: float
    resumed: int
    loss: float
    images_per_second: float
    best: int
    scores: dict[str, float] = field(default_factory=dict)
    data: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run(
    config: TrainConfig | DetectorConfig,
    fresh: bool = False,
    tell: Tell = lambda progress: None,
    say: Say = lambda line: None,
) -> TrainSummary:
    """Train; what an earlier run of the same config left in `run.output` is gone on with, unless `fresh`.

    Raises ConfigError and ModelError for what can be known to be wrong before any work; TrainingError where the loss
    is not finite or the folder holds another run. Ctrl-C and SIGTERM end the step, write a checkpoint and are raised.
    """
    config = _resolve_paths(config)
    check_device(config.run)
    start = resolve_start(config.model) if isinstance(config, TrainConfig) else None
    if start:
        start.build(config.run.seed)  # weights that do not fit are told before any data is prepared
    os.makedirs(config.run.output, exist_ok=True)
    checkpoints = checkpointing.CheckpointFolder(config.run.output)
    goes_on = not fresh and checkpoints.has_checkpoint
    if isinstance(config, TrainConfig) and start:
        job: EmbedderJob | DetectorJob = EmbedderJob(config, start, say, goes_on)
    else:
        job = DetectorJob(cast(Any, config))
    if fresh:
        with checkpoints.lock():  # not under a run that is going on, nor before it is known that this one can
            _delete_outputs(config.run.output)
    with job.protect_data():
        outcome = train_plan(job.plan, tell)
        return _write_outputs(job, outcome)


def train_plan(plan: TrainingPlan, tell: Tell = lambda progress: None) -> Outcome:
    """Run a plan's loop where its config says, so that signals end it cleanly."""
    with catch_signals() as stop:
        return train_inline(plan, tell, stop) if plan.run.runner == "inline" else RayTraining(plan)(tell, stop)


@contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM only makes what is given true; it is raised at the end. A second one counts.

    In threads other than the main one signals are not ours; one that the process ignores (as shells make background
    jobs ignore Ctrl-C) stays ignored.
    """
    caught = list[int]()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    foreign = (signal.SIG_IGN, None)  # None: a handler that is not Python's
    before = {number: handler for number, handler in found.items() if handler not in foreign}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()  # the next one is not waited for

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(caught)
    finally:
        restore()
    if caught:
        signal.raise_signal(caught[0])


class EmbedderJob:
    """The training of an embedder: its data, and what its model is called."""

    def __init__(self, config: TrainConfig, start: NetworkStart, say: Say, goes_on: bool):
        from pipelines.chips.prepare import prepare_chips, prepare_images

        self.config, self.start, run = config, start, config.run
        folder = run.chips or os.path.join(run.output, "chips")
        chips = prepare_chips(config.data, start.chips, folder, progress=say, settled=goes_on)
        pairs = ""
        if config.validate.pairs and config.schedule.validate != 0:
            pairs = f"{folder}-of-pairs"
            wanted = collect_names(read_validation_pairs(replace(config.validate, held_only=False)))
            prepare_images(config.validate.data, wanted, start.chips, pairs, progress=say, settled=goes_on)
        self.plan = EmbedderPlan(config, folder, pairs)
        self._whole = chips
        self._train, self._held = self.plan.split_chips()
        judged = self.plan.build_pair_set()  # an error in it is to be heard of before training
        scored = f"scored on {judged.description}" if judged else "not validated: the last network is the result"
        self.notes = [scored, *self.plan.collect_notes(self._train)]
        if again := start.list_resized():
            self.notes.append(f"these start at random, since the weights have another dim: {', '.join(again)}")

    @contextmanager
    def protect_data(self) -> Iterator[None]:
        """The chips stay as they are."""
        from pipelines.chips.prepare import mark_in_use

        with mark_in_use(self._whole.folder):
            yield

    @property
    def counts(self) -> dict[str, int]:
        found = {"images": len(self._train), "identities": len(self._train.identities)}
        found |= {"held-out images": len(self._held)} if len(self._held) else {}
        return found | {f"chips: {name}": count for name, count in self._whole.info.figures.items()}

    def describe_data(self) -> dict[str, Any]:
        """What it was trained on."""
        write_faces(self.config.run.output, self._train)
        return describe_embedder(self.config.data, self._whole, self._train, self._held)


class DetectorJob:
    """The training of a detector."""

    def __init__(self, config: DetectorConfig):
        self.config = config
        self.plan = DetectorPlan(config)
        self.start, task = self.plan.build_task()
        self._steps, self.notes = task.steps_per_epoch, list(task.notes)

    def protect_data(self) -> AbstractContextManager[None]:
        """Nothing has to be held."""
        return nullcontext()

    @property
    def counts(self) -> dict[str, int]:
        return {"batches an epoch": self._steps}

    def describe_data(self) -> dict[str, Any]:
        """What it was trained on."""
        return describe_detector(self.config.detection.annotations, self._steps)


def _write_outputs(job: "EmbedderJob | DetectorJob", outcome: Outcome) -> TrainSummary:
    """The model from the best checkpoint, the report and the manifest."""
    run = job.config.run
    state, best, scores = _choose_weights(run, outcome)
    figures = {name: round(value, 6) for name, value in scores.items()}
    card = build_card(job.start, _get_model_name(run), figures)
    model = save_model(Path(run.output) / MODEL, state, card)
    entries = metrics_log.read_metrics(run.output)
    config = asdict(job.config)
    about: dict[str, Any] = {
        "title": f"Training of {job.start.architecture.name}",
        "subtitle": f"{run.output}, from {job.start.origin}",
        "notes": job.notes,
        "data": job.counts,
        "scores": scores,
        "config": config,
    }
    write_report(os.path.join(run.output, REPORT), entries, outcome, about)
    start = {"name": job.start.origin, "sha256": job.start.sha256 or None, "licence": job.start.licence}
    about = {**job.describe_data(), "start": start, "seed": run.seed, "scores": scores, "model_step": best}
    write_manifest(run.output, about, outcome, config)
    last = entries[-1] if entries else None
    speeds = sorted(entry.speed for entry in entries)
    return TrainSummary(
        output=run.output,
        model=str(model),
        end=outcome.end,
        step=outcome.step,
        steps=outcome.steps,
        epochs=last.epoch if last else 0.0,
        seconds=outcome.seconds,
        resumed=outcome.resumed,
        loss=last.loss if last else float("nan"),
        images_per_second=speeds[len(speeds) // 2] if speeds else 0.0,
        best=best,
        scores=scores,
        data=job.counts,
        notes=job.notes,
    )


def _choose_weights(run: TrainingRunConfig, outcome: Outcome) -> tuple[dict[str, Any], int, dict[str, float]]:
    """The network with the best score, its step, and its scores; the last one where none was validated, or where the
    best one is no longer there."""
    checkpoints = checkpointing.CheckpointFolder(run.output, run.keep)
    if checkpoints.best_path.exists():
        try:
            best = checkpointing.read_checkpoint(checkpoints.best_path)
        except checkpointing.DamagedCheckpointError as error:
            raise TrainingError(
                f"{str(checkpoints.best_path)!r} is damaged: {error}. Delete it to take the last"
            ) from error
        if best["step"] == outcome.history.step:
            return dict(best["net"]), best["step"], outcome.history.scores
    last = checkpoints.load()
    if last is None:
        raise TrainingError(f"no checkpoint in {run.output!r}")
    return dict(last["net"]), last["step"], {}


def _get_model_name(run: TrainingRunConfig) -> str:
    return Path(run.output).name or MODEL


def _delete_outputs(output: str) -> None:
    """Take off what an earlier run left, but for the chips."""
    checkpointing.CheckpointFolder(output).clear()
    for name in (metrics_log.METRICS, REPORT, MANIFEST, FACES, "model.toml", "model.safetensors"):
        Path(output, name).unlink(missing_ok=True)
    shutil.rmtree(Path(output, metrics_log.TENSORBOARD), ignore_errors=True)


def _resolve_paths(config: TrainConfig | DetectorConfig) -> TrainConfig | DetectorConfig:
    """Workers may run in another folder than the user."""
    run = replace(config.run, output=_to_absolute(config.run.output), chips=_to_absolute(config.run.chips))
    start = config.model.start
    model = replace(config.model, start=_to_absolute(start) if os.sep in start or os.path.isfile(start) else start)
    if isinstance(config, DetectorConfig):
        given = config.detection
        files = replace(given, annotations=_to_absolute(given.annotations), images=_to_absolute(given.images))
        files = replace(files, held=_to_absolute(given.held), held_images=_to_absolute(given.held_images))
        return replace(config, run=run, model=model, detection=files)
    validate = replace(config.validate, pairs=_to_absolute(config.validate.pairs))
    split = replace(config.split, names=_to_absolute(config.split.names))
    return replace(config, run=run, model=model, validate=validate, split=split)


def _to_absolute(path: str) -> str:
    return storage.to_absolute(path) if path else path
