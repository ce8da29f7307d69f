"""The commands of docs/runbook.md, run on a gallery in the state they are for; commands for a cluster are skipped."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY
from typer.testing import CliRunner

from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index.verify import verify_index
from jobs.cli import app

RUNBOOK = (REPOSITORY / "docs" / "runbook.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))
OF_A_CLUSTER = ("kubectl", "sh infra/")
NIGHTLY = re.compile(r"/etc/facepipe/nightly[\w-]*\.toml")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, drawings: Path) -> Path:
    """A folder with a gallery, its source, a backup, and the config of the nightly job."""
    folder = tmp_path_factory.mktemp("runbook")
    shutil.copytree(drawings, folder / "source")
    (folder / "nightly.toml").write_text(
        f'gallery = "{folder}/g"\n[[source]]\nuri = "{folder}/source"\nname = "source"\nidentity = "folder"\n'
        '[detect]\nmodel = "fake-detector"\n[embed]\nmodel = "fake-embedder"\n[run]\nrunner = "inline"\n'
    )
    assert run_line(f"facepipe nightly {folder}/nightly.toml", {}) == 0
    shutil.copytree(folder / "g", folder / "backup")
    return folder


def run_line(line: str, values: dict[str, str]) -> int:
    """Run one line of a block, and return its exit code. Other commands than facepipe run in a shell."""
    if not line.startswith("facepipe "):
        environment = os.environ | values | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.run(["bash", "-euc", line], env=environment, stdout=subprocess.DEVNULL).returncode
    for name, value in values.items():
        line = line.replace(f"${name}", value)
    return CliRunner().invoke(app, shlex.split(line)[1:]).exit_code


def find_table_file(folder: Path) -> Path:
    return Path(Gallery(str(folder / "g")).faces_folder, Gallery(str(folder / "g")).files()[0]["path"])


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data[: -len(data) // 4])


def break_shard(folder: Path, values: dict[str, str]) -> None:
    damage(next((folder / "g" / "index").glob("shard-*/vectors.npy")))


def break_table(folder: Path, values: dict[str, str]) -> None:
    path = find_table_file(folder)
    values["FILE"] = path.name
    (folder / "backup" / "faces" / path.name).write_bytes(path.read_bytes())
    damage(path)


def break_table_again(folder: Path, values: dict[str, str]) -> None:
    if verify_gallery(Gallery(str(folder / "g"))).problems == []:
        break_table(folder, values)


def empty_log_entry(folder: Path, values: dict[str, str]) -> None:
    """Do as a power cut did to the newest entry of the log, which an older facepipe did not sync."""
    newest = max(Path(Gallery(str(folder / "g")).faces_folder, "_delta_log").glob("*.json"))
    newest.write_bytes(b"")


def set_receipt(folder: Path, values: dict[str, str]) -> None:
    found = sorted((folder / "g" / "erased").glob("*.json"))
    values["RECEIPT"] = str(found[-1]) if found else ""


def erase_person(folder: Path, values: dict[str, str]) -> None:
    assert run_line(f"facepipe erase {folder}/g --identity person1", {}) == 0
    set_receipt(folder, values)


DAMAGE: dict[str, dict[int, Callable[[Path, dict[str, str]], None]]] = {
    "The power was cut": {0: empty_log_entry},
    "A shard is corrupt": {0: break_shard},
    "A table file is corrupt": {0: break_table, 2: break_table_again},
    "A subject must be erased": {2: set_receipt},
    "Restore from a backup": {1: erase_person},
}


@pytest.mark.parametrize("section", SECTIONS)
def test_the_commands_of_a_section_work(section: str, original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runbook"
    shutil.copytree(original, folder, symlinks=True)
    (folder / "nightly.toml").write_text(
        (original / "nightly.toml").read_text().replace(f"{original}/g", f"{folder}/g")
    )
    values = {"G": f"{folder}/g", "BACKUP": f"{folder}/backup", "NAME": "person1", "FILE": "", "RECEIPT": ""}
    values["TMPDIR"] = str(tmp_path)
    blocks = re.findall(r"^```bash\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    assert blocks
    before = DAMAGE.get(section, {})
    for number, block in enumerate(blocks):
        before.get(number, lambda folder, values: None)(folder, values)
        last = number == len(blocks) - 1
        for written in block.splitlines():
            if written.startswith((*OF_A_CLUSTER, "env |")):
                continue
            line = NIGHTLY.sub(f"{folder}/nightly.toml", written.replace("/tmp/", f"{tmp_path}/"))
            code = run_line(line, values)
            assert code == 0 or (number == 0 and before), f"{line}: {code}"
            assert not last or code == 0, line
    gallery = Gallery(values["G"])
    assert verify_gallery(gallery).problems == []
    assert verify_index(gallery) == []


def test_verify_notices_the_damage(original: Path, tmp_path: Path) -> None:
    """Without this, the tests above would prove nothing."""
    for break_ in (break_shard, break_table, empty_log_entry):
        folder = tmp_path / break_.__name__
        shutil.copytree(original, folder)
        break_(folder, {})
        assert run_line(f"facepipe verify {folder}/g", {}) == 1
