"""migrate: another model's vectors, with ids, labels and reports kept; killed anywhere it goes on, erased stays erased."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from conftest import draw
from helpers import embed, rows, run_facepipe
from onnx import TensorProto, helper, numpy_helper

from facepipe.config import build
from facepipe.curation.clusters import tables
from facepipe.erasure.limits import ErasureLimit
from facepipe.erasure.selection import Selection
from facepipe.errors import ConfigError, ContractError, GalleryError, IndexingError, ModelError
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index.search import Index
from facepipe.index.verify import verify_index
from pipelines import adopt, cluster, erase, index, migrate
from pipelines.adopt import AdoptConfig
from pipelines.cluster import ClusterConfig
from pipelines.index import IndexConfig
from pipelines.migrate import MigrateConfig, MigrateSummary
from pipelines.search import SearchConfig
from pipelines.search import run as search

DIM = 96
FAKE = "fake-embedder"
# What a migration changes in a row, and what lists of vectors are compared without.
VECTOR = ("embedding", "embedding_norm")


def write_onnx_model(folder: Path, name: str = "long", dim: int = DIM, licence: str = "MIT") -> str:
    """Write a graph that multiplies the levels of a chip by a random matrix, and its TOML file."""
    matrix = np.random.default_rng(dim).normal(size=(3 * 32 * 32, dim)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["chips"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["vectors"]),
    ]
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("chips", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["n", dim])],
        [numpy_helper.from_array(matrix, "matrix")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(folder / f"{name}.onnx"))
    (folder / f"{name}.toml").write_text(
        f'name = "{name}"\nweights = "{name}.onnx"\ndim = {dim}\nlicence = "{licence}"\n'
        '[input]\nsize = [32, 32]\nchannels = "rgb"\nmean = 0\nscale = 255\ntemplate = "arcface"\n'
    )
    return str(folder / f"{name}.toml")


@pytest.fixture(scope="module")
def made(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images, their gallery with an index, and a model of another length."""
    folder = tmp_path_factory.mktemp("migrate")
    shutil.copytree(drawings, folder / "photos")
    fakes = {"detect": {"model": "fake-detector"}, "embed": {"model": FAKE}, "source": {"identity": "folder"}}
    embed(folder / "photos", folder / "g", fakes, runner="inline", block_smallest=4, block_largest=8)
    index.run(IndexConfig(), str(folder / "g"))
    write_onnx_model(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the gallery and the model; the images stay where they are."""
    shutil.copytree(made / "g", tmp_path / "g")
    for name in ("long.toml", "long.onnx"):
        shutil.copy(made / name, tmp_path / name)
    return tmp_path


def start(folder: Path, embedder: str | None = None, **settings: Any) -> MigrateSummary:
    config = build(MigrateConfig, {"embedder": embedder or str(folder / "long.toml"), "commit": 16, **settings})
    return migrate.run(config, str(folder / "g"))


def read_vectors(path: Path) -> dict[int, np.ndarray]:
    ids, vectors = Gallery(str(path)).vectors()
    return dict(zip(ids.tolist(), vectors, strict=True))


def is_sound(path: Path) -> bool:
    gallery = Gallery(str(path))
    return not verify_gallery(gallery).problems and not verify_index(gallery)


def test_there_and_back(folder: Path) -> None:
    gallery = folder / "g"
    before = rows(gallery, without=VECTOR)
    old_vectors = read_vectors(gallery)
    cluster.run(build(ClusterConfig, {"run": {"runner": "inline"}, "graph": {"threshold": 0.3}}), str(gallery))
    clusters = tables.read_cluster_table(str(gallery), tables.FACES).sort_by("face_id")
    summary = start(folder)
    assert (summary.images, summary.migrated, summary.faces, summary.failed) == (60, 60, len(old_vectors), {})
    # Old and new answer side by side until the switch.
    second = gallery / "migration"
    assert (Gallery(str(gallery)).dim, Gallery(str(second)).dim) == (128, DIM)
    assert rows(second, without=VECTOR) == before
    assert [figures.dim for figures in summary.figures] == [128, DIM]
    for path in (gallery, second):
        vectors = Gallery(str(path)).vectors()[1]
        assert (Index(str(path)).search(vectors, 1).distances < 1e-3).all()
        assert is_sound(path)
    # A reader that has the gallery open goes on with what it began with.
    reader = Gallery(str(gallery))
    assert start(folder).migrated == 0, "nothing is done twice"
    summary = migrate.switch(str(gallery))
    assert (summary.switched, summary.has_index, second.exists()) == (True, True, False)
    assert np.array_equal(reader.vectors()[1], np.stack([old_vectors[n] for n in reader.vectors()[0].tolist()]))
    opened = Gallery(str(gallery))
    assert (opened.contract.embedder, opened.dim) == ("long", DIM)
    assert rows(gallery, without=VECTOR) == before
    assert is_sound(gallery)
    assert (Index(str(gallery)).search(opened.vectors()[1], 1).distances < 1e-3).all()
    assert index.run(IndexConfig(), str(gallery)).action == "unchanged"
    assert tables.read_cluster_table(str(gallery), tables.FACES).sort_by("face_id").equals(clusters)
    with pytest.raises(ConfigError, match="has no migration"):
        migrate.switch(str(gallery))
    # Back again, the vectors are those of before.
    start(folder, FAKE)
    migrate.switch(str(gallery))
    back = read_vectors(gallery)
    assert back.keys() == old_vectors.keys()
    assert max(float(np.abs(back[n] - old_vectors[n]).max()) for n in back) < 1e-5
    assert rows(gallery, without=VECTOR) == before
    assert Gallery(str(gallery)).contract == reader.contract
    files = len(list((gallery / "faces").glob("*.parquet")))
    assert files == migrate.drop_old(str(gallery)).deleted + len(Gallery(str(gallery)).files())
    assert is_sound(gallery)
    with pytest.raises(ConfigError, match="vectors of fake-embedder already"):
        start(folder, FAKE)


def test_images_that_are_gone_or_changed(folder: Path, made: Path, tmp_path: Path) -> None:
    photos = made / "photos"
    saved = {name: (photos / name).read_bytes() for name in ("person1/p1_001.png", "person2/p2_002.png")}
    gone, changed = (str(photos / name) for name in saved)
    gallery = folder / "g"
    all_before = rows(gallery, without=VECTOR)
    before = {row["uri"]: row for row in all_before}
    try:
        os.unlink(gone)
        cv2.imwrite(changed, draw(100))
        summary = start(folder)
    finally:
        for name, data in saved.items():
            (photos / name).write_bytes(data)
    assert sum(summary.failed.values()) == 2
    assert "the file has changed since it was embedded" in summary.failed
    assert {example.split(": ")[0] for example in summary.examples} == {gone, changed}
    failed = {row["uri"]: row for row in rows(gallery / "migration") if row["status"] == "read_error"}
    assert failed.keys() == {gone, changed}
    for uri, row in failed.items():
        assert (row["face_id"], row["embedding"], row["identity"]) == (None, None, before[uri]["identity"])
        assert row["error"]
    assert is_sound(gallery / "migration")
    # More than a share of the images do not lose their faces unasked. What is there again is taken anew by `embed`.
    with pytest.raises(GalleryError, match="2 of 40 images would lose their faces"):
        migrate.switch(str(gallery))
    shutil.copytree(gallery, folder / "again" / "g")
    again = start(folder / "again", str(folder / "long.toml"))
    assert (again.migrated, again.failed) == (2, {}), "they are there again"
    migrate.switch(str(folder / "again" / "g"))
    migrate.switch(str(gallery), max_failed=0.1)
    assert is_sound(gallery)
    models = {"detect": {"model": "fake-detector"}, "embed": {"model": str(folder / "long.toml")}}
    embed(photos, gallery, models, {"source": {"identity": "folder"}}, runner="inline")
    assert {row["uri"] for row in rows(gallery) if row["face_id"]} == {
        uri for uri, row in before.items() if row["face_id"]
    }
    ids = {(row["uri"], row["face_index"]): row["face_id"] for row in all_before}
    for row in rows(gallery):
        assert row["face_id"] == ids[row["uri"], row["face_index"]], row["uri"]


def test_what_is_erased_or_added_during_a_migration(folder: Path, made: Path) -> None:
    gallery = folder / "g"
    start(folder)
    second = Gallery(str(gallery / "migration"))
    chosen = second.to_arrow(["uri", "face_id", "embedding"], "identity = 'person1' and face_id is not null")
    others = second.to_arrow(["embedding"], "identity <> 'person1' and face_id is not null")
    # Some drawn faces are the same as those of others.
    bits = {np.array(vector, "<f4").tobytes() for vector in chosen["embedding"].to_pylist()}
    bits -= {np.array(vector, "<f4").tobytes() for vector in others["embedding"].to_pylist()}
    assert bits
    erase.run(Selection(identities=("person1",)), str(gallery), limit=ErasureLimit(1.0))
    for path in Path(gallery).rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(vector in data for vector in bits), path
            if path.name.startswith("part-"):
                assert not set(pq.read_table(path)["uri"].to_pylist()) & set(chosen["uri"].to_pylist())
    # A new image has to be migrated before the switch.
    new = folder / "new"
    new.mkdir()
    cv2.imwrite(str(new / "a.png"), draw(61))
    embed(new, gallery, {"detect": {"model": "fake-detector"}, "embed": {"model": FAKE}}, runner="inline")
    with pytest.raises(ConfigError, match=r"1 images .* came or changed"):
        migrate.switch(str(gallery))
    assert start(folder).migrated == 1
    migrate.switch(str(gallery))
    assert is_sound(gallery)
    assert {row["identity"] for row in rows(gallery)} == {"person0", "person2", None}


def test_an_index_of_the_old_model_is_not_searched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = folder / "g"
    start(folder)
    with monkeypatch.context() as patch:
        patch.setattr(migrate, "_bring_index", lambda *_: False)
        migrate.switch(str(gallery))
    with pytest.raises(IndexingError, match="is of fake-embedder, and the gallery has the vectors of long"):
        search(SearchConfig(), str(gallery), str(gallery), str(folder / "hits.parquet"))
    assert index.run(IndexConfig(), str(gallery)).action == "built"
    search(SearchConfig(), str(gallery), str(gallery), str(folder / "hits.parquet"))


def test_what_cannot_be_migrated(folder: Path) -> None:
    gallery = folder / "g"
    with pytest.raises(ModelError, match="no embedder is called 'nothing'"):
        start(folder, "nothing")
    with pytest.raises(ModelError, match="commercial"):
        start(folder, write_onnx_model(folder, "closed", licence="non-commercial research"), policy="commercial")
    with pytest.raises(ModelError, match="64 to 1024"):
        start(folder, write_onnx_model(folder, "short", dim=32))
    assert not (gallery / "migration").exists()
    # A second model waits until the first one is switched, or its folder is deleted.
    start(folder)
    with pytest.raises(ContractError, match="embedder: the gallery has long, asked for is other"):
        start(folder, write_onnx_model(folder, "other"))
    np.random.default_rng(0).normal(size=(5, 64)).astype("<f4").tofile(folder / "f.bin")
    adopt.run(AdoptConfig(str(folder / "f.bin"), dim=64), str(folder / "features"))
    with pytest.raises(ConfigError, match="no images to embed again"):
        migrate.run(MigrateConfig(str(folder / "long.toml")), str(folder / "features"))
    code, _, err = run_facepipe("migrate", gallery)
    assert (code, "give --embedder MODEL, --switch or --drop-old" in err) == (2, True)


def test_the_command(folder: Path) -> None:
    code, out, err = run_facepipe("migrate", folder / "g", "--embedder", folder / "long.toml", "--switch", "--quiet")
    assert (code, "switched" in out, "60" in out) == (0, True, True), err
    code, out, _ = run_facepipe("migrate", folder / "g", "--drop-old", "--json")
    assert (code, json.loads(out)["deleted"] > 0) == (0, True)


def test_info_says_how_far_a_migration_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, stopped on the way, complete, and after the switch."""
    gallery = folder / "g"

    def read_info() -> dict[str, Any]:
        described: dict[str, Any] = json.loads(run_facepipe("info", gallery, "--json")[1])["migration"]
        return described

    assert read_info() == {}
    written: list[None] = []
    real = migrate._Migration._write

    def stop(self: Any, *words: Any) -> None:
        if len(written) == 1:
            assert read_info()["state"] == "a run writes to it"
            raise KeyboardInterrupt
        real(self, *words)
        written.append(None)

    with monkeypatch.context() as patch:
        patch.setattr(migrate._Migration, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            start(folder)
    half = read_info()
    assert (half["embedder"], half["dim"], half["of"]) == ("long", DIM, 60)
    assert 0 < half["images"] < 60
    assert "--embedder long` resumes it" in half["state"]
    code, out, _ = run_facepipe("info", gallery)
    assert (code, "migration under way" in out) == (0, True)
    start(folder)
    assert read_info()["images"] == 60
    assert "--switch`" in read_info()["state"]
    migrate.switch(str(gallery))
    assert read_info() == {}


def test_a_night_while_a_migration_is_under_way(folder: Path, made: Path) -> None:
    """New images are waited for, photos that left do not come back by the switch, nor does who was erased."""
    inbox = folder / "inbox"
    shutil.copytree(made / "photos", inbox)
    (folder / "night.toml").write_text(
        f'''gallery = "{folder / "n"}"
[[source]]
uri = "{inbox}"
name = "inbox"
identity = "folder"
missing = "erase"
[night]
missing_at_most = 0.5
[detect]
model = "fake-detector"
[embed]
model = "{FAKE}"
[run]
runner = "inline"
'''
    )
    gallery = folder / "n"
    assert run_facepipe("nightly", folder / "night.toml", "--quiet")[0] == 0
    migrate.run(build(MigrateConfig, {"embedder": str(folder / "long.toml")}), str(gallery))
    # The next night a photo is gone, one is new, and a person is erased.
    gone = min((inbox / "person1").iterdir())
    gone.unlink()
    cv2.imwrite(str(inbox / "person2" / "new.png"), draw(61))
    assert run_facepipe("nightly", folder / "night.toml", "--quiet")[0] == 0
    erase.run(Selection(identities=("person0",)), str(gallery), limit=ErasureLimit(1.0))
    expected = rows(gallery, without=VECTOR)
    assert str(inbox / "person2" / "new.png") in {row["uri"] for row in expected}
    with pytest.raises(ConfigError, match=r"1 images .* came or changed"):
        migrate.switch(str(gallery))
    # A night by the old contract goes on until the switch, and catching up is all that is to do.
    summary = migrate.run(build(MigrateConfig, {"embedder": str(folder / "long.toml")}), str(gallery))
    assert summary.migrated == 1
    migrate.switch(str(gallery))
    assert rows(gallery, without=VECTOR) == expected
    assert not {str(gone)} & {row["uri"] for row in expected}
    assert "person0" not in {row["identity"] for row in expected}
    assert is_sound(gallery)
    # The config still names the old model: the night is refused, and nothing is mixed.
    code, _, err = run_facepipe("nightly", folder / "night.toml", "--quiet")
    assert (code != 0, "long" in err) == (True, True)
    text = (folder / "night.toml").read_text().replace(FAKE, str(folder / "long.toml"))
    (folder / "night.toml").write_text(text)
    assert run_facepipe("nightly", folder / "night.toml", "--quiet")[0] == 0
    assert rows(gallery, without=VECTOR) == expected, "who was erased stays out"


def test_a_gallery_in_an_object_store(made: Path, bucket: Any, tmp_path: Path) -> None:
    """There and back, with an index, and an erasure on the way."""
    gallery = "s3://faces/g"
    fakes = {"detect": {"model": "fake-detector"}, "embed": {"model": FAKE}, "source": {"identity": "folder"}}
    for person in ("person0", "person1", "person2"):
        (tmp_path / "few" / person).mkdir(parents=True)
        for path in sorted((made / "photos" / person).iterdir())[:4]:
            shutil.copy(path, tmp_path / "few" / person)
    embed(tmp_path / "few", gallery, fakes, runner="inline", block_smallest=4, block_largest=8)
    index.run(IndexConfig(), gallery)
    before = rows(gallery, without=VECTOR)
    old_vectors = dict(zip(*map(list, Gallery(gallery).vectors()), strict=True))
    config = build(MigrateConfig, {"embedder": str(made / "long.toml"), "commit": 16})
    summary = migrate.run(config, gallery)
    assert (summary.migrated, summary.failed, summary.has_index) == (12, {}, True)
    assert rows(f"{gallery}/migration", without=VECTOR) == before
    erase.run(Selection(identities=("person1",)), gallery, limit=ErasureLimit(1.0))
    before = [row for row in before if row["identity"] != "person1"]
    assert json.loads(run_facepipe("info", gallery, "--json")[1])["migration"]["images"] == 8
    switched = migrate.switch(gallery)
    assert switched.switched
    assert rows(gallery, without=VECTOR) == before
    assert Gallery(gallery).dim == DIM
    index.run(IndexConfig(), gallery)
    vectors = Gallery(gallery).vectors()[1]
    assert (Index(gallery).search(vectors, 1).distances < 1e-3).all()
    assert not verify_gallery(Gallery(gallery)).problems
    assert not [key for key in list_keys(bucket) if key.startswith("g/migration/")], "nothing is left of it"
    # Back again.
    migrate.run(build(MigrateConfig, {"embedder": FAKE}), gallery)
    migrate.switch(gallery)
    for face, vector in zip(*Gallery(gallery).vectors(), strict=True):
        assert np.allclose(vector, old_vectors[face], atol=1e-5)
    assert rows(gallery, without=VECTOR) == before
    assert migrate.drop_old(gallery).deleted > 0
    assert not verify_gallery(Gallery(gallery)).problems
    assert not Path("s3:").exists()


def list_keys(bucket: Any) -> list[str]:
    """List the keys of a small bucket."""
    pages = bucket.get_paginator("list_objects_v2").paginate(Bucket="faces")
    return [entry["Key"] for page in pages for entry in page.get("Contents", ())]


KILLER = """
import os, signal, sys
from facepipe import storage
from facepipe.storage import conditional
from pipelines import migrate
count = 0
def counted(real):
    def write(*args, **kwargs):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return write
places = (
    (storage, "write"), (storage, "delete"), (conditional, "create"), (os, "replace"), (os, "link"), (os, "unlink"),
)
for owner, name in places:
    setattr(owner, name, counted(getattr(owner, name)))
for path, at in zip(sys.argv[2::2], map(int, sys.argv[3::2])):
    if os.fork() == 0:
        migrate.run(migrate.MigrateConfig(sys.argv[1], commit=16, threads=1), path)
        migrate.switch(path)
        print(count, flush=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_killed_in_any_place_it_goes_on(folder: Path, tmp_path: Path) -> None:
    """SIGKILL at the n-th write of a migration and its switch."""
    script = tmp_path / "kill.py"
    script.write_text(KILLER)

    def run_killed(*words: object) -> list[int]:
        command = [sys.executable, str(script), str(folder / "long.toml"), *map(str, words)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        return [int(line) for line in found.stdout.splitlines()]

    before = rows(folder / "g", without=VECTOR)
    shutil.copytree(folder / "g", tmp_path / "undisturbed")
    total, code = run_killed(tmp_path / "undisturbed", -1)
    assert (code, total > 20) == (0, True)
    expected = read_vectors(tmp_path / "undisturbed")
    places = [(tmp_path / f"at{at}", at) for at in np.linspace(2, total - 1, 4).astype(int).tolist()]
    for copy, _ in places:
        shutil.copytree(folder / "g", copy)
    ends = run_killed(*(word for place in places for word in place))
    assert ends.count(-signal.SIGKILL) >= len(places) - 1, "the last writes may differ"
    for copy, _ in places:
        # What is there is one model's: the old one's, or the new one's.
        gallery = Gallery(str(copy))
        assert gallery.dim == gallery.vectors()[1].shape[1]
        if gallery.dim != DIM:
            migrate.run(MigrateConfig(str(folder / "long.toml"), commit=16), str(copy))
        if (copy / "migration").exists():
            migrate.switch(str(copy))
        assert rows(copy, without=VECTOR) == before
        found = read_vectors(copy)
        assert found.keys() == expected.keys()
        assert all(np.allclose(found[n], expected[n], atol=1e-6) for n in found)
        index.run(IndexConfig(), str(copy))
        assert is_sound(copy)


@pytest.mark.slow
def test_killed_ten_times_on_the_way_it_ends_as_if_undisturbed(folder: Path, tmp_path: Path) -> None:
    """One migration, killed at random writes ten times, in commits of four images."""
    script = tmp_path / "kill.py"
    script.write_text(KILLER.replace("commit=16", "commit=4"))
    cluster.run(build(ClusterConfig, {"run": {"runner": "inline"}, "graph": {"threshold": 0.3}}), str(folder / "g"))
    clusters = tables.read_cluster_table(str(folder / "g"), tables.FACES).sort_by("face_id")
    before = rows(folder / "g", without=VECTOR)
    shutil.copytree(folder / "g", tmp_path / "undisturbed")
    killed = folder / "g"
    # So few writes bring a run to some commits, but not to its end.
    random = np.random.default_rng(22)
    places = [(tmp_path / "undisturbed", -1)] + [(killed, int(at)) for at in random.integers(2, 24, 10)]
    command = [sys.executable, str(script), str(folder / "long.toml"), *(str(word) for one in places for word in one)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    ends = [int(line) for line in found.stdout.splitlines()][2:]
    assert ends.count(-signal.SIGKILL) == 10, found.stderr
    assert Gallery(str(killed)).dim == 128, "still before the switch"
    start(folder)
    migrate.switch(str(killed))
    assert rows(killed, without=VECTOR) == before
    expected = read_vectors(tmp_path / "undisturbed")
    vectors = read_vectors(killed)
    assert vectors.keys() == expected.keys()
    assert all(np.allclose(vectors[n], expected[n], atol=1e-6) for n in vectors)
    assert tables.read_cluster_table(str(killed), tables.FACES).sort_by("face_id").equals(clusters)
    assert is_sound(killed)


def test_from_dlib_to_mobilefacenet_and_back(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("img1.jpg", "img5.jpg", "img11.jpg", "img21.jpg"):
        shutil.copy(shared / "data" / "photos-dev" / name, tmp_path / "photos")
    shutil.copy(shared / "weights" / "mobilefacenet-128-casia.ckpt", tmp_path / "casia.ckpt")
    (tmp_path / "casia.toml").write_text('name = "casia"\narchitecture = "mobilefacenet"\nweights = "casia.ckpt"\n')
    embed(tmp_path / "photos", tmp_path / "g", runner="inline")
    before = rows(tmp_path / "g", without=VECTOR)
    old_vectors = read_vectors(tmp_path / "g")
    assert len(old_vectors) >= 4
    start(tmp_path, str(tmp_path / "casia.toml"))
    migrate.switch(str(tmp_path / "g"))
    new_vectors = read_vectors(tmp_path / "g")
    assert min(float(np.abs(new_vectors[n] - vector).max()) for n, vector in old_vectors.items()) > 0.05
    # What the checkpoint gives through `embed`.
    whole = {"embed": {"model": str(tmp_path / "casia.toml")}}
    embed(tmp_path / "photos", tmp_path / "whole", whole, runner="inline")
    expected = read_vectors(tmp_path / "whole")
    assert all(np.allclose(new_vectors[n], expected[n], atol=1e-5) for n in old_vectors)
    start(tmp_path, "dlib-resnet")
    migrate.switch(str(tmp_path / "g"))
    back = read_vectors(tmp_path / "g")
    assert all(np.allclose(back[n], vector, atol=1e-5) for n, vector in old_vectors.items())
    assert rows(tmp_path / "g", without=VECTOR) == before
