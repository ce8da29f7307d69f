"""Stable 64-bit and content hashes: the same input gives the same id on every machine and in every run."""

import hashlib

MASK_63 = (1 << 63) - 1


def image_id(data: bytes | memoryview) -> str:
    """First 32 hex digits of the SHA-256 of a file's bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def hash64(*parts: str) -> int:
    """Unsigned 64-bit BLAKE2b of the parts; parts are length-prefixed, so ("ab", "c") differs from ("a", "bc")."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def face_id(uri: str, image: str, ordinal: int) -> int:
    """63-bit id of one face (also its FAISS id): a hash of where the image is, its content and the face's ordinal."""
    return hash64(uri, image, str(ordinal)) & MASK_63
