"""Local paths and URLs of object stores: tell them apart, join names to them, take them apart."""

import os

from facepipe.errors import ConfigError, StorageError
from facepipe.storage.redact import redact

SCHEMES = ("s3://", "gs://", "az://", "abfs://", "memory://")


def is_remote(path: str | bytes) -> bool:
    """Tell whether a path is a URL of an object store."""
    text = os.fsdecode(path)
    return text.startswith(SCHEMES)


def to_absolute(path: str) -> str:
    """Make a local path absolute; a URL stays as it is."""
    return path if is_remote(path) else os.path.abspath(path)


def join(base: str, *names: str) -> str:
    """Join names to a local path or a URL."""
    if is_remote(base):
        return "/".join([base.rstrip("/") or "/", *names])
    return os.path.join(base, *names)


def split_url(url: str) -> tuple[str, str]:
    """Split a URL into its bucket and its key: `s3://bucket/a/b` into ("s3://bucket", "a/b").

    Raises:
        ConfigError: the URL has no bucket, or holds credentials.
        StorageError: no client can request this key.
    """
    # Take the URL apart, and refuse what no client could request.
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise ConfigError(f"{url!r} names no bucket: write {scheme}://BUCKET/PREFIX")
    # Such a URL would end up in the gallery, in the uri of every image.
    if has_credentials(url):
        raise ConfigError(f"{redact(url)!r} holds credentials: they belong into the environment (docs/security.md)")
    if key and not {"", ".", ".."}.isdisjoint(key.removesuffix("/").split("/")):
        raise StorageError(f"{url!r} has an empty part, or one of dots alone, which the client cannot ask for")
    return f"{scheme}://{bucket}", key


def has_credentials(url: str) -> bool:
    """Tell whether a URL names a user before its host. In abfs://CONTAINER@ACCOUNT nothing is a user."""
    scheme, _, rest = url.partition("://")
    # The user ends at the last @ before the first slash.
    user, at, _ = rest.partition("/")[0].rpartition("@")
    return bool(at) and (":" in user or not scheme.startswith(("az", "abfs")))
