"""Templates of IJB: figures equal those of a plain implementation of the published protocols; bad files are told."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import embed, run_facepipe

from facepipe.errors import EvaluationError
from facepipe.evaluation.template_files import Subjects, TemplateImages, TemplatePairs, read_template_protocol
from facepipe.evaluation.templates import evaluate_templates, pool_templates, search_templates, verify_templates
from facepipe.gallery import Gallery
from facepipe.imaging.alignment import ARCFACE_112

FAKES = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}, "run": {"runner": "inline"}}


class Plain:
    """The protocols, written down as the papers and insightface's pull request 1387 define them, one item at a time."""

    @staticmethod
    def pool(vectors: np.ndarray, templates: np.ndarray, media: np.ndarray) -> dict[int, np.ndarray]:
        pooled = {}
        for template in sorted(set(templates)):
            of_template = templates == template
            parts = [vectors[of_template & (media == medium)].mean(0) for medium in set(media[of_template])]
            total = np.sum(parts, axis=0)
            pooled[template] = total / np.linalg.norm(total)
        return pooled

    @staticmethod
    def tar(scores: np.ndarray, same: np.ndarray, far: float) -> float:
        impostors = scores[~same]
        best = 0.0
        for threshold in np.unique(scores):
            if (impostors >= threshold).mean() <= far:
                best = max(best, float((scores[same] >= threshold).mean()))
        return best

    @staticmethod
    def tpir(pooled: dict[int, np.ndarray], gallery: Subjects, probes: Subjects, fpir: float) -> float:
        enrolled = np.stack([pooled[t] for t in gallery.templates])
        mated = []
        alarms = []
        for template, subject in zip(probes.templates, probes.subjects, strict=True):
            scores = enrolled @ pooled[template]
            own = scores[gallery.subjects == subject]
            if len(own):
                mated.append((own[0], scores[gallery.subjects != subject].max()))
            else:
                alarms.append(scores.max())
        highest = sorted(alarms, reverse=True)
        threshold = highest[max(int(len(highest) * fpir) - 1, 0)]
        return sum(own > other and own >= threshold for own, other in mated) / len(mated)


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_a_plain_implementation(seed: int) -> None:
    random = np.random.default_rng(seed)
    persons = random.normal(size=(60, 16))
    count = 2500
    templates = random.integers(0, 400, count) * 7
    person_of = {t: int(random.integers(0, 60)) for t in np.unique(templates)}
    media = random.integers(0, 4, count)
    vectors = np.array([persons[person_of[t]] for t in templates]) + random.normal(size=(count, 16)) * 2.5
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    images = TemplateImages([str(n) for n in range(count)], templates, media, np.ones(count, np.float32))
    known, pooled = pool_templates(vectors, images)
    plain = Plain.pool(vectors.astype(np.float64), templates, media)
    assert list(known) == list(plain)
    assert np.abs(pooled - np.stack(list(plain.values()))).max() < 1e-12
    # 1:1
    left = random.choice(known, 3000)
    right = random.choice(known, 3000)
    same = np.array([person_of[a] == person_of[b] for a, b in zip(left, right, strict=True)])
    result = verify_templates(known, pooled, TemplatePairs(left, right, same))
    scores = np.array([plain[a] @ plain[b] for a, b in zip(left, right, strict=True)])
    for far in (1e-3, 1e-2, 1e-1):
        assert abs(Plain.tar(scores, same, far) - (result.tar[f"{far:g}"] or 0)) < 1e-6
    assert result.tar["1e-06"] is None
    # 1:N: a gallery of half of the persons, each enrolled once
    subjects = np.array([person_of[t] for t in known])
    _, once = np.unique(subjects, return_index=True)
    chosen = once[subjects[once] < 30]
    gallery = Subjects(known[chosen], subjects[chosen])
    rest = np.setdiff1d(np.arange(len(known)), chosen)
    probes = Subjects(known[rest], subjects[rest])
    search = search_templates(known, pooled, gallery, probes)
    for fpir in (0.01, 0.1):
        assert abs(Plain.tpir(plain, gallery, probes, fpir) - (search.tpir[f"{fpir:g}"] or 0)) < 1e-6
    firsts = [gallery.subjects[np.argmax(pooled[chosen] @ plain[t])] == person_of[t] for t in known[rest]]
    is_mated = np.isin(subjects[rest], gallery.subjects)
    assert abs(np.array(firsts)[is_mated].mean() - search.ranks["1"]) < 1e-6
    assert (search.mated, search.others) == (int(is_mated.sum()), int((~is_mated).sum()))


def test_frames_of_a_video_count_as_one() -> None:
    vectors = np.array([[1, 0], [0, 1], [0, 1], [0, 1]], np.float32)
    images = TemplateImages(list("abcd"), np.zeros(4, np.int64), np.array([0, 1, 1, 1]), np.ones(4, np.float32))
    _, pooled = pool_templates(vectors, images)
    assert np.allclose(pooled, [[np.sqrt(0.5)] * 2])


def test_false_alarms_are_those_of_strangers_alone() -> None:
    """The trap: pairs of a probe and another's template are no false alarms of a search."""
    pooled = np.eye(4)[[0, 1, 0, 2]]
    pooled[2] = [0.9, np.sqrt(1 - 0.81), 0, 0]
    search = search_templates(
        np.arange(4), pooled, Subjects(np.array([0, 1]), np.array([5, 6])), Subjects(np.array([2, 3]), np.array([5, 9]))
    )
    assert search.ranks["1"] == 1
    assert search.tpir["0.1"] is None, "one stranger cannot show a rate of 0.1"


@pytest.fixture(scope="module")
def meta(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A gallery of drawings, and the files of IJB-C for it."""
    root = tmp_path_factory.mktemp("ijb")
    embed(drawings, root / "g", FAKES)
    rows = Gallery(str(root / "g")).to_arrow(["uri", "face_id"]).to_pylist()
    names = sorted({Path(row["uri"]).name: Path(row["uri"]).parent.name for row in rows}.items())
    folder = root / "meta"
    folder.mkdir()
    persons = sorted({person for _, person in names})
    template = {name: 100 + 10 * persons.index(person) + n % 4 for n, (name, person) in enumerate(names)}
    (folder / "ijbc_face_tid_mid.txt").write_text(
        "".join(f"{name} {template[name]} {n}\n" for n, (name, _) in enumerate(names))
    )
    points = " ".join(["1.5"] * 10)
    (folder / "ijbc_name_5pts_score.txt").write_text("".join(f"{name} {points} 0.9\n" for name, _ in names))
    known = sorted(set(template.values()))
    (folder / "ijbc_template_pair_label.txt").write_text(
        "".join(f"{a} {b} {int(a // 10 == b // 10)}\n" for a in known for b in known if a < b)
    )
    first = {t // 10: t for t in reversed(known)}
    half = dict(list(first.items())[: len(first) // 2])
    header = "TEMPLATE_ID,SUBJECT_ID,FILENAME,FACE_X\n"
    for ending, enrolled in (("G1", half), ("G2", {s: t for s, t in first.items() if s not in half})):
        lines = "".join(f"{t},{s},img/{t}.jpg,1.5\n" for s, t in enrolled.items())
        (folder / f"ijbc_1N_gallery_{ending}.csv").write_text(header + lines)
    probes = [t for t in known if t not in first.values()]
    (folder / "ijbc_1N_probe_mixed.csv").write_text(
        header + "".join(f"{t},{t // 10},img/{t}.jpg,1\n" * 2 for t in probes)
    )
    return str(root / "g"), folder


def test_given_landmarks_are_used(drawings: Path, meta: tuple[str, Path], tmp_path: Path) -> None:
    """The real layout: `loose_crop/NAME` and `meta/`. With the protocol's landmarks every image has a face."""
    gallery, folder = meta
    crops = tmp_path / "IJBC" / "loose_crop"
    crops.mkdir(parents=True)
    names = [line.split()[0] for line in (folder / "ijbc_face_tid_mid.txt").read_text().splitlines()]
    paths = {path.name: path for path in drawings.rglob("*.*")}
    for name in names:
        shutil.copyfile(paths[name], crops / name)
    shutil.copytree(folder, tmp_path / "IJBC" / "meta")
    points = tmp_path / "IJBC" / "meta" / "ijbc_name_5pts_score.txt"
    landmarks = " ".join(f"{value:.3f}" for value in (np.array(ARCFACE_112) / 4).ravel())
    points.write_text("".join(f"{name} {landmarks} {0.5 + n % 5 / 10}\n" for n, name in enumerate(names)))
    embed(crops, tmp_path / "gallery", FAKES, {"source": {"boxes": str(points), "identity": "none"}})
    rows = Gallery(str(tmp_path / "gallery")).to_arrow(["uri", "landmarks", "det_score", "status"]).to_pylist()
    readable = [row for row in rows if row["status"] == "ok"]
    assert {Path(row["uri"]).name for row in rows} == set(names)
    assert len(readable) > len(names) // 2
    for row in readable:
        assert np.allclose(row["landmarks"], (np.array(ARCFACE_112) / 4).ravel(), atol=1e-3)
        assert np.isclose(row["det_score"], 0.5 + names.index(Path(row["uri"]).name) % 5 / 10)
    result = evaluate_templates(Gallery(str(tmp_path / "gallery")), str(tmp_path / "IJBC" / "meta"), "score")
    assert result.images == len(names)
    assert result.without_face == len(names) - len(readable)
    assert result.without_face < evaluate_templates(Gallery(gallery), str(folder), "score").without_face
    assert result.verification is not None
    assert len(result.searches) == 2


@pytest.mark.parametrize("weight", ["none", "score", "norm"])
def test_a_gallery_is_evaluated(meta: tuple[str, Path], weight: Any) -> None:
    gallery, folder = meta
    result = evaluate_templates(Gallery(gallery), str(folder), weight)
    assert result.verification is not None
    assert result.images == len((folder / "ijbc_face_tid_mid.txt").read_text().splitlines())
    assert 0 < result.without_face < result.images
    assert len(result.searches) == 2
    assert all(0 <= share <= 1 for search in result.searches for share in search.ranks.values())


def test_the_command(meta: tuple[str, Path]) -> None:
    gallery, folder = meta
    code, out, _ = run_facepipe("evaluate", "templates", gallery, folder)
    assert code == 0
    assert "TPIR at FPIR 0.1, mean of galleries" in out
    code, out, _ = run_facepipe("evaluate", "templates", gallery, folder, "--json")
    assert json.loads(out)["verification"]["pairs"] > 0


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("ijbc_template_pair_label.txt", "100 999 1\n", "1 templates have no image"),
        ("ijbc_template_pair_label.txt", "100 101 7\n", "must be 0 or 1"),
        ("ijbc_template_pair_label.txt", "100 101\n", "cannot read"),
        ("ijbc_face_tid_mid.txt", "a.jpg x 1\n", "cannot read"),
        ("ijbc_name_5pts_score.txt", "other.jpg " + "1 " * 10 + "0.5\n", "no score of"),
        ("ijbb_face_tid_mid.txt", "a.jpg 1 1\n", "2 files"),
    ],
)
def test_bad_files_are_told(meta: tuple[str, Path], tmp_path: Path, name: str, text: str, reason: str) -> None:
    for path in meta[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=reason):
        read_template_protocol(str(tmp_path))


def test_missing_images_are_told(meta: tuple[str, Path], tmp_path: Path) -> None:
    (tmp_path / "ijbc_face_tid_mid.txt").write_text("gone.jpg 1 1\nfar.jpg 2 2\n")
    (tmp_path / "ijbc_template_pair_label.txt").write_text("1 2 0\n1 1 1\n")
    with pytest.raises(EvaluationError, match=r"2 images of .* are not in the gallery, such as far, gone"):
        evaluate_templates(Gallery(meta[0]), str(tmp_path))
