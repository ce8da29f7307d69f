"""Who is in photos: a row per photo and face, the same however it is asked for, and one for each photo that failed."""

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from facepipe import storage
from facepipe.config import build
from facepipe.errors import ConfigError, ContractError, FacepipeError, SourceError
from facepipe.gallery import Gallery
from facepipe.index.decide import UNKNOWN
from facepipe.index.identify import ANSWERED_PHOTOS, IDENTIFIED, QUERY_COLUMNS, find_candidates
from facepipe.index.search import Index
from facepipe.text import restore_cell
from jobs.cli import app
from pipelines import identify as pipeline
from pipelines import index
from pipelines.embed import EmbedConfig
from pipelines.embed import run as embed
from pipelines.identify import IdentifyConfig, run

MODELS = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}}
THRESHOLD = 0.12


def configure(**options: Any) -> IdentifyConfig:
    base = {"threshold": THRESHOLD} if "fpir" not in options else {}
    return build(IdentifyConfig, {"identify": {**base, **options}, "embed": {**MODELS, "run": {"runner": "inline"}}})


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five persons of four images."""
    folder = tmp_path_factory.mktemp("known")
    for n in range(20):
        person = folder / f"person{n % 5}"
        person.mkdir(exist_ok=True)
        cv2.imwrite(str(person / f"{n:02d}.png"), draw(n, 48))
    path = str(tmp_path_factory.mktemp("galleries") / "g")
    settings = {"source": {"uri": str(folder), "identity": "folder"}, "run": {"runner": "inline"}}
    embed(build(EmbedConfig, MODELS, settings), path)
    index.run(index.IndexConfig(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that the gallery has and has not, names that a spreadsheet takes for formulas, a broken and an empty one."""
    folder = tmp_path_factory.mktemp("photos")
    for n in (1, 7, 13, 31, 34):
        cv2.imwrite(str(folder / f"{n}.png"), draw(n, 48))
    cv2.imwrite(str(folder / "=two.png"), np.hstack([draw(4, 49)[:, :49], draw(10, 49)[:, :49]]))
    cv2.imwrite(str(folder / "sky.png"), np.zeros((40, 40, 3), np.uint8))
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def answers(gallery: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answers") / "who.parquet"
    run(configure(), gallery, str(photos), str(out))
    return out


def read(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


# --- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.01, 1.9), rule=st.sampled_from(["nearest", "vote"]))
def test_candidates_are_those_of_comparing_every_face(seed: int, threshold: float, rule: Any, gallery: str) -> None:
    opened = Gallery(gallery)
    frame = opened.to_pandas(["face_id", "identity", "embedding"], "face_id is not null")
    faces = np.stack(frame["embedding"].to_list())
    rng = np.random.default_rng(seed)
    queries = faces[rng.integers(0, len(faces), 4)] + rng.normal(0, 0.2, (4, faces.shape[1]))
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    found = find_candidates(Index(gallery), queries, threshold, rule)
    for n, query in enumerate(queries):
        distances = np.linalg.norm(faces - query, axis=1)
        order = np.argsort(distances, kind="stable")
        names = frame["identity"].to_numpy()[order]
        assert found.names[n] == names[0]
        assert found.distances[n] == pytest.approx(distances[order[0]], abs=1e-5)
        other = np.flatnonzero(names != names[0])[0]
        assert found.runner_ups[n] == names[other]
        assert found.runner_up_distances[n] == pytest.approx(distances[order[other]], abs=1e-5)
        if rule == "nearest":
            assert found.decisions[n] == (names[0] if found.distances[n] <= threshold else UNKNOWN)


def test_a_runner_up_is_found_behind_many_faces_of_one_person(tmp_path: Path) -> None:
    folder = tmp_path / "known"
    for name, numbers in (("many", range(40)), ("one", [91])):
        (folder / name).mkdir(parents=True)
        for n in numbers:
            cv2.imwrite(str(folder / name / f"{n}.png"), draw(7 if name == "many" else 91, 48) + np.uint8(n % 2))
    path = str(tmp_path / "g")
    config = {"source": {"uri": str(folder), "identity": "folder"}, "run": {"runner": "inline"}}
    embed(build(EmbedConfig, MODELS, config), path)
    index.run(index.IndexConfig(), path)
    vectors = np.stack(Gallery(path).to_pandas(["embedding"], "identity = 'many'")["embedding"].to_list())
    found = find_candidates(Index(path), vectors[:3].astype(np.float32), 0.5)
    assert found.names.tolist() == ["many"] * 3
    assert found.runner_ups.tolist() == ["one"] * 3


def test_csv_holds_what_parquet_holds(gallery: str, photos: Path, answers: Path, tmp_path: Path) -> None:
    out = tmp_path / "who.csv"
    summary = run(configure(), gallery, str(photos), str(out))
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = read(answers)
    assert len(rows) == len(expected)
    for row, whole in zip(rows, expected, strict=True):
        assert list(row) == IDENTIFIED.names
        assert restore_cell(row["photo"]) == whole["photo"]
        for name, value in whole.items():
            if value is None:
                assert row[name] == "", name
            elif isinstance(value, float):
                assert float(row[name]) == pytest.approx(value, abs=6e-5)
            elif name != "photo" and name != "query_face_id":
                assert row[name] == str(value)
    described = json.loads(Path(f"{out}.json").read_text())
    assert described == summary.describe() == json.loads(pq.read_schema(answers).metadata[b"facepipe.identify"])
    assert described["threshold"] == THRESHOLD


@pytest.mark.parametrize("most", [1, 3, 8])
def test_answers_do_not_depend_on_how_many_are_written_together(
    most: int, gallery: str, photos: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Gallery.batches
    monkeypatch.setattr(pipeline, "_MAX_SORTED_ROWS", most)

    def read_two(self: Gallery, columns: Any = None, where: Any = None, rows: int = 8192, **options: Any) -> Any:
        return batches(self, columns, where, 2 if columns == QUERY_COLUMNS else rows, **options)

    monkeypatch.setattr(Gallery, "batches", read_two)
    run(configure(), gallery, str(photos), str(tmp_path / "who.parquet"))
    found = read(tmp_path / "who.parquet")
    assert sorted(found, key=lambda row: (row["photo"], row["face"] or 0)) == read(answers)


def test_the_best_face_of_each_photo(gallery: str, photos: Path, answers: Path, tmp_path: Path) -> None:
    run(configure(best_per_photo=True), gallery, str(photos), str(tmp_path / "best.parquet"))
    best = read(tmp_path / "best.parquet")
    assert list(best[0]) == ANSWERED_PHOTOS.names
    frame = pd.DataFrame(read(answers))
    assert [row["photo"] for row in best] == sorted(set(frame["photo"]))
    for row in best:
        faces = frame[frame["photo"] == row["photo"]]
        assert row["faces"] == faces["face"].notna().sum()
        named = faces[faces["person"].notna() & (faces["person"] != UNKNOWN)]
        if len(named):
            assert row["distance"] == named["distance"].min()


# --- every photo has a row --------------------------------------------------------------------------------------------


def test_every_photo_and_face_has_a_row(photos: Path, answers: Path) -> None:
    rows = read(answers)
    assert {row["photo"] for row in rows} == {str(path) for path in photos.iterdir()}
    by_photo = {Path(row["photo"]).name: row for row in rows}
    assert by_photo["broken.jpg"]["status"] == "decode_error"
    assert by_photo["broken.jpg"]["error"]
    assert by_photo["sky.png"]["status"] == "no_face"
    for name in ("broken.jpg", "sky.png"):
        assert by_photo[name]["person"] is None
        assert by_photo[name]["face"] is None
    two = [row for row in rows if row["photo"].endswith("=two.png")]
    assert [row["face"] for row in two] == [0, 1]
    for n in (1, 7, 13):
        row = by_photo[f"{n}.png"]
        assert row["person"] == f"person{n % 5}"
        assert row["distance"] == pytest.approx(0, abs=1e-3)
        assert row["matched_photo"].endswith(f"{n:02d}.png")
        assert row["margin"] == pytest.approx(row["runner_up_distance"] - row["distance"])


def test_nothing_usable_is_a_failure_with_its_rows(gallery: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no image")
    out = tmp_path / "who.parquet"
    with pytest.raises(SourceError, match="none of the 1 photos could be read"):
        run(configure(), gallery, str(tmp_path / "photos"), str(out))
    assert [row["status"] for row in read(out)] == ["decode_error"]


# --- the photos are kept, or nothing is left --------------------------------------------------------------------------


def test_kept_photos_are_embedded_once(gallery: str, photos: Path, answers: Path, tmp_path: Path) -> None:
    kept = tmp_path / "queries"
    seen: list[int] = []

    def ask() -> list[dict[str, Any]]:
        out = str(tmp_path / "who.parquet")
        run(configure(), gallery, str(photos), out, keep_queries=str(kept), on_embed=lambda s: seen.append(s.images))
        return read(Path(out))

    first = ask()
    assert max(seen) == 8
    seen.clear()
    assert ask() == first == read(answers)
    assert max(seen, default=0) == 0
    # A gallery of photos may be given in their place.
    out = tmp_path / "again.parquet"
    run(configure(), gallery, str(kept), str(out))
    assert read(out) == first


def test_nothing_is_left_beside_the_output(gallery: str, photos: Path, tmp_path: Path) -> None:
    run(configure(), gallery, str(photos), str(tmp_path / "who.csv"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["who.csv", "who.csv.json"]


def test_files_of_others_stay(gallery: str, photos: Path, tmp_path: Path) -> None:
    beside = tmp_path / "who.csv.queries"
    beside.mkdir()
    (beside / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something that is no gallery"):
        run(configure(), gallery, str(photos), str(tmp_path / "who.csv"))
    assert (beside / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["who.txt", "who", "a/folder.csv"])
def test_other_outputs_are_refused(name: str, gallery: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "folder.csv").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"\.csv or \.parquet|is a folder"):
        run(configure(), gallery, str(photos), str(tmp_path / name))


@pytest.mark.parametrize(
    ("foreign", "out", "page"),
    [
        (["mine.csv"], "mine.csv", None),
        (["mine.parquet"], "mine.parquet", None),
        (["who.csv.json"], "who.csv", None),
        (["who.csv", "who.csv.json"], "who.csv", None),
        (["page.html"], "who.csv", "page.html"),
    ],
)
def test_files_of_somebody_else_are_not_replaced(
    foreign: list[str], out: str, page: str | None, gallery: str, photos: Path, tmp_path: Path
) -> None:
    for name in foreign:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"was not written by `identify`|is no page of facepipe"):
        run(configure(), gallery, str(photos), str(tmp_path / out), page=str(tmp_path / page) if page else None)
    assert {path.name for path in tmp_path.iterdir()} == set(foreign)
    assert all((tmp_path / name).read_bytes() == b"{}" for name in foreign)


def test_the_output_may_not_lie_among_the_files_of_a_gallery(gallery: str, photos: Path) -> None:
    with pytest.raises(ConfigError, match="which this search reads"):
        run(configure(), gallery, str(photos), f"{gallery}/index/who.csv")


def test_answers_of_earlier_calls_are_replaced(gallery: str, photos: Path, tmp_path: Path) -> None:
    page = str(tmp_path / "who.html")
    for name in ("who.csv", "who.parquet"):
        for _ in range(2):
            run(configure(), gallery, str(photos), str(tmp_path / name), page=page)


def test_the_output_may_lie_in_an_object_store(bucket: Any, gallery: str, photos: Path, answers: Path) -> None:
    for _ in range(2):
        run(configure(), gallery, str(photos), "s3://faces/out/who.parquet")
        run(configure(), gallery, str(photos), "s3://faces/out/who.csv", keep_queries="s3://faces/queries")
    assert pq.read_table(storage.open_seekable("s3://faces/out/who.parquet")).to_pylist() == read(answers)


# --- the threshold, and what the answers rest on ----------------------------------------------------------------------


def test_other_models_are_refused(gallery: str, photos: Path, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    embed(
        build(
            EmbedConfig, MODELS, {"embed": {"flip": False}, "source": {"uri": str(photos)}, "run": {"runner": "inline"}}
        ),
        other,
    )
    with pytest.raises(ContractError):
        run(configure(), gallery, other, str(tmp_path / "who.csv"))


def test_without_a_threshold_it_says_what_to_do(gallery: str, photos: Path, tmp_path: Path) -> None:
    """Twenty faces are too few for one false alarm in a million, and this model has no threshold of its own."""
    with pytest.raises(FacepipeError, match="--threshold"):
        run(configure(fpir=1e-6), gallery, str(photos), str(tmp_path / "who.csv"))


def test_an_index_behind_the_gallery_is_told(gallery: str, photos: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "g"
    shutil.copytree(gallery, copy)
    embed(build(EmbedConfig, MODELS, {"source": {"uri": str(photos)}, "run": {"runner": "inline"}}), str(copy))
    summary = run(configure(), str(copy), str(photos), str(tmp_path / "who.csv"))
    assert "run `facepipe index" in summary.notes[0]
    assert summary.index_version < summary.table_version


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(gallery: str, photos: Path, tmp_path: Path) -> None:
    def ask(*words: str) -> Any:
        fakes = [f"embed.{section}.model={values['model']}" for section, values in MODELS.items()]
        chosen = [word for setting in [*fakes, "embed.run.runner=inline"] for word in ("--set", setting)]
        return CliRunner().invoke(app, ["identify", gallery, str(photos), *words, *chosen, "--quiet"])

    out = str(tmp_path / "who.csv")
    page = str(tmp_path / "who.html")
    result = ask(out, "--threshold", str(THRESHOLD), "--page", page)
    assert result.exit_code == 0, result.output
    assert f"identify -> {out}" in result.stdout
    assert "threshold: 0.1200, given" in result.stdout
    text = Path(page).read_text()
    assert "13.png: person3" in text
    assert "data:image/jpeg" in text or "/9j/" in text, "faces are shown"
    counts = json.loads(ask(out, "--threshold", str(THRESHOLD), "--json").stdout)
    assert (counts["photos"], counts["faces"]) == (8, 7)
    assert ask("who.txt", "--threshold", "0.1").exit_code == 2
