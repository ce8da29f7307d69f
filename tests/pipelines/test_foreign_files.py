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
from facepipe.errors import ConfigError, StorageError
from facepipe.gallery import Gallery
from facepipe.index import manifest as manifests
from facepipe.training.data.config import DataConfig
from facepipe.training.trainer.checkpointing import CheckpointFolder
from jobs.demo import __main__ as demo
from pipelines import clean, erase, index
from pipelines.chips.prepare import owns_chip_file, prepare_chips
from pipelines.chips.run import ChipRunConfig
from pipelines.cluster import assign
from pipelines.cluster import pipeline as cluster
from pipelines.dedup import incremental
from pipelines.dedup import pipeline as dedup
from pipelines.nightly import run as run_night
from pipelines.nightly.config import NightlyConfig
from pipelines.runtime import crash_marks
from pipelines.train.outputs import delete_outputs, prepare_output

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
        patch.setattr("facepipe.erasure.steps._ErasureSteps._clean_reports", stop)
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


@pytest.mark.parametrize("ending", ["", ".old"])
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


def test_a_folder_that_looks_like_one_of_an_interrupted_run_is_left_alone(place: Path) -> None:
    """A run works in a folder that has the id of its lease in its name."""
    folder = place / "g" / "reports" / "clean.partial"
    fill_with_foreign_files(folder)
    (folder / "clean.txt").write_text("my own list")
    (place / "g" / "reports" / "graph.partial").symlink_to(folder)
    before = read_tree(folder)
    run_report("clean", str(place / "g"), "")
    assert read_tree(folder) == before
    assert (place / "g" / "reports" / "graph.partial").is_symlink()


@pytest.mark.parametrize("name", ["clean", "clean.old", "graph", "clean/clean.txt"])
def test_a_link_in_the_place_of_a_report_is_refused(place: Path, name: str) -> None:
    """What is written or deleted there would lie elsewhere."""
    home = place / "home"
    shutil.copytree(place / "g" / "reports" / "clean", home)
    path = place / "g" / "reports" / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
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


# ------------------------------------------------------------------ the table


def test_files_beside_the_parts_stay(place: Path) -> None:
    """Before, `erase` and `compact` deleted every Parquet file below faces/ that the table did not name."""
    faces = place / "g" / "faces"
    fill_with_foreign_files(faces)
    fill_with_foreign_files(faces / "_delta_log" / "mine")
    (faces / "_delta_log" / "mine" / "x.tmp").write_text("mine")
    (faces / "_delta_log" / "notes.tmp").write_text("mine")
    (faces / "_delta_log" / "draft#1").write_text("mine")
    for name in ("mine/part-1.parquet", "backup.parquet", "part-of-my-thesis.parquet"):
        (faces / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"x": [1]}), faces / name)
    (faces / f"part-x-000000-{'0' * 32}.parquet").symlink_to(place / "other" / "faces")
    leftovers = [
        *(f"part-x-000001-{'0' * 32}.parquet", "part-00001-0a1b2c3d-0000-1111-2222-0123456789ab-c000.zstd.parquet"),
        *("_delta_log/00000000000000000009.json#1", "_delta_log/_last_checkpoint#2"),
    ]
    foreign = {name for name in list_tree(faces) if name not in {f["path"] for f in Gallery(str(place / "g")).files()}}
    foreign = {name for name in foreign if not name.startswith("_delta_log/0")}
    before = {name: (faces / name).read_bytes() for name in foreign if (faces / name).is_file()}
    for name in leftovers:
        (faces / name).write_bytes(b"of a run that was killed")
    assert run_facepipe("compact", place / "g", "--all", "--set", "compact.keep_hours=0")[0] == 0
    code, out, err = run_facepipe("erase", place / "g", "--identity", "person1", "--json")
    assert code == 0, err
    assert foreign <= list_tree(faces)
    assert {name: (faces / name).read_bytes() for name in before} == before
    assert not set(leftovers) & list_tree(faces)
    receipt = load_receipt(json.loads(out)["receipts"][0])
    assert check_erased(Gallery(str(place / "g")), receipt) == []


def test_a_part_that_another_program_named_is_deleted_once_it_left_the_table(place: Path) -> None:
    gallery = Gallery(str(place / "g"))
    log = place / "g" / "faces" / "_delta_log" / "00000000000000000001.json"
    name = gallery.files()[0]["path"]
    (place / "g" / "faces" / name).rename(place / "g" / "faces" / "data.parquet")
    log.write_text(log.read_text().replace(name, "data.parquet"))
    assert run_facepipe("erase", place / "g", "--identity", "person1")[0] == 0
    assert not (place / "g" / "faces" / "data.parquet").exists()


def test_the_proof_tells_of_a_parquet_file_beside_the_parts(place: Path) -> None:
    faces = place / "g" / "faces"
    shutil.copy(faces / Gallery(str(place / "g")).files()[0]["path"], faces / "backup.parquet")
    summary = erase.run(Selection(identities=("person1",)), str(place / "g"))
    problems = check_erased(Gallery(str(place / "g")), load_receipt(summary.receipts[0]))
    assert problems == ["faces/backup.parquet: facepipe did not write it, and it holds erased rows"]
    assert (faces / "backup.parquet").exists()


# ------------------------------------------------------------------ runs and erasures


def test_crash_marks_are_told_from_other_files(tmp_path: Path) -> None:
    """Before, every file in a folder below runs/ was deleted by each `embed`, also through a link to another disk."""
    disk = tmp_path / "disk"
    fill_with_foreign_files(disk / "project")
    run = "20261101T000000-0a1b2c"
    foreign = {
        *("project/suspects", "project/missing", "project/Read/block-1", f"{run}/notes.txt", f"{run}/Read/notes"),
        *(f"{run}/block-1", f"{run}/a/b/block-1", "suspects", f"{run}/Read/block-1.bak"),
    }
    marks = {f"{run}/suspects", f"{run}/missing", f"{run}/Read-Decode/block-1", f"{run}/Read/image-0123456789abcdef"}
    for name in foreign | marks:
        (disk / name).parent.mkdir(parents=True, exist_ok=True)
        (disk / name).write_text("0123456789abcdef 1\n")
    (disk / run / "Read" / "block-7").symlink_to(disk / "project" / "draft.new")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "runs").symlink_to(disk)
    before = read_tree(disk)
    runs = str(tmp_path / "g" / "runs")
    assert crash_marks.inherit_crash_marks(runs, "20261102T000000-000000") == 1
    crash_marks.delete_crash_marks(runs)
    assert read_tree(disk) == {name: data for name, data in before.items() if name not in marks}
    assert (disk / "project" / "empty").is_dir()


def test_the_folder_of_receipts_keeps_what_is_not_of_an_erasure(place: Path) -> None:
    erased = place / "g" / "erased"
    fill_with_foreign_files(erased)
    unfinished = erased / "20261101T000000-0a1b2c.state.new"
    unfinished.write_text("of a run that was killed")
    before = read_tree(erased)
    assert run_facepipe("erase", place / "g", "--identity", "person1")[0] == 0
    after = read_tree(erased)
    assert {name: after.get(name) for name in before if name != unfinished.name} == {
        name: data for name, data in before.items() if name != unfinished.name
    }
    assert not unfinished.exists()


# ------------------------------------------------------------------ outputs of other commands


def make_queries(path: Path) -> str:
    pq.write_table(pa.table({"embedding": pa.array(Faces().draw(np.arange(4), 9000).tolist())}), path)
    return str(path)


@pytest.mark.parametrize("out", ["out.parquet", "out"])
def test_a_search_keeps_what_is_not_its_own(place: Path, out: str) -> None:
    queries = make_queries(place / "queries.parquet")
    work = place / f"{out}.partial"
    work.mkdir()
    (work / "part-of-my-thesis.parquet").write_text("months of work")
    code, _, err = run_facepipe("search", place / "g", queries, place / out)
    assert (code, "is not of a search" in err) == (2, True)
    assert os.listdir(work) == ["part-of-my-thesis.parquet"]
    # In the folder of an interrupted search the parts of another search go, and nothing else.
    shutil.rmtree(work)
    fill_with_foreign_files(work)
    (work / "part-of-my-thesis.parquet").write_text("months of work")
    before = read_tree(work)
    (work / "job.json").write_text("another search")
    (work / "part-000000.parquet").write_text("of another search")
    (work / "linked").symlink_to(place / "other")
    assert run_facepipe("search", place / "g", queries, place / out)[0] == 0
    assert read_tree(work) == before
    assert (work / "linked").is_symlink()
    assert pq.read_table(place / out).num_rows > 0


def test_a_search_replaces_its_own_output_only(place: Path) -> None:
    """Before, any file of that name was replaced, also the queries themselves."""
    queries = make_queries(place / "queries.parquet")
    data = Path(queries).read_bytes()
    code, _, err = run_facepipe("search", place / "g", queries, queries)
    assert (code, "is not the output of a search" in err) == (2, True)
    assert Path(queries).read_bytes() == data
    out = place / "out.parquet"
    for _ in range(2):
        assert run_facepipe("search", place / "g", queries, out)[0] == 0
    out.unlink()
    out.symlink_to(place / "nowhere")
    assert run_facepipe("search", place / "g", queries, out)[0] == 2


def test_a_bulk_search_replaces_its_own_objects_only(bucket: Any, place: Path) -> None:
    queries = make_queries(place / "queries.parquet")
    config = place / "bulk.toml"
    for output in ("s3://faces/out.parquet", "s3://faces/out"):
        config.write_text(f'gallery = "{place}/g"\nqueries = "{queries}"\noutput = "{output}"\n')
        name = output if output.endswith(".parquet") else f"{output}/part-000000.parquet"
        storage.write(name, Path(queries).read_bytes())
        code, _, err = run_facepipe("bulk-search", config)
        assert (code, "is not the output of a search" in err) == (2, True)
        assert storage.read(name.encode()) == Path(queries).read_bytes()
        storage.delete(name)
        for _ in range(2):
            assert run_facepipe("bulk-search", config)[0] == 0
        assert storage.file_exists(name)


def test_chips_of_other_data_keep_what_is_not_theirs(drawings: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chips"
    fill_with_foreign_files(folder)
    (folder / "plan.json").write_text('{"of": "somebody else"}')
    before = read_tree(folder)
    with pytest.raises(ConfigError, match="is not a chip set"):
        make_chips(drawings, folder)
    assert {name: data for name, data in read_tree(folder).items() if not name.startswith(".lock")} == before
    shutil.rmtree(folder)
    make_chips(drawings, folder)
    fill_with_foreign_files(folder)
    for name in ("parts", "marks"):
        (folder / name).mkdir()
        (folder / name / "thesis.tex").write_text("months of work")
    (folder / "chips-of-the-old-block.partial").write_text("mine")
    (folder / "chips-00007.arrow").symlink_to(drawings)
    own = {name for name in list_tree(folder) if owns_chip_file(name) and not (folder / name).is_symlink()}
    before = {name: data for name, data in read_tree(folder).items() if name not in own and not name.startswith(".")}
    assert len(make_chips(drawings, folder, min_images=2)) == 40
    assert read_tree(folder).items() >= before.items()
    assert (folder / "chips-00007.arrow").is_symlink()
    assert (folder / "empty").is_dir()


def make_chips(source: Path, folder: Path, **settings: Any) -> Any:
    data = build(DataConfig, {"source": str(source), "detector": "fake-detector", **settings})
    return prepare_chips(data, "fake-embedder", str(folder), ChipRunConfig(runner="inline"))


def test_a_training_begins_in_a_folder_of_its_own(tmp_path: Path) -> None:
    output = tmp_path / "output"
    for name in ("model.toml", "manifest.json", "report.html", "checkpoints/best.ckpt"):
        shutil.rmtree(output, ignore_errors=True)
        (output / name).parent.mkdir(parents=True)
        (output / name).write_text('{"mine": 1}')
        with pytest.raises(ConfigError, match="which no training wrote"):
            prepare_output(str(output))
        assert list_tree(output) == {name}
    # What has no name of ours is no hindrance, and `--fresh` leaves it alone.
    shutil.rmtree(output)
    fill_with_foreign_files(output)
    prepare_output(str(output))
    for name in ("checkpoints", "tensorboard"):
        fill_with_foreign_files(output / name)
    (output / "checkpoints" / "resnet50.ckpt").write_text("somebody's weights")
    (output / "checkpoints" / "resnet50.damaged").write_text("somebody's weights")
    (output / "checkpoints" / "best.ckpt.new").symlink_to(output / "old.parquet")
    before = read_tree(output)
    own = ("model.toml", "checkpoints/last.ckpt", "checkpoints/last-1.damaged", "checkpoints/best.ckpt.0a1b2c3d.new")
    for name in (*own, "tensorboard/events.out.tfevents.1700000000.host.1.0"):
        (output / name).write_text("ours")
    with CheckpointFolder(str(output)).lock():
        assert not (output / "checkpoints" / "best.ckpt.0a1b2c3d.new").exists()
        delete_outputs(str(output))
    after = read_tree(output)
    assert {name: data for name, data in after.items() if name != "checkpoints/lock"} == before


def test_outputs_of_an_older_training_are_known(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"facepipe": "0.1.0", "torch": "2", "steps": 3}))
    (tmp_path / "model.toml").write_text("")
    prepare_output(str(tmp_path))
    delete_outputs(str(tmp_path))
    assert list_tree(tmp_path) == {".facepipe-training"}


def test_the_demo_deletes_what_a_demo_made(tmp_path: Path) -> None:
    """Before, `python -m jobs.demo ~` deleted ~/photos."""
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "mine.jpg").write_bytes(b"my photo")
    with pytest.raises(ConfigError, match="is not of a demo"):
        demo.clear_folders(tmp_path)
    assert (photos / "mine.jpg").exists()
    others = {path.name for path in photos.iterdir()}
    (photos / "obama_1.jpg").write_bytes(b"of the demo")
    demo.mark_folder(tmp_path, others)
    make_gallery(tmp_path / "gallery")
    (tmp_path / "gallery" / "notes.txt").write_text("mine")
    demo.clear_folders(tmp_path)
    assert list_tree(tmp_path) == {".facepipe-demo", "photos/mine.jpg", "gallery/notes.txt"}


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
