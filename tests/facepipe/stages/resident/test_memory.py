"""What a batch is planned to take is at least what torch's profiler sees it take, and not several times as much."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from facepipe.models.runtime.transfers import Uploads
from facepipe.models.zoo.networks import load_detector_net, load_embedder_net
from facepipe.stages.resident.detection import BatchDetector
from facepipe.stages.resident.embedding import ChipEmbedder
from facepipe.stages.resident.letterbox import LetterboxRule, letterbox_images
from facepipe.stages.resident.retinaface import ResidentLimits, ResidentRetinaFace
from facepipe.stages.resident.sampling import ResidentImages

CPU = torch.device("cpu")
RULE = LetterboxRule(320, 32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def peak(call: Callable[[], object]) -> int:
    """Bytes that are allocated at most during a call."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    results = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = sorted((event.start_ns(), event.nbytes()) for event in results if event.name() == "[memory]")
    return int(np.cumsum([size for _, size in sizes]).max())


def each(call: Callable[[int], object]) -> float:
    """Bytes that one item more takes."""
    return (peak(partial(call, 3)) - peak(partial(call, 1))) / 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_frame_takes_what_is_planned_for_it(precision: str) -> None:
    finder = ResidentRetinaFace(*load_detector_net("retinaface-mnet025"), "cpu", precision)
    frames = torch.zeros(3, 320, 384, 3, dtype=torch.uint8)
    resident = ResidentImages.upload([np.zeros((800, 960, 3), np.uint8)] * 3, Uploads(CPU))
    place = RULE.place(800, 960, 384)
    assert place is not None
    assert place.step == 2
    limits = ResidentLimits(candidates=128)
    planned = BatchDetector(finder, limits, RULE, Uploads(CPU), 32).estimate_frame_bytes(320, 384)
    searching = each(lambda n: finder.detect(frames[:n], limits))
    placing = each(lambda n: letterbox_images(resident.select(np.arange(n)), [place] * n))
    assert max(searching, placing) < planned < 4 * max(searching, placing)


@pytest.mark.parametrize("flip", [True, False])
def test_a_chip_takes_what_is_planned_for_it(flip: bool) -> None:
    embedder = ChipEmbedder(load_embedder_net("dlib-resnet"), "cpu", "float32", flip, 8)
    chips = torch.zeros(3, 150, 150, 3, dtype=torch.uint8)
    taken = each(lambda n: embedder.embed(chips[:n]))
    assert taken < embedder.estimate_chip_bytes() < 4 * taken
