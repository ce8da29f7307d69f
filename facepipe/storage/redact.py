"""Credentials out of text, before it is logged or becomes a label."""

import os
import re
from urllib.parse import quote

HIDDEN = "***"

_SECRET_VARIABLE = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|ACCOUNT_KEY")
_PATH_VARIABLE = re.compile(r"_(FILE|PATH|DIR|URI|URL|MODE)$")
_MOST_PASSES = 16
_SHORTEST = 8  # a shorter value of a variable is a word, not a secret

_VALUE = r"""(?:"[^"\n]*"|'[^'\n]*'|["']?[^\s&,;"']+)"""
# Repetitions that something must follow are bounded, so that time grows with the text and not with its square.
_RULES = (
    # An AWS access key id, wherever it stands.
    (re.compile(r"(?<![A-Z0-9])(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}"), HIDDEN),
    # scheme://user:password@host. Keys may hold a slash or an @: up to the last @ of what looks like one word.
    (re.compile(r"://[^\s/?#:@]{0,256}:[^\s\"'<>]{0,1024}@"), f"://{HIDDEN}@"),
    (re.compile(r"://[^\s/?#]{1,1024}@"), f"://{HIDDEN}@"),
    (
        re.compile(r"(?i)\b(bearer|basic|aws4-hmac-sha256)\s{1,4}[^\s\"',;]+(?:[\s,]{1,4}\w{1,64}=[^\s,]+)*"),
        rf"\1 {HIDDEN}",
    ),
    # key=value, key: value, "key": "value"; the query of a presigned URL as well.
    (
        re.compile(
            r"(?i)((?:(?:secret|token|passw(?:or)?d|signature|credential|api_?key|access_?key|account_?key)[\w.-]{0,64}"
            rf"|\bsig|\bauthorization)[\"']?\s{{0,4}}(?:[=:]|%3D)\s{{0,4}}){_VALUE}"
        ),
        rf"\1{HIDDEN}",
    ),
)


def redact(text: str) -> str:
    """The text without what looks like a credential, and without the values of variables that hold one.

    AWS keys, `user:password@` in URLs, `secret=`, `token=`, `X-Amz-Signature=` and their like become ***. Too much goes
    rather than too little. Applying it twice changes nothing more.
    """
    for secret in _known():
        text = text.replace(secret, HIDDEN)
    for _ in range(_MOST_PASSES):  # what one rule leaves may be what another looks for
        before = text
        for pattern, instead in _RULES:
            text = pattern.sub(instead, text)
        if text == before:
            break
    return text


def _known() -> list[str]:
    """Secrets of this process's environment, longest first, also as they stand in a URL."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _SECRET_VARIABLE.search(name.upper()) and not _PATH_VARIABLE.search(name.upper())
    }
    return sorted(values | {quote(value, safe="") for value in values}, key=len, reverse=True)
