"""The clients of object stores, set up from the environment."""

import os
from datetime import timedelta
from functools import lru_cache
from typing import Any

from facepipe.errors import ConfigError, MissingPackageError, StorageError
from facepipe.extras import describe_missing
from facepipe.storage.error_text import describe_error

# The client tries ten times at most. If answers come at once, that takes about a minute.
_RETRY_SECONDS = 120.0
# Beyond this the store may refuse the signature of a request.
_MAX_RETRY_SECONDS = 280


@lru_cache(maxsize=16)
def open_bucket(bucket: str) -> Any:
    """Open the obstore client of a bucket. Credentials and endpoint come from the environment (AWS_*).

    Args:
        bucket: scheme and name, such as `s3://photos`.

    Raises:
        MissingPackageError: obstore is not installed.
        StorageError: a setting in the environment means nothing to the client.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise MissingPackageError(describe_missing("obstore", bucket)) from error
    options: dict[str, Any] = {"retry_config": {"retry_timeout": timedelta(seconds=get_retry_seconds())}}
    if uses_plain_http():
        options["client_options"] = {"allow_http": True}
    try:
        return from_url(bucket, **options)
    except BaseError as error:
        raise StorageError(f"cannot open {bucket}: {describe_error(error)}") from error


def get_retry_seconds() -> float:
    """Read from FACEPIPE_RETRY_SECONDS how long a request to an object store is retried; 120 by default."""
    # A value that is no number fails the check of the range below.
    text = os.environ.get("FACEPIPE_RETRY_SECONDS", "")
    try:
        seconds = float(text) if text else _RETRY_SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MAX_RETRY_SECONDS:
        raise ConfigError(f"FACEPIPE_RETRY_SECONDS is {text!r}: give seconds up to 280, such as 120")
    return seconds


def uses_plain_http() -> bool:
    """Tell whether the endpoint in the environment is http:// and not https://."""
    return os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
