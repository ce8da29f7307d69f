"""What the table's libraries must be told to reach a gallery: options for deltalake, a filesystem for pyarrow."""

import os
from typing import Any

import pyarrow.fs as fs

from facepipe.errors import ConfigError
from facepipe.storage import is_remote, plain_http, split_url

_TRIES = 10  # of a request by pyarrow, whose own 3 are over in a second


def table_options(path: str) -> dict[str, str] | None:
    """Options for deltalake, beside the environment that it reads itself."""
    if path.startswith("s3://"):
        _check_encryption()
    return {"allow_http": "true"} if is_remote(path) and plain_http() else None


def _check_encryption() -> None:
    """Refuse what would leave a gallery unencrypted in silence, or unreadable. Misspelt modes the clients refuse."""
    mode = os.environ.get("AWS_SERVER_SIDE_ENCRYPTION", "")
    if os.environ.get("AWS_SSE_KMS_KEY_ID") and not mode.startswith("aws:kms"):
        raise ConfigError(
            "AWS_SSE_KMS_KEY_ID is set and does nothing, since AWS_SERVER_SIDE_ENCRYPTION is not aws:kms: set it so"
        )
    if mode == "sse-c":
        raise ConfigError("AWS_SERVER_SIDE_ENCRYPTION=sse-c: pyarrow cannot read such a gallery; use aws:kms or AES256")


def arrow_filesystem(folder: str) -> Any:
    """A pyarrow filesystem whose root is the folder; None for stores that pyarrow does not know.

    Not deltalake's own: its Python callbacks, run by Arrow's threads while the interpreter ends, abort the process
    after all its work is done (4 runs of 10 with deltalake 1.6.6).
    """
    if not is_remote(folder):
        return fs.SubTreeFileSystem(folder, fs.LocalFileSystem())
    bucket, key = split_url(folder)
    scheme, name = bucket.split("://")
    if scheme == "s3":
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=_TRIES)
        made = fs.S3FileSystem(**_s3_options(), retry_strategy=retries)
        return fs.SubTreeFileSystem(f"{name}/{key}", made)
    if scheme == "gs":
        return fs.SubTreeFileSystem(f"{name}/{key}", fs.GcsFileSystem())
    return None


def _s3_options() -> dict[str, Any]:
    """pyarrow reads credentials from the environment, but not the endpoint's scheme, nor every name of the region."""
    options: dict[str, Any] = {}
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        options["region"] = region
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        options["scheme"], options["endpoint_override"] = endpoint.split("://", 1)
    return options
