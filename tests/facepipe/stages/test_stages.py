"""The stages on real photos: what they find does not depend on the scale at which an image was decoded."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import facepipe
from facepipe.arrow import pack_arrays, to_float_lists, to_ragged_lists, to_vectors, view_buffers, view_images
from facepipe.errors import ConfigError, ModelError
from facepipe.imaging.decode import decode
from facepipe.imaging.geometry import locate_frame
from facepipe.imaging.header import read_header
from facepipe.models.fakes import FakeEmbedder
from facepipe.schema import FACES, WORK_ITEM, conform
from facepipe.stages import Align, Chain, Decode, Detect, Embed, Read, Stage, check_chain
from facepipe.stages.read import ParquetCursor


def chain(working_side: int = 640, batch: int = 16) -> Chain:
    stages = (Read(), Decode(working_side=working_side), Detect(), Align(), Embed())
    return Chain(stages, batch)


def table(paths: list[Path]) -> pa.Table:
    return pa.Table.from_pylist([{"uri": p.name, "path": str(p).encode()} for p in paths], schema=WORK_ITEM)


def test_every_stage_is_a_frozen_config_that_names_its_columns() -> None:
    stages = [Read(), Decode(), Detect(), Align(), Embed()]
    check_chain(stages, WORK_ITEM.names)
    typed: list[Stage] = [*stages]
    for stage in typed:
        with pytest.raises(AttributeError):
            stage.anything = 1  # type: ignore[attr-defined]


def test_stages_keep_their_word(portrait: Path) -> None:
    found = table([portrait])
    for stage in chain().stages:
        before = set(found.column_names)
        stage.setup()
        found = stage(found)
        assert set(stage.adds) <= set(found.column_names)
        assert not set(found.column_names) - before - set(stage.adds)
    # The others are not a matter of one stage: whoever runs the stages adds them.
    others = {"source", "ingested_at", "missing_since", "former_uris", "failed_with"}
    missing = set(FACES.names) - set(found.column_names) - others
    assert not missing
    assert conform(found).schema == FACES


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("flip", [True, False])
def test_vectors_without_a_direction_are_no_rows(broken: float, flip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is fed the wrong way is an error, and not a gallery of nonsense."""
    chips = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    rows = {"uri": list("abc"), "image_id": list("abc"), "face_index": [0] * 3, "chip": pack_arrays([*chips])}
    embed = Embed("fake-embedder", flip)
    assert embed(pa.table(rows))["embedding"].null_count == 0
    right = FakeEmbedder.embed

    def last_broken(self: FakeEmbedder, given: np.ndarray) -> np.ndarray:
        wrong = (given[:, None] == np.stack([chips[2], chips[2][:, ::-1]])).all((2, 3, 4)).any(1)
        return np.where(wrong[:, None], np.float32(broken), right(self, given))

    monkeypatch.setattr(FakeEmbedder, "embed", last_broken)
    with pytest.raises(ModelError, match="fake-embedder gives vectors that are zero or not finite"):
        embed(pa.table(rows))


def test_reduced_decoding_moves_embeddings_little(photos: Path) -> None:
    """DCT-scaled decoding against full decoding: the same faces, and vectors that differ by far less than people do."""
    paths = [photos / f"{name}.jpg" for name in ("img4", "img54", "couple", "img67", "img2", "img31")]
    reduced, full = chain(640)(table(paths)), chain(1 << 20)(table(paths))
    assert reduced["uri"].equals(full["uri"])
    apart = np.linalg.norm(to_vectors(reduced["embedding"], 128) - to_vectors(full["embedding"], 128), axis=1)
    sharp = np.array(full["sharpness"].to_pylist()) > 50
    assert sharp.sum() >= 7
    assert np.median(apart[sharp]) < 0.06
    assert apart[sharp].max() < 0.15, "two people are 0.41 apart and more"


def test_a_small_face_in_a_large_photo_is_cut_from_the_full_image(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without decoding again its chip would be enlarged from a few pixels, and blurred."""
    data = (photos / "img2.jpg").read_bytes()
    photo = decode(data, read_header(data))
    canvas = np.full((3000, 4200, 3), 128, np.uint8)
    canvas[800 : 800 + photo.shape[0], 900 : 900 + photo.shape[1]] = photo
    out = io.BytesIO()
    Image.fromarray(canvas).save(out, "JPEG", quality=95)
    path_columns = {"uri": "x", "path": b"x"}
    item = pa.Table.from_pylist([path_columns], schema=WORK_ITEM)
    monkeypatch.setattr("facepipe.storage.read", lambda *_: out.getvalue())
    found = chain()(item)
    (sharp,) = found["sharpness"].to_pylist()
    monkeypatch.setattr("facepipe.stages.align.decode_larger", lambda data, wanted, view: view)
    blurred = chain()(item)["sharpness"].to_pylist()[0]
    assert sharp > 1.2 * blurred
    assert found["width"].to_pylist() == [4200]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_reduced_decoding_keeps_places_where_sides_do_not_divide(reduce: int, orientation: int) -> None:
    """A reduced JPEG is rounded up to whole pixels; scaling by its size would shift what lies at its far edges."""
    canvas = np.zeros((601, 1005, 3), np.uint8)
    canvas[520:560, 900:980] = 255
    canvas[40:80, 20:60] = 255
    out, exif = io.BytesIO(), Image.Exif()
    exif[274] = orientation
    Image.fromarray(canvas).save(out, "JPEG", quality=97, exif=exif)
    header = read_header(out.getvalue())

    def centres(pixels: np.ndarray) -> np.ndarray:
        light = pixels[..., 0].astype(float)
        halves = np.zeros((2, *light.shape))
        halves[0, :, : light.shape[1] // 2] = light[:, : light.shape[1] // 2]
        halves[1] = light - halves[0]
        y, x = np.mgrid[0 : light.shape[0], 0 : light.shape[1]]
        return np.array([[(h * x).sum() / h.sum(), (h * y).sum() / h.sum()] for h in halves])

    full = centres(decode(out.getvalue(), header))
    frame = locate_frame(header, reduce)
    small = centres(decode(out.getvalue(), header, reduce))
    assert np.abs(frame.to_full(small) - full).max() < 0.25
    assert np.allclose(frame.from_full(frame.to_full(small)), small, atol=1e-3)


def test_mirror_images_have_mirrored_figures(photos: Path) -> None:
    data = (photos / "img6.jpg").read_bytes()
    image = decode(data, read_header(data))
    result, mirrored = facepipe.encode([image, np.ascontiguousarray(image[:, ::-1])])
    a, b = result.faces[0], mirrored.faces[0]
    assert a.yaw == pytest.approx(-b.yaw, abs=4)
    assert a.roll == pytest.approx(-b.roll, abs=2)
    assert np.linalg.norm(a.embedding - b.embedding) < 0.1, "the flip is averaged in"


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_turned_photos_give_the_same_face(portrait: Path, orientation: int, tmp_path: Path) -> None:
    image = Image.open(portrait).convert("RGB")
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "plain.png")
    image.transpose(turn).save(tmp_path / "turned.png", exif=exif)
    plain, turned = facepipe.encode([tmp_path / "plain.png", tmp_path / "turned.png"])
    assert np.abs(plain.faces[0].embedding - turned.faces[0].embedding).max() < 1e-5


def test_encode_takes_paths_and_arrays_in_one_list(portrait: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    data = portrait.read_bytes()
    array = decode(data, read_header(data))
    found = facepipe.encode([portrait, array, tmp_path / "broken.jpg", str(tmp_path / "none.jpg"), array * 0])
    assert [r.status for r in found] == ["ok", "ok", "decode_error", "read_error", "no_face"]
    assert [len(r.faces) for r in found] == [1, 1, 0, 0, 0]
    assert found[3].error == "no such file or directory"
    face = found[0].faces[0]
    assert face.embedding.shape == (128,)
    assert np.linalg.norm(face.embedding) == pytest.approx(1, abs=1e-5)
    assert np.abs(face.embedding - found[1].faces[0].embedding).max() < 1e-5
    assert facepipe.encode([]) == []
    for wrong in (array.astype(float), array[..., 0], np.empty((0, 5, 3), np.uint8)):
        with pytest.raises(ConfigError, match="uint8 RGB"):
            facepipe.encode([wrong])


def test_faces_of_a_mirrored_border_are_not_reported(portrait: Path) -> None:
    data = portrait.read_bytes()
    image = decode(data, read_header(data))
    (whole,) = facepipe.encode([image])
    x1, y1, x2, y2 = whole.faces[0].box.astype(int)
    tight = np.ascontiguousarray(image[y1:y2, x1:x2])  # the face touches every side
    (found,) = facepipe.encode([tight])
    h, w = tight.shape[:2]
    assert len(found.faces) == 1
    centre = found.faces[0].box.reshape(2, 2).mean(0)
    assert 0 <= centre[0] <= w
    assert 0 <= centre[1] <= h


@pytest.mark.parametrize("group", [7, 40, 1000])
def test_parquet_rows_are_read_on_and_not_from_the_start_again(
    group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [None if n == 50 else bytes([n]) * 3 for n in range(200)]
    pq.write_table(pa.table({"bytes": pa.array(data, pa.binary())}), tmp_path / "t.parquet", row_group_size=group)
    seeks: list[int] = []
    original = ParquetCursor._seek
    monkeypatch.setattr(ParquetCursor, "_seek", lambda self, row: (seeks.append(row), original(self, row))[1])
    cursor = ParquetCursor(str(tmp_path / "t.parquet").encode())
    for at in range(5, 190, 11):  # neither the block nor its parts begin where the file's batches do
        rows = list(range(at, at + 11))
        assert cursor.read(rows) == {n: data[n] for n in rows if data[n] is not None}
    assert len(seeks) <= 2, "one to open, and one where the first rows lie in a later group"
    assert cursor.read([3, 199]) == {3: data[3], 199: data[199]}
    cursor.close()


def test_columns_round_trip() -> None:
    arrays = [np.arange(n * 3 * 3, dtype=np.uint8).reshape(n, 3, 3) for n in (1, 2, 4)]
    column = pack_arrays([arrays[0], None, arrays[1], b"abc", arrays[2]])
    views = list(view_buffers(column))
    assert views[1] is None
    assert bytes(views[3] or b"") == b"abc"
    assert np.shares_memory(np.frombuffer(views[0] or b"", np.uint8), arrays[0]), "nothing is copied"
    t = pa.table({"pixels": pack_arrays([arrays[2], None]), "pixels_height": [4, None], "pixels_width": [3, None]})
    first, second = view_images(t)
    assert np.array_equal(first, arrays[2])  # type: ignore[arg-type]
    assert second is None
    lists = to_float_lists(np.eye(2, 3, dtype=np.float32), np.array([True, False, True]))
    assert lists.to_pylist() == [[1, 0, 0], None, [0, 1, 0]]
    assert to_ragged_lists([np.ones(2, np.float32), np.empty((0, 4), np.float32)]).to_pylist() == [[1, 1], []]
