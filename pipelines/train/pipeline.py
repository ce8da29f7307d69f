"""train: train a model and write checkpoints, metrics, a report and a manifest. It resumes where it stopped."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from facepipe import storage
from facepipe.decisions.gallery import DecidedGallery
from facepipe.erasure.trainings import record_training
from facepipe.errors import TrainingError
from facepipe.evaluation.draw_pairs import draw_pairs
from facepipe.evaluation.pairs_file import read_pairs
from facepipe.hashing import hash64
from facepipe.models.zoo.card_file import save_model
from facepipe.training.comparison import Comparison, VerificationSetConfig, compare_scores
from facepipe.training.embedding_task import embed_chips
from facepipe.training.report import ReportTexts, write_report
from facepipe.training.start import NetworkStart, build_card, resolve_start
from facepipe.training.trainer import checkpointing, metrics_log
from facepipe.training.trainer.config import TrainingRunConfig
from facepipe.training.trainer.loop import OnProgress, Outcome
from facepipe.training.trainer.metrics_log import TrainingProgress
from facepipe.training.trainer.schedule import ValidationHistory
from facepipe.training.validation import PairSet, collect_names, read_validation_pairs, verify_pairs
from facepipe.types import Float32, UInt8Image
from pipelines.train.config import DetectorConfig, TrainConfig, read_config, resolve_learning_rate
from pipelines.train.manifest import describe_detector, describe_embedder, write_faces, write_manifest
from pipelines.train.outputs import MODEL, REPORT, delete_outputs, prepare_output
from pipelines.train.plan import DetectorPlan, EmbedderPlan
from pipelines.train.worker import RayTraining, TrainingPlan, check_device, train_inline

__all__ = ["DetectorConfig", "TrainConfig", "TrainSummary", "TrainingProgress", "read_config", "run"]


@dataclass
class TrainSummary:
    """What a training run did. `facepipe train --json` prints these fields under these names.

    Attributes:
        output: folder of the run.
        model: TOML file of the model.
        end: done, or stopped (early).
        step: steps done.
        steps: steps of the whole training.
        epochs: epochs done.
        seconds: time of all attempts together.
        resumed: step that this attempt resumed from.
        loss: mean loss of the last line of the metrics; None if no line follows on a step.
        images_per_second: median throughput.
        best: step that the model's weights are from; 0: the start weights.
        scores: scores of the model, by name.
        start_scores: scores of the start weights, by name; empty if they were not scored.
        keeps_start: whether the model is the start weights, because no validation in training was better.
        comparisons: the validation and each test set, before and after.
        data: counts of the data, by name.
        notes: remarks on the data and the scores.
    """

    output: str
    model: str
    end: str
    step: int
    steps: int
    epochs: float
    seconds: float
    resumed: int
    loss: float | None
    images_per_second: float
    best: int
    scores: dict[str, float] = field(default_factory=dict)
    start_scores: dict[str, float] = field(default_factory=dict)
    keeps_start: bool = False
    comparisons: list[Comparison] = field(default_factory=list)
    data: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run(
    config: TrainConfig | DetectorConfig,
    *,
    fresh: bool = False,
    on_progress: OnProgress = lambda progress: None,
    log: Callable[[str], None] = lambda line: None,
) -> TrainSummary:
    """Train, and resume from `run.output` unless `fresh`.

    Ctrl-C and SIGTERM end the current step, write a checkpoint and are raised then.

    Args:
        config: all settings.
        fresh: start from the beginning, and delete the outputs of an earlier run except its chips.
        on_progress: called with every line of the metrics.
        log: called with lines about the preparation of the data.

    Raises:
        ConfigError: The settings are wrong.
        ModelError: The model cannot be used.
        TrainingError: The loss is not finite, or the folder holds another run.
    """
    # Find what is wrong with the settings before any data is prepared.
    config = resolve_learning_rate(_resolve_paths(config))
    check_device(config.run)
    checkpoints = checkpointing.CheckpointFolder(config.run.output)
    job: EmbedderJob | DetectorJob
    if isinstance(config, TrainConfig):
        start = resolve_start(config.model)
        start.build(config.run.seed)  # fails if the weights do not fit
        prepare_output(config.run.output)
        resumes = not fresh and checkpoints.has_checkpoint
        job = EmbedderJob(config, start, log, resumes=resumes)
    else:
        prepare_output(config.run.output)
        job = DetectorJob(config)
    if fresh:
        # Delete only now that this run is known to be possible, and not while another run writes.
        with checkpoints.lock():
            delete_outputs(config.run.output)
    with job.protect_data():
        outcome = train_plan(job.plan, on_progress)
        return _write_outputs(job, outcome)


def train_plan(plan: TrainingPlan, on_progress: OnProgress = lambda progress: None) -> Outcome:
    """Run a plan's loop inline or on Ray, as its config says. Signals end it cleanly."""
    with catch_signals() as is_interrupted:
        if plan.run.runner == "inline":
            return train_inline(plan, on_progress, is_interrupted)
        return RayTraining(plan).run(on_progress, is_interrupted)


@contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C or SIGTERM inside, and raise it at the end. A second one acts at once.

    Outside the main thread, signals are left alone. So is a signal that the process ignores: shells make background
    jobs ignore Ctrl-C.

    Yields:
        A function that tells whether a signal was caught.
    """
    caught: list[int] = []
    # Only the main thread may set handlers of signals.
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    foreign = (signal.SIG_IGN, None)  # None: a handler that was not set by Python
    replaced = {number: handler for number, handler in handlers.items() if handler not in foreign}

    def restore() -> None:
        for number, handler in replaced.items():
            signal.signal(number, handler)

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()  # the next signal acts at once

    for number in replaced:
        signal.signal(number, catch)
    try:
        yield lambda: bool(caught)
    finally:
        restore()
    if caught:
        signal.raise_signal(caught[0])


class EmbedderJob:
    """The training of an embedder and its data.

    Args:
        config: all settings.
        start: what the network starts from.
        log: called with lines about the preparation of the chips.
        resumes: whether the run resumes from a checkpoint, and therefore keeps its chips if the data has changed.
    """

    def __init__(self, config: TrainConfig, start: NetworkStart, log: Callable[[str], None], *, resumes: bool):
        from pipelines.chips.prepare import prepare_chips, prepare_images

        self.config = config
        self.start = start
        if config.data.gallery:
            record_training(config.data.gallery, config.run.output)
        # Make the chips to train on.
        folder = config.run.chips or os.path.join(config.run.output, "chips")
        self._chips = prepare_chips(config.data, start.chips, folder, log=log, keep_outdated=resumes)
        # Make the chips of the pairs file, which include the images of persons that are trained on.
        pairs_folder = ""
        if config.validate.pairs and config.schedule.validate != 0:
            pairs_folder = f"{folder}-of-pairs"
            names = collect_names(read_validation_pairs(replace(config.validate, held_only=False)))
            data = config.validate.data
            prepare_images(data, names, start.chips, pairs_folder, log=log, keep_outdated=resumes)
        self._test_sets = [
            (test.label, _prepare_test_set(test, folder, start, log, keep_outdated=resumes))
            for test in config.test_sets
        ]
        self.plan = EmbedderPlan(config, folder, pairs_folder)
        self._train, self._held = self.plan.split_chips()
        # Build the pairs here too, so that an error in them is raised before training starts.
        pairs = self.plan.build_pair_set()
        scoring = f"scored on {pairs.description}" if pairs else "not validated: the last network is the result"
        self.notes = [scoring, *self.plan.collect_notes(self._train)]
        self.notes += [f"tested on {len(pairs)} pairs of {label}" for label, pairs in self._test_sets]
        self.notes += _note_shared_data(config)
        # Tell which layers did not fit the weights.
        resized = start.list_resized()
        if resized:
            self.notes.append(f"these start at random, because the weights have another dim: {', '.join(resized)}")

    @contextmanager
    def protect_data(self) -> Iterator[None]:
        """Keep other runs from replacing the chips."""
        from pipelines.chips.prepare import mark_in_use

        with mark_in_use(self._chips.folder):
            yield

    @property
    def counts(self) -> dict[str, int]:
        """Counts of the data, by name."""
        counts = {"images": len(self._train), "identities": len(self._train.identities)}
        if len(self._held):
            counts["held-out images"] = len(self._held)
        return counts | {f"chips: {name}": count for name, count in self._chips.info.figures.items()}

    def compare_test_sets(self, state: dict[str, Any], *, keeps_start: bool) -> list[Comparison]:
        """Score each test set with the start weights and with the resulting model.

        Args:
            state: state of the resulting network.
            keeps_start: whether it is the start weights.
        """
        if not self._test_sets:
            return []
        before = self._score_test_sets(None)
        after = before if keeps_start else self._score_test_sets(state)
        return [
            compare_scores(f"test {label}", before[label], after[label], keeps_start=keeps_start)
            for label, _ in self._test_sets
        ]

    def _score_test_sets(self, state: dict[str, Any] | None) -> dict[str, dict[str, float]]:
        """Score each test set, by its label, with a state of the network; None: with the start weights."""
        import torch

        run = self.config.run
        # Workers may have GPUs that this process has not.
        device = torch.device("cuda" if run.device != "cpu" and torch.cuda.is_available() else "cpu")
        net = self.start.build(run.seed, self.config.model.dropout)
        if state is not None:
            net.load_state_dict(state)
        net = net.to(device).eval()
        config = self.config.validate

        def embed(chips: UInt8Image) -> Float32:
            return embed_chips(net, chips, self.start.input, device)

        return {label: verify_pairs(embed, pairs, config.flip, config.batch) for label, pairs in self._test_sets}

    def describe_data(self) -> dict[str, Any]:
        """Describe the data for the manifest, and write the ids of the faces beside it."""
        write_faces(self.config.run.output, self._train)
        return describe_embedder(self.config.data, self._chips, self._train, self._held)


class DetectorJob:
    """The training of a detector and its data."""

    def __init__(self, config: DetectorConfig):
        self.config = config
        self.plan = DetectorPlan(config)
        self.start, task = self.plan.build_task()
        self._steps_per_epoch = task.steps_per_epoch
        self.notes = list(task.notes)

    def protect_data(self) -> AbstractContextManager[None]:
        """Do nothing: images are not replaced."""
        return nullcontext()

    @property
    def counts(self) -> dict[str, int]:
        """Counts of the data, by name."""
        return {"batches an epoch": self._steps_per_epoch}

    def compare_test_sets(self, state: dict[str, Any], *, keeps_start: bool) -> list[Comparison]:
        """Return nothing: a detector has no test sets."""
        return []

    def describe_data(self) -> dict[str, Any]:
        """Describe the data for the manifest."""
        return describe_detector(self.config.detection.annotations, self._steps_per_epoch)


def _write_outputs(job: EmbedderJob | DetectorJob, outcome: Outcome) -> TrainSummary:
    """Write the model from the best checkpoint, the report and the manifest."""
    run = job.config.run
    weights = _choose_weights(run, outcome)
    keeps_start = outcome.history.keeps_start and weights.step == 0
    notes = [describe_kept_start(outcome.history)] if keeps_start else []
    notes += job.notes
    comparisons = _compare(job, outcome.history, weights, keeps_start=keeps_start)
    # The model.
    figures = {name: round(value, 6) for name, value in weights.scores.items()}
    name = Path(run.output).name or MODEL
    model = save_model(Path(run.output) / MODEL, weights.state, build_card(job.start, name, figures))
    # The report.
    entries = metrics_log.read_metrics(run.output)
    config = asdict(job.config)
    texts = ReportTexts(
        title=f"Training of {job.start.architecture.name}",
        subtitle=f"{run.output}, from {job.start.origin}",
        data=job.counts,
        config=config,
        notes=notes,
        scores=weights.scores,
        comparisons=comparisons,
    )
    write_report(os.path.join(run.output, REPORT), entries, outcome, texts)
    # The manifest.
    facts = {
        **job.describe_data(),
        "start": {"name": job.start.origin, "sha256": job.start.sha256 or None, "licence": job.start.licence},
        "seed": run.seed,
        "scores": weights.scores,
        "start_scores": outcome.history.start,
        "model_step": weights.step,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    write_manifest(run.output, facts, outcome, config)
    # Figures come from the metrics, which reach over all attempts. There are none if a run is too short for a line.
    last = entries[-1] if entries else None
    return TrainSummary(
        output=run.output,
        model=str(model),
        end=outcome.end,
        step=outcome.step,
        steps=outcome.steps,
        epochs=last.epoch if last else 0.0,
        seconds=outcome.seconds,
        resumed=outcome.resumed,
        loss=last.loss if last else None,
        images_per_second=metrics_log.compute_median_speed(entries),
        best=weights.step,
        scores=weights.scores,
        start_scores=outcome.history.start,
        keeps_start=keeps_start,
        comparisons=comparisons,
        data=job.counts,
        notes=notes,
    )


def _compare(
    job: EmbedderJob | DetectorJob, history: ValidationHistory, weights: "ModelWeights", *, keeps_start: bool
) -> list[Comparison]:
    """Compare the validation and each test set before and after training."""
    comparisons: list[Comparison] = []
    # A run that an older facepipe began has no scores of its start.
    if history.start and history.scores:
        comparisons.append(compare_scores("validation", history.start, history.scores, keeps_start=keeps_start))
    return comparisons + job.compare_test_sets(weights.state, keeps_start=keeps_start)


def _prepare_test_set(
    config: VerificationSetConfig,
    chips: str,
    start: NetworkStart,
    log: Callable[[str], None],
    *,
    keep_outdated: bool,
) -> PairSet:
    """Prepare the chips of a test set's pairs, which come from a file or are drawn from a gallery.

    Args:
        config: the test set.
        chips: folder of the chips to train on, beside which those of the test set are put.
        start: what the network starts from.
        log: called with lines about the preparation of the chips.
        keep_outdated: make the chips again only if the config or the embedder's chips have changed.
    """
    from pipelines.chips.prepare import prepare_images

    pairs = (
        read_pairs(config.pairs)
        if config.pairs
        else draw_pairs(DecidedGallery(config.gallery), config.draw, config.seed)
    )
    # The folder is named for its content, because trainings with other test sets may share the chips.
    content = hash64(config.pairs, config.source, config.gallery, str(config.draw), str(config.seed))
    folder = f"{chips}-of-test-{content:016x}"
    images = prepare_images(
        config.data, collect_names(pairs), start.chips, folder, log=log, keep_outdated=keep_outdated
    )
    return PairSet.from_names(images, pairs, config.label)


def _note_shared_data(config: TrainConfig) -> list[str]:
    """Note the test sets of which nothing is left out of the training data."""
    data = config.data
    excluded = {gallery.rstrip("/") for gallery in data.exclude}
    notes: list[str] = []
    for test in config.test_sets:
        if test.gallery and test.gallery.rstrip("/") not in excluded:
            notes.append(
                f"nothing of test set {test.label} is left out of the training data: add {test.gallery!r} to "
                "data.exclude, unless its people are others"
            )
        if test.source and not (data.exclude or data.exclude_identities):
            notes.append(
                f"nothing of test set {test.label} is left out of the training data: set data.exclude or "
                "data.exclude_identities, unless its people are others"
            )
    return notes


def describe_kept_start(history: ValidationHistory) -> str:
    """Describe why the model is the start weights."""
    trained = f"{history.best:.4f} at best" if history.scores else "never scored"
    return (
        f"the model is the start weights: their validation score is {history.start['score']:.4f}, and no trained "
        f"weights scored more ({trained}). Lower optim.lr, train longer, or hold out more"
    )


@dataclass(frozen=True)
class ModelWeights:
    """The weights that become the model.

    Attributes:
        state: state of the network.
        step: step they are from.
        scores: their scores, by name; empty if they were not validated.
    """

    state: dict[str, Any]
    step: int
    scores: dict[str, float]


def _choose_weights(run: TrainingRunConfig, outcome: Outcome) -> ModelWeights:
    """Choose the weights with the best score, or the last ones if there are none or their file was deleted."""
    checkpoints = checkpointing.CheckpointFolder(run.output, run.keep)
    path = checkpoints.best_path
    if path.exists():
        try:
            best = checkpointing.read_checkpoint(path)
        except checkpointing.DamagedCheckpointError as error:
            raise TrainingError(f"{str(path)!r} is damaged: {error}. Delete it to use the last weights") from error
        # A best checkpoint of another step belongs to an earlier history, and its scores would be wrong.
        if best["step"] == outcome.history.model_step:
            return ModelWeights(dict(best["net"]), best["step"], outcome.history.model_scores)
    last = checkpoints.load()
    if last is None:
        raise TrainingError(f"no checkpoint in {run.output!r}: run again to train")
    return ModelWeights(dict(last["net"]), last["step"], {})


def _resolve_paths(config: TrainConfig | DetectorConfig) -> TrainConfig | DetectorConfig:
    """Make all paths absolute, because workers may run in another folder than the user."""
    run = replace(config.run, output=_to_absolute(config.run.output), chips=_to_absolute(config.run.chips))
    start = config.model.start
    # The start may be a registered name, which is no path.
    is_file = os.sep in start or os.path.isfile(start)
    model = replace(config.model, start=_to_absolute(start) if is_file else start)
    if isinstance(config, DetectorConfig):
        detection = replace(
            config.detection,
            annotations=_to_absolute(config.detection.annotations),
            images=_to_absolute(config.detection.images),
            held=_to_absolute(config.detection.held),
            held_images=_to_absolute(config.detection.held_images),
        )
        return replace(config, run=run, model=model, detection=detection)
    validate = replace(config.validate, pairs=_to_absolute(config.validate.pairs))
    split = replace(config.split, names=_to_absolute(config.split.names))
    return replace(config, run=run, model=model, validate=validate, split=split)


def _to_absolute(path: str) -> str:
    return storage.to_absolute(path) if path else path
