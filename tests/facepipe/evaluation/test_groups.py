"""Groups of people: figures at the thresholds of all pairs equal those counted pair by pair, on real folders of a tree."""

import json
import shutil
from pathlib import Path

import numpy as np
from helpers import embed, run_facepipe

from facepipe.evaluation.groups import compare_groups, find_group
from facepipe.evaluation.pairs import evaluate_pairs
from facepipe.gallery import Gallery


def test_the_group_is_a_folder_above_the_image() -> None:
    assert find_group("/data/RFW/African/m.0107_f/m.0107_f_0001.jpg", 2) == "African"
    assert find_group("s3://b/BUPT.tar#race/Asian/m.1/1.jpg", 2) == "Asian"
    assert find_group("/1.jpg", 2) is None
    assert find_group("a/1.jpg", 1) == "a"


def test_rates_are_counted_within_groups() -> None:
    """Any order of pairs gives the same, and a group without impostors has no rate."""
    rng = np.random.default_rng(0)
    count = 4000
    names = ["A", "B", "C", None]
    left = [names[n] for n in rng.integers(0, 4, count)]
    right = [a if rng.random() < 0.7 else names[int(rng.integers(0, 4))] for a in left]
    same = rng.random(count) < 0.5
    same |= np.array([a == "C" for a in left])
    distances = rng.normal(1.0, 0.3, count) - 0.4 * same
    thresholds = {"0.1": 0.7, "1e-06": None}
    found = compare_groups(left, right, distances, same, thresholds)
    order = rng.permutation(count)
    shuffled = [left[n] for n in order], [right[n] for n in order]
    assert compare_groups(*shuffled, distances[order], same[order], thresholds) == found
    assert [group.group for group in found] == ["A", "B", "C"]
    for group in found:
        pairs = [n for n in range(count) if left[n] == right[n] == group.group]
        genuine = [distances[n] <= 0.7 for n in pairs if same[n]]
        impostors = [distances[n] <= 0.7 for n in pairs if not same[n]]
        assert (group.genuine, group.impostors) == (len(genuine), len(impostors))
        assert group.tar == {"0.1": np.mean(genuine), "1e-06": None}
        if not impostors:
            assert group.group == "C"
            assert group.fmr["0.1"] is None
            continue
        rate = group.fmr["0.1"]
        assert rate == np.mean(impostors)
        assert (group.fmr_low["0.1"] or 0) < (rate or 0) < (group.fmr_high["0.1"] or 0)


def test_the_command_shows_the_groups_of_a_tree(drawings: Path, tmp_path: Path) -> None:
    """A tree as BUPT's and RFW's: the folders of persons are labels, those above are groups."""
    for n, path in enumerate(sorted(drawings.rglob("*.png"))):
        group = ("African", "Asian")[n % 2]
        target = tmp_path / "tree" / group / f"{group[:2]}-{path.parent.name}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    fakes = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}}
    gallery = tmp_path / "gallery"
    embed(tmp_path / "tree", gallery, fakes, {"source": {"identity": "folder"}}, runner="inline")
    pairs = tmp_path / "pairs.csv"
    words = ("evaluate", "pairs", gallery, "--draw", 120, "--write", pairs, "--group-folder", 2)
    code, out, errors = run_facepipe(*words)
    assert code == 0, errors
    assert "per group, at the thresholds of all pairs" in out
    assert "African" in out
    code, out, _ = run_facepipe("evaluate", "pairs", gallery, pairs, "--group-folder", 2, "--json")
    found = json.loads(out)
    result = evaluate_pairs(Gallery(str(gallery)), str(pairs), group_level=2)
    assert [group["group"] for group in found["groups"]] == ["African", "Asian"]
    assert sum(group["genuine"] + group["impostors"] for group in found["groups"]) + found["across"] == found["pairs"]
    assert found["across"] == result.across > 0
    assert evaluate_pairs(Gallery(str(gallery)), str(pairs)).groups == []
