"""The receipt of an erasure: what was deleted, when, and from which files.

It names nobody, but whoever knows a name can check it. Each receipt holds the checksum of the one before it. If there
is a key outside the gallery (`facepipe.gallery.erasure_key`), receipts are signed, and names can be checked with the
key only.
"""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from facepipe import storage
from facepipe.errors import ConfigError, StorageError
from facepipe.gallery.erasure_key import require_key
from facepipe.gallery.suppressed import derive_receipt_key, derive_secret, get_erased_folder, hash_again
from facepipe.hashing import hash64, hash64_each
from facepipe.sorted_lookup import is_in_sorted
from facepipe.types import Bool, UInt64

FORMAT = 2
# Formats without a predecessor and a signature, whose texts are hashed together with the salt.
_FIRST_FORMAT = 1
_HASH = re.compile(r"[0-9a-f]{16}")


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
        decisions: decisions about the erased faces and persons that were deleted.
        log_files_deleted: files of the table's log that were deleted.
        suppressed: whether the images are kept from being embedded again.
        continues: id of the erasure of which this is a later part: images that a running job brought later.
        repeats: ids of erasures that this one repeated, in a restored backup or in another copy.
        salt: salt of the hashes.
        hashes: hashes, in hex, of the uris, image ids and face ids that were deleted (`ReceiptHashes`).
        purge_due: time by which deleted rows, that are hidden and still on disk, are gone, UTC, ISO 8601; empty if none
            were left when the receipt was written.
        key: fingerprint of the key that the hashes and the signature were made with; empty if there was none.
        previous: id of the gallery's receipt before this one; empty for the first.
        previous_sha256: checksum of its file.
        older: checksums of the files of receipts that have no predecessor, by id; in the first receipt that has one.
        mac: signature: HMAC-SHA256, in hex, of everything else.
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
    decisions: int = 0
    log_files_deleted: int = 0
    suppressed: bool = True
    continues: str = ""
    repeats: list[str] = field(default_factory=list)
    # A salt of its own keeps receipts of two erasures from being compared.
    salt: str = field(default_factory=lambda: secrets.token_hex(16))
    hashes: dict[str, list[str]] = field(default_factory=dict)
    purge_due: str = ""
    key: str = ""
    previous: str = ""
    previous_sha256: str = ""
    older: dict[str, str] = field(default_factory=dict)
    mac: str = ""

    def hash_values(self, values: Iterable[str]) -> list[str]:
        """Hash texts under the receipt's salt; the hashes are sorted.

        Raises:
            ConfigError: the receipt was made with a key that is not set.
        """
        return [f"{value:016x}" for value in np.sort(ReceiptHashes(self).hash_texts(list(values))).tolist()]

    def sign(self) -> None:
        """Sign the receipt, if it was made with a key."""
        self.mac = self._compute_mac() if self.key else ""

    def is_signature_right(self) -> bool:
        """Tell whether the signature belongs to what the receipt says."""
        return hmac.compare_digest(self.mac.encode(), self._compute_mac().encode())

    def _compute_mac(self) -> str:
        key = require_key(self.key, f"the receipt {self.id}").derive("receipt")
        content = {name: value for name, value in self.to_dict().items() if name != "mac"}
        # Receipts that an older version has signed have no such fields.
        for name in ("decisions", "purge_due"):
            if not content[name]:
                del content[name]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hmac.digest(key, text.encode(), hashlib.sha256).hex()

    def find_contradictions(self) -> list[str]:
        """Find what cannot be in a receipt that an erasure wrote."""
        lines = []
        for kind, count in (("uris", self.images), ("faces", self.faces)):
            hashes = self.hashes.get(kind, [])
            if len(hashes) != count:
                lines.append(f"it says {count} {'images' if kind == 'uris' else kind}, and has {len(hashes)} hashes")
        if not self.images:
            lines.append("it says that nothing was erased")
        if len(self.hashes.get("images", [])) > self.images:
            lines.append("it has more contents than images")
        if self.format > _FIRST_FORMAT and bool(self.key) != bool(self.mac):
            lines.append("its signature is missing" if self.key else "it is signed with an unknown key")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt for JSON."""
        return asdict(self)

    def encode(self) -> bytes:
        """Return the content of the receipt's file."""
        return json.dumps(self.to_dict(), indent=1).encode()


# Made once: to make it takes 30 ms, and an erasure reads its progress often.
RECEIPT = TypeAdapter(Receipt)
"""Checks and decodes receipts."""


class ReceiptHashes:
    """The hashes of a receipt, to compare texts with.

    A text is hashed with `hash64`, and then under a key that comes from the receipt's salt, and from the key outside
    the gallery if the receipt was made with one. Receipts of the first format hash the text together with the salt.
    """

    def __init__(self, receipt: Receipt):
        """Read the hashes.

        Raises:
            ConfigError: the receipt was made with a key that is not set.
        """
        self._salt = receipt.salt
        self.can_hash_again = receipt.format > _FIRST_FORMAT
        secret = derive_secret(require_key(receipt.key, f"the receipt {receipt.id}")) if receipt.key else b""
        self._key = derive_receipt_key(receipt.salt, secret)
        self._hashes = {
            kind: np.unique(np.array([int(text, 16) for text in texts], np.uint64))
            for kind, texts in receipt.hashes.items()
        }

    def get_hashes(self, kind: str) -> UInt64:
        """Return the sorted hashes of a kind: `uris`, `images` or `faces`."""
        return self._hashes.get(kind, np.empty(0, np.uint64))

    def hash_texts(self, texts: Sequence[str], hashes: UInt64 | None = None) -> UInt64:
        """Hash texts as the receipt does.

        Args:
            texts: the texts, (n,).
            hashes: what `hash64` makes of each, (n,), if it is known.
        """
        if not self.can_hash_again:
            return np.array([hash64(self._salt, text) for text in texts], np.uint64)
        return hash_again(hash64_each(texts) if hashes is None else hashes, self._key)

    def contains(self, kind: str, hashes: UInt64) -> Bool:
        """Tell for each hash (n,) that `hash_texts` returned whether the receipt has it under a kind."""
        return is_in_sorted(self.get_hashes(kind), hashes)


def get_receipt_path(gallery: str, name: str) -> str:
    """Return the path of a receipt."""
    return storage.join(get_erased_folder(gallery), f"{name}.json")


def load_receipt(path: str) -> Receipt:
    """Read a receipt.

    Raises:
        ConfigError: the file cannot be read, or is not a receipt.
    """
    try:
        data = storage.read(path)
    except StorageError as error:
        raise ConfigError(f"cannot read the receipt {path!r}: {error}") from error
    return parse_receipt(data, path)


def parse_receipt(data: bytes, path: str) -> Receipt:
    """Parse the content of a receipt's file.

    Args:
        data: the content.
        path: where it is from, for the message.

    Raises:
        ConfigError: it is not a receipt.
    """
    try:
        receipt = RECEIPT.validate_json(data)
    except ValidationError as error:
        raise ConfigError(f"{path!r} is not the receipt of an erasure") from error
    if not _FIRST_FORMAT <= receipt.format <= FORMAT:
        raise ConfigError(f"{path!r} is a receipt of format {receipt.format}, which a newer facepipe reads")
    if not all(_HASH.fullmatch(text) for texts in receipt.hashes.values() for text in texts):
        raise ConfigError(f"{path!r} is not the receipt of an erasure: a hash is not one of 16 hex digits")
    return receipt
