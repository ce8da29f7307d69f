"""Remove credentials from text before it is logged or becomes a label."""

import os
import re
from urllib.parse import quote

HIDDEN = "***"

# Names of variables that hold a secret, and endings of those that only say where it is.
_SECRET_VARIABLE = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|ACCOUNT_KEY")
_PATH_VARIABLE = re.compile(r"_(FILE|PATH|DIR|URI|URL|MODE)$")
# Limit of passes if the rules should ever go on replacing.
_MAX_PASSES = 16
_MIN_SECRET_CHARACTERS = 8  # a shorter value of a variable is a word, not a secret

# A value in quotes, or up to the next blank or separator.
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
    """Replace what looks like a credential, and the values of environment variables that hold one, by ***.

    AWS keys, `user:password@` in URLs, `secret=`, `token=`, `X-Amz-Signature=` and similar are replaced. In doubt too
    much is replaced. A second application changes nothing.
    """
    for secret in _read_secrets():
        text = text.replace(secret, HIDDEN)
    # What one rule leaves may be what another looks for.
    for _ in range(_MAX_PASSES):
        before = text
        for pattern, replacement in _RULES:
            text = pattern.sub(replacement, text)
        if text == before:
            break
    return text


def _read_secrets() -> list[str]:
    """Read the secrets of this process's environment, longest first, also as they are quoted in a URL."""
    # The longest goes first, because a shorter secret may be part of it.
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _MIN_SECRET_CHARACTERS
        and _SECRET_VARIABLE.search(name.upper())
        and not _PATH_VARIABLE.search(name.upper())
    }
    return sorted(values | {quote(value, safe="") for value in values}, key=len, reverse=True)
