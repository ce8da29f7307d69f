"""Let a reviewer who knows the truth work through the page of `facepipe cluster`, and score the clusters anew.

    python tests/bench/reviewer.py GALLERY OUT [--decisions 0 50 200 1000]

GALLERY holds labelled faces (`facepipe embed lfw-dev/images GALLERY --identity folder`) and the report of `facepipe
cluster`. The reviewer answers the first questions in the order of the page, in that of older pages, and as many drawn at
random. Each time a copy
of the gallery in OUT gets the decisions and is clustered again.
"""

import argparse
import random
import shutil
from pathlib import Path

from facepipe.decisions import add_decisions
from facepipe.evaluation.clusters import evaluate_clusters
from facepipe.gallery import Gallery
from facepipe.reports.html import JsonGroup, iterate_groups
from pipelines.cluster import ClusterConfig, run


def answer(group: JsonGroup, truth: dict[str, str]) -> list[dict[str, str]]:
    """Answer a question by the truth about the two faces that it is about."""
    row = group["choices"][0]["rows"][0]
    is_one = truth[row["faces"][0]] == truth[row["other"]]
    decision = "same_as" if is_one else "different_from"
    return [{"decision": decision, "face_id": row["faces"][0], "other_face_id": row["other"]}]


def review(gallery: Path, out: Path, groups: list[JsonGroup], truth: dict[str, str]) -> str:
    """Apply the answers to a copy of the gallery, cluster it again, and describe the score."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(gallery, out)
    rows = [row for group in groups for row in answer(group, truth)]
    right = sum(
        group["choices"][0]["rows"][0]["decision"] == row["decision"] for group, row in zip(groups, rows, strict=True)
    )
    if rows:
        summary = add_decisions(str(out), rows, who="truth", skip_bad=True)
        assert summary.refused <= len(rows)
    run(ClusterConfig(), str(out), keep_ids=True)
    scores = evaluate_clusters(Gallery(str(out))).scores
    pairs = scores.pairwise
    figures = f"{pairs.precision:.4f} {pairs.recall:.4f} {pairs.f:.4f} {scores.bcubed.f:.4f}"
    return f"{len(rows):9} {right:5} {figures}"


def rank_by_distance(group: JsonGroup) -> tuple[bool, float]:
    """Rank merges by their distance, the nearest first, and splits behind them, the least similar first."""
    figures = dict(group["figures"])
    if group["kind"] == "merge":
        return False, float(figures["mean distance"])
    return True, -float(figures["distance between the parts"])


def main() -> None:
    """Compare the order of the page with a random one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gallery", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--decisions", type=int, nargs="+", default=[0, 50, 200, 1000])
    arguments = parser.parse_args()
    table = Gallery(str(arguments.gallery)).to_arrow(["face_id", "identity"], "face_id is not null")
    truth = dict(zip(map(str, table["face_id"].to_pylist()), table["identity"].to_pylist(), strict=True))
    page = arguments.gallery / "reports" / "cluster" / "report.html"
    questions = [group for group in iterate_groups(str(page)) if group.get("choices")]
    shuffled = random.Random(0).sample(questions, len(questions))
    print("order    decisions right pairs: P, R, F       BCubed F")
    # Up to 0.1.0 the page showed merges by their distance, and then splits.
    by_distance = sorted(questions, key=rank_by_distance)
    for name, order in (("page", questions), ("distance", by_distance), ("random", shuffled)):
        for count in arguments.decisions:
            print(f"{name:8}", review(arguments.gallery, arguments.out, order[:count], truth), flush=True)


if __name__ == "__main__":
    main()
