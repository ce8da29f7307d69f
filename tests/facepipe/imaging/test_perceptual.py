"""The perceptual hash: steady under what happens to copies, its mirror known beforehand, cheap."""

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from helpers import embed, measure_peak_bytes, rows

from facepipe.imaging.perceptual import (
    QUARTER_TURNS,
    compute_perceptual_hash,
    count_differing_bits,
    get_known_bits,
    match_hashes,
    mirror_hashes,
    turn_hashes,
)
from facepipe.schema import WORK_ITEM
from facepipe.stages import Decode, Read


def scene(seed: int, width: int = 400, height: int = 300) -> np.ndarray:
    """Smooth blobs: the spectrum of a photo, without one."""
    noise = np.random.default_rng(seed).normal(size=(9, 11, 3)).astype(np.float32)
    blobs = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 50 * blobs, 0, 255).astype(np.uint8)


def bits(a: int, b: int) -> int:
    return int(count_differing_bits(np.array([a]), np.array([b]))[0])


@pytest.mark.parametrize("seed", range(8))
def test_copies_agree_and_others_do_not(seed: int) -> None:
    image = scene(seed)
    own = compute_perceptual_hash(image)
    assert -(1 << 63) <= own < 1 << 63
    jpeg = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], cv2.IMREAD_COLOR)
    copies = {
        "smaller": cv2.resize(image, (161, 120), interpolation=cv2.INTER_AREA),
        "larger": cv2.resize(image, (1600, 1200), interpolation=cv2.INTER_CUBIC),
        "recompressed": jpeg,
        "brighter": np.clip(image.astype(float) * 1.1 + 8, 0, 255).astype(np.uint8),
    }
    for what, copy in copies.items():
        assert bits(own, compute_perceptual_hash(np.asarray(copy, np.uint8))) <= 5, what
    assert bits(own, compute_perceptual_hash(scene(seed + 100))) > 14


@pytest.mark.parametrize("seed", range(8))
def test_the_mirror_images_hash_is_known(seed: int) -> None:
    image = scene(seed, 640, 417)
    seen = compute_perceptual_hash(np.ascontiguousarray(image[:, ::-1]))
    follows = mirror_hashes(np.array([compute_perceptual_hash(image)]))
    assert bits(int(follows[0]), seen) <= 2
    hashes = np.random.default_rng(seed).integers(-(1 << 63), 1 << 63, 50, np.int64)
    assert np.array_equal(mirror_hashes(mirror_hashes(hashes)), hashes)
    assert (
        count_differing_bits(hashes, mirror_hashes(hashes)) == bits(0, int(mirror_hashes(np.zeros(1, np.int64))[0]))
    ).all()


@pytest.mark.parametrize("degrees", QUARTER_TURNS)
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_the_hash_of_a_turned_image_is_known(degrees: int, is_mirrored: bool) -> None:
    for seed in range(6):
        image = scene(seed, 640, 417)
        first = image[:, ::-1] if is_mirrored else image
        turned = np.ascontiguousarray(np.rot90(first, -degrees // 90))
        own = np.array([compute_perceptual_hash(image)])
        other = np.array([compute_perceptual_hash(turned)])
        match = match_hashes(own, other)
        assert match.bits[0] <= 2
        assert (match.turn[0], match.is_mirrored[0]) == (degrees, is_mirrored)
    strangers = [np.array([compute_perceptual_hash(scene(seed))]) for seed in (1, 2)]
    assert match_hashes(*strangers).bits[0] > 10


def test_four_quarters_are_none() -> None:
    hashes = np.random.default_rng(0).integers(-(1 << 63), 1 << 63, 100, np.int64)
    known = get_known_bits(90)
    quarter = turn_hashes(hashes, 90)
    half = turn_hashes(hashes, 180)
    assert np.array_equal(turn_hashes(half, 180), hashes)
    assert np.array_equal(turn_hashes(hashes, 0), hashes)
    assert np.array_equal(turn_hashes(quarter, 270) & known, hashes & known)
    assert np.array_equal(turn_hashes(quarter, 90) & known, half & known)


def test_distances_count_all_bits_of_signed_numbers() -> None:
    a = np.array([0, -1, -1, 1 << 62, -(1 << 63)])
    assert count_differing_bits(a, np.zeros(5, np.int64)).tolist() == [0, 64, 64, 1, 1]
    assert count_differing_bits(a, a).tolist() == [0] * 5


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (31, 33), (257, 2)])
def test_any_shape_has_a_hash(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (*shape, 3)).astype(np.uint8)
    assert compute_perceptual_hash(pixels) == compute_perceptual_hash(pixels.copy())
    assert compute_perceptual_hash(np.full((*shape, 3), 77, np.uint8)) == 0


@pytest.mark.parametrize("size", [(640, 480), (1279, 960), (4000, 3000)])
def test_its_cost_does_not_grow_with_the_image(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large image 256 x 256 pixels are sampled. Averaging all of 12 megapixels would take twenty times as long."""
    resize = cv2.resize
    whole_images: list[int] = []

    def counted(image: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
        if image.shape[0] * image.shape[1] > 256 * 256:
            whole_images.append(interpolation)
        return resize(image, size, interpolation=interpolation)

    monkeypatch.setattr(cv2, "resize", counted)
    pixels = scene(0, *size)
    _, peak = measure_peak_bytes(lambda: compute_perceptual_hash(pixels))
    assert whole_images == [cv2.INTER_LINEAR], "it reads four pixels for each that it gives"
    assert peak < 400_000, "256 x 256 pixels of three colours, and of grey"


def test_every_decoded_image_has_one(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), scene(1))
    cv2.imwrite(str(tmp_path / "large.jpg"), scene(1, 2600, 1950))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    paths = sorted(tmp_path.iterdir())
    items = pa.Table.from_pylist([{"uri": p.name, "path": str(p).encode()} for p in paths], schema=WORK_ITEM)
    found = Decode()(Read()(items))["image_hash"].to_pylist()
    assert found[1] is None
    assert bits(found[0], found[2]) <= 2, "decoded at a half"


def test_it_does_not_depend_on_the_batch(drawings: Path, fakes: dict[str, dict[str, object]], tmp_path: Path) -> None:
    embed(drawings, tmp_path / "a", fakes, batch=1)
    embed(drawings, tmp_path / "b", fakes, batch=13)
    one, other = ([(row["uri"], row["image_hash"]) for row in rows(tmp_path / g)] for g in ("a", "b"))
    assert one == other
    assert all(value is not None for _, value in one), "images without a face as well"
