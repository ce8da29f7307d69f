"""Hashes, the file-backed hash table, configuration, filters."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.config import build, parse_settings, read_toml, resolve_paths
from facepipe.errors import ConfigError
from facepipe.gallery.filters import parse_filter
from facepipe.hashing import MASK_63, compute_face_id, compute_image_id, hash64
from facepipe.storage.hashtable import HashTable
from pipelines.embed import EmbedConfig


def test_ids_are_stable() -> None:
    assert compute_image_id(b"abc") == "ba7816bf8f01cfea414140de5dae2223"
    assert compute_face_id("a.jpg", "00", 0) == compute_face_id("a.jpg", "00", 0) <= MASK_63
    assert (
        len(
            {
                compute_face_id("a.jpg", "00", 0),
                compute_face_id("a.jpg", "00", 1),
                compute_face_id("b.jpg", "00", 0),
                compute_face_id("a.jpg", "01", 0),
            }
        )
        == 4
    )
    assert hash64("ab", "c") != hash64("a", "bc")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 400), max_size=300), max_size=8))
def test_hash_table_is_a_dictionary(batches: list[list[int]]) -> None:
    table, truth = HashTable(width=1), dict[int, int]()
    for n, batch in enumerate(batches):
        # Few slots in use and many equal low bits: probing and collisions are the rule here.
        keys = np.array(batch, np.uint64) << np.uint64(20)
        unique = list(dict.fromkeys(batch))
        new = table.add(keys, np.full((len(batch), 1), n, np.uint64))
        assert new.sum() == sum(key not in truth for key in unique)
        truth |= dict.fromkeys(batch, n)
    probe = np.arange(1, 401, dtype=np.uint64) << np.uint64(20)
    found, values = table.get(probe)
    assert {n + 1: int(values[n, 0]) for n in np.flatnonzero(found)} == truth
    table.close()


def test_hash_table_grows() -> None:
    table = HashTable(width=1)
    keys = np.random.default_rng(0).integers(0, 2**64, 300_000, np.uint64)
    for part in np.array_split(keys, 7):
        table.add(part, part[:, None])
    found, values = table.get(keys)
    assert found.all()
    assert (values[:, 0] == keys).all()
    assert not table.get(keys + np.uint64(1))[0].any()
    assert table.count == len(np.unique(keys))
    table.close()


@dataclass(frozen=True)
class Inner:
    size: int = 3
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    flag: bool = False


def test_settings_win_over_files_and_files_over_defaults(tmp_path) -> None:
    (tmp_path / "c.toml").write_text("flag = true\n[inner]\nsize = 5\nname = 'file'\n")
    config = build(Outer, read_toml(tmp_path / "c.toml"), parse_settings(["inner.size=7"]))
    assert config == Outer(Inner(7, "file"), True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["iner.size=1"], "did you mean inner"),
        (["inner.sise=1"], "did you mean inner.size"),
        (["inner.size=many"], "inner.size: .*integer"),
        (["inner=3"], "inner is a section"),
        (["inner"], "section.key=value"),
    ],
)
def test_wrong_settings_are_named(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Outer, parse_settings(settings))


@dataclass(frozen=True)
class Several:
    inner: tuple[Inner, ...] = ()


def test_a_section_in_single_brackets_is_a_list_of_one(tmp_path) -> None:
    """`[source]` for `[[source]]` is the commonest slip in a TOML file."""
    (tmp_path / "c.toml").write_text("[inner]\nsize = 5\n")
    assert build(Several, read_toml(tmp_path / "c.toml")) == Several((Inner(5),))
    assert build(Several, read_toml(tmp_path / "c.toml"), parse_settings(["inner.size=7"])) == Several((Inner(7),))
    (tmp_path / "c.toml").write_text("[[inner]]\nsize = 5\n[[inner]]\nsize = 6\n")
    assert build(Several, read_toml(tmp_path / "c.toml")) == Several((Inner(5), Inner(6)))


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("[[inner]]\nsize = 5\n[[inner]]\nsise = 6", [], r"inner\[2\]\.sise: did you mean inner\[2\]\.size"),
        ("[[inner]]\nsize = 5\n[[inner]]\nsize = 'x'", [], r"inner\[2\]\.size: .*integer"),
        ("inner = 3", [], r"write \[\[inner\]\]"),
        ("inner = [3]", [], r"write \[\[inner\]\]"),
        ("[[inner]]\nsize = 5", ["inner.size=7"], r"change \[\[inner\]\] in the TOML file"),
    ],
)
def test_wrong_lists_of_sections_are_named(tmp_path, text: str, settings: list[str], message: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        build(Several, read_toml(tmp_path / "c.toml"), parse_settings(settings))


PATHS = ("gallery", "source.uri", "dataset.against")


@pytest.mark.parametrize("text", ["photos", "photos/*.jpg", "photos/[0-9]/x", "./photos", "../photos", "new/gallery"])
def test_paths_in_a_config_are_relative_to_its_folder(tmp_path, monkeypatch, text: str) -> None:
    """From wherever the command is run, whether what they name is there or not."""
    home = tmp_path / "home"
    (home / "config").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for folder in ("photos", "config/photos"):
        (home / folder).mkdir()
    expected = f"{home}/config/{text}"
    for working in (home / "config", tmp_path / "elsewhere", home / "config" / "photos"):
        monkeypatch.chdir(working)
        tree = {"gallery": text, "source": [{"uri": text}, {"uri": "s3://b/x"}], "dataset": {"against": "/abs/g"}}
        assert resolve_paths(tree, str(home / "config"), PATHS) == []
        assert tree == {
            "gallery": expected,
            "source": [{"uri": expected}, {"uri": "s3://b/x"}],
            "dataset": {"against": "/abs/g"},
        }


def test_a_path_that_is_in_the_working_folder_alone_keeps_its_meaning(tmp_path, monkeypatch) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    tree = {"gallery": "g", "source": {"uri": "photos/*.jpg"}}
    assert resolve_paths(tree, "config", PATHS) == [
        "source.uri='photos/*.jpg' is in the working folder; paths in a config are relative to its folder"
    ]
    assert tree == {"gallery": str(tmp_path / "config" / "g"), "source": {"uri": "photos/*.jpg"}}


def test_only_values_that_are_paths_are_resolved() -> None:
    tree = {"embed": {"model": "models/arcface.toml"}, "detect": {"model": "mtcnn"}}
    assert resolve_paths(tree, "/jobs", ("embed.model", "detect.model"), lambda value: value.endswith(".toml")) == []
    assert tree == {"embed": {"model": "/jobs/models/arcface.toml"}, "detect": {"model": "mtcnn"}}


def test_values_that_are_no_paths_are_left_to_the_checks_of_the_config() -> None:
    tree = {"gallery": 3, "source": "x", "dataset": [1]}
    assert resolve_paths(tree, "/config", PATHS) == []
    assert tree == {"gallery": 3, "source": "x", "dataset": [1]}


def test_a_broken_file_is_named(tmp_path) -> None:
    (tmp_path / "c.toml").write_text("flag = ")
    with pytest.raises(ConfigError, match="not TOML"):
        read_toml(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        read_toml(tmp_path / "none.toml")


def test_every_key_of_the_embed_config_can_be_set() -> None:
    assert build(EmbedConfig, {"detect": {"size": 320}}).detect.size == 320
    with pytest.raises(ConfigError, match=r"run\.runner"):
        build(EmbedConfig, {"run": {"runner": "spark"}})


@pytest.mark.parametrize("text", ["status = 'ok' and", "1 + 1", "nothing > 3", "__import__('os')", "status.upper()"])
def test_wrong_filters_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_filter(text)
