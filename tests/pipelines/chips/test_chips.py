"""Chip sets: the same chips from a gallery and from its source, labels and exclusions, interruptions, hostile sources."""

import csv
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, draw
from helpers import run_facepipe

from facepipe.config import build
from facepipe.erasure.proof import check_erased, check_folder
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.trainings import record_training
from facepipe.errors import ConfigError, EvaluationError, SourceError, StorageError
from facepipe.gallery import Gallery
from facepipe.training.data import chip_writer
from facepipe.training.data.chip_set import SET, ChipSet, iterate_batches
from facepipe.training.data.config import DataConfig
from facepipe.training.validation import ValidateConfig, verify_pairs
from pipelines.chips import prepare as pipeline
from pipelines.chips.prepare import ChipRunConfig, prepare_chips, prepare_pairs
from pipelines.embed import EmbedConfig
from pipelines.embed import run as run_embed

INLINE = ChipRunConfig(runner="inline", block_smallest=4, block_largest=8)
FAKES = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}, "run": {"runner": "inline"}}
FAKE = "fake-embedder"


def config(source: Path | str, **settings: Any) -> DataConfig:
    return build(DataConfig, {"source": str(source), "detector": "fake-detector", **settings})


def gallery_of(source: Path | str, path: Path, **settings: Any) -> str:
    run_embed(build(EmbedConfig, {**FAKES, **settings, "source": {"uri": str(source)}}), str(path))
    return str(path)


def content(chips: ChipSet) -> list[tuple[str, bytes]]:
    """(identity, JPEG) of every chip, in order."""
    return [(chips.identities[chips.labels[n]], bytes(chips.read_jpeg(n))) for n in range(len(chips))]


def people(chips: ChipSet) -> dict[str, int]:
    return dict(zip(chips.identities, np.bincount(chips.labels).tolist(), strict=True))


@pytest.fixture(scope="module")
def plain(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> ChipSet:
    """The chips of the drawings: 13 or 14 faces of each of three persons, none of the first."""
    return prepare_chips(config(drawings), FAKE, str(tmp_path_factory.mktemp("plain") / "chips"), INLINE)


@pytest.fixture(scope="module")
def drawn_gallery(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return gallery_of(drawings, tmp_path_factory.mktemp("gallery") / "g")


def test_a_folder_tree(plain: ChipSet, drawings: Path) -> None:
    assert plain.size == (32, 32)
    assert plain.identities == ["person1", "person2"], "nobody has a face in the pictures of person0"
    assert people(plain) == {"person1": 20, "person2": 20}
    assert plain.info.figures == {"images": 60, "failed: no_face": 20}
    assert plain.load_chip(3).shape == (32, 32, 3)
    assert list(plain.uris) == [plain.uris[n] for n in range(40)]
    assert plain.uris[0] in {str(path) for path in (drawings / "person1").iterdir()}
    assert len(set(plain.uris[:])) == len(plain) == 40
    assert (np.diff(plain.labels) >= 0).all()
    with open(Path(plain.folder) / "failed.csv", newline="") as file:
        assert sum(row["status"] == "no_face" for row in csv.DictReader(file)) == 20


def test_a_set_leaves_nothing_else_behind(plain: ChipSet) -> None:
    names = {path.name for path in Path(plain.folder).iterdir() if not path.name.startswith(".lock")}
    assert names == {"set.json", "plan.json", "index.arrow", "identities.arrow", "chips-00000.arrow", "failed.csv"}


def test_the_files_are_plain_arrow(plain: ChipSet) -> None:
    held = [
        row for batch, _ in iterate_batches(str(Path(plain.folder) / "chips-00000.arrow")) for row in batch.to_pylist()
    ]
    by_face = {row["face_id"]: row for row in held}
    for n in range(len(plain)):
        row = by_face[int(plain.face_ids[n])]
        assert bytes(plain.read_jpeg(n)) == row["chip"]
        assert (plain.uris[n], plain.identities[plain.labels[n]]) == (row["uri"], row["identity"])


def test_a_gallery_gives_the_chips_of_its_source(plain: ChipSet, drawn_gallery: str, tmp_path: Path) -> None:
    found = prepare_chips(DataConfig(gallery=drawn_gallery), FAKE, str(tmp_path / "chips"), INLINE)
    assert content(found) == content(plain)
    assert found.uris[:] == plain.uris[:]
    assert np.array_equal(found.face_ids, plain.face_ids)


def test_an_erasure_names_the_chips_that_hold_erased_faces(drawn_gallery: str, tmp_path: Path) -> None:
    gallery = str(shutil.copytree(drawn_gallery, tmp_path / "g"))
    folder = tmp_path / "train" / "chips"
    prepare_chips(DataConfig(gallery=gallery), FAKE, str(folder), INLINE)
    np.save(tmp_path / "train" / "faces.npy", Gallery(gallery).to_arrow(["face_id"])["face_id"].drop_null().to_numpy())
    record_training(gallery, str(tmp_path / "train"))
    record_training(gallery, str(tmp_path / "never"))
    (tmp_path / "g" / "runs" / "training-0123456789abcdef.json").write_text("{damaged")
    elsewhere = {"path": "/data/run", "host": "another machine"}
    (tmp_path / "g" / "runs" / "training-0123456789abcdee.json").write_text(json.dumps(elsewhere))
    code, out, err = run_facepipe(
        "erase", gallery, "--image", Gallery(gallery).to_arrow(["uri"], "face_id > 0")["uri"][0]
    )
    assert code == 1
    assert str(folder) in err
    assert f"a model was trained on some of the faces: {tmp_path / 'train' / 'faces.npy'}" in out
    assert "not looked at: /data/run on another machine" in err
    receipt = load_receipt(str(next((tmp_path / "g" / "erased").glob("*.json"))))
    assert check_erased(Gallery(gallery), receipt) == []
    problems = check_folder(str(tmp_path / "train"), receipt)
    assert {Path(line.split(":")[0]).name for line in problems} == {"chips-00000.arrow", "index.arrow", "faces.npy"}
    # What the message says helps.
    shutil.rmtree(folder)
    prepare_chips(DataConfig(gallery=gallery), FAKE, str(folder), INLINE)
    assert len(check_folder(str(tmp_path / "train"), receipt)) == 1
    path = next((tmp_path / "g" / "erased").glob("*.json"))
    code, out, _ = run_facepipe("verify", gallery, "--erased", path, "--also", folder, "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])
    assert run_facepipe("verify", gallery, "--erased", path, "--also", tmp_path / "train")[0] == 1
    assert run_facepipe("verify", gallery, "--also", folder)[0] == 2


def test_processes_give_the_same_chips(plain: ChipSet, drawings: Path, tmp_path: Path) -> None:
    run = ChipRunConfig(runner="local", workers=2, block_smallest=4, block_largest=8)
    found = prepare_chips(config(drawings), FAKE, str(tmp_path / "chips"), run)
    assert content(found) == content(plain)


def test_members_of_containers(plain: ChipSet, drawings: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    paths = sorted(drawings.glob("*/*.png"))
    with tarfile.open(shards / "a.tar", "w") as tar:
        for path in paths[:30]:
            tar.add(path, f"{path.parent.name}/{path.name}")
    rows = {"uri": [f"{p.parent.name}/{p.name}" for p in paths[30:]], "bytes": [p.read_bytes() for p in paths[30:]]}
    pq.write_table(pa.table({**rows, "identity": [p.parent.name for p in paths[30:]]}), shards / "b.parquet")
    gallery = gallery_of(shards / "a.tar", tmp_path / "g")
    gallery_of(shards / "b.parquet", tmp_path / "g")
    found = prepare_chips(DataConfig(gallery=gallery), FAKE, str(tmp_path / "chips"), INLINE)
    assert sorted(content(found)) == sorted(content(plain))
    rows_alone = prepare_chips(config(shards / "b.parquet"), FAKE, str(tmp_path / "rows"), INLINE)
    assert people(rows_alone) == {"person1": 10, "person2": 20}


def test_clean_lists(drawn_gallery: str, plain: ChipSet, tmp_path: Path) -> None:
    rows = [
        row for row in Gallery(drawn_gallery).to_arrow(["face_id", "uri", "face_index"]).to_pylist() if row["face_id"]
    ]
    both = {row["uri"] for row in rows if row["face_index"] == 1}
    chosen = [row for row in rows if row["uri"] in both][:12]  # two faces each of six images
    names = [f"renamed {n % 3}" for n in range(12)]
    with open(tmp_path / "clean.csv", "w", newline="") as file:
        listed = ((row["uri"], name, 0, row["face_id"]) for row, name in zip(chosen, names, strict=True))
        csv.writer(file).writerows([("path", "identity", "label", "face_id"), *listed])
    data = DataConfig(gallery=drawn_gallery, list=str(tmp_path / "clean.csv"))
    found = prepare_chips(data, FAKE, str(tmp_path / "chips"), INLINE)
    held = {int(face): found.identities[label] for face, label in zip(found.face_ids, found.labels, strict=True)}
    assert held == {row["face_id"]: name for row, name in zip(chosen, names, strict=True)}

    (tmp_path / "clean.txt").write_text("".join(f"{uri} {n % 2}\n" for n, uri in enumerate(plain.uris[:8])))
    (tmp_path / "labels.csv").write_text("label,identity\n0,Ann\n1,Bo\n")
    text = prepare_chips(replace(data, list=str(tmp_path / "clean.txt")), FAKE, str(tmp_path / "chips"), INLINE)
    assert people(text) == {"Ann": 4, "Bo": 4}
    assert {*text.uris} == {*plain.uris[:8]}

    (tmp_path / "clean.txt").write_text("/elsewhere/a.jpg 0\n")
    with pytest.raises(SourceError, match="was it made from this gallery"):
        prepare_chips(replace(data, list=str(tmp_path / "clean.txt")), FAKE, str(tmp_path / "chips"), INLINE)


def test_limits_and_excluded_names(drawings: Path, drawn_gallery: str, plain: ChipSet, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "one.png"), draw(1))
    corpus = tmp_path / "corpus"
    shutil.copytree(drawings, corpus)
    for name in ("single", "Left_Out"):
        (corpus / name).mkdir()
        shutil.copyfile(tmp_path / "one.png", corpus / name / "x.png")
    settings = {"min_images": 2, "max_images": 7, "exclude_identities": ["left out"]}
    data = config(corpus, **settings)
    found = prepare_chips(data, FAKE, str(tmp_path / "chips"), INLINE)
    assert people(found) == {"person1": 7, "person2": 7}
    assert found.info.figures["left_out: identity with too few images"] == 1
    assert found.info.figures["left_out: excluded identity"] == 1
    assert found.info.figures["left_out: more images than data.max_images"] == 26
    gallery = gallery_of(corpus, tmp_path / "g")
    again = prepare_chips(replace(data, source="", gallery=gallery), FAKE, str(tmp_path / "of gallery"), INLINE)
    assert content(again) == content(found), "the same choice"
    assert again.info.figures["wanted faces"] == 14, "no other was cut"


def test_images_and_names_of_a_test_set_are_left_out(drawings: Path, plain: ChipSet, tmp_path: Path) -> None:
    test = tmp_path / "test"
    (test / "Person2").mkdir(parents=True)
    (test / "12345").mkdir()
    shutil.copyfile(plain.uris[0], test / "12345" / "copy.png")
    shutil.copyfile(plain.uris[39], test / "Person2" / "copy.png")
    gallery = gallery_of(test, tmp_path / "test gallery")
    with pytest.raises(SourceError, match="19 chips of 1 identities are left") as raised:
        prepare_chips(config(drawings, exclude=[gallery]), FAKE, str(tmp_path / "chips"), INLINE)
    assert "excluded identity 20" in str(raised.value)
    assert "image of an excluded gallery 1" in str(raised.value)
    with pytest.raises(SourceError, match="no chip set"):
        ChipSet.open(tmp_path / "chips")


def test_a_set_is_made_once(drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "chips")
    first = content(prepare_chips(config(drawings), FAKE, folder, INLINE))
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_make_chips", lambda *_: pytest.fail("made again"))
        assert content(prepare_chips(config(drawings), FAKE, folder, INLINE)) == first
    assert len(prepare_chips(config(drawings, max_images=3), FAKE, folder, INLINE)) == 6, "another config, another set"
    assert prepare_chips(config(drawings), "dlib-resnet", folder, INLINE).size == (150, 150)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("!")
    with pytest.raises(ConfigError, match=r"holds 'thesis\.txt' and is not a chip set"):
        prepare_chips(config(drawings), FAKE, str(tmp_path / "mine"), INLINE)
    with pytest.raises(ConfigError, match="object store"):
        prepare_chips(config(drawings), FAKE, "s3://bucket/chips", INLINE)


KILLED = """
import os, sys
from facepipe.training.data import chip_writer
from facepipe.training.data.config import DataConfig
from pipelines.chips import ChipRunConfig, prepare_chips
chip_writer._SHARD_BYTES = 1
chip_writer.ChipShardWriter.__init__.__defaults__ = (1,)
seen = []
def progress(line):
    seen.append(line)
    if len(seen) == 6:
        os.kill(os.getpid(), 9)
data = DataConfig(source=sys.argv[1], detector="fake-detector")
prepare_chips(data, "fake-embedder", sys.argv[2], ChipRunConfig("inline", None, 16, 4, 8), progress)
"""


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with(drawings: Path, plain: ChipSet, tmp_path: Path) -> None:
    folder = tmp_path / "chips"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(drawings), str(folder)], cwd=REPOSITORY)
    assert killed.returncode == -9
    assert not (folder / SET).exists()
    with pytest.raises(SourceError, match="no chip set"):
        ChipSet.open(folder)
    assert list(folder.glob("chips-*.arrow"))
    done = prepare_chips(config(drawings), FAKE, str(folder), INLINE)
    assert content(done) == content(plain)
    assert done.uris[:] == plain.uris[:]
    held = done.info.figures["held from an interrupted run"]
    assert 0 < held < 40
    assert done.info.figures["images"] == 60 - held, "what was done is not done again"


def test_an_interruption_at_any_time_leaves_no_set(
    drawings: Path, plain: ChipSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chip_writer.ChipShardWriter.__init__, "__defaults__", (4000,))
    folder = tmp_path / "chips"
    for name in ("publish_file", "_write_table", "_write_json"):
        original = getattr(chip_writer, name)
        calls: list[int] = []

        def fail(*args: Any, original: Any = original, calls: list[int] = calls, **options: Any) -> Any:
            calls.append(0)
            if len(calls) == 2 or original.__name__ == "_write_json":
                raise KeyboardInterrupt
            return original(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(chip_writer, name, fail)
            with pytest.raises(KeyboardInterrupt):
                prepare_chips(config(drawings), FAKE, str(folder), INLINE)
        with pytest.raises(SourceError, match="no chip set"):
            ChipSet.open(folder)
    assert content(prepare_chips(config(drawings), FAKE, str(folder), INLINE)) == content(plain)


def test_hostile_files(drawings: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(drawings, corpus)
    for name, data in {
        "empty.jpg": b"",
        "text.png": b"hello",
        "cut.png": (corpus / "person1/p1_001.png").read_bytes()[:200],
    }.items():
        (corpus / "person1" / name).write_bytes(data)
    (corpus / "person2" / "nowhere.jpg").symlink_to("/nowhere")
    (corpus / "person2" / "notes.txt").write_text("no image")
    shutil.copyfile(corpus / "person1" / "p1_001.png", corpus / "loose.png")
    found = prepare_chips(config(corpus), FAKE, str(tmp_path / "chips"), INLINE)
    assert people(found) == {"person1": 20, "person2": 20}
    figures = found.info.figures
    assert (figures["failed: decode_error"], figures["failed: read_error"]) == (3, 1)
    assert figures["left_out: without identity"] == 1
    assert figures["no image files"] == 1


def test_sources_that_cannot_be_trained_on(drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no image in"):
        prepare_chips(config(tmp_path / "empty"), FAKE, str(tmp_path / "a"), INLINE)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "person1").symlink_to(drawings / "person1")
    with pytest.raises(SourceError, match="without identity 20"):
        prepare_chips(config(tmp_path / "one"), FAKE, str(tmp_path / "b"), INLINE)
    with pytest.raises(SourceError, match="20 chips of 1 identities are left"):
        prepare_chips(config(tmp_path / "one", identity="folder"), FAKE, str(tmp_path / "b"), INLINE)
    with pytest.raises(SourceError, match="without identity 20"):
        prepare_chips(config(drawings / "person1"), FAKE, str(tmp_path / "c"), INLINE)
    gallery = gallery_of(drawings / "person1", tmp_path / "g")
    with pytest.raises(SourceError, match="has an identity, but training needs labels"):
        prepare_chips(DataConfig(gallery=gallery), FAKE, str(tmp_path / "d"), INLINE)
    with pytest.raises(SourceError, match="no such file"):
        prepare_chips(config(tmp_path / "absent"), FAKE, str(tmp_path / "e"), INLINE)


def test_images_that_changed_since_they_were_embedded(drawings: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(drawings, corpus)
    gallery = gallery_of(corpus, tmp_path / "g")
    shutil.copyfile(corpus / "person1" / "p1_004.png", corpus / "person1" / "p1_001.png")
    (corpus / "person2" / "p2_002.png").unlink()
    found = prepare_chips(DataConfig(gallery=gallery), FAKE, str(tmp_path / "chips"), INLINE)
    assert people(found) == {"person1": 19, "person2": 19}
    assert found.info.figures["failed: read_error"] == 2
    assert "has changed since it was embedded" in (tmp_path / "chips" / "failed.csv").read_text()


def test_crops_need_no_detector(plain: ChipSet, tmp_path: Path) -> None:
    for n in range(0, 40, 4):
        folder = tmp_path / "crops" / plain.identities[plain.labels[n]]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{n}.png"), plain.load_chip(n)[:, :, ::-1])
    wide = cv2.copyMakeBorder(plain.load_chip(0)[:, :, ::-1], 0, 0, 8, 8, cv2.BORDER_CONSTANT)
    cv2.imwrite(str(tmp_path / "crops" / "person1" / "wide.png"), wide)
    found = prepare_chips(
        config(tmp_path / "crops", aligned=True, detector="retinaface-mnet025"), FAKE, str(tmp_path / "c"), INLINE
    )
    assert len(found) == 11
    for n, uri in enumerate(found.uris):
        stem = Path(uri).stem
        same = plain.load_chip(0 if stem == "wide" else int(stem)).astype(int)
        assert np.abs(found.load_chip(n) - same).mean() < 4, "the JPEG's loss alone"


def test_views(plain: ChipSet) -> None:
    rows = np.flatnonzero(plain.labels == 1)[::-2]
    part = plain.select(rows)
    assert (part.identities, set(part.labels.tolist()), len(part)) == (["person2"], {0}, 10)
    assert [bytes(part.read_jpeg(n)) for n in range(10)] == [bytes(plain.read_jpeg(row)) for row in rows]
    assert part.uris[2] == plain.uris[int(rows[2])]
    twice = part.select(np.array([1, 1]))
    assert twice.face_ids.tolist() == [part.face_ids[1]] * 2
    moved = pickle.loads(pickle.dumps(part))
    assert np.array_equal(moved.load_chips(np.arange(3)), part.load_chips(np.arange(3)))
    assert part.load_chips(np.empty(0, np.int64)).shape == (0, 32, 32, 3)


def test_damaged_chips_are_named(drawings: Path, tmp_path: Path) -> None:
    chips = prepare_chips(config(drawings), FAKE, str(tmp_path / "chips"), INLINE)
    shard = tmp_path / "chips" / "chips-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(StorageError, match="were cut short"):
        ChipSet.open(chips.folder).load_chip(39)
    shard.write_bytes(b"\0" * 200_000)
    with pytest.raises(StorageError, match=r"chip 39 of .* is damaged"):
        ChipSet.open(chips.folder).load_chip(39)
    shard.unlink()
    with pytest.raises(StorageError, match="cannot read the chips"):
        ChipSet.open(chips.folder).load_chip(0)


@pytest.fixture(scope="module")
def lfw(shared: Path) -> Path:
    return shared / "data" / "lfw-dev"


def persons(lfw: Path, root: Path, count: int, images: int) -> Path:
    """Folders of the first so many persons with enough images."""
    folders = sorted(f for f in (lfw / "images").iterdir() if len(list(f.iterdir())) >= images)[:count]
    for folder in folders:
        (root / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:images]:
            (root / folder.name / image.name).symlink_to(image)
    return root


def test_pairs_of_lfw(lfw: Path, tmp_path: Path) -> None:
    from facepipe.models.zoo.registry import find_card

    root = persons(lfw, tmp_path / "images", 8, 3)
    names = sorted(folder.name for folder in root.iterdir())
    images = {name: sorted(int(p.stem[-4:]) for p in (root / name).iterdir()) for name in names}
    lines = [f"{name}\t{images[name][k]}\t{images[name][k + 1]}" for k in (0, 1) for name in names]
    others = names[1:] + names[:1]
    lines += [
        f"{a}\t{images[a][k]}\t{b}\t{images[b][k + 1]}" for k in (0, 1) for a, b in zip(names, others, strict=True)
    ]
    folds = [[*lines[n:16:4], *lines[16 + n :: 4]] for n in range(4)]
    (tmp_path / "pairs.txt").write_text("\n".join(["4\t4", *(line for fold in folds for line in fold)]) + "\n")
    validate = ValidateConfig(pairs=str(tmp_path / "pairs.txt"), source=str(root))
    pairs = prepare_pairs(validate, "dlib-resnet", str(tmp_path / "chips"))
    assert (len(pairs), len(pairs.chips), (pairs.left < 0).sum()) == (32, 24, 0)
    scores = verify_pairs(find_card("dlib-resnet", "embedder").load("cpu", 1).embed, pairs)
    assert scores["score"] == scores["accuracy"] > 0.9
    assert scores["auc"] > 0.97

    half = replace(validate, held_only=True)
    held = prepare_pairs(half, "dlib-resnet", str(tmp_path / "chips"), trained=[names[0]])
    assert len(held) == 32 - 2 - 4
    assert len(held.chips) == 24, "one set of chips, whatever is held"
    gallery = gallery_of(root, tmp_path / "g", detect={}, embed={})
    of_gallery = prepare_pairs(replace(validate, source="", gallery=gallery), "dlib-resnet", str(tmp_path / "of g"))
    assert sorted(jpeg for _, jpeg in content(of_gallery.chips)) == sorted(jpeg for _, jpeg in content(pairs.chips))
    next((root / names[1]).iterdir()).unlink()
    shutil.rmtree(tmp_path / "chips")
    with pytest.raises(EvaluationError, match="1 images are not in"):
        prepare_pairs(validate, "dlib-resnet", str(tmp_path / "chips"))


def test_test_persons_are_found_in_a_gallery(lfw: Path, tmp_path: Path) -> None:
    """By name, by their faces under another name, and by a copy of a picture in another format."""
    train = persons(lfw, tmp_path / "train", 6, 4)
    names = sorted(folder.name for folder in train.iterdir())
    test = tmp_path / "test"
    for name, alias in ((names[0], names[0]), (names[1], "somebody else")):
        (test / alias).mkdir(parents=True)
        for image in sorted((train / name).iterdir())[2:]:
            shutil.copyfile(image, test / alias / image.name)
    (test / "crowd").mkdir()
    picture = sorted((train / names[2]).iterdir())[0]
    cv2.imwrite(str(test / "crowd" / "copy.png"), cv2.imread(str(picture)))
    settings = {"detect": {}, "embed": {}}
    galleries = [gallery_of(folder, tmp_path / f"{folder.name}.gallery", **settings) for folder in (train, test)]
    data = DataConfig(gallery=galleries[0], exclude=(galleries[1],))
    found = prepare_chips(data, "dlib-resnet", str(tmp_path / "chips"), INLINE)
    assert not {names[0], names[1]} & set(found.identities)
    assert set(names[3:]) <= set(found.identities)
    assert str(picture) not in set(found.uris)
    assert found.info.figures["left_out: copy of an image of an excluded gallery"] >= 1
