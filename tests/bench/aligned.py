"""Compare aligned crops through the detector with `--aligned`: images without a face, accuracy, and time.

    python tests/bench/aligned.py GALLERY IMAGES PAIRS WORK [--embedder CARD.toml] [--images 600]

GALLERY holds the faces of IMAGES (`facepipe embed lfw-dev/images GALLERY`). Each image's main face is cut to 112x112 by
ArcFace's template, as insightface's sets are, and written as a JPEG of quality 95. PAIRS is LFW's pairs.txt. With --images
only as many crops are embedded, and no pairs are compared. The last line of each run is CPU time per crop and stage.
"""

import argparse
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import cv2
import numpy as np
import pyarrow.compute as pc

from facepipe.config import build
from facepipe.evaluation.pairs import evaluate_pairs
from facepipe.gallery import Gallery
from facepipe.imaging.alignment import ARCFACE_112
from facepipe.imaging.geometry import fit_similarity, warp_chip
from pipelines.embed import EmbedConfig, run


def cut_crops(gallery: Gallery, images: Path, folder: Path) -> None:
    """Cut the main face of each image into a tree of the same names."""
    table = gallery.to_arrow(["uri", "face_index", "landmarks"], where="status = 'ok'")
    table = table.filter(pc.equal(table["face_index"], 0))
    for uri, landmarks in zip(table["uri"].to_pylist(), table["landmarks"].to_pylist(), strict=True):
        pixels = cv2.imread(uri)
        assert pixels is not None, uri
        matrix = fit_similarity(np.array(landmarks).reshape(5, 2), np.array(ARCFACE_112))
        path = folder / Path(uri).relative_to(images.resolve())
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), warp_chip(pixels, matrix, (112, 112)), [cv2.IMWRITE_JPEG_QUALITY, 95])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("gallery", "images", "pairs", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--embedder", default="dlib-resnet")
    parser.add_argument("--images", type=int, dest="count")
    arguments = parser.parse_args()
    crops = arguments.work / "crops"
    if not crops.exists():
        cut_crops(Gallery(str(arguments.gallery)), arguments.images, crops)
    source = crops
    if arguments.count:
        source = arguments.work / "crops.txt"
        chosen = sorted(crops.resolve().rglob("*.jpg"))[: arguments.count]
        source.write_text("".join(f"{path}\n" for path in chosen))
    print(f"{'detector':20} {'images':>7} {'no face':>8} {'accuracy':>9} {'EER':>7} {'TAR@1e-3':>9} {'CPU s':>6}")
    for detector in ("retinaface-mnet025", "aligned-arcface"):
        path = arguments.work / detector
        shutil.rmtree(path, ignore_errors=True)
        begin = sum(os.times()[:4])
        wall = time.monotonic()
        settings = {
            "source": {"uri": str(source)},
            "detect": {"model": detector},
            "embed": {"model": arguments.embedder},
            "run": {"runner": "inline"},
        }
        # Stages are timed by the CPU time of the process, in which nothing else runs meanwhile.
        with patch("facepipe.stages.chain.time", SimpleNamespace(perf_counter=time.process_time)):
            summary = run(build(EmbedConfig, settings), str(path))
        seconds = sum(os.times()[:4]) - begin
        line = f"{detector:20} {summary.images:7} {summary.statuses.get('no_face', 0):8} "
        if arguments.count:
            line += f"{'':27} "
        else:
            found = evaluate_pairs(Gallery(str(path)), arguments.pairs)
            line += f"{found.accuracy:9.4f} {found.eer:7.4f} {found.tar['0.001']:9.4f} "
        print(f"{line}{seconds:6.0f}  (wall {time.monotonic() - wall:.0f} s)")
        each = {name: 1000 * value / summary.images for name, value in summary.stage_seconds.items()}
        print(
            f"  ms per crop: {', '.join(f'{name} {value:.2f}' for name, value in each.items())}, "
            f"all {sum(each.values()):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
