"""Small files that several processes write: a write says what it replaces, and of two at once one is refused.

On object stores by conditional requests (If-Match, If-None-Match), on local disks under a lock on a file beside them.
"""

import fcntl
import hashlib
import os
from typing import Any

from facepipe import storage
from facepipe.errors import StorageError


class ConflictError(StorageError):
    """Somebody else changed a file first."""


def read_tagged(path: str) -> tuple[bytes, str] | None:
    """(content, tag) of a small file or object; the tag tells this content from any other. None where there is none."""
    if not storage.is_remote(path):
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot read {path!r}: {storage.reason(error)}") from error
        return data, hashlib.sha256(data).hexdigest()
    import obstore

    bucket, key = storage.split_url(path)
    try:
        found = obstore.get(storage.bucket_store(bucket), key)
        return bytes(found.bytes()), str(found.meta["e_tag"])
    except FileNotFoundError:
        return None
    except (obstore.exceptions.BaseError, OSError) as error:
        raise StorageError(f"cannot read {path!r}: {storage.reason(error)}") from error


def write_if(path: str, data: bytes, tag: str | None) -> str:
    """Replace what has this tag, or create what is not there (None); the new tag.

    Of several that try at once one succeeds, and the others get ConflictError. `data` must differ from all that anyone
    else writes there.
    """
    return _write_if_remote(path, data, tag) if storage.is_remote(path) else _write_if_local(path, data, tag)


def _write_if_remote(path: str, data: bytes, tag: str | None) -> str:
    import obstore

    bucket, key = storage.split_url(path)
    mode: Any = "create" if tag is None else {"e_tag": tag}
    try:
        return str(obstore.put(storage.bucket_store(bucket), key, data, mode=mode)["e_tag"])
    except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError) as error:
        # A write that succeeded and whose answer was lost is tried again by the client, and then refused.
        now = read_tagged(path)
        if now is not None and now[0] == data:
            return now[1]
        raise ConflictError(f"{path!r} was changed by another writer") from error
    except (obstore.exceptions.BaseError, OSError) as error:
        raise StorageError(f"cannot write {path!r}: {storage.reason(error)}") from error


def _write_if_local(path: str, data: bytes, tag: str | None) -> str:
    try:
        with open(path + ".guard", "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            now = read_tagged(path)
            if (now[1] if now else None) != tag:
                raise ConflictError(f"{path!r} was changed by another writer")
            storage.write(path + ".new", data)  # leaves nothing where it fails
            os.replace(path + ".new", path)
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {storage.reason(error)}") from error
    return hashlib.sha256(data).hexdigest()
