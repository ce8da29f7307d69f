"""The training and held-out parts of a chip set. Hashes of names decide, so data added later moves nothing across."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from facepipe.errors import ConfigError, SourceError
from facepipe.hashing import hash64
from facepipe.sources.labels import format_label
from facepipe.storage import read
from facepipe.types import Bool, Int64, UInt64

_MIN_HELD = 2  # identities: pairs of two persons need two
# An odd constant of the hash: the golden ratio in 64 bits.
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class SplitConfig:
    """Configure what is held out for validation.

    Nothing is held out if `validate.pairs` scores on a file and `held_only` is not set.

    Attributes:
        by: what to hold out: identities (no person is on both sides), images (of all identities; an identity whose
            images are all held out is not trained on), or none.
        held: share of the identities, at least two of them, or of the images.
        names: file with one identity per line; these are held out, whatever `by` and `held` are.
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
) -> tuple[Int64, Int64]:
    """Split rows into those to train on and those held out.

    Args:
        labels: label of each row, (n,) int64.
        config: what to hold out.
        seed: random seed.
        identities: names of the labels (ChipSet.identities). Without them the numbers of labels are used, and the
            split depends on the order of the data.
        faces: ids that are hashes (ChipSet.face_ids), (n,). Without them the numbers of rows are used.

    Returns:
        The rows to train on and the rows held out, both ascending.

    Raises:
        ConfigError: Nothing would be left to train on.
    """
    labels = np.asarray(labels, np.int64)
    # The mark of an identity becomes that of its rows.
    if config.names:
        held = _mark_named(config.names, identities)[labels]
    elif config.by == "none" or not config.held:
        held = np.zeros(len(labels), bool)
    elif config.by == "identities":
        held = _draw_identities(int(labels.max(initial=-1)) + 1, config.held, seed, identities)[labels]
    else:
        held = _draw_images(len(labels), config.held, seed, faces)
    if held.all():
        raise ConfigError("the split leaves nothing to train on: lower split.held, or list fewer identities")
    return np.flatnonzero(~held), np.flatnonzero(held)


def read_names(path: str) -> list[str]:
    """Read the names of a file with one per line. Blank lines are skipped."""
    text = read(path).decode("utf-8-sig", "surrogateescape")
    # Other separators that `splitlines` knows may be part of a name.
    lines = re.split(r"[\r\n]", text)
    return [label for line in lines if (label := format_label(line))]


def _mark_named(path: str, identities: Sequence[str] | None) -> Bool:
    """Mark the identities that a file names."""
    if identities is None:
        raise ConfigError("split.names needs data whose identities have names: remove it")
    # Some names may be absent, but if all are the file belongs to other data.
    names = set(read_names(path))
    # Chip sets of older versions may hold names in another normal form.
    normal = [format_label(name) or name for name in identities]
    absent = names.difference(normal)
    if len(absent) == len(names):
        raise SourceError(f"none of the {len(names)} names in {path!r} is an identity of the data")
    return np.array([name in names for name in normal], bool)


def _draw_identities(count: int, share: float, seed: int, identities: Sequence[str] | None) -> Bool:
    """Mark the identities to hold out: about a share of them, at least two."""
    names = (str(n) for n in range(count)) if identities is None else identities
    # A hash of seed and name draws each identity by itself, whatever other data is there.
    draws = np.array([hash64(str(seed), name) for name in names], np.uint64)
    held = draws < np.uint64(share * 2.0**64)
    # If the share is too small, the identities with the lowest hashes are held out.
    if held.sum() < _MIN_HELD and count > 2 * _MIN_HELD:
        held[np.argsort(draws, kind="stable")[:_MIN_HELD]] = True
    return held


def _draw_images(count: int, share: float, seed: int, faces: Int64 | None) -> Bool:
    """Mark the rows to hold out: about a share of them."""
    # Face ids are hashes themselves, but of the data alone: mixing brings the seed in.
    keys = np.arange(count) if faces is None else np.asarray(faces)
    return _mix_keys(keys.astype(np.uint64), seed) < np.uint64(share * 2.0**64)


def _mix_keys(keys: UInt64, seed: int) -> UInt64:
    """Hash each key with the seed, by the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = keys + np.uint64(hash64("split", str(seed))) * (_MIX | np.uint64(1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
