"""The page as a workbench, in a real browser: select, decide with keys and clicks, undo, keep, export."""

import json
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import browser
import cv2
import numpy as np
import pytest

from facepipe.reports import Face, Group, PhotoPlace, Report, ReviewTarget, write_report
from facepipe.reports.faces import list_distances
from facepipe.reports.model import Step
from facepipe.reports.questions import build_label_choices, build_pair_choices, list_review_steps

# An id that the numbers of a browser cannot hold.
BIG = 9_007_199_254_740_993
HOSTILE = "\u202e</script><img src=x onerror=window.pwned=1>'\"\u2028"
TARGET = ReviewTarget("/data/a gallery's", "clean", 12)
DECIDED = "document.getElementById('progress-text').textContent"
SELECTED = "document.getElementById('selection').textContent"


@cache
def jpeg(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (14, 14, 3), np.uint8)
    return bytes(cv2.imencode(".jpg", cv2.resize(noise, (72, 72)))[1])


def make_face(n: int, person: str, badge: str = "") -> Face:
    place = PhotoPlace(400, 300, (100, 50, 180, 140))
    return Face(f"photos/{n}.jpg", (("label", person),), jpeg(n % 7), badge, BIG + n, person, place)


def label_group(n: int, person: str, other: str) -> Group:
    faces = (make_face(10 * n, person), make_face(10 * n + 1, person), make_face(10 * n + 2, other))
    return Group(
        f"{person}: is this {other}?",
        "relabel",
        (("noise", "0.9"),),
        faces,
        1 - n / 1000,
        choices=build_label_choices(BIG + 10 * n, person, other, suggests_other=True),
        has_subject=True,
        probability=0.9 - n / 1000,
        distances=(0.5, 0.2, 0.6),
    )


def merge_group(n: int) -> Group:
    faces = tuple(make_face(10 * n + k, "", "cluster 1" if k < 2 else "cluster 2") for k in range(4))
    choices = build_pair_choices(faces[0], faces[2], suggests_one=True)
    return Group(
        f"clusters {n}: one person?", "merge", (), faces, 1 - n / 1000, choices=choices, probability=0.5, gain=2
    )


def make_groups(count: int) -> Iterator[Group]:
    for n in range(count):
        yield merge_group(n) if n % 4 == 3 else label_group(n, f"person{n}", f"other{n}")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    steps = list_review_steps(TARGET.gallery, "clean", Step("Clean again:", "facepipe clean"))
    groups = [*make_groups(12), label_group(30, HOSTILE, 'O\'Neil, "x" & <b>')]
    write_report(
        Report("Noisy identities", "g", groups=groups, review=TARGET, findings=("About 3 of 9.",), steps=steps), path
    )
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.PROGRAM is None:
        pytest.skip("no Chromium: `apt-get install chromium` brings one")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def tab(chromium: browser.Browser, page: Path) -> browser.Browser:
    """A tab on the page, with nothing decided."""
    chromium.send("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    chromium.open(page)
    chromium.run("localStorage.clear()")
    chromium.open(page)
    return chromium


def export(tab: browser.Browser, folder: Path) -> list[dict[str, Any]]:
    """Export with the mouse, and read the file."""
    tab.save_downloads(folder)
    tab.click("#export-open")
    tab.wait("document.getElementById('export').open")
    tab.click("#download")
    tab.click("#export form button")
    for _ in range(500):
        files = list(folder.glob("decisions-clean-*.jsonl"))
        if files:
            break
        tab.wait("new Promise((done) => setTimeout(() => done(true), 20))")
    assert files, "nothing was downloaded"
    return [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]


def test_decide_with_keys_up_to_the_file(tab: browser.Browser, tmp_path: Path) -> None:
    assert tab.run(DECIDED) == "0 of 13 decided"
    # Accept the first, reject the second, neither of the third; the focus goes on by itself.
    tab.press("j", "a", "r", "o")
    assert tab.run(DECIDED) == "3 of 13 decided"
    tab.press("u")
    assert tab.run(DECIDED) == "2 of 13 decided"
    tab.press("Z", modifiers=browser.CONTROL | browser.SHIFT)
    assert tab.run(DECIDED) == "3 of 13 decided"
    header, *lines = export(tab, tmp_path)
    assert header == {"facepipe_decisions": 1, "gallery": "/data/a gallery's", "report": "clean", "table_version": 12}
    assert [(line["decision"], line["face_id"], line.get("person")) for line in lines] == [
        ("is", str(BIG), "other0"),
        ("is", str(BIG + 10), "person1"),
        ("is_not", str(BIG + 20), "person2"),
        ("is_not", str(BIG + 20), "other2"),
    ]
    assert all(line["when"].endswith("Z") and line["why"].startswith("clean report, relabel") for line in lines)
    assert tab.messages == []
    assert tab.run("document.getElementById('precision').textContent").startswith("relabel: 2 of 3 suggestions right")


def test_a_new_answer_replaces_the_old_one(tab: browser.Browser, tmp_path: Path) -> None:
    tab.press("j", "a", "k", "r")
    assert tab.run(DECIDED) == "1 of 13 decided"
    lines = export(tab, tmp_path)[1:]
    assert [(line["decision"], line["person"]) for line in lines] == [("is", "person0")]


def test_select_with_the_mouse_and_decide(tab: browser.Browser, tmp_path: Path) -> None:
    faces = ".group:nth-child({}) .face:nth-child({}) button.picture"
    tab.click(faces.format(1, 1))
    tab.click(faces.format(2, 3), browser.SHIFT)
    assert tab.run(SELECTED) == "6 faces selected"
    tab.click(faces.format(1, 2), browser.CONTROL)
    assert tab.run(SELECTED) == "5 faces selected"
    assert tab.run("document.querySelectorAll('.face.selected').length") == 5
    tab.click("#act-x")
    assert tab.run(SELECTED) == ""
    # Pairs: one person, and different persons.
    for n in (4, 8):
        tab.click(faces.format(n, 1))
        tab.click(faces.format(n, 3))
        tab.press("m" if n == 4 else "d")
    lines = export(tab, tmp_path)[1:]
    assert sum(line["decision"] == "not_a_face" for line in lines) == 5
    pairs = [line for line in lines if "other_face_id" in line]
    assert [(line["decision"], {line["face_id"], line["other_face_id"]}) for line in pairs] == [
        ("same_as", {str(BIG + 30), str(BIG + 32)}),
        ("different_from", {str(BIG + 70), str(BIG + 72)}),
    ]
    assert tab.messages == []


def test_select_with_keys_and_give_a_name(tab: browser.Browser, tmp_path: Path) -> None:
    tab.press("j", "ArrowRight")
    tab.press("ArrowRight", modifiers=browser.SHIFT)
    assert tab.run(SELECTED) == "2 faces selected"
    tab.press("Escape")
    assert tab.run(SELECTED) == ""
    tab.press("g")
    assert tab.run(SELECTED) == "3 faces selected"
    tab.press("e")
    tab.wait("document.getElementById('naming').open")
    tab.press(*"Jose\u0301 <b>", "Enter")
    tab.wait("!document.getElementById('naming').open")
    lines = export(tab, tmp_path)[1:]
    assert [(line["decision"], line["person"]) for line in lines] == [("is", "Jos\u00e9 <b>")] * 3
    assert {line["face_id"] for line in lines} == {str(BIG + n) for n in range(3)}


def test_labels_and_faces_that_are_not_selected(tab: browser.Browser, tmp_path: Path) -> None:
    # The group's subject is meant if nothing is selected; a pair of clusters has none.
    tab.press("j", "w", "j", "i", "j", "j", "x")
    assert "Select faces first" in tab.run("document.getElementById('said').textContent")
    lines = export(tab, tmp_path)[1:]
    assert [(line["decision"], line["face_id"]) for line in lines] == [("is_not", str(BIG)), ("ignore", str(BIG + 10))]


def test_decisions_outlive_the_page_and_two_tabs_share_them(tab: browser.Browser, page: Path) -> None:
    first = tab.session
    tab.press("j", "a")
    second = tab.open_tab()
    try:
        tab.open(page)
        assert tab.run(DECIDED) == "1 of 13 decided"
        tab.press("j", "j", "a")
        assert tab.run(DECIDED) == "2 of 13 decided"
        tab.turn_to(first)
        tab.wait(f"{DECIDED} === '2 of 13 decided'")
        # Each tab undoes its own acts.
        tab.press("u")
        assert tab.run(DECIDED) == "1 of 13 decided"
        tab.press("u")
        assert tab.run(DECIDED) == "1 of 13 decided"
        tab.turn_to(second)
        tab.wait(f"{DECIDED} === '1 of 13 decided'")
        assert tab.run("[...document.querySelectorAll('.decided h3')].map((title) => title.textContent)") == [
            "person1: is this other1?"
        ]
    finally:
        tab.send("Page.close")
        tab.turn_to(first)


def test_other_versions_and_reports_have_decisions_of_their_own(tab: browser.Browser, tmp_path: Path) -> None:
    tab.press("j", "a")
    other = ReviewTarget(TARGET.gallery, TARGET.report, TARGET.table_version + 1)
    write_report(Report("r", groups=make_groups(3), review=other), tmp_path / "r.html")
    tab.open(tmp_path / "r.html")
    assert tab.run(DECIDED) == "0 of 3 decided"


def test_a_browser_that_keeps_nothing_says_so(tab: browser.Browser, page: Path) -> None:
    broken = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no'); }})"
    script = tab.send("Page.addScriptToEvaluateOnNewDocument", source=broken)["identifier"]
    try:
        tab.open(page)
        assert "export before you close" in tab.run("document.getElementById('storage').textContent")
        tab.press("j", "a")
        assert tab.run(DECIDED) == "1 of 13 decided"
        tab.press("u")
    finally:
        tab.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_hostile_names_stay_names(tab: browser.Browser, tmp_path: Path) -> None:
    tab.press("/", *"photos/300")
    tab.wait("document.querySelectorAll('.group').length === 1")
    tab.run("document.getElementById('filter').blur()")
    tab.press("j", "r", "a", "Enter")
    assert tab.run("typeof window.pwned") == "undefined"
    assert "\\u{202e}" in tab.run("document.querySelector('.choice:nth-child(2)').textContent")
    tab.wait("document.getElementById('look').open")
    assert tab.run("document.querySelectorAll('#list b, img[src=x]').length") == 0
    tab.press("Escape")
    assert export(tab, tmp_path)[1]["person"] == 'O\'Neil, "x" & <b>'
    assert tab.messages == []


def test_look_larger_and_compare(tab: browser.Browser, tmp_path: Path) -> None:
    tab.press("j", "ArrowRight", "Enter")
    tab.wait("document.getElementById('look').open")
    shown = tab.run("document.getElementById('look').textContent")
    assert "photos/0.jpg" in shown
    assert "80 × 90 px, 100 px from the left, 50 px from the top" in shown
    assert "person0: is this other0?" in shown
    assert tab.run("document.querySelectorAll('#look svg rect').length") == 2
    near = "[...document.querySelectorAll('.near button')].map((button) => button.textContent)"
    assert tab.run(near) == ["0.200", "0.500"]
    tab.press("ArrowRight")
    assert tab.run("document.getElementById('look-title').textContent") == "Face 2 of 3"
    assert tab.run(near) == ["0.500", "0.600"]
    tab.press("x", "Escape")
    assert tab.run("document.querySelectorAll('.verdict').length") == 1
    tab.press("c", "j", "c")
    tab.wait("document.getElementById('compare').open")
    assert tab.run("[...document.querySelectorAll('#compare h3')].map((title) => title.textContent)") == [
        "person0: is this other0?",
        "person1: is this other1?",
    ]
    tab.click("#compare-different")
    lines = export(tab, tmp_path)[1:]
    assert [line["decision"] for line in lines] == ["not_a_face", "different_from"]
    assert {lines[1]["face_id"], lines[1]["other_face_id"]} == {str(BIG), str(BIG + 10)}


def test_open_questions_and_what_is_learnt(tab: browser.Browser) -> None:
    tab.click("#open")
    titles = "[...document.querySelectorAll('.group h3')].map((title) => title.textContent)"
    first = tab.run(titles)
    tab.run("document.getElementById('open').blur()")
    tab.press("j", "r", "r", "r", "a")
    tab.run("(sort.value = 'gain', sort.dispatchEvent(new Event('change')))")
    # Relabels were wrong each time, and merges were not: these come first now.
    assert tab.run(titles)[0].endswith("one person?")
    assert len(tab.run(titles)) == len(first) - 4
    learnt = tab.run(
        "[0.2, 0.8].map(facepipeCalibration([...Array(9)].map(() => ({probability: 0.8, agrees: false}))))"
    )
    assert learnt[0] < learnt[1] < 0.4
    untouched = tab.run("[0.1, 0.5, 0.9].map(facepipeCalibration([]))")
    assert untouched == pytest.approx([0.1, 0.5, 0.9])


def test_a_phone_and_paper(tab: browser.Browser, page: Path) -> None:
    tab.send("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=2, mobile=True)
    tab.open(page)
    assert tab.run("document.documentElement.scrollWidth <= innerWidth"), "nothing widens the page"
    heights = tab.run(
        "[...document.querySelectorAll('.choice')].map((button) => button.getBoundingClientRect().height)"
    )
    assert min(heights) >= 40
    tab.click(".choice")
    assert tab.run(DECIDED) == "1 of 13 decided"
    tab.send("Emulation.setEmulatedMedia", media="print")
    assert tab.run("getComputedStyle(document.getElementById('workbar')).display") == "none"
    assert tab.run("getComputedStyle(document.querySelector('.choice[aria-pressed=true]')).display") != "none"
    tab.send("Emulation.setEmulatedMedia", media="")


def test_a_thousand_faces_among_ten_thousand_groups(tab: browser.Browser, tmp_path: Path) -> None:
    write_report(Report("large", groups=make_groups(10_000), review=TARGET), tmp_path / "r.html", 1 << 20)
    tab.open(tmp_path / "r.html", "#size=12")
    assert tab.run("document.querySelectorAll('.group').length") == 12
    nodes = tab.run("document.querySelectorAll('*').length")
    tab.press("/", *"photos/1")
    tab.wait("document.getElementById('status').textContent.includes('of 1,11')")
    tab.run("document.getElementById('filter').blur()")
    tab.press("G")
    selected = int(tab.run(SELECTED).split()[0].replace(",", ""))
    assert selected >= 1000
    tab.press("i")
    assert tab.run("document.querySelectorAll('*').length") <= nodes + 100
    assert len(export(tab, tmp_path)) == selected + 1
    assert tab.run("Object.keys(localStorage).filter((key) => key.includes('|')).length") == 1
    tab.run("localStorage.clear()")


def find_axe() -> Path | None:
    """axe-core: the file that FACEPIPE_AXE names, or that of the package axe-core-python."""
    if "FACEPIPE_AXE" in os.environ:
        return Path(os.environ["FACEPIPE_AXE"])
    package = find_spec("axe_core_python")
    return Path(package.origin).parent / "axe.min.js" if package and package.origin else None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scheme: str, tab: browser.Browser, page: Path) -> None:
    axe = find_axe()
    if axe is None:
        pytest.skip("no axe-core: `pip install axe-core-python` brings one, or FACEPIPE_AXE names its file")
    tab.prefer(scheme)
    tab.press("j", "a", "g")
    tab.run(axe.read_text(encoding="utf-8") + "; 0")
    for dialog in ("", "look", "help", "export", "naming", "compare"):
        tab.run("document.querySelector('dialog[open]')?.close()")
        if dialog == "look":
            tab.press("Enter")
        elif dialog == "compare":
            tab.press("Escape", "j", "c", "j", "c")
        elif dialog:
            tab.run(f"document.getElementById('{dialog}').showModal()")
        found = tab.run(
            "axe.run({resultTypes: ['violations']}).then((result) => result.violations"
            ".filter((one) => one.impact === 'serious' || one.impact === 'critical')"
            ".map((one) => [one.id, one.nodes.map((node) => node.html.slice(0, 200) + node.failureSummary)]))"
        )
        assert found == [], dialog


def test_distances_are_listed_by_pairs() -> None:
    vectors = np.eye(3, 128, dtype=np.float32)
    vectors[2] = vectors[0]
    assert list_distances(vectors) == pytest.approx([2**0.5, 0, 2**0.5])
    assert list_distances(vectors[:1]) == ()
