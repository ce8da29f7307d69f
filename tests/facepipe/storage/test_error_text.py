"""What an object store says becomes a sentence: of its own client, of deltalake's, and of a real server."""

from typing import Any

import pytest

from facepipe import storage
from facepipe.errors import FacepipeError, StorageError
from facepipe.gallery import Gallery
from facepipe.storage.error_text import describe_error

S3_XML = "Client error with status 404 Not Found: <?xml version='1.0'?><Error><Code>{code}</Code></Error>"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "Error performing PUT http://169.254.169.254/latest/api/token in 2 ms",
            "no credentials: set AWS_ACCESS_KEY_ID",
        ),
        (S3_XML.format(code="NoSuchBucket"), "there is no such bucket"),
        (S3_XML.format(code="InvalidAccessKeyId"), "no such access key"),
        (S3_XML.format(code="SignatureDoesNotMatch"), "AWS_SECRET_ACCESS_KEY"),
        (S3_XML.format(code="AccessDenied"), "do not allow it"),
        (S3_XML.format(code="SlowDown"), "Client error with status 404"),
    ],
)
def test_the_commonest_mistakes_are_sentences(text: str, sentence: str) -> None:
    assert sentence in describe_error(RuntimeError(text))
    assert "<?xml" not in describe_error(RuntimeError(text)) or "SlowDown" in text


def test_a_bucket_that_is_not_there_is_called_so(bucket: Any) -> None:
    for read in (lambda: list(storage.list_files("s3://none/x/")), lambda: storage.read(b"s3://none/x")):
        with pytest.raises(StorageError, match="there is no such bucket"):
            read()
    with pytest.raises(FacepipeError, match="there is no such bucket"):
        Gallery.exists("s3://none/g")
