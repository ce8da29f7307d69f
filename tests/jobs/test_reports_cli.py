"""dedup, cluster and clean on the command line: results, messages, exit codes, and their pages in a real browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from helpers import run_facepipe

from facepipe.gallery import Contract, Gallery

DLIB = Contract.from_models("retinaface-mnet025", "dlib-resnet", True)
HOSTILE = [
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "\"'><svg onload=window.pwned=1>",
    "{{ 7 * 7 }}",
    "\u202egpj.exe",
    "../" * 300 + "x",
    "__proto__",
    "constructor",
]


def replace_columns(original: pa.Table, **columns: Any) -> pa.Table:
    for name, values in columns.items():
        at = original.schema.get_field_index(name)
        original = original.set_column(at, original.schema.field(at), pa.array(values, original.schema.field(at).type))
    return original


def make_thumb(n: int) -> bytes:
    noise = np.random.default_rng(n).integers(0, 255, (14, 14, 3), np.uint8)
    return bytes(cv2.imencode(".jpg", cv2.resize(noise, (112, 112)))[1])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 faces of 32 people. Every tenth label is wrong, one image is a copy, and eight names and paths are hostile."""
    path = tmp_path_factory.mktemp("cli") / "g"
    truth = np.repeat(np.arange(32), 10)
    labels = truth.copy()
    labels[::10] = np.roll(truth, 30)[::10]
    table = rows(truth, Faces().draw(truth, 0), 0)
    names = [HOSTILE[n] if n < len(HOSTILE) else f"person{n}" for n in labels]
    uris, ids = table["uri"].to_pylist(), table["image_id"].to_pylist()
    for n, name in enumerate(HOSTILE):
        uris[10 * n] = name  # a face with a wrong label
    ids[11], vectors = ids[12], table["embedding"].to_pylist()
    vectors[11] = vectors[12]
    uris[11] = "<b>copy</b>.jpg"
    pictures = [make_thumb(n % 5) for n in range(320)]
    table = replace_columns(table, identity=names, uri=uris, image_id=ids, embedding=vectors, thumb=pictures)
    append(Gallery.create(str(path), DLIB), [table], "test")
    return path


@pytest.fixture
def gallery(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "g"))


def test_dedup(gallery: Path, tmp_path: Path) -> None:
    code, out, err = run_facepipe("dedup", gallery, "--json", "--keep", "sharpest")
    summary = json.loads(out)
    assert (code, summary["images"], summary["drop"], summary["pairs"]) == (0, 320, 1, {"exact": 1})
    assert "dedup: comparing pictures" in err
    assert summary["out"] == str(gallery / "reports" / "dedup")
    code, out, err = run_facepipe("dedup", gallery, "--quiet", "--drop", "exact")
    assert (code, err) == (0, "")
    assert f"report: {gallery}/reports/dedup/report.html" in out
    assert "images without a hash" in " ".join(out.split()), "the rows have none"
    other = Path(shutil.copytree(gallery, tmp_path / "h"))
    code, out, _ = run_facepipe("dedup", gallery, "--against", other, "--json", "--quiet")
    summary = json.loads(out)
    assert (code, summary["drop"], summary["shared"] >= 32) == (0, 320, True)
    assert run_facepipe("dedup", gallery, "--against", other, "--quiet")[0] == 0


def test_cluster(gallery: Path) -> None:
    code, out, err = run_facepipe("cluster", gallery, "--json")
    summary = json.loads(out)
    assert (code, summary["faces"], summary["clusters"], summary["algorithm"]) == (0, 320, 32, "linkage")
    assert "cluster: 32 clusters: writing" in err
    code, out, _ = run_facepipe("cluster", gallery, "--assign", "--json", "--quiet")
    assert (code, {key: json.loads(out)[key] for key in ("new", "placed", "clusters", "gone")}) == (
        0,
        {"new": 0, "placed": 0, "clusters": 0, "gone": 0},
    )
    code, out, _ = run_facepipe("cluster", gallery, "--assign", "--quiet")
    assert (code, "put into clusters" in out) == (0, True)
    code, out, _ = run_facepipe(
        "cluster", gallery, "--quiet", "--threshold", "0.01", "--identities", "--algorithm", "linkage"
    )
    assert (code, "clusters by linkage" in out) == (0, True)
    code, _, err = run_facepipe("cluster", gallery, "--quiet", "--algorithm", "whispers")
    assert (code, "cluster.algorithm=linkage" in err) == (2, True)


def test_clean(gallery: Path, tmp_path: Path) -> None:
    code, out, err = run_facepipe("clean", gallery, "--json")
    summary = json.loads(out)
    assert (code, summary["labelled"], summary["identities"], summary["decisions"]["relabel"]) == (0, 320, 32, 32)
    assert "clean: 320 labels of 32 identities: judging" in err
    kept = summary["decisions"]["keep"]
    code, out, err = run_facepipe(
        "clean", gallery, "--relabels", "--quiet", "--set", "clean.duplicates=false", "--json"
    )
    assert (code, err, json.loads(out)["listed"]) == (0, "", kept + 1 + 32)
    (tmp_path / "c.toml").write_text("[clean]\nduplicates = false\nmin_face_px = 30\n[graph]\nseed = 7\n")
    code, out, _ = run_facepipe(
        "clean", gallery, "--quiet", "--config", tmp_path / "c.toml", "--min-face-px", "0", "--json"
    )
    assert (code, json.loads(out)["decisions"]["keep"]) == (0, kept + 1)
    code, out, _ = run_facepipe("clean", gallery, "--quiet")
    assert (code, "wrong labels, estimated" in out, "relabel" in out) == (0, True, True)


def test_evaluation_agrees_with_the_truth(gallery: Path, tmp_path: Path) -> None:
    assert run_facepipe("clean", gallery, "--quiet")[0] == 0
    assert run_facepipe("cluster", gallery, "--quiet")[0] == 0
    table = Gallery(str(gallery)).to_arrow(["face_id"])
    truth = np.repeat([HOSTILE[n] if n < len(HOSTILE) else f"person{n}" for n in range(32)], 10)
    pq.write_table(table.append_column("identity", pa.array(truth)), tmp_path / "t.parquet")
    code, out, _ = run_facepipe("evaluate", "clean", gallery, tmp_path / "t.parquet", "--json")
    assert (code, json.loads(out)["detection"]["f"] > 0.95) == (0, True)


@pytest.mark.parametrize("command", ["dedup", "cluster", "clean"])
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["/no/gallery"], 1, "no gallery at"),
        ([], 2, "GALLERY"),
        (["{gallery}", "--wrong"], 2, "--wrong"),
        (["{gallery}", "--set", "graph.treshold=0.4"], 2, "did you mean graph.threshold"),
        (["{gallery}", "--set", "grap.most=3"], 2, "did you mean graph"),
        (["{gallery}", "--set", "graph.most=0"], 2, "graph.most"),
        (["{gallery}", "--set", "graph.recall=2"], 2, "graph.recall"),
        (["{gallery}", "--set", "run.runner=cloud"], 2, "run.runner"),
        (["{gallery}", "--set", "nonsense"], 2, "section.key=value"),
        (["{gallery}", "--config", "/none.toml"], 2, "cannot read the config"),
    ],
)
def test_errors_of_every_report(command: str, words: list[str], code: int, message: str, original: Path) -> None:
    exit_code, out, err = run_facepipe(command, *(word.format(gallery=original) for word in words), "--json")
    assert (exit_code, out) == (code, "")
    assert message in err
    assert not (original / "reports").exists(), "nothing was written"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["dedup", "{gallery}", "--keep", "prettiest"], 2, "keep"),
        (["dedup", "{gallery}", "--drop", "everything"], 2, "drop"),
        (["dedup", "{gallery}", "--against", "{gallery}"], 2, "names the same gallery"),
        (["dedup", "{gallery}", "--against", "/no/gallery"], 1, "no gallery at"),
        (["dedup", "{gallery}", "--set", "dedup.hash_bit=3"], 2, "did you mean dedup.hash_bits"),
        (["cluster", "{gallery}", "--algorithm", "kmeans"], 2, "cluster.algorithm"),
        (["cluster", "{gallery}", "--threshold", "3"], 2, "--threshold"),
        (["cluster", "{gallery}", "--assign"], 1, "`facepipe cluster"),
        (["cluster", "{gallery}", "--set", "cluster.one_foto=false"], 2, "did you mean cluster.one_photo"),
        (["clean", "{gallery}", "--min-face-px", "-1"], 2, "--min-face-px"),
        (["clean", "{gallery}", "--set", "clean.relabel=true"], 2, "did you mean clean.relabels"),
        (["cluster", "{unknown}"], 1, "'synthetic' has no default: set a distance with --threshold"),
        (["clean", "{unknown}"], 1, "'synthetic' has no default: set a distance with --threshold"),
        (["clean", "{unlabelled}"], 1, "`facepipe cluster` finds the persons without labels"),
    ],
)
def test_errors_of_one_command(words: list[str], code: int, message: str, original: Path, tmp_path: Path) -> None:
    few = rows(np.arange(5), Faces().draw(np.arange(5), 0), 0)
    append(Gallery.create(str(tmp_path / "unlabelled"), DLIB), [replace_columns(few, identity=[None] * 5)], "t")
    append(Gallery.create(str(tmp_path / "unknown"), CONTRACT), [few], "t")
    places = {"gallery": original, **{name: tmp_path / name for name in ("unlabelled", "unknown")}}
    exit_code, _, err = run_facepipe(*(word.format(**places) for word in words))
    assert exit_code == code
    assert message in err
    assert not (original / "reports").exists(), "nothing was written"


# ------------------------------------------------------------------ pages


@pytest.fixture(scope="module")
def reports(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(original, tmp_path_factory.mktemp("pages") / "g"))
    for command in ("dedup", "cluster", "clean"):
        assert run_facepipe(command, path, "--quiet")[0] == 0
    return path / "reports"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.PROGRAM is None:
        pytest.skip("no Chromium: `apt-get install chromium` brings one")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("name", "words", "groups"),
    [("dedup", "copy", 1), ("cluster", "000000123", 1), ("clean", "onerror=window", None)],
)
def test_pages_in_a_browser(name: str, words: str, groups: int | None, reports: Path, tab: browser.Browser) -> None:
    page = reports / name / "report.html"
    tab.open(page)
    shown = tab.run("document.querySelectorAll('.group').length")
    assert shown >= 1
    tab.wait("[...document.images].every((image) => image.naturalWidth === 72)")
    assert tab.run("document.images.length") >= 2
    assert tab.run("typeof window.pwned") == "undefined"
    assert tab.run("document.querySelectorAll('b, .faces svg, script').length") == 4, "its own scripts and no other"
    assert tab.run("[...document.images].every((image) => image.src.startsWith('data:image/jpeg'))")
    assert tab.run("document.documentElement.scrollWidth <= innerWidth"), "nothing widens the page"
    tab.press("/", *words)
    matching = "document.querySelectorAll('.group').length"
    tab.wait(f"{matching} === {groups}" if groups else f"{matching} > 0 && {matching} < {shown}")
    text = tab.run("document.getElementById('list').textContent")
    assert words in text
    tab.press(*"zzz")
    tab.wait("document.querySelectorAll('.empty').length === 1")
    tab.press("Escape")
    tab.wait(f"{matching} === {shown}")
    assert tab.messages == []
    assert tab.requests == [page.as_uri()]


def test_hostile_names_are_escaped(reports: Path, tab: browser.Browser) -> None:
    tab.open(reports / "clean" / "report.html", "#size=96")
    titles = tab.run("[...document.querySelectorAll('.group h3')].map((title) => title.textContent)")
    for name in (*HOSTILE[:4], *HOSTILE[6:]):
        assert any(title.startswith(f"{name}: ") for title in titles), name
    assert not any(title.startswith("49") for title in titles), "templates in names are not filled"
    assert "\\u{202e}gpj.exe" in tab.run("document.getElementById('list').textContent"), "what turns text is spelt out"


def test_dedup_keeps_all_copies_that_people_keep(gallery: Path, tmp_path: Path) -> None:
    """The answer `No copies: keep all` of the page."""
    assert run_facepipe("dedup", gallery, "--quiet")[0] == 0
    drop = gallery / "reports" / "dedup" / "drop.txt"
    assert len(drop.read_text().splitlines()) == 1
    ids = Gallery(str(gallery)).to_arrow(["face_id"])["face_id"].to_pylist()
    lines = [json.dumps({"decision": "keep", "face_id": str(face)}) for face in ids]
    (tmp_path / "keep.jsonl").write_text("\n".join(lines))
    assert run_facepipe("apply", gallery, tmp_path / "keep.jsonl")[0] == 0
    assert run_facepipe("dedup", gallery, "--quiet")[0] == 0
    assert drop.read_text() == ""
    # What another gallery holds is dropped all the same.
    other = Path(shutil.copytree(gallery, tmp_path / "h"))
    code, out, _ = run_facepipe("dedup", gallery, "--against", other, "--json", "--quiet")
    assert (code, json.loads(out)["drop"]) == (0, 320)
