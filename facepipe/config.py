"""Configuration: frozen dataclasses, filled from TOML files and `section.key=value` settings.

Defaults are in the dataclasses and nowhere else. An unknown key is an error that names the nearest valid one.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from facepipe.errors import ConfigError
from facepipe.storage.error_text import describe_error
from facepipe.storage.redact import HIDDEN, redact

T = TypeVar("T")
Tree = dict[str, Any]
"""Nested mappings, as TOML gives them."""

_SECRET_KEY = re.compile(r"(?i)secret|token|passw|signature|credential|(?:api|access|account)_?key")


def build(kind: type[T], *layers: Tree) -> T:
    """Build a config from nested mappings.

    Args:
        kind: the dataclass of the config.
        layers: nested mappings; later ones win.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type.
    """
    merged: Tree = {}
    for layer in layers:
        _merge(merged, layer)
    _check_keys(kind, merged, "")
    try:
        return TypeAdapter(kind).validate_python(merged)
    except ValidationError as error:
        problems = (
            f"{_format_place(problem['loc'])}: {problem['msg']}, got {_format_value(problem['input'])}"
            for problem in error.errors()
        )
        # pydantic's own message would repeat the values, credentials among them.
        raise ConfigError("; ".join(problems)) from None


def _format_place(place: tuple[int | str, ...]) -> str:
    """Format where a value is. Sections of a list count from 1, as people count them in a file."""
    text = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def read_toml(path: str | os.PathLike[str]) -> Tree:
    """Read a TOML file."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the config {os.fspath(path)!r}: {describe_error(error)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{os.fspath(path)!r} is not TOML: {error}") from error


def resolve_paths(
    tree: Tree, folder: str, keys: Iterable[str], is_path: Callable[[str], bool] = lambda value: True
) -> list[str]:
    """Make relative paths of a config relative to its own folder, so that it means the same from anywhere.

    Before, they were relative to the working folder. A path that is there and not beside the config keeps this
    meaning.

    Args:
        tree: the config, which is changed.
        folder: folder of its file.
        keys: keys of paths, such as `source.uri`; sections of a list count all. URLs and absolute paths stay.
        is_path: says of a value whether it is a path; by default all are.

    Returns:
        Sentences for the user, one per path that is relative to the working folder.
    """
    notes: list[str] = []
    for key in keys:
        *sections, name = key.split(".")
        for section in _find_sections(tree, sections):
            values = section.get(name)
            resolved = []
            for value in values if isinstance(values, list) else [values]:
                path, is_elsewhere = _resolve_path(value, folder, is_path)
                resolved.append(path)
                if is_elsewhere:
                    notes.append(
                        f"{key}={value!r} is in the working folder; paths in a config are relative to its folder"
                    )
            if name in section:
                section[name] = resolved if isinstance(values, list) else resolved[0]
    return notes


def _resolve_path(value: Any, folder: str, is_path: Callable[[str], bool]) -> tuple[Any, bool]:
    """Make a relative path relative to a folder.

    Returns:
        The path, or the value if it is none; and whether it is in the working folder instead.
    """
    if not isinstance(value, str) or not value or "://" in value or os.path.isabs(value) or not is_path(value):
        return value, False
    beside = os.path.join(os.path.abspath(folder), value)
    if _has_start(value) and not _has_start(beside):
        return value, True
    return beside, False


def _find_sections(tree: Tree, path: list[str]) -> list[Tree]:
    """Find the sections at a path: several if one of them is a list."""
    found: list[Any] = [tree]
    for name in path:
        inner = [section.get(name) for section in found]
        found = [item for value in inner for item in (value if isinstance(value, list) else [value])]
        found = [section for section in found if isinstance(section, dict)]
    return found


def _has_start(path: str) -> bool:
    """Tell whether a path leads to something; of a pattern only the part before its first special character counts."""
    match = re.search(r"[*?\[]", path)
    start = path[: match.start()].rpartition("/")[0] if match else path
    return os.path.lexists(start or ".")


def parse_settings(settings: Iterable[str]) -> Tree:
    """Parse settings such as `["detect.size=320", "embed.flip=false"]` to a nested mapping.

    Values are TOML. What is not TOML is text.
    """
    tree: Tree = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set takes section.key=value, got {redact(repr(setting))}")
        leaf: Any = _parse_value(value.strip())
        for part in reversed(name.strip().split(".")):
            leaf = {part: leaf}
        _merge(tree, leaf)
    return tree


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _format_value(value: Any) -> str:
    """Format a value for an error message, with credentials redacted."""
    return redact(repr(_hide_secrets(value)))


def _hide_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: HIDDEN if _SECRET_KEY.search(str(key)) else _hide_secrets(item) for key, item in value.items()}
    return [_hide_secrets(item) for item in value] if isinstance(value, list) else value


def _merge(target: Tree, layer: Tree) -> None:
    for key, value in layer.items():
        is_list = isinstance(target.get(key), list) and any(isinstance(item, dict) for item in target[key])
        if is_list and isinstance(value, dict):
            raise ConfigError(f"there are several {key}s: change [[{key}]] in the TOML file, not one setting for all")
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = dict(value) if isinstance(value, dict) else value


def _check_keys(kind: Any, tree: Tree, prefix: str) -> None:
    """Raise ConfigError for a key that the dataclass does not have, or a value where it has a section."""
    known = {field.name for field in fields(kind) if field.init}
    hints = get_type_hints(kind)
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(f"unknown key {prefix}{key}{_suggest_key(key, known, prefix)}")
        if _is_list_of_sections(hints[key]):
            # One section, written with single brackets, is a list of one.
            if isinstance(value, dict):
                value = tree[key] = [value]
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                raise ConfigError(f"{prefix}{key} is a list of sections: write [[{prefix}{key}]]")
            for n, item in enumerate(value, start=1):
                _check_keys(get_args(hints[key])[0], item, f"{prefix}{key}[{n}].")
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}{key} is a section, not a value")
            _check_keys(hints[key], value, f"{prefix}{key}.")


def _is_list_of_sections(hint: Any) -> bool:
    return get_origin(hint) is tuple and is_dataclass(get_args(hint)[0])


def _suggest_key(key: str, known: set[str], prefix: str) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {prefix}{close[0]}?" if close else f"; valid are {', '.join(sorted(known))}"
