"""Persons that are far apart, each in one place, are told apart if the faces are too few to show what strangers are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.curation.graph.calibration import CalibrationOptions, calibrate
from facepipe.curation.graph.dendrogram import find_clear_gap
from facepipe.types import Float32

OPTIONS = CalibrationOptions(threshold=None, impostors=0.25, model_threshold=None, embedder="mine", seed=0)


def draw(persons: int, faces: int, spread: float, seed: int = 0) -> Float32:
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.normal(0, 1, (persons, 128)), faces, 0)
    vectors = centres + rng.normal(0, spread, centres.shape)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=15, deadline=None)
@given(persons=st.integers(2, 149), faces=st.integers(2, 6), seed=st.integers(0, 99))
def test_a_threshold_lies_in_the_gap(persons: int, faces: int, seed: int) -> None:
    most = 299 // persons  # more faces than that are not few
    vectors = draw(persons, min(most, max(faces, -(-100 // persons))), 0.1, seed)
    vectors = vectors[np.random.default_rng(seed).permutation(len(vectors))]
    similarity = calibrate(vectors, OPTIONS).threshold.similarity
    assert 0.4 < similarity < 0.95


@pytest.mark.parametrize(
    "vectors",
    [
        draw(300, 1, 0.1),
        draw(20, 2, 0.1),
        draw(150, 2, 1.0),
        np.concatenate([draw(270, 1, 0), draw(15, 2, 0.01, seed=1)]),
    ],
    ids=["strangers", "few faces", "real spread", "few copies among strangers"],
)
def test_there_is_none(vectors: Float32) -> None:
    assert find_clear_gap(vectors) is None


def test_the_models_own_threshold_comes_first() -> None:
    options = CalibrationOptions(threshold=None, impostors=0.25, model_threshold=0.4, embedder="mine", seed=0)
    assert calibrate(draw(60, 3, 0.1), options).threshold.similarity == pytest.approx(1 - 0.4**2 / 2, abs=1e-3)
