"""Limits of copies in a space: a model's own, dlib's, or in proportion to the distance of strangers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench.galleries import CONTRACT
from hard_faces import EASY, ArcFaceLike, DlibLike, DrawnFaces, make_hard_gallery

from facepipe.config import build
from facepipe.curation.duplicates.rule import DuplicateRule
from facepipe.curation.space import COPY_LIMITS, find_space_limits, find_space_scale
from facepipe.gallery import Contract
from pipelines import dedup
from pipelines.dedup import DedupConfig


def draw_spread(seed: int = 3) -> DrawnFaces:
    space = ArcFaceLike(seed, 0.65, dimension=512, hardness=EASY)
    person = np.repeat(np.arange(100), 3)
    return space.draw(space.draw_centres(100), person)


def test_default_limits_are_those_of_the_rule() -> None:
    rule = DuplicateRule()
    assert {"near": rule.near, "close_near": rule.close_near, "same_shot": rule.same_shot} == COPY_LIMITS


@pytest.mark.parametrize("known", [True, False])
def test_a_space_like_dlibs_keeps_its_limits(known: bool, tmp_path: Path) -> None:
    space = DlibLike(1)
    faces = space.draw(space.draw_centres(100), np.repeat(np.arange(100), 3))
    contract = Contract.from_models("retinaface-mnet025", "dlib-resnet", True) if known else CONTRACT
    assert find_space_limits(make_hard_gallery(tmp_path / "g", faces, contract)) == COPY_LIMITS


def test_limits_grow_with_the_distance_of_strangers(tmp_path: Path) -> None:
    gallery = make_hard_gallery(tmp_path / "g", draw_spread(), replace(CONTRACT, dim=512))
    assert find_space_scale(gallery) == pytest.approx(np.sqrt(2) / 0.564, rel=0.02)
    assert DuplicateRule().fit_model(find_space_limits(gallery)).close_near == pytest.approx(0.62, abs=0.02)


def test_copies_of_an_angular_network_are_found(tmp_path: Path) -> None:
    faces = draw_spread()
    # Of some pictures there is a shrunk copy: its hash is the same, and its face is as far off as 0.4.
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((20, 512))
    copies = faces.take(np.arange(0, 60, 3))
    moved = copies.vectors + 0.4 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    copies = replace(copies, vectors=(moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32))
    pictures = copies.picture
    both = replace(faces.concatenate(copies), picture=np.concatenate([faces.picture, pictures]))
    gallery = make_hard_gallery(tmp_path / "g", both, replace(CONTRACT, dim=512))
    settings = {"run": {"runner": "inline"}}
    assert dedup.run(build(DedupConfig, settings), gallery.path).drop == 20
    # Limits that a user sets are as they are.
    assert dedup.run(build(DedupConfig, settings, {"dedup": {"close_near": 0.2}}), gallery.path).drop == 0
