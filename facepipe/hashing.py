"""Stable 64-bit and content hashes: the same input gives the same id on every machine and in every run."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.types import UInt64

MASK_63 = (1 << 63) - 1


def compute_image_id(data: bytes | memoryview) -> str:
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


_LENGTHS = tuple(length.to_bytes(8, "little") for length in range(1024))


def hash64_each(texts: Iterable[str | bytes]) -> UInt64:
    """(n,) `hash64` of each text alone, in half the time; bytes are UTF-8, as Arrow holds them."""
    blake2b, lengths, most = hashlib.blake2b, _LENGTHS, len(_LENGTHS)
    digests = []
    for text in texts:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        size = len(data)
        prefix = lengths[size] if size < most else size.to_bytes(8, "little")
        digests.append(blake2b(prefix + data, digest_size=8).digest())
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def hash_each_in_process(texts: Sequence[str]) -> UInt64:
    """(n,) 64-bit hash of each text, 0 of an empty one, at a tenth of the cost: the same in this process only."""
    return np.fromiter(map(hash, texts), np.int64, len(texts)).view(np.uint64)


def hash64_column(column: pa.Array | pa.ChunkedArray) -> UInt64:
    """(n,) `hash64` of each text of a string column; null counts as the empty text."""
    texts = pc.fill_null(column, "").cast(pa.binary())
    return hash64_each(texts.to_numpy(zero_copy_only=False))


def compute_face_id(uri: str, image: str, ordinal: int) -> int:
    """63-bit id of one face (also its FAISS id): a hash of where the image is, its content and the face's ordinal."""
    return hash64(uri, image, str(ordinal)) & MASK_63
