"""Which faces are fit to found a person or to anchor a threshold."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hard_faces import ArcFaceLike, make_hard_gallery, make_table

from facepipe.curation.graph.fitness import (
    COLUMNS,
    MIN_QUALITY,
    choose_min_quality,
    find_unfit_faces,
    find_unfit_nodes,
    read_quality,
)
from facepipe.curation.graph.nodes import collect_nodes
from facepipe.schema import FACES


def make_faces(**values: list[float | None]) -> pa.Table:
    count = len(next(iter(values.values())))
    types = {name: FACES.field(name).type for name in COLUMNS}
    return pa.table({name: pa.array(values.get(name, [None] * count), types[name]) for name in COLUMNS})


def test_quality_decides_if_it_is_known() -> None:
    faces = make_faces(face_quality=[0.9, 0.02], det_score=[0.6, 1.0], visible=[1.0, 1.0])
    assert find_unfit_faces(faces).tolist() == [False, True]


def test_cut_faces_are_unfit_whatever_their_quality() -> None:
    faces = make_faces(face_quality=[0.9, 0.9, 0.9], visible=[0.79, 0.8, None])
    assert find_unfit_faces(faces).tolist() == [True, False, False]


def test_rows_of_older_versions_are_judged_by_what_they_have() -> None:
    faces = make_faces(
        det_score=[0.999, 0.999, 0.7, 0.999], face_px=[90.0, 3.0, 90.0, 90.0], sharpness=[40.0, 40.0, 1.0, None]
    )
    assert find_unfit_faces(faces).tolist() == [False, True, True, False]


def test_faces_of_which_nothing_is_known_are_fit() -> None:
    faces = make_faces(yaw=[None, 80.0])
    assert np.isnan(read_quality(faces)).all()
    assert not find_unfit_faces(faces).any()


@pytest.mark.parametrize("poor", [0.0, 0.3])
def test_a_good_gallery_has_the_common_limit(poor: float) -> None:
    quality = np.where(np.random.default_rng(0).random(1000) < poor, 0.01, 0.8)
    assert choose_min_quality(quality) == MIN_QUALITY


def test_a_gallery_of_poor_faces_keeps_most_of_them() -> None:
    # A distant camera: every face is below the common limit.
    quality = np.random.default_rng(0).uniform(0.03, 0.09, 1000)
    assert (quality < choose_min_quality(quality)).mean() < 0.05
    assert choose_min_quality(np.full(5, np.nan)) == MIN_QUALITY


def test_blurred_faces_of_a_gallery_are_found(tmp_path: Path) -> None:
    space = ArcFaceLike(3)
    faces = space.draw(space.draw_centres(200), np.arange(1000) % 200)
    is_blurred = np.random.default_rng(3).random(1000) < 0.05
    blurred = space.blur(faces, is_blurred)
    gallery = make_hard_gallery(tmp_path / "gallery", blurred)
    nodes = collect_nodes([gallery], str(tmp_path))
    # Rows come in another order than they were drawn in.
    at = nodes.find(make_table(blurred)["face_id"].to_numpy())
    assert (find_unfit_nodes(gallery, nodes)[at] == is_blurred).all()
    assert not find_unfit_nodes(gallery, nodes, side=1).any()
