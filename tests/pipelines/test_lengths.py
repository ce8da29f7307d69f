"""Vectors of any length, from adopting to erasing: the same steps give the same answers for 64 to 1024 numbers."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hard_faces import EASY, ArcFaceLike
from helpers import run_facepipe

from facepipe.config import build
from facepipe.erasure.selection import Selection
from facepipe.errors import ConfigError, ContractError, ModelError, SourceError
from facepipe.evaluation.clusters import evaluate_clusters
from facepipe.gallery import Contract, Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index import manifest
from facepipe.index.plan import make_plan, open_factory
from facepipe.index.queries import open_queries
from facepipe.index.search import Index, SearchSetting
from facepipe.index.verify import verify_index
from pipelines import adopt, clean, cluster, dedup, erase, index
from pipelines.adopt import AdoptConfig
from pipelines.clean import CleanConfig
from pipelines.cluster import ClusterConfig
from pipelines.dedup import DedupConfig
from pipelines.index import IndexConfig

DIMS = (64, 128, 256, 512, 1024)
PERSONS = 60
EACH = 6
INLINE = {"run": {"runner": "inline"}}


def draw_features(dim: int) -> tuple[np.ndarray, list[str]]:
    """Draw raw vectors of persons, and their names. One row is there twice, and some are labelled wrongly."""
    space = ArcFaceLike(dim, 0.7, dimension=dim, hardness=EASY)
    person = np.repeat(np.arange(PERSONS), EACH)
    vectors = space.draw(space.draw_centres(PERSONS), person).vectors
    lengths = np.random.default_rng(dim).uniform(5, 30, len(vectors)).astype(np.float32)
    names = [f"person{n}" for n in person]
    # Of some persons one face has the next person's name.
    for n in range(0, 10 * EACH, EACH):
        names[n] = f"person{n // EACH + 10}"
    vectors = np.concatenate([vectors, vectors[-1:]]) * np.append(lengths, lengths[-1])[:, None]
    return vectors, [*names, names[-1]]


def write_features(folder: Path, vectors: np.ndarray, names: list[str]) -> tuple[Path, Path]:
    """Write the two files of the face-clustering literature."""
    vectors.astype("<f4").tofile(folder / "part.bin")
    (folder / "part.meta").write_text("\n".join(names) + "\n")
    return folder / "part.bin", folder / "part.meta"


def adopt_features(folder: Path, dim: int) -> tuple[Gallery, np.ndarray]:
    vectors, names = draw_features(dim)
    features, labels = write_features(folder, vectors, names)
    summary = adopt.run(AdoptConfig(str(features), labels=str(labels)), str(folder / "g"))
    assert (summary.adopted, summary.failed) == (len(vectors), 0)
    return Gallery(str(folder / "g")), vectors


@pytest.mark.parametrize("dim", DIMS)
def test_a_chain_of_any_length(dim: int, tmp_path: Path) -> None:
    gallery, raw = adopt_features(tmp_path, dim)
    assert (gallery.dim, gallery.contract.embedder) == (dim, "features:part.bin")
    ids, vectors = gallery.vectors()
    assert vectors.shape == (len(raw), dim)
    # An exact index, and one with lists and codes, find what comparing with all of them finds.
    truth = np.sqrt(np.maximum(0, 2 - 2 * np.sort(vectors[:40].astype(float) @ vectors.T.astype(float))[:, ::-1]))
    for factory in (None, "IVF4,Flat"):
        index.run(build(IndexConfig, {"index": {"factory": factory} if factory else {}}), gallery.path, retrain=True)
        opened = Index(gallery.path)
        assert (opened.dim, opened.live) == (dim, len(ids))
        hits = opened.search(vectors[:40], 10, SearchSetting(4, len(ids)))
        assert np.abs(hits.distances - truth[:, :10]).max() < 2e-3
        assert (opened.get_vectors(ids[:5]) == vectors[:5]).all()
        with pytest.raises(ConfigError, match=rf"queries are \(n, {dim}\)"):
            opened.search(np.ones((1, dim + 1), np.float32), 1)
    assert not verify_index(gallery)
    # The copy is found, persons are, and so are wrong labels.
    copies = dedup.run(build(DedupConfig, INLINE), gallery.path)
    assert copies.drop == 1
    cluster.run(build(ClusterConfig, INLINE), gallery.path)
    scores = evaluate_clusters(gallery).scores
    assert (scores.pairwise.f > 0.85, scores.bcubed.f > 0.85) == (True, True), "the labels have errors"
    cleaned = clean.run(build(CleanConfig, INLINE), gallery.path)
    assert cleaned.decisions["relabel"] + cleaned.decisions["outlier"] >= 8
    # Of an erased person no vector is left in any file.
    gone = gallery.to_arrow(["face_id", "embedding"], "identity = 'person50'")
    bits = [np.array(row, "<f4").tobytes() for row in gone["embedding"].to_pylist()]
    erase.run(Selection(identities=("person50",)), gallery.path)
    content = [path.read_bytes() for path in Path(gallery.path).rglob("*") if path.is_file()]
    assert not any(vector in data for vector in bits for data in content)
    assert len(Gallery(gallery.path).vectors()[0]) == len(ids) - len(gone)
    assert not verify_gallery(Gallery(gallery.path)).problems


@pytest.mark.parametrize("dim", [*DIMS, 101])
def test_a_plan_follows_the_length(dim: int) -> None:
    plan = make_plan(1_000_000, 1 << 40, 0, dim=dim)
    opened = open_factory(plan.factory, dim)
    assert opened.d == dim
    assert plan.vector_bytes == -(-dim // 4) + 8, "a code has half a byte for two numbers"
    assert plan.disk == 1_000_000 * (plan.vector_bytes + 4 * dim + 12) + plan.lists * 4 * dim
    if dim == 128:
        assert plan == make_plan(1_000_000, 1 << 40, 0)
        assert plan.factory == "IVF4096,PQ64x4fs"


def test_lengths_are_not_mixed(tmp_path: Path) -> None:
    for dim in (64, 512):
        (tmp_path / str(dim)).mkdir()
        adopt_features(tmp_path / str(dim), dim)
    small = tmp_path / "64" / "g"
    with pytest.raises(ContractError, match=r"(?s)dim: the gallery has 64, asked for is 512") as caught:
        adopt.run(AdoptConfig(str(tmp_path / "512/part.bin"), dim=512, embedder="features:part.bin"), str(small))
    assert "start a new gallery" in str(caught.value)
    contract = Gallery(str(small)).contract
    with pytest.raises(ContractError, match="dim"):
        open_queries(str(tmp_path / "512" / "g"), contract)
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 512)):
        pq.write_table(pa.table({"embedding": pa.array([[0.0] * 511 + [1.0]] * 3, kind)}), tmp_path / "q.parquet")
        with pytest.raises(ConfigError, match="512 dimensions, the gallery's have 64"):
            open_queries(str(tmp_path / "q.parquet"), contract)
    # Without a name of their own, features of two files are of two models.
    os.rename(tmp_path / "64/part.bin", tmp_path / "other.bin")
    with pytest.raises(ContractError, match=r"features:other\.bin"):
        adopt.run(AdoptConfig(str(tmp_path / "other.bin"), dim=64), str(small))
    named = AdoptConfig(str(tmp_path / "other.bin"), dim=64, embedder="features:part.bin")
    assert adopt.run(named, str(small)).adopted
    # Their model is not here, so that no image can be compared with them.
    code, _, err = run_facepipe("search", small, tmp_path, tmp_path / "out.parquet", "--quiet")
    assert (code != 0, "Traceback" not in err) == (True, True)


def test_features_that_are_refused(tmp_path: Path) -> None:
    vectors, names = draw_features(256)
    features, labels = write_features(tmp_path, vectors, names)

    def run(**options: object) -> adopt.AdoptSummary:
        return adopt.run(AdoptConfig(str(features), **options), str(tmp_path / "g"))  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="nothing says how many make a vector: give --dim"):
        run()
    with pytest.raises(ConfigError, match=f"has {len(names)} labels, and .* has {2 * len(names)} vectors of 128"):
        run(labels=str(labels), dim=128)
    with pytest.raises(SourceError, match="is cut short, or its vectors do not have 100 numbers"):
        run(dim=100)
    labels.write_text("\n".join(names[:7]))
    with pytest.raises(ConfigError, match="each of the 7 labels"):
        run(labels=str(labels))
    labels.write_bytes(b"a\n\xff\xfe\n")
    with pytest.raises(SourceError, match="line 2 is not UTF-8"):
        run(labels=str(labels))
    os.truncate(features, features.stat().st_size - 6)
    with pytest.raises(SourceError, match="cut short"):
        run(dim=256)
    features.write_bytes(b"\x80\x03]q\x00.")
    with pytest.raises(ConfigError, match="is a pickle"):
        run(dim=256)
    features.write_bytes(b"")
    with pytest.raises(SourceError, match="is empty"):
        run(dim=256)
    vectors[:2].tofile(features)
    with pytest.raises(ModelError, match="64 to 1024"):
        run(dim=32)
    assert not (tmp_path / "g").exists()
    # Single rows that are not vectors are refused by themselves, and their neighbours keep their labels.
    vectors[1, 5] = np.nan
    vectors[3] = 0
    features, labels = write_features(tmp_path, vectors, names)
    code, out, err = run_facepipe("adopt", features, tmp_path / "g", "--labels", labels, "--json", "--quiet")
    summary = json.loads(out)
    assert (code, summary["refused"]) == (3, {"not_finite": 1, "zero_vector": 1}), err
    rows = Gallery(str(tmp_path / "g")).to_arrow(["uri", "identity"]).to_pylist()
    numbers = {int(row["uri"].rpartition("#")[2]): row["identity"] for row in rows}
    assert numbers == {n: name for n, name in enumerate(names) if n not in (1, 3)}


def test_a_contract_of_a_wrong_length_is_refused(tmp_path: Path) -> None:
    contract = Contract.from_features("a", 64)
    assert Contract.from_json(contract.to_json()) == contract
    for dim in (0, -1, 4096, "128", None, True):
        with pytest.raises(ContractError, match="dim = "):
            Contract.from_json(replace(contract, dim=dim).to_json())  # type: ignore[arg-type]


def test_an_index_of_an_older_version_goes_on(tmp_path: Path) -> None:
    gallery, _ = adopt_features(tmp_path, 128)
    index.run(IndexConfig(), gallery.path)
    written = manifest.load(gallery.path)
    assert (written.dim, replace(written, contract={}).dim) == (128, 128)
