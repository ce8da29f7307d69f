"""Files that facepipe did not write, in every folder that it deletes from or replaces: they stay, whatever they hold."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append
from bench.galleries import rows as drawn
from helpers import run_facepipe

from facepipe import storage
from facepipe.config import build
from facepipe.curation import report_folders
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.selection import Selection
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.index import manifest as manifests
from pipelines import clean, erase, index
from pipelines.cluster import assign
from pipelines.cluster import pipeline as cluster
from pipelines.dedup import incremental
from pipelines.dedup import pipeline as dedup
from pipelines.nightly import run as run_night
from pipelines.nightly.config import NightlyConfig

PERSONS, EACH = 8, 4
GRAPH = {"graph": {"threshold": 0.41}}
REPORTS = ("dedup-new", "dedup", "overlap", "cluster", "clean")


def make_gallery(path: Path, first: int = 0) -> Gallery:
    persons = np.repeat(np.arange(PERSONS), EACH)
    gallery = Gallery.create(str(path), CONTRACT)
    append(gallery, [drawn(persons, Faces().draw(persons, first), first)], "20261101T000000-000000")
    return Gallery(gallery.path)


def run_report(name: str, gallery: str, other: str) -> None:
    """Make one report of a gallery; `overlap` is what it shares with the other one."""
    if name == "dedup-new":
        incremental.run(build(dedup.DedupConfig, GRAPH), gallery)
    elif name in ("dedup", "overlap"):
        dedup.run(build(dedup.DedupConfig, GRAPH), gallery, other if name == "overlap" else None)
    elif name == "cluster":
        cluster.run(build(cluster.ClusterConfig, GRAPH), gallery)
    else:
        clean.run(build(clean.CleanConfig, GRAPH), gallery)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the gallery `g`, which has an index and every report, and a second gallery `other`."""
    folder = tmp_path_factory.mktemp("made")
    index.run(index.IndexConfig(), make_gallery(folder / "g").path)
    make_gallery(folder / "other", 1000)
    for name in REPORTS:
        run_report(name, str(folder / "g"), str(folder / "other"))
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "in", symlinks=True)
    return tmp_path / "in"


def list_tree(folder: Path) -> set[str]:
    """All files and links below a folder; links are not followed."""
    names = set()
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        names |= {os.path.relpath(os.path.join(parent, name), folder) for name in [*files, *links]}
    return names


def read_tree(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in list_tree(folder) if (folder / name).is_file()}


def fill_with_foreign_files(folder: Path) -> None:
    """Files of somebody else, none of which says anything about a face: most cannot be read as what their name says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_log.json").write_text('{"step": 1}\n{"step": 2}\n')
    (folder / "settings.json").write_text('{\n  // a comment\n  "lr": 0.1\n}\n')
    (folder / "old.parquet").write_bytes(b"not parquet after all")
    (folder / "half.npz").write_bytes(b"PK\x03\x04 cut short")
    np.savez(folder / "objects.npz", a=np.array([{"x": 1}], object))
    (folder / "draft.new").write_text("my only copy")
    (folder / "latin1.html").write_bytes("<title>r\xe9sum\xe9</title>".encode("latin-1"))
    (folder / "latin1.csv").write_bytes(b'a,b\n"\xe9, not closed\n')
    (folder / "noise.txt").write_bytes(bytes(range(256)))
    (folder / "sums.npz").write_bytes(b"not ours")
    for name in ("graph", "backup.old", "thesis.partial", "shard-0123456789ab"):
        (folder / name).mkdir()
        (folder / name / "thesis.tex").write_text("months of work")
    (folder / "empty").mkdir()


# ------------------------------------------------------------------ which files are ours


@pytest.mark.parametrize("name", REPORTS)
def test_every_file_of_a_report_is_known_as_ours(made: Path, name: str) -> None:
    """If this fails, a report has a new file: name it in facepipe.curation.report_folders."""
    folder = report_folders.inspect_folder(str(made / "g" / "reports" / name))
    assert folder is not None
    assert folder.others == []
    assert report_folders.MARKER in folder.files
    assert len(folder.files) > 5


def test_every_file_of_the_graph_is_known_as_ours(made: Path) -> None:
    folder = report_folders.inspect_folder(str(made / "g" / "reports" / "graph"))
    assert folder is not None
    assert folder.others == []


@pytest.mark.parametrize("name", ["dedup", "cluster", "clean", "graph"])
@pytest.mark.parametrize("beside", [[], ["notes.txt"]])
def test_reports_of_older_versions_are_known_by_their_files(place: Path, name: str, beside: list[str]) -> None:
    """They have no marker. A folder of somebody else that has the name of a report is none."""
    folder = place / "g" / "reports" / name
    (folder / report_folders.MARKER).unlink()
    for other in beside:
        (folder / other).write_text("mine")
    found = report_folders.inspect_folder(str(folder))
    assert found is not None
    assert found.others == beside
    shutil.rmtree(folder)
    fill_with_foreign_files(folder)
    (folder / "report.html").write_text("<html>my own page")
    assert report_folders.inspect_folder(str(folder)) is None


# ------------------------------------------------------------------ erase


def test_erase_leaves_foreign_files_below_reports_alone(place: Path) -> None:
    """Before, nine of these files were deleted in the folder, and the same nine through the link."""
    home = place / "home"
    reports = place / "g" / "reports"
    fill_with_foreign_files(home)
    for folder in (reports / "mine", reports / "dedup", reports / "deep" / "er", reports / "clean.bak"):
        shutil.copytree(home, folder, dirs_exist_ok=True)
    (reports / "notes.txt").write_text("mine")
    (reports / "linked").symlink_to(home)
    (reports / "linked.old").symlink_to(home)
    (reports / "cluster.partial").symlink_to(home)
    (reports / "dedup" / "link.parquet").symlink_to(home / "old.parquet")
    before = read_tree(home)
    foreign = {n for n in list_tree(reports) if not n.startswith((".", "graph/")) and not is_ours(n)}
    kept = {name: (reports / name).read_bytes() for name in foreign if (reports / name).is_file()}
    code, out, err = run_facepipe("erase", place / "g", "--identity", "person1", "--json")
    assert (code, json.loads(out)["foreign"]) == (0, []), err
    assert read_tree(home) == before
    assert (home / "empty").is_dir()
    assert {n for n in foreign if os.path.lexists(reports / n)} == foreign
    assert {name: (reports / name).read_bytes() for name in kept} == kept
    assert not (reports / "graph").exists(), "the vectors of the erased are gone"
    receipt = json.loads(out)["receipts"][0]
    assert check_erased(Gallery(str(place / "g")), load_receipt(receipt)) == []


def is_ours(name: str) -> bool:
    folder, _, inner = name.partition("/")
    report = report_folders.get_report_name(folder)
    return bool(report and inner and report_folders.owns_file(report, inner))


def as_text(uri: str) -> bytes:
    return f"see {uri}, please\n".encode()


def as_parquet(uri: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"anything": [uri, "x"]}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("notes.txt", as_text),
        ("notes.md", as_text),
        ("mine/own.parquet", as_parquet),
        ("mine/broken.parquet", as_text),
        ("mine/page.html", as_text),
        ("mine/list.csv", as_text),
        ("dedup/notes.json", as_text),
        ("dedup/own.parquet", as_parquet),
        ("graph/notes", as_text),
        ("clean.bak/graph/x.npz", as_text),
    ],
)
def test_a_foreign_file_that_names_an_erased_person_is_named_and_stays(
    place: Path, name: str, write: Callable[[str], bytes]
) -> None:
    gallery = Gallery(str(place / "g"))
    uri = gallery.to_arrow(["uri"], "identity = 'person1'")["uri"][0].as_py()
    path = place / "g" / "reports" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(write(uri))
    data = path.read_bytes()
    code, out, err = run_facepipe("erase", gallery.path, "--identity", "person1", "--json")
    assert (code, json.loads(out)["foreign"]) == (1, [str(path)])
    assert str(path) in err
    assert path.read_bytes() == data
    # The erasure is complete all the same; the proof tells of the file until somebody deletes it.
    receipt = load_receipt(json.loads(out)["receipts"][0])
    problems = check_erased(Gallery(gallery.path), receipt)
    assert [problem.split(":")[0] for problem in problems] == [f"reports/{name}"]
    path.unlink()
    assert check_erased(Gallery(gallery.path), receipt) == []


def test_a_night_tells_of_such_a_file(place: Path) -> None:
    gallery = Gallery(str(place / "g"))
    uri = gallery.to_arrow(["uri"], "identity = 'person1'")["uri"][0].as_py()
    (place / "g" / "reports" / "notes.txt").write_bytes(as_text(uri))

    class StopError(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.erase._Erasure._scrub_reports", stop)
        with pytest.raises(StopError):
            erase.run(Selection(identities=("person1",)), gallery.path)
    (place / "photos").mkdir()
    night = {"gallery": gallery.path, "source": [{"uri": str(place / "photos"), "name": "p", "missing": "keep"}]}
    config = build(NightlyConfig, night, {"night": {"dedup": False, "clusters": "no"}})
    summary = run_night(config)
    assert ["notes.txt" in line for line in summary.failures] == [True]


# ------------------------------------------------------------------ reports are replaced


@pytest.mark.parametrize("name", REPORTS)
def test_what_lies_beside_a_report_survives_the_next_one(place: Path, name: str) -> None:
    """Before, the folder was replaced as a whole, and so was the graph's."""
    home = place / "home"
    fill_with_foreign_files(home)
    reports = place / "g" / "reports"
    for folder in (name, "graph"):
        shutil.copytree(home, reports / folder, dirs_exist_ok=True)
    (reports / name / "linked").symlink_to(home)
    (reports / name / "linked.txt").symlink_to(home / "noise.txt")
    fill_with_foreign_files(reports / f"{name}.partial")
    (reports / f"{name}.partial" / report_folders.MARKER).write_text("{}")
    if name == "overlap":
        shutil.rmtree(reports / "overlap.partial" / "graph")  # it has a graph there of its own
    wanted = {n: data for n, data in read_tree(home).items() if not is_ours(f"{name}/{n}")}
    append(
        Gallery(str(place / "g")),
        [drawn(np.arange(3), Faces().draw(np.arange(3), 5000), 5000)],
        "20261102T000000-000000",
    )
    index.run(index.IndexConfig(), str(place / "g"))
    page = (reports / name / "report.html").stat().st_ino
    run_report(name, str(place / "g"), str(place / "other"))
    assert (reports / name / "report.html").stat().st_ino != page
    for folder in (name, "graph"):
        if folder == name and name == "overlap":
            continue  # its own graph/ takes the place of a folder of that name
        assert read_tree(reports / folder).items() >= wanted.items(), folder
    assert (reports / name / "empty").is_dir()
    assert {p.name for p in (reports / name).iterdir() if p.is_symlink()} == {"linked", "linked.txt"}
    assert read_tree(home).items() >= wanted.items()
    # What was in the unfinished folder got another name where one was taken.
    texts = [path.read_text() for path in reports.rglob("draft.new*")]
    assert texts.count("my only copy") >= 2
    assert not (reports / f"{name}.old").exists()
    assert not (reports / f"{name}.partial").exists()


def test_assigning_copies_what_is_ours_and_moves_the_rest(place: Path) -> None:
    report = place / "g" / "reports" / "cluster"
    fill_with_foreign_files(report)
    before = read_tree(report)
    append(
        Gallery(str(place / "g")),
        [drawn(np.arange(3), Faces().draw(np.arange(3), 5000), 5000)],
        "20261102T000000-000000",
    )
    index.run(index.IndexConfig(), str(place / "g"))
    assert assign.run(str(place / "g")).new == 3
    after = read_tree(report)
    assert set(after) == set(before)
    foreign = {name for name in before if not is_ours(f"cluster/{name}")}
    assert len(foreign) > 10
    assert {name: after[name] for name in foreign} == {name: before[name] for name in foreign}


@pytest.mark.parametrize("ending", ["", ".partial", ".old"])
def test_a_folder_of_somebody_else_in_the_place_of_a_report_is_refused(place: Path, ending: str) -> None:
    folder = place / "g" / "reports" / f"clean{ending}"
    shutil.rmtree(folder, ignore_errors=True)
    fill_with_foreign_files(folder)
    (folder / "clean.txt").write_text("my own list")
    before = read_tree(place / "g" / "reports")
    with pytest.raises(StorageError, match="facepipe did not write"):
        run_report("clean", str(place / "g"), "")
    after = read_tree(place / "g" / "reports")
    assert {name: after[name] for name in before if not name.startswith(".lock")}.items() >= {
        name: data for name, data in before.items() if not name.startswith(".lock")
    }.items()


@pytest.mark.parametrize("name", ["clean", "clean.partial", "clean.old", "graph", "graph.partial", "clean/clean.txt"])
def test_a_link_in_the_place_of_a_report_is_refused(place: Path, name: str) -> None:
    """What is written or deleted there would lie elsewhere."""
    home = place / "home"
    shutil.copytree(place / "g" / "reports" / "clean", home)
    path = place / "g" / "reports" / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if name == "graph.partial":
        shutil.rmtree(place / "g" / "reports" / "graph")
    path.symlink_to(home / "clean.txt" if name.endswith(".txt") else home)
    before = read_tree(home)
    with pytest.raises(StorageError, match="is a link"):
        run_report("clean", str(place / "g"), "")
    assert read_tree(home) == before
    assert path.is_symlink()


def test_a_swap_that_was_interrupted_loses_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation on the folders fails, each in turn, and the next run completes what was left."""
    gallery = str(place / "g")
    for folder in ("clean", "graph"):
        (place / "g" / "reports" / folder / "notes.txt").write_text(f"beside {folder}")
    shutil.copytree(place / "g" / "reports", place / "before")
    calls = 0
    failing = 0

    def count(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(5, "Input/output error")
            return real(*args, **kwargs)

        return run

    ends = []
    while not ends or not ends[-1]:
        shutil.rmtree(place / "g" / "reports")
        shutil.copytree(place / "before", place / "g" / "reports")
        shutil.rmtree(place / "g" / "reports" / "clean.old", ignore_errors=True)
        failing += 1
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", count(os.rename))
            patch.setattr(os, "unlink", count(os.unlink))
            try:
                run_report("clean", gallery, "")
                ends.append(calls < failing)
            except StorageError:
                ends.append(False)
        run_report("clean", gallery, "")
        texts = sorted(path.read_text() for path in (place / "g" / "reports").rglob("notes.txt*"))
        assert texts == ["beside clean", "beside graph"], failing
        assert not list((place / "g" / "reports").glob("*.old"))
        assert report_folders.inspect_folder(str(place / "g" / "reports" / "clean")) is not None
    assert len(ends) > 5


# ------------------------------------------------------------------ the index


def test_the_index_on_a_disk_that_holds_other_files(place: Path) -> None:
    """docs/scale.md asks for a fast disk. Before, `index` deleted everything else on it, and `erase` did too."""
    fast = place / "fast"
    fill_with_foreign_files(fast)
    shutil.copytree(place / "other", fast / "other-gallery")
    shutil.copytree(place / "g" / "index", fast, dirs_exist_ok=True)
    shutil.rmtree(place / "g" / "index")
    (place / "g" / "index").symlink_to(fast)
    leftover = fast / "shard-00aa.partial"
    leftover.mkdir()
    (leftover / "vectors.npy").write_bytes(b"of a run that was killed")
    (leftover / "mine.txt").write_text("mine")
    (fast / "shard-00bb").symlink_to(place / "other" / "faces")
    foreign = {name for name in list_tree(fast) if not manifests.is_index_file(name)}
    before = {name: (fast / name).read_bytes() for name in foreign if (fast / name).is_file()}
    assert run_facepipe("index", place / "g", "--retrain")[0] == 0
    assert run_facepipe("erase", place / "g", "--identity", "person1")[0] == 0
    assert foreign <= list_tree(fast)
    for name in before.keys() - {"manifest.json", "manifest.json.guard", ".lock", ".lock.guard"}:
        assert (fast / name).read_bytes() == before[name]
    assert not (leftover / "vectors.npy").exists()
    assert (fast / "empty").is_dir()
    assert Gallery(str(place / "other")).counts()["faces"] == PERSONS * EACH
    manifest = manifests.load(str(place / "g"))
    assert {p.name for p in fast.glob("shard-*") if p.is_dir() and not p.is_symlink()} == {
        *(shard.name for shard in manifest.shards),
        "shard-0123456789ab",
        "shard-00aa.partial",
    }


def test_erase_without_an_index_leaves_its_folder_alone(place: Path) -> None:
    fast = place / "fast"
    fill_with_foreign_files(fast)
    shutil.rmtree(place / "g" / "index")
    (place / "g" / "index").symlink_to(fast)
    before = read_tree(fast)
    assert run_facepipe("erase", place / "g", "--identity", "person1")[0] == 0
    assert read_tree(fast).items() >= before.items()


# ------------------------------------------------------------------ an object store


def test_foreign_objects_stay(bucket: Any, made: Path) -> None:
    path = "s3://faces/team/g"
    append(Gallery.create(path, CONTRACT), [Gallery(str(made / "g")).to_arrow()], "20261101T000000-000000")
    index.run(index.IndexConfig(), path)
    run_report("clean", path, "")
    uri = Gallery(path).to_arrow(["uri"], "identity = 'person1'")["uri"][0].as_py()
    foreign = {
        "index/thesis/data.bin": b"x",
        "index/notes.txt": b"x",
        "reports/notes.txt": b"mine",
        "reports/mine/old.parquet": b"not parquet after all",
        "reports/clean/notes.txt": b"beside the report",
        "reports/graph/thesis.tex": b"months of work",
        "reports/mine/graph/thesis.tex": b"months of work",
    }
    telling = {"reports/told.txt": as_text(uri), "reports/mine/told.json": as_text(uri)}
    for name, data in {**foreign, **telling, "index/shard-00aa.partial/ids.npy": b"left over"}.items():
        storage.write(f"{path}/{name}", data)
    run_report("clean", path, "")
    index.run(index.IndexConfig(), path, retrain=True)
    summary = erase.run(Selection(identities=("person1",)), path)
    assert sorted(summary.foreign) == [f"{path}/{name}" for name in sorted(telling)]
    for name, data in {**foreign, **telling}.items():
        assert storage.read(f"{path}/{name}".encode()) == data, name
    assert not storage.file_exists(f"{path}/index/shard-00aa.partial/ids.npy")
    assert not storage.file_exists(f"{path}/reports/graph/vectors.npy")
