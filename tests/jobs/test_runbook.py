"""The commands of docs/runbook.md, run on a gallery in the state that they are written for (but for those of a cluster)."""

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
from facepipe.gallery.maintenance.verify import verify
from facepipe.index.verify import verify_index
from jobs.cli import app

RUNBOOK = (REPOSITORY / "docs" / "runbook.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))
OF_A_CLUSTER = ("kubectl", "sh infra/")
NIGHTLY = re.compile(r"/etc/facepipe/nightly[\w-]*\.toml")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, drawings: Path) -> Path:
    """A gallery with index and clusters, its source beside it, a backup, and a nightly job's config."""
    place = tmp_path_factory.mktemp("runbook")
    shutil.copytree(drawings, place / "source")
    (place / "nightly.toml").write_text(
        f'gallery = "{place}/g"\n[[source]]\nuri = "{place}/source"\nname = "source"\nidentity = "folder"\n'
        '[detect]\nmodel = "fake-detector"\n[embed]\nmodel = "fake-embedder"\n[run]\nrunner = "inline"\n'
    )
    assert run_line(f"facepipe nightly {place}/nightly.toml", {}) == 0
    shutil.copytree(place / "g", place / "backup")
    return place


def run_line(line: str, values: dict[str, str]) -> int:
    """Run one line of a block: our own commands in this process, others in a shell; its exit code."""
    if not line.startswith("facepipe "):
        environment = os.environ | values | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.run(["bash", "-euc", line], env=environment, stdout=subprocess.DEVNULL).returncode
    for name, value in values.items():
        line = line.replace(f"${name}", value)
    return CliRunner().invoke(app, shlex.split(line)[1:]).exit_code


def table_file(place: Path) -> Path:
    return Path(Gallery(str(place / "g")).faces_folder, Gallery(str(place / "g")).files()[0]["path"])


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data[: -len(data) // 4])


def break_shard(place: Path, values: dict[str, str]) -> None:
    damage(next((place / "g" / "index").glob("shard-*/vectors.npy")))


def break_table(place: Path, values: dict[str, str]) -> None:
    path = table_file(place)
    values["FILE"] = path.name
    (place / "backup" / "faces" / path.name).write_bytes(path.read_bytes())
    damage(path)


def break_table_again(place: Path, values: dict[str, str]) -> None:
    if verify(Gallery(str(place / "g"))).problems == []:
        break_table(place, values)


def name_a_receipt(place: Path, values: dict[str, str]) -> None:
    found = sorted((place / "g" / "erased").glob("*.json"))
    values["RECEIPT"] = str(found[-1]) if found else ""


def erase_somebody(place: Path, values: dict[str, str]) -> None:
    assert run_line(f"facepipe erase {place}/g --identity person1", {}) == 0
    name_a_receipt(place, values)


BEFORE: dict[str, dict[int, Callable[[Path, dict[str, str]], None]]] = {
    "A shard is corrupt": {0: break_shard},
    "A table file is corrupt": {0: break_table, 2: break_table_again},
    "A subject must be erased": {2: name_a_receipt},
    "Restore from a backup": {2: erase_somebody},
}


@pytest.mark.parametrize("section", SECTIONS)
def test_what_the_runbook_says_can_be_done(section: str, made: Path, tmp_path: Path) -> None:
    place = tmp_path / "runbook"
    shutil.copytree(made, place, symlinks=True)
    (place / "nightly.toml").write_text((made / "nightly.toml").read_text().replace(f"{made}/g", f"{place}/g"))
    values = {"G": f"{place}/g", "BACKUP": f"{place}/backup", "NAME": "person1", "FILE": "", "RECEIPT": ""}
    values["TMPDIR"] = str(tmp_path)
    blocks = re.findall(r"^```bash\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    assert blocks
    before = BEFORE.get(section, {})
    for number, block in enumerate(blocks):
        before.get(number, lambda place, values: None)(place, values)
        last = number == len(blocks) - 1
        for written in block.splitlines():
            if written.startswith((*OF_A_CLUSTER, "env |")):
                continue
            line = NIGHTLY.sub(f"{place}/nightly.toml", written.replace("/tmp/", f"{tmp_path}/"))
            code = run_line(line, values)
            assert code == 0 or (number == 0 and before), f"{line}: {code}"
            assert not last or code == 0, line
    gallery = Gallery(values["G"])
    assert verify(gallery).problems == []
    assert verify_index(gallery) == []


def test_a_broken_gallery_is_not_called_sound(made: Path, tmp_path: Path) -> None:
    """The tests above would prove nothing if what they break did not show."""
    for break_ in (break_shard, break_table):
        place = tmp_path / break_.__name__
        shutil.copytree(made, place)
        break_(place, {})
        assert run_line(f"facepipe verify {place}/g", {}) == 1
