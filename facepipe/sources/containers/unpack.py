"""From the bytes of a listed range to the image in it."""

from facepipe.sources.containers.base64_table import unpack_base64
from facepipe.sources.containers.record_io import unpack_record
from facepipe.sources.containers.zip_archive import unpack_zip_member
from facepipe.sources.extensions import get_extension


def unpack_member(path: str, data: bytes, max_bytes: int) -> bytes:
    """Get the image out of the bytes of a member of a container.

    Args:
        path: path of the container, whose extension says how members are packed.
        data: bytes of the listed range.
        max_bytes: largest image.

    Raises:
        TooLargeError: the image is larger.
        StorageError: the member is damaged.
    """
    match get_extension(path):
        case "rec":
            return unpack_record(data)
        case "tsv":
            return unpack_base64(data)
        case "zip":
            return unpack_zip_member(data, max_bytes)
        case _:
            return data
