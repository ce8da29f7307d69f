"""Suppression of whole batches on tensors keeps what the greedy rule keeps, box for box."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.models.detectors.retinaface_decode import apply_sorted_nms as greedy
from facepipe.stages.resident.nms import apply_nms


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float]:
    """Boxes (n, k, 4) that overlap much, some of no area, some twice; how many of each image count; and a limit."""
    n, k = draw(st.integers(1, 4)), draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low, side = rng.integers(0, 24, (n, k, 2)), rng.integers(0, 12, (n, k, 2))
    boxes = np.concatenate([low, low + side], 2).astype(np.float32)
    if draw(st.booleans()):
        boxes += rng.random(boxes.shape, np.float32)
    if k > 1 and draw(st.booleans()):
        boxes[:, k // 2 :] = boxes[:, : k - k // 2]
    return boxes, rng.integers(0, k + 1, n), draw(st.sampled_from([0.0, 0.2, 1 / 3, 0.4, 0.5, 0.9, 1.0]))


@settings(deadline=None, max_examples=200)
@given(batches(), st.one_of(st.none(), st.integers(1, 8)))
def test_it_keeps_what_the_greedy_rule_keeps(batch: tuple[np.ndarray, np.ndarray, float], rounds: int | None) -> None:
    boxes, counts, max_iou = batch
    valid = torch.arange(boxes.shape[1]) < torch.from_numpy(counts)[:, None]
    kept, settled = apply_nms(torch.from_numpy(boxes), valid, max_iou, rounds)
    assert settled.all() or rounds is not None
    for n, count in enumerate(counts):
        if settled[n]:
            assert np.flatnonzero(kept[n].numpy()).tolist() == greedy(boxes[n, :count], max_iou).tolist()


def test_a_chain_as_long_as_the_list_settles_at_last_and_is_told_before() -> None:
    """Each box overlaps its neighbours alone: every other one stays, and the last is known when all before are."""
    k = 30
    x = np.arange(k, dtype=np.float32)[:, None] * 4
    boxes = np.concatenate([x, x * 0, x + 10, x * 0 + 10], 1)
    valid = torch.ones(1, k, dtype=torch.bool)
    kept, settled = apply_nms(torch.from_numpy(boxes)[None], valid, 0.4)
    assert settled.all()
    assert np.flatnonzero(kept[0].numpy()).tolist() == list(range(0, k, 2)) == greedy(boxes, 0.4).tolist()
    assert not apply_nms(torch.from_numpy(boxes)[None], valid, 0.4, 8)[1].any()


@pytest.mark.parametrize("k", [0, 1])
def test_none_and_one(k: int) -> None:
    kept, settled = apply_nms(torch.zeros(2, k, 4), torch.ones(2, k, dtype=torch.bool), 0.4, 3)
    assert kept.shape == (2, k)
    assert kept.all()
    assert settled.all()
