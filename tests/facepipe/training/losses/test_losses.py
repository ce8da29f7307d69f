"""Every loss against a second formulation: numpy in float64, written from the papers with arccos and loops."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from facepipe.config import build
from facepipe.errors import ConfigError
from facepipe.training.losses import (
    NAMES,
    LossConfig,
    build_objective,
    compute_triplet_loss,
    measure_dominant_angles,
    mine_triplets,
    needs_pairs,
    resolve_loss_config,
)
from facepipe.training.losses.margins import add_angle, anneal_weight, multiply_angle
from facepipe.types import Float64

Reference = Callable[[Float64, Float64, Float64], float]

DIM, CLASSES = 5, 4
LABELS = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])


def unit(x: Float64) -> Float64:
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def softmax_loss(logits: Float64, labels: Float64) -> float:
    """The mean of -log(exp(own) / sum(exp)), in so many words."""
    return float(
        np.mean([-math.log(math.exp(z[y]) / sum(map(math.exp, z))) for z, y in zip(logits, labels, strict=True)])
    )


def angles(x: Float64, w: Float64) -> Float64:
    return np.arccos(np.clip(unit(x) @ unit(w).T, -1, 1))


def with_own(logits: Float64, labels: Float64, own: list[float]) -> Float64:
    logits = logits.copy()
    logits[np.arange(len(labels)), labels] = own
    return logits


def psi(theta: float, m: int) -> float:
    k = next(k for k in range(m) if k * math.pi / m <= theta <= (k + 1) * math.pi / m)
    return (-1) ** k * math.cos(m * theta) - 2 * k


def cosine_margin(x: Float64, w: Float64, y: Float64, scale: float, own: Callable[[float], float]) -> float:
    theta = angles(x, w)
    mine = [scale * own(float(theta[n, c])) for n, c in enumerate(y)]
    return softmax_loss(with_own(scale * np.cos(theta), y, mine), y)


def arc(m: float) -> Callable[[float], float]:
    return lambda t: math.cos(t + m) if t + m < math.pi else math.cos(t) - m * math.sin(m)


def arc_easy(m: float) -> Callable[[float], float]:
    return lambda t: math.cos(t + m) if t < math.pi / 2 else math.cos(t)


def angular(x: Float64, w: Float64, y: Float64, m: int, lam: float) -> float:
    """L-Softmax on given weights; A-Softmax is the same on unit weights."""
    theta = angles(x, w)
    mine = []
    for n, c in enumerate(y):
        length = math.sqrt((x[n] ** 2).sum()) * math.sqrt((w[c] ** 2).sum())
        mine.append(length * (lam * math.cos(theta[n, c]) + psi(float(theta[n, c]), m)) / (1 + lam))
    return softmax_loss(with_own(x @ w.T, y, mine), y)


def mag(x: Float64, w: Float64, y: Float64) -> float:
    """MagFace with s 8, margins from 0.3 to 0.9 for lengths from 2.5 to 4, and the weight 2."""
    theta = angles(x, w)
    lengths = [min(max(math.sqrt((v * v).sum()), 2.5), 4.0) for v in x]
    margins = [0.3 + (0.9 - 0.3) / (4 - 2.5) * (a - 2.5) for a in lengths]
    own = [8 * arc(m)(float(theta[n, c])) for n, (c, m) in enumerate(zip(y, margins, strict=True))]
    return softmax_loss(with_own(8 * np.cos(theta), y, own), y) + 2 * float(np.mean([a / 16 + 1 / a for a in lengths]))


def ada(x: Float64, w: Float64, y: Float64, quality: list[float]) -> float:
    """AdaFace with s 8 and m 0.4; the qualities are constants to the slopes."""
    theta = angles(x, w)
    own = []
    for n, c in enumerate(y):
        angle = min(max(float(theta[n, c]) - 0.4 * quality[n], 0), math.pi)
        own.append(8 * (math.cos(angle) - (0.4 + 0.4 * quality[n])))
    return softmax_loss(with_own(8 * np.cos(theta), y, own), y)


def subcenter(x: Float64, w: Float64, y: Float64) -> float:
    theta = np.array([[min(float(angles(v[None], s[None])[0, 0]) for s in centres) for centres in w] for v in x])
    mine = [8 * arc(0.5)(float(theta[n, c])) for n, c in enumerate(y)]
    return softmax_loss(with_own(8 * np.cos(theta), y, mine), y)


def triplets_of(y: Float64) -> list[tuple[int, int, int]]:
    n = range(len(y))
    return [(a, p, q) for a, p, q in itertools.product(n, n, n) if a != p and y[a] == y[p] and y[a] != y[q]]


def distances(x: Float64) -> Float64:
    u = unit(x)
    return np.array([[((a - b) ** 2).sum() for b in u] for a in u])


def batch_all(x: Float64, w: Float64, y: Float64) -> float:
    d = distances(x)
    costs = [d[a, p] - d[a, q] + 0.2 for a, p, q in triplets_of(y)]
    costs = [c for c in costs if c > 0]
    return sum(costs) / len(costs)


def batch_hard(x: Float64, w: Float64, y: Float64) -> float:
    d, n = distances(x), range(len(y))
    costs = []
    for a in n:
        far = max(d[a, p] for p in n if p != a and y[p] == y[a])
        near = min(d[a, q] for q in n if y[q] != y[a])
        costs.append(max(0.0, far - near + 0.2))
    return sum(costs) / len(costs)


def semi_hard(x: Float64, w: Float64, y: Float64) -> float:
    d, n = distances(x), range(len(y))
    costs = []
    for a, p in sorted({(a, p) for a, p, _ in triplets_of(y)}):
        strangers = [d[a, q] for q in n if y[q] != y[a]]
        farther = [s for s in strangers if s > d[a, p]]
        costs.append(max(0.0, d[a, p] - (min(farther) if farther else max(strangers)) + 0.2))
    return sum(costs) / len(costs)


def cosine_pairs(x: Float64, w: Float64, y: Float64) -> float:
    u, n = unit(x), range(len(y))
    near = [1 - u[a] @ u[b] for a, b in itertools.combinations(n, 2) if y[a] == y[b]]
    far = [max(0.0, u[a] @ u[b] - 0.1) for a, b in itertools.combinations(n, 2) if y[a] != y[b]]
    return float(np.mean(near) + np.mean(far))


REFERENCES: dict[str, tuple[LossConfig, Reference]] = {
    "softmax": (LossConfig("softmax"), lambda x, w, y: softmax_loss(x @ w.T, y)),
    "normface": (LossConfig("normface", scale=8), lambda x, w, y: softmax_loss(8 * unit(x) @ unit(w).T, y)),
    "am-softmax": (
        LossConfig("am-softmax", scale=8),
        lambda x, w, y: cosine_margin(x, w, y, 8, lambda t: math.cos(t) - 0.35),
    ),
    "arcface": (LossConfig("arcface", scale=8), lambda x, w, y: cosine_margin(x, w, y, 8, arc(0.5))),
    "arcface-wide": (LossConfig("arcface", scale=8, margin=1.4), lambda x, w, y: cosine_margin(x, w, y, 8, arc(1.4))),
    "arcface-easy": (
        LossConfig("arcface", scale=8, easy_margin=True),
        lambda x, w, y: cosine_margin(x, w, y, 8, arc_easy(0.5)),
    ),
    "subcenter-arcface": (LossConfig("subcenter-arcface", scale=8), subcenter),
    "l-softmax": (LossConfig("l-softmax", lambda_base=2, lambda_gamma=0), lambda x, w, y: angular(x, w, y, 4, 2.0)),
    "l-softmax-3": (LossConfig("l-softmax", margin=3, lambda_base=0), lambda x, w, y: angular(x, w, y, 3, 0.0)),
    "a-softmax": (LossConfig("a-softmax"), lambda x, w, y: angular(x, unit(w), y, 4, 1000 / 1.12)),
    "a-softmax-2": (
        LossConfig("a-softmax", margin=2, lambda_base=0, lambda_min=0.5),
        lambda x, w, y: angular(x, unit(w), y, 2, 0.5),
    ),
    "magface": (
        LossConfig("magface", scale=8, margin=0.3, margin_high=0.9, norm_low=2.5, norm_high=4, norm_weight=2),
        lambda x, w, y: mag(x, w, y),
    ),
    "batch-all": (LossConfig("triplet", mining="batch-all"), batch_all),
    "batch-hard": (LossConfig("triplet", mining="batch-hard"), batch_hard),
    "semi-hard": (LossConfig("triplet"), semi_hard),
    "cosine": (LossConfig("cosine", margin=0.1), cosine_pairs),
    "triplet-softmax": (
        LossConfig("triplet-softmax", softmax_weight=0.5),
        lambda x, w, y: semi_hard(x, w, y) + 0.5 * softmax_loss(x @ w.T, y),
    ),
}


def centres_of(head: nn.Module) -> nn.Parameter | None:
    return next((p for name, p in head.named_parameters() if name.endswith("weight")), None)


def made(config: LossConfig, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A float64 objective, embeddings that want gradients, labels."""
    rng = np.random.default_rng(seed)
    head = build_objective(config, DIM, CLASSES, seed).double().train()
    return head, torch.tensor(rng.normal(size=(len(LABELS), DIM)) * 1.5, requires_grad=True), torch.tensor(LABELS)


def slopes(of: Callable[[Float64], float], at: Float64) -> Float64:
    """Central differences."""
    out = np.zeros_like(at)
    for n in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[n] += 1e-6
        down[n] -= 1e-6
        out[n] = (of(up) - of(down)) / 2e-6
    return out


@pytest.mark.parametrize("case", REFERENCES)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_are_those_of_the_paper(case: str, seed: int) -> None:
    config, reference = REFERENCES[case]
    head, x, y = made(config, seed)
    w = centres_of(head)
    centres = np.zeros(0) if w is None else w.detach().numpy().copy()
    loss = head(x, y)
    points = x.detach().numpy().copy()
    assert loss.item() == pytest.approx(reference(points, centres, LABELS), rel=1e-10)
    loss.backward()
    assert x.grad is not None
    assert np.allclose(x.grad.numpy(), slopes(lambda v: reference(v, centres, LABELS), points), atol=2e-7)
    if w is not None:
        assert w.grad is not None
        assert np.allclose(w.grad.numpy(), slopes(lambda v: reference(points, v, LABELS), centres), atol=2e-7)


@pytest.mark.parametrize("case", REFERENCES)
def test_gradients_fit_the_values(case: str) -> None:
    config, _ = REFERENCES[case]
    head, x, y = made(config)
    head.eval()  # gradcheck calls it many times: the annealed ones must not move on
    parameters = tuple(head.parameters())
    assert torch.autograd.gradcheck(lambda v, *_: head(v, y), (x, *parameters), fast_mode=True)


def circle_weights(cosines: Float64, m: float) -> tuple[Float64, Float64]:
    return np.maximum(1 + m - cosines, 0), np.maximum(cosines + m, 0)


def circle_reference(x: Float64, w: Float64, y: Float64, frozen: tuple[Float64, Float64]) -> float:
    """Equation 6 with the centre as the only positive; the weights are given, constants to the slopes."""
    s, costs = unit(x) @ unit(w).T, []
    for n, c in enumerate(y):
        away = sum(math.exp(6 * frozen[1][n, k] * (s[n, k] - 0.25)) for k in range(len(w)) if k != c)
        costs.append(math.log(1 + away * math.exp(-6 * frozen[0][n, c] * (s[n, c] - 0.75))))
    return float(np.mean(costs))


def circle_pairs_reference(x: Float64, y: Float64, frozen: tuple[Float64, Float64]) -> float:
    s, n, costs = unit(x) @ unit(x).T, range(len(y)), []
    for a in n:
        away = sum(math.exp(6 * frozen[1][a, q] * (s[a, q] - 0.25)) for q in n if y[q] != y[a])
        near = sum(math.exp(-6 * frozen[0][a, p] * (s[a, p] - 0.75)) for p in n if p != a and y[p] == y[a])
        costs.append(math.log(1 + away * near))
    return float(np.mean(costs))


def test_circle_against_class_centres() -> None:
    head, x, y = made(LossConfig("circle", scale=6))
    w = centres_of(head)
    assert w is not None
    points, centres = x.detach().numpy().copy(), w.detach().numpy().copy()
    frozen = circle_weights(unit(points) @ unit(centres).T, 0.25)
    loss = head(x, y)
    loss.backward()
    assert loss.item() == pytest.approx(circle_reference(points, centres, LABELS, frozen), rel=1e-12)
    assert x.grad is not None
    assert w.grad is not None
    assert np.allclose(
        x.grad.numpy(), slopes(lambda v: circle_reference(v, centres, LABELS, frozen), points), atol=1e-7
    )
    assert np.allclose(
        w.grad.numpy(), slopes(lambda v: circle_reference(points, v, LABELS, frozen), centres), atol=1e-7
    )


@pytest.mark.parametrize("seed", range(5))
def test_adaface(seed: int) -> None:
    head, x, y = made(LossConfig("adaface", scale=8, norm_rate=0.5), seed)
    w = centres_of(head)
    assert w is not None
    points, centres = x.detach().numpy().copy(), w.detach().numpy().copy()
    lengths = np.linalg.norm(points, axis=1)
    mean = (20 + lengths.mean()) / 2
    deviation = (100 + lengths.std(ddof=1)) / 2
    head(x, y)
    assert head.get_buffer("mean").item() == pytest.approx(mean)
    assert head.get_buffer("deviation").item() == pytest.approx(deviation)
    head.eval()
    with torch.no_grad():
        head.get_buffer("mean").fill_(lengths.mean())
        head.get_buffer("deviation").fill_(lengths.std() / 4)  # so that some qualities are cut
    spread = (lengths - lengths.mean()) / (lengths.std() / 4 + 1e-3)
    quality = [min(max(0.333 * float(z), -1), 1) for z in spread]
    assert {-1, 1} & set(quality)
    assert any(-1 < value < 1 for value in quality)
    loss = head(x, y)
    loss.backward()
    assert loss.item() == pytest.approx(ada(points, centres, LABELS, quality), rel=1e-10)
    assert x.grad is not None
    assert w.grad is not None
    assert np.allclose(x.grad.numpy(), slopes(lambda v: ada(v, centres, LABELS, quality), points), atol=2e-7)
    assert np.allclose(w.grad.numpy(), slopes(lambda v: ada(points, v, LABELS, quality), centres), atol=2e-7)


def test_circle_over_pairs() -> None:
    head, x, y = made(LossConfig("circle-pair", scale=6, margin=0.25))
    points = x.detach().numpy().copy()
    frozen = circle_weights(unit(points) @ unit(points).T, 0.25)
    loss = head(x, y)
    loss.backward()
    assert loss.item() == pytest.approx(circle_pairs_reference(points, LABELS, frozen), rel=1e-12)
    assert x.grad is not None
    assert np.allclose(x.grad.numpy(), slopes(lambda v: circle_pairs_reference(v, LABELS, frozen), points), atol=1e-7)


@pytest.mark.parametrize("name", ["arcface", "am-softmax"])
def test_margin_0_is_normface(name: str) -> None:
    head, x, y = made(LossConfig(name, scale=8, margin=0))
    plain, _, _ = made(LossConfig("normface", scale=8))
    assert head(x, y).item() == pytest.approx(plain(x, y).item(), rel=1e-14)


def test_a_softmax_once_the_angle_is_normface_of_length_8() -> None:
    head, x, y = made(LossConfig("a-softmax", margin=1))
    plain, _, _ = made(LossConfig("normface", scale=8))
    assert head(8 * nn.functional.normalize(x), y).item() == pytest.approx(plain(x, y).item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_batch_does_not_matter(name: str) -> None:
    head, x, y = made(LossConfig(name))
    head.eval()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    assert head(x[order], y[order]).item() == pytest.approx(head(x, y).item(), rel=1e-12)


@pytest.mark.parametrize(
    "name", ["normface", "am-softmax", "arcface", "subcenter-arcface", "circle", "triplet", "cosine", "circle-pair"]
)
def test_length_of_embeddings_does_not_matter(name: str) -> None:
    head, x, y = made(LossConfig(name))
    assert head(3 * x, y).item() == pytest.approx(head(x, y).item(), rel=1e-9)


def test_a_larger_scale_is_a_harder_softmax() -> None:
    """As the scale grows the cross-entropy of correct faces goes to 0 and that of wrong ones to scale * gap."""
    centres = torch.eye(CLASSES, DIM, dtype=torch.float64)
    right, wrong = torch.tensor([0]), torch.tensor([1])
    losses = {}
    for scale in (1.0, 10.0, 100.0):
        head = build_objective(LossConfig("normface", scale=scale), DIM, CLASSES, 0).double()
        with torch.no_grad():
            head.get_parameter("weight").copy_(centres)
        losses[scale] = (head(centres[:1], right).item(), head(centres[:1], wrong).item())
    assert losses[1.0][0] > losses[10.0][0] > losses[100.0][0] >= 0
    assert losses[100.0][1] == pytest.approx(100.0)


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.0, 1.5])
def test_arcface_falls_all_the_way(margin: float) -> None:
    theta = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    logits = add_angle(theta.cos(), margin, easy=False)
    assert (logits.diff() < 0).all()
    near = theta < math.pi - margin - 1e-3
    assert torch.allclose(logits[near], (theta[near] + margin).cos(), atol=1e-7)
    assert torch.allclose(
        logits[~near & (theta > math.pi - margin)][-1], torch.tensor(-1 - margin * math.sin(margin)).double()
    )


def test_easy_margin_leaves_wide_angles_alone() -> None:
    theta = torch.tensor([0.5, 1.5, 1.6, 3.0], dtype=torch.float64)
    got = add_angle(theta.cos(), 0.5, easy=True)
    assert torch.allclose(got, torch.tensor([math.cos(1.0), math.cos(2.0), math.cos(1.6), math.cos(3.0)]).double())


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_multiplied_angle_is_continuous_and_falls(m: int) -> None:
    theta = np.linspace(0, math.pi, 1501)
    got = multiply_angle(torch.from_numpy(np.cos(theta)), m).numpy()
    assert np.allclose(got, [psi(t, m) for t in theta], atol=1e-9)
    assert (np.diff(got) < 1e-12).all()
    assert got[0] == pytest.approx(1)
    assert got[-1] == pytest.approx(1 - 2 * m)


def test_lambda_follows_its_formula() -> None:
    steps = (0, 1, 5, 100, 10_000, 10**6)
    a = [anneal_weight(torch.tensor(t), base=1000, gamma=0.12, power=1, minimum=5).item() for t in steps]
    assert a == pytest.approx([max(5, 1000 / (1 + 0.12 * t)) for t in steps])
    head = [anneal_weight(torch.tensor(t), base=1000, gamma=2.5e-5, power=35, minimum=0).item() for t in steps]
    assert head == pytest.approx([1000 / (1 + 2.5e-5 * t) ** 35 for t in steps])


def test_lambda_goes_on_after_save_and_load() -> None:
    head, x, y = made(LossConfig("a-softmax"))
    for _ in range(7):
        head(x, y)
    other, _, _ = made(LossConfig("a-softmax"), seed=3)
    other.load_state_dict(head.state_dict())
    assert head(x, y).item() == other(x, y).item()
    assert other.state_dict()["iteration"].item() == 8
    assert other.figures["lambda"].item() == pytest.approx(1000 / (1 + 0.12 * 8))  # type: ignore[index]
    other.eval()
    other(x, y)
    assert other.state_dict()["iteration"].item() == 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_breaks_at_the_poles(name: str, sign: int) -> None:
    """Embeddings that lie on their centres or opposite to them, and coincide, in float32."""
    head = build_objective(LossConfig(name), DIM, CLASSES, 0).train()
    w = centres_of(head)
    centres = torch.randn(CLASSES, DIM) if w is None else w.detach().reshape(CLASSES, -1, DIM)[:, 0]
    y = torch.tensor(LABELS)
    x = (sign * 5 * centres[y]).clone().requires_grad_()
    loss = head(x, y)
    loss.backward()
    assert torch.isfinite(loss)
    for p in (x, *head.parameters()):
        assert p.grad is not None
        assert torch.isfinite(p.grad).all()
        assert p.grad.abs().max() < 1e4


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str) -> None:
    head, x, y = made(LossConfig(name))
    head = head.float().eval()
    x = x.detach().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(x, y)
    assert mixed.dtype == torch.float32
    assert mixed.item() == head(x.float(), y).item()


@pytest.mark.parametrize("name", ["triplet", "triplet-softmax", "cosine", "circle-pair"])
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [1, 1, 1, 1]])
def test_batches_without_pairs_give_finite_losses(name: str, labels: list[int]) -> None:
    head, x, _ = made(LossConfig(name))
    loss = head(x[:4], torch.tensor(labels))
    loss.backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    if name in ("triplet", "circle-pair"):
        assert loss.item() == 0


def on_circle(degrees: list[float]) -> Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees], dtype=torch.float64)


def squared(degrees: float) -> float:
    """Squared chord of unit vectors."""
    return 4 * math.sin(math.radians(degrees) / 2) ** 2


def test_semi_hard_takes_the_nearest_of_those_that_are_farther() -> None:
    head = build_objective(LossConfig("triplet", margin=0.5), 2, 2, 0)
    x = on_circle([0, 40, 30, 50, 170])  # of the pair 0, 40: from 0 the 50 is semi-hard, not the 30 nor the 170
    loss = head(x, torch.tensor([0, 0, 1, 2, 3]))
    from_0 = squared(40) - squared(50) + 0.5
    from_40 = max(0.0, squared(40) - squared(130) + 0.5)  # 10 and 10 degrees are nearer than the 40
    assert loss.item() == pytest.approx((from_0 + from_40) / 2)


def test_semi_hard_falls_back_to_the_farthest_where_all_are_nearer() -> None:
    head = build_objective(LossConfig("triplet", margin=0.5), 2, 2, 0)
    loss = head(on_circle([0, 90, 10, 70]), torch.tensor([0, 0, 1, 2]))
    assert loss.item() == pytest.approx((squared(90) - squared(70) + squared(90) - squared(80)) / 2 + 0.5)


def test_offline_triplets_are_the_brute_force_ones() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 6)), rng.integers(0, 12, 90)
    y[0] = 99  # alone: never an anchor
    d = distances(x)
    hard = mine_triplets(x, y, LossConfig("triplet", mining="batch-hard"), 0)
    expected = []
    for a in range(90):
        mine = [p for p in range(90) if p != a and y[p] == y[a]]
        if mine:
            far = max(mine, key=lambda p: d[a, p])
            near = min((q for q in range(90) if y[q] != y[a]), key=lambda q: d[a, q])
            if d[a, far] - d[a, near] + 0.2 > 0:
                expected.append([a, far, near])
    assert hard.rows[hard.active].tolist() == expected
    with_friends = [a for a in range(90) if (y == y[a]).sum() > 1]
    assert hard.rows[:, 0].tolist() == with_friends, "those that cost nothing are there as well"
    semi = mine_triplets(x, y, LossConfig("triplet"), 0)
    assert 20 < semi.active.sum() < len(semi.rows)
    for (a, p, n), active in zip(semi.rows, semi.active, strict=True):
        assert y[a] == y[p] != y[n]
        assert a != p
        assert d[a, p] < d[a, n]
        assert active == (d[a, n] < d[a, p] + 0.2)
        assert d[a, n] == min(d[a, q] for q in range(90) if y[q] != y[a] and d[a, q] > d[a, p])
    assert semi.rows.tolist() == mine_triplets(x, y, LossConfig("triplet"), 0).rows.tolist()
    assert semi.rows.tolist() != mine_triplets(x, y, LossConfig("triplet"), 1).rows.tolist()


def test_offline_triplets_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(150, 6)), rng.integers(0, 12, 150)
    configs = [LossConfig("triplet", mining=mining) for mining in ("batch-hard", "semi-hard")]
    whole = [mine_triplets(x, y, c, 5).rows.tolist() for c in configs]
    monkeypatch.setattr("facepipe.training.losses.offline._ANCHORS", 7)
    monkeypatch.setattr("facepipe.training.losses.offline._OTHERS", 11)
    assert [mine_triplets(x, y, c, 5).rows.tolist() for c in configs] == whole
    assert mine_triplets(x[:0], y[:0], configs[0], 5).rows.shape == (0, 3)


def test_triplet_loss_of_given_triplets() -> None:
    a, p, n = (torch.randn(4, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3))
    u = [unit(v.numpy()) for v in (a, p, n)]
    costs = [max(0.0, ((i - j) ** 2).sum() - ((i - k) ** 2).sum() + 0.2) for i, j, k in zip(*u, strict=True)]
    assert compute_triplet_loss(a, p, n).item() == pytest.approx(np.mean(costs))
    assert compute_triplet_loss(a, a, -a).item() == 0


def test_dominant_angles_are_to_the_centre_most_faces_choose() -> None:
    head = build_objective(LossConfig("subcenter-arcface", sub_centers=2), 2, 2, 0)
    with torch.no_grad():
        head.get_parameter("weight").copy_(3 * torch.stack([on_circle([0, 90]), on_circle([200, 180])]))
    degrees = [5.0, 350, 20, 80, 179, 185, 198]
    vectors = 7 * on_circle(degrees).numpy()
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    assert measure_dominant_angles(head, vectors, labels) == pytest.approx([5, 10, 20, 80, 1, 5, 18], abs=1e-2)
    with pytest.raises(ConfigError, match="subcenter-arcface"):
        measure_dominant_angles(build_objective(LossConfig("triplet"), 2, 2, 0), vectors, labels)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LossConfig("arcfase"), "did you mean arcface"),
        (LossConfig("zzz"), "subcenter-arcface"),
        (LossConfig("arcface", margin=-0.1), "negative margin"),
        (LossConfig("arcface", margin=2.0), "right angle"),
        (LossConfig("arcface", margin=math.nan), "finite"),
        (LossConfig("normface", scale=0), "above 0"),
        (LossConfig("l-softmax", margin=2.5), "1, 2, 3"),
        (LossConfig("a-softmax", margin=0), "1, 2, 3"),
        (LossConfig("l-softmax", margin=math.inf), "finite"),
        (LossConfig("subcenter-arcface", sub_centers=0), "at least 1"),
        (LossConfig("arcface", sub_centers=3), "arcface has no loss.sub_centers.*subcenter-arcface"),
        (LossConfig("softmax", scale=30), "softmax has no loss.scale"),
        (LossConfig("triplet", sample_rate=0.1), "triplet has no loss.sample_rate"),
        (LossConfig("arcface", sample_rate=0), r"\(0, 1\]"),
        (LossConfig("arcface", sample_rate=1.5), r"\(0, 1\]"),
        (LossConfig("a-softmax", lambda_min=-1), "lambda_min"),
        (LossConfig("triplet-softmax", softmax_weight=-1), "softmax_weight"),
        (LossConfig("triplet", mining="hardest"), "semi-hard"),  # type: ignore[arg-type]
    ],
)
def test_impossible_configs_say_what_to_do(config: LossConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(config, DIM, CLASSES, 0)


@pytest.mark.parametrize(("name", "margin"), [("cosine", 1.0), ("am-softmax", 5.0), ("circle", 1.0), ("triplet", 4.0)])
def test_margins_that_are_beyond_what_they_are_added_to(name: str, margin: float) -> None:
    with pytest.raises(ConfigError, match="set less than"):
        resolve_loss_config(LossConfig(name, margin=margin))


def test_an_alias_has_the_defaults_of_its_own_paper() -> None:
    assert (resolve_loss_config(LossConfig("cosface")).scale, resolve_loss_config(LossConfig("am-softmax")).scale) == (
        64,
        30,
    )
    assert resolve_loss_config(LossConfig("cosface")).name == "am-softmax"
    assert resolve_loss_config(resolve_loss_config(LossConfig("cosface"))).scale == 64


def test_one_class_is_no_class() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        build_objective(LossConfig(), DIM, 1, 0)


@pytest.mark.parametrize("name", ["triplet", "triplet-softmax"])
def test_given_triplets_are_thirds_of_the_batch(name: str) -> None:
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.normal(size=(12, DIM)))
    y = torch.from_numpy(rng.integers(0, CLASSES, 12))
    config = LossConfig(name, margin=0.7, offline=True)
    assert not needs_pairs(config)
    head = build_objective(config, DIM, CLASSES, 0).double()
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    triplets = [(unit[n], unit[n + 4], unit[n + 8]) for n in range(4)]
    expected = np.mean([max(0.0, ((a - p) ** 2).sum() - ((a - n) ** 2).sum() + 0.7) for a, p, n in triplets])
    if name == "triplet-softmax":
        logits = x @ head.classifier.weight.detach().T
        expected += float(torch.nn.functional.cross_entropy(logits, y))
    assert float(head(x, y).detach()) == pytest.approx(float(expected), rel=1e-9)


def test_offline_triplets_need_a_triplet_loss() -> None:
    for config in (LossConfig("arcface"), LossConfig("triplet", mining="batch-all")):
        with pytest.raises(ConfigError, match="semi-hard or batch-hard"):
            mine_triplets(np.ones((2, 2)), np.zeros(2, np.int64), config, 0)


@pytest.mark.parametrize("name", NAMES)
def test_what_callers_rely_on(name: str) -> None:
    assert f"{name}" in (LossConfig.__doc__ or "")
    head = build_objective(build(LossConfig, {"name": name}), DIM, CLASSES, 0)
    paired = name in ("triplet", "triplet-softmax", "cosine", "circle-pair")
    assert head.needs_pairs == needs_pairs(LossConfig(name)) == paired
    again, other = (
        build_objective(LossConfig(name), DIM, CLASSES, 0),
        build_objective(LossConfig(name), DIM, CLASSES, 1),
    )
    for key, value in head.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
        assert not key.endswith("weight") or not torch.equal(value, other.state_dict()[key])


def test_figures_tell_the_accuracy_before_the_margin() -> None:
    head = build_objective(LossConfig("arcface"), 2, 2, 0)
    with torch.no_grad():
        head.get_parameter("weight").copy_(torch.eye(2))
    head(torch.tensor([[1.0, 0.9], [0.9, 1.0], [0.2, 1.0]]), torch.tensor([0, 0, 1]))
    assert head.figures["accuracy"].item() == pytest.approx(2 / 3)  # type: ignore[index]
