"""`facepipe evaluate clusters` and `clean` as a person meets them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from typer.testing import CliRunner

from facepipe.gallery import Gallery
from jobs.cli import app


def call(*words: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 faces of 6 persons, clustered rightly but for two faces; person 0 has two labels of person 1."""
    root = tmp_path_factory.mktemp("tables")
    identities = np.arange(60) % 6
    table = rows(identities, Faces().draw(identities, 1), 0)
    append(Gallery.create(str(root / "g"), CONTRACT), [table], "first")
    ids, names = table["face_id"], table["identity"]
    cluster = np.where(np.arange(60) < 2, 7, identities)
    write(root / "g" / "reports" / "cluster" / "faces.parquet", face_id=ids, uri=table["uri"], cluster=cluster)
    given = [f"person{n}" for n in np.where(np.isin(np.arange(60), [6, 12]), 1, identities)]
    write(
        root / "g" / "reports" / "clean" / "decisions.parquet",
        face_id=ids,
        uri=table["uri"],
        identity=pa.array(given),
        decision=pa.array(["relabel" if n == 6 else "keep" for n in range(60)]),
        suggested=pa.array(["person0" if n == 6 else None for n in range(60)]),
        noise=pa.array([0.9 if n in (6, 12) else 0.01 for n in range(60)], pa.float32()),
    )
    pa.csv.write_csv(pa.table({"face_id": ids, "identity": names}), root / "truth.csv")
    return root / "g"


def write(path: Path, **columns: object) -> None:
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), path)


def test_clusters(gallery: Path) -> None:
    code, out, _ = call("evaluate", "clusters", gallery, "--json")
    found = json.loads(out)
    assert (code, found["faces"], found["identities"], found["clusters"]) == (0, 60, 6, 7)
    assert 0.9 < found["pairwise"]["precision"] < 1
    again = json.loads(call("evaluate", "clusters", gallery, "--truth", gallery.parent / "truth.csv", "--json")[1])
    assert again == found
    table = gallery / "reports" / "cluster" / "faces.parquet"
    code, out, _ = call("evaluate", "clusters", gallery, "--table", table)
    assert (code, "BCubed" in out, f"{found['nmi']:.4f}" in out) == (0, True, True)


def test_clean(gallery: Path) -> None:
    code, out, _ = call("evaluate", "clean", gallery, gallery.parent / "truth.csv", "--json")
    found = json.loads(out)
    assert (code, found["wrong"], found["flagged"], found["average_precision"]) == (0, 2, 1, 1.0)
    assert (found["detection"]["recall"], found["repaired"], found["relabels_right"]) == (0.5, 0.5, 1.0)
    table = gallery / "reports" / "clean" / "decisions.parquet"
    code, out, _ = call("evaluate", "clean", gallery, gallery.parent / "truth.csv", "--table", table)
    assert (code, "labels by decision" in out, "relabels that are right" in out) == (0, True, True)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["clusters", "/no/gallery"], 1, "no gallery at"),
        (["clusters", "{gallery}", "--table", "/no/table.parquet"], 1, "facepipe cluster"),
        (["clusters", "{gallery}", "--truth", "/no/truth.csv"], 1, "no truth file"),
        (["clusters", "{gallery}", "--table", "{gallery}/../truth.csv"], 1, "cannot read the cluster table"),
        (["clusters", "{gallery}", "--table", "{gallery}/reports"], 1, "facepipe cluster"),
        (["clusters", "{gallery}", "--table", "{gallery}/reports/clean/decisions.parquet"], 1, "no column cluster"),
        (["clean", "{gallery}"], 2, "TRUTH"),
        (["clean", "{gallery}", "/no/truth.csv"], 1, "no truth file"),
        (["clean", "{gallery}", "{gallery}/reports/cluster/faces.parquet"], 1, "needs the columns identity"),
        (["clean", "{gallery}", "t.csv", "--table", "/no/table.parquet"], 1, "facepipe clean"),
    ],
)
def test_wrong_words(words: list[str], code: int, message: str, gallery: Path) -> None:
    found, _, err = call("evaluate", *(word.format(gallery=gallery) for word in words))
    assert found == code
    assert message in " ".join(err.split())
    assert "Traceback" not in err
