"""embed: what comes out does not depend on how it is run; bad input is a row; nothing is lost or counted twice."""

import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw
from helpers import embed, rows, same_faces

from facepipe.errors import ConfigError, ContractError, GalleryBusyError, GalleryError, ModelError, SourceError
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.imaging.alignment import ARCFACE_112
from facepipe.imaging.geometry import fit_similarity, warp_chip
from facepipe.sources import SourceConfig, open_source
from facepipe.sources.blocks import Block, BlockSize, compute_digest, cut_blocks, decode_block, encode_block
from facepipe.sources.item import WorkItem
from facepipe.sources.screening import Screening
from facepipe.stages import Decode, Detect, check_chain
from facepipe.storage.lease import hold_lease
from pipelines.embed import RunConfig
from pipelines.embed.pipeline import _choose_runner
from pipelines.runtime.plan import Resources, make_plan

Settings = dict[str, Any]


def test_rows_of_a_run(drawings: Path, fakes: Settings, tmp_path: Path) -> None:
    summary = embed(drawings, tmp_path / "g", fakes)
    assert (summary.images, summary.listed, summary.faces) == (60, 60, 60)
    assert summary.statuses == {"ok": 40, "no_face": 20}
    found = rows(tmp_path / "g")
    assert len(found) == 80
    faces = [row for row in found if row["face_id"] is not None]
    assert len({row["face_id"] for row in faces}) == 60
    assert {row["identity"] for row in found} == {"person0", "person1", "person2"}
    assert all(row["thumb"][:2] == b"\xff\xd8" and row["source"] == drawings.name for row in faces)
    two = [row for row in found if Path(row["uri"]).name == "p2_002.png"]
    assert [row["face_index"] for row in two] == [0, 1]
    assert two[0]["det_score"] >= two[1]["det_score"]
    assert all(row["width"] == 96 + n % 7 for row in two for n in [2])
    assert verify_gallery(Gallery(str(tmp_path / "g"))).problems == []


def test_a_second_run_reads_nothing(drawings: Path, fakes: Settings, tmp_path: Path) -> None:
    first = embed(drawings, tmp_path / "g", fakes)
    again = embed(drawings, tmp_path / "g", fakes)
    assert (again.images, again.rows, again.skipped, again.version) == (0, 0, 60, first.version)
    assert not again.stage_seconds


def test_only_what_is_new_or_changed_is_read(drawings: Path, fakes: Settings, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(drawings, corpus)
    embed(corpus, tmp_path / "g", fakes)
    cv2.imwrite(str(corpus / "person0" / "new.png"), draw(101))
    cv2.imwrite(str(corpus / "person1" / "p1_001.png"), draw(98))  # another picture under a known name
    os.utime(corpus / "person2" / "p2_002.png", (1, 1))  # touched, the same bytes
    again = embed(corpus, tmp_path / "g", fakes)
    assert (again.images, again.skipped) == (3, 58)
    assert again.statuses["touched"] == 1
    embed(corpus, tmp_path / "fresh", fakes)
    assert rows(tmp_path / "g") == rows(tmp_path / "fresh")
    assert verify_gallery(Gallery(str(tmp_path / "g"))).problems == []
    assert embed(corpus, tmp_path / "g", fakes).images == 0, "what was touched is known by its new fingerprint"


def test_what_cannot_be_read_just_now_keeps_its_rows(fakes: Settings, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    cv2.imwrite(str(corpus / "a.png"), draw(1))
    embed(corpus, tmp_path / "g", fakes)
    before = rows(tmp_path / "g")
    (corpus / "a.png").unlink()
    (corpus / "a.png").symlink_to(corpus / "a.png")
    assert embed(corpus, tmp_path / "g", fakes).statuses == {"unchanged": 1}
    assert rows(tmp_path / "g") == before


def test_an_error_that_no_stage_foresaw_costs_one_image(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from facepipe.models.fakes import FakeDetector

    original = FakeDetector._detect_one

    def fussy(self: FakeDetector, image: np.ndarray) -> Any:
        if image.shape[1] == 96:  # the others are padded to 104
            raise cv2.error("no sevens")
        return original(self, image)

    monkeypatch.setattr(FakeDetector, "_detect_one", fussy)
    settings = {
        "detect": {"model": "fake-detector", "border_below": 0, "second_look": False},
        "embed": {"model": "fake-embedder"},
    }
    summary = embed(drawings, tmp_path / "g", settings, runner="inline")
    assert summary.images == 60
    assert summary.statuses["crashed"] == sum(n % 7 == 0 for n in range(60))
    assert {row["error"] for row in rows(tmp_path / "g") if row["status"] == "crashed"} == {"error: no sevens"}

    def broken(self: FakeDetector, image: np.ndarray) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(FakeDetector, "_detect_one", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        embed(drawings, tmp_path / "h", settings, runner="inline")


def test_what_could_not_be_read_is_tried_again(fakes: Settings, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), draw(1))
    (tmp_path / "list.csv").write_text("path,identity\na.png,Ann\nb.png,Bo\n")
    assert embed(tmp_path / "list.csv", tmp_path / "g", fakes).statuses == {"ok": 1, "read_error": 1}
    again = embed(tmp_path / "list.csv", tmp_path / "g", fakes)
    assert (again.statuses, again.rows) == ({"unchanged": 1}, 0), "still absent: no new row"
    cv2.imwrite(str(tmp_path / "b.png"), draw(2))
    assert embed(tmp_path / "list.csv", tmp_path / "g", fakes).faces == 2
    found = rows(tmp_path / "g")
    assert [(row["status"], row["identity"]) for row in found] == [("ok", "Ann"), ("ok", "Bo"), ("ok", "Bo")]


def containers(photos: list[Path], root: Path) -> dict[str, Path]:
    """The same photos as folder, tar, Parquet with bytes, Parquet with uris, and list."""
    names = [photo.name for photo in photos]
    folder = root / "folder"
    folder.mkdir()
    for photo in photos:
        shutil.copyfile(photo, folder / photo.name)
    with tarfile.open(root / "shard.tar", "w") as tar:
        for photo in photos:
            tar.add(photo, photo.name)
    pq.write_table(
        pa.table({"bytes": [p.read_bytes() for p in photos], "identity": names}), root / "b.parquet", row_group_size=3
    )
    pq.write_table(pa.table({"uri": [str(folder / n) for n in names]}), root / "u.parquet")
    (root / "list.txt").write_text("".join(f"folder/{name} {n}\n" for n, name in enumerate(names)))
    return {
        "folder": folder,
        "tar": root / "shard.tar",
        "bytes": root / "b.parquet",
        "uris": root / "u.parquet",
        "list": root / "list.txt",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "images", "faces"), [("portraits", 5, 5), pytest.param("photos", 15, 18, marks=pytest.mark.shared)]
)
def test_the_same_faces_whatever_the_container_batch_worker_and_runner(
    folder: str, images: int, faces: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Show 6, on real photos with the real models."""
    photos = request.getfixturevalue(folder)
    chosen = sorted(photos.glob("*.jpg"), key=lambda p: p.stat().st_size)[: images - (folder == "photos")]
    chosen += [photos / "img54.jpg"] if folder == "photos" else []
    places = containers(chosen, tmp_path)
    ways: list[tuple[str, Settings]] = [
        ("folder", {"runner": "inline", "batch": 1, "workers": 1}),
        ("folder", {"runner": "inline", "batch": 32}),
        ("tar", {"runner": "local", "batch": 1, "workers": 2, "block_smallest": 2}),
        ("bytes", {"runner": "local", "batch": 32, "workers": 1}),
        ("uris", {"runner": "local", "batch": 4, "workers": 2, "block_smallest": 4}),
        ("list", {"runner": "ray", "batch": 32, "workers": 2, "block_smallest": 4}),
        ("tar", {"runner": "ray", "batch": 1, "workers": 1}),
    ]
    # Each process loads the models: a bare clone reads every container, but starts few workers.
    if folder == "portraits":
        ways[3:] = [
            ("bytes", {"runner": "inline"}),
            ("uris", {"runner": "inline", "batch": 4}),
            ("list", {"runner": "ray", "workers": 1}),
        ]
    galleries = []
    for n, (place, settings) in enumerate(ways):
        summary = embed(places[place], tmp_path / f"g{n}", **settings)
        assert (summary.images, summary.failed) == (images, 0)
        assert summary.faces >= faces
        galleries.append(rows(tmp_path / f"g{n}"))
    for other in galleries[1:]:
        same_faces(galleries[0], other)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Everything that a corpus collects in ten years."""
    root = tmp_path / "hostile"
    root.mkdir()
    good = cv2.imencode(".jpg", draw(1))[1].tobytes()
    png = cv2.imencode(".png", draw(2))[1].tobytes()
    files = {
        "good.jpg": good, "png named.jpg": png, "empty.jpg": b"", "text.jpg": b"hello", "truncated.jpg": good[: len(good) // 2],
        "new\nline.jpg": good, "ünï.png": png, "truncated.png": png[:100], "header only.png": png[:33], "<b>.jpg": good,
        "bomb.png": png[:16] + (200_000).to_bytes(4, "big") * 2 + png[24:], "notes.txt": b"x", ".hidden.jpg": b"x",
    }  # fmt: skip
    for name, data in files.items():
        (root / name).write_bytes(data)
    (root / "folder.jpg").mkdir()
    (root / "folder.jpg" / "inside.jpg").write_bytes(good)
    with open(os.fsencode(root) + b"/bytes\xff.jpg", "wb") as file:
        file.write(good)
    (root / "loop").symlink_to(root)
    (root / "dangling.jpg").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.jpg")
    with tarfile.open(root / "shard.tar", "w") as tar:
        for name in ("t.jpg", "t.jpg", "u.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(png)
            tar.addfile(info, io.BytesIO(png))
    data = (root / "shard.tar").read_bytes()
    (root / "cut.tar").write_bytes(data[: 512 + len(png) // 2])
    return root


EXPECTED = {
    "good.jpg": "ok", "png named.jpg": "ok", "empty.jpg": "decode_error", "text.jpg": "decode_error", "truncated.jpg": "decode_error",
    "new\nline.jpg": "ok", "ünï.png": "ok", "truncated.png": "decode_error", "header only.png": "decode_error", "<b>.jpg": "ok",
    "bomb.png": "too_large", "inside.jpg": "ok", "bytes%FF.jpg": "ok", "dangling.jpg": "read_error", "pipe.jpg": "read_error",
    "shard.tar#t.jpg": "ok", "shard.tar#u.jpg": "ok", "cut.tar#t.jpg": "read_error", "cut.tar": "read_error",
}  # fmt: skip


@pytest.mark.parametrize("runner", ["inline", "local"])
def test_hostile_files_are_rows_with_a_status(runner: str, hostile: Path, fakes: Settings, tmp_path: Path) -> None:
    summary = embed(hostile, tmp_path / "g", fakes, runner=runner)
    found = rows(tmp_path / "g")
    statuses = {row["uri"].rpartition("/")[2]: row["status"] for row in found}
    (repeated,) = [name for name in statuses if name.startswith("shard.tar#t.jpg@")]
    assert statuses.pop(repeated) == "ok"
    assert statuses == EXPECTED
    assert summary.images == len(EXPECTED) + 1 == len({row["uri"] for row in found})
    assert all((row["error"] is None) == (row["status"] in ("ok", "no_face")) for row in found)
    assert verify_gallery(Gallery(str(tmp_path / "g"))).problems == []
    again = embed(hostile, tmp_path / "g", fakes, runner=runner)
    assert again.rows == 0


def test_an_image_listed_twice_is_embedded_once(drawings: Path, fakes: Settings, tmp_path: Path) -> None:
    path = drawings / "person1" / "p1_001.png"
    (tmp_path / "list.csv").write_text("path\n" + f"{path}\n" * 5)
    summary = embed(tmp_path / "list.csv", tmp_path / "g", fakes)
    assert (summary.images, summary.repeated, summary.listed) == (1, 4, 5)


def test_sources_that_hold_nothing_are_errors(fakes: Settings, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        embed(tmp_path / "none", tmp_path / "g", fakes)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(SourceError, match=r"no image in .*\(1 other files"):
        embed(tmp_path / "empty", tmp_path / "g", fakes)
    assert not Gallery.exists(str(tmp_path / "g"))


def test_another_contract_is_refused(drawings: Path, fakes: Settings, tmp_path: Path) -> None:
    embed(drawings, tmp_path / "g", fakes)
    with pytest.raises(ContractError, match=r"flip: the gallery has True, asked for is False"):
        embed(drawings, tmp_path / "g", fakes, {"embed": {"flip": False}})


def test_a_folder_that_is_no_gallery_is_left_alone(drawings: Path, fakes: Settings, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(GalleryError, match="is not a gallery"):
        embed(drawings, tmp_path / "mine", fakes)
    with pytest.raises(ConfigError, match="is a file"):
        embed(drawings, tmp_path / "mine" / "thesis.txt", fakes)


def test_one_writer_at_a_time(drawings: Path, fakes: Settings, tmp_path: Path) -> None:
    with hold_lease(str(tmp_path / "g")), pytest.raises(GalleryBusyError):
        embed(drawings, tmp_path / "g", fakes)


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["inline", "local", "ray"])
def test_a_worker_that_cannot_start_says_why(
    runner: str, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "fakes" / "face_recognition_models"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "fakes"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))
    from facepipe.models.zoo.packaged import read_dlib_weights

    read_dlib_weights.cache_clear()
    with pytest.raises(Exception, match="pip install face-recognition-models"):
        embed(drawings, tmp_path / "g", runner=runner)


def test_blocks_shrink_towards_the_end(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{n}.jpg\n" for n in range(5000)))

    source = open_source(SourceConfig(str(tmp_path / "list.csv")))
    cut = list(cut_blocks(source, Nothing(), BlockSize(16, 256, 2)))
    sizes = [block.items.num_rows for block in cut]
    assert sum(sizes) == 5000
    assert sizes[-1] == 0
    assert cut[-1].last
    # They grow while the listing gets ahead of the work, and shrink when it has ended.
    largest = sizes.index(256)
    assert largest <= 4
    shrinking = sizes[largest + sizes[largest:].count(256) :]
    assert shrinking == sorted(shrinking, reverse=True)
    assert sizes[-3] <= 16
    assert (cut[-1].handed_out, cut[-1].digest) == (
        5000,
        compute_digest(pa.concat_tables([b.items for b in cut])["uri"]),
    )
    copy = decode_block(encode_block(cut[3]))
    assert copy.items.equals(cut[3].items)
    assert copy.number == 3


class Counted:
    """A source that counts the items it has listed."""

    name = "counted"
    ignored = 0
    gives_labels = False
    label_numbers = None
    notes = ()

    def __init__(self, count: int):
        self.count = count
        self.listed = 0

    def __iter__(self) -> Iterator[WorkItem]:
        for n in range(self.count):
            self.listed += 1
            yield WorkItem(f"s3://b/{n:07d}.jpg", b"x")


class Nothing:
    """A gallery that holds nothing."""

    def screen(self, uris: np.ndarray, marks: np.ndarray) -> Screening:
        return Screening(np.zeros(len(uris), np.int8), np.zeros(len(uris), np.uint64))


@pytest.mark.parametrize(("workers", "largest"), [(2, 512), (64, 4096), (4096, 512)])
def test_work_starts_with_the_first_page_however_many_workers_there_are(workers: int, largest: int) -> None:
    source = Counted(20_000)
    listed = []
    handed_out = 0
    for block in cut_blocks(source, Nothing(), BlockSize(16, largest, workers)):
        handed_out += block.items.num_rows
        listed.append((handed_out, source.listed))
    assert listed[0][1] == 1000
    # 64 workers have a block each when some thousands are listed.
    assert listed[min(workers, 64) - 1][1] <= 16_000
    assert all(ahead <= 1000 + 5 * done + 8192 for done, ahead in listed)


def test_the_listing_is_a_bounded_number_of_items_ahead() -> None:
    size = BlockSize(16, 4096, 4096)
    assert size.choose_lookahead(10**9) == 1 << 20


def test_plans() -> None:
    assert [(g.workers, g.cpus, g.gpus) for g in make_plan(Resources(2)).groups] == [(2, 1, 0)]
    assert [(g.workers, g.cpus, g.gpus) for g in make_plan(Resources(16, 2)).groups] == [(2, 8, 1)]
    split = make_plan(Resources(16, 2), layout="split").groups
    assert [(g.stages[0], g.workers, g.gpus) for g in split] == [("read", 14, 0), ("detect", 2, 1)]
    assert sum(g.workers * g.cpus for g in split) <= 16
    # Without GPUs, some workers decode for the others; a single CPU has room for one of each.
    assert [(g.workers, g.cpus) for g in make_plan(Resources(8), layout="split").groups] == [(2, 1), (6, 1)]
    assert [(g.workers, g.cpus) for g in make_plan(Resources(1), layout="split").groups] == [(1, 0.5), (1, 0.5)]
    # Two workers may share a GPU.
    assert [(g.workers, g.cpus, g.gpus) for g in make_plan(Resources(16, 2), None, "fused", "all", 0.5).groups] == [
        (4, 4, 0.5)
    ]


def test_the_plan_splits_the_work_if_most_cpus_are_far_from_the_gpus() -> None:
    assert len(make_plan(Resources(64, 4, cpus_per_gpu=16)).groups) == 1
    assert len(make_plan(Resources(192, 4, cpus_per_gpu=16, cpus_elsewhere=128)).groups) == 2
    assert len(make_plan(Resources(192, cpus_elsewhere=192)).groups) == 1
    assert len(make_plan(Resources(192, 4, cpus_per_gpu=16, cpus_elsewhere=128), layout="fused").groups) == 1


@pytest.mark.parametrize(
    ("address", "layout", "images", "expected", "listings"),
    [
        ("", "fused", 9999, "local", 0),  # one machine: nobody waits for the listing to be counted
        ("head:6379", "fused", 3, "local", 1),
        ("head:6379", "fused", 9999, "ray", 1),
        ("", "split", 9999, "ray", 1),
    ],
)
def test_ray_is_for_much_work_on_a_cluster(
    address: str, layout: Any, images: int, expected: str, listings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    listed: list[int] = []

    def listing() -> Iterator[Block]:
        listed.append(1)
        yield from (Block(n, pa.table({"uri": ["x"] * min(100, images)})) for n in range(-(-images // 100)))

    runner, found = _choose_runner(RunConfig(layout=layout), listing)  # type: ignore[arg-type]
    assert (runner, len(listed)) == (expected, listings)
    assert len(list(found())) == -(-images // 100)


def test_a_chain_in_the_wrong_order_is_refused_before_it_runs() -> None:
    with pytest.raises(ConfigError, match="Detect needs pixels"):
        check_chain([Detect(), Decode()], ["bytes", "status", "error"])


@pytest.mark.slow
def test_a_plan_split_over_two_groups_gives_the_same_rows(drawings: Path, fakes: Settings, tmp_path: Path) -> None:
    """The split plan on Ray, with the second group on a CPU, since pixels travel the same way to a GPU."""
    embed(drawings, tmp_path / "one", fakes)
    # A budget of a few images per table of pixels.
    two = embed(drawings, tmp_path / "two", fakes, runner="ray", layout="split", batch_bytes=100_000)
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    # Ray sees images and bytes. Each block also has a report, which is a row if the block has no image.
    assert list(two.operators) == [
        "ReadListing",
        "MapBatches(ReadDecode)",
        "MapBatches(Faces)",
        "MapBatches(write_parts)",
    ]
    assert [figures["rows"] for figures in two.operators.values()][:3] == [61, 61, 61]
    assert two.operators["MapBatches(ReadDecode)"]["bytes"] > 60 * 96 * 96 * 3
    three = embed(drawings, tmp_path / "three", fakes)
    assert two.stage_bytes["decode"] == pytest.approx(three.stage_bytes["decode"], rel=0.01)


def test_a_model_of_another_length_leaves_no_gallery(drawings: Path, tmp_path: Path) -> None:
    from facepipe.models.zoo.architectures import ARCHITECTURES
    from facepipe.models.zoo.card_file import CardFile, save_model

    net = ARCHITECTURES["mobilefacenet"].build(32, (96, 112))
    card = CardFile("m", "", architecture="mobilefacenet", dim=32)
    model = str(save_model(tmp_path / "m.toml", net.state_dict(), card))
    with pytest.raises(ModelError, match="gives 32-D vectors, and a gallery holds vectors of 64 to 1024"):
        embed(drawings, tmp_path / "g", {"embed": {"model": model}}, runner="inline")
    assert not (tmp_path / "g").exists()


def test_a_model_that_cannot_be_loaded_leaves_no_gallery(drawings: Path, fakes: Settings, tmp_path: Path) -> None:
    """The corrected file would have another fingerprint, and be refused by a gallery that holds nothing."""
    fed = "[input]\nsize = [32, 32]\nchannels = 'rgb'\nmean = 0\nscale = 1\ntemplate = 'arcface'\n"
    (tmp_path / "m.onnx").write_bytes(b"no graph")
    (tmp_path / "m.toml").write_text(f"name = 'm'\nweights = 'm.onnx'\n{fed}")
    with pytest.raises(ModelError, match="cannot load the graph"):
        embed(drawings, tmp_path / "g", fakes, {"embed": {"model": str(tmp_path / "m.toml")}})
    told = "name = 'd'\nrole = 'detector'\nweights = 'm.onnx'\narchitecture = "
    (tmp_path / "d.toml").write_text(f"{told}'yunet'\n")
    for embedder, message in (("fake-embedder", "YuNet: .* cannot load"), ("face-recognition", "never measured")):
        models = {"detect": {"model": str(tmp_path / "d.toml")}, "embed": {"model": embedder}}
        with pytest.raises(ModelError, match=message):
            embed(drawings, tmp_path / "g", fakes, models)
    assert not (tmp_path / "g").exists()


def test_vectors_that_are_not_finite_end_the_run(drawings: Path, fakes: Settings, tmp_path: Path) -> None:
    from facepipe.models.fakes import FakeEmbedder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeEmbedder, "embed", lambda self, chips: np.full((len(chips), 128), np.nan, np.float32))
        with pytest.raises(ModelError, match="zero or not finite"):
            embed(drawings, tmp_path / "g", fakes, runner="inline")
    assert not Gallery(tmp_path / "g").vectors()[0].size


def test_aligned_crops_are_told(portrait: Path, tmp_path: Path) -> None:
    """Crops of one size with the face at the template's place: a line says what to type. Other photos get none."""
    summary = embed(portrait, tmp_path / "photo", runner="inline")
    assert not any("--aligned" in note for note in summary.notes)
    landmarks = np.array(rows(tmp_path / "photo")[0]["landmarks"]).reshape(5, 2)
    crop = warp_chip(cv2.imread(str(portrait)), fit_similarity(landmarks, np.array(ARCFACE_112)), (112, 112))
    (tmp_path / "crops").mkdir()
    for n in range(24):
        cv2.imwrite(str(tmp_path / "crops" / f"{n}.png"), np.clip(crop.astype(np.int16) + n, 0, 255).astype(np.uint8))
    detected = embed(tmp_path / "crops", tmp_path / "detected", runner="inline")
    assert any("--aligned" in note for note in detected.notes)
    settings = {"detect": {"model": "aligned-arcface"}}
    aligned = embed(tmp_path / "crops", tmp_path / "aligned", settings, runner="inline")
    assert aligned.statuses == {"ok": 24}
    assert not any("--aligned" in note for note in aligned.notes)
    with pytest.raises(ContractError):
        embed(tmp_path / "crops", tmp_path / "detected", settings, runner="inline")
