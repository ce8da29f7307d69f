"""What a dry run counts."""

from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
from conftest import draw
from helpers import embed

from facepipe.gallery import Gallery
from facepipe.moves.settle import settle_source
from facepipe.sources import SourceConfig, open_source
from pipelines.job import load_known
from pipelines.runtime.listing import count_listed


def test_new_labels_are_counted(fakes: dict[str, Any], tmp_path: Path) -> None:
    for n in range(4):
        cv2.imwrite(str(tmp_path / f"{n}.png"), draw(1))
    people = tmp_path / "people.csv"
    people.write_text("path,label\n0.png,ann\n1.png,ann\n2.png,bob\n")
    embed(people, tmp_path / "g", fakes)
    people.write_text("path,label\n0.png,ann\n1.png,carl\n2.png,\n3.png,dora\n")
    gallery = Gallery(str(tmp_path / "g"))
    settled = settle_source(gallery, SourceConfig(str(people)))
    with closing(load_known(gallery, settled.rows)) as known:
        counts = count_listed(open_source(settled.config), known)
    assert {name: count for name, count in counts.items() if count} == {"new": 1, "skipped": 3, "relabelled": 2}
