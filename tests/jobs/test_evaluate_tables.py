"""`facepipe evaluate clusters` and `clean` on the command line."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from helpers import run_facepipe

from facepipe.gallery import Gallery


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 faces of 6 people. Two are in a wrong cluster, and two of person 0 have the label of person 1."""
    root = tmp_path_factory.mktemp("tables")
    identities = np.arange(60) % 6
    table = rows(identities, Faces().draw(identities, 1), 0)
    append(Gallery.create(str(root / "g"), CONTRACT), [table], "first")
    ids, names = table["face_id"], table["identity"]
    cluster = np.where(np.arange(60) < 2, 7, identities)
    write_table(root / "g" / "reports" / "cluster" / "faces.parquet", face_id=ids, uri=table["uri"], cluster=cluster)
    labels = [f"person{n}" for n in np.where(np.isin(np.arange(60), [6, 12]), 1, identities)]
    write_table(
        root / "g" / "reports" / "clean" / "decisions.parquet",
        face_id=ids,
        uri=table["uri"],
        identity=pa.array(labels),
        decision=pa.array(["relabel" if n == 6 else "keep" for n in range(60)]),
        suggested=pa.array(["person0" if n == 6 else None for n in range(60)]),
        noise=pa.array([0.9 if n in (6, 12) else 0.01 for n in range(60)], pa.float32()),
    )
    pa.csv.write_csv(pa.table({"face_id": ids, "identity": names}), root / "truth.csv")
    return root / "g"


def write_table(path: Path, **columns: object) -> None:
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), path)


def test_clusters(gallery: Path) -> None:
    code, out, _ = run_facepipe("evaluate", "clusters", gallery, "--json")
    summary = json.loads(out)
    assert (code, summary["faces"], summary["identities"], summary["clusters"]) == (0, 60, 6, 7)
    assert 0.9 < summary["pairwise"]["precision"] < 1
    with_truth = json.loads(
        run_facepipe("evaluate", "clusters", gallery, "--truth", gallery.parent / "truth.csv", "--json")[1]
    )
    assert with_truth == summary
    table = gallery / "reports" / "cluster" / "faces.parquet"
    code, out, _ = run_facepipe("evaluate", "clusters", gallery, "--table", table)
    assert (code, "BCubed" in out, f"{summary['nmi']:.4f}" in out) == (0, True, True)


def test_clean(gallery: Path) -> None:
    code, out, _ = run_facepipe("evaluate", "clean", gallery, gallery.parent / "truth.csv", "--json")
    summary = json.loads(out)
    assert (code, summary["wrong"], summary["flagged"], summary["average_precision"]) == (0, 2, 1, 1.0)
    assert (summary["detection"]["recall"], summary["repaired"], summary["relabels_right"]) == (0.5, 0.5, 1.0)
    table = gallery / "reports" / "clean" / "decisions.parquet"
    code, out, _ = run_facepipe("evaluate", "clean", gallery, gallery.parent / "truth.csv", "--table", table)
    assert (code, "labels by decision" in out, "relabels that are correct" in out) == (0, True, True)


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
def test_errors(words: list[str], code: int, message: str, gallery: Path) -> None:
    exit_code, _, err = run_facepipe("evaluate", *(word.format(gallery=gallery) for word in words))
    assert exit_code == code
    assert message in err
    assert "Traceback" not in err
