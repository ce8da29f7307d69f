"""Globs as regular expressions."""

import re


def translate_glob(pattern: str) -> str:
    """Translate a glob to a regular expression.

    `*` and `?` stay inside one folder, `**/` spans any number of them.
    """
    # Split the pattern into wildcards, sets in brackets, and single characters.
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL)
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(wildcards.get(token) or _translate_token(token) for token in tokens)


def _translate_token(token: str) -> str:
    """Translate a single character, or a set of characters in brackets."""
    if len(token) < 3:
        return re.escape(token)
    inside = token[1:-1].replace("\\", "\\\\")
    return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
