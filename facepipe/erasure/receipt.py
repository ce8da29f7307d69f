"""The receipt of an erasure: what was deleted, when, and from which files.

It names nobody, but whoever knows a name can check it.
"""

import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from facepipe import storage
from facepipe.errors import ConfigError, StorageError
from facepipe.gallery.suppressed import get_erased_folder, write_erased_file
from facepipe.hashing import hash64

FORMAT = 1


@dataclass
class Receipt:
    """What an erasure did.

    Attributes:
        id: id of the erasure.
        gallery: id of the table.
        at: when it began, UTC, ISO 8601.
        chosen_by: names of the conditions, without their values.
        facepipe: version of facepipe.
        format: format of the receipt.
        images: images that were deleted.
        faces: faces that were deleted.
        rows: rows that were deleted.
        version_before: version of the table before its rows were deleted.
        version_after: version of the table after that.
        files_before: table files that held deleted rows, with the first 32 digits of their SHA-256.
        files_after: table files that replaced them, likewise.
        files_deleted: files that no longer belonged to the table.
        vectors: vectors that were removed from the index.
        index_before: index files that held deleted vectors, likewise.
        index_after: index files that replaced them, likewise.
        reports: report files that were changed or deleted.
        foreign: files below the reports that facepipe did not write and that hold erased data; they are still there.
        log_files_deleted: files of the table's log that were deleted.
        suppressed: whether the images are kept from being embedded again.
        continues: id of the erasure of which this is a later part: images that a running job brought later.
        salt: salt of the hashes.
        hashes: keyed BLAKE2b-64, in hex, of the uris, image ids and face ids that were deleted.
    """

    id: str
    gallery: str
    at: str
    chosen_by: list[str]
    facepipe: str
    format: int = FORMAT
    images: int = 0
    faces: int = 0
    rows: int = 0
    version_before: int = -1
    version_after: int = -1
    files_before: dict[str, str] = field(default_factory=dict)
    files_after: dict[str, str] = field(default_factory=dict)
    files_deleted: int = 0
    vectors: int = 0
    index_before: dict[str, str] = field(default_factory=dict)
    index_after: dict[str, str] = field(default_factory=dict)
    reports: list[str] = field(default_factory=list)
    foreign: int = 0
    log_files_deleted: int = 0
    suppressed: bool = True
    continues: str = ""
    # A salt of its own keeps receipts of two erasures from being compared.
    salt: str = field(default_factory=lambda: secrets.token_hex(16))
    hashes: dict[str, list[str]] = field(default_factory=dict)

    def hash_values(self, values: Iterable[str]) -> list[str]:
        """Hash texts under the receipt's salt; the hashes are sorted."""
        return sorted(f"{hash64(self.salt, value):016x}" for value in values)

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt for JSON."""
        return asdict(self)


def get_receipt_path(gallery: str, name: str) -> str:
    """Return the path of a receipt."""
    return storage.join(get_erased_folder(gallery), f"{name}.json")


def save_receipt(gallery: str, receipt: Receipt) -> str:
    """Write a receipt into the gallery and return its path."""
    return write_erased_file(gallery, f"{receipt.id}.json", json.dumps(receipt.to_dict(), indent=1).encode())


def load_receipt(path: str) -> Receipt:
    """Read a receipt.

    Raises:
        ConfigError: the file cannot be read, or is not a receipt.
    """
    try:
        return TypeAdapter(Receipt).validate_json(storage.read(path.encode()))
    except StorageError as error:
        raise ConfigError(f"cannot read the receipt {path!r}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path!r} is not the receipt of an erasure") from error
