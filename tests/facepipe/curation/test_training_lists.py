"""The lists that end a cleaning: every image is in exactly one, whatever the reports say."""

import csv
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.curation.cleaning.decide import DECISIONS
from facepipe.curation.cleaning.lists import FAILED, IMAGE_SCHEMA, NO_FACE_FOUND, UNLABELLED
from facepipe.curation.training_lists import (
    COLUMNS,
    REJECTED,
    REVIEW,
    TRAIN,
    TestOverlap,
    TrainingLists,
    write_training_lists,
)
from facepipe.text import restore_cell

# Every decision that an image can have.
IMAGE_DECISIONS = [*(name for name in DECISIONS if name != "bystander"), UNLABELLED, NO_FACE_FOUND, FAILED]
COPY_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("uri", "decision", "kept_uri", "reason")] + [("side", pa.int8())]
)
NAMES = st.sampled_from(["ann", "Bob_B", "=formula", "-", "zoë", "12"])


def make_row(uri: str, decision: str, identity: str | None = "ann", suggested: str = "Bob_B") -> dict[str, Any]:
    is_labelled = decision not in (UNLABELLED, NO_FACE_FOUND, FAILED)
    return {
        "uri": uri,
        "identity": identity if is_labelled or decision == FAILED else None,
        "decision": decision,
        "reason": f"because of {decision}",
        "suggested": suggested if decision == "relabel" else None,
        "noise": 0.25 if is_labelled else None,
        "face_id": 7 if decision not in (NO_FACE_FOUND, FAILED) else None,
        "faces": 2,
    }


def write(
    images: list[dict[str, Any]], kept: dict[str, str], tests: list[TestOverlap] | None = None, **rules: bool
) -> tuple[TrainingLists, dict[str, list[dict[str, str]]]]:
    """Write the lists of some images, and read them again.

    Args:
        images: rows of images.parquet.
        kept: the image that `dedup` keeps for each image that it drops.
        tests: what test galleries share with the images.
        rules: what is trained on.
    """
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.Table.from_pylist(images, IMAGE_SCHEMA), f"{folder}/images.parquet")
        copies = [
            {"uri": uri, "side": 0, "decision": "drop", "kept_uri": kept[uri], "reason": f"copy of {kept[uri]}"}
            for uri in sorted(kept)
        ]
        pq.write_table(pa.Table.from_pylist(copies, COPY_SCHEMA), f"{folder}/copies.parquet")
        out = Path(folder, "out")
        out.mkdir()
        lists = write_training_lists(
            f"{folder}/images.parquet", f"{folder}/copies.parquet", str(out), tests or [], **rules
        )
        rows = {}
        for name, columns in COLUMNS.items():
            with open(out / name, newline="", encoding="utf-8", errors="surrogateescape") as file:
                reader = csv.DictReader(file)
                rows[name] = [{key: restore_cell(cell) for key, cell in row.items()} for row in reader]
                assert tuple(reader.fieldnames or ()) == columns
        return lists, rows


@st.composite
def reports(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, str], list[TestOverlap], dict[str, bool]]:
    """Reports on up to 12 images: any decisions, any groups of copies, two test galleries."""
    count = draw(st.integers(1, 12))
    uris = [f"/p/{draw(st.sampled_from(['=', 'a b', 'x,y', 'ü']))}{n}.jpg" for n in range(count)]
    images = [make_row(uri, draw(st.sampled_from(IMAGE_DECISIONS)), draw(NAMES), draw(NAMES)) for uri in uris]
    # The first of each group is kept, and it is dropped for no other.
    groups = [draw(st.integers(0, 4)) for _ in uris]
    first = {group: uris[groups.index(group)] for group in set(groups)}
    kept = {uri: first[group] for uri, group in zip(uris, groups, strict=True) if group and first[group] != uri}
    tests = [
        TestOverlap(name, pa.array(draw(st.sets(st.sampled_from(uris), max_size=2)), pa.string()), frozenset(people))
        for name, people in (("t1", draw(st.sets(st.sampled_from(["bob b", "12"])))), ("t2", set()))
    ]
    rules = {"relabels": draw(st.booleans()), "unverified": draw(st.booleans())}
    return images, kept, tests, rules


@settings(max_examples=150, deadline=None)
@given(reports())
def test_every_image_is_in_exactly_one_list(case: Any) -> None:
    images, kept, tests, rules = case
    lists, rows = write(images, kept, tests, **rules)
    places = Counter(row["path"] for name in COLUMNS for row in rows[name])
    assert places == Counter(image["uri"] for image in images)
    assert lists.images == len(images)
    counts = (lists.train, lists.review, sum(lists.rejected.values()))
    assert counts == (len(rows[TRAIN]), len(rows[REVIEW]), len(rows[REJECTED]))
    by_uri = {image["uri"]: image for image in images}
    trained = [row["path"] for row in rows[TRAIN]]
    # Nothing that a test gallery holds is trained on or reviewed, and no person in it.
    for name in (TRAIN, REVIEW):
        for row in rows[name]:
            assert not any(row["path"] in test.uris.to_pylist() for test in tests)
            assert not any(row["identity"].replace("_", " ").lower() in test.identities for test in tests)
    # Only what is clean is trained on, and of each group of copies one image at most.
    allowed = {"keep"} | {word for rule, word in (("relabels", "relabel"), ("unverified", "unverified")) if rules[rule]}
    assert all(by_uri[uri]["decision"] in allowed for uri in trained)
    groups = Counter(kept.get(uri, uri) for uri in trained)
    assert all(count == 1 for count in groups.values())
    # A clean picture is trained on if any copy of it can be.
    for image in images:
        uri = image["uri"]
        if image["decision"] == "keep" and uri not in trained:
            in_test = any(uri in test.uris.to_pylist() for test in tests)
            person = image["identity"].replace("_", " ").lower()
            in_test |= any(person in test.identities for test in tests)
            assert in_test or groups[kept.get(uri, uri)] == 1
    # A name has one number, and the numbers have no gap.
    numbers = {row["identity"]: int(row["label"]) for row in rows[TRAIN]}
    assert sorted(numbers.values()) == list(range(lists.identities))
    assert all(numbers[row["identity"]] == int(row["label"]) for row in rows[TRAIN])


def test_reasons_say_why() -> None:
    images = [make_row(f"/{decision}", decision) for decision in IMAGE_DECISIONS]
    images += [make_row("/in", "keep"), make_row("/person", "review", "Bob_B"), make_row("/copy", "keep")]
    tests = [TestOverlap("lfw", pa.array(["/in"]), frozenset({"bob b"}))]
    lists, rows = write(images, {"/copy": "/keep"}, tests)
    reasons = {row["path"]: row["reason"] for row in rows[REJECTED]}
    assert reasons["/in"] == "in the test gallery lfw"
    assert reasons["/person"] == reasons["/relabel"] == "its person is in the test gallery lfw"
    assert reasons["/copy"] == "copy: copy of /keep"
    assert reasons["/failed"] == "cannot be read: because of failed"
    assert reasons["/outlier"] == "wrong label: because of outlier"
    assert {row["path"] for row in rows[TRAIN]} == {"/keep", "/unverified"}
    assert {row["path"] for row in rows[REVIEW]} == {"/review"}
    # Second faces of photos are counted apart: one in each of the labelled images.
    assert lists.other_faces == sum(image["identity"] is not None for image in images)


def test_a_copy_takes_the_place_of_one_that_is_rejected() -> None:
    images = [make_row("/best", "outlier"), make_row("/second", "keep"), make_row("/third", "keep")]
    _, rows = write(images, {"/second": "/best", "/third": "/best"})
    assert [row["path"] for row in rows[TRAIN]] == ["/second"]
    assert {row["path"] for row in rows[REJECTED]} == {"/best", "/third"}
