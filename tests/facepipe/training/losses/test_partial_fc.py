"""Partial FC: sampled class centres, and class centres sliced over ranks, against the full head.

Run as a script it is one rank of the test with two: `test_partial_fc.py RANK FOLDER`.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from facepipe.errors import ConfigError
from facepipe.training.losses import (
    ClassHead,
    LossConfig,
    build_objective,
    gather_rows,
    gather_state,
    load_gathered_state,
    slice_own_rows,
)
from facepipe.training.losses.partial import find_positions, sample_classes
from facepipe.training.losses.shards import ClassShard

DIM, CLASSES, WORLD = 6, 11, 2
SHARDED = [
    LossConfig("softmax", sharded=True),
    LossConfig("arcface", scale=8, sharded=True),
    LossConfig("subcenter-arcface", scale=8, sharded=True),
    LossConfig("circle", scale=8, sharded=True),
    LossConfig("a-softmax", lambda_base=0, lambda_min=1, sharded=True),
]


def batch(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(n, DIM))), torch.tensor(rng.integers(0, CLASSES, n))


def trained_head(config: LossConfig, seed: int = 0) -> ClassHead:
    head = build_objective(config, DIM, CLASSES, seed).double().train()
    assert isinstance(head, ClassHead)
    return head


def test_all_wanted_classes_are_in_and_the_others_by_the_rate() -> None:
    torch.manual_seed(0)
    wanted = torch.tensor([3, 3, 90, -1, 41])
    seen = torch.zeros(100)
    for _ in range(2000):
        rows = sample_classes(wanted, 100, 0.2)
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert len(rows) == 20
        assert rows[find_positions(rows, wanted)[[0, 1, 2, 4]]].tolist() == [3, 3, 90, 41]
        assert find_positions(rows, wanted)[3] == -1
        seen[rows] += 1
    others = np.delete(seen.numpy(), [3, 90, 41])
    expected = 2000 * 17 / 97
    assert seen[[3, 90, 41]].tolist() == [2000] * 3
    assert np.abs(others - expected).max() < 4.5 * np.sqrt(expected * (1 - 17 / 97))


def test_more_wanted_classes_than_the_rate_allows() -> None:
    assert sample_classes(torch.arange(50), 100, 0.1).tolist() == list(range(50))
    assert len(sample_classes(torch.tensor([-1]), 3, 0.01)) == 1


@pytest.mark.parametrize("name", ["softmax", "arcface", "a-softmax", "subcenter-arcface", "circle", "triplet-softmax"])
def test_rate_1_is_the_full_head(name: str) -> None:
    x, y = batch()
    full, partial = (build_objective(LossConfig(name, sample_rate=r), DIM, CLASSES, 0).double() for r in (None, 1.0))
    near_1 = build_objective(LossConfig(name, sample_rate=0.9999), DIM, CLASSES, 0).double()  # goes the way of sampling
    expected = full(x, y)
    expected.backward()
    assert partial(x, y).item() == expected.item()
    loss = near_1(x, y)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(full.parameters(), near_1.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-12)


def test_a_step_is_the_full_loss_over_the_classes_it_drew() -> None:
    """The same draw by hand, a head of those classes alone, and no gradient for any other class."""
    x, y = batch()
    head = trained_head(LossConfig("arcface", scale=8, sample_rate=0.7))
    torch.manual_seed(5)
    loss = head(x, y)
    loss.backward()
    torch.manual_seed(5)
    rows = sample_classes(y, CLASSES, 0.7)
    assert len(rows) == 8
    small = build_objective(LossConfig("arcface", scale=8), DIM, len(rows), 0).double()
    with torch.no_grad():
        small.get_parameter("weight").copy_(head.weight[rows])
    alone = small(x, torch.tensor([rows.tolist().index(c) for c in y.tolist()]))
    alone.backward()
    assert loss.item() == pytest.approx(alone.item(), rel=1e-12)
    grad, expected = head.weight.grad, small.get_parameter("weight").grad
    assert grad is not None
    assert expected is not None
    assert torch.allclose(grad[rows], expected, atol=1e-14)
    absent = [c for c in range(CLASSES) if c not in rows.tolist()]
    assert len(absent) == 3
    assert not grad[absent].any()


def test_expected_gradient_is_the_mean_over_all_draws() -> None:
    """One face, 4 classes, 2 drawn: the 3 possible draws are equally likely; the mean of many steps is theirs."""
    x, y = batch(1)
    y = y % 4
    head = build_objective(LossConfig("normface", scale=4, sample_rate=0.5), DIM, 4, 0).double()
    weight = head.get_parameter("weight")
    possible = []
    for other in {0, 1, 2, 3} - set(y.tolist()):
        cosines = 4 * nn.functional.normalize(x) @ nn.functional.normalize(weight).T
        loss = nn.functional.cross_entropy(cosines[:, [int(y), other]], torch.tensor([0]))
        possible.append(torch.autograd.grad(loss, weight)[0])
    torch.manual_seed(0)
    drawn = torch.stack([torch.autograd.grad(head(x, y), weight)[0] for _ in range(600)])
    spread = drawn.std(0) / 600**0.5
    assert ((drawn.mean(0) - torch.stack(possible).mean(0)).abs() <= 5 * spread + 1e-12).all()


def test_the_draw_follows_torch_s_seed_and_evaluation_draws_nothing() -> None:
    x, y = batch()
    head = trained_head(LossConfig("arcface", sample_rate=0.7))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(head(x, y).item())
    assert losses[0] == losses[1] != losses[2]
    full = trained_head(LossConfig("arcface"))
    assert head.eval()(x, y).item() == full(x, y).item()


def test_slices_cover_all_classes_once() -> None:
    for classes in (2, 11, 5000):
        for world in (1, 2):
            shards = [ClassShard(classes, rank, world) for rank in range(world)]
            assert [c for s in shards for c in range(s.start, s.start + s.size)] == list(range(classes))
    rows = torch.arange(22).view(11, 2)
    assert torch.equal(torch.cat([slice_own_rows(ClassShard(11, r, 3), rows) for r in range(3)]), rows)
    assert torch.equal(gather_rows(ClassShard(11), rows), rows)


def test_first_centres_do_not_depend_on_the_slices() -> None:
    from facepipe.training.losses.centres import draw_centres

    whole = draw_centres(ClassShard(9000), 1, 3, 7)
    parts = [draw_centres(ClassShard(9000, r, 4), 1, 3, 7) for r in range(4)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.square().sum(1).mean().item() == pytest.approx(1, abs=0.05)
    assert len(torch.unique(whole, dim=0)) == 9000


def test_a_state_of_other_classes_is_refused() -> None:
    state = gather_state(trained_head(LossConfig("arcface")))
    with pytest.raises(RuntimeError, match="has 11 classes, but this objective has 12"):
        load_gathered_state(build_objective(LossConfig("arcface"), DIM, 12, 0), state)


def test_fewer_classes_than_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    with pytest.raises(ConfigError, match="11 classes cannot be sharded over 16 ranks"):
        build_objective(LossConfig("arcface", sharded=True), DIM, CLASSES, 0)


def network() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(DIM, DIM).double()


def trained(config: LossConfig, x: Tensor, y: Tensor, rank: int | None) -> dict[str, Any]:
    """Two steps of SGD with momentum of a network and its head; the network's gradients averaged as DDP does."""
    net, head = network(), trained_head(config)
    optimiser = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    losses = []
    for _ in range(2):
        optimiser.zero_grad()
        loss = head(net(x), y)
        loss.backward()
        for p in net.parameters() if rank is not None else ():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= WORLD
        optimiser.step()
        losses.append(loss.item())
    momentum = gather_rows(head.shard, optimiser.state[head.weight]["momentum_buffer"])
    figures = {k: float(v) for k, v in head.figures.items()}
    state, of_net = gather_state(head), net.state_dict()
    other = trained_head(config, seed=9)
    load_gathered_state(other, state)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in head.state_dict().items())
    return {"losses": losses, "figures": figures, "state": state, "net": of_net, "momentum": momentum}


def worker(rank: int, folder: Path) -> None:
    """One of two ranks: its half of the batch, its half of the classes; writes what it ends with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORLD)
    x, y = (v.chunk(WORLD)[rank] for v in batch())
    outcomes = [trained(config, x, y, rank) for config in SHARDED]
    assert trained_head(SHARDED[0]).weight.shape[0] == ClassShard(CLASSES, rank, WORLD).size
    sampled_head = trained_head(LossConfig("arcface", sample_rate=0.5, sharded=True))
    torch.manual_seed(rank)
    losses = [sampled_head(x, y).item() for _ in range(3)]
    torch.save({"outcomes": outcomes, "sampled": losses}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path)], stderr=subprocess.PIPE) for r in range(WORLD)]
    x, y = batch()
    expected = [trained(config, x, y, None) for config in SHARDED]
    for rank in ranks:
        _, stderr = rank.communicate(timeout=240)
        assert rank.returncode == 0, stderr.decode()
    for r in range(WORLD):
        got = torch.load(tmp_path / f"{r}.pt")
        for config, one, two in zip(SHARDED, expected, got["outcomes"], strict=True):
            assert two["losses"] == pytest.approx(one["losses"], rel=1e-9), config.name
            assert two["figures"] == pytest.approx(one["figures"]), config.name
            assert torch.allclose(two["momentum"], one["momentum"], atol=1e-9), config.name
            for part in ("state", "net"):
                assert two[part].keys() == one[part].keys()
                for key, value in one[part].items():
                    assert torch.allclose(two[part][key], value, atol=1e-9), f"{config.name} {key}"
    assert torch.load(tmp_path / "0.pt")["sampled"] == torch.load(tmp_path / "1.pt")["sampled"]


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
