"""Check that what an older commit left behind still works: gallery, index, reports and a training run.

    python tests/bench/upgrade.py 8b660ca --images ../shared/data/lfw-dev/images [--work FOLDER]

The older commit is taken out of the repository's history and makes a gallery from half of the images, an index, all
reports, search results and a training run. The code of today then reads, searches, verifies, extends and
erases all of it. Each check prints one line; the exit code is 1 if one fails.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 4
TRAIN = """
[data]
source = "{source}"
aligned = true
min_images = 2
[model]
architecture = "mobilefacenet"
[loss]
name = "arcface"
[sample]
batch = 8
[split]
by = "none"
[optim]
lr = 0.01
[schedule]
steps = {steps}
policy = "constant"
validate = 0
[run]
output = "{output}"
runner = "inline"
device = "cpu"
checkpoint_steps = 1
keep = 9
"""


def main() -> int:
    """Parse the command line, run all checks, print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="the older commit")
    parser.add_argument("--images", type=Path, required=True, help="folder with one folder of images per identity")
    parser.add_argument("--identities", type=int, default=60, help="number of folders to take")
    parser.add_argument("--work", type=Path, default=None, help="folder to work in; kept")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="facepipe-upgrade-"))
    work.mkdir(parents=True, exist_ok=True)
    upgrade = Upgrade(revision=options.revision, work=work.resolve())
    upgrade.copy_images(options.images, options.identities)
    upgrade.make_with_old_code()
    upgrade.check_with_new_code()
    for name, ok in upgrade.outcomes.items():
        print("ok  " if ok else "FAIL", name)
    return 0 if all(upgrade.outcomes.values()) else 1


class Upgrade:
    """One gallery that the old code makes and the new code takes over."""

    def __init__(self, *, revision: str, work: Path) -> None:
        self.work = work
        self.old_code = work / "old-code"
        self.images = work / "images"
        self.gallery = work / "gallery"
        self.outcomes: dict[str, bool] = {}
        shutil.rmtree(self.old_code, ignore_errors=True)
        self.old_code.mkdir()
        archive = subprocess.run(["git", "archive", revision], cwd=REPOSITORY, capture_output=True, check=True).stdout
        with tempfile.TemporaryFile() as file:
            file.write(archive)
            file.seek(0)
            with tarfile.open(fileobj=file) as tar:
                tar.extractall(self.old_code, filter="data")

    def copy_images(self, images: Path, identities: int) -> None:
        """Copy half of the images; `add_images` brings the other half."""
        shutil.rmtree(self.images, ignore_errors=True)
        folders = sorted(folder for folder in images.iterdir() if folder.is_dir())
        # Identities of several images come first, so that labels can be judged.
        folders.sort(key=lambda folder: -len(list(folder.iterdir())))
        self.files = [file for folder in folders[5 : 5 + identities] for file in sorted(folder.iterdir())[:8]]
        self.first = self.files[::2]
        self.second = self.files[1::2]
        self.add_images(self.first)

    def add_images(self, files: list[Path]) -> None:
        """Copy images into the corpus, one folder per identity."""
        for file in files:
            target = self.images / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)

    def make_with_old_code(self) -> None:
        """Make gallery, index, reports, search results and a training run with the old code."""
        shutil.rmtree(self.gallery, ignore_errors=True)
        shutil.rmtree(self.work / "run", ignore_errors=True)
        self.old("embed", self.images, self.gallery, "--identity", "folder", "--set", "run.runner=local")
        self.old("index", self.gallery)
        self.old("search", self.gallery, self.gallery, self.work / "old-hits.parquet", "-k", "5")
        self.old("dedup", self.gallery, "--quiet")
        self.old("cluster", self.gallery, "--quiet")
        self.old("clean", self.gallery, "--quiet")
        shutil.copytree(self.gallery / "reports", self.work / "old-reports", dirs_exist_ok=True)
        self.train(self.old)

    def check_with_new_code(self) -> None:
        """Read, search, verify, extend and erase with the code of today."""
        # What was made stays readable, and gives the same answers.
        self.check("info", lambda: json.loads(self.new("info", self.gallery, "--json")))
        self.check("verify", lambda: self.new("verify", self.gallery))
        self.check("search gives the same answers", self.has_equal_hits)
        self.check("a gallery of the new code has the same rows", self.has_equal_rows)
        self.check("dedup gives the same table", lambda: self.has_equal_report("dedup"))
        self.check("cluster gives the same table", lambda: self.has_equal_report("cluster"))
        self.check("clean gives the same table", lambda: self.has_equal_report("clean"))
        # The old reports are the state that incremental runs start from.
        shutil.rmtree(self.gallery / "reports")
        shutil.copytree(self.work / "old-reports", self.gallery / "reports")
        self.add_images(self.second)
        self.check("embed adds images", self.add_with_new_code)
        self.check("index is extended", lambda: self.new("index", self.gallery))
        self.check("cluster --assign", lambda: self.new("cluster", self.gallery, "--assign", "--quiet"))
        self.check("dedup --new", lambda: self.new("dedup", self.gallery, "--new", "--quiet"))
        self.check("verify after the update", lambda: self.new("verify", self.gallery))
        self.check("erase", self.erase_identity)
        self.check("verify after erase", lambda: self.new("verify", self.gallery))
        self.check("compact", lambda: self.new("compact", self.gallery))
        self.check("a training run is resumed to the same bits", self.resume_training)
        self.check("the old nightly config is accepted", self.check_nightly_config)

    def check(self, name: str, run: Callable[[], object]) -> None:
        """Run one check; an exception or False is a failure."""
        try:
            ok = run() is not False
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error.stderr or error.stdout}", file=sys.stderr)
            ok = False
        self.outcomes[name] = ok

    def has_equal_hits(self) -> bool:
        """Compare the search results of both versions."""
        self.new("search", self.gallery, self.gallery, self.work / "new-hits.parquet", "-k", "5")
        return pq.read_table(self.work / "old-hits.parquet").equals(pq.read_table(self.work / "new-hits.parquet"))

    def has_equal_rows(self) -> bool:
        """Embed the same images afresh and compare all columns but the time."""
        fresh = self.work / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        self.new("embed", self.images, fresh, "--identity", "folder", "--set", "run.runner=local")
        return self.read_rows(fresh).equals(self.read_rows(self.gallery))

    def read_rows(self, gallery: Path) -> pa.Table:
        """Export a gallery with the new code, and sort it."""
        out = self.work / "export"
        shutil.rmtree(out, ignore_errors=True)
        self.new("export", gallery, out)
        table = pq.read_table(out)
        return table.drop_columns(["ingested_at"]).sort_by([("uri", "ascending"), ("face_index", "ascending")])

    def has_equal_report(self, name: str) -> bool:
        """Make a report again and compare its tables with those of the old code."""
        self.new(name, self.gallery, "--quiet")
        tables = sorted((self.work / "old-reports" / name).glob("*.parquet"))
        return bool(tables) and all(
            pq.read_table(table).equals(pq.read_table(self.gallery / "reports" / name / table.name)) for table in tables
        )

    def add_with_new_code(self) -> bool:
        """Embed into the old gallery, and count what is new and what was known."""
        arguments = ("embed", self.images, self.gallery, "--identity", "folder", "--set", "run.runner=local", "--json")
        summary = json.loads(self.new(*arguments))
        return bool(summary["skipped"] == len(self.first) and summary["listed"] == len(self.files))

    def erase_identity(self) -> bool:
        """Erase one identity; the receipt must hold."""
        identity = self.files[0].parent.name
        self.new("erase", self.gallery, "--identity", identity, "--quiet")
        receipts = sorted((self.gallery / "erased").glob("*.json"))
        self.new("verify", self.gallery, "--erased", receipts[-1])
        return len(receipts) == 1

    def resume_training(self) -> bool:
        """Go back two checkpoints, resume with the new code, and compare the weights."""
        run = self.work / "run"
        whole = (run / "model.safetensors").read_bytes()
        # The newest is `last.ckpt`, the one before it `last-2.ckpt`, and so on.
        for name in ("last.ckpt", "last-2.ckpt"):
            (run / "checkpoints" / name).unlink()
        if not (run / "checkpoints" / "last-3.ckpt").exists():
            return False
        for model in run.glob("model.*"):
            model.unlink()
        self.train(self.new)
        return (run / "model.safetensors").read_bytes() == whole

    def train(self, command: Callable[..., str]) -> None:
        """Train a small network on the images, or resume its training."""
        config = self.work / "train.toml"
        config.write_text(TRAIN.format(source=self.images, steps=STEPS, output=self.work / "run"))
        command("train", config, "--quiet")

    def check_nightly_config(self) -> None:
        """Dry-run a copy of the old example config on the old gallery."""
        text = (self.old_code / "jobs" / "nightly.toml").read_text()
        text = text.replace('gallery = "gallery"', f'gallery = "{self.gallery}"')
        text = text.replace('uri = "photos"', f'uri = "{self.images}"')
        config = self.work / "nightly.toml"
        config.write_text(text)
        self.new("nightly", config, "--dry-run")

    def old(self, *arguments: object) -> str:
        """Run a facepipe command of the old code."""
        return run_facepipe(self.old_code, arguments, self.work)

    def new(self, *arguments: object) -> str:
        """Run a facepipe command of today's code."""
        return run_facepipe(REPOSITORY, arguments, self.work)


def run_facepipe(code: Path, arguments: tuple[object, ...], work: Path) -> str:
    """Run a command with the code in a folder; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(code)}
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
