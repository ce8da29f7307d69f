"""Triplets mined once an epoch: exact resume, batches of several ranks, the end where nothing is left to learn."""

import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from facepipe.errors import ConfigError, TrainingError
from facepipe.hashing import hash64
from facepipe.models.runtime.preprocess import Input
from facepipe.training.data.augment import AugmentConfig
from facepipe.training.data.sampling import BatchSampler, SampleConfig
from facepipe.training.embedding_task import Examples
from facepipe.training.losses import LossConfig, build_objective, mine_triplets, resolve_loss_config
from facepipe.training.losses.triplets import TripletLoss
from facepipe.training.trainer.checkpointing import CheckpointFolder
from facepipe.training.trainer.config import OptimConfig, ScheduleConfig, TrainingRunConfig
from facepipe.training.trainer.loop import LoopSettings, Outcome, TrainingLoop, _RankBatches
from facepipe.training.trainer.ranks import Ranks
from facepipe.training.triplet_task import TripletSampler, TripletTask

STEPS = 26  # four epochs of six steps and two more
LOSS = LossConfig("triplet", margin=0.4, offline=True)


class Chips:
    """Noisy colours of eight persons, one of whom is there once."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.labels = np.repeat(np.arange(8), [4, 3, 5, 2, 4, 3, 3, 1])
        colours = rng.integers(40, 200, (8, 3))
        noise = rng.normal(0, 40, (len(self.labels), 6, 6, 3))
        self._pixels = np.clip(colours[self.labels][:, None, None] + noise, 0, 255).astype(np.uint8)

    def load_chip(self, row: int) -> np.ndarray:
        return self._pixels[row]


def task(loss: LossConfig = LOSS) -> TripletTask:
    chips = Chips()
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 4))
    examples = Examples(chips, TripletSampler(chips.labels, loss, 12, 5), AugmentConfig(colour=0.5))
    fed = Input("rgb", (127.5,) * 3, (127.5,) * 3)
    return TripletTask(net, build_objective(loss, 4, 8, 0), examples, fed, 5)


def trained(
    output: Path, stop: int = 0, of: TripletTask | None = None, ranks: Ranks | None = None, **run: Any
) -> Outcome:
    options: dict[str, Any] = {"log_every": 3, "checkpoint_steps": 5, **run}
    settings = LoopSettings(
        OptimConfig(lr=0.02), ScheduleConfig(steps=STEPS), TrainingRunConfig(str(output), **options)
    )
    calls = iter(range(1, 1000))
    return TrainingLoop(of or task(), settings, ranks or Ranks(), lambda: next(calls) == stop).run()


def content(output: Path) -> dict[str, Any]:
    found = CheckpointFolder(str(output)).load()
    assert found is not None
    return found


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert trained(output).end == "done"
    return output


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, whole: Path) -> None:
    """Within an epoch, whose triplets are in the checkpoint, and at its end, where the next ones are mined again."""
    given = task()
    assert given.steps_per_epoch == 6
    for stop in (4, 2, 11):
        assert trained(tmp_path, stop).end == "interrupted"
    assert trained(tmp_path).resumed == 17
    for part in ("net", "head", "optimizer", "prepared"):
        assert equal(content(tmp_path)[part], content(whole)[part]), part


def test_loaders_change_nothing(tmp_path: Path, whole: Path) -> None:
    trained(tmp_path, loaders=2)
    assert equal(content(tmp_path)["net"], content(whole)["net"])


def test_batches_are_made_in_new_processes_without_the_network() -> None:
    """Where processes are not forked: the task's batches are sent to them, and its network is not."""
    given = task()
    given.prepare_epoch(0, Ranks())
    data = pickle.dumps(given.batches)
    assert not {b"Linear", b"TripletLoss", b"TripletTask"} & set(re.findall(rb"[A-Za-z]+", data))
    loader = DataLoader(
        _RankBatches(given.batches, 0, 1),
        batch_size=None,
        sampler=range(3),
        num_workers=1,
        multiprocessing_context="forkserver",
    )
    for step, batch in enumerate(loader):
        assert all(torch.equal(a, b) for a, b in zip(batch, given.make_batch(step), strict=True))


def test_other_samplers_can_be_sent_too() -> None:
    labels = np.repeat(np.arange(8), 3)
    for config in (SampleConfig(batch=6), SampleConfig(identities=4, images=2)):
        sampler = BatchSampler(labels, config, seed=3)
        sampler.draw_rows(0)
        copy = pickle.loads(pickle.dumps(sampler))
        assert all(np.array_equal(copy.draw_rows(step), sampler.draw_rows(step)) for step in range(9))


def test_triplets_are_mined_anew_each_epoch_with_the_network_as_it_is() -> None:
    given = task()
    given.net.eval()
    found = []
    for epoch in range(2):
        assert given.prepare_epoch(epoch, Ranks())
        triplets = given.get_epoch_state()["triplets"].numpy()
        anchor, positive, negative = given._examples.chips.labels[triplets].T
        assert (anchor == positive).all()
        assert (anchor != negative).all()
        assert 7 not in anchor, "who is there once"
        found.append(triplets.tolist())
        with torch.no_grad():
            next(given.net.parameters()).add_(0.05 * torch.randn(16, 108, generator=torch.Generator().manual_seed(0)))
    assert found[0] != found[1]
    before = found[1]
    given.prepare_epoch(1, Ranks())
    assert given.get_epoch_state()["triplets"].tolist() == before, "an epoch is prepared once"


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch(world: int) -> None:
    given = task()
    given.net.eval()
    given.prepare_epoch(0, Ranks())
    sampler = given._sampler
    for step in range(given.steps_per_epoch):
        one = sampler.draw_rows(step).reshape(3, -1)
        parts = [sampler.draw_rows(step, rank, world).reshape(3, -1) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts, axis=1), one)
    with pytest.raises(ValueError, match="in epoch 1, but"):
        sampler.draw_rows(given.steps_per_epoch)
    with pytest.raises(ConfigError, match="do not divide by 3"):
        sampler.draw_rows(0, 0, 3)


def test_two_ranks_train_with_the_triplets_of_the_first(tmp_path: Path) -> None:
    def rank_of_two(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2)
        trained(tmp_path / "two", ranks=Ranks(rank, 2))
        dist.destroy_process_group()

    child = os.fork()
    if not child:
        code = 1
        try:
            rank_of_two(1)
            code = 0
        finally:
            os._exit(code)
    rank_of_two(0)
    assert os.waitpid(child, 0)[1] == 0
    two = content(tmp_path / "two")
    assert two["step"] == STEPS
    assert len(two["prepared"]["triplets"])


def test_all_triplets_cost_less_than_before(whole: Path) -> None:
    """Not those of an epoch, which are the ones that cost something."""
    given = task()
    chips = given._examples.chips
    every = TripletLoss(resolve_loss_config(LossConfig("triplet", margin=0.4, mining="batch-all")))

    def cost() -> float:
        vectors = torch.from_numpy(given._embed_all(torch.device("cpu")))
        every(vectors, torch.from_numpy(chips.labels))
        return float(every.figures["active"])

    given.net.eval()
    before = cost()
    given.net.load_state_dict(content(whole)["net"])
    assert cost() < 0.7 * before


def test_where_nothing_is_left_to_learn_the_run_ends(tmp_path: Path) -> None:
    """The persons are far apart from the start: the margin is kept by all triplets."""
    given = task(LossConfig("triplet", margin=1e-6, offline=True, mining="semi-hard"))
    chips: Any = given._examples.chips
    far = np.eye(8, 108, dtype=np.uint8)[chips.labels] * 250
    chips._pixels = far.reshape(-1, 6, 6, 3)
    with pytest.raises(TrainingError, match=r"no triplet .* has a loss above 0: set a larger loss\.margin"):
        trained(tmp_path / "never", of=given)
    assert CheckpointFolder(str(tmp_path / "never")).load() is None
    given = task()
    mine = given._sampler.mine_epoch

    def mined(vectors: Any, epoch: int) -> None:
        mine(vectors, epoch)
        if epoch == 2:
            given._sampler.set_triplets(epoch, np.empty((0, 3), np.int64))

    given._sampler.mine_epoch = mined  # type: ignore[method-assign]
    outcome = trained(tmp_path / "ends", of=given)
    assert (outcome.end, outcome.step) == ("stopped", 12)
    assert content(tmp_path / "ends")["step"] == 12


def test_hard_triplets_come_three_times_at_most_and_the_rest_fills_the_epoch() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 8)
    vectors = (np.eye(6)[labels] + rng.normal(0, 0.25, (40, 6))).astype(np.float32)
    loss = LossConfig("triplet", margin=0.3, offline=True)
    sampler = TripletSampler(labels, loss, 12, 0)
    sampler.mine_epoch(vectors, 0)
    found = mine_triplets(vectors, labels, loss, hash64("triplets", "0", "0"))
    assert 0 < found.active.sum() < 13
    counts = np.bincount(sampler.triplets[:, 0], minlength=40)
    costly = np.zeros(40, bool)
    costly[found.rows[found.active, 0]] = True
    assert (counts[costly] == 3).all()
    assert (counts[~costly] <= 1).all()
    assert len(sampler.triplets) == sampler.steps_per_epoch * 4 == 40
    assert {tuple(t) for t in sampler.triplets.tolist()} <= {tuple(t) for t in found.rows.tolist()}


def test_too_few_images_for_a_batch() -> None:
    with pytest.raises(ConfigError, match="needs 4 triplets, but 2 images"):
        TripletSampler(np.array([0, 0, 1, 2]), LOSS, 12)
    with pytest.raises(ConfigError, match="needs 0 triplets"):
        TripletSampler(np.array([0, 0, 1, 1]), LOSS, 2)
