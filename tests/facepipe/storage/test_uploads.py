"""Incomplete uploads: they are found, those of earlier runs are aborted, and nobody else's are."""

import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials
from hypothesis import given
from hypothesis import strategies as st

from facepipe.errors import GalleryBusyError
from facepipe.storage import uploads
from facepipe.storage.lease import hold_lease
from facepipe.storage.uploads import Credentials, Upload, UploadsUnknownError, abort_uploads, list_uploads

GALLERY = "s3://faces/g%20 ü"


def begin_upload(key: str) -> str:
    """Begin an upload and send a part, as a process does that is killed then; its id."""
    import boto3

    client: Any = boto3.client("s3")
    upload: str = client.create_multipart_upload(Bucket="faces", Key=key)["UploadId"]
    client.upload_part(Bucket="faces", Key=key, UploadId=upload, PartNumber=1, Body=b"vectors")
    return upload


def test_there_are_none_on_a_disk() -> None:
    assert list_uploads("/tmp") == []


def test_those_below_a_folder_are_found_and_ours_are_aborted(bucket: Any) -> None:
    names = ["index/shard-1/index.faiss", "index/mine +&?.bin", "index/shard-2/vectors.npy"]
    ids = {f"{GALLERY}/{name}": begin_upload(f"g%20 ü/{name}") for name in names}
    begin_upload("g%20 übrig/index/shard-3/index.faiss")
    assert {upload.url: upload.id for upload in list_uploads(GALLERY)} == ids
    with hold_lease(f"{GALLERY}/index", "index") as lease:
        aborted = abort_uploads(f"{GALLERY}/index", lease, lambda name: name.startswith("shard-"))
    assert {upload.url for upload in aborted} == {f"{GALLERY}/{names[0]}", f"{GALLERY}/{names[2]}"}
    assert [upload.url for upload in list_uploads(GALLERY)] == [f"{GALLERY}/{names[1]}"]
    assert len(list_uploads("s3://faces")) == 2


def test_those_that_began_under_the_lease_are_spared(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_upload("g/faces/part-1.parquet")
    with hold_lease("s3://faces/g") as lease:
        # The test server has one date for all uploads.
        for began, count in ((lease.taken_at + 0.001, 0), (lease.taken_at - 1, 1)):
            (upload,) = list_uploads("s3://faces/g")
            moved = Upload(upload.url, upload.id, began)
            monkeypatch.setattr(uploads, "list_uploads", lambda prefix, moved=moved: [moved])
            assert len(abort_uploads("s3://faces/g/faces", lease, lambda name: True)) == count
            monkeypatch.undo() if count else monkeypatch.setattr(uploads, "list_uploads", list_uploads)


def test_who_has_lost_the_lease_aborts_nothing(bucket: Any) -> None:
    begin_upload("g/faces/part-1.parquet")
    with hold_lease("s3://faces/g") as lease:
        lease._is_lost = True
        with pytest.raises(GalleryBusyError):
            abort_uploads("s3://faces/g/faces", lease, lambda name: True)
    assert len(list_uploads("s3://faces/g")) == 1


def test_pages_follow_each_other(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [
        "<R xmlns='x'><Upload><Key>g/a</Key><UploadId>1</UploadId><Initiated>2026-11-30T10:00:00.000Z</Initiated></Upload>"
        "<IsTruncated>true</IsTruncated><NextKeyMarker>g/a</NextKeyMarker><NextUploadIdMarker>1</NextUploadIdMarker></R>",
        "<R><IsTruncated>false</IsTruncated><Upload><Key>g/b</Key><UploadId>2</UploadId>"
        "<Initiated>2026-11-30T10:00:01Z</Initiated></Upload></R>",
    ]
    queries = []

    def answer(client: Any, method: str, key: str, query: dict[str, str]) -> Any:
        queries.append(dict(query))
        return uploads.ElementTree.fromstring(pages[len(queries) - 1])

    monkeypatch.setattr(uploads._Client, "request", answer)
    began = datetime(2026, 11, 30, 10, tzinfo=UTC).timestamp()
    assert list_uploads("s3://faces/g") == [
        Upload("s3://faces/g/a", "1", began),
        Upload("s3://faces/g/b", "2", began + 1),
    ]
    assert (queries[1]["key-marker"], queries[1]["upload-id-marker"]) == ("g/a", "1")


def test_a_store_that_cannot_be_asked_is_said_to_be_one(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for prefix in ("gs://faces/g", "az://faces/g"):
        with pytest.raises(UploadsUnknownError, match="cannot be listed"):
            list_uploads(prefix)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UploadsUnknownError, match="AWS_ACCESS_KEY_ID"):
        list_uploads("s3://faces/g")


@pytest.mark.parametrize("code", [403, 405, 501])
def test_a_store_that_refuses_the_request_is_said_to_be_one(
    code: int, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(code)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UploadsUnknownError, match=f"HTTP {code}.*s3:ListBucketMultipartUploads"):
            list_uploads("s3://faces/g")


@given(
    key=st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=9).filter(lambda key: not key.startswith("/")),
    value=st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=9),
    token=st.sampled_from(["", "session"]),
)
def test_the_signature_is_that_of_amazons_client(key: str, value: str, token: str) -> None:
    query = {"uploads": "", "prefix": value}
    url = f"https://s3.eu-west-1.amazonaws.com/faces/{uploads.quote(key)}"
    now = datetime(2026, 11, 30, 9, 5, 7, tzinfo=UTC)
    headers = uploads.sign_request("GET", url, query, Credentials("id", "secret", token), "eu-west-1", now)
    request = AWSRequest("GET", f"{url}?{uploads._encode_query(query)}", headers={})
    request.context["timestamp"] = headers["x-amz-date"]
    auth = S3SigV4Auth(BotoCredentials("id", "secret", token or None), "s3", "eu-west-1")
    for name, text in headers.items():
        if name.startswith("x-amz") and name != "x-amz-security-token":
            request.headers[name] = text
    if token:
        request.headers["x-amz-security-token"] = token
    canonical = auth.canonical_request(request)
    expected = auth.signature(auth.string_to_sign(request, canonical), request)
    assert headers["authorization"].endswith(f"Signature={expected}")
