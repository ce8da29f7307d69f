"""Measure what decisions of people cost, whether they hold, and what they gain.

    python tests/bench/decided.py hold OUT --faces 100000 --decisions 10000 --runs 3
    python tests/bench/decided.py review GALLERY OUT --report cluster
    python tests/bench/decided.py review GALLERY OUT --report clean --flip 0.1

`hold` draws a gallery, clusters it without and with decisions, and then again and again with 30 % of its faces replaced.
It prints the time of both, and counts confirmed faces that lost their person, and decisions that are broken.

`review` lets a simulated reviewer, who knows the labels of a gallery, answer the questions of a report: in the orders of
the page, and in random order. It prints the F of the clusters, or the share of wrong labels, after some decisions.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction
from galleries import CONTRACT, Faces, append, rows

import pipelines.clean
import pipelines.cluster.pipeline
from facepipe.config import build
from facepipe.curation.clusters.persons import PERSONS
from facepipe.curation.clusters.tables import FACES
from facepipe.decisions import add_decisions, read_decisions
from facepipe.decisions.gallery import DecidedGallery
from facepipe.evaluation.clusters import evaluate_clusters
from facepipe.gallery import Gallery
from facepipe.gallery.commits.parts import compute_statistics, encode_parquet
from facepipe.schema import conform

SHARE = 0.3  # of the faces, that are replaced between two runs
AFTER = (0, 50, 200, 1000)
Row = dict[str, Any]


def run_cluster(gallery: Gallery) -> dict[str, float]:
    """Cluster, and return the seconds per phase."""
    settings = {"run": {"runner": "inline"}, "graph": {"threshold": 0.42} if gallery.contract == CONTRACT else {}}
    config = build(pipelines.cluster.pipeline.ClusterConfig, settings)
    return pipelines.cluster.pipeline.run(config, gallery.path).seconds


def write_rows(gallery: Gallery, kept: pa.Table) -> Gallery:
    """Rewrite the table of a gallery with these rows."""
    table = DeltaTable(gallery.faces_folder)
    now = int(time.time() * 1000)
    actions: list[Any] = [RemoveAction(file["path"], True, now) for file in Gallery(gallery.path).files()]
    data = encode_parquet(conform(kept))
    name = f"rewritten-{time.time_ns()}.parquet"
    Path(gallery.faces_folder, name).write_bytes(data)
    actions.append(AddAction(name, len(data), {}, now, True, compute_statistics(conform(kept))))
    table.create_write_transaction(actions, "append", table.schema())
    return Gallery(gallery.path)


def decide(gallery: Gallery, decided: list[Row]) -> None:
    """Add decisions."""
    written = [{name: str(value) for name, value in row.items()} for row in decided]
    summary = add_decisions(gallery, written, who="reviewer")
    assert summary.is_applied, summary.problems[:3]


def draw_decisions(ids: np.ndarray, truth: np.ndarray, count: int, seed: int) -> list[Row]:
    """Draw decisions that are true, and a few that no face shows: half names, a quarter of each kind of pair."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(ids))[: 2 * count]
    decided: list[Row] = []
    named = chosen[: count // 2]
    decided += [{"decision": "is", "face_id": ids[at], "person": f"name {truth[at]}"} for at in named.tolist()]
    by_person = np.argsort(truth[chosen], kind="stable")
    left = chosen[by_person[:-1]]
    right = chosen[by_person[1:]]
    is_same = truth[left] == truth[right]
    for kind, wanted in (("same_as", is_same), ("different_from", ~is_same)):
        pairs = np.flatnonzero(wanted)[: count // 4]
        decided += [
            {"decision": kind, "face_id": ids[left[at]], "other_face_id": ids[right[at]]} for at in pairs.tolist()
        ]
    return decided


def count_broken(gallery: Gallery, person_of_name: dict[str, int]) -> dict[str, int]:
    """Count the confirmed faces, those that are not with their person, and the pairs that are broken."""
    folder = Path(gallery.path, "reports", "cluster")
    faces = pq.read_table(folder / FACES, columns=["face_id", "cluster"])
    clusters = dict(zip(faces["face_id"].to_pylist(), faces["cluster"].to_pylist(), strict=True))
    persons = {row["cluster"]: row for row in pq.read_table(folder / PERSONS).to_pylist()}
    decisions = read_decisions(gallery)
    counts = {"confirmed": 0, "lost": 0, "pairs": 0, "broken": 0}
    confirmed = decisions.confirmed
    for face, name in zip(confirmed.face_id.tolist(), confirmed.person.to_pylist(), strict=True):
        row = persons[clusters[face]]
        counts["confirmed"] += 1
        counts["lost"] += row["name"] != name or person_of_name.setdefault(name, row["person"]) != row["person"]
    for is_one, pairs in ((True, decisions.same_pairs), (False, decisions.different_pairs)):
        for first, second in pairs.tolist():
            counts["pairs"] += 1
            counts["broken"] += (clusters[first] == clusters[second]) != is_one
    return counts


def measure_hold(args: argparse.Namespace) -> None:
    """Measure time with and without decisions, and whether they hold over several runs."""
    out = args.out / "gallery"
    shutil.rmtree(out, ignore_errors=True)
    gallery = Gallery.create(str(out), CONTRACT)
    parts = []
    first = 0
    truth = []
    for identities, vectors in Faces().blocks(args.faces):
        parts.append(rows(identities, vectors, first))
        truth.append(identities)
        first += len(identities)
    append(gallery, parts, "first")
    gallery = Gallery(gallery.path)
    table = pa.concat_tables(parts)
    ids = np.array(table["face_id"].to_pylist())
    persons = np.concatenate(truth)
    print(json.dumps({"faces": len(ids), "first run": run_cluster(gallery)}), flush=True)
    without = [run_cluster(gallery) for _ in range(args.repeats)]
    decided = draw_decisions(ids, persons, args.decisions, 0)
    began = time.monotonic()
    decide(gallery, decided)
    print(json.dumps({"decisions": len(decided), "applied in s": round(time.monotonic() - began, 1)}), flush=True)
    with_decisions = [run_cluster(gallery) for _ in range(args.repeats)]
    fastest = [min(sum(seconds.values()) for seconds in runs) for runs in (without, with_decisions)]
    print(json.dumps({"without": without, "with": with_decisions, "ratio": round(fastest[1] / fastest[0], 3)}))
    person_of_name: dict[str, int] = {}
    print(json.dumps(count_broken(gallery, person_of_name)), flush=True)
    rng = np.random.default_rng(1)
    for run in range(args.runs):
        kept = rng.random(len(ids)) >= SHARE
        gallery = write_rows(gallery, table.filter(pa.array(kept)))
        run_cluster(gallery)
        print(json.dumps({"run": run + 1} | count_broken(gallery, person_of_name)), flush=True)


class Reviewer:
    """Answers questions by the labels of a gallery; asks nobody twice."""

    def __init__(self, gallery: Gallery):
        # The first face of a photo bears its label.
        table = gallery.to_arrow(["face_id", "identity", "face_index"], "face_id is not null and face_index = 0")
        self._truth = dict(zip(table["face_id"].to_pylist(), table["identity"].to_pylist(), strict=True))
        self._seen: set[tuple[Any, ...]] = set()

    def answer(self, groups: list[Any], count: int) -> list[Row]:
        """Answer some questions of a page, those whose answer is known and new."""
        decided: list[Row] = []
        answered = 0
        for group in groups:
            if answered == count:
                break
            true = next((c.decisions for c in group.choices if all(map(self._is_true, c.decisions))), ())
            keys = {tuple(sorted(map(str, (d.face_id, d.other_face_id or d.person)))) for d in true}
            if not true or keys <= self._seen:
                continue
            self._seen |= keys
            answered += 1
            decided += [self._write(decision) for decision in true]
        return decided

    def _is_true(self, decision: Any) -> bool:
        person = self._truth.get(decision.face_id)
        if person is None:
            return False
        if decision.decision in ("is", "is_not"):
            return bool((person == decision.person) == (decision.decision == "is"))
        other = self._truth.get(decision.other_face_id)
        return other is not None and (person == other) == (decision.decision == "same_as")

    def _write(self, decision: Any) -> Row:
        row = {"decision": decision.decision, "face_id": decision.face_id}
        if decision.other_face_id is not None:
            row["other_face_id"] = decision.other_face_id
        if decision.person:
            row["person"] = decision.person
        return row

    def count_wrong(self, gallery: str) -> float:
        """Compute the share of wrong labels of the faces that have one by now."""
        table = DecidedGallery(gallery).to_arrow(["face_id", "identity"], "face_id is not null and face_index = 0")
        labels = zip(table["face_id"].to_pylist(), table["identity"].to_pylist(), strict=True)
        wrong = [self._truth[face] != label for face, label in labels if label is not None]
        return sum(wrong) / len(wrong)


def iterate_groups(module: Any, run: Any) -> Iterator[Any]:
    """Run a report, and yield the groups of its page."""
    pages: list[Any] = []
    write = module.write_report

    def capture(report: Any, path: str) -> None:
        pages.append(list(report.groups))
        write(report, path)

    module.write_report = capture
    try:
        run()
    finally:
        module.write_report = write
    yield from pages[0]


def measure_review(args: argparse.Namespace) -> None:
    """Let the reviewer work in the page's order, and in random order."""
    for order in args.order:
        path = args.out / f"{args.report}-{order}"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(args.gallery, path, ignore=shutil.ignore_patterns("reports", "decisions", "index"))
        gallery = Gallery(str(path))
        reviewer = Reviewer(gallery)
        if args.flip:
            gallery = flip_labels(gallery, args.flip)
        rng = np.random.default_rng(0)
        done = 0
        asked = 0
        for goal in AFTER:
            while True:
                groups = list(make_report(args.report, gallery))
                if done >= goal:
                    break
                groups = sort_groups(groups, order, rng)
                # A page is worked through until its end, or until the goal.
                decided = reviewer.answer(groups, goal - done)
                if not decided:
                    break
                decide(gallery, decided)
                done += len(decided)
                asked += 1
            figures = {"order": order, "decisions": done, "pages": asked} | score(args.report, gallery, reviewer)
            print(json.dumps(figures), flush=True)


def sort_groups(groups: list[Any], order: str, rng: np.random.Generator) -> list[Any]:
    """Sort questions as the page does: by suspicion, by what a right answer gains, or in no order at all."""
    if order == "random":
        return [groups[at] for at in rng.permutation(len(groups))]
    if order == "gain":
        return sorted(groups, key=lambda group: -(group.probability or 0.0) * group.gain)
    return sorted(groups, key=lambda group: -group.suspicion)


def make_report(report: str, gallery: Gallery) -> Iterator[Any]:
    """Make a report and yield the groups of its page."""
    if report == "cluster":
        module: Any = pipelines.cluster.pipeline
        return iterate_groups(module, lambda: run_cluster(gallery))
    config = build(pipelines.clean.CleanConfig, {"run": {"runner": "inline"}})
    return iterate_groups(pipelines.clean, lambda: pipelines.clean.run(config, gallery.path))


def score(report: str, gallery: Gallery, reviewer: Reviewer) -> dict[str, float]:
    """Compute what the decisions have gained."""
    if report == "cluster":
        scores = evaluate_clusters(Gallery(gallery.path)).scores
        return {"pairwise F": round(scores.pairwise.f, 4), "BCubed F": round(scores.bcubed.f, 4)}
    return {"wrong labels": round(reviewer.count_wrong(gallery.path), 5)}


def flip_labels(gallery: Gallery, share: float) -> Gallery:
    """Give a share of the photos the label of another one."""
    table = conform(gallery.to_arrow())
    uris = table["uri"].to_pylist()
    identities = table["identity"].to_pylist()
    rng = np.random.default_rng(3)
    photos = sorted({uri for uri, identity in zip(uris, identities, strict=True) if identity})
    label_of = dict(zip(uris, identities, strict=True))
    flipped = {uri: label_of[photos[int(rng.integers(len(photos)))]] for uri in photos if rng.random() < share}
    labels = [flipped.get(uri, identity) for uri, identity in zip(uris, identities, strict=True)]
    at = table.schema.get_field_index("identity")
    return write_rows(gallery, table.set_column(at, table.schema.field(at), pa.array(labels, pa.string())))


def main() -> None:
    """Run one of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    hold = commands.add_parser("hold")
    hold.add_argument("out", type=Path)
    hold.add_argument("--faces", type=int, default=100_000)
    hold.add_argument("--decisions", type=int, default=10_000)
    hold.add_argument("--runs", type=int, default=3)
    hold.add_argument("--repeats", type=int, default=2)
    hold.set_defaults(measure=measure_hold)
    review = commands.add_parser("review")
    review.add_argument("gallery", type=Path)
    review.add_argument("out", type=Path)
    review.add_argument("--report", choices=["cluster", "clean"], default="cluster")
    review.add_argument("--flip", type=float, default=0.0)
    review.add_argument("--order", nargs="+", default=["suspicion", "gain", "random"])
    review.set_defaults(measure=measure_review)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.measure(args)


if __name__ == "__main__":
    main()
