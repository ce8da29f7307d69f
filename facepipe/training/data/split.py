"""Training and held-out parts of a chip set, told by hashes of names: data that is added later moves nothing across."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from facepipe.errors import ConfigError, SourceError
from facepipe.hashing import hash64
from facepipe.storage import read
from facepipe.types import Bool, Int64, UInt64

Rows = tuple[Int64, Int64]
_FEWEST = 2
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class SplitConfig:
    """What is held out for validation; nothing where `validate.pairs` scores on a file and `held_only` is not set.

    by: identities (no person is on both sides), images (of all identities; one whose images are all held out is not
        trained on), or none
    held: share of the identities, two of them at least, or of the images
    names: file with one identity a line; these are held out, whatever `by` and `held` say
    """

    by: Literal["identities", "images", "none"] = "identities"
    held: Annotated[float, Field(ge=0, lt=1)] = 0.05
    names: str = ""


def split_rows(
    labels: Int64,
    config: SplitConfig,
    seed: int = 0,
    identities: Sequence[str] | None = None,
    faces: Int64 | None = None,
) -> Rows:
    """(rows to train on, rows held out), both ascending, of labels (n,) int64.

    identities: what the labels stand for (ChipSet.identities); faces (n,): ids that are hashes (ChipSet.faces). Where
    they are not given, the label's or the row's number stands in, and the split depends on the order of the data.
    Raises ConfigError where nothing would be left to train on.
    """
    labels = np.asarray(labels, np.int64)
    if config.names:
        held = _mark_named(config.names, identities)[labels]
    elif config.by == "none" or not config.held:
        held = np.zeros(len(labels), bool)
    elif config.by == "identities":
        held = _draw_identities(int(labels.max(initial=-1)) + 1, config.held, seed, identities)[labels]
    else:
        held = _draw_images(len(labels), config.held, seed, faces)
    if held.all():
        raise ConfigError("the split leaves nothing to train on: lower split_rows.held, or name fewer identities")
    return np.flatnonzero(~held), np.flatnonzero(held)


def read_names(path: str) -> list[str]:
    """The names of a file with one a line; blank lines do not count."""
    lines = read(path.encode()).decode("utf-8-sig", "replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _mark_named(path: str, identities: Sequence[str] | None) -> Bool:
    if identities is None:
        raise ConfigError("split_rows.names needs data whose identities have names")
    wanted = set(read_names(path))
    absent = sorted(wanted.difference(identities))
    if len(absent) == len(wanted):
        raise SourceError(f"none of the {len(wanted)} names in {path!r} is an identity of the data")
    return np.array([name in wanted for name in identities], bool)


def _draw_identities(count: int, share: float, seed: int, identities: Sequence[str] | None) -> Bool:
    names = (str(n) for n in range(count)) if identities is None else identities
    draws = np.array([hash64(str(seed), name) for name in names], np.uint64)
    held = draws < np.uint64(share * 2.0**64)
    if held.sum() < _FEWEST and count > 2 * _FEWEST:
        held[np.argsort(draws, kind="stable")[:_FEWEST]] = True  # pairs of two persons need two
    return held


def _draw_images(count: int, share: float, seed: int, faces: Int64 | None) -> Bool:
    keys = np.arange(count) if faces is None else np.asarray(faces)
    return _mix_keys(keys.astype(np.uint64), seed) < np.uint64(share * 2.0**64)


def _mix_keys(keys: UInt64, seed: int) -> UInt64:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014) of each key and the seed."""
    with np.errstate(over="ignore"):
        z = keys + np.uint64(hash64("split", str(seed))) * (_MIX | np.uint64(1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
