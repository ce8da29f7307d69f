"""Of two copies the one is kept that people have decided on, and one whose faces they ignore is not."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from facepipe.curation.duplicates.images import rank_images
from facepipe.curation.duplicates.rule import Keep
from facepipe.decisions.persons import DecidedFaces


@pytest.mark.parametrize("keep", ["largest", "sharpest", "oldest"])
def test_images_are_ranked_by_decisions_first(keep: Keep) -> None:
    faces = pa.table(
        {
            # The first image is the best in every way, and has two faces.
            "face_id": pa.array([10, 11, 20, 30, None, 50], pa.int64()),
            "uri": ["/a", "/a", "/b", "/c", "/d", "/e"],
            "side": pa.array([0, 0, 0, 0, 0, 1], pa.int8()),
            "face_px": [90.0, 40.0, 50.0, 60.0, None, 70.0],
            "face_index": pa.array([0, 1, 0, 0, None, 0], pa.int16()),
            "width": pa.array([900, 900, 800, 700, 600, 500], pa.int32()),
            "height": pa.array([900, 900, 800, 700, 600, 500], pa.int32()),
            "sharpness": [9.0, 9.0, 8.0, 7.0, 6.0, 5.0],
            "file_size": pa.array([9, 9, 8, 7, 6, 5], pa.int64()),
            "ingested_at": [datetime(2026, 1, 1 + day, tzinfo=UTC) for day in (0, 0, 1, 2, 3, 4)],
        }
    )

    def rank(*decided: DecidedFaces) -> list[str]:
        images = rank_images(faces, keep, decided)
        return faces["uri"].take(pa.array(images.row)).to_pylist()

    def ignore(*ids: int) -> DecidedFaces:
        return DecidedFaces(ignored=np.array(ids))

    assert rank() == ["/e", "/a", "/b", "/c", "/d"]
    assert rank(ignore(10)) == ["/e", "/a", "/b", "/c", "/d"], "one of two faces is left"
    assert rank(ignore(10, 11, 30)) == ["/e", "/b", "/d", "/a", "/c"]
    named = DecidedFaces(ids=np.array([30]), group=np.array([0]), name=np.array([0]), names=("Ann",))
    assert rank(named) == ["/e", "/c", "/a", "/b", "/d"]
    assert rank(DecidedFaces(kept=np.array([20]))) == ["/e", "/b", "/a", "/c", "/d"]
    # What is decided on the other gallery is said of its own faces.
    assert rank(DecidedFaces(), ignore(10, 11)) == ["/e", "/a", "/b", "/c", "/d"]
