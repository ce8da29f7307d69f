"""Training as a pipeline: through Ray with a worker that dies, the checks before any work, and what is left behind."""

import csv
import dataclasses
import hashlib
import json
import os
import re
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any

import cloudpickle
import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from facepipe.errors import ConfigError, ModelError, SourceError, TrainingError, WeightsError
from facepipe.hashing import hash64
from facepipe.models.zoo.registry import find_chip_layout
from facepipe.training.config import ModelConfig
from facepipe.training.data.lists import read_label_list
from facepipe.training.start import resolve_start
from facepipe.training.trainer import checkpointing
from facepipe.training.trainer import metrics_log as journal
from facepipe.training.trainer.checkpointing import CheckpointFolder
from facepipe.training.trainer.config import OptimConfig, ScheduleConfig, TrainingRunConfig
from facepipe.training.trainer.loop import LoopSettings
from pipelines.chips.prepare import mark_in_use
from pipelines.chips.run import ChipOrder
from pipelines.train import plan, run
from pipelines.train.angles import write_angles
from pipelines.train.pipeline import catch_signals, read_config, train_plan

STEPS = 30


class Toy:
    """Four numbers to two classes. fatal: this process is killed at this step, once, as the file tells."""

    steps_per_epoch = 10

    def __init__(self, fatal: int, mark: str):
        torch.manual_seed(3)
        self.net: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 4))
        self.objective: nn.Module = nn.Linear(4, 2)
        self._fatal, self._mark = fatal, mark

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, ...]:
        if step == self._fatal and not os.path.exists(self._mark):
            open(self._mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return x, (x[:, 0] > 0).long()

    def compute_loss(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        return nn.functional.cross_entropy(self.objective(self.net(inputs[0])), inputs[1]), {}

    def validate(self, net: nn.Module) -> dict[str, float]:
        return {"score": -float(self.compute_loss(self.make_batch(9_999))[0])}


@dataclasses.dataclass(frozen=True)
class ToyPlan:
    run: TrainingRunConfig
    fatal: int = -1

    def build(self) -> tuple[Toy, LoopSettings]:
        schedule = ScheduleConfig(steps=STEPS, warmup=3)
        mark = str(Path(self.run.output) / "killed")
        given = LoopSettings(OptimConfig("adamw", lr=0.01), schedule, self.run, validate_steps=10)
        return Toy(self.fatal, mark), given


def loaded(output: Path) -> dict[str, Any]:
    found = CheckpointFolder(str(output)).load()
    assert found is not None
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.slow
def test_through_ray_a_killed_worker_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    options = {"log_every": 5, "checkpoint_steps": 4, "threads": 1}
    try:
        killed = ToyPlan(TrainingRunConfig(str(tmp_path / "ray"), runner="ray", **options), fatal=17)  # type: ignore[arg-type]
        (tmp_path / "ray").mkdir()
        told = list[Any]()
        outcome = train_plan(killed, told.append)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert (tmp_path / "ray" / "killed").exists()
    assert (outcome.end, outcome.step, outcome.resumed) == ("done", STEPS, 16)
    assert told
    assert told[-1].step == STEPS
    train_plan(ToyPlan(TrainingRunConfig(str(tmp_path / "inline"), runner="inline", **options)))  # type: ignore[arg-type]
    one, other = loaded(tmp_path / "ray"), loaded(tmp_path / "inline")
    for part in ("net", "head", "optimizer", "standing"):
        assert same(one[part], other[part]), part
    steps = [[e.step for e in journal.read_metrics(str(tmp_path / name))] for name in ("ray", "inline")]
    assert steps[0] == steps[1]


def test_the_first_signal_ends_the_step_and_the_second_counts() -> None:
    reached = list[bool]()

    def work(signals: int) -> None:
        with catch_signals() as stop:
            for _ in range(signals):
                reached.append(stop())
                signal.raise_signal(signal.SIGINT)
            reached.append(stop())

    with pytest.raises(KeyboardInterrupt):
        work(1)
    assert reached == [False, True]
    with pytest.raises(KeyboardInterrupt):
        work(2)
    assert reached == [False, True, False, True]
    work(0)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


BASE: dict[str, Any] = {
    "data": {"source": "nowhere"},
    "model": {"architecture": "mobilefacenet"},
    "run": {"output": "nowhere-either", "runner": "inline"},
}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"loss": {"name": "triplet", "mining": "batch-hard"}, "sample": {"identities": 8, "images": 1}}, "at least 2"),
        ({"loss": {"name": "triplet"}}, "compares faces of one person"),
        ({"loss": {"name": "triplet"}, "sample": {"identities": 1}}, "at least 2"),
        (
            {"loss": {"name": "cosine"}, "sample": {"identities": 4}, "run": {"runner": "ray", "workers": 4}},
            "at least 2",
        ),
        (
            {"run": {"patience": 2}, "schedule": {"validate": 0}},
            "run.patience=2 needs validation, which is disabled: schedule.validate is 0",
        ),
        (
            {"schedule": {"policy": "plateau"}, "split": {"by": "none"}},
            "policy=plateau needs validation, which is disabled: nothing is held out",
        ),
        ({"schedule": {"milestones": [3]}}, "milestones need policy step"),
        ({"schedule": {"policy": "step", "milestones": [3, 30]}}, "30 is not before the end"),
        ({"model": {"unfreeze_at": 2}}, "needs model.freeze, which is empty"),
        ({"model": {"freeze": "trunk", "unfreeze_at": 20}}, "unfreeze_at=20 is not before the end"),
        ({"model": {"imprint": 4}, "loss": {"name": "cosine"}, "sample": {"identities": 4}}, "cosine has none"),
        ({"validate": {"source": "lfw"}}, "need a pairs file"),
        ({"optim": {"optimizer": "adam", "beta1": 1.0}}, "optim.beta1"),
        ({"loss": {"name": "triplet", "offline": True, "mining": "batch-all"}}, "one triplet per anchor"),
        ({"loss": {"name": "triplet", "offline": True}}, "three times the triplets"),
        ({"loss": {"name": "triplet", "offline": True}, "sample": {"identities": 4}}, "remove sample.identities"),
        ({"loss": {"name": "arcface", "offline": True}}, "arcface has no loss.offline"),
        (
            {
                "loss": {"name": "triplet", "offline": True},
                "sample": {"batch": 12},
                "run": {"runner": "ray", "workers": 3},
            },
            "the number of triplets in sample.batch = 4 does not divide by run.workers = 3",
        ),
        ({"loss": {"name": "arcfac"}}, "did you mean arcface"),
        ({"optim": {"learning_rate": 1}}, "unknown key optim.learning_rate"),
        ({"model": {"freezing": "trunk"}}, "unknown key model.freezing: did you mean model.freeze"),
        ({"run": {"output": ""}}, "run.output is missing"),
        ({"run": {"output": "s3://bucket/run"}}, "set a local folder"),
        ({"schedule": {"policy": "step"}}, "milestones, which is empty"),
        ({"schedule": {"warmup": 20}}, "warmup=20 is not before"),
        ({"run": {"runner": "ray", "workers": 3}}, "sample.batch = 128 does not divide by run.workers = 3"),
        ({"run": {"workers": 2}}, "needs run.runner=ray"),
        ({"data": {"gallery": "g"}}, "both are set"),
        ({"detection": {"annotations": "x"}}, "unknown key data"),
    ],
)
def test_configs_that_cannot_be_are_refused_before_any_work(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(BASE, layer)


def test_a_gpu_that_is_absent_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    from facepipe.models.runtime.device import count_gpus

    if count_gpus():
        pytest.skip("there is a GPU")
    output = tmp_path / "out"
    with pytest.raises(ModelError, match="no CUDA device is available"):
        run(read_config(BASE, {"run": {"device": "cuda", "output": str(output)}}))
    assert not output.exists()


@pytest.fixture(scope="module")
def persons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of six 'persons', each a pattern of its own with noise."""
    root = tmp_path_factory.mktemp("persons")
    for person in range(6):
        (root / f"person{person}").mkdir()
        pattern = np.random.default_rng(person).integers(60, 200, (3, 3, 3)).astype(np.uint8)
        for n in range(4):
            noise = np.random.default_rng(100 * person + n).integers(-30, 30, (32, 32, 3))
            pixels = cv2.resize(pattern, (32, 32), interpolation=cv2.INTER_CUBIC) + noise
            cv2.imwrite(str(root / f"person{person}" / f"{n}.png"), np.clip(pixels, 0, 255).astype(np.uint8))
    return root


def config(persons: Path, output: Path, **layers: Any) -> Any:
    tree = {
        "data": {"source": str(persons), "aligned": True},
        "model": {"architecture": "mobilefacenet", "dim": 128},
        "loss": {"name": "am-softmax", "scale": 12.0, "margin": 0.1},
        "sample": {"batch": 8},
        "split": {"held": 0.4},
        "optim": {"lr": 0.02},
        "schedule": {"steps": 4, "validate": 2},
        "run": {"output": str(output), "runner": "inline", "threads": 1, "log_every": 1, "checkpoint_steps": 1},
    }
    return read_config(tree, layers)


def test_records_train_and_verification_sets_score(persons: Path, tmp_path: Path) -> None:
    """As insightface's folders are: train.rec, and several .bin beside it, without another setting."""
    # Workers of Ray import this module, and do not find the helpers of tests.
    from archives import write_records, write_verification_set

    crops = [(path.read_bytes(), int(path.parent.name[-1])) for path in sorted(persons.rglob("*.png"))]
    write_records(tmp_path / "train.rec", crops)
    for name in ("lfw", "agedb_30", "cfp_fp"):
        pairs = [(crops[n][0], crops[n + 1 + 4 * (n % 2)][0]) for n in range(16)]
        images = [image for pair in pairs for image in pair]
        write_verification_set(tmp_path / f"{name}.bin", images, [n % 2 == 0 for n in range(16)])
    tests = [{"pairs": str(tmp_path / "agedb_30.bin")}, {"pairs": str(tmp_path / "cfp_fp.bin")}]
    summary = run(
        config(
            tmp_path / "train.rec",
            tmp_path / "out",
            split={"held": 0},
            validate={"pairs": str(tmp_path / "lfw.bin")},
            test=tests,
        )
    )
    assert (summary.end, summary.step) == ("done", 4)
    assert summary.data["images"] == 24
    assert [compared.name for compared in summary.comparisons][-2:] == ["test agedb_30.bin", "test cfp_fp.bin"]


def test_from_images_to_a_model_that_embeds(persons: Path, tmp_path: Path) -> None:
    from facepipe.models.zoo.registry import find_card

    output = tmp_path / "first"
    summary = run(config(persons, output))
    assert (summary.end, summary.step, summary.resumed) == ("done", 4, 0)
    assert summary.data["images"] + summary.data["held-out images"] == 24
    made = find_card(summary.model, "embedder")
    assert made.dim == 128
    assert made.load("cpu", 1).embed(np.zeros((2, 112, 96, 3), np.uint8)).shape == (2, 128)
    manifest = json.loads((output / "manifest.json").read_text())
    faces = np.load(output / "faces.npy")
    assert len(faces) == manifest["images"] == summary.data["images"]
    assert manifest["faces_sha256"] == hashlib.sha256(faces.tobytes()).hexdigest()
    assert manifest["config"]["optim"]["lr"] == 0.02
    frozen = config(persons, tmp_path / "frozen", run={"chips": str(output / "chips")})
    every = tuple({k.split(".")[0] for k in loaded(output)["net"]})
    with pytest.raises(ConfigError, match="freezes all parameters"):
        run(dataclasses.replace(frozen, model=dataclasses.replace(frozen.model, freeze=every)))
    assert "mobilefacenet" in (output / "report.html").read_text()
    # Again: nothing to do, the same model.
    before = (output / "model.safetensors").read_bytes()
    again = run(config(persons, output))
    assert again.resumed == 4
    assert (output / "model.safetensors").read_bytes() == before
    # Other settings are not mixed with these checkpoints; --fresh begins again.
    with pytest.raises(TrainingError, match=r"other settings \(optim\): start again with --fresh"):
        run(config(persons, output, optim={"lr": 0.5}))
    # Fine-tuning from the result, with another length of vectors and a frozen trunk.
    tuned = config(persons, tmp_path / "second", run={"chips": str(output / "chips")}, schedule={"steps": 1})
    model = {"start": summary.model, "architecture": "mobilefacenet", "dim": 64, "freeze": "trunk"}
    run(dataclasses.replace(tuned, model=dataclasses.replace(tuned.model, **model)))
    first, second = loaded(output), loaded(tmp_path / "second")
    best = checkpointing.read_checkpoint(CheckpointFolder(str(output)).best_path)["net"]
    changed = [k for k, v in second["net"].items() if k not in best or not torch.equal(v, best[k])]
    assert 0 < len(changed) < len(first["net"]) / 4
    start = json.loads((tmp_path / "second" / "manifest.json").read_text())["start"]
    assert start["sha256"] == hashlib.sha256(before).hexdigest()


@pytest.mark.parametrize("name", ["triplet", "triplet-softmax"])
def test_triplets_mined_once_an_epoch(persons: Path, tmp_path: Path, name: str) -> None:
    """With a margin that is not kept there is something to mine in each epoch."""
    loss = {"name": name, "margin": 2.0, "offline": True, "scale": None}
    layers = {"sample": {"batch": 12}, "schedule": {"steps": 8, "validate": 8}, "optim": {"lr": 1e-4}}
    given = config(persons, tmp_path, loss=loss, **layers)
    summary = run(given)
    assert (summary.end, summary.step) == ("done", 8)
    assert summary.loss > 0
    prepared = loaded(tmp_path)["prepared"]
    labels = np.repeat(np.arange(summary.data["identities"]), 4)
    anchor, positive, negative = labels[prepared["triplets"].numpy()].T
    assert (anchor == positive).all()
    assert (anchor != negative).all()


def test_fresh_takes_nothing_before_it_is_known_that_the_run_can_begin(
    persons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(persons, tmp_path)
    run(given)
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and ".lock" not in path.name}
    with pytest.raises(SourceError):
        run(config(persons / "nowhere", tmp_path), fresh=True)
    assert {path: path.read_bytes() for path in left} == left
    monkeypatch.setattr(checkpointing, "_LOCK_TIMEOUT_S", 0.2)
    with CheckpointFolder(str(tmp_path)).lock(), pytest.raises(TrainingError, match="another run is writing"):
        run(given, fresh=True)
    assert {path: path.read_bytes() for path in left} == left
    assert run(given, fresh=True).resumed == 0


def test_a_training_goes_on_with_the_chips_it_began_with(persons: Path, tmp_path: Path) -> None:
    """Images that came to the gallery since are for a training that begins anew; another run cannot take them away."""
    from conftest import draw

    from facepipe.config import build
    from pipelines.embed import EmbedConfig
    from pipelines.embed import run as embed

    def add(folder: Path) -> None:
        fakes = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}, "run": {"runner": "inline"}}
        embed(build(EmbedConfig, {**fakes, "source": {"uri": str(folder)}}), str(tmp_path / "gallery"))

    def red(folder: Path, first: int) -> Path:
        for n in range(first, first + 12):
            (folder / f"person{n % 3}").mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / f"person{n % 3}" / f"{n}.png"), draw(3 * n + 1))
        return folder

    add(red(tmp_path / "one", 0))
    layers: dict[str, Any] = {"data": {"source": "", "aligned": False, "gallery": str(tmp_path / "gallery")}}
    layers |= {"split": {"by": "none"}, "schedule": {"steps": 3, "validate": 0}}
    given = config(persons, tmp_path / "run", **layers)
    first = run(given)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    add(red(tmp_path / "two", 20))
    again = run(given)
    assert again.resumed == 3
    assert again.data["images"] == first.data["images"] == 12
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["data"] == manifest["data"]
    other = dataclasses.replace(given, run=dataclasses.replace(given.run, output=str(tmp_path / "other")))
    shared = dataclasses.replace(other, run=dataclasses.replace(other.run, chips=str(tmp_path / "run" / "chips")))
    with (
        mark_in_use(str(tmp_path / "run" / "chips")),
        pytest.raises(ConfigError, match="which another training is using"),
    ):
        run(shared)
    assert run(given, fresh=True).data["images"] == 24


def test_class_centres_are_imprinted_again_where_no_checkpoint_was_left(persons: Path, tmp_path: Path) -> None:
    """Killed between the first best network and the first checkpoint."""
    start = run(config(persons, tmp_path / "start")).model
    given = [config(persons, tmp_path / name, split={"held": 0.4}) for name in ("a", "b")]
    given = [dataclasses.replace(g, model=dataclasses.replace(g.model, start=start, imprint=2)) for g in given]
    run(given[0])
    folder = tmp_path / "b" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "best.ckpt").write_bytes((tmp_path / "a" / "checkpoints" / "best.ckpt").read_bytes())
    run(given[1])
    assert same(loaded(tmp_path / "a")["net"], loaded(tmp_path / "b")["net"])
    assert same(loaded(tmp_path / "a")["head"], loaded(tmp_path / "b")["head"])


def test_the_model_has_the_scores_of_its_own_step(persons: Path, tmp_path: Path) -> None:
    given = config(persons, tmp_path)
    first = run(given)
    assert first.scores
    assert json.loads((tmp_path / "manifest.json").read_text())["model_step"] == first.best
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    again = run(given)
    assert (again.best, again.scores) == (4, {})
    assert "same_person" not in (tmp_path / "model.toml").read_text()


@pytest.fixture(scope="module")
def start(persons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to fine-tune, which tell the six patterns apart: random ones that have the statistics of their images."""
    net = resolve_start(ModelConfig(architecture="mobilefacenet", dim=128)).build(0)
    images = [cv2.resize(cv2.imread(str(path)), (96, 112)) for path in sorted(persons.rglob("*.png"))]
    pixels = torch.from_numpy((np.stack(images)[..., ::-1].transpose(0, 3, 1, 2) - 127.5) / 128).float()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean over all passes
    with torch.no_grad():
        for _ in range(2):
            net(pixels)
    path = tmp_path_factory.mktemp("start") / "start.pth"
    torch.save(net.state_dict(), path)
    return path


def tuned(persons: Path, start: Path, output: Path, **layers: Any) -> Any:
    """A fine-tuning on triplets, on chips that all of them share."""
    shared = {
        "model": {"architecture": "mobilefacenet", "start": str(start)},
        "loss": {"name": "triplet", "scale": None, "margin": 0.2},
        "sample": {"identities": 3, "images": 3},
        "schedule": {"steps": 2, "validate": 2, "policy": "constant"},
        "optim": {"lr": None},
        "run": {"output": str(output), "runner": "inline", "threads": 1, "chips": str(start.parent / "chips")},
    }
    for section, values in layers.items():
        shared[section] = {**shared.get(section, {}), **values}
    return config(persons, output, **shared)


def test_the_start_weights_stay_if_training_made_nothing_better(persons: Path, start: Path, tmp_path: Path) -> None:
    """With one layer that learns next to nothing, every score is that of the start."""
    output = tmp_path / "out"
    lines = list[Any]()
    names = [name for name, _ in resolve_start(ModelConfig(architecture="mobilefacenet")).build(0).named_parameters()]
    still = tuned(persons, start, output, optim={"lr": 1e-12}, model={"freeze": tuple(names[1:])})
    summary = run(still, on_progress=lines.append)
    assert (summary.keeps_start, summary.best, summary.scores) == (True, 0, summary.start_scores)
    shown = f"the model is the start weights: their validation score is {summary.start_scores['score']:.4f}"
    assert shown in summary.notes[0]
    assert [(line.step, line.loss is None) for line in lines] == [(0, True), (1, False), (2, False)]
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[0])["loss"] is None
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["model_step"], manifest["start_scores"]) == (0, summary.start_scores)
    kept = resolve_start(ModelConfig(start=summary.model)).state
    given = torch.load(start, weights_only=True)
    assert kept is not None
    assert all(torch.equal(kept[name], value) for name, value in given.items() if name in kept)
    page = (output / "report.html").read_text()
    assert "the model is the start weights" in page
    assert "score of the start" in page


def test_test_sets_compare_the_model_with_its_start(persons: Path, start: Path, tmp_path: Path) -> None:
    """One set of pairs in a file, one that is drawn from a gallery. They decide nothing."""
    from conftest import draw
    from helpers import embed

    for n in range(12):
        (tmp_path / "red" / f"person{n % 3}").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "red" / f"person{n % 3}" / f"{n}.png"), draw(3 * n + 1))
    fakes = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}}
    embed(tmp_path / "red", tmp_path / "gallery", fakes, runner="inline")
    lines = [
        f"person{p}/{n}.png,person{q}/{n + 1}.png,{int(p == q)}" for p in range(6) for q in range(6) for n in (0, 2)
    ]
    (tmp_path / "of file.csv").write_text("\n".join(["file_x,file_y,same", *lines]))
    tests = [
        {"pairs": str(tmp_path / "of file.csv"), "source": str(persons), "aligned": True},
        {"name": "drawn", "gallery": str(tmp_path / "gallery"), "draw": 20, "seed": 4},
    ]
    given = tuned(persons, start, tmp_path / "out", schedule={"steps": 1, "validate": 1})
    summary = run(dataclasses.replace(given, test=read_config(BASE, {"test": tests}).test))
    assert [c.name for c in summary.comparisons] == ["validation", "test of file.csv", "test drawn"]
    assert summary.comparisons[0].before == summary.start_scores
    for compared in summary.comparisons:
        assert compared.keeps_start == summary.keeps_start
        assert (compared.before == compared.after) == (compared.verdict == "the same")
    assert any("nothing of test set drawn is left out of the training data" in note for note in summary.notes)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["comparisons"] == [
        dataclasses.asdict(compared) for compared in summary.comparisons
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Before and after" in page
    assert "[[test]]" in page or "[test]" in page
    # The final model, scored as a start, has the scores that it had at the end. Test sets are no part of the identity.
    again = tuned(persons, Path(summary.model), tmp_path / "again", schedule={"steps": 1, "validate": 0})
    again = dataclasses.replace(
        again, model=ModelConfig(start=summary.model), run=dataclasses.replace(again.run, chips=given.run.chips)
    )
    others = run(dataclasses.replace(again, test=read_config(BASE, {"test": tests[:1]}).test)).comparisons
    assert others[0].before == pytest.approx(summary.comparisons[1].after, abs=1e-6)
    assert run(given).comparisons == summary.comparisons[:1]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"test": {"draw": 10}}, r"\[test\] names no data: set test.gallery"),
        ({"test": {"source": "lfw"}}, "set test.pairs"),
        ({"test": {"pairs": "pairs.txt"}}, "set either test.source or test.gallery"),
        ({"test": [{"gallery": "a/lfw"}, {"gallery": "b/lfw/"}]}, "several test sets are called 'lfw': set test.name"),
        ({"test": {"gallery": "g", "images": 3}}, r"unknown key test\[1\].images"),
    ],
)
def test_test_sets_that_cannot_be_are_refused(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(BASE, layer)


def test_the_recipes_of_the_docs_are_configs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    recipes = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    records, fine_tuning = [read_config(tomllib.loads(recipe)) for recipe in recipes]
    assert (records.data.source, records.data.aligned) == ("faces_emore/train.rec", True)
    assert (fine_tuning.optim.lr, [test.label for test in fine_tuning.test_sets]) == (0.001, ["test-gallery"])


def test_losses_that_were_added_do_not_change_the_identity_of_earlier_runs() -> None:
    """The hash of the loss is that of the fields that it had before AdaFace, MagFace and pytorch-metric-learning."""
    config = read_config(BASE)
    later = {"miner", "margin_high", "norm_low", "norm_high", "norm_weight", "norm_rate", "concentration"}
    earlier = {name: value for name, value in dataclasses.asdict(config.loss).items() if name not in later}
    hashed = hashlib.sha256(json.dumps(earlier, sort_keys=True, default=str).encode()).hexdigest()[:16]
    assert plan._hash_sections(config, ("loss",))["loss"] == hashed
    magface = read_config(BASE, {"loss": {"name": "magface", "margin_high": 0.9}})
    assert (
        plan._hash_sections(magface, ("loss",))["loss"]
        != plan._hash_sections(read_config(BASE, {"loss": {"name": "magface"}}), ("loss",))["loss"]
    )


def test_a_training_of_before_exclude_probability_is_resumed(persons: Path, tmp_path: Path) -> None:
    """Its chips and its checkpoints hold hashes of `data` with another default, and without the later field."""
    output = tmp_path / "run"
    settings = config(persons, output)
    run(settings)
    whole = (output / "model.safetensors").read_bytes()
    earlier = {**dataclasses.asdict(settings.data), "exclude_share": 0.3}
    del earlier["exclude_probability"]
    order = ChipOrder(settings.data, "mobilefacenet")
    facts = [2, earlier, dataclasses.asdict(find_chip_layout("mobilefacenet")), ()]
    info = json.loads((output / "chips" / "set.json").read_text())
    assert order.has_config(info["asked"])
    info |= {"asked": f"{hash64(json.dumps(facts, sort_keys=True)):016x}", "fingerprint": "0123456789abcdef"}
    (output / "chips" / "set.json").write_text(json.dumps(info))
    # The run was killed after three of its four steps.
    folder = CheckpointFolder(str(output))
    contents = {path: checkpointing.read_checkpoint(path) for path in folder.list_paths()}
    # That of the best validation has no identity, and stays.
    contents = {path: content for path, content in contents.items() if "identity" in content}
    checkpoint = min(contents.values(), key=lambda content: content["step"])
    hashed = hashlib.sha256(json.dumps(earlier, sort_keys=True, default=str).encode()).hexdigest()[:16]
    checkpoint["identity"] |= {"data": hashed, "images": "0123456789abcdef"}
    for path in (*contents, *output.glob("model.*")):
        path.unlink()
    folder.save(checkpoint)
    assert run(settings).resumed == 3
    assert (output / "model.safetensors").read_bytes() == whole
    assert loaded(output)["identity"]["data"] != hashed
    # Settings that count are still compared.
    with pytest.raises(TrainingError, match=r"other settings \(data"):
        run(config(persons, output, data={"exclude_share": 0.5}))


@pytest.mark.parametrize(
    ("data", "count"),
    [({}, 2), ({"exclude_share": 0.3}, 2), ({"exclude_probability": 0.9}, 1), ({"min_images": 3}, 2)],
)
def test_settings_of_data_are_hashed_as_earlier_versions_did(data: dict[str, Any], count: int) -> None:
    forms = read_config(BASE, {"data": data}).data.list_forms()
    assert len(forms) == count
    if count == 2:
        assert "exclude_probability" not in forms[1]
        assert forms[1]["exclude_share"] == 0.3


def test_the_default_rate_is_resolved_before_anything_reads_it() -> None:
    assert read_config(BASE).optim.lr == 0.1
    assert read_config(BASE) == read_config(BASE, {"optim": {"lr": 0.1}}), "runs of older versions are resumed"
    fine_tuning = {"model": {"start": "dlib-resnet", "architecture": ""}}
    assert read_config(BASE, fine_tuning).optim.lr == 0.001
    assert read_config(BASE, fine_tuning, {"optim": {"lr": 0.1}}).optim.lr == 0.1
    detector = {"detection": {"annotations": "x"}, "run": {"output": "y", "runner": "inline"}}
    assert read_config(detector).optim.lr == 0.1


def test_faces_far_from_the_main_centre_are_listed_apart(persons: Path, tmp_path: Path) -> None:
    """Sub-center ArcFace's cleaning: train, list what lies near the dominant centres, train on that."""
    layers = {"loss": {"name": "subcenter-arcface", "scale": 12.0}, "schedule": {"steps": 2, "validate": 0}}
    settings = config(persons, tmp_path / "run", **layers)
    with pytest.raises(TrainingError, match="train first"):
        write_angles(settings, str(tmp_path / "near.csv"))
    run(settings)
    all_faces = write_angles(settings, str(tmp_path / "all.csv"), 180.0)
    assert all_faces.dropped == 0
    summary = write_angles(settings, str(tmp_path / "near.csv"), all_faces.median)
    assert summary.kept + summary.dropped == all_faces.kept
    assert min(summary.kept, summary.dropped) > 0
    with open(summary.list) as near, open(summary.dropped_list) as far:
        kept = list(csv.DictReader(near))
        dropped = list(csv.DictReader(far))
    assert max(float(row["angle"]) for row in kept) <= round(all_faces.median, 2)
    assert min(float(row["angle"]) for row in dropped) >= round(all_faces.median, 2)
    assert all(row["identity"] in row["uri"] for row in [*kept, *dropped])
    labels = read_label_list(summary.list, None)
    assert (labels.by_face, len(labels.keys)) == (True, summary.kept)
    # A loss without centres has nothing to measure.
    other = config(persons, tmp_path / "run", loss={"name": "triplet", "scale": None}, sample={"identities": 3})
    with pytest.raises(ConfigError):
        write_angles(other, str(tmp_path / "none.csv"))


def test_weights_of_imagenet_start_a_resnet(tmp_path: Path) -> None:
    """A trunk with a classifier: the embedding layer starts at random, everything else as in the file."""
    net = resolve_start(ModelConfig(architecture="resnet18", dim=64)).build(0)
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in net.state_dict().items() if "embedding" not in name}
    state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "resnet18.pth")
    start = resolve_start(ModelConfig(architecture="resnet18", start=str(tmp_path / "resnet18.pth"), dim=64))
    assert start.list_resized() == ["embedding.weight", "embedding.bias"]
    built = start.build(1)
    assert built.embedding.weight.shape == (64, 512)
    assert built.embedding.weight.std() > 0
    assert torch.equal(built.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert start.list_frozen_prefixes(ModelConfig(freeze="trunk")) == tuple(
        name for name, _ in built.named_parameters() if not name.startswith("embedding.")
    )


def test_weights_of_another_network_say_which_it_is(persons: Path, tmp_path: Path) -> None:
    """And no chip is cut before that."""
    net = resolve_start(ModelConfig(architecture="resnet18")).build(0)
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items() if "embedding" not in name}
    torch.save({"state_dict": {**state, "module.fc.weight": torch.zeros(1000, 512)}}, tmp_path / "theirs.pth")

    def start_from(name: str, architecture: str) -> Any:
        model = {"architecture": architecture, "start": str(tmp_path / name)}
        return config(persons, tmp_path / "run", model=model, schedule={"steps": 1, "validate": 0})

    for other in ("resnet50", "mobilefacenet"):
        with pytest.raises(WeightsError, match=r"It fits resnet18: set model\.architecture=resnet18"):
            run(start_from("theirs.pth", other))
    torch.save({"encoder.0.weight": torch.zeros(3, 3)}, tmp_path / "foreign.pth")
    with pytest.raises(WeightsError, match="Neither resnet18 nor another network here has its tensors"):
        run(start_from("foreign.pth", "resnet18"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(WeightsError, match=r"cannot be read as a checkpoint: \w+"):
        run(start_from("text.pth", "resnet18"))
    assert not (tmp_path / "run" / "chips").exists()
    assert run(start_from("theirs.pth", "resnet18")).step == 1


def test_weights_to_start_from_are_checked(persons: Path, tmp_path: Path) -> None:
    summary = run(config(persons, tmp_path / "first"))
    weights = tmp_path / "first" / "model.safetensors"
    kept = tmp_path / "first" / "checkpoints" / "last.ckpt"
    begun = config(persons, tmp_path / "second", schedule={"steps": 1})

    def started(from_: Path | str) -> Any:
        return dataclasses.replace(begun, model=dataclasses.replace(begun.model, start=str(from_)))

    assert run(started(kept)).step == 1, "a checkpoint of ours, as after a loss that was not finite"
    changed = bytearray(weights.read_bytes())
    changed[-5] ^= 1
    weights.write_bytes(bytes(changed))
    with pytest.raises(WeightsError, match="not this file"):
        run(started(summary.model), fresh=True)
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="damaged"):
        run(started(kept), fresh=True)


def test_an_interrupted_run_leaves_a_checkpoint(persons: Path, tmp_path: Path) -> None:
    """SIGINT between two steps: KeyboardInterrupt, and the next run goes on."""
    given = config(persons, tmp_path, split={"by": "none"})

    def interrupt(progress: Any) -> None:
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(given, on_progress=interrupt)
    stopped = loaded(tmp_path)["step"]
    assert stopped in (2, 3)
    assert not (tmp_path / "model.toml").exists()
    summary = run(given)
    assert (summary.resumed, summary.scores) == (stopped, {})
