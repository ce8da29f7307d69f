"""Near hashes by blocks of bits are those that comparing all with all finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.curation.duplicates.hashes import MAX_BITS, HashLookup, is_telling, make_variants
from facepipe.imaging.perceptual import count_differing_bits, match_hashes


def draw_hashes(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(-(1 << 63), 1 << 63, count, np.int64)


def flip_bits(hashes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    flipped = hashes.copy()
    for n in range(len(hashes)):
        for bit in rng.choice(64, count, replace=False):
            flipped[n] ^= np.int64(-(1 << 63)) if bit == 63 else np.int64(1 << int(bit))
    return flipped


@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_it_finds_what_comparing_all_finds(seed: int, count: int, queries: int) -> None:
    rng = np.random.default_rng(seed)
    hashes = np.unique(draw_hashes(rng, count))
    near = [flip_bits(hashes[: queries // 4], bits, rng) for bits in range(4)]
    wanted = np.concatenate([*near, draw_hashes(rng, queries)])
    found = HashLookup(hashes).find(wanted)
    bits = count_differing_bits(wanted[:, None], hashes[None])
    assert list(zip(found.query, found.other, strict=True)) == list(zip(*np.nonzero(bits <= MAX_BITS), strict=True))


def test_every_variant_matches_its_picture() -> None:
    hashes = draw_hashes(np.random.default_rng(1), 200)
    for variant in make_variants(hashes):
        assert (match_hashes(hashes, variant).bits == 0).all()


@pytest.mark.parametrize("value", [0, -1, 1 << 40, 255])
def test_plain_pictures_tell_nothing(value: int) -> None:
    assert not is_telling(np.array([value])).any()
    assert is_telling(draw_hashes(np.random.default_rng(2), 1000)).all()
