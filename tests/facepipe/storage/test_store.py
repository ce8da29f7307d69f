"""A folder of a gallery in an object store, and its copies on this machine: what another run has written there stays."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.storage.conditional import ConflictError
from facepipe.storage.store import Store, open_store

URL = "s3://faces/g/reports/dedup"


@pytest.fixture
def pulled(bucket: Any) -> Store:
    """Copies of a report of two files."""
    for name in ("keep.txt", "report.html"):
        storage.write(f"{URL}/{name}", b"old")
    store = open_store("s3://faces/g", "reports/dedup")
    store.pull()
    return store


def read_objects() -> dict[str, bytes]:
    return {name: storage.read(f"{URL}/{name}".encode()) for name in storage.list_names(URL)}


def test_a_report_is_replaced_by_its_copies(pulled: Store) -> None:
    Path(pulled.folder, "keep.txt").unlink()
    Path(pulled.folder, "drop.txt").write_bytes(b"new")
    pulled.push(last="report.html")
    assert read_objects() == {"drop.txt": b"new", "report.html": b"old"}


@pytest.mark.parametrize("name", ["keep.txt", "drop.txt"])
def test_what_another_run_has_written_since_is_not_replaced(name: str, pulled: Store) -> None:
    Path(pulled.folder, name).write_bytes(b"mine")
    with pytest.raises(ConflictError, match=name):
        # As a run that was paused between a look at its lease and the upload.
        pulled.push(before_each=lambda: storage.write(f"{URL}/{name}", b"newer"))
    assert read_objects()[name] == b"newer"


def test_copies_that_were_deleted_delete_nothing_in_the_store(pulled: Store) -> None:
    before = read_objects()
    shutil.rmtree(pulled.folder)
    with pytest.raises(StorageError, match="deleted meanwhile"):
        pulled.push()
    assert read_objects() == before
