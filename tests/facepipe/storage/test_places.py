"""What a place must be able to do is seen, not assumed: a store that ignores conditions and a disk without locks are refused."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
from bench.galleries import CONTRACT
from helpers import run_facepipe

from facepipe import storage
from facepipe.errors import FacepipeError, GalleryError, StorageError
from facepipe.gallery import Gallery
from facepipe.observe import doctor
from facepipe.storage import conditional, locks
from facepipe.storage.conditional import require_usable_place
from facepipe.storage.lease import hold_lease
from facepipe.storage.locks import find_mount_problem

G = "s3://faces/deep/g"


@pytest.fixture
def proxy(bucket: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[faults.Proxy]:
    with faults.proxy(s3_server) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
        storage.open_bucket.cache_clear()
        yield made
    storage.open_bucket.cache_clear()


def list_keys(bucket: Any) -> list[str]:
    return [entry["Key"] for entry in bucket.list_objects_v2(Bucket="faces").get("Contents", [])]


@pytest.mark.parametrize(
    ("fault", "header"),
    [("unconditional", "If-None-Match"), ("no_if_none_match", "If-None-Match"), ("no_if_match", "If-Match")],
)
def test_a_store_that_ignores_conditions_is_refused(
    fault: str, header: str, bucket: Any, proxy: faults.Proxy, drawings: Path
) -> None:
    """Such a store tells two writers that both have won."""
    proxy.set(**{fault: 1.0})
    with pytest.raises(GalleryError, match=f"s3://faces ignores {header}"), hold_lease(G):
        pass
    with pytest.raises(GalleryError, match=f"ignores {header}"):
        Gallery.create(G, CONTRACT)
    assert doctor._check_place(G).state == "broken"
    code, _, err = run_facepipe("embed", drawings, G, "--set", "detect.model=fake-detector", "--runner", "inline")
    assert code == 1
    assert f"ignores {header}" in err
    assert list_keys(bucket) == [], "nothing was written but what was deleted again"


def test_a_store_with_conditions_is_asked_once(bucket: Any, proxy: faults.Proxy) -> None:
    proxy.set()
    require_usable_place(G)
    first = sum(proxy.counts().values())
    assert first <= 8
    require_usable_place("s3://faces/other/g")
    assert sum(proxy.counts().values()) == first
    assert list_keys(bucket) == []
    conditional.write_if(f"{G}/x", b"1", None)
    conditional.create(f"{G}/y", b"1")
    assert list_keys(bucket) == ["deep/g/x", "deep/g/y"]
    # Another endpoint may be another store.
    storage.open_bucket.cache_clear()
    proxy.set(unconditional=1.0)
    for write in (lambda: conditional.write_if(f"{G}/z", b"1", None), lambda: conditional.create(f"{G}/z", b"1")):
        with pytest.raises(StorageError, match="ignores"):
            write()
    assert list_keys(bucket) == ["deep/g/x", "deep/g/y"]


@pytest.mark.parametrize("trial", range(3))
def test_a_store_that_fails_now_and_then_is_not_refused(trial: int, bucket: Any, proxy: faults.Proxy) -> None:
    """A lost answer to the first write looks like a store that refuses it."""
    proxy.set(seed=trial, lost=0.3, status_503=0.2)
    require_usable_place(G)
    proxy.set()
    assert list_keys(bucket) == []


def test_locks_that_keep_nobody_out_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_usable_place(str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(locks, "_proven", set())
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    for check in (lambda: require_usable_place(str(tmp_path)), lambda: Gallery.create(str(tmp_path / "g"), CONTRACT)):
        with pytest.raises(FacepipeError, match="takes locks and ignores them"):
            check()
    with pytest.raises(GalleryError, match="takes locks and ignores them"), hold_lease(str(tmp_path / "g")):
        pass
    assert doctor._check_place(str(tmp_path)).state == "broken"


def test_a_disk_without_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="hard links"):
        require_usable_place(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(GalleryError, match="hard links"):
        Gallery.create(str(tmp_path / "g"), CONTRACT)


ROOT = "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw"
MOUNTS = {
    "31 22 0:40 / /data rw,relatime shared:1 - nfs nas:/data rw,vers=3,nolock,proto=tcp,local_lock=all": "nolock|local_lock",
    "31 22 0:40 / /data rw - nfs4 nas:/data rw,vers=4.2,local_lock=flock,addr=10.0.0.1": "local_lock=flock",
    "31 22 0:40 / /data rw - nfs4 nas:/data rw,vers=4.2,local_lock=none,addr=10.0.0.1": "",
    "31 22 0:40 / /data rw - nfs nas:/data rw,vers=3,local_lock=posix": "",
    "31 22 0:40 / /data rw - lustre mgs@tcp:/fs rw,flock": "",
    "31 22 0:40 / /data rw - lustre mgs@tcp:/fs rw,localflock": "localflock",
    "31 22 0:40 / /data rw - cifs //nas/share rw,vers=3.0,nobrl": "nobrl",
    "31 22 0:40 / /data rw - fuse.sshfs me@host:/data rw,user_id=0": "sshfs",
    "31 22 0:40 / /data rw - fuse.gcsfuse bucket rw": "gcsfuse",
    "31 22 0:40 / /data rw - fuse mountpoint-s3 ro": "mountpoint-s3",
    "31 22 0:40 / /data rw - fuse.juicefs JuiceFS:x rw": "",
    "31 22 0:40 / /database rw - nfs nas:/data rw,nolock": "",
    "31 22 0:40 / /da\\040ta rw - nfs nas:/data rw,nolock": "",
}


@pytest.mark.parametrize(("line", "problem"), MOUNTS.items())
def test_mounts_that_keep_locks_from_other_machines(line: str, problem: str) -> None:
    import re

    found = find_mount_problem("/data/g/.lock", f"{ROOT}\n{line}\nnonsense\n")
    assert bool(found) == bool(problem)
    assert re.search(problem, found)


def test_the_innermost_mount_decides() -> None:
    nfs = "31 22 0:40 / /data rw - nfs nas:/data rw,nolock"
    local = "32 31 254:1 / /data/fast rw - xfs /dev/nvme rw"
    assert find_mount_problem("/data/x", f"{nfs}\n{local}\n{ROOT}")
    assert not find_mount_problem("/data/fast/x", f"{local}\n{nfs}\n{ROOT}")
    assert not find_mount_problem("/data/x", f"{nfs}\n33 22 254:2 / /data rw - ext4 /dev/vdb rw\n{ROOT}"), (
        "the later hides"
    )
    assert find_mount_problem("/da ta/x", "31 22 0:40 / /da\\040ta rw - nfs nas:/data rw,nolock")
    assert not find_mount_problem("/data/x", "")
