"""docs/records.md runs as it is pasted: a noisy .rec becomes a clean one, to train from and to validate on a .bin.

`python tests/test_records_page.py LFW` writes what it prints into the page. LFW has `images` and `pairs.txt`.
"""

import re
import sys
import tempfile
from pathlib import Path

import pytest
from cookbook import REPOSITORY, Runner, keep_equal, read_sections, render

PAGE = REPOSITORY / "docs" / "records.md"
# What is the same on every machine, of what the page prints: the records before cleaning.
_MADE = re.compile(r"\d+ records of \d+ persons, \d+ with a wrong label; \d+ pairs")
_COMPARED = re.compile(r"^(before|after) +(\d+) +(\d+) +(\d+) ", re.MULTILINE)


def run_page(folder: Path, lfw: Path) -> dict[str, list[str]]:
    """Run the page in a folder, and return what it prints by section."""
    (folder / "lfw").symlink_to(lfw)
    (folder / "tests").symlink_to(REPOSITORY / "tests")
    runner = Runner(folder)
    return {
        section.title: [runner.run(step) for step in section.steps]
        for section in read_sections(PAGE.read_text(encoding="utf-8"))
    }


@pytest.mark.slow
def test_a_noisy_rec_becomes_a_clean_one_and_trains(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    outputs = run_page(tmp_path, shared / "data" / "lfw-dev")
    page = PAGE.read_text(encoding="utf-8")
    printed = "".join(output for section in outputs.values() for output in section)
    made = _MADE.search(printed)
    assert made is not None
    assert made.group() in page
    (_, records, _, wrong), (_, kept, _, still_wrong) = _COMPARED.findall(printed)
    assert int(wrong) / int(records) == pytest.approx(0.2, abs=0.001)
    assert int(still_wrong) / int(kept) < 0.02
    assert int(kept) > 0.8 * int(records)
    assert "records whose bytes are not those of the first set: 0" in printed
    assert re.search(r"validation: accuracy 0\.\d+ -> 0\.\d+", printed)
    assert (tmp_path / "model" / "model.toml").exists()


def main(lfw: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="facepipe-records-") as name:
        outputs = run_page(Path(name).resolve(), lfw.resolve())
    page = PAGE.read_text(encoding="utf-8")
    for section in read_sections(page):
        page = page.replace(section.text, render(section, keep_equal(section, outputs[section.title])))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
