"""Setting up a night: --init writes a config, --check finds what is wrong, the dry run refuses what the night does."""

import json
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import run_facepipe

from facepipe.config import build
from facepipe.gallery import Gallery
from jobs.night_setup import format_crontab, format_service
from pipelines.nightly.config import NightlyConfig

FAKES = '[detect]\nmodel = "fake-detector"\n[embed]\nmodel = "fake-embedder"\n[run]\nrunner = "inline"\n'


@pytest.fixture
def photos(drawings: Path, tmp_path: Path) -> Path:
    """12 drawings of three people, in a folder whose name needs quotes."""
    folder = tmp_path / "our photos"
    for path in sorted(drawings.rglob("*.png"))[::5]:
        place = folder / path.parent.name / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return folder


@pytest.fixture
def night(photos: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `facepipe nightly` on the photos, with more words."""
    (tmp_path / "night.toml").write_text(f'gallery = "g"\n[[source]]\nuri = "{photos}"\nname = "photos"\n{FAKES}')

    def run_night(*words: str | Path) -> tuple[int, str, str]:
        return run_facepipe("nightly", tmp_path / "night.toml", "--quiet", *words)

    return run_night


def list_problems(out: str) -> dict[str, str]:
    """List the checks that failed, with their problems."""
    return {check["what"]: check["problem"] for check in json.loads(out)["checks"] if check["problem"]}


# ------------------------------------------------------------------------------------------------------------------ init


def test_init_writes_a_config_that_passes_its_checks(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_facepipe("nightly", "--init", photos.name, "a gallery")
    assert code == 0
    config = build(NightlyConfig, tomllib.loads((tmp_path / "nightly.toml").read_text()))
    assert (config.gallery, config.source[0].uri) == (f"{tmp_path}/a gallery", str(photos))
    assert config.source[0].name == "our photos"
    assert "crontab -e" in out
    assert "OnCalendar=" in out
    # The config works from any folder.
    monkeypatch.chdir("/")
    words = ["nightly", tmp_path / "nightly.toml", "--quiet"]
    for line in ("detect.model=fake-detector", "embed.model=fake-embedder", "run.runner=inline"):
        words += ["--set", line]
    assert run_facepipe(*words, "--check")[0] == 0
    assert not (tmp_path / "a gallery").exists()
    assert run_facepipe(*words, "--dry-run")[0] == 0


def test_init_overwrites_nothing_and_needs_both_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nightly.toml").write_text("edited")
    code, _, err = run_facepipe("nightly", "--init", "photos", "g")
    assert (code, "'nightly.toml' exists" in err) == (2, True)
    assert (tmp_path / "nightly.toml").read_text() == "edited"
    code, _, err = run_facepipe("nightly", "--init", "photos")
    assert (code, "needs a gallery" in err) == (2, True)
    for words in ([], ["a.toml", "b.toml"]):
        code, _, err = run_facepipe("nightly", *words)
        assert (code, "give one CONFIG.toml" in err) == (2, True)


@pytest.mark.parametrize(
    "name", ['say "hi"', "back\\slash", "tab\tand\x7f", "naïve 照片", "100% $HOME", "s3://bucket/a b"]
)
def test_any_name_survives_toml_cron_and_systemd(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, _ = run_facepipe("nightly", "--init", name, name)
    assert code == 0
    config = build(NightlyConfig, tomllib.loads((tmp_path / "nightly.toml").read_text()))
    absolute = name if "://" in name else f"{tmp_path}/{name}"
    assert (config.gallery, config.source[0].uri) == (absolute, absolute)
    # A shell reads the words of the crontab's line as they are meant, once cron has taken away its own signs.
    path = f"/srv/{name}/nightly.toml"
    line = format_crontab(["/opt/my programs/facepipe"], path)
    words = shlex.split(line.replace(r"\%", "%"))[5:]
    assert words[:5] == ["/opt/my programs/facepipe", "--log-format", "json", "nightly", path]
    assert words[6:] == [">>", path.replace(".toml", ".log"), "2>&1"]
    service = format_service(["facepipe"], path)
    assert service.count("\n") == 6 + ("\n" in path)


# ----------------------------------------------------------------------------------------------------------------- check


def test_a_good_night_passes_every_check_and_leaves_nothing(night: Callable[..., Any], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = night("--check")
    assert (code, "FAILED" in out) == (0, False)
    for what in ("models", "packages", "gallery", "write access", "source photos", "disk", "memory"):
        assert f"ok      {what}: " in out
    assert "12 images to embed" in out
    assert sorted(tmp_path.rglob("*")) == before
    assert night()[0] == 0
    code, out, _ = night("--check")
    assert (code, "0 images to embed, 12 known" in out) == (0, True)


def test_all_failures_are_listed_at_once(night: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    (tmp_path / "g").write_text("a file")
    shutil.rmtree(photos)
    code, out, err = night("--check", "--json", "--set", "embed.model=arcfase", "--set", "index.memory=1MiB")
    assert (code, "checks failed" in err) == (1, True)
    problems = list_problems(out)
    assert set(problems) == {"models", "gallery", "write access", "source photos", "memory"}
    assert "arcfase" in problems["models"]
    assert "no such file or folder" in problems["source photos"]


def test_the_check_compares_room(night: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.nightly.check.measure_available_memory", lambda: 1 << 20)
    monkeypatch.setattr("pipelines.nightly.check.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
    code, out, _ = night("--check", "--json")
    problems = list_problems(out)
    assert (code, set(problems)) == (1, {"disk", "memory"})
    assert "make room" in problems["disk"]


def test_the_check_reads_an_image_of_each_source(night: Callable[..., Any], photos: Path) -> None:
    shutil.rmtree(photos)
    photos.mkdir()
    (photos / "link.jpg").symlink_to("/nowhere/a.jpg")
    code, out, _ = night("--check", "--json")
    assert code == 1
    assert "source photos" in list_problems(out)


def test_credentials_and_buckets_are_checked(
    bucket: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sorted(photos.rglob("*.png")):
        bucket.upload_file(str(path), "faces", f"in/{path.name}")
    (tmp_path / "night.toml").write_text(f'gallery = "s3://faces/g"\n[[source]]\nuri = "s3://faces/in/"\n{FAKES}')
    words = ["nightly", tmp_path / "night.toml", "--quiet", "--check", "--json"]
    code, out, _ = run_facepipe(*words)
    assert (code, list_problems(out)) == (0, {})
    assert not bucket.list_objects_v2(Bucket="faces", Prefix="g").get("Contents")
    code, out, _ = run_facepipe(*words, "--set", "gallery=s3://no-such-bucket/g")
    assert code == 1
    assert {"gallery", "write access"} <= set(list_problems(out))


# --------------------------------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize("has_gallery", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        ["--set", "embed.model=arcfase"],
        ["--set", "detect.model=retinaface-mnet025"],
        ["--set", "embed.flip=false"],
        ["--set", "source=[{uri='/no/such/folder', name='photos'}]"],
        ["--set", "read.max_bytes=none"],
        ["--set", "source=[{uri='/no/such/*.jpg', name='inbox', missing='keep'}]"],
    ],
    ids=lambda words: words[1],
)
def test_a_dry_run_refuses_what_the_night_refuses(
    wrong: list[str], has_gallery: bool, night: Callable[..., Any], tmp_path: Path
) -> None:
    if has_gallery:
        assert night()[0] == 0
    dry_code, _, dry_err = night("--dry-run", *wrong)
    code, _, err = night(*wrong)
    assert dry_code == code, (dry_err, err)
    assert dry_err.splitlines()[-1:] == err.splitlines()[-1:]


def test_a_dry_run_says_what_each_step_would_do(night: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    code, out, _ = night("--dry-run", "--json")
    steps = json.loads(out)["steps"]
    assert (code, steps["embed photos"]["new"], steps["index"]["images_to_come"]) == (0, 12, 12)
    assert steps["dedup"] == {"to_compare": 0, "images_to_come": 12}
    _, out, _ = night("--dry-run")
    assert out.startswith(f"nightly would do: {tmp_path}/g (new)\n")
    assert night("--set", "night.dedup=false")[0] == 0
    (photos / "person0" / "new.png").write_bytes(next(photos.rglob("*.png")).read_bytes() + b"0")
    erase = ["--set", "source=[{uri='" + str(photos) + "', name='photos', missing='erase', retention_days=9}]"]
    code, out, _ = night("--dry-run", "--json", *erase)
    steps = json.loads(out)["steps"]
    faces = Gallery(str(tmp_path / "g")).counts()["faces"]
    assert steps["index"] == {"faces": faces, "indexed": faces, "to_add": 0, "images_to_come": 1}
    assert steps["dedup"] == {"to_compare": 12, "images_to_come": 1}
    assert {"erase retention photos", "erase missing photos", "compact"} <= set(steps)
    # The night does what was announced: it makes the first clusters, and the next one adds to them.
    make = ["--set", "night.clusters=make", "--set", "graph.threshold=0.3"]
    assert "cluster" in json.loads(night("--dry-run", "--json", *make)[1])["steps"]
    assert night(*make)[0] == 0
    steps = json.loads(night("--dry-run", "--json", *make)[1])["steps"]
    assert steps["assign"]["clusters"] > 0
    assert steps["dedup"]["to_compare"] == 0


def test_a_dry_run_names_a_place_that_it_cannot_list(night: Callable[..., Any], photos: Path) -> None:
    assert night()[0] == 0
    (photos / "person9").symlink_to("/no/such/folder")
    for words in (["--dry-run"], []):
        _, out, _ = night(*words)
        assert f"1 place of the source could not be listed, such as {photos}/person9" in out.replace("\n", " ")
