"""What summaries and help say to people: words instead of names of fields, and groups of commands."""

import shutil
from pathlib import Path

from helpers import run_facepipe

from jobs.cli import COMMAND_GROUPS, COMMANDS

FAKES = ["--detector", "fake-detector", "--embedder", "fake-embedder", "--runner", "inline", "--quiet"]


def test_help_lists_every_command_in_a_group() -> None:
    code, out, _ = run_facepipe("--help")
    assert code == 0
    for title in COMMAND_GROUPS:
        assert f"{title}:" in out
    for name in COMMANDS:
        assert f"  {name} " in out
    assert "..." not in out.split("Fill a gallery")[1], "sentences are whole"


def test_commands_of_one_file_do_not_speak_of_an_option_that_they_lack() -> None:
    for name in ("nightly", "clean-dataset", "bulk-search", "train"):
        assert "--config" not in run_facepipe(name, "--help")[1].split("--help-settings")[0], name


def test_a_refused_gallery_leaves_nothing_in_the_folder(drawings: Path, tmp_path: Path) -> None:
    shutil.copytree(drawings / "person1", tmp_path / "photos")
    before = sorted((tmp_path / "photos").iterdir())
    code, _, err = run_facepipe("embed", tmp_path / "photos", tmp_path / "photos", *FAKES)
    assert (code, "exists and is not a gallery" in err) == (1, True)
    assert sorted((tmp_path / "photos").iterdir()) == before


def test_a_file_is_no_gallery(drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for words in (["info"], ["verify"], ["index"], ["embed", drawings]):
        code, _, err = run_facepipe(*words, tmp_path / "file")
        assert (code, "is a file" in err) == (2, True), err


def test_a_factory_that_cannot_be_built_is_not_recommended(drawings: Path, tmp_path: Path) -> None:
    assert run_facepipe("embed", drawings / "person1", tmp_path / "g", *FAKES)[0] == 0
    assert run_facepipe("index", tmp_path / "g", "--quiet")[0] == 0
    code, _, err = run_facepipe("index", tmp_path / "g", "--factory", "HNSW32")
    assert (code, "does not support shards" in err, "--retrain" in err) == (2, True, False)
