"""Random histories of a gallery, and what it should hold after each step."""

import copy
import random
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from bench.galleries import CONTRACT
from deltalake import DeltaTable, QueryBuilder

from facepipe.arrow import to_float_lists
from facepipe.gallery import Gallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord
from facepipe.gallery.commits.rewrite import Rewrite, plan_rewrite_of_uris, rewrite_files, write_new_rows
from facepipe.gallery.file_counts import count_images, refresh_counts
from facepipe.gallery.maintenance.compact import CompactConfig, compact_files, fold_marks, plan_compaction
from facepipe.gallery.maintenance.purge import find_due_files, purge_files
from facepipe.gallery.marks import MARKED
from facepipe.hashing import compute_face_id
from facepipe.schema import FACES, OK, conform
from facepipe.storage.table_access import get_delta_options

START = datetime(2026, 1, 1, tzinfo=UTC)
Values = dict[str, dict[str, Any]]  # per uri: the columns that change
OBSERVED = (*MARKED, "ingested_at", "identity", "image_id")


class History:
    """A gallery to which random things happen, and what it should hold."""

    def __init__(self, path: str | Path, seed: int):
        self.gallery = Gallery.create(str(path), CONTRACT)
        self.commit = Committer(self.gallery, "run")
        self.expected: Values = {}
        self.erased: set[str] = set()
        self.rng = random.Random(seed)
        self.step = 0

    def add(self, uris: list[str], replaced: list[str] | None = None) -> None:
        """Commit a part with two faces per image."""
        self.step += 1
        count = 2 * len(uris)
        vectors = np.random.default_rng(self.step).standard_normal((count, 128)).astype(np.float32)
        time = START + timedelta(days=self.step)
        faces = [(uri, n) for uri in uris for n in range(2)]
        columns = {
            "face_id": [compute_face_id(uri, str(self.step), n) for uri, n in faces],
            "image_id": [str(self.step)] * count,
            "uri": [uri for uri, _ in faces],
            "status": [OK] * count,
            "face_index": [n for _, n in faces],
            "fingerprint": [f"new-{self.step}"] * count,
            "ingested_at": pa.array([time] * count, FACES.field("ingested_at").type),
            "embedding": to_float_lists(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)),
        }
        rows = conform(pa.table(columns))
        action = write_new_rows(self.gallery, rows, f"run-{self.step:06d}")
        record = PartRecord(self.step, path=action.path, size=action.size, stats=action.stats, replaced=replaced or [])
        self.commit([record], {})
        for uri in uris:
            self.expected[uri] = {
                "fingerprint": f"new-{self.step}",
                "missing_since": None,
                "ingested_at": time,
                "identity": None,
                "image_id": str(self.step),
            }

    def copy_to(self, path: Path) -> "History":
        """Copy the gallery, so that the same thing happens to the copy next."""
        twin = copy.copy(self)
        shutil.copytree(self.gallery.path, path)
        twin.gallery = Gallery(str(path))
        twin.commit = Committer(twin.gallery, "twin")
        twin.rng = random.Random()
        twin.rng.setstate(self.rng.getstate())
        twin.expected = copy.deepcopy(self.expected)
        twin.erased = set(self.erased)
        return twin

    def relabel(self, uris: list[str], *, touching: bool = False) -> None:
        """Give images a label; if `touching`, some of them are touched as well, and others are touched only."""
        self.step += 1
        touched = [*uris[::2], *self.choose()] if touching else []
        labels: dict[str, str | None] = dict.fromkeys(uris, f"label-{self.step}")
        marks: dict[str, str | None] = dict.fromkeys(touched, f"touched-{self.step}")
        self.commit([PartRecord(self.step, touched=marks, relabelled=labels)], {})
        for uri in touched:
            self.expected[uri] |= {"fingerprint": f"touched-{self.step}", "missing_since": None}
        for uri in uris:
            self.expected[uri]["identity"] = f"label-{self.step}"

    def touch(self, uris: list[str]) -> None:
        self.step += 1
        marks: dict[str, str | None] = dict.fromkeys(uris, f"touched-{self.step}")
        self.commit([PartRecord(self.step, touched=marks)], {})
        for uri in uris:
            self.expected[uri] |= {"fingerprint": f"touched-{self.step}", "missing_since": None}

    def miss(self, uris: list[str]) -> None:
        """Mark images as missing, as `mark_missing` does."""
        self.step += 1
        time = START + timedelta(days=self.step)

        def set_time(rows: pa.Table, mask: Any) -> pa.Table:
            n = rows.schema.get_field_index("missing_since")
            values = pc.if_else(mask, pa.scalar(time, rows.schema.field(n).type), rows[n])
            return rows.set_column(n, FACES.field("missing_since"), values)

        plan = Rewrite(
            columns=("uri", "missing_since"),
            matches=lambda rows: pc.and_(pc.is_null(rows["missing_since"]), pc.is_in(rows["uri"], pa.array(uris))),
            change=set_time,
            data_change=False,
            change_marked=lambda rows: set_time(rows, pa.scalar(True)),
        )
        self.commit.commit_actions(lambda: list(rewrite_files(Gallery(self.gallery.path), plan)), {})
        for uri in uris:
            if self.expected[uri]["missing_since"] is None:
                self.expected[uri]["missing_since"] = time

    def erase(self, uris: list[str]) -> None:
        plan = plan_rewrite_of_uris(uris, lambda rows, mask: rows.filter(pc.invert(mask)))
        plan = replace(plan, deletes=True, purges=lambda rows: pc.is_in(rows["uri"], pa.array(uris)))
        self.commit.commit_actions(lambda: list(rewrite_files(Gallery(self.gallery.path), plan)), {})
        for uri in uris:
            del self.expected[uri]
        self.erased.update(uris)

    def join(self) -> None:
        gallery = Gallery(self.gallery.path)
        groups = plan_compaction(gallery, CompactConfig(target_bytes=200_000), everything=True)
        compact_files(gallery, groups[:2], self.commit)

    def choose(self) -> list[str]:
        """Choose some uris that the table has."""
        return self.rng.sample(sorted(self.expected), min(len(self.expected), self.rng.randint(1, 5)))

    def happen(self) -> None:
        """Let something happen."""
        kinds = ["add", "replace", "replace", "relabel", "relabel", "touch", "miss", "miss", "erase", "join", "fold"]
        kind = self.rng.choice([*kinds, "purge"])
        if kind == "add":
            self.add([f"/{self.rng.choice('abc')}/{self.step:03d}-{n}.jpg" for n in range(4)])
        elif kind == "replace":
            chosen = self.choose()
            self.add(chosen, replaced=chosen)
        elif kind == "relabel":
            self.relabel(self.choose(), touching=True)
        elif kind in ("touch", "miss", "erase"):
            getattr(self, kind)(self.choose())
        elif kind == "join":
            self.join()
        elif kind == "purge":
            gallery = Gallery(self.gallery.path)
            purge_files(gallery, find_due_files(gallery, 30, everything=self.rng.random() < 0.5), self.commit)
        else:
            fold_marks(Gallery(self.gallery.path), self.commit, everything=True)

    def check(self) -> None:
        """Check that every way of reading gives what is expected, and that nothing is left of what was erased."""
        gallery = Gallery(self.gallery.path)
        assert read_values(gallery.to_arrow()) == self.expected
        missing = sorted(uri for uri, values in self.expected.items() if values["missing_since"] is not None)
        filtered = gallery.to_arrow(["uri"], "missing_since is not null")
        assert sorted(set(filtered["uri"].to_pylist())) == missing
        assert filtered.num_rows == 2 * len(missing)
        present = gallery.to_arrow(["uri", "face_index"], "missing_since is null and face_index = 1")
        assert sorted(present["uri"].to_pylist()) == sorted(self.expected.keys() - set(missing))
        marked = pa.array(self.choose())
        chosen = pa.concat_tables(gallery.read_chosen_rows("uri", marked, ["uri", *OBSERVED, "thumb"]))
        assert read_values(chosen) == {uri: self.expected[uri] for uri in marked.to_pylist()}
        # Readers of others see the same rows; the two columns alone may be behind.
        stock = read_as_stock(gallery)
        same = [name for name in FACES.names if name not in MARKED]
        order = [("uri", "ascending"), ("face_index", "ascending")]
        assert stock.select(same).sort_by(order).equals(gallery.to_arrow(same).sort_by(order))
        assert count_images(gallery) == gallery.counts()
        if self.rng.random() < 0.5:
            refresh_counts(gallery)
            assert count_images(gallery) == gallery.counts()
        left = set().union(*(batch["uri"].to_pylist() for batch in gallery.batches(["uri"], with_deleted=True)))
        assert left.isdisjoint(self.erased)
        if not len(gallery.marks):
            assert read_values(stock) == self.expected
        assert gallery.count_totals().rows == gallery.count_totals().faces == 2 * len(self.expected)
        assert sum(file["rows"] for file in gallery.files()) == sum(file["faces"] for file in gallery.files())


def read_values(rows: pa.Table) -> Values:
    """Read per uri what can change; all rows of an image agree."""
    values: Values = {}
    for row in rows.select(["uri", *OBSERVED]).to_pylist():
        own = {name: row[name] for name in OBSERVED}
        assert values.setdefault(row["uri"], own) == own
    return values


def open_as_stock(gallery: Gallery) -> DeltaTable:
    """Open the table with deltalake alone."""
    return DeltaTable(gallery.faces_folder, storage_options=get_delta_options(gallery.faces_folder))


def read_as_stock(gallery: Gallery) -> pa.Table:
    """Read all rows with the engine of deltalake, which knows nothing of facepipe."""
    query = QueryBuilder().register("faces", open_as_stock(gallery)).execute("SELECT * FROM faces")
    return pa.table(query.read_all()).cast(FACES)
