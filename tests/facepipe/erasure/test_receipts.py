"""Receipts: whoever alters one, cuts it short, or takes it to another gallery is found out."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from helpers import run_facepipe

from facepipe.erasure import chain
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import Receipt, load_receipt
from facepipe.erasure.selection import Selection
from facepipe.errors import ConfigError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance import vacuum
from facepipe.storage import conditional
from pipelines import erase

SECRET = "0123456789abcdef" * 2
OTHER_SECRET = "fedcba9876543210" * 2
Content = dict[str, Any]


def make(path: Path) -> Gallery:
    gallery = Gallery.create(str(path), CONTRACT)
    persons = np.repeat(np.arange(6), 4)
    append(gallery, [rows(persons, Faces().draw(persons, 0), 0)], "20261101T000000-000000")
    return Gallery(gallery.path)


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery with three receipts, made without a key, beside one with the same photos that erased nothing."""
    folder = tmp_path_factory.mktemp("unsigned")
    make(folder / "other")
    gallery = make(folder / "g")
    for person in (1, 2, 3):
        erase.run(Selection(identities=(f"person{person}",)), gallery.path)
    return folder


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a key."""
    folder = tmp_path_factory.mktemp("signed")
    make(folder / "other")
    gallery = make(folder / "g")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
        for person in (1, 2, 3):
            erase.run(Selection(identities=(f"person{person}",)), gallery.path)
    return folder


@pytest.fixture(params=["unsigned", "signed"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "signed":
        monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
    shutil.copytree(request.getfixturevalue(request.param), tmp_path / "p")
    return tmp_path / "p"


def list_receipts(gallery: Path) -> list[Path]:
    """In the order in which they were made."""
    found = {path.stem: path for path in (gallery / "erased").glob("*.json")}
    by_previous = {load_receipt(str(path)).previous: path for path in found.values()}
    ordered = [by_previous[""]]
    while ordered[-1].stem in by_previous:
        ordered.append(by_previous[ordered[-1].stem])
    return ordered


def test_true_receipts_are_believed(place: Path) -> None:
    receipts = list_receipts(place / "g")
    assert len(receipts) == 3
    for path in receipts:
        assert find_problems(place / "g", path) == ""
    code, out, _ = run_facepipe("verify", place / "g", "--erased", receipts[1], "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])
    assert chain.read_chain(str(place / "g")).problems == ()


def cut_hashes(content: Content) -> None:
    content["hashes"] = {"uris": content["hashes"]["uris"][:1]}


def claim_more(content: Content) -> None:
    content.update(hashes={}, images=4711, faces=9000)


def claim_another_gallery(content: Content) -> None:
    content["gallery"] = "00000000-0000-0000-0000-000000000000"


def cut_hashes_and_counts(content: Content) -> None:
    content["hashes"] = {kind: hashes[:1] for kind, hashes in content["hashes"].items()}
    content.update(images=1, faces=1, rows=1)


def swap_hashes(content: Content) -> None:
    content["hashes"] = {
        kind: ["0" * 15 + str(n) for n in range(len(hashes))] for kind, hashes in content["hashes"].items()
    }


def replace_salt(content: Content) -> None:
    content["salt"] = "0" * 32


def claim_first_format(content: Content) -> None:
    content.update(format=1, mac="", key="", previous="", previous_sha256="")
    content["at"] = "2020-01-01T00:00:00+00:00"


def antedate(content: Content) -> None:
    content["at"] = "2020-01-01T00:00:00+00:00"


def claim_release(content: Content) -> None:
    content["suppressed"] = False


def erase_nothing(content: Content) -> None:
    content.update(hashes={"uris": [], "images": [], "faces": []}, images=0, faces=0, rows=0)


ALTERATIONS = [
    *(claim_more, cut_hashes, claim_another_gallery, cut_hashes_and_counts, swap_hashes, replace_salt),
    *(claim_first_format, antedate, claim_release, erase_nothing),
]


def find_problems(gallery: Path, path: Path) -> str:
    try:
        return "; ".join(check_erased(Gallery(str(gallery)), load_receipt(str(path))))
    except ConfigError as error:
        return f"refused, altered: {error}"


@pytest.mark.parametrize("alter", ALTERATIONS)
def test_an_altered_receipt_is_refused(alter: Callable[[Content], None], place: Path) -> None:
    """A copy of it, and the one in the gallery; of each of the three: the chain begins, goes on and ends with one."""
    gallery = place / "g"
    for path in list_receipts(gallery):
        content = json.loads(path.read_bytes())
        whole = path.read_bytes()
        alter(content)
        for target in (place / "copy.json", path):
            target.write_text(json.dumps(content))
            said = find_problems(gallery, target)
            assert any(word in said for word in ("altered", "another gallery", "not signed")), said
        assert f"erased/{path.name}" in "; ".join(chain.read_chain(str(gallery)).problems)
        path.write_bytes(whole)
    assert chain.read_chain(str(gallery)).problems == ()


@pytest.mark.parametrize("alter", ALTERATIONS[:3])
def test_the_command_refuses_it(alter: Callable[[Content], None], unsigned: Path, tmp_path: Path) -> None:
    shutil.copytree(unsigned / "g", tmp_path / "g")
    path = list_receipts(tmp_path / "g")[0]
    content = json.loads(path.read_bytes())
    alter(content)
    (tmp_path / "forged.json").write_text(json.dumps(content))
    code, out, _ = run_facepipe("verify", tmp_path / "g", "--erased", tmp_path / "forged.json")
    assert code == 1
    assert "nothing of it is left" not in out
    path.write_text(json.dumps(content))
    code, out, _ = run_facepipe("verify", tmp_path / "g")
    assert (code, f"erased/{path.name}" in out) == (1, True)


def test_a_receipt_does_not_prove_anything_of_another_gallery(place: Path) -> None:
    """Such as after a typing error in the path. It has the same photos, and they are all there."""
    path = list_receipts(place / "g")[0]
    code, out, _ = run_facepipe("verify", place / "other", "--erased", path)
    assert (code, "another gallery" in out) == (1, True)
    code, out, _ = run_facepipe("verify", place / "other", "--erased", path, "--other-gallery")
    assert (code, "the table: 4 rows by uri" in out) == (1, True)


def test_a_receipt_that_is_gone_is_missed(place: Path) -> None:
    for path in list_receipts(place / "g")[:-1]:
        whole = path.read_bytes()
        path.unlink()
        assert "the receipt is missing" in "; ".join(chain.read_chain(str(place / "g")).problems)
        path.write_bytes(whole)
    assert chain.read_chain(str(place / "g")).problems == ()


def test_without_the_key_nothing_can_be_forged_or_checked(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(signed, tmp_path / "p")
    gallery = tmp_path / "p" / "g"
    path = list_receipts(gallery)[-1]
    assert run_facepipe("verify", gallery, "--erased", path)[0] == 2
    # Names can be tested with the key only.
    receipt = load_receipt(str(path))
    with pytest.raises(ConfigError, match="FACEPIPE_ERASURE_KEY"):
        receipt.hash_values(["/synthetic/000000/000000004.jpg"])
    # Somebody who can write the whole folder makes a chain of his own.
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", OTHER_SECRET)
    for file in (gallery / "erased").iterdir():
        if file.name == chain._HEAD:
            file.unlink()
    forged = replace(receipt, key="", hashes={}, images=0)
    with pytest.raises(ConfigError):
        check_erased(Gallery(str(gallery)), receipt)
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
    forged = replace(receipt, key="", mac="", previous="", previous_sha256="")
    forged.hashes = {"uris": ["1" * 16] * 4, "images": [], "faces": ["1" * 16] * 4}
    forged.salt = "1" * 32
    chain.save_receipt(str(gallery), forged)
    assert "not signed" in "\n".join(check_erased(Gallery(str(gallery)), forged))


def test_receipts_of_older_versions_are_vouched_for(
    unsigned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no predecessor and no signature. The first new receipt names their checksums."""
    shutil.copytree(unsigned, tmp_path / "p")
    gallery = tmp_path / "p" / "g"
    (gallery / "erased" / chain._HEAD).unlink()
    olds = list((gallery / "erased").glob("*.json"))
    for old in olds:
        content = json.loads(old.read_bytes())
        for name in ("key", "previous", "previous_sha256", "older", "mac", "continues", "foreign"):
            del content[name]
        old.write_text(json.dumps({**content, "format": 1}, indent=1))
        assert find_problems(gallery, old) == ""
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
    assert "not signed" in find_problems(gallery, olds[0])
    erase.run(Selection(identities=("person4",)), str(gallery))
    for old in olds:
        assert find_problems(gallery, old) == ""
    olds[1].write_bytes(olds[1].read_bytes().replace(b'"at": "2026', b'"at": "2025'))
    assert "altered" in find_problems(gallery, olds[1])


def test_a_crash_between_head_and_receipt_leaves_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = make(tmp_path / "g")
    erase.run(Selection(identities=("person1",)), gallery.path)

    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr(chain, "write_erased_file", fail)
        with pytest.raises(StorageError):
            erase.run(Selection(identities=("person2",)), gallery.path)
    assert "missing" in "\n".join(chain.read_chain(gallery.path).problems)
    erase.resume(gallery.path)
    assert chain.read_chain(gallery.path).problems == ()
    assert len(list_receipts(tmp_path / "g")) == 2
    # The newest receipt is known by the head; a head that makes no sense is said.
    head = tmp_path / "g" / "erased" / chain._HEAD
    head.write_bytes(b"[]")
    assert run_facepipe("verify", tmp_path / "g")[0] == 1


def test_an_erasure_that_overtakes_a_crash_keeps_the_chain_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another erasure is completed first. What came before the crash stays in the chain, and so does what comes after."""
    path = str(tmp_path / "g")
    receipts = [Receipt(f"20261101T00000{n}-aaaaaa", "id", "2026", ["ids"], "0", images=1) for n in range(3)]
    chain.save_receipt(path, receipts[0])

    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr(chain, "write_erased_file", fail)
        with pytest.raises(StorageError):
            chain.save_receipt(path, receipts[1])
    (tmp_path / "g" / "erased" / f"{receipts[1].id}.pending").write_bytes(b"")
    chain.save_receipt(path, receipts[2])
    assert chain.read_chain(path).problems == ()
    chain.save_receipt(path, receipts[1])
    assert chain.read_chain(path).problems == ()
    ids = [load_receipt(str(file)).id for file in list_receipts(tmp_path / "g")]
    assert ids == [receipts[n].id for n in (0, 2, 1)]


def test_two_at_once_make_one_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run puts its receipt at the end just before this one does."""
    path = str(tmp_path / "g")
    others = [Receipt(f"20261101T00000{n}-aaaaaa", "id", "2026", ["ids"], "0", images=1) for n in range(3)]
    chain.save_receipt(path, others[0])
    real = conditional.write_if
    waiting = [others[1]]

    def write_if(*args: Any) -> str:
        if waiting:
            chain.save_receipt(path, waiting.pop())
        return real(*args)

    monkeypatch.setattr(conditional, "write_if", write_if)
    chain.save_receipt(path, others[2])
    assert [load_receipt(str(file)).previous for file in list_receipts(tmp_path / "g")] == [
        "",
        others[0].id,
        others[1].id,
    ]
    assert chain.read_chain(path).problems == ()


def test_a_run_without_the_key_leaves_the_receipt_to_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as an embed on another machine: it deletes everything, and the command that has the key signs."""
    gallery = make(tmp_path / "g")
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)

    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr("facepipe.erasure.steps.rewrite_files", fail)
        with pytest.raises(StorageError):
            erase.run(Selection(identities=("person1",)), gallery.path)
    monkeypatch.delenv("FACEPIPE_ERASURE_KEY")
    said: list[str] = []
    assert not erase.resume(gallery.path, wait=True, progress=said.append).complete
    assert "FACEPIPE_ERASURE_KEY" in " ".join(said)
    assert vacuum.find_unreferenced(Gallery(gallery.path)) == []
    assert not list((tmp_path / "g" / "erased").glob("*.json"))
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
    (path,) = erase.resume(gallery.path).receipts
    assert load_receipt(path).is_signature_right()
    assert check_erased(Gallery(gallery.path), load_receipt(path)) == []


def test_files_that_are_no_receipts(tmp_path: Path) -> None:
    first = Receipt("20261101T000000-aaaaaa", "id", "2026", ["identities"], "0", hashes={"uris": ["0" * 16]})
    path = chain.save_receipt(str(tmp_path), first)
    assert load_receipt(path) == first
    for wrong in (b"", b"{}", b"[1]", b"\xff", first.encode().replace(b"0" * 16, b"x" * 16)):
        Path(path).write_bytes(wrong)
        with pytest.raises(ConfigError, match="not the receipt"):
            load_receipt(path)
    Path(path).write_bytes(replace(first, format=3).encode())
    with pytest.raises(ConfigError, match="newer facepipe"):
        load_receipt(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_receipt(str(tmp_path / "none"))
