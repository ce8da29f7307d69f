"""Text of any language: filters, erasure and other readers find every row, also in a table of an older version."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from bench.galleries import CONTRACT, Faces
from bench.galleries import rows as make_rows
from deltalake import DeltaTable
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from facepipe import storage
from facepipe.arrow import set_columns
from facepipe.erasure.selection import Selection, select_images
from facepipe.errors import ConfigError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord, compute_statistics, encode_parquet
from facepipe.gallery.commits.rewrite import plan_rewrite_of_uris, rewrite_files
from facepipe.gallery.filters import parse_filter
from facepipe.gallery.maintenance.compact import CompactConfig
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.hashing import compute_face_id, compute_image_id
from facepipe.schema import FACES, LATER, conform
from facepipe.sources.labels import format_label
from pipelines import compact

# One of each kind that some reader, writer or escape could get wrong.
TEXTS = [
    "\U00020bb7\u7530",  # a character of the second plane, common in Japanese names
    "\U0001f600",
    "flag \U0001f3f4\U000e0067\U000e007f",
    "\U0010ffff",
    "Jos\u00e9",
    "\u1ec7",
    "\u202eright to left",
    "\u0645\u062d\u0645\u062f",
    "O'Brien",
    'a "b"',
    "back\\slash \\n \\'",
    "line\nbreak\r",
    "nul\0",
    "\x1f\x7f\x85\u2028",
    "%20 %FF # ? *",
    "\ufeffmark",
    "\uffff\ufffe",
    " blank ",
]


def make_gallery(path: Path, labels: list[str]) -> Gallery:
    """Make a gallery of one file per label, whose only image has the label in its uri."""
    gallery = Gallery.create(str(path), CONTRACT)
    faces = Faces().draw(np.arange(len(labels)), 0)
    records = []
    for n, label in enumerate(labels):
        rows = make_rows(np.arange(1), faces[n : n + 1], n)
        uri = f"/{label}/{n}.jpg"
        face_id = compute_face_id(uri, rows["image_id"][0].as_py(), 0)
        texts = {"identity": [label], "uri": [uri], "source": [label], "face_id": [face_id]}
        rows = conform(set_columns(rows, {name: pa.array(values) for name, values in texts.items()}), FACES)
        data = encode_parquet(rows)
        name = f"part-text-{n:06d}-{compute_image_id(data)}.parquet"
        storage.write(storage.join(gallery.faces_folder, name), data)
        stats = compute_statistics(rows)
        records.append(PartRecord(n, images=1, rows=1, path=name, size=len(data), stats=stats))
    Committer(gallery, "text")(records, {})
    return Gallery(gallery.path)


def make_old(gallery: Gallery) -> Gallery:
    """Turn a gallery into one of an older version: ranges with escapes, no mark, and no later columns."""
    for path in Path(gallery.faces_folder, "_delta_log").glob("*.json"):
        actions = [json.loads(line) for line in path.read_text().splitlines()]
        for action in actions:
            if "add" in action:
                stats = json.loads(action["add"]["stats"])
                for values in (stats["minValues"], stats["maxValues"], stats["nullCount"]):
                    for name in LATER:
                        values.pop(name, None)
                action["add"]["stats"] = json.dumps(stats)
            if "metaData" in action:
                del action["metaData"]["configuration"]["facepipe.text"]
                schema = json.loads(action["metaData"]["schemaString"])
                schema["fields"] = [field for field in schema["fields"] if field["name"] not in LATER]
                action["metaData"]["schemaString"] = json.dumps(schema)
        path.write_text("\n".join(map(json.dumps, actions)))
    return Gallery(gallery.path)


def quote(text: str) -> str:
    """Write a text in a filter, as SQL does."""
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def count_elsewhere(gallery: Gallery, label: str) -> int:
    """Count the rows that a reader without facepipe finds."""
    table = DeltaTable(gallery.faces_folder).to_pyarrow_dataset()
    return int(table.count_rows(filter=ds.field("identity") == label))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(["0000000" + "\x80" * 4 + "\u0112" * 30 + "\u0622"])  # Arrow prints such a filter cut in a character
@given(st.lists(st.text().filter(format_label), min_size=1, max_size=6, unique_by=format_label))
def test_every_label_is_found(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    labels = [format_label(text) or "" for text in texts]
    gallery = make_gallery(tmp_path_factory.mktemp("g") / "g", labels)
    for text, label in zip(texts, labels, strict=True):
        for written in (text, unicodedata.normalize("NFD", text)):
            assert gallery.to_arrow(["identity"], f"identity = {quote(written)}")["identity"].to_pylist() == [label]
            assert select_images(gallery, Selection(identities=(written,))).images == 1
        assert count_elsewhere(gallery, label) == 1


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return make_gallery(tmp_path_factory.mktemp("new") / "g", TEXTS)


@pytest.fixture
def old_gallery(tmp_path: Path) -> Gallery:
    """A gallery of an older version: some labels are not in normal form, and one is in a mixture of forms."""
    decomposed = [unicodedata.normalize("NFD", text) for text in TEXTS]
    return make_old(make_gallery(tmp_path / "g", [*TEXTS[:4], *decomposed[4:], "\u00ea\u0323"]))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_found_by_every_reader(gallery: Gallery, text: str) -> None:
    n = TEXTS.index(text)
    uri = f"/{text}/{n}.jpg"
    for condition in (f"identity = {quote(text)}", f"uri in ({quote(uri)})", f"source = {quote(text)}"):
        assert gallery.to_arrow(["uri"], condition)["uri"].to_pylist() == [uri], condition
    for selection in (Selection(identities=(text,)), Selection(images=(uri,)), Selection(source=text)):
        assert select_images(gallery, selection).uris.to_pylist() == [uri]
    # A changed image replaces its older row.
    actions = list(rewrite_files(gallery, plan_rewrite_of_uris([uri], lambda rows, mask: rows.slice(0, 0))))
    assert len(actions) == 1
    assert count_elsewhere(gallery, text) == 1


def test_a_new_table_is_sound(gallery: Gallery) -> None:
    assert gallery.has_exact_text
    assert not verify_gallery(gallery).problems
    assert compact.run(CompactConfig(), gallery.path).repaired == 0


def test_an_old_table_is_read_rightly_before_it_is_repaired(old_gallery: Gallery) -> None:
    assert count_elsewhere(old_gallery, TEXTS[0]) == 0  # what is mended
    for n, text in enumerate(TEXTS[:7]):
        images = 2 if text == "\u1ec7" else 1  # the mixture is the same label
        assert len(old_gallery.to_arrow(["uri"], f"identity = {quote(text)}")) == 1, text
        assert select_images(old_gallery, Selection(identities=(text,))).images == images, text
        if n < 4:
            uri = f"/{text}/{n}.jpg"
            assert len(old_gallery.to_arrow(["uri"], f"uri = {quote(uri)}")) == 1, text
            assert list(rewrite_files(old_gallery, plan_rewrite_of_uris([uri], lambda rows, mask: rows.slice(0, 0))))


def test_compact_repairs_what_verify_finds(old_gallery: Gallery) -> None:
    problems = verify_gallery(old_gallery).problems
    assert any("the range of identity" in problem for problem in problems)
    assert any("normal form C" in problem for problem in problems)
    expected = compact.run(CompactConfig(), old_gallery.path, dry_run=True).repaired
    assert 0 < expected < len(TEXTS)
    assert compact.run(CompactConfig(), old_gallery.path).repaired == expected
    repaired = Gallery(old_gallery.path)
    assert repaired.has_exact_text
    assert not verify_gallery(repaired).problems
    for text in TEXTS:
        count = 2 if text == "\u1ec7" else 1
        assert count_elsewhere(repaired, text) == count, text
        assert len(repaired.to_arrow(["uri"], f"identity = {quote(text)}")) == count, text
    # Nothing but labels has changed, and there is nothing left to do.
    same = [name for name in FACES.names if name != "identity"]
    assert repaired.to_arrow(same).sort_by("face_id") == old_gallery.to_arrow(same).sort_by("face_id")
    assert compact.run(CompactConfig(), old_gallery.path).repaired == 0


def test_what_an_older_version_adds_to_a_new_table_is_repaired_on_request(tmp_path: Path) -> None:
    path = make_old(make_gallery(tmp_path / "g", ["\U00020bb7"])).path
    log = Path(path, "faces", "_delta_log", f"{0:020}.json")
    log.write_text(log.read_text().replace('"configuration": {', '"configuration": {"facepipe.text": "nfc", '))
    assert verify_gallery(Gallery(path)).problems
    assert compact.run(CompactConfig(), path, everything=True).repaired == 1
    assert not verify_gallery(Gallery(path)).problems


@pytest.mark.parametrize(
    "text",
    [
        *("identity = 'O'Brien'", "uri = 'a", 'uri = "a', "uri = 'C:\\photos'", "uri = 'a\\'", "uri = r'a'"),
        *("uri = 'a' 'b'", "uri = 'a' and 'b'", "identity = 5", "identity in ('a', 5)", "identity = \udcff"),
    ],
)
def test_a_filter_that_could_be_read_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="filter"):
        parse_filter(text)


@given(st.text())
def test_a_filter_reads_any_text(text: str) -> None:
    table = ds.dataset(pa.table({"uri": [text, text + "x"]}))
    double = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    for quoted in (quote(text), double):
        for condition in (
            f"uri={quoted}",
            f"uri in ({quoted}, 'an other')",
            f"not uri <> {quoted} and uri is not null",
        ):
            assert table.to_table(filter=parse_filter(condition))["uri"].to_pylist() == [text]
