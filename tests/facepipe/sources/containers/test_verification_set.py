"""Verification sets: images and pairs of every pickle that Python writes, and nothing of what else a pickle can do."""

import contextlib
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from archives import write_verification_set

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.sources.containers.verification_set import list_verification_images, read_verification_set

IMAGES = [b"\xff\xd8" + bytes([n]) * (n * 100) for n in range(8)]
SAME = [True, False, True, False]


@pytest.mark.parametrize("protocol", [1, 3, 4, 5])
def test_images_and_pairs_are_found(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "lfw.bin"
    write_verification_set(path, IMAGES, SAME, protocol)
    with path.open("rb") as file:
        assert read_verification_set(file).same == SAME
    items = list(list_verification_images(str(path)))
    assert [item.uri for item in items] == [f"{path}#{n:06d}" for n in range(8)]
    assert [storage.read(item.path, item.offset, item.length) for item in items] == IMAGES
    assert all(item.identity is None for item in items)


def test_one_image_in_two_pairs_is_two_images(tmp_path: Path) -> None:
    path = tmp_path / "lfw.bin"
    write_verification_set(path, [IMAGES[1], IMAGES[2], IMAGES[1], IMAGES[3]], [True, False], 4)
    items = list(list_verification_images(str(path)))
    assert [storage.read(item.path, item.offset, item.length) for item in items][2] == IMAGES[1]
    assert len({item.uri for item in items}) == 4


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("protocol", range(6))
def test_no_program_in_a_pickle_runs(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "lfw.bin"
    trace = tmp_path / "trace"
    for content in (Trap(trace), ([IMAGES[0], Trap(trace)], [True]), (IMAGES[:2], [Trap(trace)])):
        path.write_bytes(pickle.dumps(content, protocol))
        (item,) = list_verification_images(str(path))
        assert "not a verification set" in str(item.listing_error)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps([]), pickle.dumps((IMAGES, [True])), pickle.dumps((["a"], [True]))]
)
def test_what_is_no_set_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "features.bin"
    path.write_bytes(content)
    (item,) = list_verification_images(str(path))
    assert "not a verification set" in str(item.listing_error)


def test_damage_ends_in_a_message(tmp_path: Path) -> None:
    path = tmp_path / "lfw.bin"
    rng = random.Random(1)
    for protocol in (1, 3, 4):
        write_verification_set(path, IMAGES, SAME, protocol)
        whole = path.read_bytes()
        for turn in range(150):
            damaged = bytearray(whole[: rng.randrange(len(whole))] if turn % 3 == 0 else whole)
            for _ in range(rng.randint(1, 3)):
                if damaged:
                    damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged)
            with path.open("rb") as file, contextlib.suppress(StorageError):
                read_verification_set(file)
