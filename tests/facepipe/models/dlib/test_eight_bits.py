"""dlib's network in eight bits: near the network it was made of, the same in every batch, and refused where it is wrong."""

from pathlib import Path

import numpy as np
import pytest

import facepipe
from facepipe.errors import ModelError
from facepipe.imaging.decode import decode
from facepipe.imaging.header import read_header
from facepipe.models.dlib import eight_bits
from facepipe.models.dlib.dlib_onnx import build_dlib_onnx, build_dlib_onnx_with_activations
from facepipe.models.dlib.ranges import RANGES
from facepipe.models.embedders.engines import OnnxDlib
from facepipe.models.parity import make_noise_chips, make_scene_chips
from facepipe.models.runtime.onnx_session import open_session
from facepipe.models.zoo.packaged import read_dlib_weights
from facepipe.models.zoo.registry import find_card
from facepipe.stages import Embed
from facepipe.types import Float32, UInt8


@pytest.fixture(scope="module")
def vnni() -> None:
    if not eight_bits.has_exact_products():
        pytest.skip("this CPU has no VNNI, so the network in eight bits is refused")


@pytest.fixture(scope="module")
def engine(vnni: None) -> OnnxDlib:
    loaded = find_card("dlib-resnet-int8", "embedder").load("cpu", 1)
    assert isinstance(loaded, OnnxDlib)
    return loaded


def unit(vectors: Float32) -> Float32:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def test_a_vector_does_not_depend_on_its_batch(engine: OnnxDlib) -> None:
    chips = np.concatenate([make_scene_chips((150, 150)), make_noise_chips((150, 150))])
    together = engine.embed(chips)
    order = np.random.default_rng(0).permutation(len(chips))
    assert np.array_equal(engine.embed(chips[order]), together[order])
    assert np.array_equal(np.concatenate([engine.embed(chip[None]) for chip in chips]), together)


def test_faces_are_where_the_network_in_floating_point_has_them(vnni: None, photos: Path) -> None:
    images = [decode(data, read_header(data)) for data in map(Path.read_bytes, sorted(photos.glob("img*.jpg"))[:12])]
    whole, rounded = (facepipe.encode(images, embed=Embed(name)) for name in ("dlib-resnet", "dlib-resnet-int8"))
    pairs = [
        (a, b) for one, other in zip(whole, rounded, strict=True) for a, b in zip(one.faces, other.faces, strict=True)
    ]
    apart = [float(np.linalg.norm(a.embedding - b.embedding)) for a, b in pairs]
    assert len(apart) >= 12
    assert 0.002 < np.median(apart) < 0.04
    assert max(apart) < 0.08


def test_a_cpu_whose_products_saturate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do on x86 without VNNI: sums of two products are cut off at 16 bits, and vectors come out wrong."""

    def cut_off(self: OnnxDlib, chips: UInt8) -> Float32:
        right = embed(self, chips)
        return np.clip(right, -np.abs(right).max() / 4, np.abs(right).max() / 4)

    embed = OnnxDlib.embed
    monkeypatch.setattr(eight_bits, "has_exact_products", lambda: True)
    monkeypatch.setattr(OnnxDlib, "embed", cut_off)
    with pytest.raises(ModelError, match=r"saturation.*dlib-resnet"):
        eight_bits.load_int8_dlib(*read_dlib_weights(), 1)


@pytest.mark.parametrize(
    ("flags", "exact"),
    [("fpu avx avx2", False), ("fpu avx2 avx512f", False), ("avx2 avx_vnni", True), ("avx512f avx512_vnni", True)],
)
def test_an_x86_cpu_without_vnni_is_refused(
    flags: str, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert eight_bits.has_exact_products(cpuinfo) == exact
    assert eight_bits.has_exact_products(tmp_path / "none"), "unknown: the check with pictures decides"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert eight_bits.has_exact_products(cpuinfo)
    monkeypatch.setattr(eight_bits, "has_exact_products", lambda: False)
    with pytest.raises(ModelError, match=r"saturation.*dlib-resnet"):
        eight_bits.load_int8_dlib(*read_dlib_weights(), 1)


def test_ranges_are_those_of_the_activations_in_their_order() -> None:
    made, names = build_dlib_onnx_with_activations(*read_dlib_weights())
    assert len(names) == len(RANGES)
    values = open_session(made, threads=1).run(names, {"chips": make_scene_chips((150, 150), 2)})
    for (low, high), found in zip(RANGES, values, strict=True):
        assert (low == 0) == (found.min() >= 0)
        assert 0.2 * high < found.max() < 5 * high


def test_more_bits_of_range_are_worse() -> None:
    """What the ranges are for: eight times as wide, the same graph rounds eight times as coarsely."""
    chips, weights = make_scene_chips((150, 150), 8), read_dlib_weights()
    exact = unit(OnnxDlib(build_dlib_onnx(*weights)).embed(chips))
    wide = [(8 * low, 8 * high) for low, high in RANGES]
    near, far = (
        np.linalg.norm(unit(OnnxDlib(build_dlib_onnx(*weights, r)).embed(chips)) - exact, axis=1).mean()
        for r in (RANGES, wide)
    )
    assert near * 2 < far


def test_its_contract_is_not_that_of_the_network_in_floating_point() -> None:
    one, other = find_card("dlib-resnet", "embedder"), find_card("dlib-resnet-int8", "embedder")
    assert one.sha256 != other.sha256
    assert one.layout == other.layout
