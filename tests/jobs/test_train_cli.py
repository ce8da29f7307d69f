"""`facepipe train`: its messages, its exit codes, and that it ends cleanly and goes on."""

import json
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY
from typer.testing import CliRunner

from jobs.cli import app
from jobs.train import format_step

EXAMPLE = REPOSITORY / "jobs" / "train.toml"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A config of a small run on drawn crops."""
    for person in range(4):
        (tmp_path / "data" / f"p{person}").mkdir(parents=True)
        for n in range(4):
            pixels = np.random.default_rng(10 * person + n).integers(0, 60, (32, 32, 3)) + 40 * person
            cv2.imwrite(str(tmp_path / "data" / f"p{person}" / f"{n}.png"), pixels.astype(np.uint8))
    text = f"""
data = {{source = "{tmp_path}/data", aligned = true}}
model.architecture = "mobilefacenet"
loss = {{name = "softmax"}}
sample.batch = 4
split.by = "none"
optim.lr = 0.01
schedule.steps = 3
run = {{output = "{tmp_path}/out", runner = "inline", log_every = 1, threads = 1}}
"""
    (tmp_path / "train.toml").write_text(text)
    return tmp_path / "train.toml"


def test_ctrl_c_stops_training_and_it_resumes(config_file: Path) -> None:
    command = [sys.executable, "-m", "jobs.cli", "train", str(config_file), "--json", "--set", "schedule.steps=100000"]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        seen = [run.stderr.readline()]
        while "step " not in seen[-1]:
            seen.append(run.stderr.readline())
            assert seen[-1], seen
        run.send_signal(signal.SIGINT)
        rest = run.stderr.read()
    assert run.returncode == 130, rest
    assert "interrupted; finished work is kept; run the same command again to resume" in rest
    assert re.search(
        r"step \d+ of 100000, epoch \d+\.\d+, loss [\d.]+, lr [\d.e-]+, [\d.]+ images/s, .* left", seen[-1]
    )
    assert (config_file.parent / "out" / "checkpoints" / "last.ckpt").exists()
    done = CliRunner().invoke(app, ["train", str(config_file), "--fresh", "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["end"], summary["step"], summary["resumed"]) == ("done", 3, 0)
    assert summary["data"]["images"] == 16
    again = CliRunner().invoke(app, ["train", str(config_file), "--quiet"])
    assert again.exit_code == 0
    assert "resumed from step" in again.stdout
    assert "model.toml" in again.stdout


def test_the_last_line_compares_the_model_with_its_start(config_file: Path) -> None:
    folder = config_file.parent
    lines = [f"p{p}/{n}.png,p{q}/{n + 1}.png,{int(p == q)}" for p in range(4) for q in range(4) for n in range(3)]
    (folder / "pairs.csv").write_text("\n".join(["file_x,file_y,same", *lines]))
    words = [
        "train",
        str(config_file),
        "--quiet",
        "--set",
        "schedule.steps=1",
        "--set",
        f"test.pairs={folder}/pairs.csv",
    ]
    words += ["--set", f"test.source={folder}/data", "--set", "test.aligned=true", "--set", "test.name=crops"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert re.fullmatch(
        r"test crops: accuracy [\d.]+ -> [\d.]+, eer [\d.]+ -> [\d.]+: (better|WORSE|the same)",
        found.stdout.splitlines()[-1],
    )


def test_a_loss_that_is_not_finite_is_exit_code_1(config_file: Path) -> None:
    found = CliRunner().invoke(app, ["train", str(config_file), "--quiet", "--set", "optim.lr=1e30"])
    assert found.exit_code == 1
    assert re.search(r"(loss is not finite at step \d+ \(epoch 1,|weights are not finite after step)", found.stderr)
    assert not (config_file.parent / "out" / "model.toml").exists()


def test_a_wrong_config_is_exit_code_2(config_file: Path) -> None:
    for setting, message in (
        ("optim.lrr=1", "unknown key optim.lrr: did you mean optim.lr?"),
        ("model.architecture=resnet9", "no embedder is named 'resnet9'"),
        ("schedule.warmup=99", "warmup=99 is not before the end"),
    ):
        found = CliRunner().invoke(app, ["train", str(config_file), "--quiet", "--set", setting])
        assert (found.exit_code, message in found.stderr) == (2, True), found.stderr


def test_the_example_shows_the_defaults() -> None:
    from facepipe.config import build
    from pipelines.train import TrainConfig

    tree = tomllib.loads(EXAMPLE.read_text())
    given, plain = build(TrainConfig, tree), TrainConfig()
    free = {("data", "gallery"), ("model", "architecture"), ("run", "output")}
    for section, keys in tree.items():
        for key in keys:
            if (section, key) not in free:
                assert getattr(getattr(given, section), key) == getattr(getattr(plain, section), key), key
    commented = re.sub(r"(?m)^# (?=\w+ = )", "", EXAMPLE.read_text().split("# A detector")[0])
    build(TrainConfig, tomllib.loads(commented))


def test_format_step() -> None:
    from pipelines.train.pipeline import TrainingProgress

    progress = TrainingProgress(50, 200, 1.25, 3.14159, 0.1, 99.5, 60.0, scores={"score": 0.875})
    expected = "step 50 of 200, epoch 1.25, loss 3.1416, lr 0.1, 99.5 images/s, score 0.8750, 0:03:00 left"
    assert format_step(progress) == expected
    start = TrainingProgress(0, 200, 0.0, None, 0.1, 0.0, 60.0, scores={"score": 0.875})
    assert format_step(start) == "before the first of 200 steps, score 0.8750"
