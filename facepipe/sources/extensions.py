"""Which file names can be images, and which names are URLs that nothing here reads."""

import re

from facepipe.storage import is_remote

IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "tif", "tiff", "gif"}
    | {"avif", "jp2", "j2k", "jpx", "pgm", "ppm", "pbm", "pnm", "heic", "heif", "hif", "jxl"}
)

ARCHIVE_EXTENSIONS = frozenset({"tar", "tar.gz", "tgz", "zip", "rec", "mdb"})
"""Files that hold many images, and are listed wherever they lie."""

VERIFICATION_EXTENSION = "bin"
"""Verification sets of insightface. They are listed only if they are named, and not beside a training set."""

CONTAINER_PATTERN = r"tar|tar\.gz|tgz|zip|mdb|rec|bin|tsv|parquet|pq|arrow"
"""Extensions of the files whose images have uris with `#`, as a part of a regular expression."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def get_extension(name: str) -> str:
    """Return the extension of a name in lower case, without its dot.

    Names of dots, and names that begin with their only dot, have none. Only `tar.gz` is one of two parts.
    """
    last = name.rpartition("/")[2]
    stem, dot, extension = last.rpartition(".")
    if not dot or not stem.strip("."):
        return ""
    extension = extension.lower()
    is_packed_tar = extension == "gz" and len(stem) > len(".tar") and stem.lower().endswith(".tar")
    return "tar.gz" if is_packed_tar else extension


def is_web_url(name: str) -> bool:
    """Tell whether a name is an http(s) URL, which facepipe does not read."""
    return name.lower().startswith(("http://", "https://"))


def is_foreign_url(name: str) -> bool:
    """Tell whether a name is a URL that facepipe does not read, of whatever scheme: a name of no local file."""
    return _URL.match(name) is not None and not is_remote(name) and not name.startswith("file://")


def is_hidden(name: str) -> bool:
    """Tell whether a path names a dot file: `.DS_Store`, `._photo.jpg` and the like are never images."""
    return name.startswith(".", name.rfind("/") + 1)
