"""The lease: who holds it, who may take it over, and that a holder which lost it cannot commit."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench.galleries import CONTRACT, Faces
from bench.galleries import rows as face_rows
from helpers import trials

from facepipe import storage
from facepipe.errors import ConfigError, FacepipeError, GalleryBusyError, GalleryError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord
from facepipe.gallery.commits.rewrite import make_add_action, write_rows
from facepipe.gallery.table import open_table
from facepipe.storage import conditional
from facepipe.storage import lease as leases
from facepipe.storage.lease import Holder, Lease, get_lease_seconds, hold_lease

SECONDS = 0.6
TRIALS = [*((n, "disk") for n in trials(10)), *((n, "s3") for n in range(2))]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACEPIPE_LEASE_SECONDS", str(SECONDS))


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder for a lease, on a disk and in a store."""
    if request.param == "disk":
        return str(tmp_path / "g")
    request.getfixturevalue("bucket")
    return "s3://faces/g"


def put(place: str, holder: Holder | bytes) -> str:
    """Leave a lease as another run would; its tag."""
    path = storage.join(place, leases.LEASE_FILE)
    storage.make_parent_folder(path)
    data = holder if isinstance(holder, bytes) else holder.encode()
    # A heartbeat may come in between.
    while True:
        found = conditional.read_tagged(path)
        with suppress(conditional.ConflictError):
            return conditional.write_if(path, data, found[1] if found else None)


def held(place: str) -> Holder | None:
    found = conditional.read_tagged(storage.join(place, leases.LEASE_FILE))
    return leases._decode(found[0]) if found else None


def elsewhere(**changes: Any) -> Holder:
    """A holder on another machine."""
    return replace(Holder.of_this_process(SECONDS), machine="another boot pid:[1]", host="elsewhere", **changes)


class Clock:
    """The lease's clock: it moves when the lease waits, or by hand. So no test depends on how busy the machine is."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []
        self.at_wait: dict[int, Callable[[], object]] = {}  # what happens during the n-th wait

    def sleep(self, seconds: float) -> None:
        """Stand in for `time.sleep`."""
        self.waits.append(seconds)
        self.now += seconds
        self.at_wait.get(len(self.waits), lambda: None)()

    @property
    def waited(self) -> float:
        """Seconds that the lease has waited."""
        return sum(self.waits)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Give the lease a clock of its own."""
    made = Clock()
    monkeypatch.setattr(leases, "_read_clock", lambda: made.now)
    monkeypatch.setattr(leases, "time", SimpleNamespace(sleep=made.sleep))
    return made


HOLD = """
import sys, time
from facepipe.errors import GalleryBusyError
from facepipe.storage.lease import hold_lease
try:
    with hold_lease(sys.argv[1]) as lease:
        print("held", flush=True)
        sys.stdin.readline()
        try:
            lease.check()
            print("good", flush=True)
        except GalleryBusyError:
            print("lost", flush=True)
except GalleryBusyError as error:
    print("busy", flush=True)
"""


@contextmanager
def holder_process(place: str) -> Iterator[subprocess.Popen[str]]:
    """A process that takes the lease, says what came of it, and lets go when it is sent a line."""
    command = [sys.executable, "-c", HOLD, place]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()


def check_until_lost(lease: Lease) -> None:
    """Check the lease again and again; the suite's time limit ends a test of a lease that is never lost."""
    while True:
        lease.check()
        time.sleep(0.005)


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until another thread has done something."""
    while not condition():
        time.sleep(0.005)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# --- one at a time -----------------------------------------------------------------------------------------------------


def test_threads_exclude_each_other(place: str) -> None:
    """60 attempts from 6 threads: never two inside, and whoever is refused is told so."""
    inside = entered = most = refused = 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, entered, most, refused
        for _ in range(10):
            try:
                with hold_lease(place):
                    with guard:
                        inside, entered = inside + 1, entered + 1
                        most = max(most, inside)
                    time.sleep(0.005)
                    with guard:
                        inside -= 1
            except GalleryBusyError:
                refused += 1
                time.sleep(0.01)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entered + refused) == (1, 60)
    assert entered >= 6
    assert held(place).released  # type: ignore[union-attr]


def test_processes_exclude_each_other_and_a_killed_one_is_replaced_at_once(tmp_path: Path, clock: Clock) -> None:
    place = str(tmp_path / "g")
    with holder_process(place) as first:
        assert line(first) == "held"
        with pytest.raises(GalleryBusyError, match=f"process {first.pid} on "), hold_lease(place):
            pass
        with holder_process(place) as second:
            assert line(second) == "busy"
        first.kill()
        first.wait()
        with hold_lease(place):
            assert not clock.waits, "a process that has ended is not waited for"


@pytest.mark.parametrize(("trial", "place"), TRIALS, indirect=["place"])
def test_of_twenty_that_race_for_an_expired_lease_one_wins(trial: int, place: str, clock: Clock) -> None:
    put(place, elsewhere(seconds=0.05))
    ready, ends = threading.Barrier(20), threading.Event()
    won, refused = list[Lease](), list[str]()

    def contend() -> None:
        ready.wait()
        try:
            with hold_lease(place) as lease:
                won.append(lease)
                ends.wait()
                lease.check()
        except GalleryBusyError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=contend) for _ in range(20)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(won) + len(refused) == 20)
    ends.set()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 19)


# --- another machine ---------------------------------------------------------------------------------------------------


def test_one_on_another_machine_that_beats_is_refused_as_soon_as_a_beat_is_seen(place: str, clock: Clock) -> None:
    lines: list[str] = []
    far = elsewhere()
    put(place, far)
    clock.at_wait[5] = lambda: put(place, replace(far, beat=1))
    with pytest.raises(GalleryBusyError, match="on elsewhere"), hold_lease(place, on_wait=lines.append):
        pass
    assert len(clock.waits) == 5
    assert lines == [f"the gallery is held by a run on elsewhere: watching it for up to {SECONDS:g} s"]


def test_one_on_another_machine_that_is_silent_is_taken_over_after_its_time(place: str, clock: Clock) -> None:
    put(place, elsewhere())
    with hold_lease(place) as lease:
        assert SECONDS * 0.99 < clock.waited < SECONDS * 1.1
        lease.check()
        assert held(place).host != "elsewhere"  # type: ignore[union-attr]


def test_its_own_time_counts_not_ours(tmp_path: Path, clock: Clock) -> None:
    place = str(tmp_path / "g")
    put(place, elsewhere(seconds=0.1))
    with hold_lease(place):
        assert 0.099 < clock.waited < 0.11


def test_one_that_lets_go_while_it_is_watched_is_followed_at_once(tmp_path: Path, clock: Clock) -> None:
    place = str(tmp_path / "g")
    far = elsewhere(seconds=30.0)
    put(place, far)
    clock.at_wait[3] = lambda: put(place, replace(far, released=True))
    with hold_lease(place):
        assert len(clock.waits) == 3


def test_a_machine_that_was_started_again_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Holder.of_this_process(SECONDS)
    assert mine.has_ended(), "nobody holds it"
    assert replace(mine, machine="").has_ended() is None
    assert replace(mine, machine="another boot").has_ended() is None
    assert replace(mine, began="1").has_ended(), "the pid is another process's by now"
    assert replace(mine, pid=1, began=leases._read_process_start(1)).has_ended() in (False, None)


_HIDDEN = """
import os, subprocess, sys
from dataclasses import replace
from facepipe.storage.lease import Holder

subprocess.run(["mount", "-t", "proc", "-o", f"hidepid={sys.argv[1]}", "proc", "/proc"], check=True)


def become(user):
    os.setgid(user)
    os.setuid(user)


# A holder of one user, who ends when the pipe is closed, and another user who looks at it.
beginning, end = os.pipe()
holder = os.fork()
if not holder:
    os.close(end)
    become(4001)
    os.read(beginning, 1)
    os._exit(0)
started = replace(Holder.of_this_process(60), pid=holder, began=open(f"/proc/{holder}/stat").read().rsplit(")", 1)[1].split()[19])
questions, answers = os.pipe(), os.pipe()
looker = os.fork()
if not looker:
    os.close(end)
    become(4002)
    while os.read(questions[0], 1) == b"?":
        os.write(answers[1], str(started.has_ended()).ljust(5).encode())
    os._exit(0)
os.write(questions[1], b"?")
print(os.read(answers[0], 5).decode().strip())
os.close(end)
os.waitpid(holder, 0)
os.write(questions[1], b"?")
print(os.read(answers[0], 5).decode().strip())
os.write(questions[1], b".")
os.waitpid(looker, 0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide processes")
@pytest.mark.parametrize(("hidepid", "while_it_runs"), [(0, "False"), (1, "None"), (2, "None")])
def test_a_holder_that_proc_hides_is_watched_and_not_replaced(hidepid: int, while_it_runs: str) -> None:
    """On shared machines /proc shows nobody the processes of others; a real mount of it in a namespace of its own."""
    command = ["unshare", "--mount", sys.executable, "-c", _HIDDEN, str(hidepid)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unshare failed" in done.stderr or "mount" in done.stderr:
        pytest.skip("no namespaces here")
    assert done.stdout.split() == [while_it_runs, "True"], done.stderr


# --- proof -------------------------------------------------------------------------------------------------------------


def test_a_renewal_proves_that_nobody_else_held_it(place: str) -> None:
    with hold_lease(place) as lease:
        times = [lease.renew(), lease.renew()]
        current = held(place)
        assert current is not None
        assert (current.holder, current.beat >= 2) == (lease.id, True)
        assert times[1] >= times[0] > 0
        # Another run takes it over, as one that has watched for long enough may.
        far = elsewhere()
        put(place, far)
        with pytest.raises(GalleryBusyError, match="was lost"):
            lease.renew()
        with pytest.raises(GalleryBusyError, match="was lost"):
            lease.check()
    assert held(place) == far, "it is left alone"


def test_the_time_of_a_renewal_is_that_of_the_disk_or_store(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with hold_lease(place) as lease:
        written = storage.join(place, "file")
        storage.write(written, b"x")
        assert abs(lease.renew() - storage.get_entry(written).modified) < 60


def test_a_renewal_that_arrives_although_its_answer_is_lost_counts(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_lease(place) as lease:
        real = conditional.write_if

        def loses_the_answer(path: str, data: bytes, tag: str | None) -> str:
            monkeypatch.setattr(conditional, "write_if", real)
            real(path, data, tag)
            raise StorageError("no answer")

        monkeypatch.setattr(conditional, "write_if", loses_the_answer)
        lease.renew()

        def does_not_answer(path: str, data: bytes, tag: str | None) -> str:
            raise StorageError("no answer")

        monkeypatch.setattr(conditional, "write_if", does_not_answer)
        with pytest.raises(GalleryBusyError, match=r"was lost|no answer"):
            lease.renew()
        monkeypatch.setattr(conditional, "write_if", real)


def test_threads_that_renew_beside_the_heartbeat_keep_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_HEARTBEATS", 1000)
    failures: list[BaseException] = []

    def renew() -> None:
        try:
            for _ in range(20):
                lease.renew()
        except BaseException as error:
            failures.append(error)

    with hold_lease(place) as lease:
        threads = [threading.Thread(target=renew) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


# --- whether an earlier holder may still write ---------------------------------------------------------------------------


def test_a_commit_settles_the_lease_for_those_that_come_after(place: str) -> None:
    with hold_lease(place) as lease:
        assert not lease.is_settled, "nobody knows what happened before"
        lease.settle()
    for _ in range(2):
        with hold_lease(place) as lease:
            assert lease.is_settled


def test_only_who_let_go_or_ended_here_writes_no_more(place: str, clock: Clock) -> None:
    on_disk = not storage.is_remote(place)
    ended_here = replace(Holder.of_this_process(SECONDS), settled=True)
    asleep = elsewhere(settled=True)
    released = elsewhere(released=True, settled=True)
    never_settled = elsewhere(released=True)
    old_format = json.dumps({name: value for name, value in asdict(released).items() if name != "settled"}).encode()
    cases: list[tuple[Holder | bytes, bool]] = [
        (ended_here, on_disk),
        (asleep, False),
        (released, True),
        (never_settled, False),
        (old_format, False),
        (b"damaged", False),
    ]
    for holder, is_settled in cases:
        put(place, holder)
        with hold_lease(place) as lease:
            assert lease.is_settled == is_settled, holder


# --- stopped, and awake again ------------------------------------------------------------------------------------------


def test_a_stopped_holder_is_taken_over_and_knows_it_when_it_wakes(place: str) -> None:
    """The real clock counts here: the holder is another process."""
    lines: list[str] = []
    with holder_process(place) as process:
        assert line(process) == "held"
        process.send_signal(signal.SIGSTOP)
        while leases._read_process(process.pid)[1] != "T":
            time.sleep(0.01)
        with hold_lease(place, on_wait=lines.append) as lease:
            assert len(lines) == 1, "it was watched first"
            process.send_signal(signal.SIGCONT)
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            assert line(process) == "lost"
            process.wait(10)
            lease.check()
            assert held(place).pid == os.getpid()  # type: ignore[union-attr]
            assert not held(place).released, "the loser left the winner's lease alone"  # type: ignore[union-attr]


def part(gallery: Gallery, name: str, count: int = 5) -> PartRecord:
    """A part with faces of its own, on the disk and not yet in the table."""
    ids, vectors = next(Faces(seed=hash(name) % 1000).blocks(count))
    action, path = write_rows(gallery, face_rows(ids, vectors, abs(hash(name)) % 10**9), name, True)
    return PartRecord(0, path=path, size=action.size, stats=action.stats)


@pytest.mark.parametrize(("trial", "place"), TRIALS, indirect=["place"])
def test_who_lost_the_lease_cannot_commit(trial: int, place: str) -> None:
    """The loser is held up anywhere before its commit reaches the table; the winner's work and no other is in it."""
    gallery = Gallery.create(place, CONTRACT)
    loser = Committer(gallery, "slow")
    late = part(gallery, "slow")
    if trial % 2:
        loser._check_new_commits()  # it had looked already: between this and its commit nothing asks again
    winner = Committer(Gallery(place), "quick")
    for n in range(1 + trial % 3):
        winner([part(gallery, f"quick{n}")], {})
    if trial % 2:
        assert not loser._try_commit([make_add_action(late.path, late.size, late.stats)], 1, {})
    with pytest.raises(GalleryBusyError, match="another run has written"):
        loser([late], {})
    table = Gallery(place)
    assert late.path not in {file["path"] for file in table.files()}
    assert len(table.vectors()[0]) == 5 * (1 + trial % 3)


def test_a_commit_that_came_in_before_the_committer_was_made_counts_as_well(tmp_path: Path) -> None:
    """What a run decides from is the version that it read: one that lands after that may hold the same images."""
    gallery = Gallery.create(str(tmp_path / "g"), CONTRACT)
    Committer(Gallery(gallery.path), "late")([part(gallery, "late")], {})
    with pytest.raises(GalleryBusyError, match="another run has written"):
        Committer(gallery, "mine")([part(gallery, "mine")], {})


def test_a_commit_that_was_interrupted_after_it_landed_is_counted(tmp_path: Path) -> None:
    gallery = Gallery.create(str(tmp_path / "g"), CONTRACT)
    commit = Committer(gallery, "run")
    first, second = part(gallery, "a"), part(gallery, "b")
    assert commit._try_commit(
        [make_add_action(first.path, first.size, first.stats)], 1, {}
    )  # and here it was interrupted
    commit([second], {})
    assert {file["path"] for file in Gallery(gallery.path).files()} == {first.path, second.path}
    assert open_table(gallery.faces_folder).transaction_version("run") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_commit_is_finished_before_a_signal_counts(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        pass

    def end(*_: object) -> None:
        raise Ended

    gallery = Gallery.create(str(tmp_path / "g"), CONTRACT)
    commit, found = Committer(gallery, "run"), part(gallery, "a")
    catch_up = commit._check_new_commits

    def interrupted() -> None:
        os.kill(os.getpid(), number)
        catch_up()

    monkeypatch.setattr(commit, "_check_new_commits", interrupted)
    before = signal.signal(number, end)
    try:
        with pytest.raises(Ended):
            commit([found], {})
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)
    assert [file["path"] for file in Gallery(gallery.path).files()] == [found.path]


# --- clocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", trials(10))
def test_no_setting_of_the_clock_takes_or_gives_a_lease(
    trial: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rng, real = str(tmp_path / "g"), random.Random(trial), time.time
    with hold_lease(place) as lease:
        years = rng.choice([-30, -1, 1, 30]) * rng.random() * 3.15e7
        monkeypatch.setattr(time, "time", lambda: real() + years)
        monkeypatch.setattr(time, "time_ns", lambda: int((real() + years) * 1e9))
        os.utime(Path(place, leases.LEASE_FILE), (abs(real() + years),) * 2)
        with pytest.raises(GalleryBusyError), hold_lease(place):
            pass
        lease.check()
    with hold_lease(place) as lease:
        lease.check()


# --- trouble with the store --------------------------------------------------------------------------------------------


class Store:
    """Stands between the lease and its file: down, or losing its answers."""

    def __init__(self) -> None:
        self.down = self.deaf = False
        self.write_if = conditional.write_if
        self.calls = self.renewals = 0

    def __call__(self, path: str, data: bytes, tag: str | None) -> str:
        self.calls += 1
        if self.down:
            raise StorageError("503 Service Unavailable")
        made = self.write_if(path, data, tag)
        self.renewals += 1
        if self.deaf:
            raise StorageError("operation timed out")
        return made


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(conditional, "write_if", made)
    return made


def test_a_holder_that_cannot_renew_stops_before_its_lease_ends(tmp_path: Path, store: Store, clock: Clock) -> None:
    place = str(tmp_path / "g")
    with hold_lease(place) as lease:
        store.down = True
        failures = store.calls + 2
        wait_until(lambda: store.calls >= failures)
        clock.now += SECONDS * 0.7
        lease.check()
        clock.now += SECONDS * 0.1
        with pytest.raises(GalleryBusyError, match="could not be renewed"):
            lease.check()
        failures = store.calls + 2
        wait_until(lambda: store.calls >= failures)  # it goes on trying


def test_a_store_that_comes_back_in_time_costs_nothing(tmp_path: Path, store: Store, clock: Clock) -> None:
    place = str(tmp_path / "g")
    with hold_lease(place) as lease:
        for _ in range(3):
            store.down = True
            failures = store.calls + 2
            wait_until(lambda calls=failures: store.calls >= calls)  # type: ignore[misc]
            clock.now += SECONDS * 0.7
            renewals = store.renewals + 2
            store.down = False
            wait_until(lambda calls=renewals: store.renewals >= calls)  # type: ignore[misc]
            lease.check()
    assert held(place).released  # type: ignore[union-attr]


@pytest.mark.parametrize("trial", trials(10))
def test_lost_answers_do_not_lose_the_lease(trial: int, tmp_path: Path, store: Store, clock: Clock) -> None:
    place, rng = str(tmp_path / "g"), random.Random(trial)
    with hold_lease(place) as lease:
        for _ in range(4):
            store.deaf = not store.deaf
            time.sleep(rng.uniform(0.05, 0.35) * SECONDS)
        store.deaf = False
        renewals = store.renewals + 1
        wait_until(lambda: store.renewals >= renewals)
        lease.check()
        beat = held(place)
        assert beat is not None
        assert beat.beat > 0
    assert held(place).released  # type: ignore[union-attr]


def test_an_answer_lost_when_it_is_taken_blocks_nobody(tmp_path: Path, store: Store) -> None:
    """A program that lives on, such as a notebook, must not be refused by the lease that it failed to take."""
    place = str(tmp_path / "g")
    store.deaf = True
    with pytest.raises(GalleryError, match="timed out"), hold_lease(place):
        pass
    assert held(place) is not None
    store.deaf = False
    with hold_lease(place) as lease:
        lease.check()


def test_who_lost_it_leaves_the_winners_lease(place: str) -> None:
    with ExitStack() as stack:
        lease = stack.enter_context(hold_lease(place))
        winner = elsewhere()
        put(place, winner)
        with pytest.raises(GalleryBusyError, match="another run took it over"):
            check_until_lost(lease)
    assert held(place) == winner


# --- files that say nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"12345\n",
        b"{}",
        b"null",
        b"\xff\x00" * 40,
        b'{"holder": "a", "host": "b"',
        json.dumps(asdict(elsewhere()) | {"seconds": "long"}).encode(),
        json.dumps(asdict(elsewhere()) | {"seconds": 1e300}).encode(),
        json.dumps(asdict(elsewhere()) | {"seconds": -1}).encode(),
        json.dumps(asdict(elsewhere()) | {"pid": None}).encode(),
        elsewhere().encode()[:-9],
    ],
)
def test_a_damaged_lease_is_no_lease(data: bytes, tmp_path: Path, clock: Clock) -> None:
    place = str(tmp_path / "g")
    put(place, data)
    with hold_lease(place) as lease:
        lease.check()
    assert not clock.waits
    assert held(place).released  # type: ignore[union-attr]


def test_one_of_a_newer_version_is_understood(tmp_path: Path) -> None:
    far = elsewhere()
    put(str(tmp_path / "g"), json.dumps(asdict(far) | {"mood": "fine"}).encode())
    assert held(str(tmp_path / "g")) == far


@pytest.mark.parametrize("trial", trials(20))
def test_bits_that_flip_in_a_lease_never_show_a_traceback(trial: int, tmp_path: Path) -> None:
    place, rng = str(tmp_path / "g"), random.Random(trial)
    data = bytearray(elsewhere(seconds=0.05).encode())
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    put(place, bytes(data))
    found = held(place)
    if found is not None and found.seconds > 1:
        return  # watched for as long as it says: an hour at most
    with suppress(FacepipeError), hold_lease(place) as lease:
        lease.check()


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "1e9"])
def test_lease_seconds_must_make_sense(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACEPIPE_LEASE_SECONDS", text)
    with pytest.raises(ConfigError, match="FACEPIPE_LEASE_SECONDS"):
        get_lease_seconds()


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"), hold_lease(str(tmp_path / "file")):
        pass
    with pytest.raises(GalleryError, match="cannot write"), hold_lease(str(tmp_path / "file" / "g")):
        pass
