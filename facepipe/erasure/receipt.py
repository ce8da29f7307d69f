"""The receipt of an erasure: what went, when, from which files; names nobody, and serves whoever knows a name."""

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

    chosen_by: kinds of the conditions, without their values; files: name -> SHA-256 (32 digits), before and after, of
    the table's and the index's files that held something of it; reports: files changed or deleted; salt and hashes:
    keyed BLAKE2b-64, in hex, of the uris, image ids and face ids that went; suppressed: whether they are kept from
    coming back.
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
    log_files_deleted: int = 0
    suppressed: bool = True
    salt: str = field(default_factory=lambda: secrets.token_hex(16))
    hashes: dict[str, list[str]] = field(default_factory=dict)

    def hash_values(self, values: Iterable[str]) -> list[str]:
        """Hashes of texts under the receipt's salt, sorted."""
        return sorted(f"{hash64(self.salt, value):016x}" for value in values)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def get_receipt_path(gallery: str, name: str) -> str:
    """Where a receipt lies."""
    return storage.join(get_erased_folder(gallery), f"{name}.json")


def save_receipt(gallery: str, receipt: Receipt) -> str:
    """Write a receipt into the gallery; its path."""
    return write_erased_file(gallery, f"{receipt.id}.json", json.dumps(receipt.to_dict(), indent=1).encode())


def load_receipt(path: str) -> Receipt:
    """Read a receipt. Raises ConfigError where it is none."""
    try:
        return TypeAdapter(Receipt).validate_json(storage.read(path.encode()))
    except StorageError as error:
        raise ConfigError(f"cannot read the receipt {path!r}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path!r} is no receipt of an erasure") from error
