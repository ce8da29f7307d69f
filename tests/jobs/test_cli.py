"""The command line: results, messages, exit codes, help, and the docs of every command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from conftest import REPOSITORY, draw
from helpers import run_facepipe

from facepipe.gallery import Gallery
from jobs.reference import list_commands, main

FAKES = ["--set", "detect.model=fake-detector", "--set", "embed.model=fake-embedder", "--runner", "inline", "--quiet"]


@pytest.fixture(scope="module")
def gallery(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "g"
    assert run_facepipe("embed", drawings, path, *FAKES)[0] == 0
    return path


def test_embed_and_read_back(drawings: Path, gallery: Path, tmp_path: Path) -> None:
    code, out, _ = run_facepipe("embed", drawings, gallery, *FAKES, "--json")
    summary = json.loads(out)
    assert (code, summary["skipped"], summary["images"]) == (0, 60, 0)
    code, out, _ = run_facepipe("info", gallery, "--json")
    assert json.loads(out)["counts"]["images"] == 60
    assert run_facepipe("info", gallery)[0] == 0
    code, out, _ = run_facepipe("verify", gallery)
    assert (code, "sound" in out) == (0, True)
    code, out, _ = run_facepipe("export", gallery, tmp_path / "out", "--columns", "uri,identity", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 80)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["embed", "/no/such", "g"], 1, "no such file or folder"),
        (["embed", "{drawings}", "g", "--set", "detect.sise=3"], 2, "did you mean detect.size"),
        (["embed", "{drawings}", "g", "--set", "nonsense"], 2, "section.key=value"),
        (["embed", "{drawings}", "g", "--identity", "nobody"], 2, "is not one of"),
        (["embed", "{drawings}", "g", "--config", "/none.toml"], 2, "cannot read the config"),
        (["embed", "{drawings}", "g", "--set", "embed.model=facenet", "--runner", "inline"], 2, "registered are"),
        (["embed", "{drawings}"], 2, "GALLERY"),
        (["embed", "{drawings}", "g", "--wrong"], 2, "--wrong"),
        (["info", "/no/gallery"], 1, "no gallery at"),
        (["info", "{drawings}"], 1, "if it holds photos, `facepipe embed {drawings} GALLERY` makes a gallery of"),
        (["export", "{gallery}", "out", "--version", "99"], 1, "has no version 99: its newest is "),
        (["search", "{gallery}", "{gallery}", "hits.csv"], 2, "`facepipe identify` writes CSV"),
        (["embed", "a.jpg", "b.jpg", "c.jpg"], 2, "A pattern such as 'photos/*.jpg' needs quotes"),
        (["embed", "{drawings}", "g", "--detector", "arcface"], 2, "no detector is called 'arcface'"),
        (["verify", "/no/gallery"], 1, "no gallery at"),
        (["export", "{gallery}", "/tmp", "--columns", "uri"], 1, "not an empty folder"),
        (["export", "{gallery}", "out", "--where", "nothing = 3"], 2, "no column 'nothing'"),
        (["evaluate", "pairs", "{gallery}", "/no/pairs.txt"], 1, "cannot read the pairs file"),
        (["embedd"], 2, "No such command"),
        (["index", "/no/gallery"], 1, "no gallery at"),
        (["index", "{gallery}", "--memory", "plenty"], 2, "write 512MiB or 4GiB"),
        (["index", "{gallery}", "--memory", "1MiB"], 2, "smallest budget that works"),
        (["index", "{gallery}", "--factory", "HNSW32"], 2, "use Flat or IVF"),
        (["index", "{gallery}", "--recall", "1.5"], 2, "recall"),
        (["index", "{gallery}", "--set", "index.recal=0.9"], 2, "did you mean index.recall"),
        (["search", "{gallery}", "{gallery}", "hits.parquet"], 1, "facepipe index"),
        (["search", "{gallery}"], 2, "GALLERY QUERIES OUT.parquet"),
        (["search", "{gallery}", "--calibrate", "FAR=2"], 2, "FPIR=RATE"),
        (["search", "{gallery}", "a", "b", "--calibrate", "0.1", "--threshold", "0.4"], 2, "leave out one of them"),
        (["evaluate", "index", "{gallery}"], 1, "facepipe index"),
    ],
)
def test_errors(
    words: list[str],
    code: int,
    message: str,
    drawings: Path,
    gallery: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    exit_code, _, err = run_facepipe(*(w.format(drawings=drawings, gallery=gallery) for w in words))
    assert exit_code == code
    # The parser of the command line breaks long lines.
    assert message.format(drawings=drawings) in " ".join(err.split())


def test_exit_codes_of_failed_images(tmp_path: Path) -> None:
    corpus = tmp_path / "c"
    corpus.mkdir()
    (corpus / "bad.jpg").write_bytes(b"x")
    code, _, err = run_facepipe("embed", corpus, tmp_path / "g", *FAKES)
    assert (code, "all 1 images failed" in err) == (1, True)
    cv2.imwrite(str(corpus / "good.png"), draw(1))
    (corpus / "bad2.jpg").write_bytes(b"y")
    assert run_facepipe("embed", corpus, tmp_path / "h", *FAKES)[0] == 0
    code, _, err = run_facepipe("embed", corpus, tmp_path / "i", *FAKES, "--max-failed", "0.5")
    assert (code, "2 of 3 images failed" in err) == (3, True)


def test_an_embedding_ends_with_what_to_know_and_do(tmp_path: Path) -> None:
    corpus = tmp_path / "photos [2024]"
    corpus.mkdir()
    for n in range(5):
        (corpus / f"bad {n}.jpg").write_bytes(b"")
    cv2.imwrite(str(corpus / "good.png"), draw(1))
    gallery = tmp_path / "my gallery"
    lines = run_facepipe("embed", corpus, gallery, *FAKES)[1].splitlines()[-5:]
    assert lines[0].startswith("in: 6 images, 1 faces, ")
    assert lines[1] == "added: 1 faces in 6 rows"
    examples = ", ".join(f"{corpus}/bad {n}.jpg (decode_error: empty file)" for n in range(3))
    assert lines[2] == f"failed: 5 images, such as {examples}; `facepipe info '{gallery}' --failed` names all"
    assert lines[3:] == [f"gallery: {gallery}, version 1", f"next: facepipe index '{gallery}'"]
    lines = run_facepipe("embed", corpus, gallery, *FAKES)[1].splitlines()
    assert lines[-1] == f"next: facepipe info '{gallery}'", "nothing new came in"


def test_a_config_file_and_settings(drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        '[detect]\nmodel = "fake-detector"\n[embed]\nmodel = "fake-embedder"\n[align]\nthumbs = false\n'
    )
    assert (
        run_facepipe("embed", drawings, tmp_path / "g", "--config", tmp_path / "c.toml", "--runner", "inline")[0] == 0
    )
    assert run_facepipe("info", tmp_path / "g")[0] == 0


def test_pairs(gallery: Path, tmp_path: Path) -> None:
    lines = ["file_x,file_y,same"]
    lines += [f"p1_{a:03d}.png,p{(a + d) % 3}_{a + d:03d}.png,{int(d == 0)}" for a in (1, 4, 7, 10) for d in (0, 1)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    code, out, _ = run_facepipe(
        "evaluate", "pairs", gallery, tmp_path / "pairs.csv", "--json", "--picture", tmp_path / "roc.png"
    )
    summary = json.loads(out)
    assert (code, summary["pairs"], summary["accuracy"], summary["auc"]) == (0, 8, 1.0, 1.0)
    assert (tmp_path / "roc.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "pairs.csv").write_text("file_x,file_y,same\nnot-there.png,p1_001.png,1\n")
    code, _, err = run_facepipe("evaluate", "pairs", gallery, tmp_path / "pairs.csv")
    assert (code, "are not in the gallery, such as not-there" in err) == (1, True)


def test_models_and_doctor(tmp_path: Path) -> None:
    assert "public domain" in run_facepipe("models", "--json")[1]
    code, out, _ = run_facepipe("doctor", tmp_path / "not-yet", "--json")
    states = {row["what"]: row["state"] for row in json.loads(out)["findings"]}
    assert (code, states["dlib-resnet"], states["retinaface-mnet025"]) == (0, "ok", "ok")
    assert states[f"disk of {tmp_path / 'not-yet'}"] == states["temporary files"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_index_and_search(drawings: Path, gallery: Path, tmp_path: Path) -> None:
    shutil.copytree(gallery, tmp_path / "g")
    code, out, err = run_facepipe("index", tmp_path / "g", "--json")
    assert (code, json.loads(out)["action"], json.loads(out)["vectors"]) == (0, "built", 60)
    assert "plan: 60 faces" in err
    code, out, _ = run_facepipe("index", tmp_path / "g", "--quiet")
    assert (code, "unchanged" in out) == (0, True)
    code, out, _ = run_facepipe(
        "search", tmp_path / "g", tmp_path / "g", tmp_path / "hits.parquet", "-k", "3", "--json"
    )
    assert (code, json.loads(out)["queries"], json.loads(out)["rows"]) == (0, 60, 180)
    code, out, _ = run_facepipe(
        "search", tmp_path / "g", drawings, tmp_path / "who.parquet", "--threshold", "0.3", "--quiet"
    )
    assert (code, "identified" in out) == (0, True)
    code, out, _ = run_facepipe("evaluate", "index", tmp_path / "g")
    assert (code, "recall@10" in out) == (0, True)
    assert json.loads(run_facepipe("info", tmp_path / "g", "--json")[1])["index"]["up to date"]
    (shard,) = (tmp_path / "g" / "index").glob("shard-*")
    (shard / "vectors.npy").unlink()
    code, out, err = run_facepipe("verify", tmp_path / "g")
    assert (code, "vectors.npy: is missing" in out) == (1, True)
    code, _, err = run_facepipe("search", tmp_path / "g", tmp_path / "g", tmp_path / "again.parquet")
    assert (code, "--repair" in err) == (1, True)
    assert run_facepipe("index", tmp_path / "g", "--repair", "--quiet")[0] == 0
    assert run_facepipe("verify", tmp_path / "g")[0] == 0


def test_calibration(tmp_path: Path) -> None:
    identities, vectors = next(iter(Faces().blocks(2000)))
    append(Gallery.create(str(tmp_path / "g"), CONTRACT), [rows(identities, vectors, 0)], "first")
    assert run_facepipe("index", tmp_path / "g", "--quiet")[0] == 0
    code, out, err = run_facepipe("search", tmp_path / "g", "--calibrate", "FPIR=0.01", "--json")
    point = json.loads(out)
    assert (code, point["false_alarms"] <= 20, 0.1 < point["threshold"] < 0.5) == (0, True, True)
    assert "false alarms" in err
    code, out, _ = run_facepipe(
        "search", tmp_path / "g", tmp_path / "g", tmp_path / "w.parquet", "--calibrate", "0.01", "--json"
    )
    assert (code, json.loads(out)["threshold"]) == (0, point["threshold"])


def test_an_interrupted_index_is_unchanged(tmp_path: Path) -> None:
    identities, vectors = next(iter(Faces().blocks(20_000)))
    append(Gallery.create(str(tmp_path / "g"), CONTRACT), [rows(identities, vectors, 0)], "first")
    command = [sys.executable, "-m", "jobs.cli", "index", str(tmp_path / "g"), "--factory", "IVF4096,PQ64x4fs"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    assert "plan:" in process.stderr.readline()
    time.sleep(0.3)  # training takes seconds
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the index is unchanged" in err
    assert "Traceback" not in err
    assert not (tmp_path / "g" / "index" / "manifest.json").exists()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_keeps_finished_work(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    corpus = tmp_path / "c"
    corpus.mkdir()
    for n in range(400):
        cv2.imwrite(str(corpus / f"{n:03d}.png"), cv2.resize(draw(n), (600, 600), interpolation=cv2.INTER_NEAREST))
    small = ["--set", "run.block_smallest=4", "--set", "run.block_largest=4", "--runner", "local", "--workers", "1"]
    command = [sys.executable, "-m", "jobs.cli", "embed", str(corpus), str(tmp_path / "g"), *FAKES[:4], *small]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ)
    deadline = time.monotonic() + 200  # a busy machine takes long to start
    while len(list((tmp_path / "g").glob("faces/*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    _, err = process.communicate(timeout=90)
    assert process.returncode == code
    assert "run the same command again to resume" in err
    assert "Traceback" not in err
    done = json.loads(run_facepipe("info", tmp_path / "g", "--json")[1])["counts"]["images"]
    assert 0 < done < 400
    out = json.loads(run_facepipe("embed", corpus, tmp_path / "g", *FAKES, "--json")[1])
    assert (out["skipped"], out["images"]) == (done, 400 - done)


@pytest.mark.parametrize(("name", "command"), list(list_commands()))
def test_every_command_is_documented(name: str, command: Any) -> None:
    assert command.help
    assert f"facepipe {name}" in command.help, "an example"
    assert all(getattr(option, "help", None) for option in command.params), "every option has a help text"
    docs = (REPOSITORY / "docs" / "commands.md").read_text()
    assert f"## facepipe {name}" in docs
    for option in command.params:
        for word in [] if getattr(option, "hidden", False) else getattr(option, "opts", []):
            if word.startswith("--") and word != "--help":
                assert f"`{word}`" in docs.partition(f"## facepipe {name}")[2].split("\n## ")[0], f"{name} {word}"


def test_the_reference_is_up_to_date(tmp_path: Path) -> None:
    main(str(tmp_path / "commands.md"))
    assert (tmp_path / "commands.md").read_text() == (REPOSITORY / "docs" / "commands.md").read_text()


def test_help_lists_the_commands() -> None:
    code, out, _ = run_facepipe("--help")
    assert code == 0
    assert all(name.split()[0] in out for name, _ in list_commands())


def test_lfw_view_2(shared: Path, tmp_path: Path) -> None:
    """Show 2: the whole protocol on the images at hand, five of its ten folds."""
    from facepipe.evaluation.pairs import evaluate_pairs
    from facepipe.gallery import Gallery
    from facepipe.sources import SourceConfig
    from pipelines.embed import EmbedConfig, RunConfig, run

    source = SourceConfig(str(shared / "data" / "lfw-dev" / "images"))
    summary = run(EmbedConfig(source, run=RunConfig(runner="local")), str(tmp_path / "g"))
    assert (summary.images, summary.failed) == (3811, 0)
    result = evaluate_pairs(Gallery(tmp_path / "g"), shared / "data" / "lfw-dev" / "pairs.txt")
    assert (result.pairs, result.folds, result.without_face) == (3000, 5, 0)
    assert result.accuracy >= 0.992
    assert result.tar["0.001"] is not None
    assert result.tar["0.001"] >= 0.975


def test_photos(shared: Path, tmp_path: Path) -> None:
    """Show 1: at least 36 faces in 32 photos; a second run reads no image and adds no row."""
    code, out, _ = run_facepipe(
        "embed", shared / "data" / "photos-dev", tmp_path / "g", "--runner", "local", "--json", "--quiet"
    )
    first = json.loads(out)
    assert (code, first["images"]) == (0, 32)
    assert first["faces"] >= 36
    again = json.loads(run_facepipe("embed", shared / "data" / "photos-dev", tmp_path / "g", "--json", "--quiet")[1])
    assert (again["images"], again["rows"], again["skipped"], again["version"]) == (0, 0, 32, first["version"])
