"""Incomplete uploads: parts of a long object whose upload never ended, such as that of a process that was killed.

No listing of objects shows them, and a store keeps them for ever unless a lifecycle rule says otherwise. obstore has no
request for them, so S3 is asked here.
"""

import hashlib
import hmac
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

from facepipe.errors import StorageError
from facepipe.storage.error_text import describe_error
from facepipe.storage.lease import Lease
from facepipe.storage.urls import is_remote, split_url

_SERVICE = "s3"
_EMPTY = hashlib.sha256(b"").hexdigest()
_TIMEOUT_S = 30.0
_MAX_ATTEMPTS = 3
_ABANDONED_S = 86_400.0
_NOT_FOUND = 404
_NOT_IMPLEMENTED = 501
_SERVER_ERROR = 500  # and above: worth another attempt


class UploadsUnknownError(StorageError):
    """This machine cannot ask the store for incomplete uploads. A lifecycle rule of the bucket deletes them."""


@dataclass(frozen=True)
class Upload:
    """An upload in parts that has not ended.

    Attributes:
        url: URL that the object would get.
        id: Id of the upload.
        began: When it began, in seconds since 1970 by the store's clock.
    """

    url: str
    id: str
    began: float

    @property
    def is_abandoned(self) -> bool:
        """Whether it began more than a day ago, so that no process goes on with it."""
        return time.time() - self.began > _ABANDONED_S


@dataclass(frozen=True)
class Credentials:
    """Who sends a request."""

    key: str
    secret: str
    token: str = ""


def list_uploads(prefix: str) -> list[Upload]:
    """List the incomplete uploads under a prefix, those of running processes included; none on a disk.

    Args:
        prefix: a local folder or URL.

    Raises:
        UploadsUnknownError: the store is not S3 or refuses it, or there are no credentials that can sign the request.
        StorageError: the store does not answer.
    """
    if not is_remote(prefix):
        return []
    bucket, key = split_url(prefix)
    client = _Client(bucket)
    uploads: list[Upload] = []
    query = {"uploads": "", "prefix": f"{key.rstrip('/')}/" if key else ""}
    while True:
        page = client.request("GET", "", query)
        uploads += _parse_page(page, bucket)
        if _find_text(page, "IsTruncated") != "true":
            break
        query["key-marker"] = _find_text(page, "NextKeyMarker")
        query["upload-id-marker"] = _find_text(page, "NextUploadIdMarker")
    # Some stores ignore the prefix.
    return [upload for upload in uploads if upload.url.startswith(f"{prefix.rstrip('/')}/")]


def abort_uploads(folder: str, lease: Lease, owns: Callable[[str], bool]) -> list[Upload]:
    """Abort the uploads into a folder that earlier runs have left, so that the store deletes their parts.

    A run that was paused in the middle of an upload can then no longer complete it.

    Args:
        folder: folder of a gallery, local or a URL.
        lease: of the folder. Uploads that have begun since it was taken are spared.
        owns: tells which objects are ours, by their name in the folder.

    Returns:
        The uploads that were aborted.

    Raises:
        UploadsUnknownError: as `list_uploads`.
        StorageError: the store does not answer.
        GalleryBusyError: another run has taken the lease over.
    """
    start = len(folder.rstrip("/")) + 1
    old = [upload for upload in list_uploads(folder) if upload.began < lease.taken_at and owns(upload.url[start:])]
    if old:
        lease.renew()
        client = _Client(split_url(folder)[0])
        for upload in old:
            lease.check()
            client.request("DELETE", split_url(upload.url)[1], {"uploadId": upload.id})
    return old


def _parse_page(page: ElementTree.Element, bucket: str) -> Iterator[Upload]:
    for element in page.iter():
        if _strip_namespace(element.tag) == "Upload":
            began = datetime.fromisoformat(_find_text(element, "Initiated")).timestamp()
            yield Upload(f"{bucket}/{_find_text(element, 'Key')}", _find_text(element, "UploadId"), began)


def _find_text(parent: ElementTree.Element, name: str) -> str:
    """Find the text of a child, whatever the store's namespace is."""
    for child in parent:
        if _strip_namespace(child.tag) == name:
            return child.text or ""
    return ""


def _strip_namespace(tag: str) -> str:
    return tag.rpartition("}")[2]


# ---- requests


class _Client:
    """Sends signed requests to a bucket of S3."""

    def __init__(self, bucket: str) -> None:
        scheme, name = bucket.split("://")
        if scheme != "s3":
            raise UploadsUnknownError(
                f"incomplete uploads to {bucket} cannot be listed: {scheme}:// has no request for it"
            )
        self._bucket = bucket
        self._credentials = _read_credentials(bucket)
        self._region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        self._base = _locate_bucket(name, self._region)

    def request(self, method: str, key: str, query: Mapping[str, str]) -> ElementTree.Element:
        """Send a request, a few times if the store fails, and return its answer; an empty one if nothing is there."""
        url = f"{self._base}/{quote(key)}" if key else self._base
        full_url = f"{url}?{_encode_query(query)}"
        attempt = 1
        while True:
            headers = sign_request(method, url, query, self._credentials, self._region, datetime.now(UTC))
            try:
                request = urllib.request.Request(full_url, method=method, headers=headers)
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                    body = answer.read()
                return ElementTree.fromstring(body) if body else ElementTree.Element("Empty")
            except urllib.error.HTTPError as error:
                if error.code == _NOT_FOUND:
                    return ElementTree.Element("Empty")
                if error.code < _SERVER_ERROR or error.code == _NOT_IMPLEMENTED:
                    raise UploadsUnknownError(
                        f"incomplete uploads to {self._bucket} cannot be listed and aborted: the store answers HTTP "
                        f"{error.code} {error.reason}. Allow s3:ListBucketMultipartUploads and s3:AbortMultipartUpload"
                    ) from error
                if attempt == _MAX_ATTEMPTS:
                    raise self._make_error(f"HTTP {error.code} {error.reason}") from error
            except ElementTree.ParseError as error:
                raise self._make_error("its answer is no XML") from error
            except OSError as error:
                if attempt == _MAX_ATTEMPTS:
                    raise self._make_error(describe_error(error)) from error
            time.sleep(attempt)
            attempt += 1

    def _make_error(self, cause: str) -> StorageError:
        return StorageError(f"cannot look for incomplete uploads to {self._bucket}: {cause}")


def _read_credentials(bucket: str) -> Credentials:
    """Read credentials from the environment, or from botocore if that is installed."""
    key = os.environ.get("AWS_ACCESS_KEY_ID")
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY")
    if key and secret:
        return Credentials(key, secret, os.environ.get("AWS_SESSION_TOKEN", ""))
    session: Any
    try:
        from botocore.session import Session

        session = Session()
        found = session.get_credentials()
    except Exception:  # not installed, or without settings that it understands
        found = None
    if found is None:
        raise UploadsUnknownError(
            f"incomplete uploads to {bucket} cannot be listed without AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or boto3"
        )
    frozen = found.get_frozen_credentials()
    return Credentials(frozen.access_key, frozen.secret_key, frozen.token or "")


def _locate_bucket(name: str, region: str) -> str:
    """Return the URL of a bucket, without a slash at its end."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "").rstrip("/")
    if not endpoint:
        suffix = ".cn" if region.startswith("cn-") else ""
        return f"https://s3.{region}.amazonaws.com{suffix}/{name}"
    has_bucket = os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in ("1", "true")
    return endpoint if has_bucket else f"{endpoint}/{name}"


def sign_request(
    method: str, url: str, query: Mapping[str, str], credentials: Credentials, region: str, now: datetime
) -> dict[str, str]:
    """Sign a request without a body by version 4 of Amazon's signatures.

    Args:
        method: GET or DELETE.
        url: URL without its query.
        query: names and values.
        credentials: of the user.
        region: of the bucket.
        now: the time.

    Returns:
        The headers to send.
    """
    parts = urlsplit(url)
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": parts.netloc, "x-amz-content-sha256": _EMPTY, "x-amz-date": stamp}
    if credentials.token:
        headers["x-amz-security-token"] = credentials.token
    # What is signed: the request in one form, and the day, region and service for which the key is made.
    names = ";".join(sorted(headers))
    lines = [f"{name}:{headers[name]}\n" for name in sorted(headers)]
    canonical = "\n".join((method, parts.path or "/", _encode_query(query), "".join(lines), names, _EMPTY))
    scope = f"{stamp[:8]}/{region}/{_SERVICE}/aws4_request"
    text = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = f"AWS4{credentials.secret}".encode()
    for word in scope.split("/"):
        key = hmac.digest(key, word.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    who = f"Credential={credentials.key}/{scope}, SignedHeaders={names}"
    return {**headers, "authorization": f"AWS4-HMAC-SHA256 {who}, Signature={signature}"}


def _encode_query(query: Mapping[str, str]) -> str:
    """Encode a query as the signature wants it: sorted, with %20 for a blank."""
    return "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in sorted(query.items()))
