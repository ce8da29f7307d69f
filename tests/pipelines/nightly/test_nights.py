"""Nights of a corpus that is moved, relabelled, filtered, thinned and joined: each equals a gallery from scratch."""

from collections.abc import Callable
from pathlib import Path

import pytest
from bench.nights import NIGHTS, Simulation, World, all_at_once, begin, join, move, reorganise


def check_nights(simulation: Simulation, changes: list[Callable[[World], None]]) -> None:
    for change in changes:
        assert simulation.run_night(change).problems == [], change.__name__


def test_some_nights_equal_a_gallery_from_scratch(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, 16, with_clusters=False)
    check_nights(simulation, [begin, join, move, reorganise, all_at_once])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_nights_equal_a_gallery_from_scratch(seed: int, tmp_path: Path) -> None:
    check_nights(Simulation(tmp_path, 40, seed), NIGHTS)
