"""The key that protects what is kept of erased images. It is kept outside the gallery, and is optional.

FACEPIPE_ERASURE_KEY holds it, or FACEPIPE_ERASURE_KEY_FILE names a file with it. With the key, receipts are signed, and
nobody can test guesses against the hashes of receipts and suppress lists without it.
"""

import hashlib
import hmac
import os
from dataclasses import dataclass, field

from facepipe.errors import ConfigError

VARIABLE = "FACEPIPE_ERASURE_KEY"
FILE_VARIABLE = "FACEPIPE_ERASURE_KEY_FILE"
_MIN_BYTES = 16


@dataclass(frozen=True)
class ErasureKey:
    """A key.

    Attributes:
        secret: the bytes of the key.
    """

    secret: bytes = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell this key from others, and do not reveal it."""
        return self.derive("fingerprint").hex()[:16]

    def derive(self, purpose: str) -> bytes:
        """Derive a key of 32 bytes for one purpose."""
        return hmac.digest(self.secret, purpose.encode(), hashlib.sha256)


def read_key() -> ErasureKey | None:
    """Read the key; None if none is set.

    Raises:
        ConfigError: the key is too short, cannot be read, or is set twice.
    """
    text = os.environ.get(VARIABLE, "")
    path = os.environ.get(FILE_VARIABLE, "")
    if text and path:
        raise ConfigError(f"{VARIABLE} and {FILE_VARIABLE} are both set: set one of them")
    secret = text.encode("utf-8", "surrogateescape")
    if path:
        try:
            with open(path, "rb") as file:
                secret = file.read()
        except OSError as error:
            raise ConfigError(f"cannot read the key in {path!r} ({FILE_VARIABLE}): {error.strerror}") from error
    secret = secret.strip()
    if not secret and not path:
        return None
    if len(secret) < _MIN_BYTES:
        raise ConfigError(
            f"the key of {FILE_VARIABLE if path else VARIABLE} has {len(secret)} bytes, the least is {_MIN_BYTES}: "
            "`openssl rand -hex 32` makes one"
        )
    return ErasureKey(secret)


def require_key(fingerprint: str, what: str) -> ErasureKey:
    """Read the key with a fingerprint.

    Args:
        fingerprint: of the key that is needed.
        what: what needs it, for the message.

    Raises:
        ConfigError: no key is set, or another one.
    """
    key = read_key()
    if key is None:
        raise ConfigError(f"{what} needs the key it was made with: set {VARIABLE} or {FILE_VARIABLE}")
    if key.fingerprint != fingerprint:
        raise ConfigError(f"{what} was made with another key than that of {VARIABLE}: set the key of that time")
    return key
