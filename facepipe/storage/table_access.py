"""What the table's libraries need to reach a gallery: options for deltalake, a filesystem for pyarrow."""

import os
from typing import Any

import pyarrow.fs as fs

from facepipe.errors import ConfigError
from facepipe.storage.aliases import find_utf8_path
from facepipe.storage.client import uses_plain_http
from facepipe.storage.urls import is_remote, split_url

_MAX_ATTEMPTS = 10  # per request of pyarrow, whose own 3 are over in a second


def get_delta_options(path: str) -> dict[str, str] | None:
    """Return the options for deltalake at a path, beside the environment, which it reads itself."""
    if path.startswith("s3://"):
        _check_encryption()
    return {"allow_http": "true"} if is_remote(path) and uses_plain_http() else None


def _check_encryption() -> None:
    """Refuse settings that would silently leave a gallery unencrypted, or unreadable.

    The clients themselves refuse modes that are misspelt.
    """
    mode = os.environ.get("AWS_SERVER_SIDE_ENCRYPTION", "")
    if os.environ.get("AWS_SSE_KMS_KEY_ID") and not mode.startswith("aws:kms"):
        raise ConfigError(
            "AWS_SSE_KMS_KEY_ID is set and does nothing, since AWS_SERVER_SIDE_ENCRYPTION is not aws:kms: set it so"
        )
    if mode == "sse-c":
        raise ConfigError("AWS_SERVER_SIDE_ENCRYPTION=sse-c: pyarrow cannot read such a gallery; use aws:kms or AES256")


def open_arrow_filesystem(folder: str) -> Any:
    """Open a pyarrow filesystem whose root is the folder; None for stores that pyarrow does not know.

    deltalake has one of its own, which is not used: Arrow's threads run its Python callbacks while the interpreter
    ends. That aborts the process after all its work is done (4 runs of 10 with deltalake 1.6.6).
    """
    if not is_remote(folder):
        return fs.SubTreeFileSystem(find_utf8_path(folder), fs.LocalFileSystem())
    bucket, key = split_url(folder)
    # The root is the folder, so that paths in the log can be used as they are.
    scheme, name = bucket.split("://")
    if scheme == "s3":
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=_MAX_ATTEMPTS)
        filesystem = fs.S3FileSystem(**_get_s3_options(), retry_strategy=retries)
        return fs.SubTreeFileSystem(f"{name}/{key}", filesystem)
    if scheme == "gs":
        return fs.SubTreeFileSystem(f"{name}/{key}", fs.GcsFileSystem())
    return None


def _get_s3_options() -> dict[str, Any]:
    """Read the options that pyarrow does not take from the environment: the endpoint's scheme, other region names."""
    options: dict[str, Any] = {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["region"] = region
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    # The client wants scheme and host apart.
    if endpoint:
        options["scheme"], options["endpoint_override"] = endpoint.split("://", 1)
    return options
