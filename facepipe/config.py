"""Configuration: frozen dataclasses, filled from TOML files and `section.key=value` settings.

Defaults live in the dataclasses and nowhere else; an unknown key is an error that names the nearest valid one.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from facepipe.errors import ConfigError

T = TypeVar("T")
Tree = dict[str, Any]


def build(kind: type[T], *layers: Tree) -> T:
    """A config of the given dataclass from nested mappings, later ones winning; every key and value is checked."""
    merged: Tree = {}
    for layer in layers:
        _merge(merged, layer)
    _check_keys(kind, merged, "")
    try:
        return TypeAdapter(kind).validate_python(merged)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())
        raise ConfigError("; ".join(problems)) from error


def read_toml(path: str | os.PathLike[str]) -> Tree:
    """The contents of a TOML file."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the config {os.fspath(path)!r}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{os.fspath(path)!r} is not TOML: {error}") from error


def parse_settings(settings: Iterable[str]) -> Tree:
    """`["detect.size=320", "embed.flip=false"]` as a nested mapping; values are TOML, or text where they are not."""
    tree: Tree = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set takes section.key=value, got {setting!r}")
        leaf: Any = _value(value.strip())
        for part in reversed(name.strip().split(".")):
            leaf = {part: leaf}
        _merge(tree, leaf)
    return tree


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(target: Tree, layer: Tree) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = dict(value) if isinstance(value, dict) else value


def _check_keys(kind: Any, tree: Tree, prefix: str) -> None:
    known = {field.name for field in fields(kind) if field.init}
    hints = get_type_hints(kind)
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(f"unknown key {prefix}{key}{_nearest(key, known, prefix)}")
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}{key} is a section, not a value")
            _check_keys(hints[key], value, f"{prefix}{key}.")


def _nearest(key: str, known: set[str], prefix: str) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {prefix}{close[0]}?" if close else f"; valid are {', '.join(sorted(known))}"
