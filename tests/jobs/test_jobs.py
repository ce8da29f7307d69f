"""The three jobs as a scheduler starts them: TOML files, exit codes, results, and resuming."""

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, draw
from helpers import run_facepipe

from facepipe.arrow import to_float_lists
from facepipe.config import build, read_toml
from facepipe.errors import ConfigError, FacepipeError
from facepipe.gallery import Gallery
from facepipe.observe import runs
from jobs.bulk_search import bulk_search
from jobs.clean_dataset import clean_dataset
from jobs.job_command import run_old_spelling
from jobs.settings import HIDDEN_SETTINGS
from pipelines import bulk_search as bulk
from pipelines.bulk_search import BulkSearchConfig
from pipelines.clean_dataset import CleanDatasetConfig
from pipelines.nightly.config import NightlyConfig
from pipelines.search import pipeline as search_pipeline
from pipelines.train import TrainConfig

CONFIGS = {"nightly": NightlyConfig, "clean_dataset": CleanDatasetConfig, "bulk_search": BulkSearchConfig}
FAKES = '[detect]\nmodel = "fake-detector"\n[embed]\nmodel = "fake-embedder"\n[run]\nrunner = "inline"\n'
FAKES += "block_smallest = 4\nblock_largest = 4\n"
Tree = dict[str, Any]


@pytest.fixture
def corpus(drawings: Path, tmp_path: Path) -> Path:
    """12 drawings of three people."""
    for path in sorted(drawings.rglob("*.png"))[::5]:
        place = tmp_path / "in" / path.parent.name / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return tmp_path / "in"


# -------------------------------------------------------------------------------------------------------- the TOML files


def uncomment(text: str) -> str:
    """Return a TOML file with its commented keys set; the commented second source is left out."""
    return re.sub(r"^# (\w+ = )", r"\1", text.split("# [[source]]")[0], flags=re.MULTILINE) + "".join(
        re.sub(r"^# (\w+ = )", r"\1", part, flags=re.MULTILINE)
        for part in re.split(r"(?=^\[night\])", text, flags=re.MULTILINE)[1:]
    )


@pytest.mark.parametrize("job", CONFIGS)
def test_the_example_shows_the_defaults(job: str) -> None:
    """Set values are the defaults, and commented lines are valid keys."""
    path = REPOSITORY / "jobs" / f"{job}.toml"
    given = build(CONFIGS[job], read_toml(path))
    for part in fields(CONFIGS[job]):
        if part.name not in ("gallery", "source", "queries", "output"):
            assert getattr(given, part.name) == getattr(CONFIGS[job](), part.name), part.name
    build(CONFIGS[job], tomllib.loads(uncomment(path.read_text())))
    assert not re.search(r"(?i)^[^#]*(secret|password|access_key|token)", path.read_text(), re.MULTILINE)


def test_the_nightly_example_has_every_key() -> None:
    text = (REPOSITORY / "jobs" / "nightly.toml").read_text()
    for section in fields(NightlyConfig):
        config = getattr(NightlyConfig(), section.name)
        if is_dataclass(config):
            body = re.split(r"^\[", text.split(f"\n[{section.name}]", 1)[1], flags=re.MULTILINE)[0]
            names = {f.name for f in fields(config) if f"{section.name}.{f.name}" not in HIDDEN_SETTINGS}
            lacking = names - set(re.findall(r"^(?:# )?(\w+) = ", body, re.MULTILINE))
            assert not lacking, section.name


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "infra").rglob("*.toml")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_the_configs_of_the_manifests_are_valid(path: Path) -> None:
    build({**CONFIGS, "train": TrainConfig}[path.stem], read_toml(path))


@pytest.mark.parametrize("job", ["nightly", "clean-dataset", "bulk-search", "train"])
def test_init_writes_the_example(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{job.replace('-', '_')}.toml"
    code, out, _ = run_facepipe(job, "--init")
    assert (code, f"wrote {name}" in out) == (0, True)
    assert (tmp_path / name).read_bytes() == (REPOSITORY / "jobs" / name).read_bytes()
    (tmp_path / name).write_text("edited")
    code, _, err = run_facepipe(job, "--init")
    assert (code, f"'{name}' exists" in err) == (2, True)
    assert (tmp_path / name).read_text() == "edited"


# --------------------------------------------------------------------------------------------------------------- nightly


@pytest.fixture
def night(corpus: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `facepipe nightly` on the corpus, with more words."""
    text = f'gallery = "{tmp_path}/g"\n[[source]]\nuri = "{corpus}"\nname = "photos"\n{FAKES}'
    (tmp_path / "night.toml").write_text(text)

    def run_night(*words: str | Path, before: tuple[str | Path, ...] = ()) -> tuple[int, str, str]:
        return run_facepipe(*before, "nightly", tmp_path / "night.toml", "--quiet", *words)

    return run_night


def list_ends(gallery: Path, job: str) -> set[tuple[str, int | None]]:
    """List how the runs of a job ended; runs of the same second have no order."""
    return {(record.state, record.exit_code) for record in runs.read_newest(str(gallery), 100) if record.job == job}


def test_a_night_writes_a_record_and_metrics(night: Callable[..., Any], tmp_path: Path) -> None:
    code, out, _ = night("--json", before=("--metrics-file", tmp_path / "facepipe.prom"))
    summary = json.loads(out)
    assert (code, summary["images"], summary["steps"]["index"]["action"]) == (0, 12, "built")
    assert ("done", 0) in list_ends(tmp_path / "g", "nightly")
    figures = (tmp_path / "facepipe.prom").read_text()
    assert re.search(r'facepipe_run_exit_code\{[^}]*job="nightly"[^}]*\} 0', figures)
    code, out, _ = night()
    assert (code, "nightly did" in out, "note: no clusters" in out) == (0, True, True)
    code, out, _ = night("--dry-run")
    assert (code, "would do" in out) == (0, True)


def test_words_of_a_night(night: Callable[..., Any], corpus: Path, tmp_path: Path) -> None:
    """It says what came in, what was added, what failed and where to look, where the result lies, and what to do next."""
    night()
    (corpus / "person0" / "bad [1].jpg").write_bytes(b"no image")
    code, out, _ = night("--set", "night.few_failed=1")
    assert code == 0
    assert "│ listed 13, read 1, known 12, rows 1, failed 1" in out
    assert "nprobe" not in out
    gallery = tmp_path / "g"
    assert out.splitlines()[-5:] == [
        "in: 13 images listed, 1 of them read",
        "added: 0 faces",
        f"failed: 1 image, such as {corpus}/person0/bad [1].jpg (decode_error: no known image format (starts with 6e 6f 20 69 6d 61 67 65)); "
        f"`facepipe info {gallery} --failed` names all",
        f"gallery: {gallery}, version {Gallery(gallery).version}",
        f"next: facepipe info {gallery}",
    ]


def test_exit_codes_of_a_night(night: Callable[..., Any], corpus: Path, tmp_path: Path) -> None:
    assert night("--set", 'gallery=""')[0] == 2
    assert night("--set", "night.max_fail=0.1")[0] == 2
    assert "did you mean night.max_failed" in night("--set", "night.max_fail=0.1")[2]
    assert night("--set", "source=[]")[0] == 2
    assert night()[0] == 0
    for n in range(12):
        (corpus / "person0" / f"bad{n}.jpg").write_bytes(b"no image %d" % n)
    code, _, err = night("--set", "night.few_failed=12")
    assert (code, err) == (0, ""), "few_failed allows them, and they are known now"
    for n in range(12, 24):
        (corpus / "person0" / f"bad{n}.jpg").write_bytes(b"no image %d" % n)
    code, _, err = night()
    assert (code, "12 of 12 images failed, more than night.max_failed" in err) == (3, True)
    assert ("over_budget", 3) in list_ends(tmp_path / "g", "nightly")
    shutil.rmtree(corpus)
    code, _, err = night()
    assert (code, "photos: no such file or folder" in err) == (1, True)
    assert ("failed", 1) in list_ends(tmp_path / "g", "nightly")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (FacepipeError("no"), 1)])
def test_a_night_resumes_after_an_error(
    error: Any, code: int, night: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_error(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.nightly.pipeline.index.run", raise_error)
        assert night()[0] == code
    assert code in {exit_code for _, exit_code in list_ends(tmp_path / "g", "nightly")}
    assert night()[0] == 0


# --------------------------------------------------------------------------------------------------------- clean_dataset


@pytest.fixture
def dataset(corpus: Path, tmp_path: Path) -> Path:
    text = (
        f'gallery = "{tmp_path}/g"\n[[source]]\nuri = "{corpus}"\nname = "dataset"\n{FAKES}[graph]\nthreshold = 0.3\n'
    )
    (tmp_path / "clean.toml").write_text(text + "[clean]\nmin_face_px = 0.0\n")
    return tmp_path / "clean.toml"


def test_cleaning_resumes_and_grows(dataset: Path, corpus: Path, tmp_path: Path) -> None:
    code, out, _ = run_facepipe("clean-dataset", dataset, "--dry-run", "--json")
    assert (code, json.loads(out)["steps"]["embed dataset"]["new"]) == (0, 12)
    assert not (tmp_path / "g").exists()
    code, out, _ = run_facepipe("clean-dataset", dataset, "--json", "--quiet")
    summary = json.loads(out)
    assert (code, summary["images"], set(summary["steps"])) == (0, 12, {"embed dataset", "dedup", "clean"})
    lists = Path(summary["lists"])
    assert {"clean.csv", "clean.txt", "msceleb.txt", "relabel.csv", "report.html"} <= {p.name for p in lists.iterdir()}
    before = (lists / "clean.csv").read_bytes()
    assert ("done", 0) in list_ends(tmp_path / "g", "clean_dataset")
    code, out, _ = run_facepipe("clean-dataset", dataset, "--quiet")
    assert (code, "known 12" in out.replace("\n", " ")) == (0, True)
    assert (lists / "clean.csv").read_bytes() == before
    cv2.imwrite(str(corpus / "person1" / "p1_900.png"), draw(100))
    code, out, _ = run_facepipe("clean-dataset", dataset, "--json", "--quiet")
    assert (code, json.loads(out)["images"]) == (0, 1)
    uris = pq.read_table(lists / "decisions.parquet")["uri"].to_pylist()
    assert any(uri.endswith("p1_900.png") for uri in uris), "its label is judged as well"


def test_overlap_with_a_test_set(dataset: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "test.toml"
    other.write_text(dataset.read_text().replace("/g", "/h"))
    assert run_facepipe("clean-dataset", other, "--quiet")[0] == 0
    code, out, _ = run_facepipe(
        *("clean-dataset", dataset, "--quiet", "--json"),
        *("--set", f'dataset.against="{tmp_path}/h"', "--set", "dataset.copies=false"),
    )
    summary = json.loads(out)["steps"]
    assert (code, "dedup" in summary) == (0, False)
    shared = pq.read_table(tmp_path / "g" / "reports" / "overlap" / "identities.parquet").to_pylist()
    assert summary["overlap"]["shared"] == len(shared)
    assert sum(row["same_name"] for row in shared) == 3
    pairs = {(row["identity_0"], row["identity_1"], row["links"]) for row in shared}
    assert pairs == {(b, a, links) for a, b, links in pairs}, "the galleries hold the same images"


def test_exit_codes_of_cleaning(dataset: Path, corpus: Path, tmp_path: Path) -> None:
    assert run_facepipe("clean-dataset", tmp_path / "none.toml")[0] == 2
    code, _, err = run_facepipe("clean-dataset", dataset, "--set", "dataset.max_fail=1")
    assert (code, "did you mean dataset.max_failed" in err) == (2, True)
    assert run_facepipe("clean-dataset", dataset, "--set", "source=[]")[0] == 2
    code, _, err = run_facepipe("clean-dataset", dataset, "--quiet", "--set", 'source=[{uri="/none"}]')
    assert (code, "no such file or folder" in err) == (1, True)
    code, _, err = run_facepipe(
        "clean-dataset", dataset, "--quiet", "--set", f'source=[{{uri="{corpus}", identity="none"}}]'
    )
    assert (code, "has an identity" in err) == (1, True)
    shutil.rmtree(tmp_path / "g")
    (corpus / "person0" / "bad.jpg").write_bytes(b"no image")
    code, _, err = run_facepipe("clean-dataset", dataset, "--quiet")
    assert (code, "1 of 13 images failed" in err) == (3, True)
    assert ("over_budget", 3) in list_ends(tmp_path / "g", "clean_dataset")
    assert run_facepipe("clean-dataset", dataset, "--quiet")[0] == 0, (
        "images that are known to be damaged are not read again"
    )


# ----------------------------------------------------------------------------------------------------------- bulk_search


@pytest.fixture
def batch(dataset: Path, corpus: Path, tmp_path: Path) -> Path:
    """A gallery without an index, and a job that searches it for the corpus' own images."""
    assert run_facepipe("clean-dataset", dataset, "--quiet")[0] == 0
    text = f'gallery = "{tmp_path}/g"\nqueries = "{corpus}"\noutput = "{tmp_path}/hits.parquet"\n'
    text += '[bulk]\nupdate_index = true\n[search]\nk = 3\n[embed.run]\nrunner = "inline"\n'
    (tmp_path / "bulk.toml").write_text(text)
    return tmp_path / "bulk.toml"


def test_bulk_search(batch: Path, tmp_path: Path) -> None:
    code, out, _ = run_facepipe("bulk-search", batch, "--dry-run", "--json")
    summary = json.loads(out)["steps"]
    assert (code, summary["search"], summary["index"]["update"]) == (0, {"images": 12}, True)
    assert not (tmp_path / "g" / "index").exists()
    code, out, _ = run_facepipe("bulk-search", batch, "--json", "--quiet")
    summary = json.loads(out)
    faces = len(Gallery(str(tmp_path / "g")).vectors()[0])
    assert (code, summary["steps"]["index"]["action"], summary["steps"]["search"]["queries"]) == (0, "built", faces)
    hits = pq.read_table(tmp_path / "hits.parquet").to_pylist()
    assert all(row["distance"] < 1e-3 for row in hits if row["rank"] == 1), "each finds itself"
    code, out, _ = run_facepipe("bulk-search", batch, "--quiet")
    assert (code, "queries" in out) == (0, True)
    assert ("done", 0) in list_ends(tmp_path / "g", "bulk_search")


def test_a_threshold_for_a_rate_of_false_alarms(batch: Path, tmp_path: Path) -> None:
    code, out, err = run_facepipe("bulk-search", batch, "--json", "--quiet", "--set", "bulk.fpir=0.9")
    assert (code, err) == (0, "")
    summary = json.loads(out)["steps"]
    assert summary["calibrate"]["fpir"] == 0.9
    assert summary["search"]["threshold"] == summary["calibrate"]["threshold"]
    assert "person1" in pq.read_table(tmp_path / "hits.parquet")["decision"].to_pylist()


def test_a_search_resumes_from_its_last_block(batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It resumes although bulk.update_index is set, because the index is already up to date."""
    words = (batch, "--json", "--quiet", "--set", f'queries="{tmp_path}/g"', "--set", "run.block=1")
    real, left = search_pipeline.search_block, [1]

    def interrupt(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(search_pipeline, "search_block", interrupt)
        assert run_facepipe("bulk-search", *words)[0] == 130
    code, out, _ = run_facepipe("bulk-search", *words)
    assert (code, json.loads(out)["steps"]["search"]["skipped_blocks"]) == (0, 1)


def test_exit_codes_of_a_search(batch: Path, corpus: Path, tmp_path: Path) -> None:
    code, _, err = run_facepipe("bulk-search", batch, "--quiet", "--set", "bulk.update_index=false")
    assert (code, "facepipe index" in err) == (1, True)
    for wrong in ("output=''", "bulk.fpir=2", "search.kk=3", "embed.source.uri='x'"):
        assert run_facepipe("bulk-search", batch, "--set", wrong)[0] == 2, wrong
    both = ("--set", "bulk.fpir=0.1", "--set", "search.threshold=0.1")
    assert run_facepipe("bulk-search", batch, *both)[0] == 2
    vectors = np.array([[1.0] + [0.0] * 127, [np.nan] * 128], np.float32)
    pq.write_table(
        pa.table({"query_id": ["a", "b"], "embedding": to_float_lists(vectors)}), tmp_path / "queries.parquet"
    )
    code, _, err = run_facepipe("bulk-search", batch, "--quiet", "--set", f'queries="{tmp_path}/queries.parquet"')
    assert (code, "1 of 2 queries failed" in err) == (3, True)
    (corpus / "person0" / "bad.jpg").write_bytes(b"no image")
    code, _, err = run_facepipe("bulk-search", batch, "--quiet")
    assert (code, "1 of 13 queries" in err) == (3, True)


@pytest.mark.parametrize("output", ["s3://faces/hits.parquet", "s3://faces/hits"])
def test_answers_in_an_object_store(output: str, bucket: Any, batch: Path, tmp_path: Path) -> None:
    code, out, _ = run_facepipe("bulk-search", batch, "--json", "--quiet", "--set", f'output="{output}"')
    assert (code, json.loads(out)["steps"]["search"]["out"]) == (0, output)
    keys = [entry["Key"] for entry in bucket.list_objects_v2(Bucket="faces")["Contents"]]
    assert keys == (["hits.parquet"] if output.endswith("parquet") else ["hits/part-000000.parquet"])
    body = bucket.get_object(Bucket="faces", Key=keys[0])["Body"].read()
    assert pq.read_table(pa.BufferReader(body)).num_rows > 12
    assert list((tmp_path / "cache" / "searches").iterdir()) == []


def test_a_search_needs_queries() -> None:
    with pytest.raises(ConfigError, match="names no queries"):
        bulk.run(BulkSearchConfig(gallery="g"))


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        (clean_dataset, "python -m jobs.clean_dataset", "facepipe clean-dataset"),
        (bulk_search, "python -m jobs.bulk_search", "facepipe bulk-search"),
    ],
)
def test_old_spellings_work_with_a_warning(
    command: Any, old: str, new: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["job", "none.toml"])
    with pytest.raises(SystemExit) as ended:
        run_old_spelling(command, old, new)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(f"warning: `{old}` is deprecated: use `{new}`")
    assert "cannot read the config" in error
