"""The demo: fetch photos, embed them twice, search, and write three reports. Run `python -m jobs.demo OUT`."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from facepipe.errors import ConfigError
from facepipe.gallery import Gallery
from facepipe.gallery.table import FOLDERS
from facepipe.storage.lease import LEASE_FILE, LEASE_GUARD
from facepipe.storage.owned import delete_owned_folder
from jobs.clean import clean
from jobs.cluster import cluster
from jobs.console import exit_on_error, print_table
from jobs.dedup import dedup
from jobs.demo.contact_sheet import draw_contact_sheet
from jobs.demo.photos import make_corpus
from jobs.embed import embed
from jobs.evaluate import clusters
from jobs.gallery import info
from jobs.index import index
from jobs.search import search

PHOTOS = "photos"
GALLERY = "gallery"
_MARKER = ".facepipe-demo"
_SAME_PERSON = 0.41  # best threshold on LFW (docs/performance.md); good enough for a gallery as small as this one


def main(out: Path) -> None:
    """Make a gallery of the demo's photos, and print what each command shows.

    Args:
        out: folder for the photos, the gallery and the downloads.
    """
    photos = out / PHOTOS
    gallery = out / GALLERY
    # Start with empty folders; downloads of earlier runs are kept.
    clear_folders(out)
    photos.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in photos.iterdir()}
    mark_folder(out, others)
    make_corpus(photos, out / "downloads")
    mark_folder(out, others)

    count = len(list(photos.iterdir()))
    print(f"\n{count} files in {photos}; embedding them twice: the second run has nothing to do\n")
    for _ in range(2):
        embed(str(photos), str(gallery), identity="filename", runner="local")

    # Search every face of the gallery in the gallery.
    index(str(gallery))
    nearest = out / "nearest.parquet"
    search(str(gallery), str(gallery), str(nearest), k=1, threshold=_SAME_PERSON)
    print_identified(nearest)
    info(str(gallery))
    print_distances(Gallery(gallery))
    picture = draw_contact_sheet(Gallery(gallery), out / "faces.png")

    print("\nthree reports: which files are copies, who is who without labels, and which labels are wrong\n")
    dedup(str(gallery), quiet=True)
    cluster(str(gallery), quiet=True)
    clusters(str(gallery))
    clean(str(gallery), quiet=True)
    print_wrong_labels(gallery / "reports" / "clean" / "relabel.csv")

    pages = "\n".join(str(gallery / "reports" / name / "report.html") for name in ("dedup", "cluster", "clean"))
    print(f"\nthe faces as a picture: {picture}\nthe reports, to open in a browser:\n{pages}")
    print(f"try next, with a folder of your photos in place of {photos}:")
    command = find_command()
    mine = out / "mine"
    print(f"{command} embed {photos} {mine} && {command} cluster {mine}")


def find_command() -> str:
    """Find the command of this environment, as it can be typed in this folder."""
    beside = Path(sys.executable).with_name("facepipe")
    if not beside.is_file() or shutil.which("facepipe") == str(beside):
        return "facepipe"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)


def clear_folders(out: Path) -> None:
    """Delete what an earlier demo made. Photos that somebody added to it stay.

    Args:
        out: the demo's folder.

    Raises:
        ConfigError: a folder that the demo makes exists, and no demo made it.
    """
    photos = out / PHOTOS
    gallery = out / GALLERY
    marker = out / _MARKER
    for folder in (photos, gallery):
        if os.path.lexists(folder) and (folder.is_symlink() or not marker.is_file()):
            raise ConfigError(f"{str(folder)!r} exists and is not of a demo: choose another folder")
    if not marker.is_file():
        return
    # The marker lists the photos that the demo made. Of the gallery it made all.
    made = set(marker.read_text(encoding="utf-8").splitlines())
    delete_owned_folder(str(photos), made.__contains__)
    delete_owned_folder(str(gallery), lambda name: name.split("/")[0] in (*FOLDERS, LEASE_FILE, LEASE_GUARD))


def mark_folder(out: Path, others: set[str]) -> None:
    """Note which photos the demo made, so that the next one deletes these and nothing else.

    Args:
        out: the demo's folder.
        others: names of photos that were there before.
    """
    names = sorted({path.name for path in (out / PHOTOS).iterdir()} - others)
    (out / _MARKER).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def print_identified(answers: Path) -> None:
    """Print how many faces were identified correctly by their nearest other face.

    Args:
        answers: Parquet file of a search for one neighbour; file names begin with the person's name.
    """
    frame = pd.read_parquet(answers)
    # The name of the person is the file name up to its last underscore.
    person = frame["query_uri"].map(lambda uri: Path(uri).stem.rsplit("_", 1)[0])
    is_identified = frame["decision"] != "Unknown"
    correct = int((frame["decision"] == person)[is_identified].sum())
    unknown = int((~is_identified).sum())
    print(f"\n{correct} of {int(is_identified.sum())} identified faces are correct, {unknown} stayed Unknown\n")


def print_distances(gallery: Gallery) -> None:
    """Print the distances within and between the people of a gallery, by their labels."""
    frame = gallery.to_pandas(["identity", "face_index", "embedding"], "face_index = 0")
    people = sorted(frame["identity"].unique())
    # Vectors of a person are (n, 128); distances of two persons are (n, m).
    vectors = {name: np.stack(frame.loc[frame["identity"] == name, "embedding"].to_list()) for name in people}
    rows = []
    for name in people:
        row = [name]
        for other in people:
            distances = np.linalg.norm(vectors[name][:, None] - vectors[other][None], axis=-1)
            row.append(f"{distances.max() if name == other else distances.min():.2f}")
        rows.append(row)
    print("\nLargest distance within a person (diagonal), smallest between two people (elsewhere).")
    print("Faces of one person are closer than about 0.41. One photo of obama is called biden on purpose.")
    print_table("distances", ["", *people], rows)


def print_wrong_labels(relabels: Path) -> None:
    """Print the labels that cleaning would change; the planted wrong label is among them.

    Args:
        relabels: the list relabel.csv of the report.
    """
    frame = pd.read_csv(relabels, dtype=str)
    files = [Path(path).name for path in frame["path"]]
    rows = zip(files, frame["identity"], frame["suggested"], frame["probability"], strict=True)
    print_table("labels that are wrong", ("file", "label", "should be", "probability"), rows)


if __name__ == "__main__":
    with exit_on_error():
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo"))
