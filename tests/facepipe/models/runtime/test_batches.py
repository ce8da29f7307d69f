"""Batches on a device: their size follows from free memory, and an out-of-memory error halves it and loses nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from facepipe.models.runtime.batches import Batches, is_out_of_memory, measure_free_memory, plan_batch_size


@given(st.integers(0, 10**12), st.integers(1, 10**10), st.integers(1, 4096), st.integers(0, 10**10))
def test_a_planned_batch_is_a_power_of_two_that_fits(free, each, most, fixed):
    size = plan_batch_size(free, each, most, fixed)
    assert 1 <= size <= most
    assert size & (size - 1) == 0
    assert size == 1 or fixed + size * each <= free
    assert plan_batch_size(None, each, most) == 1 << (most.bit_length() - 1)


def test_half_of_the_memory_is_used_at_least():
    assert plan_batch_size(1000, 1, 10**6) * 2 > 1000 * 0.8


@given(st.integers(0, 300), st.integers(1, 200), st.integers(1, 200))
def test_running_out_of_memory_halves_the_batch_and_loses_nothing(count, size, fits):
    batches: Batches[list[int]] = Batches(size)

    def work(part: slice) -> list[int]:
        if part.stop - part.start > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(part.start, part.stop))

    parts = list(batches(work, count))
    assert [n for _, found in parts for n in found] == list(range(count))
    assert all(list(range(part.start, part.stop)) == found for part, found in parts)
    assert count <= fits or batches.size <= fits


def test_one_item_that_does_not_fit_raises():
    def work(part: slice) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        list(Batches[None](8)(work, 8))


def test_other_errors_are_raised_at_once():
    calls = []

    def work(part: slice) -> None:
        calls.append(part)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        list(Batches[None](8)(work, 8))
    assert len(calls) == 1


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("Failed to allocate memory for requested buffer of size 1"))
    assert not is_out_of_memory(RuntimeError("no kernel image is available"))


def test_a_cpu_has_no_device_memory():
    assert measure_free_memory("cpu") is None
