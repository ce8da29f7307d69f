"""What an error says, as one short line."""

import re

from facepipe.storage.redact import redact

# Longest text that an error adds to a line.
_MAX_CHARACTERS = 300
# deltalake puts the cause on the last of several lines that begin with an arrow, in colour.
_ARROW = "↳"
# What object stores and their client say of the commonest mistakes, and what it means.
_KNOWN_CAUSES = (
    (
        "169.254.169.254",  # where machines in a cloud ask for the credentials of their role
        "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_SKIP_SIGNATURE=true for a public bucket",
    ),
    (
        "IMDS disabled",
        "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_SKIP_SIGNATURE=true for a public bucket",
    ),
    ("NoSuchBucket", "there is no such bucket"),
    ("SignatureDoesNotMatch", "the secret key is wrong: AWS_SECRET_ACCESS_KEY"),
    ("InvalidAccessKeyId", "there is no such access key: AWS_ACCESS_KEY_ID"),
    ("AccessDenied", "the credentials do not allow it (AccessDenied)"),
)
_DECORATION = re.compile(rf"\x1b\[[0-9;]*m|{_ARROW}")


def describe_error(error: BaseException) -> str:
    """Describe an error in one short line, without the path (messages name it themselves) and without credentials."""
    if isinstance(error, OSError) and error.strerror:
        return _lower_first_word(error.strerror)
    # Lines without decoration; the first says what failed, and after an arrow the last says why.
    lines = [_DECORATION.sub("", line).strip() for line in redact(str(error)).strip().splitlines()]
    if not lines:
        return type(error).__name__
    for mark, sentence in _KNOWN_CAUSES:
        if mark in str(error):
            return sentence
    text = f"{lines[0]}: {lines[-1]}" if _ARROW in str(error) and len(lines) > 1 else lines[0]
    return text[:_MAX_CHARACTERS]


def _lower_first_word(text: str) -> str:
    """Begin a text with a small letter, unless it begins with an abbreviation. Names in it stay as they are."""
    is_word = len(text) < 2 or not text[1].isupper()
    return text[0].lower() + text[1:] if is_word else text
