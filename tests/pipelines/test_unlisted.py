"""A folder of a gallery that cannot be listed stops a run: nobody who was erased comes back, and no proof passes."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import embed, fail_to_list, rows

from facepipe.erasure import pending
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.selection import Selection
from facepipe.errors import FacepipeError
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.maintenance.compact import CompactConfig
from pipelines import compact, erase, index
from pipelines.index import IndexConfig

FAKES = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}, "run": {"runner": "inline"}}
PERSON = "person1"
Check = Callable[[Path, Path], object]


@pytest.fixture(scope="module")
def made(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery with an index, from which a person was erased."""
    gallery = tmp_path_factory.mktemp("made") / "g"
    embed(drawings, gallery, FAKES)
    index.run(IndexConfig(), str(gallery))
    (gallery / "reports" / "dedup").mkdir(parents=True)
    (gallery / "reports" / "dedup" / "list.txt").write_text("nobody\n")
    erase.run(Selection(identities=(PERSON,)), str(gallery))
    return gallery


@pytest.fixture
def gallery(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "g")
    shutil.copytree(made / "erased", tmp_path / "receipts")
    return tmp_path / "g"


def prove(gallery: Path, drawings: Path) -> object:
    (receipt,) = (gallery.parent / "receipts").glob("*.json")
    return check_erased(Gallery(str(gallery)), load_receipt(str(receipt)))


def erase_again(gallery: Path, drawings: Path) -> object:
    return erase.run(Selection(identities=("person2",)), str(gallery))


CHECKS: dict[str, Check] = {
    "embed": lambda gallery, drawings: embed(drawings, gallery, FAKES),
    "suppressed uris": lambda gallery, drawings: suppressed.read_uris(str(gallery)),
    "suppressed contents": lambda gallery, drawings: suppressed.read_contents(str(gallery)),
    "unfinished erasures": lambda gallery, drawings: pending.read_unfinished(str(gallery)),
    "erase": erase_again,
    "proof": prove,
    "compact": lambda gallery, drawings: compact.run(CompactConfig(), str(gallery), everything=True),
    "exists": lambda gallery, drawings: Gallery.exists(str(gallery)),
}


@pytest.mark.parametrize(
    ("folder", "check"),
    [
        *(("erased", check) for check in CHECKS if check not in ("compact", "exists")),
        *(("faces", check) for check in ("proof", "erase", "compact")),
        *(("faces/_delta_log", check) for check in ("embed", "proof", "erase", "exists")),
        *(("index", check) for check in ("proof", "erase")),
        *(("reports", check) for check in ("proof", "erase")),
        *(("reports/dedup", check) for check in ("proof", "erase")),
    ],
)
def test_a_folder_that_cannot_be_listed_stops_the_run(
    folder: str, check: str, gallery: Path, drawings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(gallery)
    assert not any(PERSON in row["uri"] for row in before)
    with monkeypatch.context() as patch:
        fail_to_list(patch, gallery / folder, errno.EIO)
        with pytest.raises(FacepipeError):
            CHECKS[check](gallery, drawings)
    assert not any(PERSON in row["uri"] for row in rows(gallery))
    # The same again works when the folder answers.
    assert CHECKS[check](gallery, drawings) is not None
    assert not any(PERSON in row["uri"] for row in rows(gallery))


def test_the_erased_stay_erased_behind_a_link_that_leads_nowhere(gallery: Path, drawings: Path, tmp_path: Path) -> None:
    """Such as a link to a disk of its own that is not mounted today."""
    (gallery / "erased").rename(tmp_path / "elsewhere")
    (gallery / "erased").symlink_to(tmp_path / "not-mounted")
    with pytest.raises(FacepipeError, match=r"cannot list|leads nowhere"):
        embed(drawings, gallery, FAKES)
    with pytest.raises(FacepipeError, match="leads nowhere"):
        rows(gallery)  # nobody knows which images readers must leave out
    (gallery / "erased").unlink()
    (gallery / "erased").symlink_to(tmp_path / "elsewhere")
    assert not any(PERSON in row["uri"] for row in rows(gallery))
    assert embed(drawings, gallery, FAKES).erased == 20
