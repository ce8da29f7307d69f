"""Search on owners: Ray actors that have the shards open, one copy per cluster. What is lost is placed again."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

from facepipe.errors import FacepipeError, IndexReplacedError, WorkerError
from facepipe.index.answers import SearchCounts
from facepipe.index.manifest import Manifest
from facepipe.index.owners import OwnedShard, OwnedShards, OwnerShare, OwnerState, ScanStep, ShardOwner
from facepipe.index.placement import NodeRoom, count_bytes, divide_shards
from facepipe.index.search import Index
from pipelines.runtime.runners import ray as runner
from pipelines.search.parts import PinnedIndex, SearchTask, answer_and_write

# Blocks of queries in work at a time: while owners search for one, another is read, merged or written.
_BLOCKS_IN_WORK = 3
# Losses of owners in a row without a finished block, after which a search ends.
_MAX_LOSSES = 3


class OwnerLostError(Exception):
    """An owner ended, or what it had made is lost. The block is searched again."""


class LazyOwner(ShardOwner):
    """An owner in a Ray actor. It opens its shards by a call, so that an error of facepipe arrives as it is."""

    def __init__(self, share: OwnerShare):
        """Note what to open."""
        self._share = share
        self._is_open = False

    def answer(self) -> None:
        """Show that the owner is there."""

    def open(self) -> OwnerState:
        """Open the shards, if they are not."""
        if not self._is_open:
            super().__init__(self._share)
            self._is_open = True
        return self.describe()


OWNER_CLASS = LazyOwner
"""What runs in an actor."""


@dataclass(frozen=True)
class Owner:
    """An owner that was placed.

    Attributes:
        actor: Of Ray.
        room: Its node, and its part of the node's memory and CPUs.
        shards: What it has open.
        has_cpus: Whether it holds CPUs of the node. One that takes a lost node's shards finds none that are free.
    """

    actor: Any
    room: NodeRoom
    shards: tuple[OwnedShard, ...]
    has_cpus: bool

    @property
    def shard_bytes(self) -> int:
        """Bytes of its shards."""
        return sum(count_bytes(shard.entry) for shard in self.shards)


class RayCalls:
    """Calls owners in Ray actors, as `facepipe.index.owners.OwnerCalls` describes."""

    def __init__(self, owners: Sequence[Owner]):
        self._actors = [owner.actor for owner in owners]

    @property
    def owners(self) -> int:
        """Number of owners."""
        return len(self._actors)

    def put(self, value: Any) -> Any:
        """Put a value into the object store, from which each node takes it once."""
        import ray

        return ray.put(value)

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method with the arguments of each owner."""
        actors = self._actors[: len(arguments)]
        return [getattr(actor, method).remote(*given) for actor, given in zip(actors, arguments, strict=True)]

    def call_scan(self, arguments: Sequence[tuple[Any, ...]]) -> list[ScanStep]:
        """Call `scan_lists` of each owner. What it keeps stays in the object store of its node."""
        pairs = zip(self._actors, arguments, strict=True)
        return [ScanStep(*actor.scan_lists.options(num_returns=2).remote(*given)) for actor, given in pairs]

    def fetch(self, references: Sequence[Any]) -> list[Any]:
        """Get what owners return.

        Raises:
            OwnerLostError: an owner ended, or an object was lost with its node.
            FacepipeError: an owner raised it.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return list(ray.get(list(references)))
        except RayTaskError as error:
            if isinstance(error.cause, FacepipeError):
                raise error.cause from None
            if isinstance(error.cause, RayError):  # what it was to get from another owner was lost
                raise OwnerLostError(runner.get_last_line(error)) from error
            raise
        except RayError as error:
            raise OwnerLostError(runner.get_last_line(error)) from error


class OwnerPool:
    """The owners of an index, and the index on them."""

    def __init__(self, gallery: str, pinned: PinnedIndex, recall: float | None, owners: int | None):
        """Note what to open; owners start with the first block.

        Args:
            gallery: path or URL.
            pinned: the index of the search.
            recall: share of the true faces to find.
            owners: number of owners, by default one per node.
        """
        self._gallery = gallery
        self._pinned = pinned
        self._recall = recall
        self._count = owners
        self._owners: list[Owner] = []
        self._manifest: Manifest | None = None
        self._index: Index | None = None
        self._generation = 0
        self._losses = 0
        self._is_stopped = False
        self._guard = threading.Lock()

    def open_index(self) -> tuple[Index, int]:
        """Return the index on owners, and the number of times that owners were replaced."""
        with self._guard:
            self._require_running()
            while self._index is None:
                try:
                    self._index = self._pinned.open(self._gallery, self._recall, open_elsewhere=self._open_shards)
                except OwnerLostError as error:
                    self._replace_lost(error)
            return self._index, self._generation

    def replace_lost(self, generation: int, error: Exception) -> None:
        """Place the shards of lost owners again.

        Args:
            generation: that `open_index` returned; nothing is done if owners were replaced since.
            error: by which the loss was noticed.

        Raises:
            WorkerError: too many were lost without a finished block.
        """
        with self._guard:
            if generation == self._generation:
                self._replace_lost(error)

    def reopen(self, generation: int) -> None:
        """Open the index anew: a file of it was deleted."""
        with self._guard:
            if generation == self._generation:
                self._generation += 1
                self._index = None
                self._manifest = None

    def note_progress(self) -> None:
        """Note that a block is finished."""
        with self._guard:
            self._losses = 0

    def stop(self) -> None:
        """End the owners. Blocks that are in work end with an error."""
        # Without the guard first: who holds it may wait for owners that open their shards.
        self._is_stopped = True
        self._end(list(self._owners))
        with self._guard:
            self._end(self._owners)
            self._owners = []

    def _require_running(self) -> None:
        if self._is_stopped:
            raise WorkerError("the search was ended")

    def _open_shards(self, manifest: Manifest) -> OwnedShards:
        """Open the shards of a manifest on owners, if they are not."""
        if manifest != self._manifest:
            self._end(self._owners)
            rooms = split_rooms(_require_rooms(), self._count)
            shards = [OwnedShard(entry, age) for age, entry in enumerate(manifest.shards)]
            shares = divide_shards(shards, rooms)
            self._owners = self._start(zip(rooms, shares, strict=True), has_cpus=True)
            self._manifest = manifest
        calls = RayCalls(self._owners)
        calls.fetch(calls.call("open", [()] * calls.owners))
        return OwnedShards(calls)

    def _replace_lost(self, error: Exception) -> None:
        self._require_running()
        # Other blocks in work end with the same message.
        self._losses = min(self._losses, _MAX_LOSSES) + 1
        if self._losses > _MAX_LOSSES:
            raise WorkerError(
                f"owners of shards were lost {self._losses} times without a finished block ({error}): look at their "
                "nodes' memory, then run the same command again, which resumes; run.placement=copies needs no owners"
            ) from error
        self._generation += 1
        self._index = None
        rooms = _require_rooms()
        nodes = {room.node for room in rooms}
        kept: list[Owner] = []
        unplaced: list[OwnedShard] = []
        # Owners that are there answer when they are through with what they were asked.
        answers = [(owner, owner.actor.answer.remote()) for owner in self._owners]
        for owner, answer in answers:
            if _has_answered(answer):
                kept.append(owner)
                continue
            self._end([owner])
            # On the same node again if that is up.
            if owner.room.node in nodes:
                kept += self._start([(owner.room, owner.shards)], has_cpus=owner.has_cpus)
            else:
                unplaced += owner.shards
        # What was on lost nodes is divided among the others, in addition to what they have.
        held = [sum(owner.shard_bytes for owner in kept if owner.room.node == room.node) for room in rooms]
        shares = divide_shards(unplaced, rooms, held)
        self._owners = kept + self._start(zip(rooms, shares, strict=True), has_cpus=False)

    def _start(self, shares: Iterable[tuple[NodeRoom, tuple[OwnedShard, ...]]], *, has_cpus: bool) -> list[Owner]:
        """Start owners where they belong, without CPUs of their own if the node's are taken."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        owners = []
        for room, shards in shares:
            if not shards:
                continue
            share = OwnerShare(self._gallery, shards, max(1, room.cpus))
            actor_class = ray.remote(
                num_cpus=room.cpus if has_cpus else 0,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(room.node, soft=False),
            )(OWNER_CLASS)
            owners.append(Owner(actor_class.remote(share), room, shards, has_cpus))
        return owners

    @staticmethod
    def _end(owners: Sequence[Owner]) -> None:
        import ray

        for owner in owners:
            ray.kill(owner.actor)


def _has_answered(answer: Any) -> bool:
    import ray
    from ray.exceptions import RayError

    try:
        ray.get(answer)
    except RayError:
        return False
    return True


def _require_rooms() -> list[NodeRoom]:
    rooms = runner.list_rooms()
    if not rooms:
        raise WorkerError("no node of Ray has a CPU: add nodes, or set run.runner=inline")
    return rooms


def split_rooms(nodes: Sequence[NodeRoom], owners: int | None) -> list[NodeRoom]:
    """Split the nodes' memory and CPUs into a room per owner, by default one per node."""
    if owners is None or owners == len(nodes):
        return list(nodes)
    chosen = [nodes[n % len(nodes)] for n in range(owners)]
    rooms = []
    for node in chosen:
        sharing = sum(other.node == node.node for other in chosen)
        rooms.append(NodeRoom(node.node, node.memory // sharing, node.cpus // sharing))
    return rooms


def search_on_owners(tasks: Iterable[SearchTask], pool: OwnerPool) -> Iterator[tuple[SearchTask, SearchCounts]]:
    """Search blocks of queries, some of them at a time.

    Yields:
        Block and counts, in the order in which blocks are finished.

    Raises:
        WorkerError: owners were lost too often.
        FacepipeError: an owner raised it.
    """
    waiting = iter(tasks)
    with ThreadPoolExecutor(_BLOCKS_IN_WORK) as threads:
        working: dict[Future[SearchCounts], SearchTask] = {}
        try:
            while True:
                for task in islice(waiting, _BLOCKS_IN_WORK - len(working)):
                    working[threads.submit(_search_block, task, pool)] = task
                if not working:
                    return
                for future in wait(working, return_when=FIRST_COMPLETED).done:
                    task = working.pop(future)
                    yield task, future.result()
        finally:
            # What waits is not begun if one failed, or if the caller was interrupted, and what is in work ends.
            threads.shutdown(wait=False, cancel_futures=True)
            pool.stop()


def _search_block(task: SearchTask, pool: OwnerPool) -> SearchCounts:
    """Search a block, again if owners are lost meanwhile. Its part appears when it is complete."""
    has_reopened = False
    while True:
        index, generation = pool.open_index()
        try:
            counts = answer_and_write(index, task)
        except OwnerLostError as error:
            pool.replace_lost(generation, error)
        except IndexReplacedError:
            # Faces were erased meanwhile: the same index without them is there, unless its files are deleted.
            if has_reopened:
                raise
            has_reopened = True
            pool.reopen(generation)
        else:
            pool.note_progress()
            return counts
