"""Fine-tuning on one half of LFW's identities, verified on the other half, and the other way round.

    python tests/bench/finetuning.py LFW_IMAGES WORK [--start MODEL] [--loss NAME ...] [--steps 200] [--lr 0.001]

MODEL is a model's TOML file or dlib-resnet. Every loss starts from the same weights, takes the same number of steps of
the same size and is judged on all pairs of faces of the held-out identities: nothing is chosen by them, the model is
that of the last step. Prints a table: error (EER) and TAR before and after, the mean over the two halves. What is in
WORK is gone on with.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from facepipe.config import build
from facepipe.evaluation.roc import compute_equal_error_rate, compute_roc, find_tar_at_far
from facepipe.hashing import hash64
from facepipe.models.runtime.memory import keep_freed_memory
from facepipe.models.zoo.loading import load_net
from facepipe.models.zoo.packaged import load_dlib_net
from facepipe.models.zoo.registry import find_card
from facepipe.training.config import ModelConfig
from facepipe.training.data.chip_set import ChipSet
from facepipe.training.data.config import DataConfig
from facepipe.training.embedding_task import embed_chips
from facepipe.training.start import resolve_start
from pipelines.chips.prepare import prepare_chips
from pipelines.train import TrainConfig, run

LOSSES = (
    *("softmax", "normface", "l-softmax", "a-softmax", "am-softmax", "arcface", "subcenter-arcface", "circle"),
    *("circle-pair", "triplet", "triplet-softmax", "cosine"),
)
FARS = (1e-2, 1e-3, 1e-4)
# With some 800 classes of a few faces each the papers' margins, meant for training from nothing on millions, are far
# too wide for weights that are good already; these are smaller, and the same for both models.
SETTINGS: dict[str, dict[str, Any]] = {
    "normface": {"scale": 16.0},
    "am-softmax": {"scale": 16.0, "margin": 0.1},
    "arcface": {"scale": 16.0, "margin": 0.1},
    "subcenter-arcface": {"scale": 16.0, "margin": 0.1},
    "circle": {"scale": 32.0},
}


# dlib's vectors fill a narrow cone (two persons' cosine is 0.9): margins meant for the whole sphere push it apart.
NARROW: dict[str, dict[str, Any]] = {
    "triplet": {"margin": 0.05},
    "triplet-softmax": {"margin": 0.05},
    "cosine": {"margin": 0.9},
}


def settings_of(start: str, loss: str) -> dict[str, Any]:
    """What is set of a loss."""
    return SETTINGS.get(loss, {}) | (NARROW.get(loss, {}) if start == "dlib-resnet" else {})


def side_of(name: str) -> int:
    """Which half an identity is in."""
    return hash64("half", name) & 1


def vectors_of(net: torch.nn.Module, fed: Any, chips: ChipSet) -> np.ndarray:
    """(n, 128) unit vectors, the mirrored chip averaged in."""
    parts, net = [], net.eval().to(memory_format=torch.channels_last)
    for at in range(0, len(chips), 64):
        pixels = chips.load_chips(np.arange(at, min(at + 64, len(chips))))
        plain, mirrored = (embed_chips(net, p, fed, torch.device("cpu")) for p in (pixels, pixels[:, :, ::-1]))
        parts.append((plain + mirrored) / 2)
    raw = np.concatenate(parts)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def judged(vectors: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Figures over all pairs of faces."""
    u, v = np.triu_indices(len(labels), 1)
    same = labels[u] == labels[v]
    distances = np.sqrt(np.maximum(0, 2 - 2 * (vectors @ vectors.T)[u, v])).astype(np.float64)
    curve = compute_roc(distances, same)
    found = {"genuine": int(same.sum()), "impostors": int((~same).sum()), "eer": compute_equal_error_rate(curve)}
    return found | {f"tar@{far:g}": find_tar_at_far(curve, far)[0] for far in FARS}


def halves(chips: ChipSet, work: Path) -> list[Path]:
    """Two files of names: who is held out."""
    files = []
    for side in (0, 1):
        files.append(work / f"held{side}.txt")
        files[-1].write_text("\n".join(n for n in chips.identities if side_of(n) == side) + "\n")
    return files


def trained(args: argparse.Namespace, loss: str, held: Path, out: Path, chips: str) -> Path:
    """The model's TOML file after fine-tuning with a loss on who is not held out."""
    tree = {
        "data": {"source": str(args.images), "identity": "folder"},
        "model": {"start": args.start, "layer_decay": args.layer_decay, "imprint": args.imprint},
        "loss": {"name": loss, **settings_of(args.start, loss)},
        "sample": {"identities": args.identities, "images": 2, "singles": "repeat"},
        "augment": {"colour": 0.3, "crop": 0.5} if args.augment else {},
        "split": {"names": str(held)},
        "optim": {"lr": args.lr, "head_lr": args.head_lr, "clip": 5.0},
        "schedule": {"steps": args.steps, "policy": "cosine", "warmup": args.steps // 10, "validate": 0},
        "run": {
            "output": str(out),
            "chips": str(chips),
            "runner": "inline",
            "threads": 1,
            "device": "cpu",
            "checkpoint_seconds": 3600,
        },
    }
    return Path(run(build(TrainConfig, tree)).model)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--start", default="dlib-resnet")
    parser.add_argument("--loss", nargs="*", default=list(LOSSES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--identities", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--head-lr", type=float, default=1.0)
    parser.add_argument("--imprint", type=int, default=4)
    parser.add_argument("--layer-decay", type=float, default=1.0)
    parser.add_argument("--augment", action="store_true")
    parser.add_argument("--tag", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    args.work.mkdir(parents=True, exist_ok=True)
    name = find_card(args.start, "embedder").name
    fed = resolve_start(ModelConfig(start=args.start)).input
    chips = prepare_chips(
        DataConfig(source=str(args.images), identity="folder"), args.start, str(args.work / f"{name}-chips")
    )
    held = halves(chips, args.work)
    sides = np.array([side_of(n) for n in chips.identities])[chips.labels]
    parts = [chips.select(np.flatnonzero(sides == side)) for side in (0, 1)]
    net = load_dlib_net() if args.start == "dlib-resnet" else load_net(Path(args.start))[0]
    before = [judged(vectors_of(net, fed, part), part.labels) for part in parts]
    show("before", before, before)
    for loss in args.loss:
        began, after = time.monotonic(), []
        for side in (0, 1):
            file = trained(args, loss, held[side], args.work / f"{name}{args.tag}-{loss}-{side}", chips.folder)
            after.append(judged(vectors_of(load_net(file)[0], fed, parts[side]), parts[side].labels))
        seconds = round(time.monotonic() - began)
        show(loss, after, before, seconds)
        line = {"model": name, "loss": loss, "before": before, "after": after, "seconds": seconds, "args": vars(args)}
        with (args.work / "figures.jsonl").open("a") as file_out:
            file_out.write(json.dumps(line, default=str) + "\n")


def show(what: str, found: list[dict[str, float]], before: list[dict[str, float]], seconds: int = 0) -> None:
    """One line: the mean of both halves, and how many times the EER before."""
    eer, was = (np.mean([part["eer"] for part in parts]) for parts in (found, before))
    tar = "  ".join(f"TAR@{far:g} {np.mean([p[f'tar@{far:g}'] for p in found]):.4f}" for far in FARS)
    pairs = f"{sum(p['genuine'] for p in found)}+{sum(p['impostors'] for p in found)}"
    print(f"{what:18} EER {eer:.5f} ({eer / was:.2f})  {tar}  {pairs} pairs  {seconds} s", flush=True)


if __name__ == "__main__":
    main()
