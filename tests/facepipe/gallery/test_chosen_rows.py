"""Some rows of a gallery: the same as reading everything, for a few of its bytes."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.gallery import Gallery
from facepipe.gallery.commits.parts import encode_parquet
from facepipe.gallery.parquet_pages import UnsupportedPageError, read_byte_values
from facepipe.reports.faces import read_face_details
from facepipe.schema import FACES, conform

COUNT = 3000
THUMB_BYTES = 2000


def draw_thumbs(count: int, seed: int, nulls: float = 0.1, most: int = 2 * THUMB_BYTES) -> list[bytes | None]:
    rng = np.random.default_rng(seed)
    return [None if rng.random() < nulls else rng.bytes(int(rng.integers(0, most))) for _ in range(count)]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    table = rows(np.arange(COUNT), Faces().draw(np.arange(COUNT), 0), 0)
    at = table.schema.get_field_index("thumb")
    table = table.set_column(at, FACES.field("thumb"), pa.array(draw_thumbs(COUNT, 1), pa.binary()))
    path = str(tmp_path_factory.mktemp("chosen") / "g")
    append(Gallery.create(path, CONTRACT), [table.slice(at, 750) for at in range(0, COUNT, 750)], "first")
    return Gallery(path)


def count_read_bytes() -> int:
    """Count what this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_some_faces_are_those_of_the_whole_table(gallery: Gallery) -> None:
    whole = {row["face_id"]: row for row in gallery.to_arrow(["face_id", "uri", "identity", "thumb"]).to_pylist()}
    ids = np.array(list(whole))[::131]
    found = read_face_details(gallery, np.append(ids, 12345))
    assert set(found) == set(ids.tolist())
    for face_id, face in found.items():
        assert (face.uri, face.identity, face.thumb) == tuple(
            whole[face_id][name] for name in ("uri", "identity", "thumb")
        )


def test_ten_faces_read_few_bytes(gallery: Gallery) -> None:
    ids = gallery.to_arrow(["face_id"])["face_id"].to_numpy()[:: COUNT // 10]
    sizes = [pq.ParquetFile(f"{gallery.faces_folder}/{file['path']}").metadata for file in gallery.files()]
    thumbs = sum(
        one.row_group(group).column(number).total_compressed_size
        for one in sizes
        for group in range(one.num_row_groups)
        for number in range(one.num_columns)
        if one.row_group(group).column(number).path_in_schema == "thumb"
    )
    before = count_read_bytes()
    assert len(read_face_details(gallery, ids)) == len(ids)
    read = count_read_bytes() - before
    # A page for each face, and the other columns of its row group.
    assert read < 0.45 * thumbs
    before = count_read_bytes()
    assert len(read_face_details(gallery, ids[:1])) == 1
    assert count_read_bytes() - before < 0.1 * thumbs


def test_rows_are_found_by_uri(gallery: Gallery) -> None:
    whole = gallery.to_arrow(["uri", "face_index", "thumb"])
    uris = whole["uri"].take(pa.array([5, 700, 2999])).combine_chunks()
    found = pa.concat_tables(gallery.read_chosen_rows("uri", uris, ["face_index", "thumb"]))
    wanted = whole.filter(pc.is_in(whole["uri"], uris)).select(["face_index", "thumb"])
    assert found.to_pylist() == wanted.to_pylist()
    assert not list(gallery.read_chosen_rows("uri", pa.array(["nobody"]), ["uri"]))


# --- pages ------------------------------------------------------------------------------------------------------------


def write(path: Path, thumbs: list[bytes | None], **options: object) -> pq.ColumnChunkMetaData:
    pq.write_table(pa.table({"thumb": pa.array(thumbs, pa.binary())}), path, use_dictionary=False, **options)
    return pq.ParquetFile(path).metadata.row_group(0).column(0)


@given(
    st.integers(0, 10**6),
    st.integers(1, 400),
    st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    st.sampled_from(["zstd", "snappy", "none", "gzip"]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_pages_hold_what_arrow_reads(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, nulls: float, codec: str, has_statistics: bool
) -> None:
    path = tmp_path_factory.mktemp("pages") / "a.parquet"
    thumbs = draw_thumbs(count, seed, nulls, 300)
    column = write(
        path, thumbs, compression=codec, write_statistics=has_statistics, data_page_size=2000, write_batch_size=8
    )
    chosen = np.flatnonzero(np.random.default_rng(seed).random(count) < 0.3)
    with pa.OSFile(str(path)) as file:
        assert read_byte_values(file, column, chosen) == [thumbs[row] for row in chosen]
        assert read_byte_values(file, column, np.arange(count)) == thumbs


def test_long_statistics_are_no_obstacle(tmp_path: Path) -> None:
    """Arrow puts the smallest and the largest value of a page into its header, if they are short enough."""
    thumbs: list[bytes | None] = [bytes([n]) * 1900 for n in range(50)]
    column = write(tmp_path / "a.parquet", thumbs, data_page_size=4000, write_batch_size=2)
    with pa.OSFile(str(tmp_path / "a.parquet")) as file:
        assert read_byte_values(file, column, np.array([0, 31, 49])) == [thumbs[0], thumbs[31], thumbs[49]]


@pytest.mark.parametrize("options", [{"use_dictionary": True}, {"data_page_version": "2.0"}])
def test_what_facepipe_does_not_write_is_left_to_arrow(tmp_path: Path, options: dict[str, object]) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"thumb": pa.array([b"a", b"b"], pa.binary())}), path, **{"use_dictionary": False, **options}
    )
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    with pa.OSFile(str(path)) as file, pytest.raises(UnsupportedPageError):
        read_byte_values(file, column, np.array([1]))


def test_a_gallery_that_another_program_has_written(tmp_path: Path) -> None:
    """Its thumbnails are read with Arrow."""
    table = rows(np.arange(40), Faces().draw(np.arange(40), 0), 0)
    at = table.schema.get_field_index("thumb")
    table = table.set_column(at, FACES.field("thumb"), pa.array(draw_thumbs(40, 2), pa.binary()))
    append(Gallery.create(str(tmp_path / "g"), CONTRACT), [table], "first")
    gallery = Gallery(str(tmp_path / "g"))
    (file,) = gallery.files()
    path = Path(gallery.faces_folder, file["path"])
    pq.write_table(pq.read_table(path), path, data_page_version="2.0")
    ids = table["face_id"].to_numpy()[[3, 17]]
    found = read_face_details(gallery, ids)
    assert [found[face_id].thumb for face_id in ids.tolist()] == table["thumb"].take([3, 17]).to_pylist()


def test_parts_have_small_pages() -> None:
    """A page of thumbnails is at most some two hundred of two kilobytes."""
    table = conform(pa.table({"thumb": pa.array(draw_thumbs(2000, 3, 0.0), pa.binary())}))
    file = pa.BufferReader(encode_parquet(table))
    metadata = pq.ParquetFile(file).metadata.row_group(0)
    chunk = next(
        metadata.column(n) for n in range(metadata.num_columns) if metadata.column(n).path_in_schema == "thumb"
    )
    read = []

    class CountingFile:
        def read_at(self, size: int, offset: int) -> bytes:
            read.append(size)
            return bytes(file.read_at(size, offset))

    assert read_byte_values(CountingFile(), chunk, np.array([1999])) == [table["thumb"][1999].as_py()]  # type: ignore[arg-type]
    assert max(read) < 400_000
    assert sum(read) < 0.12 * chunk.total_compressed_size
