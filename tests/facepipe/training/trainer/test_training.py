"""The loop on toy tasks: exact resume, schedules, optimiser groups, checkpoints, ranks. No faces, no Ray."""

import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from facepipe.errors import AgreedError, ConfigError, TrainingError
from facepipe.training import start
from facepipe.training.config import ModelConfig
from facepipe.training.imprint import imprint_centres
from facepipe.training.losses import LossConfig, build_objective
from facepipe.training.report import ReportTexts, write_report
from facepipe.training.trainer import checkpointing, metrics_log, optim, schedule
from facepipe.training.trainer.checkpointing import CheckpointFolder
from facepipe.training.trainer.config import OptimConfig, ScheduleConfig, TrainingRunConfig
from facepipe.training.trainer.loop import LoopSettings, Outcome, TrainingLoop, count_loaders
from facepipe.training.trainer.metrics_log import MetricsLog, TrainingProgress
from facepipe.training.trainer.mixed_precision import MixedPrecision
from facepipe.training.trainer.ranks import Ranks
from facepipe.training.trainer.schedule import ValidationHistory

STEPS = 40


class Toy:
    """Six numbers to three classes, with batch norm and dropout; a head with weights of its own."""

    steps_per_epoch = 10

    def __init__(self, norm: bool = True, bad: int = -1, pause: float = 0.0, loss: LossConfig | None = None):
        torch.manual_seed(1)
        middle = [nn.BatchNorm1d(8), nn.Dropout(0.2)] if norm else []
        self.net: nn.Module = nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 4))
        self.objective: nn.Module = build_objective(loss, 4, 3, 0) if loss else nn.Linear(4, 3)
        self.given = loss
        self.bad, self.pause, self.scores = bad, pause, list[float]()

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, ...]:
        time.sleep(self.pause)
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
        share = slice(rank * 12 // world, (rank + 1) * 12 // world)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        return (x * math.nan if step == self.bad else x)[share], y[share]

    def compute_loss(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = inputs
        if self.given:
            return self.objective(self.net(x), y), {}
        found = self.objective(self.net(x))
        return nn.functional.cross_entropy(found, y), {"accuracy": (found.argmax(1) == y).float().mean()}

    def validate(self, net: nn.Module) -> dict[str, float]:
        assert not net.training
        if self.scores:
            return {"score": self.scores.pop(0)}
        x, y = self.make_batch(10_000)
        if self.given:
            return {}
        return {"score": float((self.objective(net(x)).argmax(1) == y).float().mean())}


def settings(output: Path | str, **run: Any) -> LoopSettings:
    options = {"log_every": 5, "checkpoint_steps": 7, "keep": 2} | run
    schedule = ScheduleConfig(steps=STEPS, policy="cosine", warmup=5)
    return LoopSettings(
        OptimConfig(lr=0.05),
        schedule,
        TrainingRunConfig(str(output), **options),
        validate_steps=10,
        identity={"a": "b"},
    )


def weights(output: Path) -> dict[str, Any]:
    found = CheckpointFolder(str(output)).load()
    assert found is not None
    return found


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def forked(run: Callable[[], object]) -> int:
    """A child process that runs this and ends, with 0 if nothing was raised; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run()
        code = 0
    finally:
        os._exit(code)


def one_of_two(folder: Path, rank: int, loss: LossConfig | None, stops: Sequence[int]) -> None:
    """A rank of two that trains into `folder`, each time stopped after so many steps, and to the end at last."""
    for n, stop in enumerate((*stops, 0)):
        dist.init_process_group("gloo", init_method=f"file://{folder}-{n}", rank=rank, world_size=2)
        calls = iter(range(1, 10_000))
        TrainingLoop(Toy(norm=False, loss=loss), clipped(folder), Ranks(rank, 2), lambda: next(calls) == stop).run()  # noqa: B023
        dist.destroy_process_group()


def clipped(folder: Path) -> LoopSettings:
    return replace(settings(folder), optim=OptimConfig(lr=0.05, clip=0.5))


def trained(task: Toy, given: LoopSettings, stop: int = 0) -> Outcome:
    """Train; with `stop`, interrupt after so many steps."""
    calls = iter(range(1, 10_000))
    return TrainingLoop(task, given, Ranks(), lambda: next(calls) == stop).run()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """How many threads there are changes the last bits of sums, and the children have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    outcome = trained(Toy(), settings(output))
    assert (outcome.end, outcome.step, outcome.resumed) == ("done", STEPS, 0)
    return output


def test_training_learns_and_tells(whole: Path) -> None:
    start, *entries = metrics_log.read_metrics(str(whole))
    assert (start.step, start.loss, start.speed, start.scores.keys()) == (0, None, 0.0, {"score"})
    assert [e.step for e in entries] == list(range(5, STEPS + 1, 5))
    assert entries[-1].loss < 0.8 * entries[0].loss
    assert entries[-1].epoch == 4.0
    assert entries[0].lr == pytest.approx(0.05)
    assert entries[-1].speed > 0
    assert 0 <= entries[-1].figures["accuracy"] <= 1
    assert [e.step for e in entries if e.scores] == [10, 20, 30, 40]
    assert metrics_log.read_last_metrics(str(whole)) == entries[-1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path, optimizer: Any) -> None:
    given = [replace(settings(tmp_path / name), optim=OptimConfig(optimizer, lr=0.05)) for name in ("a", "b")]
    trained(Toy(), given[0])
    for stop in (3, 14, 1):
        outcome = trained(Toy(), given[1], stop)
        assert outcome.end == "interrupted"
    assert outcome.step == 18
    assert trained(Toy(), given[1]).resumed == 18
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    for part in ("net", "head", "optimizer", "scaler", "standing", "step"):
        assert equal(one[part], other[part]), part
    lines = [[(e.step, e.scores) for e in metrics_log.read_metrics(str(tmp_path / name))] for name in ("a", "b")]
    assert lines[0] == lines[1]


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, whole: Path) -> None:
    """SIGKILL at random moments, which fall into steps, validations and the writing of checkpoints alike."""
    rng = random.Random(20261122)
    for trial in range(2):
        output = tmp_path / str(trial)
        kills = 0
        while True:
            child = forked(lambda folder=output: trained(Toy(pause=0.01), settings(folder)))  # type: ignore[misc]
            if kills == 2:
                assert os.waitpid(child, 0)[1] == 0
                break
            time.sleep(rng.uniform(0.02, 0.4))
            os.kill(child, signal.SIGKILL)
            kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        ours, theirs = weights(output), weights(whole)
        for part in ("net", "head", "optimizer", "standing"):
            assert equal(ours[part], theirs[part]), (trial, part)
        best = [checkpointing.read_checkpoint(CheckpointFolder(str(folder)).best_path) for folder in (output, whole)]
        assert equal(best[0], best[1])
        assert [e.step for e in metrics_log.read_metrics(str(output))] == [
            e.step for e in metrics_log.read_metrics(str(whole))
        ]


def test_loaders_change_nothing(tmp_path: Path, whole: Path) -> None:
    trained(Toy(), settings(tmp_path, loaders=2, threads=1))
    assert equal(weights(tmp_path)["net"], weights(whole)["net"])


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite at step 24 \(epoch 3.*checkpoint of step 21 is kept"):
        trained(Toy(bad=23), settings(tmp_path))
    kept = weights(tmp_path)
    assert kept["step"] == 21
    assert all(bool(torch.isfinite(t).all()) for t in kept["net"].values())


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    task = Toy()
    with torch.no_grad():
        next(task.net.parameters()).fill_(math.inf)
    task.compute_loss = lambda inputs: (task.objective.weight.sum() * 1.0, {})  # type: ignore[method-assign, union-attr, operator]
    with pytest.raises(TrainingError, match=r"weights are not finite after step 7\. No checkpoint was written yet"):
        trained(task, replace(settings(tmp_path), validate_steps=0))
    assert CheckpointFolder(str(tmp_path)).load() is None
    with pytest.raises(TrainingError, match="starts from are not finite"):
        trained(task, settings(tmp_path))
    assert not CheckpointFolder(str(tmp_path)).list_paths()


def test_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    trained(Toy(), settings(tmp_path), stop=2)
    other = replace(settings(tmp_path), identity={"a": "c"})
    with pytest.raises(TrainingError, match=r"a run with other settings \(a\): start again with --fresh"):
        trained(Toy(), other)
    # What an earlier version hashed for the same settings is taken.
    same = replace(settings(tmp_path), identity={"a": "c"}, earlier={"a": frozenset({"b", "d"})})
    assert trained(Toy(), same).resumed == 2


def test_early_stopping_and_plateaus(tmp_path: Path) -> None:
    given = settings(tmp_path, patience=3)
    plan = ScheduleConfig(epochs=20, policy="plateau", plateau_patience=0, gamma=0.5)
    task = Toy()
    task.scores = [0.0, 0.1, 0.5, 0.4, 0.3, 0.5, 0.9]
    outcome = trained(task, replace(given, schedule=plan))
    assert (outcome.end, outcome.step) == ("stopped", 50)
    assert outcome.history.step == 20
    rates = {e.step: e.lr for e in metrics_log.read_metrics(str(tmp_path))}
    assert rates[25] == pytest.approx(0.05)
    assert rates[35] == pytest.approx(0.025)
    assert rates[45] == pytest.approx(0.0125)
    again = trained(Toy(), replace(given, schedule=plan))
    assert (again.end, again.step, again.resumed) == ("stopped", 50, 50)


def test_a_start_that_is_better_does_not_end_the_training(tmp_path: Path) -> None:
    """Patience and plateaus compare validations in training, which may need a while to beat the start."""
    plan = ScheduleConfig(steps=STEPS, policy="plateau", plateau_patience=0, gamma=0.5)
    task = Toy()
    task.scores = [0.9, 0.1, 0.2, 0.3, 0.4]
    outcome = trained(task, replace(settings(tmp_path, patience=1), schedule=plan))
    assert (outcome.end, outcome.history.reductions) == ("done", 0)
    assert (outcome.history.keeps_start, outcome.history.step) == (True, STEPS)


@pytest.mark.parametrize(
    ("scores", "at_random", "step"),
    [
        ([0.9, 0.1, 0.2, 0.9, 0.3], False, 0),
        ([0.9, 0.1, 0.2, 0.9, 0.3], True, 30),
        ([0.9, 0.1, 0.95, 0.2, 0.92], False, 20),
        ([0.9, 0.1, 0.95, 0.96, 0.92], True, 30),
    ],
)
def test_the_start_is_the_model_if_no_validation_is_better(
    tmp_path: Path, scores: list[float], at_random: bool, step: int
) -> None:
    """A run that is interrupted before and after each validation decides the same."""
    for name, stops in (("a", ()), ("b", (9, 1, 1, 9, 10))):
        given = replace(settings(tmp_path / name), starts_at_random=at_random)
        for stop in (*stops, 0):
            task = Toy()
            before = {k: v.clone() for k, v in task.net.state_dict().items()}
            done = weights(tmp_path / name)["step"] if CheckpointFolder(str(tmp_path / name)).has_checkpoint else -1
            task.scores = [score for at, score in zip((0, 10, 20, 30, 40), scores, strict=True) if at > done]
            outcome = trained(task, given, stop)
        best = checkpointing.read_checkpoint(CheckpointFolder(str(tmp_path / name)).best_path)
        assert outcome.history.model_step == best["step"] == step
        assert outcome.history.model_scores == best["scores"] == {"score": scores[step // 10]}
        assert outcome.history.start == {"score": 0.9}
        assert (step > 0) != equal(best["net"], before)
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert equal(one["net"], other["net"])
    assert one["standing"] == other["standing"]


def test_a_checkpoint_of_an_older_version_is_resumed(tmp_path: Path) -> None:
    trained(Toy(), settings(tmp_path), stop=15)
    checkpoints = CheckpointFolder(str(tmp_path))
    content = weights(tmp_path)
    for name in ("start", "keeps_start"):
        del content["standing"][name]
    checkpoints.save(content)
    outcome = trained(Toy(), settings(tmp_path))
    assert (outcome.resumed, outcome.history.start, outcome.history.model_step) == (15, {}, outcome.history.step)
    assert outcome.history.step > 0


def test_metrics_of_the_start_are_json(whole: Path) -> None:
    first = (whole / "metrics.jsonl").read_text().splitlines()[0]
    assert '"step": 0' in first
    assert '"loss": null' in first
    assert "NaN" not in first


@pytest.mark.parametrize(
    ("distance", "at_random", "collapses"),
    [(0.081, False, False), (0.08, False, True), (0.08, True, False), (math.nan, False, False)],
)
def test_a_collapsed_space_ends_the_run_with_the_best_weights(
    tmp_path: Path, distance: float, at_random: bool, collapses: bool
) -> None:
    distances = iter([0.8, 0.9, distance, 0.8, 0.8])
    scores = iter([0.5, 0.6, 0.99, 0.1, 0.1])
    task = Toy()
    task.validate = lambda net: {  # type: ignore[method-assign]
        "score": next(scores),
        "impostor_distance": next(distances),
        "genuine_distance": 0.03,
    }
    given = replace(settings(tmp_path), starts_at_random=at_random)
    if not collapses:
        assert trained(task, given).end == "done"
        return
    message = (
        r"collapsed at step 20: .* pairs is 0\.0800, and was 0\.8000 at the start .*0\.0300.*Lower optim\.lr \(0\.05\).*"
        r"best weights, of step 10, are kept"
    )
    with pytest.raises(AgreedError, match=message):
        trained(task, given)
    assert checkpointing.read_checkpoint(CheckpointFolder(str(tmp_path)).best_path)["step"] == 10
    assert weights(tmp_path)["step"] == 14


def test_schedules() -> None:
    def rates(steps: int = 100, **options: Any) -> list[float]:
        plan = schedule.build_schedule(ScheduleConfig(steps=steps, **options), 10)
        return [plan.compute_factor(t) for t in range(steps)]

    assert rates(policy="constant", warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    steps = rates(policy="step", milestones=(50, 80), gamma=0.1)
    assert [steps[n] for n in (49, 50, 80)] == pytest.approx([1, 0.1, 0.01])
    cosine = rates(policy="cosine", final=0.1)
    assert cosine[0] == 1.0
    assert cosine[50] == pytest.approx(0.55)
    assert cosine[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates(policy="poly", power=2.0)[50] == pytest.approx(0.25)
    epochs = schedule.build_schedule(ScheduleConfig(epochs=3, policy="step", milestones=(2.0,)), 10)
    assert (epochs.total, epochs.milestones) == (30, (20,))
    with pytest.raises(ConfigError, match="warmup is 100 steps"):
        rates(warmup=100)
    with pytest.raises(ConfigError, match=r"schedule\.milestones, which is empty"):
        rates(policy="step")


def test_a_validation_history_survives_a_checkpoint() -> None:
    history = (
        ValidationHistory().record({"score": 0.5}, 10, ScheduleConfig()).record({"score": 0.4}, 20, ScheduleConfig())
    )
    assert (history.best, history.step, history.stale) == (0.5, 10, 1)
    assert ValidationHistory(**history.to_dict()) == history
    of_start = history.record_start({"score": 0.6})
    assert ValidationHistory(**of_start.to_dict()) == of_start


def test_groups_of_parameters() -> None:
    task = Toy()
    config = OptimConfig(weight_decay=0.1, head_weight_decay=0.2, head_lr=10.0)
    found = {
        name: g for g, names in optim.group_parameters(task.net, task.objective, config, 0.5).items() for name in names
    }
    assert found["net.0.weight"] == optim.ParameterGroup(0.25, 0.1)
    assert found["net.0.bias"] == optim.ParameterGroup(0.25, 0.0)
    assert found["net.1.weight"] == optim.ParameterGroup(0.5, 0.0)
    assert found["net.4.weight"] == optim.ParameterGroup(1.0, 0.1)
    assert found["head.weight"] == optim.ParameterGroup(10.0, 0.2)
    optimizer = optim.build_optimizer(optim.group_parameters(task.net, task.objective, config), config)
    optim.set_learning_rate(optimizer, 0.3)
    assert sorted(g["lr"] for g in optimizer.param_groups) == pytest.approx([0.3, 0.3, 3.0])


class TripletToy(Toy):
    """A network that is fine-tuned on triplets, and validated on the distances of its vectors."""

    def __init__(self, start: dict[str, Tensor] | None = None):
        super().__init__(norm=False, loss=LossConfig("triplet", margin=0.2))
        if start is not None:
            self.net.load_state_dict(start)

    def validate(self, net: nn.Module) -> dict[str, float]:
        x, y = self.make_batch(10_000)
        vectors = nn.functional.normalize(net(x))
        left, right = torch.triu_indices(len(x), len(x), 1)
        distances = (vectors[left] - vectors[right]).norm(dim=1)
        same = y[left] == y[right]
        medians = {"genuine_distance": distances[same].median(), "impostor_distance": distances[~same].median()}
        figures = {name: float(value) for name, value in medians.items()}
        return {"score": figures["impostor_distance"] - figures["genuine_distance"]} | figures


def test_triplets_at_a_large_rate_collapse(tmp_path: Path) -> None:
    """For real: the same fine-tuning goes well at a small rate, and at a large one all vectors fall together."""
    trained(TripletToy(), replace(settings(tmp_path / "start"), starts_at_random=True))
    start = checkpointing.read_checkpoint(CheckpointFolder(str(tmp_path / "start")).best_path)["net"]
    fine = replace(settings(tmp_path / "fine"), optim=OptimConfig(lr=0.001))
    assert trained(TripletToy(start), fine).end == "done"
    ruin = replace(settings(tmp_path / "ruin"), optim=OptimConfig(lr=300.0))
    with pytest.raises(AgreedError, match=r"collapsed at step \d+: .*start weights are kept"):
        trained(TripletToy(start), ruin)
    kept = checkpointing.read_checkpoint(CheckpointFolder(str(tmp_path / "ruin")).best_path)
    assert kept["step"] == 0
    assert equal(kept["net"], start)


@pytest.mark.parametrize(("start", "rate"), [("", 0.1), ("dlib-resnet", 0.001)])
def test_the_default_rate_fits_the_start(start: str, rate: float) -> None:
    config = OptimConfig().resolve(has_start=bool(start))
    assert (config.lr, config.peak_rate) == (rate, rate)
    assert OptimConfig(lr=0.3).resolve(has_start=bool(start)).lr == 0.3


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    task = Toy(norm=False)
    before = {k: v.clone() for k, v in task.net.state_dict().items()}
    config = OptimConfig(lr=1.0, momentum=0.0, weight_decay=0.0, clip=0.01)
    trained(task, replace(settings(tmp_path), optim=config, schedule=ScheduleConfig(steps=1, policy="constant")))
    moved = sum(float(((v - before[k]) ** 2).sum()) for k, v in task.net.state_dict().items())
    assert 0 < moved <= 0.01**2 * 1.001


def test_what_is_frozen_stays_until_it_is_thawed(tmp_path: Path) -> None:
    task = Toy()
    before = {k: v.clone() for k, v in task.net.state_dict().items()}
    names = optim.find_frozen_names(task.net, ["0", "1"])
    given = replace(settings(tmp_path), frozen=names, unfreeze_step=20)
    trained(task, given, stop=19)
    for key in ("0.weight", "1.weight", "1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(task.net.state_dict()[key], before[key]), key
    assert not torch.equal(task.net.state_dict()["4.weight"], before["4.weight"])
    task = Toy()
    trained(task, given)
    for key in ("0.weight", "1.running_mean"):
        assert not torch.equal(task.net.state_dict()[key], before[key]), key
    with pytest.raises(ConfigError, match="no parameter begins with 'body'; choose from 0, 1, 4"):
        optim.find_frozen_names(task.net, ["body"])


def test_thawing_is_resumed_exactly(tmp_path: Path) -> None:
    names = optim.find_frozen_names(Toy().net, ["0"])
    for folder, stops in (("a", ()), ("b", (20, 3))):
        given = replace(settings(tmp_path / folder), frozen=names, unfreeze_step=20)
        for stop in stops:
            trained(Toy(), given, stop)
        trained(Toy(), given)
    assert equal(weights(tmp_path / "a")["net"], weights(tmp_path / "b")["net"])


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = CheckpointFolder(str(tmp_path), keep=3)
    for step in (1, 2, 3):
        checkpoints.save({"step": step, "x": torch.full((100,), float(step))})
    last = checkpoints.folder / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-40])
    found = CheckpointFolder(str(tmp_path)).load()
    assert found is not None
    assert found["step"] == 2
    assert float(found["x"][0]) == 2.0
    older = checkpoints.folder / "last-1.ckpt"
    data = bytearray(older.read_bytes())
    data[len(data) // 2] ^= 1
    older.write_bytes(data)
    found = CheckpointFolder(str(tmp_path)).load()
    assert found is not None
    assert found["step"] == 1
    (checkpoints.folder / "last-2.ckpt").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"every checkpoint in .* is damaged"):
        CheckpointFolder(str(tmp_path)).load()


def test_a_checkpoint_cannot_bring_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpointing.write_checkpoint(tmp_path / "last.ckpt", {"step": 1, "x": Evil()})
    with pytest.raises(checkpointing.DamagedCheckpointError):
        checkpointing.read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_only_one_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "_LOCK_TIMEOUT_S", 0.1)
    checkpoints = CheckpointFolder(str(tmp_path))
    other = CheckpointFolder(str(tmp_path)).lock()
    with checkpoints.lock(), pytest.raises(TrainingError, match="another run is writing to"), other:
        pass


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    entries = [TrainingProgress(n, 9, n / 3, 1.0, 0.1, 5.0, float(n)) for n in (2, 4, 6)]
    with MetricsLog(str(tmp_path), 0) as log:
        for entry in entries:
            log.write(entry)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "cut')
    with MetricsLog(str(tmp_path), 4) as log:
        log.write(replace(entries[2], loss=2.0))
    assert [(e.step, e.loss) for e in metrics_log.read_metrics(str(tmp_path))] == [(2, 1.0), (4, 1.0), (6, 2.0)]
    assert entries[1].seconds_left == pytest.approx(5.0)


def test_each_curve_has_one_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The accuracy of a training batch and that of the validation are two curves."""
    points: dict[str, list[tuple[int, float]]] = {}

    class Writer:
        def __init__(self, folder: str, purge_step: int):
            pass

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            points.setdefault(tag, []).append((step, value))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr("tensorboardX.SummaryWriter", Writer)
    entry = TrainingProgress(2, 9, 0.1, 1.0, 0.1, 5.0, 1.0)
    with MetricsLog(str(tmp_path), 0, tensorboard=True) as log:
        log.write(replace(entry, step=0, loss=None, scores={"score": 0.5}))
        log.write(replace(entry, figures={"accuracy": 0.2}))
        log.write(replace(entry, step=4, figures={"accuracy": 0.3}, scores={"score": 0.9, "accuracy": 0.93}))
    assert points["train/accuracy"] == [(2, 0.2), (4, 0.3)]
    assert points["val/accuracy"] == [(4, 0.93)]
    assert points["val/score"] == [(0, 0.5), (4, 0.9)]
    assert set(points) == {
        *("train/accuracy", "train/loss", "train/lr", "train/images_per_second", "val/accuracy", "val/score")
    }


def test_loaders_follow_the_cpus() -> None:
    assert [count_loaders(cpus) for cpus in (1, 2, 8, 64)] == [0, 1, 7, 8]


SHARDED = LossConfig("am-softmax", scale=8.0, margin=0.1, sharded=True)


@pytest.mark.parametrize(("loss", "stops"), [(None, ()), (SHARDED, (3,))])
def test_two_ranks_with_the_same_batch_are_one(tmp_path: Path, loss: LossConfig | None, stops: Sequence[int]) -> None:
    """Two gloo processes, a network without batch norm: the mean of two halves' gradients is that of the whole.

    Of a sharded head each has its own classes, and the checkpoint all of them; a run is stopped and gone on with.
    """
    ranks = [forked(lambda rank=rank: one_of_two(tmp_path / "two", rank, loss, stops)) for rank in range(2)]  # type: ignore[misc]
    assert [os.waitpid(rank, 0)[1] for rank in ranks] == [0, 0]
    trained(Toy(norm=False, loss=loss), clipped(tmp_path / "one"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for part in ("net", "head"):
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            assert torch.allclose(value, two[part][key], rtol=0, atol=1e-6), key
    # A checkpoint of two workers is gone on with by one.
    more = replace(settings(tmp_path / "two"), schedule=ScheduleConfig(steps=STEPS + 5, policy="constant"))
    assert trained(Toy(norm=False, loss=loss), more).resumed == STEPS


def test_precision_is_checked() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        MixedPrecision("fp16", torch.device("cpu"))
    assert MixedPrecision("auto", torch.device("cpu")).name == "fp32"


def test_bf16_trains_on_a_cpu(tmp_path: Path) -> None:
    assert trained(Toy(), settings(tmp_path, precision="bf16")).end == "done"
    assert weights(tmp_path)["net"]["0.weight"].dtype == torch.float32
    entries = metrics_log.select_trained(metrics_log.read_metrics(str(tmp_path)))
    assert entries[-1].loss < entries[0].loss


def test_the_report_is_one_page_without_outside_assets(tmp_path: Path, whole: Path) -> None:
    entries = metrics_log.read_metrics(str(whole))
    outcome = Outcome("done", STEPS, STEPS, 12.0, 0, ValidationHistory(0.9, 20, scores={"score": 0.9}))
    config = {
        "optim": {"lr": 0.1},
        "detection": {"loss": {"box": 2.0}},
        "data": {"source": "<script>alert(1)</script>"},
    }
    texts = ReportTexts("Training", "out", {"images": 1234}, config, scores={"auc": 1.0})
    write_report(str(tmp_path / "report.html"), entries, outcome, texts)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<path") == 5
    for text in ("1,234", "loss.box", "Learning rate", "Throughput", "&lt;script&gt;", "best"):
        assert text in page, text


def test_a_start_of_another_dim_keeps_the_trunk(tmp_path: Path) -> None:
    first = start.resolve_start(ModelConfig(architecture="mobilefacenet", dim=64))
    state = first.build(0).state_dict()
    torch.save(state, tmp_path / "a.pth")
    same = start.resolve_start(ModelConfig(architecture="mobilefacenet", start=str(tmp_path / "a.pth")))
    assert same.dim == 64
    assert same.list_resized() == []
    assert equal(same.build(5).state_dict(), state)
    other = start.resolve_start(ModelConfig(architecture="mobilefacenet", start=str(tmp_path / "a.pth"), dim=32))
    resized = set(other.list_resized())
    assert resized
    built = other.build(5).state_dict()
    kept = [k for k in state if k not in resized]
    assert all(torch.equal(built[k], state[k]) for k in kept)
    frozen = set(other.list_frozen_prefixes(ModelConfig(freeze="trunk")))
    assert frozen
    assert not frozen & resized
    missing = dict(list(state.items())[1:])
    torch.save(missing, tmp_path / "b.pth")
    broken = start.resolve_start(ModelConfig(architecture="mobilefacenet", start=str(tmp_path / "b.pth")))
    from facepipe.errors import WeightsError

    with pytest.raises(WeightsError, match=f"1 missing: {next(iter(state))}"):
        broken.build(0)
    name = next(k for k in resized if state[k].dim() == 4)
    for shape in ((64, state[name].shape[1] - 1, 1, 1), ()):
        torch.save({**state, name: torch.zeros(shape)}, tmp_path / "c.pth")
        for dim in (None, 32):
            damaged = start.resolve_start(
                ModelConfig(architecture="mobilefacenet", start=str(tmp_path / "c.pth"), dim=dim)
            )
            with pytest.raises(WeightsError, match=name):
                damaged.build(0)


def test_dlib_s_network_takes_another_dim_and_keeps_its_trunk() -> None:
    found = start.resolve_start(ModelConfig(start="dlib-resnet", dim=64, freeze="trunk"))
    assert found.list_resized() == ["fc.weight"]
    net = found.build(0)
    assert net(torch.zeros(1, 3, 150, 150)).shape == (1, 64)
    names = {name for name, _ in net.named_parameters()}
    assert names - set(found.list_frozen_prefixes(ModelConfig(freeze="trunk"))) == {"fc.weight"}


def test_a_detector_s_heads_are_at_one_depth() -> None:
    from facepipe.models.detectors.retinaface import RetinaFaceNet

    net = RetinaFaceNet("mobilenet025", norms=True)
    found = {
        n: g.scale
        for g, names in optim.group_parameters(net, nn.Linear(1, 1), OptimConfig(), 0.5).items()
        for n in names
    }
    scales = [
        {scale for name, scale in found.items() if name.startswith(f"net.{prefix}")}
        for prefix in ("class_head", "box_head", "landmark_head", "context", "merge", "lateral")
    ]
    assert scales == [{1.0}, {1.0}, {1.0}, {0.5}, {0.25}, {0.125}]
    assert {s for n, s in found.items() if n.startswith("net.trunk.stage1")} == {0.5**6}
    assert len(found) == len(list(net.parameters())) + 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(), "model.architecture is missing"),
        (ModelConfig(architecture="resnet9000"), "no embedder is named 'resnet9000'"),
        (ModelConfig(start="retinaface-mnet025"), "no embedder is named 'retinaface-mnet025'"),
    ],
)
def test_models_that_cannot_be_trained(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start.resolve_start(config)


@pytest.mark.parametrize("name", ["softmax", "arcface", "subcenter-arcface", "triplet-softmax"])
def test_imprinted_centres_are_the_classes_mean_directions(name: str) -> None:
    class Rows:
        labels = np.array([2, 0, 1, 0, 2, 2, 1, 0])

        def load_chips(self, rows: np.ndarray) -> np.ndarray:
            return rows  # type: ignore[return-value]

    vectors = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    head = build_objective(LossConfig(name), 6, 3, 0)
    weight = next(p for p in head.parameters() if p.dim() > 1)
    lengths = weight.detach().norm(dim=-1)
    imprint_centres(head, lambda rows: vectors[rows], Rows(), 2)  # type: ignore[arg-type]
    assert torch.allclose(weight.detach().norm(dim=-1), lengths)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for label, rows in ((0, [1, 3]), (1, [2, 6]), (2, [0, 4])):
        mean = units[rows].sum(0) / np.linalg.norm(units[rows].sum(0))
        found = torch.nn.functional.normalize(weight.detach()[label].reshape(-1, 6).mean(0), dim=0).numpy()
        assert found @ mean > (0.99 if name == "subcenter-arcface" else 0.99999)


def test_losses_without_centres_are_left_alone_by_imprinting() -> None:
    imprint_centres(
        build_objective(LossConfig("triplet"), 6, 3, 0), lambda rows: pytest.fail("embeds nothing"), None, 2
    )  # type: ignore[arg-type]
