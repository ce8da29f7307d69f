"""Migrate a gallery to another model and back, and compare with `embed`: vectors, what stays, CPU time, old against new.

    python tests/bench/migration.py GALLERY CARD WORK [--sample 600]

GALLERY has the faces of photos by dlib's network (`facepipe embed lfw-dev/images GALLERY`), and is copied. CARD is the
TOML file of the other model. Everything runs in this process. WORK/new is the gallery after the first migration, and
WORK/g after both. `embed` makes the vectors of a sample of the photos anew, spread over all of them.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from facepipe.config import build
from facepipe.gallery import Gallery
from facepipe.schema import FACES
from pipelines import migrate
from pipelines.embed import EmbedConfig
from pipelines.embed import run as embed
from pipelines.migrate import MigrateConfig, MigrateSummary

OF_VECTORS = ("embedding", "embedding_norm")


def read_cpu() -> float:
    """Read the CPU seconds of this process and of its children."""
    return sum(os.times()[:4])


def read_vectors(path: Path) -> dict[int, np.ndarray]:
    """Read the vectors of a gallery by face id."""
    ids, vectors = Gallery(str(path)).vectors()
    return dict(zip(ids.tolist(), vectors, strict=True))


def compare_vectors(path: Path, expected: dict[int, np.ndarray]) -> str:
    """Compare the vectors of a gallery with others of the same faces, or of some of them."""
    vectors = read_vectors(path)
    missing = expected.keys() - vectors.keys()
    if missing:
        return f"{len(missing)} faces are missing"
    largest = max(float(np.abs(vectors[face] - vector).max()) for face, vector in expected.items())
    return f"{len(expected)} faces, largest difference {largest:.1e}"


def read_rest(path: Path) -> list[dict[str, object]]:
    """Read all of a gallery but vectors."""
    names = [name for name in FACES.names if name not in OF_VECTORS]
    table = Gallery(str(path)).to_arrow(names)
    return table.sort_by([("uri", "ascending"), ("face_index", "ascending")]).to_pylist()


def print_report(summary: MigrateSummary) -> None:
    """Print old against new."""
    for figures in summary.figures:
        print(
            f"  {figures.embedder:14} accuracy {figures.accuracy} TAR {figures.tar} FNIR {figures.fnir} "
            f"clusters {figures.clusters_f} {figures.clusters_bcubed_f} (of {summary.compared} faces)"
        )


def migrate_gallery(gallery: Path, model: str, before: list[dict[str, object]]) -> None:
    """Migrate a gallery in place, and print what it took and what stayed."""
    begin = read_cpu()
    summary = migrate.run(MigrateConfig(embedder=model), str(gallery))
    seconds = read_cpu() - begin
    each = 1000 * seconds / summary.images
    print(f"migrate {seconds:.1f} CPU s, {each:.1f} ms per image, {summary.images} images, failed {summary.failed}")
    print_report(summary)
    begin = read_cpu()
    migrate.switch(str(gallery))
    print(
        f"  switch {read_cpu() - begin:.1f} CPU s; the rest {'is equal' if read_rest(gallery) == before else 'differs'}"
    )


def embed_sample(gallery: Path, model: str, count: int, folder: Path) -> dict[int, np.ndarray]:
    """Embed some of a gallery's images with a model, print what it took, and return the vectors."""
    uris = sorted({str(row["uri"]) for row in read_rest(gallery)})
    chosen = uris[:: max(1, len(uris) // count)]
    listed = folder.with_suffix(".txt")
    listed.write_text("".join(f"{uri}\n" for uri in chosen))
    settings = {"source": {"uri": str(listed)}, "embed": {"model": model}, "run": {"runner": "inline"}}
    begin = read_cpu()
    embed(build(EmbedConfig, settings), str(folder))
    seconds = read_cpu() - begin
    print(f"embed   {seconds:.1f} CPU s, {1000 * seconds / len(chosen):.1f} ms per image, {len(chosen)} images")
    return read_vectors(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("gallery", "card", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--sample", type=int, default=600)
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    work = arguments.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    gallery = work / "g"
    shutil.copytree(arguments.gallery, gallery)
    before = read_rest(gallery)
    old = read_vectors(gallery)
    old_model = Gallery(str(gallery)).contract.embedder
    card = str(arguments.card)

    migrate_gallery(gallery, card, before)
    shutil.copytree(gallery, work / "new")
    fresh = embed_sample(gallery, card, arguments.sample, work / "fresh-new")
    print(f"  vectors of {card}: {compare_vectors(gallery, fresh)}")
    migrate_gallery(gallery, old_model, before)
    print(f"  vectors of {old_model}: {compare_vectors(gallery, old)}")
    embed_sample(gallery, old_model, arguments.sample, work / "fresh-old")


if __name__ == "__main__":
    main()
