"""Hashes of erased images, by uri and by content, so that they do not come back. They are kept in the gallery.

The source may go on listing an erased image. Hashes recognise it without saying what it was called. They are hashed
again under a salt of the gallery, so that lists of two galleries cannot be compared. If there is a key outside the
gallery (`facepipe.gallery.erasure_key`), they are hashed a third time under it: then nobody can test guesses without
the key. Lists that older versions made have the first hash only, and are read as well.

When an erasure is repeated by its receipt, images that the gallery does not hold are not known by name. Then the
receipt's own hashes are kept, which have a salt of their own.
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from facepipe import storage
from facepipe.errors import ConfigError, GalleryError
from facepipe.gallery.erasure_key import FILE_VARIABLE, VARIABLE, ErasureKey, read_key
from facepipe.hashing import hash64
from facepipe.sorted_lookup import is_in_sorted
from facepipe.storage import conditional
from facepipe.types import Bool, UInt64

FOLDER = "erased"
_URIS = ".uris"
_CONTENTS = ".contents"
_SALT = "salt"
_NOTE = "lists.migrated"
_ADDED = "-added"
_REPEATED = "-repeated"
_SALT_BYTES = 32
# A list begins with how often it was hashed, and with a mark of the keys. Old lists have neither.
_SALTED = b"facepipe salted1"
_KEYED = b"facepipe keyed 1"
# A list that comes from a receipt goes on with the hash of the receipt's salt. Its mark is zero if no key was used.
_OF_RECEIPT = b"facepipe receipt"
_MARK_BYTES = 16
_HEADER_BYTES = len(_SALTED) + _MARK_BYTES
_NO_HASHES = np.empty(0, np.uint64)


@dataclass(frozen=True)
class SuppressKeys:
    """The keys of a gallery's lists.

    Attributes:
        salt: the gallery's salt; empty if it has none yet.
        secret: derived from the key outside the gallery; empty if none is set.
    """

    salt: bytes = field(default=b"", repr=False)
    secret: bytes = field(default=b"", repr=False)

    @property
    def salt_mark(self) -> bytes:
        """A text that only this salt gives."""
        return _hash_bytes(b"mark", self.salt, _MARK_BYTES)

    @property
    def secret_mark(self) -> bytes:
        """A text that only this salt and this secret give."""
        return _hash_bytes(self.salt_mark, self.secret, _MARK_BYTES)


@dataclass(frozen=True)
class ReceiptList:
    """Hashes of a receipt.

    Attributes:
        key: the key under which they are made.
        hashes: sorted hashes.
    """

    key: bytes = field(repr=False)
    hashes: UInt64


@dataclass(frozen=True)
class SuppressedHashes:
    """Hashes of uris or of contents that must not come back.

    Attributes:
        plain: sorted hashes of old lists.
        salted: sorted hashes under the salt.
        keyed: sorted hashes under salt and secret.
        keys: the salt and the secret.
        receipts: hashes of receipts, each under a key of its own.
    """

    plain: UInt64 = field(default_factory=_NO_HASHES.copy)
    salted: UInt64 = field(default_factory=_NO_HASHES.copy)
    keyed: UInt64 = field(default_factory=_NO_HASHES.copy)
    keys: SuppressKeys = SuppressKeys()
    receipts: tuple[ReceiptList, ...] = ()

    def __len__(self) -> int:
        return len(self.plain) + len(self.salted) + len(self.keyed) + sum(len(part.hashes) for part in self.receipts)

    @property
    def size(self) -> int:
        """Number of hashes."""
        return len(self)

    def contains(self, hashes: UInt64) -> Bool:
        """Tell for each `hash64` of a uri or an image id (n,) whether it must not come back."""
        found = is_in_sorted(self.plain, hashes)
        if len(self.salted) or len(self.keyed):
            salted = hash_again(hashes, self.keys.salt)
            found |= is_in_sorted(self.salted, salted)
            if len(self.keyed):
                found |= is_in_sorted(self.keyed, hash_again(salted, self.keys.secret))
        for part in self.receipts:
            found |= is_in_sorted(part.hashes, hash_again(hashes, part.key))
        return found


def get_erased_folder(gallery: str) -> str:
    """Return the folder of a gallery that holds receipts and these hashes."""
    return storage.join(gallery, FOLDER)


def write_erased_file(gallery: str, name: str, data: bytes) -> str:
    """Write a file of this folder, whole or not at all, because half a file would stop every later run.

    Returns:
        The path of the file.
    """
    path = storage.join(get_erased_folder(gallery), name)
    storage.replace(path, data)
    return path


def suppress_images(gallery: str, name: str, uris: Iterable[str], contents: Iterable[str]) -> None:
    """Keep images from coming back.

    Args:
        gallery: path or URL of the gallery.
        name: name of the erasure, from which the files get theirs.
        uris: uris that must not come back.
        contents: image ids that must not come back, under whatever uri.
    """
    keys = _read_keys(gallery, read_secret(), create=True)
    for ending, values in ((_URIS, uris), (_CONTENTS, contents)):
        hashes = np.array([hash64(value) for value in values], np.uint64)
        # A run without the key leaves the list that was made with it, and adds its own.
        current = conditional.read_tagged(storage.join(get_erased_folder(gallery), name + ending))
        is_closed = current is not None and current[0].startswith(_KEYED) and not keys.secret
        stem = f"{name}{_ADDED}" if is_closed else name
        write_erased_file(gallery, stem + ending, _encode(hash_again(hashes, keys.salt), keys))
    # The next erase that has the key must look at all lists again.
    note_path = storage.join(get_erased_folder(gallery), _NOTE)
    note = conditional.read_tagged(note_path)
    if note is not None and note[0] != _get_note(keys):
        storage.delete(note_path)


def suppress_receipt(gallery: str, name: str, salt: str, secret: bytes, uris: UInt64, contents: UInt64) -> None:
    """Keep images from coming in that are known by the hashes of a receipt only.

    Args:
        gallery: path or URL of the gallery.
        name: name of the receipt, from which the files get theirs.
        salt: the receipt's salt.
        secret: as `derive_secret` returns it; empty if the receipt was made without a key.
        uris: hashes of uris, as the receipt has them.
        contents: hashes of image ids.
    """
    salt_digest = _hash_salt(salt)
    mark = _hash_bytes(salt_digest, secret, _MARK_BYTES) if secret else bytes(_MARK_BYTES)
    for ending, hashes in ((_URIS, uris), (_CONTENTS, contents)):
        body = np.unique(hashes).astype("<u8").tobytes()
        write_erased_file(gallery, f"{name}{_REPEATED}{ending}", _OF_RECEIPT + mark + salt_digest + body)


def read_receipt_lists(gallery: str, names: Sequence[str]) -> tuple[SuppressedHashes, SuppressedHashes]:
    """Read the hashes of uris, and those of contents, that `suppress_receipt` keeps for some receipts."""
    return _read_receipt_lists(gallery, names, _URIS), _read_receipt_lists(gallery, names, _CONTENTS)


def _read_receipt_lists(gallery: str, names: Sequence[str], ending: str) -> SuppressedHashes:
    paths = [storage.join(get_erased_folder(gallery), f"{name}{_REPEATED}{ending}") for name in names]
    paths = [path for path in paths if storage.file_exists(path)]
    secret = read_secret() if paths else b""
    parts = [_decode_receipt_list(storage.read(path), path, secret) for path in paths]
    return SuppressedHashes(receipts=tuple(parts))


def has_list(gallery: str, name: str) -> bool:
    """Tell whether the gallery keeps out what an erasure deleted."""
    return storage.file_exists(storage.join(get_erased_folder(gallery), name + _URIS))


def derive_receipt_key(salt: str, secret: bytes) -> bytes:
    """Derive the key under which a receipt hashes.

    Args:
        salt: the receipt's salt.
        secret: as `derive_secret` returns it; empty if the receipt was made without a key.
    """
    return _hash_bytes(_hash_salt(salt), secret, _SALT_BYTES)


def _hash_salt(salt: str) -> bytes:
    return _hash_bytes(salt.encode("utf-8", "surrogatepass"), b"", _SALT_BYTES)


def release_images(gallery: str, name: str) -> None:
    """Let the images of an erasure come back, as far as no other erasure keeps them out."""
    for ending in (_URIS, _CONTENTS):
        for stem in (name, f"{name}{_ADDED}"):
            storage.delete(storage.join(get_erased_folder(gallery), stem + ending))


def read_uris(gallery: str, secret: bytes | None = None) -> SuppressedHashes:
    """Read the hashes of uris that must not come back.

    Args:
        gallery: path or URL of the gallery.
        secret: as `read_secret` returns it, for a machine without the key; by default it is read.

    Raises:
        ConfigError: a list was made with a key that is not set.
        GalleryError: a list was made with another salt, or is damaged.
    """
    return _read_hashes(gallery, _URIS, secret)


def read_contents(gallery: str, secret: bytes | None = None) -> SuppressedHashes:
    """Read the hashes of image ids that must not come back; as `read_uris`."""
    return _read_hashes(gallery, _CONTENTS, secret)


def read_secret() -> bytes:
    """Derive the secret of the lists from the key outside the gallery; empty if none is set."""
    key = read_key()
    return derive_secret(key) if key is not None else b""


def derive_secret(key: ErasureKey) -> bytes:
    """Derive the secret of the lists from a key."""
    return key.derive("suppress")


def _read_keys(gallery: str, secret: bytes, *, create: bool = False) -> SuppressKeys:
    """Read the keys of a gallery's lists.

    Args:
        gallery: path or URL of the gallery.
        secret: as `read_secret` returns it.
        create: give the gallery a salt if it has none.
    """
    path = storage.join(get_erased_folder(gallery), _SALT)
    content = conditional.read_tagged(path)
    if content is None and create:
        storage.make_parent_folder(path)
        with suppress(conditional.ConflictError):  # another run was faster
            conditional.write_if(path, secrets.token_bytes(_SALT_BYTES), None)
        content = conditional.read_tagged(path)
    if content is None:
        return SuppressKeys(b"", secret)
    if len(content[0]) != _SALT_BYTES:
        raise GalleryError(f"{path!r} is damaged: take it from a backup, because the lists of erased images need it")
    return SuppressKeys(content[0], secret)


def migrate_lists(gallery: str) -> int:
    """Bring old lists to the form of new ones, list by list. Which images they keep out does not change.

    Returns:
        How many lists were changed.
    """
    paths = _list_paths(gallery, _URIS) + _list_paths(gallery, _CONTENTS)
    if not paths:
        return 0
    keys = _read_keys(gallery, read_secret(), create=True)
    # A note of the keys spares reading every list again.
    note = _get_note(keys)
    note_path = storage.join(get_erased_folder(gallery), _NOTE)
    content = conditional.read_tagged(note_path)
    if content is not None and content[0] == note:
        return 0
    count = 0
    for path in paths:
        data = storage.read(path)
        if data.startswith((_KEYED, _OF_RECEIPT)):
            continue
        kind, hashes = _decode(data, path, keys)
        # Hashes can be hashed again, so that no name is needed for it.
        if kind == b"":
            hashes = hash_again(hashes, keys.salt)
        elif not keys.secret:
            continue
        storage.replace(path, _encode(hashes, keys))
        count += 1
    storage.replace(note_path, note)
    return count


def _get_note(keys: SuppressKeys) -> bytes:
    """Return what is noted when all lists have been made with these keys."""
    return keys.secret_mark if keys.secret else keys.salt_mark


def _read_hashes(gallery: str, ending: str, secret: bytes | None) -> SuppressedHashes:
    paths = _list_paths(gallery, ending)
    if not paths:
        return SuppressedHashes()
    keys = _read_keys(gallery, read_secret() if secret is None else secret)
    parts: dict[bytes, list[UInt64]] = {b"": [_NO_HASHES], _SALTED: [_NO_HASHES], _KEYED: [_NO_HASHES]}
    receipts = []
    for path in paths:
        data = storage.read(path)
        if data.startswith(_OF_RECEIPT):
            receipts.append(_decode_receipt_list(data, path, keys.secret))
            continue
        kind, hashes = _decode(data, path, keys)
        parts[kind].append(hashes)
    plain, salted, keyed = (np.unique(np.concatenate(parts[kind])) for kind in (b"", _SALTED, _KEYED))
    # Each of these costs a hash per image that is listed, so those that are empty are left out.
    return SuppressedHashes(plain, salted, keyed, keys, tuple(part for part in receipts if len(part.hashes)))


def _list_paths(gallery: str, ending: str) -> list[str]:
    return [entry.url for entry in storage.list_files(get_erased_folder(gallery)) if entry.url.endswith(ending)]


def _encode(salted: UInt64, keys: SuppressKeys) -> bytes:
    """Encode hashes that were made under the salt; with a secret they are hashed once more."""
    if keys.secret:
        header = _KEYED + keys.secret_mark
        hashes = np.unique(hash_again(salted, keys.secret))
    else:
        header = _SALTED + keys.salt_mark
        hashes = np.unique(salted)
    return header + hashes.astype("<u8").tobytes()


def _decode(data: bytes, path: str, keys: SuppressKeys) -> tuple[bytes, UInt64]:
    """Decode a list: how its hashes were made, and the hashes."""
    kind = data[: len(_SALTED)]
    if kind not in (_SALTED, _KEYED):
        kind = b""
    body = data[_HEADER_BYTES:] if kind else data
    if len(body) % 8:
        raise _make_damage_error(path)
    mark = data[len(_SALTED) : _HEADER_BYTES]
    if kind == _KEYED and not keys.secret:
        raise _make_missing_key_error(path)
    # A list that matches nothing would let erased images in, so a wrong key is an error.
    if kind == _KEYED and mark != keys.secret_mark:
        raise ConfigError(
            f"{path!r}, a list of erased images, was made with another key or another salt than those at hand: set the "
            f"{VARIABLE} of that time, or take {FOLDER}/{_SALT} from a backup"
        )
    if kind == _SALTED and mark != keys.salt_mark:
        raise GalleryError(
            f"{path!r}, a list of erased images, was made with another salt: take {FOLDER}/{_SALT} from the gallery or "
            "the backup that the list is from"
        )
    return kind, np.frombuffer(body, "<u8").astype(np.uint64)


def _decode_receipt_list(data: bytes, path: str, secret: bytes) -> ReceiptList:
    """Decode a list that comes from a receipt."""
    mark = data[len(_OF_RECEIPT) : _HEADER_BYTES]
    salt_digest = data[_HEADER_BYTES : _HEADER_BYTES + _SALT_BYTES]
    body = data[_HEADER_BYTES + _SALT_BYTES :]
    if len(salt_digest) != _SALT_BYTES or len(body) % 8:
        raise _make_damage_error(path)
    is_keyed = mark != bytes(_MARK_BYTES)
    if is_keyed and not secret:
        raise _make_missing_key_error(path)
    if is_keyed and mark != _hash_bytes(salt_digest, secret, _MARK_BYTES):
        raise ConfigError(
            f"{path!r}, a list of erased images, was made with another key: set the {VARIABLE} of the receipt"
        )
    key = _hash_bytes(salt_digest, secret if is_keyed else b"", _SALT_BYTES)
    return ReceiptList(key, np.frombuffer(body, "<u8").astype(np.uint64))


def _make_damage_error(path: str) -> GalleryError:
    return GalleryError(f"{path!r}, a list of erased images, is damaged: take it from a backup")


def _make_missing_key_error(path: str) -> ConfigError:
    return ConfigError(
        f"{path!r}, a list of erased images, needs the key it was made with: set {VARIABLE} or {FILE_VARIABLE}"
    )


def hash_again(hashes: UInt64, key: bytes) -> UInt64:
    """Hash 64-bit numbers (n,) under a key."""
    data = hashes.astype("<u8").tobytes()
    digests = [_hash_bytes(data[at : at + 8], key, 8) for at in range(0, len(data), 8)]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _hash_bytes(data: bytes, key: bytes, length: int) -> bytes:
    return hashlib.blake2b(data, digest_size=length, key=key).digest()
