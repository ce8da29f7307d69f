"""Losses of pytorch-metric-learning by name: they are the library's own; what is mistyped is told, and nothing runs."""

import pytest
import torch
from torch import Tensor

from facepipe.errors import ConfigError
from facepipe.training.losses import LossConfig, build_objective, has_centres, needs_pairs, resolve_loss_config

pml = pytest.importorskip("pytorch_metric_learning")

LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])


def draw(seed: int = 0) -> Tensor:
    return torch.randn(len(LABELS), 6, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize(
    ("name", "miner"),
    [
        ("pml:MultiSimilarityLoss(alpha=2, beta=50, base=0.5)", "pml:MultiSimilarityMiner(epsilon=0.1)"),
        ("pml:SupConLoss", None),
        ("pml:TripletMarginLoss(margin=0.2)", "pml:BatchHardMiner"),
        ("pml:CircleLoss()", None),
    ],
)
def test_a_loss_is_that_of_the_library(name: str, miner: str | None) -> None:
    head = build_objective(LossConfig(name, miner=miner), 6, 4, 0)
    x = draw()
    loss = head(x, LABELS)
    loss.backward()
    call = name.removeprefix("pml:")
    own = eval(f"pml.losses.{call if '(' in call else call + '()'}")
    mined = None
    if miner is not None:
        call = miner.removeprefix("pml:")
        mined = eval(f"pml.miners.{call if '(' in call else call + '()'}")(draw(), LABELS)
    assert loss.item() == pytest.approx(own(draw(), LABELS, mined).item())
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert needs_pairs(LossConfig(name)) is True
    assert not has_centres(LossConfig(name))


def test_a_loss_with_classes_learns_them() -> None:
    config = LossConfig("pml:ArcFaceLoss(margin=20, scale=32)")
    head = build_objective(config, 6, 4, 3)
    assert [tuple(parameter.shape) for parameter in head.parameters()] == [(6, 4)]
    assert needs_pairs(config) is False
    again = build_objective(config, 6, 4, 3)
    assert head(draw(), LABELS).item() == again(draw(), LABELS).item()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LossConfig("pml:MultiSimilartyLoss"), "did you mean MultiSimilarityLoss"),
        (LossConfig("pml:SupConLoss(heat=1)"), "no argument heat|heat"),
        (LossConfig("pml:SupConLoss(temperature=__import__('os').getcwd())"), "argument=value"),
        (LossConfig("pml:SupConLoss(0.1)"), "arguments need names"),
        (LossConfig("pml:SupConLoss", scale=3), "has no loss.scale: its arguments stand in its name"),
        (LossConfig("pml:SupConLoss", miner="pml:NoMiner"), "loss.miner"),
        (LossConfig("arcface", miner="pml:BatchHardMiner"), "miners belong to losses pml:NAME"),
        (LossConfig("pml:os"), "has no os"),
        (LossConfig("pml:x y"), "write pml:NAME"),
    ],
)
def test_what_is_mistyped_is_told(config: LossConfig, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_objective(config, 6, 4, 0)


def test_a_config_is_kept_as_it_is() -> None:
    config = LossConfig("pml:SupConLoss", miner="pml:BatchHardMiner")
    assert resolve_loss_config(config) == config
