"""What a message says to type if an optional package is missing: it fits how facepipe was installed."""

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from facepipe import extras
from facepipe.errors import MissingPackageError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that says how facepipe was installed: the only one."""
    folder = tmp_path / "facepipe-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: facepipe\nVersion: 0.1.0\n")
    (folder / "INSTALLER").write_text("pip\n")
    # Of the path of Python only this folder is left to look for records in.
    monkeypatch.setattr(
        extras.importlib.metadata,
        "distributions",
        lambda name, find=importlib.metadata.distributions: find(name=name, path=[str(tmp_path)]),
    )
    monkeypatch.setattr(extras.shutil, "which", lambda name: os.path.join(os.path.dirname(sys.executable), name))
    return folder


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({}, ["facepipe[train]"]),
        ({"url": "file:///home/ann/my%20clone", "dir_info": {"editable": True}}, ["-e", "/home/ann/my clone[train]"]),
        ({"url": "file:///home/ann/clone", "dir_info": {}}, ["/home/ann/clone[train]"]),
        (
            {"url": "https://host/facepipe.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            ["facepipe[train] @ git+https://host/facepipe.git@abc"],
        ),
        ({"url": "https://host/f.whl", "archive_info": {}}, ["facepipe[train] @ https://host/f.whl"]),
    ],
)
def test_the_command_installs_from_where_facepipe_came(
    installation: Path, origin: dict[str, object], words: list[str]
) -> None:
    if origin:
        (installation / "direct_url.json").write_text(json.dumps(origin))
    assert shlex.split(extras.format_install("torch")) == ["pip", "install", *words]


def test_the_command_is_that_of_the_installer(
    installation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installation / "INSTALLER").write_text("uv")
    assert extras.format_install("faiss") == f"uv pip install --python {sys.executable} 'facepipe[cpu]'"
    (installation / "INSTALLER").write_text("pip")
    monkeypatch.setattr(extras.shutil, "which", lambda name: "/usr/bin/pip")
    assert extras.format_install("faiss") == f"{sys.executable} -m pip install 'facepipe[cpu]'", "not another's pip"
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / "pipx_metadata.json").touch()
    assert extras.format_install("faiss") == "pipx inject facepipe faiss-cpu"


def test_a_damaged_record_of_the_installation_is_passed_over(installation: Path) -> None:
    for text in ("{", "[1]", "null"):
        (installation / "direct_url.json").write_text(text)
        assert extras.format_install("torch") == "pip install 'facepipe[train]'"


def test_the_record_of_a_folder_of_sources_says_nothing(installation: Path) -> None:
    (installation / "direct_url.json").write_text('{"url": "file:///clone", "dir_info": {}}')
    beside = installation.with_name("facepipe.egg-info")
    beside.mkdir()
    (beside / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: facepipe\nVersion: 0.1.0\n")
    assert extras.format_install("torch") == "pip install '/clone[train]'"


def test_a_module_that_is_there_is_not_asked_for() -> None:
    extras.require_module("numpy", "arithmetic")
    with pytest.raises(
        MissingPackageError, match=r"^sorcery needs no_such_module, which is not installed: .*\[magic\]"
    ):
        extras.require_module("no_such_module", "sorcery", extra="magic")


def test_every_extra_that_is_suggested_brings_its_module() -> None:
    brought = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {"faiss": {"faiss-cpu", "faiss-gpu"}, "dlib": {"dlib-bin"}, "pynvml": {"nvidia-ml-py"}}
    packages["openlineage"] = {"openlineage-python"}
    packages["lance"] = {"pylance"}
    packages["pytorch_metric_learning"] = {"pytorch-metric-learning"}
    for module, names in extras.EXTRAS.items():
        for extra in names:
            assert {Requirement(line).name for line in brought[extra]} & packages.get(module, {module})


def test_every_command_works_without_torch_or_says_what_to_install(tmp_path: Path, drawings: Path) -> None:
    """In processes that cannot import it: training and mtcnn need it, and nothing else of these does."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    script = tmp_path / "run.py"
    script.write_text(_SCRIPT)
    gallery = str(tmp_path / "g")
    fake = ["--detector", "fake-detector", "--embedder", "fake-embedder"]
    commands = [
        ["embed", str(drawings), gallery, "--identity", "folder", *fake],
        ["index", gallery],
        ["search", gallery, gallery, str(tmp_path / "out.parquet")],
        ["dedup", gallery, "--set", "graph.threshold=0.1"],
        ["cluster", gallery, "--set", "graph.threshold=0.1"],
        ["clean", gallery, "--set", "graph.threshold=0.1"],
        ["compact", gallery],
        ["verify", gallery],
        ["info", gallery],
        ["models"],
        ["doctor"],
        ["train", "--help-settings"],
        ["train", "train.toml"],
        ["embed", str(drawings), str(tmp_path / "g2"), "--detector", "mtcnn"],
    ]
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        timeout=280,
    )
    codes = json.loads(done.stdout.splitlines()[-1])
    expected = [0] * 11 + [1] * 3
    assert codes == expected, done.stdout + done.stderr
    assert done.stderr.count("facepipe: training needs torch, which is not installed: ") == 2
    assert done.stderr.count("facepipe: the detector mtcnn needs torch, which is not installed: ") == 1
    assert not (tmp_path / "g2").exists(), "a gallery of models that cannot be loaded would refuse all others"


_SCRIPT = """
import importlib.util, json, sys
assert importlib.util.find_spec("torch") is None

from jobs.cli import app
codes = []
for words in json.loads(sys.argv[1]):
    try:
        app(words)
    except SystemExit as exit:
        codes.append(exit.code)
print()
print(json.dumps(codes))
"""
